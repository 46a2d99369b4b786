"""The streaming model adapter: what it sees of a model, and that block by block gives what the whole model gives."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from conftest import TINY_MODELS, make_text
from octavo._core.errors import FormatError, NumericalError, UsageError
from octavo.calibration.capture import forward
from octavo.calibration.data import windows
from octavo.integrations.transformers import load
from octavo.models import skeleton
from octavo.models.adapter import CausalModel
from octavo.models.source import resolve
from octavo.pipeline import quantize

Tiny = Callable[[str], Path]


def open_model(folder: Path, **options: Any) -> CausalModel:
    return CausalModel(resolve(folder), **options)


def edited(folder: Path, target: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of a one-shard model with changed tensors."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def with_config(folder: Path, target: Path, **values: Any) -> Path:
    """A copy of a model with changed entries of config.json (None removes one)."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text()) | values
    (target / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return target


def batches_of(model: CausalModel, padding: bool) -> list[tuple[Tensor, Tensor | None]]:
    ids = windows(model.tokenizer(), make_text(400), 40, samples=3, seed=1).ids
    mask = torch.ones_like(ids)
    mask[0, 33:] = 0
    mask[1, :6] = 0
    return [(ids[:2], mask[:2] if padding else None), (ids[2:], None)]


# -------------------------------------------------------------------------------------------------- equality


@pytest.mark.parametrize("padding", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_block_by_block_equals_the_whole_model(tiny_model: Tiny, name: str, padding: bool) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_model(name)
    model = open_model(folder)
    batches = batches_of(model, padding)
    inputs = model.capture_inputs(batches)
    hidden = inputs.hidden
    for index, where in enumerate(model.blocks):
        block = model.load_block(index)
        hidden = forward(block, hidden, [kwargs[index] for kwargs in inputs.kwargs], where)
        model.release_block(index)
    streamed = model.logits(batches, hidden)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for (ids, mask), logits in zip(batches, streamed, strict=True):
        with torch.no_grad():
            wanted = whole(input_ids=ids, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-5)
        assert wanted.std() > 0.1


def test_bfloat16_equals_the_whole_model_in_bfloat16(tiny_gemma3: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = open_model(tiny_gemma3)
    batches = batches_of(model, padding=False)
    inputs = model.capture_inputs(batches, torch.bfloat16)
    hidden = inputs.hidden
    assert hidden[0].dtype == torch.bfloat16
    for index in range(len(model.blocks)):
        block = model.load_block(index, torch.bfloat16)
        hidden = forward(block, hidden, [kwargs[index] for kwargs in inputs.kwargs])
    whole = AutoModelForCausalLM.from_pretrained(tiny_gemma3, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        wanted = whole(input_ids=batches[0][0], use_cache=False).logits
    assert torch.equal(model.logits(batches, hidden, torch.bfloat16)[0], wanted)


def test_equal_arguments_of_batches_are_one_object(tiny_gemma3: Path) -> None:
    model = open_model(tiny_gemma3)
    ids = batches_of(model, padding=False)[0][0]
    inputs = model.capture_inputs([(ids, None), (ids.flip(0), None), (ids[:, :20], None)])
    first, second, shorter = inputs.kwargs
    assert first[0] is second[0]
    assert first[0] is first[1]
    # Block 2 attends fully and has rotary tables of another base.
    assert first[2] is not first[1]
    assert shorter[0] is not first[0]
    assert not any(kwargs.get("use_cache") or kwargs.get("past_key_values") for kwargs in first)


def test_memory_is_given_back(tiny_llama: Path) -> None:
    model = open_model(tiny_llama)
    model.capture_inputs(batches_of(model, padding=False))
    block = model.load_block(0)
    assert all(p.device.type == "cpu" for p in block.parameters())
    model.release_block(0)
    assert all(p.device.type == "meta" for p in block.parameters())
    assert all(p.device.type == "meta" for p in model._model.parameters())


# -------------------------------------------------------------------------------------------------- targets


def test_targets_have_true_shapes_and_biases(tiny_qwen2: Path) -> None:
    model = open_model(tiny_qwen2)
    targets = model.targets(1)
    assert len(targets) == 7
    assert targets["model.layers.1.self_attn.k_proj"] == skeleton.Target((32, 64), True, False)
    assert targets["model.layers.1.mlp.down_proj"] == skeleton.Target((64, 128), False, False)
    weight, bias = (
        model.weight("model.layers.1.self_attn.k_proj"),
        model.bias("model.layers.1.self_attn.k_proj"),
    )
    assert weight.dtype == torch.float32
    assert weight.shape == (32, 64)
    assert bias is not None
    assert float(bias.abs().max()) > 0.01
    assert model.bias("model.layers.1.mlp.down_proj") is None


def test_conv1d_weights_come_as_out_by_in(tiny_gpt2: Path) -> None:
    model = open_model(tiny_gpt2)
    name = "transformer.h.0.attn.c_attn"
    assert model.targets(0)[name] == skeleton.Target((192, 64), True, True)
    stored = load_file(tiny_gpt2 / "model.safetensors")
    key = next(k for k in stored if k.endswith("h.0.attn.c_attn.weight"))
    assert torch.equal(model.weight(name), stored[key].T)
    assert model.weight(name).is_contiguous()


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_set_weight_changes_exactly_that_layer(tiny_model: Tiny, name: str) -> None:
    model = open_model(tiny_model(name))
    target, description = next(iter(model.targets(0).items()))
    block = model.load_block(0)
    layer = block.get_submodule(target.removeprefix(model.blocks[0] + "."))
    weight = torch.randn(description.shape)
    bias = torch.randn(description.shape[0]) if description.bias else None
    model.set_weight(block, target, weight, bias)
    x = torch.randn(3, description.shape[1])
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, bias))
    with pytest.raises(UsageError, match="wanted"):
        model.set_weight(block, target, weight.flatten())
    # The next load gives the original again.
    fresh = model.load_block(0).get_submodule(target.removeprefix(model.blocks[0] + "."))
    torch.testing.assert_close(fresh(x), nn.functional.linear(x, model.weight(target), model.bias(target)))


@pytest.mark.parametrize("name", TINY_MODELS)
def test_kept_and_targets_are_the_whole_checkpoint(tiny_model: Tiny, name: str) -> None:
    model = open_model(tiny_model(name))
    taken = sum(1 + target.bias for index in range(len(model.blocks)) for target in model.targets(index).values())
    kept = model.kept()
    assert len(kept) + taken == len(model.reader.names())
    assert not any("proj" in k or "c_attn" in k or "c_fc" in k for k in kept if "norm" not in k)
    assert any("emb" in k or "wte" in k for k in kept)


def test_a_tied_head_is_neither_missing_nor_a_target(tiny_llama: Path) -> None:
    model = open_model(tiny_llama)
    assert "lm_head.weight" not in model.reader.names()
    assert model._sources["lm_head.weight"] == "model.embed_tokens.weight"
    assert "model.embed_tokens.weight" in model.kept()


def test_skip_matches_whole_segments(tiny_llama: Path) -> None:
    model = open_model(tiny_llama, skip=["mlp.down_proj", "layers.1"])
    assert "model.layers.0.mlp.down_proj" not in model.targets(0)
    assert len(model.targets(0)) == 6
    assert model.targets(1) == {}
    assert "model.layers.1.mlp.up_proj.weight" in model.kept()
    assert any("8 of 14" in note for note in model.notes)


def test_skip_does_not_match_parts_of_a_segment() -> None:
    assert skeleton.matches("model.layers.3.mlp.gate.weight", "mlp.gate")
    assert not skeleton.matches("model.layers.3.mlp.gate_proj", "mlp.gate")
    assert not skeleton.matches("model.layers.13.mlp", "layers.3")
    assert skeleton.matches("model.layers.3.self_attn.q_proj", "*_attn.[qk]_proj")


def test_a_skip_pattern_without_match_is_an_error_with_the_nearest_name(tiny_llama: Path) -> None:
    with pytest.raises(UsageError, match=r"'mlp\.down_prj' matches no module.*Did you mean 'mlp\.down_proj'"):
        open_model(tiny_llama, skip=["mlp.down_prj"])


# -------------------------------------------------------------------------------------------------- refusals


@pytest.fixture(scope="module")
def tiny_mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoModelForCausalLM, MixtralConfig

    folder = tmp_path_factory.mktemp("mixtral")
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=8,
        bos_token_id=0,
        eos_token_id=1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_fused_experts_are_an_error_that_says_how_many_weights_and_which(tiny_mixtral: Path) -> None:
    with pytest.raises(
        UsageError, match=r"only 8 % of the weights .*\(8,192 of 107,008\).*fused 3-D experts"
    ) as caught:
        open_model(tiny_mixtral)
    assert "model.layers.*.mlp.experts.gate_up_proj [8, 128, 32]" in str(caught.value)


def test_experts_that_transformers_fuses_while_loading_are_refused(tiny_mixtral: Path) -> None:
    with pytest.raises(UsageError, match="transformers fuses or splits them"):
        open_model(tiny_mixtral, skip=["experts", "mlp.gate"])


def test_a_missing_tensor_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    folder = edited(tiny_llama, tmp_path / "m", lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))  # type: ignore[arg-type]
    with pytest.raises(FormatError, match=r"1 tensors of the model are missing \(model\.layers\.1\.mlp\.up_proj"):
        open_model(folder)


def test_a_tensor_that_belongs_to_nothing_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    folder = edited(tiny_llama, tmp_path / "m", lambda t: t.update({"model.layers.7.oddity": torch.ones(2)}))
    with pytest.raises(FormatError, match=r"belong to nothing \(model\.layers\.7\.oddity"):
        open_model(folder)


def test_buffers_that_old_versions_saved_are_harmless_and_kept(tiny_gpt2: Path, tmp_path: Path) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
        tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)

    model = open_model(edited(tiny_gpt2, tmp_path / "m", add))
    assert "transformer.h.0.attn.bias" in model.kept()


