"""The dry run: what it promises, what it warns of, and what it refuses before any work starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from conftest import TINY_MODELS, make_tokenizer
from faults.jobs import gptq, make_quick, run, vptq, with_tensors
from octavo import formats
from octavo._core.errors import NumericalError, UsageError
from octavo.formats.reader import CheckpointReader
from octavo.pipeline import plan, quantize

Tiny = Callable[[str], Path]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)


def make_llama(folder: Path, **sizes: Any) -> Path:
    config = LlamaConfig(
        vocab_size=320, num_hidden_layers=2, max_position_embeddings=64, initializer_range=0.1, bos_token_id=0, **sizes
    )
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer(True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def odd_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Widths that no usual vector length or group size divides."""
    sizes = {"hidden_size": 44, "intermediate_size": 102, "num_attention_heads": 2, "num_key_value_heads": 1}
    return make_llama(tmp_path_factory.mktemp("odd") / "odd", **sizes)


# -------------------------------------------------------------------------------------------------- promises


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_plan_adds_up_and_reads_no_weight(tiny_model: Tiny, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CheckpointReader, "read", None)
    found = plan(tiny_model(name), method="vptq", bits=3, samples=2, ctx=16)
    layouts = [matrix.layout for matrix in found.matrices]
    assert found.bits_per_weight == sum(x.bits() for x in layouts) / sum(x.weights for x in layouts) <= 3
    assert found.source_bytes == CheckpointReader(tiny_model(name)).total_bytes
    assert found.quantized_bytes < found.source_bytes - found.kept_bytes
    assert found.file_bytes == found.quantized_bytes + found.kept_bytes
    assert found.memory_bytes > 0 and found.work_bytes > 0 and found.seconds > 0
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert document["file_bytes"] == sum(m["bytes"] for m in document["matrices"]) + found.kept_bytes
    assert len(document["matrices"]) == len(found.matrices)


def test_a_method_without_statistics_needs_less_memory_and_disk(tiny_llama: Path) -> None:
    without, statistics = plan(tiny_llama, method="rtn", bits=4), plan(tiny_llama, method="gptq", bits=4)
    assert without.memory_bytes < statistics.memory_bytes
    assert without.work_bytes < statistics.work_bytes


