"""What calibration must not do to the statistics, seen from the whole job."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import TINY_MODELS
from faults.jobs import gptq, make_quick, run, with_config
from octavo import algorithms
from octavo._core.errors import NumericalError, UsageError
from octavo.calibration import capture
from octavo.math.hessian import proxy_loss
from octavo.models import skeleton

Tiny = Callable[[str], Path]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)


class Spy:
    """Records what the blocks of a job are run with, and lets them run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[list[Tensor], list[dict[str, Any]], list[Tensor | None]]] = []
        self.results: list[capture.Captured] = []
        real = capture.collect

        def collect(block: nn.Module, names: Any, hidden: Any, kwargs: Any, mask: Any, **options: Any) -> Any:
            self.calls.append((list(hidden), list(kwargs), list(mask)))
            self.results.append(real(block, names, hidden, kwargs, mask, **options))
            return self.results[-1]

        monkeypatch.setattr(capture, "collect", collect)


def mentions_a_cache(arguments: dict[str, Any]) -> bool:
    return bool(arguments.get("use_cache")) or any(
        value is not None and ("past" in key or type(value).__name__.endswith("Cache"))
        for key, value in arguments.items()
    )


@pytest.mark.parametrize("name", TINY_MODELS)
def test_no_block_gets_a_cache_even_if_the_configuration_asks_for_one(
    tiny_model: Tiny, tiny_text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Fault 27: a replay would attend to its own earlier keys."""
    spy = Spy(monkeypatch)
    model = with_config(tiny_model(name), tmp_path / "model", use_cache=True)
    run(model, tmp_path / "out", gptq(tiny_text_file))
    assert len(spy.calls) >= 2
    for _, kwargs, _ in spy.calls:
        assert not any(mentions_a_cache(arguments) for arguments in kwargs)


def test_a_model_that_insists_on_a_cache_is_refused() -> None:
    """Fault 27."""
    from transformers.cache_utils import DynamicCache

    with pytest.raises(UsageError, match=r"layers.3: argument past_key_values is a key-value cache although use_cache"):
        skeleton.SharedArguments().share({"past_key_values": DynamicCache()}, "layers.3")


def test_the_windows_of_a_job_are_full_and_every_token_counts_once(
    tiny_llama: Path, tiny_text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 28: there is no padding that could enter the statistics."""
    spy = Spy(monkeypatch)
    report = run(tiny_llama, tmp_path / "out", gptq(tiny_text_file, samples=5, ctx=24))
    assert report.tokens == 5 * 24
    for hidden, _, mask in spy.calls:
        assert sum(h.shape[0] * h.shape[1] for h in hidden) == 5 * 24
        assert mask == [None] * len(hidden)
    for captured in spy.results:
        assert {h.tokens for h in captured.hessians.values()} == {5 * 24}
        assert all(h.matrix().dtype == torch.float32 for h in captured.hessians.values())


def test_statistics_in_several_batches_are_those_of_one(
    tiny_llama: Path, tiny_text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Faults 7 and 42: how much is done at a time is no setting of the result."""
    from octavo.pipeline import _blocks

    hessians = []
    for tokens in (4096, 32):
        spy = Spy(monkeypatch)
        monkeypatch.setattr(_blocks, "_BATCH_TOKENS", tokens)
        run(tiny_llama, tmp_path / str(tokens), gptq(tiny_text_file, samples=6, ctx=16))
        assert len(spy.calls[0][0]) == (1 if tokens == 4096 else 3)
        hessians.append(spy.results[0].hessians["mlp.down_proj"].matrix())
    torch.testing.assert_close(hessians[0], hessians[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["gptq", "vptq"])
def test_indefinite_and_rank_deficient_statistics_still_give_a_usable_matrix(method: str) -> None:
    """Faults 2 and 5: damping climbs until the factorisation succeeds."""
    torch.manual_seed(0)
    weight, x = torch.randn(24, 32), torch.randn(3, 32)
    for hessian in (x.T @ x, torch.eye(32) - 1.2 * torch.eye(32).roll(1, 0) / 2, x[:1].T @ x[:1] * 1e-8):
        options = {"vector_length": 2, "centroids": 32} if method == "vptq" else {"group_size": 16}
        weight_q = algorithms.get(method)(bits=3, **options).quantize(weight, hessian=hessian, name="matrix")
        decoded = weight_q.dequantize()
        assert bool(torch.isfinite(decoded).all())
        assert float((decoded - weight).norm() / weight.norm()) < 1
    assert proxy_loss(weight, decoded, hessian) < 0.5


def test_statistics_that_no_damping_repairs_name_the_matrix_and_the_way_out() -> None:
    """Faults 2 and 3."""
    hopeless = -torch.ones(8, 8)
    hopeless[0, 0] = 1e-3
    with pytest.raises(NumericalError, match=r"^block.q_proj: Cholesky .* damping 1.0 .*--on-bad-hessian rtn"):
        algorithms.get("gptq")(bits=3).quantize(torch.randn(4, 8), hessian=hopeless, name="block.q_proj")