def test_names_without_the_base_prefix_are_understood(tiny_gpt2: Path, tmp_path: Path) -> None:
    def strip(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    model = open_model(edited(tiny_gpt2, tmp_path / "m", strip))
    assert "wte.weight" in model.kept()
    name = "transformer.h.1.mlp.c_fc"
    assert torch.equal(model.weight(name), open_model(tiny_gpt2).weight(name))


def test_a_shape_that_contradicts_the_configuration_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"has shape \[64, 128\], but config\.json makes it \[64, 96\]"):
        open_model(with_config(tiny_llama, tmp_path / "m", intermediate_size=96))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_named_when_read(tiny_llama: Path, tmp_path: Path, value: float) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.self_attn.o_proj.weight"][3, 5] = value

    model = open_model(edited(tiny_llama, tmp_path / "m", spoil))
    model.load_block(0)
    for read in (lambda: model.load_block(1), lambda: model.weight("model.layers.1.self_attn.o_proj")):
        with pytest.raises(NumericalError, match=r"layers\.1\.self_attn\.o_proj\.weight holds NaN or infinity \(1 of"):
            read()


def test_a_model_that_is_quantized_already_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    folder = with_config(tiny_llama, tmp_path / "m", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UsageError, match=r"quantized already \(gptq\)"):
        open_model(folder)


