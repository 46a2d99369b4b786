"""What VPTQ's codebooks are fitted to: which vectors, with which weights, checked against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from octavo.algorithms import get
from octavo.math.hessian import proxy_loss
from octavo.weight import VQWeight
from oracle import kmeans
from oracle.feedback import damped
from oracle.matrices import activations, normal_weight, second_moment
from oracle.vptq import column_weights, first_pass_error, processing_order, vectors

_OUT, _IN, _V = 60, 24, 2
_EXACT: dict[str, Any] = {
    "vector_length": _V,
    "centroids": 8,
    "norm": False,
    "codebook_dtype": "float32",
    "side_dtype": "float32",
    "sample": 0,
    "sweeps": 0,
    "iterations": 1000,
}


def _problem(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Columns of very different weight, and of different size, so that it matters to whom the centroids listen."""
    rng = np.random.default_rng(seed)
    x = activations(rng, _IN) * np.exp(1.0 * rng.normal(size=_IN))
    return normal_weight(rng, _OUT, _IN) * np.exp(0.5 * rng.normal(size=_IN)).astype(np.float32), second_moment(x)


def _quantize(weight: np.ndarray, hessian: np.ndarray, **options: Any) -> VQWeight:
    return get("vptq")(**{**_EXACT, **options}).quantize(torch.from_numpy(weight), hessian=torch.from_numpy(hessian))


def _assert_converged(book: np.ndarray, points: np.ndarray, weights: np.ndarray) -> None:
    """One more Lloyd step in float64 leaves most centroids where they are.

    Most, because the fit stops when a step gains less than 1e-4, and a last point may still change sides.
    """
    after, _, _ = kmeans.lloyd(points, weights, book, 1)
    moved = np.abs(after - book).max(axis=1) / np.abs(points).max()
    assert np.median(moved) < 1e-5, moved


@pytest.mark.parametrize("permute", [True, False])
@pytest.mark.parametrize("norm", [True, False])
def test_the_codebook_is_fitted_to_the_vectors_weighted_by_what_their_errors_cost(norm: bool, permute: bool) -> None:
    weight, hessian = _problem()
    result = _quantize(weight, hessian, norm=norm, permute=permute)
    scale = result.tensors["channel_scale"].double().numpy() if norm else None
    if scale is not None:
        weight = (weight - result.tensors["channel_offset"].double().numpy()) / scale
        hessian = hessian * np.outer(scale, scale)
    order = processing_order(hessian, None, permute)
    costs = column_weights(damped(hessian)[np.ix_(order, order)])
    book = result.codebook(0)[0].double().numpy()
    _assert_converged(book, vectors(weight[:, order], _V), np.repeat(costs, _OUT // _V))


def test_each_group_and_the_outliers_are_fitted_to_their_own_columns() -> None:
    weight, hessian = _problem(1)
    result = _quantize(weight, hessian, groups=2, outlier_percent=8, outlier_vector_length=3, outlier_centroids=8)
    order = processing_order(hessian, None, permute=True)
    costs = column_weights(damped(hessian)[np.ix_(order, order)])
    sorted_weight = weight[:, order]
    parts = [(result.tensors["outlier_codebook"], slice(0, 2), 3)]
    parts += [(book, slice(2 + 11 * group, 13 + 11 * group), _V) for group, book in enumerate(result.codebook(0))]
    assert len(parts) == 3
    for book, columns, v in parts:
        points = vectors(sorted_weight[:, columns], v)
        _assert_converged(book.double().numpy(), points, np.repeat(costs[columns], _OUT // v))


def test_the_residual_codebook_is_fitted_to_the_errors_of_a_first_pass() -> None:
    weight, hessian = _problem(2)
    result = _quantize(weight, hessian, residual_centroids=8)
    order = processing_order(hessian, None, permute=True)
    h = damped(hessian)[np.ix_(order, order)]
    main, residual = (result.codebook(stage)[0].double().numpy() for stage in (0, 1))
    costs = np.repeat(column_weights(h), _OUT // _V)
    _assert_converged(main, vectors(weight[:, order], _V), costs)
    _assert_converged(residual, vectors(first_pass_error(weight[:, order], h, main), _V), costs)


@pytest.mark.parametrize("out", [60, 61, 63])
def test_padding_does_not_pull_centroids_towards_zero(out: int) -> None:
    rng = np.random.default_rng(3)
    weight = (5 + normal_weight(rng, out, _IN)).astype(np.float32)
    result = _quantize(weight, np.eye(_IN, dtype=np.float32), vector_length=4)
    assert float(result.codebook(0).min()) > 4
    short = _quantize(weight[:3], np.eye(_IN, dtype=np.float32), vector_length=4)
    assert float(short.codebook(0)[0, :, :3].min()) > 4


def test_channels_that_never_fire_do_not_pull_centroids() -> None:
    weight, hessian = _problem(4)
    odd = weight.copy()
    odd[:, ::2] += 0.3
    hessian[::2] = 0
    hessian[:, ::2] = 0
    alive = _quantize(weight[:, 1::2], np.ascontiguousarray(hessian[1::2, 1::2]), damping=0.005)
    both = _quantize(odd, hessian)
    matrix, second = torch.from_numpy(odd), torch.from_numpy(hessian)
    wanted = proxy_loss(matrix[:, 1::2], alive.dequantize(), second[1::2, 1::2])
    assert proxy_loss(matrix, both.dequantize(), second) < 1.5 * wanted
    # They are quantized all the same, not dropped.
    assert float((both.dequantize() - matrix)[:, ::2].abs().mean()) < 0.3
