"""Calibration in bfloat16, on processors that multiply it faster: close to float32, for models of 16 bits only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from octavo._core.seeds import generator
from octavo.calibration.gradients import backpropagate
from octavo.calibration.products import calibration_products
from octavo.math.hessian import HessianAccumulator
from octavo.models.adapter import CausalModel
from octavo.models.source import resolve
from octavo.pipeline.run import quantize
from octavo.pipeline.tune import tune

FAST = "octavo.calibration.products.fast_bfloat16"


@pytest.fixture
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FAST, lambda: True)


@pytest.mark.usefixtures("_fast")
@pytest.mark.parametrize(
    ("stored", "used"),
    [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.bfloat16), (torch.float32, torch.float32)],
)
def test_only_models_that_are_stored_in_16_bits_run_in_16_bits(stored: torch.dtype, used: torch.dtype) -> None:
    layer = torch.nn.Linear(8, 8)
    with calibration_products(stored):
        assert layer(torch.ones(2, 8)).dtype == used


@pytest.mark.usefixtures("_fast")
def test_statistics_are_summed_in_float32_all_the_same() -> None:
    x = torch.randn(500, 16)
    accumulator = HessianAccumulator(16)
    with calibration_products(torch.bfloat16):
        accumulator.add(x)
    torch.testing.assert_close(accumulator.matrix(), x.T @ x / 500, rtol=1e-5, atol=1e-6)


def test_gradients_in_bfloat16_are_close_to_those_in_float32(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    causal = CausalModel(resolve(tiny_model("qwen2")))
    tokens = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(1))
    found: list[dict[str, Tensor]] = []
    for fast in (False, True):
        monkeypatch.setattr(FAST, lambda fast=fast: fast)
        seen: dict[str, Tensor] = {}
        backpropagate(
            causal, tokens, lambda _, name, x, g, seen=seen: seen.update({name: g}), generator=generator(0, "labels")
        )
        found.append(seen)
    for name, exact in found[0].items():
        rounded = found[1][name]
        assert rounded.dtype == torch.float32
        # A label that falls on the other side of a border changes the gradient of its position altogether.
        assert float(torch.cosine_similarity(rounded.flatten(), exact.flatten(), dim=0)) > 0.9, name


@pytest.mark.usefixtures("_fast")
def test_whole_jobs_run_in_bfloat16(tiny_model: Callable[[str], Path], tiny_text_file: Path, tmp_path: Path) -> None:
    options = {"beam": 4, "sweeps": 1}
    report = quantize(
        tiny_model("qwen2"), tmp_path / "out", bits=2.1, calib=tiny_text_file, samples=4, ctx=32, options=options
    )
    errors = [matrix.error for matrix in report.matrices]
    assert all(error is not None and error < 0.2 for error in errors)
    settings = {"ctx": 32, "samples": 16, "batch_tokens": 128, "steps": 20, "lr": 3e-3, "device": "cpu"}
    tuned = tune(
        tmp_path / "out", tmp_path / "tuned", reference=tiny_model("qwen2"), calib=str(tiny_text_file), **settings
    )
    assert tuned.kl_after < tuned.kl_before
