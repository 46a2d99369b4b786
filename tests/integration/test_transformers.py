"""Octavo checkpoints through plain transformers: loading, refusing, saving again, decoding."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from formats.checkpoints import edit_header, edit_json, write_plain
from formats.strategies import random_weight
from formats.tiny_models import MODELS, STYLES, VOCABULARY, decoded_model, quantize, write_tokenizer
from octavo import formats
from octavo._core.errors import FormatError, UsageError
from octavo.formats.reader import CheckpointReader
from octavo.integrations.transformers import OctavoConfig, OctavoQuantizer, load, register
from octavo.models import names
from octavo.nn import VQLinear
from octavo.weight import VQWeight

GOLDEN = Path(__file__).parents[1] / "golden" / "native_v1" / "checkpoint"


@pytest.fixture(autouse=True)
def chosen_on_purpose(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding at every call is what these tests want."""
    monkeypatch.setenv("OCTAVO_KERNEL", "reference")


@pytest.fixture(scope="module")
def fmt_original(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Saved tiny models by name, each made once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            torch.manual_seed(0)
            MODELS[name]().eval().save_pretrained(folder)
            write_tokenizer(folder)
            made[name] = folder
        return made[name]

    return get


@pytest.fixture
def fmt_llama(fmt_original: Callable[[str], Path], tmp_path: Path) -> tuple[Path, dict[str, VQWeight]]:
    """A quantized Llama in several shards."""
    weights = quantize(fmt_original("llama"), tmp_path / "llama")
    return tmp_path / "llama", weights


def ids() -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(5))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids()).logits


def state_bits(model: Any) -> dict[str, tuple[torch.dtype, bytes]]:
    return {n: (t.dtype, t.reshape(-1).view(torch.uint8).numpy().tobytes()) for n, t in model.state_dict().items()}


# ------------------------------------------------------------------------------------------------ loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list(MODELS))
def test_from_pretrained_computes_what_the_decoded_matrices_say(
    fmt_original: Callable[[str], Path], tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    original, out = fmt_original(name), tmp_path / "out"
    weights = quantize(original, out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=dtype)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, VQLinear)}
    assert layers.keys() == weights.keys()
    assert not model.training
    for module, weight in weights.items():
        for key, tensor in weight.tensors.items():
            loaded = model.get_submodule(module).state_dict()[key]
            assert loaded.dtype == tensor.dtype
            assert torch.equal(loaded, tensor), f"{module}.{key}"
    assert {p.dtype for p in model.parameters()} == {dtype}
    wanted = logits(decoded_model(original, weights, dtype))
    if name == "gpt2" and dtype != torch.float32:
        torch.testing.assert_close(logits(model), wanted, rtol=2e-2, atol=2e-2)  # Conv1D sums in another order
    elif name == "gpt2":
        torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(logits(model), wanted)


