"""Where a model comes from: folders, hub ids, GGUF files, and what is refused before anything is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from octavo._core.errors import FormatError, UsageError
from octavo.models.adapter import CausalModel
from octavo.models.source import resolve

Tiny = Callable[[str], Path]


def open_model(folder: Path, **options: Any) -> CausalModel:
    return CausalModel(resolve(folder), **options)


def with_config(folder: Path, target: Path, **values: Any) -> Path:
    """A copy of a model with changed entries of config.json (None removes one)."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text()) | values
    (target / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return target


# -------------------------------------------------------------------------------------------------- MODEL


def test_a_mistyped_folder_is_an_error_with_the_nearest_name(tiny_llama: Path) -> None:
    with pytest.raises(UsageError, match=r"does not exist\. Did you mean 'tiny-llama'"):
        resolve(tiny_llama.with_name("tiny-lama"))
    with pytest.raises(UsageError, match="does not exist"):
        resolve(str(tiny_llama / "nothing" / "here"))


def test_a_hub_id_without_network_explains_itself() -> None:
    with pytest.raises(UsageError, match=r"HF_HUB_OFFLINE is set.*Pass a folder.*HF_TOKEN"):
        resolve("some-organisation/some-model-that-is-not-cached")


def test_pickled_weights_are_refused_with_advice(tiny_llama: Path, tmp_path: Path) -> None:
    folder = with_config(tiny_llama, tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(FormatError, match=r"only as pickle \(pytorch_model\.bin\).*save_pretrained"):
        resolve(folder)


def test_a_folder_without_configuration_says_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FormatError, match=r"no config\.json.*LoRA adapter"):
        resolve(tmp_path)


def test_an_unknown_model_type_is_an_error(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"'warbler'"):
        resolve(with_config(tiny_llama, tmp_path / "unknown", model_type="warbler"))
    with pytest.raises(FormatError, match="has no model_type"):
        resolve(with_config(tiny_llama, tmp_path / "none", model_type=None))


def test_custom_code_is_refused_with_its_files_listed(tiny_llama: Path, tmp_path: Path) -> None:
    auto_map = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "other/repo--modeling_x.X"}
    folder = with_config(tiny_llama, tmp_path / "m", model_type="x", auto_map=auto_map)
    (folder / "configuration_x.py").write_text("raise SystemExit('this must never run')")
    with pytest.raises(UsageError, match=r"configuration_x\.py, other/repo \(another repository\).*trust-remote-code"):
        resolve(folder)


def test_code_files_beside_a_known_architecture_do_not_run(tiny_llama: Path, tmp_path: Path) -> None:
    folder = with_config(tiny_llama, tmp_path / "m", auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    (folder / "modeling_x.py").write_text("raise SystemExit('this must never run')")
    source = resolve(folder)
    assert len(CausalModel(source).blocks) == 2
    assert not any(path.suffix == ".py" for path in source.auxiliary_files())


def test_an_encoder_decoder_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    from transformers import T5Config

    T5Config(num_layers=2, d_model=32).save_pretrained(tmp_path)
    shutil.copy(tiny_llama / "model.safetensors", tmp_path)
    with pytest.raises(UsageError, match="encoder-decoder"):
        open_model(tmp_path)


# -------------------------------------------------------------------------------------------------- gguf


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """The tiny Llama as llama.cpp would write it: float32 tensors, rotary rows of q and k interleaved."""
    import gguf
    import numpy as np

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tensors = load_file(tiny_llama / "model.safetensors")
    tokenizer = json.loads((tiny_llama / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(320)
    writer.add_tokenizer_model("gpt2")
    pieces = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    writer.add_token_list(pieces)
    writer.add_token_types([3] * 3 + [1] * (len(pieces) - 3))
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    writer.add_tensor("token_embd.weight", tensors["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", tensors["model.norm.weight"].numpy())
    for layer in range(2):
        for ours, theirs in parts.items():
            value = tensors[f"model.layers.{layer}.{ours}.weight"].numpy()
            if theirs in ("attn_q", "attn_k"):
                heads = 4 if theirs == "attn_q" else 2
                value = value.reshape(heads, 2, 8, 64).swapaxes(1, 2).reshape(value.shape)
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_gives_the_original_tensors_and_is_converted_once(
    tiny_gguf: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    source = resolve(tiny_gguf, work=tmp_path / "work")
    assert source.name == "tiny"
    converted, original = (load_file(folder / "model.safetensors") for folder in (source.folder, tiny_llama))
    assert converted.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(converted[name], tensor.to(torch.bfloat16)), name
    model = CausalModel(source)
    assert model.config.tie_word_embeddings
    assert model.tokenizer().chat_template == "{{ messages[0]['content'] }}"
    stamp = (source.folder / "model.safetensors").stat().st_mtime_ns
    assert resolve(tiny_gguf, work=tmp_path / "work").folder == source.folder
    assert (source.folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert [path.name for path in (tmp_path / "work").iterdir()] == [source.folder.name]


@pytest.mark.parametrize("keep", [3000, -64], ids=["metadata", "weights"])
def test_a_truncated_gguf_file_leaves_nothing_behind(tiny_gguf: Path, tmp_path: Path, keep: int) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny_gguf.read_bytes()[:keep])
    with pytest.raises(FormatError, match="cannot read"):
        resolve(broken, work=tmp_path / "work")
    assert list((tmp_path / "work").iterdir()) == []


def test_a_file_that_only_claims_to_be_gguf_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "model.gguf"
    page.write_bytes(b"<html>not found</html>")
    with pytest.raises(FormatError, match="no GGUF file"):
        resolve(page, work=tmp_path)