def test_integer_weights_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    def to_int8(tensors: dict[str, Tensor]) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name].to(torch.int8)

    with pytest.raises(UsageError, match="stored as I8"):
        open_model(edited(tiny_llama, tmp_path / "m", to_int8))


def test_float16_calibration_of_another_checkpoint_is_refused(tiny_qwen2: Path) -> None:
    with pytest.raises(UsageError, match="overflow float16"):
        open_model(tiny_qwen2).load_block(0, torch.float16)


def test_windows_longer_than_the_model_are_refused(tiny_llama: Path) -> None:
    with pytest.raises(UsageError, match=r"257 tokens are longer than the 256 positions"):
        open_model(tiny_llama).capture_inputs([(torch.zeros(1, 257, dtype=torch.int64), None)])


class _Tampering(nn.Module):
    """A decoder that scales its hidden states between the blocks, in place or not."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            x = x.mul_(2) if self.in_place else x * 2
        return x


@pytest.mark.parametrize("in_place", [False, True])
def test_hidden_states_that_change_between_blocks_are_noticed(in_place: bool) -> None:
    model = _Tampering(in_place)
    with (
        pytest.raises(UsageError, match=r"changes the hidden states between layers\.0 and layers\.1"),
        torch.no_grad(),
        skeleton.stand_ins(list(model.layers), "layers", lambda index, hidden, others: hidden),
    ):
        model(torch.ones(1, 4))
    # The stand-ins are gone again.
    assert model(torch.ones(1, 4)).shape == (1, 4)
    assert "forward" not in vars(model.layers[0])


def test_blocks_that_hand_each_other_more_than_hidden_states_are_noticed() -> None:
    class Pair(nn.Linear):
        def forward(self, input: Tensor, extra: Any = None) -> Tensor:
            return super().forward(input)

    layers = [Pair(4, 4), Pair(4, 4)]
    with (
        pytest.raises(UsageError, match=r"layers\.1 gets more than hidden states"),
        torch.no_grad(),
        skeleton.stand_ins(layers, "layers", lambda index, hidden, others: (hidden, skeleton.Unused())),
    ):
        hidden, extra = layers[0](torch.ones(1, 4))
        layers[1](hidden, extra)


@pytest.mark.parametrize("family", ["bloom", "gpt_neo"])
def test_blocks_that_return_tuples_are_streamed(tmp_path: Path, family: str) -> None:
    """These also keep biases, ALiBi arguments or local attention outside the common pattern."""
    from transformers import AutoModelForCausalLM, BloomConfig, GPTNeoConfig

    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "bos_token_id": 0, "eos_token_id": 1}
    config = (
        BloomConfig(**sizes, n_layer=2, n_head=2)
        if family == "bloom"
        else GPTNeoConfig(**sizes, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]])
    )
    torch.manual_seed(0)
    whole = AutoModelForCausalLM.from_config(config).eval()
    whole.save_pretrained(tmp_path)
    model = open_model(tmp_path)
    batches: list[tuple[Tensor, Tensor | None]] = [(torch.arange(2, 34).view(2, 16), None)]
    inputs = model.capture_inputs(batches)
    hidden = inputs.hidden
    for index in range(2):
        hidden = forward(model.load_block(index), hidden, [kwargs[index] for kwargs in inputs.kwargs])
    with torch.no_grad():
        wanted = whole(input_ids=batches[0][0]).logits
    torch.testing.assert_close(model.logits(batches, hidden)[0], wanted, rtol=0, atol=1e-5)


def test_blocks_out_of_order_are_noticed() -> None:
    layers = [nn.Linear(4, 4), nn.Linear(4, 4)]
    with (
        pytest.raises(UsageError, match=r"layers\.1 is called where block 0 is due"),
        torch.no_grad(),
        skeleton.stand_ins(layers, "layers", lambda index, hidden, others: hidden),
    ):
        layers[1](torch.ones(1, 4))


# -------------------------------------------------------------------------------------------------- identity


def test_the_fingerprint_ignores_paths_and_sees_every_byte(tiny_llama: Path, tmp_path: Path) -> None:
    original = open_model(tiny_llama).fingerprint()
    assert open_model(with_config(tiny_llama, tmp_path / "same")).fingerprint() == original
    assert open_model(with_config(tiny_llama, tmp_path / "config", rms_norm_eps=1e-4)).fingerprint() != original

    def nudge(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"][0] += 1e-6

    assert open_model(edited(tiny_llama, tmp_path / "weights", nudge)).fingerprint() != original


def test_auxiliary_files_are_the_tokenizer_and_its_friends_but_no_weights(tiny_qwen2: Path) -> None:
    names = {path.name for path in open_model(tiny_qwen2).auxiliary_files()}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"} <= names
    assert not any(name.endswith(".safetensors") or name in ("config.json",) for name in names)


def test_linear_layers_outside_the_blocks_are_reported_as_kept(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, OPTConfig

    config = OPTConfig(
        vocab_size=64,
        hidden_size=32,
        word_embed_proj_dim=16,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "opt")
    model = open_model(tmp_path / "opt")
    assert any("project_in" in note and "project_out" in note for note in model.notes)
    assert any("project_in.weight" in name for name in model.kept())


def test_an_output_of_a_checkpoint_without_the_base_prefix_loads(tiny_gpt2: Path, tmp_path: Path) -> None:
    def strip(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    source = edited(tiny_gpt2, tmp_path / "bare", strip)
    quantize(source, tmp_path / "out", method="rtn", bits=8)
    loaded, _ = load(tmp_path / "out", dtype=torch.float32)
    original, _ = load(tiny_gpt2, dtype=torch.float32)
    ids = torch.arange(8).unsqueeze(0)
    torch.testing.assert_close(loaded(ids).logits, original(ids).logits, rtol=0.1, atol=0.1)