# -------------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("vector_length", [3, 8, 16])
def test_shapes_that_vectors_do_not_divide_are_padded_in_the_plan_and_exact_in_the_file(
    odd_llama: Path, tiny_text_file: Path, tmp_path: Path, vector_length: int
) -> None:
    """Fault 20: nothing is left to be found out when hours later the file is written."""
    options = {"vector_length": vector_length, "centroids": 16, "residual_centroids": 16, "iterations": 2, "sweeps": 0}
    settings = vptq(tiny_text_file, options=options)
    found = plan(odd_llama, method="vptq", bits=settings["bits"], options=options)
    assert all(m.layout.index_shape[0] == -(-m.layout.shape[0] // vector_length) for m in found.matrices)
    report = run(odd_llama, tmp_path / "out", settings)
    weights = dict(formats.read_weights(tmp_path / "out"))
    for row in report.matrices:
        decoded = weights.pop(row.module).dequantize()
        assert tuple(decoded.shape) == row.shape == CheckpointReader(odd_llama).info(f"{row.module}.weight")[1]
        assert row.error is not None and row.error < 1
    assert not weights
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.hidden_size == 44


@pytest.mark.parametrize("group_size", [7, 40, 1000])
def test_groups_that_do_not_divide_the_inputs_leave_a_shorter_one_at_the_end(
    odd_llama: Path, tiny_text_file: Path, tmp_path: Path, group_size: int
) -> None:
    """Fault 20."""
    report = run(odd_llama, tmp_path / "out", gptq(tiny_text_file, bits=4, options={"group_size": group_size}))
    for _, weight in formats.read_weights(tmp_path / "out"):
        inputs = weight.layout.shape[1]
        assert weight.tensors["block_scale"].shape[1] == -(-inputs // min(group_size, inputs))
    assert all(row.error is not None and row.error < 0.2 for row in report.matrices)


@pytest.mark.parametrize(
    ("ways", "options", "message"),
    [
        (3, {}, r"--tensor-parallel 3 cannot split 14 matrices: model.layers.0.self_attn.q_proj \(64 outputs are not"),
        (16, {"vector_length": 8}, r"cannot split .* matrices: .*k_proj \(2 outputs per rank cut vectors of 8\)"),
        (48, {}, r"o_proj \(64 inputs are not divisible by 48\)"),
        (0, {}, "--tensor-parallel wanted >= 1, got 0"),
        (-2, {}, "--tensor-parallel wanted >= 1, got -2"),
    ],
)
def test_shapes_that_tensor_parallelism_cannot_split_are_refused_in_the_plan(
    tiny_llama: Path, ways: int, options: dict[str, Any], message: str
) -> None:
    """Fault 21."""
    with pytest.raises(UsageError, match=message):
        plan(tiny_llama, method="vptq", bits=3, options=options, tensor_parallel=ways)


def test_tiles_and_transforms_are_not_cut_either(tiny_llama: Path) -> None:
    """Fault 21."""
    with pytest.raises(UsageError, match=r"mlp.down_proj \(8 inputs per rank cut Hadamard blocks of 128\)"):
        plan(tiny_llama, method="universal", bits=3, options={"block": 128}, tensor_parallel=16)


def test_shapes_that_can_be_split_pass(tiny_llama: Path) -> None:
    """Fault 21."""
    options = {"vector_length": 8, "centroids": 16}
    found = plan(tiny_llama, method="vptq", bits=3, options=options, tensor_parallel=4)
    assert found.matrices == plan(tiny_llama, method="vptq", bits=3, options=options).matrices


# -------------------------------------------------------------------------------------------------- warnings, refusals


def test_fewer_tokens_than_inputs_are_warned_of_with_both_numbers(tiny_llama: Path) -> None:
    """Fault 5."""
    (warning,) = plan(tiny_llama, method="gptq", bits=3, samples=2, ctx=32).warnings
    assert "64 calibration tokens are fewer than the widest layer's 128 inputs" in warning
    (warning,) = plan(tiny_llama, method="gptq", bits=3, samples=15, ctx=32).warnings
    assert "480 calibration tokens are fewer than 4 for each of the widest layer's 128 inputs" in warning
    assert plan(tiny_llama, method="gptq", bits=3, samples=16, ctx=32).warnings == ()
    assert plan(tiny_llama, method="rtn", bits=3, samples=2, ctx=32).warnings == ()


def test_bits_that_small_matrices_cannot_reach_are_warned_of(tiny_llama: Path) -> None:
    """Fault 14: true bits, codebooks included, stand beside those asked for."""
    options = {"vector_length": 16, "centroids": 4096}
    found = plan(tiny_llama, method="vptq", bits=3, options=options, samples=16, ctx=32)
    assert found.bits_per_weight > 3
    (warning,) = found.warnings
    assert f"too small for 3 bits per weight with these options: {found.bits_per_weight:.3f} in all" in warning


def test_a_plan_of_nothing_is_refused(tiny_llama: Path) -> None:
    """Fault 23."""
    with pytest.raises(UsageError, match="every linear layer is skipped"):
        plan(tiny_llama, skip=["layers.*"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 0}, "samples wanted >= 1"),
        ({"ctx": 1}, "ctx >= 2"),
        ({"bits": 99}, "bits wanted 0.5..16"),
        ({"method": "gptq", "bits": 2.5}, "whole number"),
        ({"method": "gptk"}, "Did you mean 'gptq'"),
        ({"method": "vptq", "options": {"vectorlength": 4}}, "Did you mean 'vector_length'"),
        ({"options": {"bits": 4}}, "'bits' has a parameter of its own"),
        ({"side_dtype": "int4"}, "side_dtype wanted float16"),
        ({"skip": ["mlp.dwn_proj"]}, "matches no module .* Did you mean 'mlp.down_proj'"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused_by_plan_and_job_alike(
    tiny_llama: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    """Fault 23 and its kin: before calibration, with the nearest name, and with nothing left behind."""
    with pytest.raises(UsageError, match=message):
        plan(tiny_llama, **settings)
    with pytest.raises(UsageError, match=message):
        quantize(tiny_llama, tmp_path / "out", **settings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "side_dtype", "message"),
    [
        (float("nan"), "float16", r"layers.1.mlp.down_proj.weight holds NaN or infinity \(1 of 8192"),
        (1e6, "float16", "weights up to 1e.06 do not fit float16 codebooks and scales; use --side-dtype bfloat16"),
    ],
)
def test_weights_that_cannot_be_stored_are_found_before_the_first_block(
    tiny_llama: Path, tmp_path: Path, value: float, side_dtype: str, message: str
) -> None:
    """Faults 12 and 16: the last block's weight is not left for the last hour."""

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = value

    model = with_tensors(tiny_llama, tmp_path / "model", damage)
    with pytest.raises(NumericalError, match=message):
        run(model, tmp_path / "out", side_dtype=side_dtype)
    assert not (tmp_path / "out.work").exists()


def test_large_weights_fit_bfloat16_side_data(tiny_llama: Path, tmp_path: Path) -> None:
    """Fault 12: the advice of the error works."""

    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.down_proj.weight"] *= 1e6

    model = with_tensors(tiny_llama, tmp_path / "model", enlarge)
    run(model, tmp_path / "out", side_dtype="bfloat16")
    weight = dict(formats.read_weights(tmp_path / "out"))["model.layers.1.mlp.down_proj"]
    original = CheckpointReader(model).read("model.layers.1.mlp.down_proj.weight")
    assert float((weight.dequantize() - original).norm() / original.norm()) < 0.15


def test_a_preset_stands_for_method_bits_and_options_and_options_change_it(tiny_llama: Path) -> None:
    made = plan(tiny_llama, preset="2d-3.125", options={"rounds": 0})
    assert (made.method, made.options["bits"], made.options["centroids"]) == ("gptvq", 3.125, 64)
    assert made.options["rounds"] == 0
    with pytest.raises(UsageError, match="preset 2d-3.125 is method gptvq"):
        plan(tiny_llama, preset="2d-3.125", bits=3.0)
    with pytest.raises(UsageError, match="preset 2d-3.125 is method gptvq"):
        plan(tiny_llama, preset="2d-3.125", method="vptq")
