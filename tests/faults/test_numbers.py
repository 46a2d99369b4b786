"""Activations and weights that no arithmetic likes: what stops, what goes on, and what is said about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from faults.jobs import RTN, digests, gptq, make_quick, run, stop_after, vptq, with_tensors
from octavo import algorithms, formats
from octavo._core.errors import Interrupted, NumericalError
from octavo._core.seeds import generator
from octavo.formats.reader import CheckpointReader

METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"bits": 3, "group_size": 16},
    "gptq": {"bits": 3, "group_size": 16},
    "vptq": {"bits": 3, "vector_length": 2, "centroids": 16, "residual_centroids": 0},
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)


def quantized(method: str, weight: Tensor, hessian: Tensor | None = None, **options: Any) -> Tensor:
    algorithm = algorithms.get(method)(**METHODS[method] | options)
    result = algorithm.quantize(weight, hessian=hessian, generator=generator(0, "matrix"), name="matrix")
    decoded = result.dequantize()
    assert bool(torch.isfinite(decoded).all())
    return decoded


def second_moment(columns: int, tokens: int = 200) -> Tensor:
    x = torch.randn(tokens, columns, generator=generator(1, "x")) @ torch.randn(columns, columns).mul_(0.3)
    return x.T @ x / tokens


# -------------------------------------------------------------------------------------------------- activations


def overflowing(model: Path, target: Path, block: int, up: float, down: float) -> Path:
    """A model whose MLP hands on activations of about ``up`` squared, brought back by ``down``."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name, factor in (("gate_proj", up), ("up_proj", up), ("down_proj", down)):
            tensors[f"model.layers.{block}.mlp.{name}.weight"] *= factor

    return with_tensors(model, target, change)


def committed_blocks(out: Path) -> int:
    work = out.with_name(out.name + ".work")
    return len(json.loads((work / "objects" / (work / "CURRENT").read_text().strip()).read_text())["blocks"])