def test_import_octavo_is_enough_and_imports_no_transformers() -> None:
    code = (
        "import sys, octavo\n"
        "assert 'transformers' not in sys.modules\n"
        "import transformers.modeling_utils\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING\n"
        "print(AUTO_QUANTIZER_MAPPING['octavo'].__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["OctavoQuantizer"], done.stderr


def test_registering_again_changes_nothing() -> None:
    register()
    assert AUTO_QUANTIZER_MAPPING["octavo"] is OctavoQuantizer
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["octavo"] is OctavoConfig


def test_the_golden_checkpoint_loads_and_keeps_its_tied_head() -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(GOLDEN)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    gate = model.model.layers[0].mlp.gate_proj
    assert gate.layout.bias  # stored by the quantizer although Llama has none
    assert bool(torch.isfinite(model(torch.arange(8)[None]).logits).all())


def test_tied_and_untied_heads_are_kept(fmt_original: Callable[[str], Path], tmp_path: Path) -> None:
    for name, tied in (("llama", True), ("qwen2", False)):
        quantize(fmt_original(name), tmp_path / name)
        model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert ("lm_head.weight" in CheckpointReader(tmp_path / name)) is not tied
        assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


def test_model_wide_casts_leave_the_codebooks_alone(fmt_llama: tuple[Path, dict[str, VQWeight]]) -> None:
    folder, weights = fmt_llama
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(torch.bfloat16)  # type: ignore[arg-type]
    for module, weight in weights.items():
        state = model.get_submodule(module).state_dict()
        assert all(state[key].dtype == tensor.dtype for key, tensor in weight.tensors.items())
        assert all(torch.equal(state[key], tensor) for key, tensor in weight.tensors.items())
    assert logits(model).dtype == torch.bfloat16


def test_a_keep_in_float32_list_does_not_cast_codebooks(
    fmt_llama: tuple[Path, dict[str, VQWeight]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", {"q_proj", "v_proj"})
    model = AutoModelForCausalLM.from_pretrained(fmt_llama[0], dtype=torch.bfloat16)
    for module, weight in fmt_llama[1].items():
        state = model.get_submodule(module).state_dict()
        assert all(torch.equal(state[key], tensor) for key, tensor in weight.tensors.items())


def test_device_map_is_honoured(fmt_llama: tuple[Path, dict[str, VQWeight]]) -> None:
    plain = AutoModelForCausalLM.from_pretrained(fmt_llama[0])
    for device_map in ("cpu", "auto", {"": "cpu"}):
        mapped = AutoModelForCausalLM.from_pretrained(fmt_llama[0], device_map=device_map)
        assert torch.equal(logits(mapped).cpu(), logits(plain)) or torch.cuda.is_available()


@pytest.mark.parametrize(
    "cache",
    [
        {},
        {"cache_implementation": "static"},
        {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}},
    ],
)
def test_generation_works_packed_and_dense_with_any_cache(fmt_llama: tuple[Path, Any], cache: dict[str, Any]) -> None:
    texts = []
    for decode in ("packed", "dense"):
        model, tokenizer = load(fmt_llama[0], decode=decode)
        inputs = tokenizer("Octavo", return_tensors="pt")
        texts.append(model.generate(inputs["input_ids"], max_new_tokens=8, do_sample=False, pad_token_id=1, **cache))
    assert torch.equal(texts[0], texts[1])
    assert texts[0].shape[1] > 6


def test_loading_decodes_nothing(
    fmt_original: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-2 initialises ``c_proj.weight`` of every block again; that must not cost a decoded matrix each."""
    quantize(fmt_original("gpt2"), tmp_path / "out")
    monkeypatch.setattr(VQWeight, "dequantize", lambda *_: pytest.fail("decoded"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32


def test_deepcopies_of_a_model_work(fmt_llama: tuple[Path, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(fmt_llama[0])
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


# ------------------------------------------------------------------------------------------------ saving, decoding


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("shard", ["20KB", "5GB"])
def test_save_pretrained_round_trip_is_bit_equal(
    fmt_original: Callable[[str], Path], tmp_path: Path, name: str, shard: str
) -> None:
    quantize(fmt_original(name), tmp_path / "out")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    logits(model)  # a forward pass must not change what is saved
    model.save_pretrained(tmp_path / "again", max_shard_size=shard)
    assert (len(list((tmp_path / "again").glob("*.safetensors"))) > 1) == (shard == "20KB")
    assert formats.check(tmp_path / "again") == formats.check(tmp_path / "out")
    formats.check(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert state_bits(again) == state_bits(model)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_dequantize_gives_an_ordinary_model(fmt_original: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    weights = quantize(fmt_original(name), tmp_path / "out")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before = logits(model)
    dense = model.dequantize()
    assert {type(dense.get_submodule(module)) for module in weights} == {Conv1D if name == "gpt2" else nn.Linear}
    assert not hasattr(dense.config, "quantization_config")
    torch.testing.assert_close(logits(dense), before, rtol=1e-5, atol=1e-5)
    dense.save_pretrained(tmp_path / "dense")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(logits(plain), logits(dense))
    dense.to(torch.bfloat16)
    assert {p.dtype for p in dense.parameters()} == {torch.bfloat16}


def test_quantized_models_are_not_trainable(fmt_llama: tuple[Path, Any]) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(fmt_llama[0])
    assert model.hf_quantizer.is_trainable is False
    assert model.hf_quantizer.is_serializable() is True


# ------------------------------------------------------------------------------------------------ octavo.load


def test_load_is_dense_on_the_cpu_unless_told_otherwise(fmt_llama: tuple[Path, dict[str, VQWeight]]) -> None:
    folder, weights = fmt_llama
    packed, tokenizer = load(folder, decode="packed")
    auto, _ = load(str(folder), dtype="float32")
    assert (packed.octavo_decode, auto.octavo_decode) == ("packed", "dense")
    assert all(isinstance(packed.get_submodule(module), VQLinear) for module in weights)
    assert all(type(auto.get_submodule(module)) is nn.Linear for module in weights)
    assert torch.equal(logits(packed), logits(auto))
    assert tokenizer.decode(tokenizer("any text")["input_ids"]) == "any text"


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_load_takes_dtypes_by_name_and_value(fmt_llama: tuple[Path, Any], dtype: Any) -> None:
    for decode in ("packed", "dense"):
        model, _ = load(fmt_llama[0], dtype=dtype, decode=decode)
        assert model.dtype == torch.bfloat16
        assert logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_load_takes_original_models_too(fmt_original: Callable[[str], Path], name: str) -> None:
    model, tokenizer = load(fmt_original(name))
    assert model.octavo_decode == "original"
    assert len(tokenizer) == VOCABULARY
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(fmt_original(name))))


def test_load_explains_wrong_arguments(fmt_llama: tuple[Path, Any]) -> None:
    with pytest.raises(UsageError, match="decode wanted 'auto', 'dense' or 'packed', got 'fast'"):
        load(fmt_llama[0], decode="fast")  # type: ignore[arg-type]
    for dtype in ("float33", "nn"):
        with pytest.raises(UsageError, match=f"dtype wanted a torch dtype such as 'bfloat16', got '{dtype}'"):
            load(fmt_llama[0], dtype=dtype)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds neither model.safetensors"),
        ({"config.json": "{"}, "not valid JSON"),
        ({"config.json": '{"model_type": "llama"}'}, "holds neither model.safetensors"),
        ({"config.json": '{"model_type": "llama"}', "pytorch_model.bin": "x"}, "pickled PyTorch weights"),
    ],
)
def test_load_explains_folders_without_a_model(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(FormatError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("config", ['{"a": 1}', '{"model_type": "no_such_model"}'])
def test_load_explains_unknown_models(tmp_path: Path, config: str) -> None:
    write_plain(tmp_path, {"x": torch.zeros(1)})
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(FormatError, match="transformers cannot load this model"):
        load(tmp_path)


def test_load_of_an_original_with_missing_tensors_is_refused(
    fmt_original: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(fmt_original("llama"), tmp_path / "copy"))
    with CheckpointReader(folder) as reader:
        kept = {n: reader.read(n).clone() for n in reader.names() if n != "model.norm.weight"}
    (folder / "model.safetensors").unlink()
    write_plain(folder, kept)
    with pytest.raises(FormatError, match=r"needs are missing: model\.norm\.weight"):
        load(folder)


# ------------------------------------------------------------------------------------------------ refusing


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Write the checkpoint's tensors again after ``change``."""
    with CheckpointReader(folder) as reader:
        tensors = {name: reader.read(name).clone() for name in reader.names()}
        files = reader.files
    change(tensors)
    for path in [*files, folder / "model.safetensors.index.json"]:
        path.unlink(missing_ok=True)
    write_plain(folder, tensors, max_shard_bytes=20_000)
    formats.write_manifest(folder)


Q = "model.layers.1.self_attn.k_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q}.codebook_0"), rf"tensor {Q}.codebook_0 is missing"),
        (lambda t: t.pop("model.norm.weight"), r"1 tensors of the model are missing \(model.norm.weight\)"),
        (lambda t: t.pop("model.embed_tokens.weight"), r"missing \(lm_head.weight, model.embed_tokens.weight\)"),
        (lambda t: t.update({f"{Q}.weight": torch.zeros(32, 32)}), f"{Q}.weight is unknown"),
        (
            lambda t: t.update({"model.surprise": torch.zeros(3)}),
            r"1 tensors of the checkpoint belong to nothing \(model.surprise\)",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(33)}),
            r"norm.weight has shape \[33\], but config.json makes it \[32\]",
        ),
        (lambda t: t.update({f"{Q}.indices": t[f"{Q}.indices"][:-1].clone()}), rf"{Q}.indices wanted torch.int32"),
    ],
)
def test_missing_unexpected_and_misshaped_tensors_are_refused_before_loading(
    fmt_llama: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    folder = fmt_llama[0]
    rewrite(folder, change)
    with monkeypatch.context() as patch, pytest.raises(FormatError, match=message):
        patch.setattr(LlamaForCausalLM, "_load_pretrained_model", lambda *_, **__: pytest.fail("weights were read"))
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(FormatError, match=message):
        load(folder)


def test_tensors_that_get_lost_while_loading_are_noticed(
    fmt_llama: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last net, for conversions of transformers that the check before loading cannot foresee."""
    folder = fmt_llama[0]
    rewrite(folder, lambda tensors: tensors.pop("model.norm.weight"))
    monkeypatch.setattr(names, "match_names", lambda *_: None)
    with pytest.raises(FormatError, match=r"model\.norm\.weight were not in the checkpoint"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_buffers_that_stay_on_meta_are_noticed(fmt_llama: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    keep = OctavoQuantizer._process_model_after_weight_loading

    def lose(self: OctavoQuantizer, model: Any, **kwargs: Any) -> None:
        model.get_submodule(Q).to("meta")
        keep(self, model, **kwargs)

    monkeypatch.setattr(OctavoQuantizer, "_process_model_after_weight_loading", lose)
    with pytest.raises(FormatError, match=f"{Q}: .*indices.* were not loaded"):
        AutoModelForCausalLM.from_pretrained(fmt_llama[0])


def test_damaged_contents_are_refused(fmt_llama: tuple[Path, Any]) -> None:
    rewrite(fmt_llama[0], lambda tensors: tensors[f"{Q}.codebook_0"].view(-1)[:1].fill_(float("nan")))
    with pytest.raises(FormatError, match=f"{Q}: codebook_0 holds NaN"):
        AutoModelForCausalLM.from_pretrained(fmt_llama[0])


def test_truncated_shard_is_refused_before_loading(fmt_llama: tuple[Path, Any]) -> None:
    shard = CheckpointReader(fmt_llama[0]).files[-1]
    os.truncate(shard, shard.stat().st_size - 10)
    with pytest.raises(FormatError, match="is truncated"):
        AutoModelForCausalLM.from_pretrained(fmt_llama[0])
    with pytest.raises(FormatError, match="is truncated"):
        load(fmt_llama[0])


def test_newer_format_versions_are_refused(fmt_llama: tuple[Path, Any]) -> None:
    edit_json(fmt_llama[0] / "config.json", lambda c: c["quantization_config"].update(format_version=2))
    for loader in (AutoModelForCausalLM.from_pretrained, load):
        with pytest.raises(FormatError, match=r"format version 2 .*reads format version 1"):
            loader(fmt_llama[0])


@pytest.mark.parametrize("key", ["to_dict", "self", "surprise"])
def test_keys_that_are_none_of_ours_are_refused(fmt_llama: tuple[Path, Any], key: str) -> None:
    edit_json(fmt_llama[0] / "config.json", lambda c: c["quantization_config"].update({key: 1}))
    with pytest.raises(FormatError, match=f"unknown key '{key}'"):
        AutoModelForCausalLM.from_pretrained(fmt_llama[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 1}, "has no module model.layers.1.self_attn"),
        ({"intermediate_size": 40}, r"is \(40, 32\) in LlamaForCausalLM, its layout in config.json \(48, 32\)"),
        ({"attention_bias": True}, "has a bias in LlamaForCausalLM, but the checkpoint stores none"),
        ({"vocab_size": 300}, r"embed_tokens.weight has shape \[256, 32\], but config.json makes it \[300, 32\]"),
        ({"num_hidden_layers": 3}, r"missing \(model.layers.2"),
    ],
)
def test_config_of_another_model_is_refused(fmt_llama: tuple[Path, Any], change: dict[str, Any], message: str) -> None:
    edit_json(fmt_llama[0] / "config.json", lambda config: config.update(change))
    with pytest.raises(FormatError, match=message):
        AutoModelForCausalLM.from_pretrained(fmt_llama[0])


def test_a_quantized_head_that_the_config_ties_is_refused(fmt_original: Callable[[str], Path], tmp_path: Path) -> None:
    head = random_weight(replace(STYLES[3], shape=(VOCABULARY, 32)), 9)
    quantize(fmt_original("llama"), tmp_path / "tied", change=lambda weights: weights.update(lm_head=head))
    with pytest.raises(FormatError, match="lm_head is the embedding as well, whose rows cannot be looked up"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "tied")
    edit_json(tmp_path / "tied" / "config.json", lambda config: config.update(tie_word_embeddings=False))
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "tied")
    assert torch.equal(model.lm_head.vq_weight().dequantize(), head.dequantize())


def test_matrix_without_rows_in_place_of_an_embedding_is_refused(
    fmt_original: Callable[[str], Path], tmp_path: Path
) -> None:
    fake = {"model.embed_tokens": random_weight(replace(STYLES[3], shape=(VOCABULARY, 32)), 9)}
    quantize(fmt_original("qwen2"), tmp_path / "out", change=lambda weights: weights.update(fake))
    with pytest.raises(FormatError, match="embed_tokens is an embedding, whose rows cannot be looked up"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_other_model_classes_are_told_what_to_use(fmt_llama: tuple[Path, Any]) -> None:
    with pytest.raises(FormatError, match="Load it with AutoModelForCausalLM"):
        LlamaModel.from_pretrained(fmt_llama[0])


def test_headers_are_checked_against_the_layouts(fmt_llama: tuple[Path, Any]) -> None:
    name = f"{Q}.indices"
    shard = CheckpointReader(fmt_llama[0]).file_of(name)
    edit_header(shard, lambda header: header[name].update(dtype="F32"))
    (fmt_llama[0] / formats.MANIFEST_FILE).unlink()
    with pytest.raises(FormatError, match=f"{name} wanted torch.int32 .* got torch.float32"):
        AutoModelForCausalLM.from_pretrained(fmt_llama[0])


def test_quantizing_while_loading_is_not_offered(
    fmt_original: Callable[[str], Path], fmt_llama: tuple[Path, Any]
) -> None:
    config = OctavoConfig(**formats.check(fmt_llama[0]).raw)
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(fmt_original("llama"), quantization_config=config)
