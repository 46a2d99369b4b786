"""The error-feedback solver against optimal brain surgery in float64, and against a direct least-squares solution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo.math.feedback import error_feedback
from octavo.math.hessian import factorize, proxy_loss
from oracle import feedback as oracle
from oracle.matrices import activations, families, family, normal_weight, second_moment

_STEP = 0.04
_NEAR = 1e-3
_WIDTHS = (1, 2, 4, 7)


def _grid_numpy(values: np.ndarray, *_: object) -> np.ndarray:
    return np.rint(values / _STEP) * _STEP


def _grid_torch(values: Tensor, *_: object) -> Tensor:
    return (values / _STEP).round() * _STEP


def _decided(given: np.ndarray) -> np.ndarray:
    """Rows in which no value lay so near to the middle of two grid points that float32 may round it the other way."""
    position = given / _STEP
    return np.all(np.abs(position - np.floor(position) - 0.5) > _NEAR, axis=1)


def _problem(inp: int, out: int = 48) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(inp)
    return normal_weight(rng, out, inp), second_moment(activations(rng, inp))


def _solve(weight: np.ndarray, hessian: np.ndarray, width: int = 1, lazy: int = 128) -> tuple[np.ndarray, np.ndarray]:
    factor = factorize(torch.from_numpy(hessian))
    quantized, given = error_feedback(torch.from_numpy(weight), factor, _grid_torch, width, lazy)
    return quantized.double().numpy(), given.double().numpy()


@pytest.mark.parametrize("width", _WIDTHS)
@pytest.mark.parametrize("inp", [30, 150], ids=["one-lazy-block", "several-lazy-blocks"])
def test_choices_and_values_equal_optimal_brain_surgery(inp: int, width: int) -> None:
    weight, hessian = _problem(inp)
    wanted, wanted_given = oracle.error_feedback(weight, oracle.damped(hessian), _grid_numpy, width)
    got, given = _solve(weight, hessian, width, lazy=64)
    rows = _decided(wanted_given)
    assert rows.sum() >= 24
    np.testing.assert_array_equal(np.rint(got / _STEP)[rows], np.rint(wanted / _STEP)[rows])
    scale = np.abs(wanted_given).max()
    np.testing.assert_allclose(given[rows], wanted_given[rows], rtol=0, atol=1e-4 * scale)
    assert oracle.proxy_loss(weight[rows], got[rows], hessian) == pytest.approx(
        oracle.proxy_loss(weight[rows], wanted[rows], hessian), rel=1e-4
    )


@pytest.mark.parametrize("width", _WIDTHS)
def test_after_every_block_the_free_columns_minimise_the_loss(width: int) -> None:
    weight, hessian = _problem(31, 6)
    seen: list[tuple[int, np.ndarray]] = []

    def quantize(values: Tensor, first: int, upcoming: Tensor) -> Tensor:
        assert torch.equal(values, upcoming[:, : values.shape[1]])
        assert first + upcoming.shape[1] == 31
        seen.append((first, upcoming.double().numpy().copy()))
        return _grid_torch(values)

    quantized, _ = error_feedback(torch.from_numpy(weight), factorize(torch.from_numpy(hessian)), quantize, width)
    assert [first for first, _ in seen] == list(range(0, 31, width))
    for first, upcoming in seen[1:]:
        wanted = oracle.best_free_columns(weight, oracle.damped(hessian), quantized[:, :first].double().numpy())
        np.testing.assert_allclose(upcoming, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("width", _WIDTHS)
def test_the_span_of_the_lazy_block_does_not_change_the_result(width: int) -> None:
    weight, hessian = _problem(70)
    _, wanted = oracle.error_feedback(weight, oracle.damped(hessian), _grid_numpy, width)
    rows = _decided(wanted)
    reference, _ = _solve(weight, hessian, width)
    for lazy in (1, 13, 35, 70, 1000):
        quantized, _ = _solve(weight, hessian, width, lazy)
        np.testing.assert_allclose(quantized[rows], reference[rows], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", families())
def test_values_follow_the_oracle_on_every_family(name: str) -> None:
    case = family(name)
    # A quantizer that does not round has no ties: half of every value is dropped, and the error is fed back.
    damped = oracle.damped(case.hessian)
    wanted, _ = oracle.error_feedback(case.weight, damped, lambda v, *_: v / 2)
    factor = factorize(torch.from_numpy(case.hessian))
    got, _ = error_feedback(torch.from_numpy(case.weight), factor, lambda values, *_: values / 2)
    # A float32 factorisation may lose as many digits as the condition number has.
    tolerance = max(1e-4, np.finfo(np.float32).eps * np.linalg.cond(damped) / 2)
    scale = np.abs(wanted).max() if wanted.any() else 1.0
    np.testing.assert_allclose(got.double().numpy(), wanted, rtol=0, atol=tolerance * scale)


def test_a_wide_block_with_one_column_left_over_is_served() -> None:
    weight, hessian = _problem(9)
    widths: list[int] = []

    def quantize(values: Tensor, first: int, upcoming: Tensor) -> Tensor:
        widths.append(values.shape[1])
        return _grid_torch(values)

    error_feedback(torch.from_numpy(weight), factorize(torch.from_numpy(hessian)), quantize, width=4)
    assert widths == [4, 4, 1]


def test_the_input_stays_and_an_exact_quantizer_changes_nothing() -> None:
    weight, hessian = _problem(40)
    matrix = torch.from_numpy(weight)
    before = matrix.clone()
    quantized, given = error_feedback(matrix, factorize(torch.from_numpy(hessian)), lambda values, *_: values)
    assert torch.equal(matrix, before)
    assert torch.equal(quantized, before)
    assert torch.equal(given, before)


def test_uncorrelated_inputs_get_no_feedback() -> None:
    weight, hessian = _problem(40)
    quantized, given = _solve(weight, np.diag(np.diag(hessian)))
    np.testing.assert_array_equal(given, weight)
    np.testing.assert_array_equal(quantized, _grid_torch(torch.from_numpy(weight)).double().numpy())


def test_feedback_is_equivariant_to_the_order_of_the_rows() -> None:
    weight, hessian = _problem(40)
    order = np.random.default_rng(2).permutation(len(weight))
    plain, _ = _solve(weight, hessian)
    shuffled, _ = _solve(weight[order], hessian)
    rows = _decided(oracle.error_feedback(weight, oracle.damped(hessian), _grid_numpy)[1])
    np.testing.assert_allclose(shuffled[rows[order]], plain[order][rows[order]], rtol=0, atol=1e-6)


@pytest.mark.parametrize("width", _WIDTHS)
@pytest.mark.parametrize("name", ["well_conditioned", "condition_1e12", "rank_1_hessian", "few_tokens", "dead_columns"])
def test_feedback_beats_rounding_without_it(name: str, width: int) -> None:
    case = family(name)
    weight, hessian = torch.from_numpy(case.weight), torch.from_numpy(case.hessian)
    quantized, _ = error_feedback(weight, factorize(hessian), _grid_torch, width)
    # Inside a wide block errors go uncompensated.
    share = 0.7 if width == 1 else 0.9
    assert proxy_loss(weight, quantized, hessian) < share * proxy_loss(weight, _grid_torch(weight), hessian)