def test_a_hessian_that_overflows_stops_at_its_matrix_and_keeps_the_blocks_before(
    tiny_llama: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    """Faults 1 and 16: and the advice of the error can be followed from there, at no cost."""
    model = overflowing(tiny_llama, tmp_path / "model", block=1, up=1e10, down=1e-20)
    settings = gptq(tiny_text_file, side_dtype="bfloat16")
    message = r"model.layers.1.mlp.down_proj: the Hessian holds \d+ NaN and \d+ infinite entries of 16384.*--on-bad-hes"
    with pytest.raises(NumericalError, match=message):
        run(model, tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()
    assert committed_blocks(tmp_path / "out") == 1

    report = run(model, tmp_path / "out", settings, on_bad_hessian="rtn", resume=True)
    (note,) = [n for n in report.notes if "quantized without statistics" in n]
    assert note.startswith("model.layers.1.mlp.down_proj: ") and "infinite entries" in note
    errors = {row.module: row.error for row in report.matrices}
    assert errors.pop("model.layers.1.mlp.down_proj") is None
    assert all(error is not None and error < 0.5 for error in errors.values())
    run(model, tmp_path / "whole", settings, on_bad_hessian="rtn")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_activations_of_nan_and_infinity_are_counted(tiny_llama: Path, tiny_text_file: Path, tmp_path: Path) -> None:
    """Fault 1: more than a tenth of bad rows is no statistic."""
    model = overflowing(tiny_llama, tmp_path / "model", block=1, up=1e30, down=1e-30)
    settings = gptq(tiny_text_file, side_dtype="bfloat16")
    with pytest.raises(NumericalError, match=r"layers.1.mlp.down_proj: 32 of 32 calibration rows are NaN or infinite"):
        run(model, tmp_path / "out", settings)
    report = run(model, tmp_path / "out", settings, on_bad_hessian="rtn", resume=True)
    assert "model.layers.1.mlp.down_proj: left out 32 non-finite calibration rows" in report.notes


def test_a_block_that_puts_out_nan_stops_the_job_whatever_the_policy(
    tiny_llama: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    """Fault 16: nothing after it could be calibrated."""
    model = overflowing(tiny_llama, tmp_path / "model", block=0, up=1e30, down=1e-30)
    with pytest.raises(NumericalError, match=r"model.layers.0: \d+ of 2048 output values are NaN or infinite"):
        run(model, tmp_path / "out", gptq(tiny_text_file, side_dtype="bfloat16"), on_bad_hessian="rtn")
    assert committed_blocks(tmp_path / "out") == 0


def test_a_fallback_before_an_interruption_stands_in_the_report_after_it(
    tiny_llama: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    """Fault 1: a warning is not lost with the process that gave it."""
    model = overflowing(tiny_llama, tmp_path / "model", block=0, up=1e10, down=1e-20)
    settings = gptq(tiny_text_file, side_dtype="bfloat16", on_bad_hessian="rtn")
    with pytest.raises(Interrupted):
        run(model, tmp_path / "out", settings, stop=stop_after(1))
    report = run(model, tmp_path / "out", settings, resume=True)
    assert sum("layers.0.mlp.down_proj: quantized without statistics" in note for note in report.notes) == 1


# -------------------------------------------------------------------------------------------------- odd statistics


@pytest.mark.parametrize("method", ["gptq", "vptq"])
def test_a_layer_that_no_token_reached_is_quantized_as_without_statistics(method: str) -> None:
    """Fault 4."""
    weight = torch.randn(48, 32, generator=generator(0, "w"))
    assert torch.equal(quantized(method, weight, torch.zeros(32, 32)), quantized(method, weight, None))


@pytest.mark.parametrize("method", ["gptq", "vptq"])
def test_inputs_that_never_fired_keep_their_weights(method: str) -> None:
    """Fault 6: zero in the calibration text is not zero everywhere, so the columns are not zeroed."""
    weight, dead = torch.randn(48, 32, generator=generator(0, "w")), [0, 7, 31]
    hessian = second_moment(32)
    hessian[dead] = 0
    hessian[:, dead] = 0
    decoded = quantized(method, weight, hessian)
    error = (decoded - weight)[:, dead].norm() / weight[:, dead].norm()
    assert float(error) < 0.5


@pytest.mark.parametrize("method", ["rtn", "gptq", "vptq"])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_broken_weights_and_statistics_are_refused_by_every_method(method: str, broken: float) -> None:
    """Faults 1 and 16."""
    weight, hessian = torch.randn(16, 32, generator=generator(0, "w")), second_moment(32)
    spoiled = weight.clone()
    spoiled[3, 5] = broken
    with pytest.raises(NumericalError, match="matrix: 1 of 512 weights are NaN or infinite"):
        quantized(method, spoiled, hessian)
    hessian[2, 2] = broken
    with pytest.raises(NumericalError, match=r"matrix: the Hessian holds . NaN and . infinite entries of 1024"):
        quantized(method, weight, hessian)


# -------------------------------------------------------------------------------------------------- odd weights


@pytest.mark.parametrize("method", ["rtn", "gptq", "vptq"])
def test_zeros_decode_to_zeros_and_constants_to_constants(method: str) -> None:
    """Fault 11: a scale of zero divides nothing."""
    hessian = second_moment(32)
    assert torch.equal(quantized(method, torch.zeros(24, 32), hessian), torch.zeros(24, 32))
    for value in (1.0, -0.37):
        decoded = quantized(method, torch.full((24, 32), value), hessian)
        assert torch.allclose(decoded, torch.full((24, 32), value), rtol=2e-3)
    mixed = torch.randn(24, 32, generator=generator(0, "w"))
    mixed[:, 16:] = 0
    mixed[:5] = 0
    assert torch.equal(quantized("rtn", mixed)[mixed == 0], torch.zeros(int((mixed == 0).sum())))
    quantized(method, mixed, hessian)


@pytest.mark.parametrize("method", ["rtn", "gptq", "vptq"])
def test_a_layer_of_zeros_passes_through_the_whole_job(
    tiny_llama: Path, tiny_text_file: Path, tmp_path: Path, method: str
) -> None:
    """Faults 4, 6 and 11: v = 0 makes every input of o_proj zero; a dead norm channel makes dead columns."""

    def silence(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.v_proj.weight"].zero_()
        tensors["model.layers.0.input_layernorm.weight"][5] = 0

    model = with_tensors(tiny_llama, tmp_path / "model", silence)
    report = run(
        model, tmp_path / "out", {"rtn": RTN, "gptq": gptq(tiny_text_file), "vptq": vptq(tiny_text_file)}[method]
    )
    weights = dict(formats.read_weights(tmp_path / "out"))
    assert torch.equal(weights["model.layers.0.self_attn.v_proj"].dequantize(), torch.zeros(32, 64))
    source = CheckpointReader(model)
    for name, column in (("q_proj", slice(5, 6)), ("o_proj", slice(None))):
        original = source.read(f"model.layers.0.self_attn.{name}.weight")[:, column]
        error = weights[f"model.layers.0.self_attn.{name}"].dequantize()[:, column] - original
        assert 0 < float(error.norm() / original.norm()) < 0.8, name
    assert all(row.error is None or 0 <= row.error < 1 for row in report.matrices)


def test_fewer_distinct_vectors_than_centroids_are_stored_exactly() -> None:
    """Faults 13 and 14: spare centroids repeat a used one, none is NaN."""
    values = torch.tensor([-0.5, 0.25, 1.0])
    weight = values[torch.randint(3, (40, 24), generator=generator(0, "w"))]
    options = {"vector_length": 2, "centroids": 256, "codebook_dtype": "float16", "norm": False}
    assert torch.equal(quantized("vptq", weight, second_moment(24), **options), weight)
    tiny = torch.tensor([[1.0, -2.0]])
    assert torch.equal(quantized("vptq", tiny, **options), tiny)


@pytest.mark.parametrize("method", ["rtn", "gptq", "vptq"])
def test_values_beyond_the_stored_dtype_are_refused_before_the_cast(method: str) -> None:
    """Fault 12: never an infinite scale or centroid in a file."""
    weight = torch.randn(32, 32, generator=generator(0, "w")) * 1e7
    with pytest.raises(NumericalError, match=r"matrix.*float16"):
        quantized(method, weight, second_moment(32))
    for side_dtype in ("bfloat16", "float32"):
        decoded = quantized(method, weight, second_moment(32), side_dtype=side_dtype)
        assert float((decoded - weight).norm() / weight.norm()) < 0.6


def test_a_bias_beyond_the_stored_dtype_is_refused() -> None:
    """Fault 12."""
    algorithm = algorithms.get("rtn")(bits=4)
    with pytest.raises(NumericalError, match=r"matrix: bias.*float16"):
        algorithm.quantize(torch.randn(4, 4), bias=torch.tensor([0.0, 1.0, 70000.0, 2.0]), name="matrix")
