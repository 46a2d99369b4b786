"""Row weights, tied classes and the fit of codewords against float64 textbook versions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo._core.errors import UsageError
from octavo.algorithms.vq_logits import Calibration, VQLogits, _frequency_bins, fit, reassigned
from octavo.math.logits import SMOOTHING, logit_statistics, tied_loss
from oracle import logits as oracle


def problem(tokens: int = 23, width: int = 6, contexts: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A head [tokens, width] and states [contexts, width]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, width, generator=generator), torch.randn(contexts, width, generator=generator) * 1.5


def calibration(head: Tensor, states: Tensor) -> Calibration:
    return Calibration(states, logit_statistics(states, lambda x: x @ head.T, len(head), pull=True))


def test_row_weights_are_those_of_the_definition() -> None:
    head, states = problem()
    found = logit_statistics(states, lambda x: x @ head.T, len(head))
    logits = (states.double() @ head.double().T).numpy()
    np.testing.assert_allclose(found.row_weights().numpy(), oracle.row_weights(logits, SMOOTHING), rtol=1e-4)
    p = np.stack([oracle.softmax(row) for row in logits])
    np.testing.assert_allclose(found.mass.numpy(), p.sum(0), rtol=1e-4)
    assert found.pull is None
    assert found.entropy == pytest.approx(float((p * np.log(p)).sum()), rel=1e-4)


def test_many_chunks_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    head, states = problem()
    whole = calibration(head, states).statistics
    monkeypatch.setattr("octavo.math.logits._CHUNK_NUMBERS", 3 * len(head))
    parts = calibration(head, states).statistics
    assert whole.pull is not None
    assert parts.pull is not None
    torch.testing.assert_close(parts.pull, whole.pull)
    torch.testing.assert_close(parts.curvature, whole.curvature)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_loss_and_gradient_of_tied_classes_are_those_of_the_definition(seed: int) -> None:
    head, states = problem(seed=seed)
    codes = torch.randn(5, head.shape[1], generator=torch.Generator().manual_seed(seed + 9))
    # The last class has no token.
    token_codes = torch.arange(len(head)) % 4
    statistics = calibration(head, states).statistics
    assert statistics.pull is not None
    pull = torch.zeros_like(codes).index_add_(0, token_codes, statistics.pull)
    loss, gradient = tied_loss(codes, torch.bincount(token_codes, minlength=5), states, pull, statistics.entropy)
    arguments = (codes.double().numpy(), token_codes.tolist(), states.double().numpy())
    logits = (states.double() @ head.double().T).numpy()
    assert loss == pytest.approx(oracle.tied_divergence(*arguments, logits), rel=1e-4)
    np.testing.assert_allclose(gradient.numpy(), oracle.tied_gradient(*arguments, logits), rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("start", ["kmeans", "frequency", "random"])
def test_the_fit_lowers_the_divergence_of_held_out_states(start: str) -> None:
    """And says what it is: the oracle's value for the codewords and the map that come out."""
    head, states = problem(tokens=60, contexts=300)
    train, held_out = calibration(head, states[:200]), calibration(head, states[200:])
    options = VQLogits(codes=9, start=start, steps=25, maps=1)  # type: ignore[arg-type]
    found = fit(head, train, held_out, options, torch.Generator().manual_seed(0))
    assert found.codes.shape == (9, 6)
    assert found.kl_after < found.kl_before
    logits = (states[200:].double() @ head.double().T).numpy()
    wanted = oracle.tied_divergence(
        found.codes.double().numpy(), found.map.tolist(), states[200:].double().numpy(), logits
    )
    assert found.kl_after == pytest.approx(wanted, rel=1e-3)
    again = fit(head, train, held_out, options, torch.Generator().manual_seed(0))
    assert torch.equal(again.codes, found.codes)
    assert torch.equal(again.map, found.map)


def test_tokens_move_to_the_codeword_that_is_their_own_row() -> None:
    """Tokens of two kinds, one row each: from any map of them, two codewords that are these rows part them."""
    rows = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    head = rows[torch.arange(10) % 2]
    states = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(reassigned(rows, torch.arange(10) // 5, calibration(head, states)), torch.arange(10) % 2)


def test_frequency_bins_have_equal_shares_and_frequent_tokens_one_of_their_own() -> None:
    mass = torch.tensor([8.0, 1, 1, 1, 1, 1, 1, 1, 1, 100], dtype=torch.float64)
    bins = _frequency_bins(mass, 4)
    assert bins.unique().numel() == 4
    counts = torch.bincount(bins)
    assert int(counts[bins[9]]) == int(counts[bins[0]]) == 1
    assert counts.sort().values.tolist() == [1, 1, 4, 4]
    for count in (2, 5, 9):
        assert _frequency_bins(torch.rand(50, dtype=torch.float64) ** 8, count).unique().numel() == count


def test_options_out_of_range_are_refused() -> None:
    for options in ({"codes": 1}, {"codes": 2.0}, {"steps": -1}, {"start": "best"}):
        with pytest.raises(UsageError, match="vq-logits"):
            VQLogits(**options)  # type: ignore[arg-type]
    head, states = problem()
    with pytest.raises(UsageError, match="fewer than the 23 tokens"):
        fit(head, calibration(head, states), calibration(head, states), VQLogits(codes=23), torch.Generator())
