"""Coordinate descent over blocks of columns, against the textbook's: the loss of every choice, written out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo.math import descent
from octavo.math.descent import Chooser
from octavo.math.hessian import damped
from oracle import universal as oracle
from oracle.matrices import activations, second_moment

Taking = Callable[[Tensor], Tensor]


def _nearest(book: Tensor, gains: list[Tensor] | None = None) -> Chooser:
    """Chooses by the metric among the rows of a book, and takes what lowers the loss."""

    def choose(targets: Tensor, first: int, root: Tensor) -> tuple[Tensor, Taking]:
        choices = book[:, : targets.shape[1]]
        best = (((targets.unsqueeze(1) - choices) @ root) ** 2).sum(dim=2).argmin(dim=1)

        def take(gain: Tensor) -> Tensor:
            if gains is not None:
                gains.append(gain.clamp(min=0))
            return gain > 0

        return choices[best], take

    return choose


def _problem(out: int, inp: int, dtype: torch.dtype = torch.float64, dead: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, values that feedback knew nothing of, and a Hessian with correlated channels, ``dead`` of them zero."""
    rng = np.random.default_rng(out * 1000 + inp)
    x = activations(rng, inp, 4 * inp, correlation=0.8)
    x[:, rng.permutation(inp)[:dead]] = 0
    hessian = torch.from_numpy(second_moment(x)).to(dtype)
    return torch.randn(out, inp, dtype=dtype), torch.randn(out, inp, dtype=dtype), hessian


def coordinate_descent(weight: Tensor, quantized: Tensor, hessian: Tensor, choose: Chooser, width: int) -> Tensor:
    return descent.coordinate_descent(quantized, (weight - quantized) @ hessian, hessian, choose, width)


def _loss(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    return oracle.loss(weight.double().numpy(), quantized.double().numpy(), hessian.double().numpy())


# ---------------------------------------------------------------- the textbook


@pytest.mark.parametrize(
    ("out", "inp", "width"), [(5, 12, 4), (5, 10, 4), (3, 2, 4), (4, 9, 1), (3, 150, 4), (2, 140, 1), (2, 131, 3)]
)
def test_a_sweep_takes_what_the_literal_search_takes(out: int, inp: int, width: int) -> None:
    """Matrices of more than 128 columns are updated in spans."""
    weight, before, hessian = _problem(out, inp)
    book = torch.randn(20, width, dtype=torch.float64)
    got = coordinate_descent(weight, before, hessian, _nearest(book), width)
    wanted = oracle.coordinate_descent(weight.numpy(), before.numpy(), hessian.numpy(), book.numpy(), width)
    np.testing.assert_allclose(got.numpy(), wanted, rtol=0, atol=1e-10)
    # What was chosen in one sweep is no optimum of the next one.
    assert not np.array_equal(got.numpy(), before.numpy())


@pytest.mark.parametrize("width", [1, 2, 4])
def test_a_matrix_of_one_block_is_solved_exactly(width: int) -> None:
    weight, before, hessian = _problem(30, width)
    book = torch.randn(50, width, dtype=torch.float64)
    got = coordinate_descent(weight, before, hessian, _nearest(book), width)
    for row, target, old in zip(got, weight, before, strict=True):
        every = [_loss(target[None], choice[None], hessian) for choice in [*book, old]]
        assert _loss(target[None], row[None], hessian) == pytest.approx(min(every), rel=1e-9)


def test_where_every_value_is_allowed_a_step_solves_its_block() -> None:
    """One sweep of continuous values is one step of block Gauss-Seidel; many are the weights themselves."""
    weight, before, hessian = _problem(4, 12)
    hessian = damped(hessian, 0.1)

    def exact(targets: Tensor, first: int, root: Tensor) -> tuple[Tensor, Taking]:
        return targets, lambda gain: torch.ones_like(gain, dtype=torch.bool)

    once = coordinate_descent(weight, before, hessian, exact, 4)
    # The last block is stationary.
    slope = (weight - once) @ hessian
    assert float(slope[:, 8:].abs().max()) < 1e-4 * float(slope.abs().max())
    for _ in range(200):
        before = coordinate_descent(weight, before, hessian, exact, 4)
    torch.testing.assert_close(before, weight, rtol=0, atol=1e-6)


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize("width", [1, 4, 8])
@pytest.mark.parametrize("dead", [0, 5])
def test_no_sweep_raises_the_loss_and_the_gains_add_up(width: int, dead: int) -> None:
    weight, values, hessian = _problem(16, 150, torch.float32, dead)
    hessian = damped(hessian, 0.01)
    book = torch.randn(64, width)
    for _ in range(4):
        gains: list[Tensor] = []
        before, old = values, _loss(weight, values, hessian)
        values = coordinate_descent(weight, before, hessian, _nearest(book, gains), width)
        new = _loss(weight, values, hessian)
        assert new <= old * (1 + 1e-6)
        assert float(torch.stack(gains).sum(dtype=torch.float64)) == pytest.approx(old - new, rel=1e-3, abs=1e-4 * old)


def test_nothing_changes_unless_it_is_taken_and_inputs_stay() -> None:
    weight, before, hessian = _problem(6, 20)
    copies = [t.clone() for t in (weight, before, hessian)]

    def refuse(targets: Tensor, first: int, root: Tensor) -> tuple[Tensor, Taking]:
        return targets, lambda gain: torch.zeros_like(gain, dtype=torch.bool)

    assert torch.equal(coordinate_descent(weight, before, hessian, refuse, 4), before)
    coordinate_descent(weight, before, hessian, _nearest(torch.randn(9, 4, dtype=torch.float64)), 4)
    assert all(torch.equal(now, then) for now, then in zip((weight, before, hessian), copies, strict=True))


def test_rows_do_not_depend_on_each_other() -> None:
    weight, before, hessian = _problem(6, 20)
    book = torch.randn(30, 4, dtype=torch.float64)
    together = coordinate_descent(weight, before, hessian, _nearest(book), 4)
    for row in range(6):
        part = slice(row, row + 1)
        alone = coordinate_descent(weight[part], before[part], hessian, _nearest(book), 4)
        torch.testing.assert_close(alone, together[part], rtol=0, atol=1e-10)


# ---------------------------------------------------------------- columns that never fire


@pytest.mark.parametrize("width", [1, 4])
def test_dead_columns_leave_the_others_as_they_would_be_without_them(width: int) -> None:
    weight, before, hessian = _problem(5, 24, dead=0)
    dead = torch.zeros(24, dtype=torch.bool)
    dead[8:12] = dead[20:] = True
    hessian[dead] = 0
    hessian[:, dead] = 0
    book = torch.randn(20, width, dtype=torch.float64)
    got = coordinate_descent(weight, before, hessian, _nearest(book), width)
    assert bool(got.isfinite().all())
    alive = hessian[~dead][:, ~dead]
    alone = coordinate_descent(weight[:, ~dead], before[:, ~dead], alive, _nearest(book), width)
    torch.testing.assert_close(got[:, ~dead], alone, rtol=0, atol=1e-9)
    # Nothing is gained in a dead column.
    assert torch.equal(got[:, dead], before[:, dead])


def test_a_single_dead_column_in_a_block_does_not_spoil_the_block() -> None:
    weight, before, hessian = _problem(5, 12)
    hessian[5] = 0
    hessian[:, 5] = 0
    book = torch.randn(40, 4, dtype=torch.float64)
    got = coordinate_descent(weight, before, hessian, _nearest(book), 4)
    assert _loss(weight, got, hessian) < _loss(weight, before, hessian)
    assert bool(got.isfinite().all())
