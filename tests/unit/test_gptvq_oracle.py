"""The oracles of GPTVQ themselves: the derivations of the textbook version, and the faults of the released one."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from oracle import gptvq_released as released
from oracle.feedback import best_free_columns, damped, error_feedback
from oracle.gptvq import (
    Fitted,
    Metric,
    Tiles,
    decode,
    em,
    gptvq,
    inverse_factor,
    least_squares_books,
    log2_scales,
    metrics,
)
from oracle.gptvq_released import gptvq_released
from oracle.kmeans import lloyd
from oracle.matrices import activations, normal_weight, second_moment
from oracle.vptq import column_weights

_WIDTHS = (1, 2, 3, 4)
_KINDS: tuple[Metric, ...] = ("block", "diagonal", "none")


def _matrix(out: int, inp: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    weight, inputs = normal_weight(rng, out, inp), activations(rng, inp, tokens=4 * inp)
    return weight.astype(float), second_moment(inputs).astype(float)


def _books(tiles: Tiles, out: int, inp: int, k: int, seed: int = 1) -> np.ndarray:
    shape = (-(-out // tiles.rows), -(-inp // tiles.columns), k, tiles.width)
    return np.random.default_rng(seed).normal(size=shape) * 0.06


def _loss(error: np.ndarray, hessian: np.ndarray) -> float:
    return float(np.trace(error @ hessian @ error.T))


# ---------------------------------------------------------------- textbook: feedback and metric


@pytest.mark.parametrize("width", _WIDTHS)
def test_the_metric_is_the_diagonal_block_of_the_inverse_factor(width: int) -> None:
    """The Schur complement H_PP - H_PF H_FF^-1 H_FP is U_PP^-1 U_PP^-T, and 1 / U_jj^2 for single columns."""
    hessian = damped(_matrix(1, 10)[1])
    factor = inverse_factor(hessian)
    np.testing.assert_allclose(factor.T @ factor @ hessian, np.eye(10), atol=1e-10)
    assert not np.tril(factor, -1).any()
    for vector, norm in enumerate(metrics(hessian, width)):
        p = slice(vector * width, min((vector + 1) * width, 10))
        corner = np.linalg.inv(factor[p, p])
        np.testing.assert_allclose(norm, corner @ corner.T, rtol=1e-9)
    weights = np.concatenate([np.diag(m) for m in metrics(hessian, width, "diagonal")])
    np.testing.assert_allclose(weights, 1 / np.diag(factor) ** 2, rtol=1e-9)
    np.testing.assert_allclose(weights, column_weights(hessian), rtol=1e-9)


@pytest.mark.parametrize("width", _WIDTHS)
def test_block_feedback_moves_to_the_best_free_columns(width: int) -> None:
    """After every vector, the columns to come are where least squares over all of them would put them."""
    weight, hessian = _matrix(5, 10)
    tiles = Tiles(3, 10, width)
    found = gptvq(weight, hessian, _books(tiles, 5, 10, 6), tiles)
    h = damped(hessian)
    for stop in range(width, 10, width):
        best = best_free_columns(weight, h, found.values[:, :stop])
        np.testing.assert_allclose(found.compensated[:, stop : stop + width], best[:, :width], atol=1e-12)


@pytest.mark.parametrize("width", _WIDTHS)
def test_block_feedback_equals_elimination(width: int) -> None:
    """The Cholesky factor and Gaussian elimination of the inverse Hessian are two roads to one result."""
    weight, hessian = _matrix(5, 10)
    tiles = Tiles(2, 6 if width != 4 else 8, width)
    found = gptvq(weight, hessian, _books(tiles, 5, 10, 6), tiles)

    def fixed(values: np.ndarray, first: int, rest: np.ndarray) -> np.ndarray:
        return found.values[:, first : first + values.shape[1]]

    _, compensated = error_feedback(weight, damped(hessian), fixed, width)
    np.testing.assert_allclose(found.compensated, compensated, atol=1e-12)


@pytest.mark.parametrize("width", _WIDTHS)
def test_the_losses_of_the_vectors_add_up_to_the_loss_of_the_matrix(width: int) -> None:
    weight, hessian = _matrix(5, 10)
    tiles, h = Tiles(5, 12, width), damped(hessian)
    found = gptvq(weight, hessian, _books(tiles, 5, 10, 6), tiles)
    total = 0.0
    for vector, norm in enumerate(metrics(h, width)):
        p = slice(vector * width, vector * width + len(norm))
        total += _loss(found.compensated[:, p] - found.values[:, p], norm)
    assert total == pytest.approx(_loss(weight - found.values, h), rel=1e-10)


def test_the_block_metric_chooses_what_leaves_the_least_loss_after_the_best_compensation() -> None:
    """Brute force: every centroid is tried for a vector, with all later columns set by least squares."""
    weight, hessian = _matrix(4, 8)
    tiles, h = Tiles(4, 8, 2), damped(hessian)
    books = _books(tiles, 4, 8, 5)
    found = gptvq(weight, hessian, books, tiles)
    for first in range(0, 8, 2):
        for row in range(4):
            losses = []
            for centroid in books[0, 0]:
                fixed = np.concatenate([found.values[row : row + 1, :first], centroid[None]], axis=1)
                free = best_free_columns(weight[row : row + 1], h, fixed) if first < 6 else np.zeros((1, 0))
                losses.append(_loss(weight[row : row + 1] - np.concatenate([fixed, free], axis=1), h))
            assert int(np.argmin(losses)) == found.codes[row, first // 2]


def test_without_coupling_every_column_is_compensated_as_if_alone() -> None:
    weight, hessian = _matrix(3, 4)
    tiles = Tiles(3, 4, 2)
    found = gptvq(weight, hessian, _books(tiles, 3, 4, 4), tiles, coupled=False)
    u, error = inverse_factor(damped(hessian)), weight[:, :2] - found.values[:, :2]
    moved = weight[:, 2:].copy()
    for j in range(2):
        moved -= np.outer(error[:, j] / u[j, j], u[j, 2:])
    np.testing.assert_allclose(found.compensated[:, 2:], moved, atol=1e-14)
    exact = gptvq(weight, hessian, _books(tiles, 3, 4, 4), tiles)
    assert np.abs(exact.compensated[:, 2:] - moved).max() > 1e-4


@pytest.mark.parametrize("kind", _KINDS)
def test_codes_that_were_nearest_are_followed_without_a_difference(kind: Metric) -> None:
    weight, hessian = _matrix(5, 11)
    tiles = Tiles(2, 6, 3)
    books = _books(tiles, 5, 11, 7)
    scales = np.exp(np.random.default_rng(3).normal(size=(5, 11)) * 0.3)
    found = gptvq(weight, hessian, books, tiles, kind, scales=scales)
    np.testing.assert_array_equal(found.values, decode(found.codes, books, tiles, 11, scales))
    again = gptvq(weight, hessian, books, tiles, kind, scales=scales, follow=found.codes)
    assert (again.different, again.worst) == (0, 0.0)
    np.testing.assert_array_equal(again.values, found.values)
    spoilt = found.codes.copy()
    spoilt[1, 2] = (spoilt[1, 2] + 1) % 7
    other = gptvq(weight, hessian, books, tiles, kind, scales=scales, follow=spoilt)
    assert other.different >= 1 and other.worst > 1e-6


# ---------------------------------------------------------------- textbook: codebooks and scales


def _points() -> tuple[np.ndarray, list[np.ndarray], np.ndarray, np.ndarray]:
    rng = np.random.default_rng(4)
    points, weights = rng.normal(size=(20, 4, 3)), rng.random((20, 4)) + 0.1
    norms = [m @ m.T for m in rng.normal(size=(4, 3, 3))]
    return points, norms, weights, points[:6, 0].copy()


def test_em_never_increases_its_loss() -> None:
    points, norms, weights, start = _points()
    losses = em(points, norms, weights, start, 12).losses
    assert len(losses) == 24
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(losses))
    assert losses[-1] < 0.8 * losses[0]


def test_em_with_the_identity_is_kmeans() -> None:
    points, _, weights, start = _points()
    found = em(points, [np.eye(3)] * 4, weights, start, 5)
    flat, codes, errors = lloyd(points.reshape(-1, 3), weights.reshape(-1), start, 5)
    np.testing.assert_allclose(found.centroids, flat, atol=1e-12)
    np.testing.assert_array_equal(found.codes.reshape(-1), codes)
    np.testing.assert_allclose(found.losses[1::2], errors, rtol=1e-12)


def test_the_means_of_em_beat_all_their_neighbours() -> None:
    points, norms, weights, start = _points()

    def loss(found: Fitted, centroids: np.ndarray) -> float:
        gaps = points - centroids[found.codes]
        return sum(float((weights[:, p] * ((gaps[:, p] @ norms[p]) * gaps[:, p]).sum(axis=1)).sum()) for p in range(4))

    found = em(points, norms, weights, start, 3)
    least, rng = loss(found, found.centroids), np.random.default_rng(0)
    assert least == pytest.approx(found.losses[-1])
    for size in (1e-6, 1e-3, 1e-1):
        assert all(loss(found, found.centroids + size * rng.normal(size=start.shape)) > least for _ in range(20))


def test_em_leaves_centroids_without_members_alone() -> None:
    points, norms, _, start = _points()
    start[5] = 1e3
    np.testing.assert_array_equal(em(points, norms, None, start, 3).centroids[5], start[5])


@pytest.mark.parametrize("scaled", [False, True])
def test_closed_form_books_beat_all_their_neighbours(scaled: bool) -> None:
    weight, hessian = _matrix(7, 10)
    tiles = Tiles(4, 6, 2)
    start = _books(tiles, 7, 10, 5)
    scales = log2_scales(weight, 2).values if scaled else None
    codes = gptvq(weight, hessian, start, tiles, scales=scales).codes
    books = least_squares_books(weight, hessian, codes, tiles, start, scales)

    def loss(values: np.ndarray) -> float:
        return _loss(weight - decode(codes, values, tiles, 10, scales), hessian)

    least, rng = loss(books), np.random.default_rng(0)
    assert least < loss(start)
    for size in (1e-5, 1e-3, 1e-1):
        assert all(loss(books + size * rng.normal(size=books.shape)) > least for _ in range(20))


def test_closed_form_books_recover_the_books_of_a_quantized_matrix() -> None:
    """They keep centroids that no vector takes."""
    _, hessian = _matrix(9, 10)
    tiles = Tiles(5, 6, 2)
    books = _books(tiles, 9, 10, 4)
    codes = np.random.default_rng(0).integers(0, 3, size=(9, 5))
    start = _books(tiles, 9, 10, 4, seed=8)
    found = least_squares_books(decode(codes, books, tiles, 10, None), hessian, codes, tiles, start)
    used = np.zeros((2, 2, 4), dtype=bool)
    for row, vector in np.ndindex(9, 5):
        used[*tiles.book(row, vector * 2), codes[row, vector]] = True
    assert used.any() and not used.all()
    np.testing.assert_allclose(found[used], books[used], atol=1e-8)
    np.testing.assert_allclose(found[~used], start[~used], atol=1e-12)


def test_log2_scales_are_half_a_step_from_the_truth_and_exact_at_both_ends() -> None:
    weight = _matrix(30, 20)[0]
    found = log2_scales(weight, 8)
    for block, columns in enumerate((slice(0, 8), slice(8, 16), slice(16, 20))):
        logs = np.log2(np.abs(weight[:, columns]).max(axis=1))
        stored = np.log2(found.values[:, columns][:, 0])
        assert np.abs(stored - logs).max() <= found.step[block] / 2 * (1 + 1e-9)
        assert {0, 15} <= set(found.codes[:, block].tolist())
        np.testing.assert_allclose(stored[[logs.argmin(), logs.argmax()]], [logs.min(), logs.max()], atol=1e-12)


def test_log2_scales_of_zeros_do_not_stretch_the_others() -> None:
    weight = _matrix(6, 8)[0]
    weight[2, :4] = 0
    found, without = log2_scales(weight, 4), log2_scales(np.delete(weight, 2, axis=0), 4)
    np.testing.assert_array_equal(found.step, without.step)
    assert found.codes[2, 0] == 0
    empty = log2_scales(np.zeros((3, 4)), 4)
    np.testing.assert_array_equal(empty.values, np.ones((3, 4)))


# ---------------------------------------------------------------- released: its pieces


def _numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


@pytest.mark.parametrize("k", [4, 16, 32, 24, 256])
def test_released_nearest_is_the_brute_force_minimum(k: int) -> None:
    points, weights, books = _numbers(3, 70, 4), _numbers(70, 4, seed=1).abs() + 0.1, _numbers(3, k, 4, seed=2)
    table = ((points.unsqueeze(2) - books.unsqueeze(1)).square() * weights.view(1, 70, 1, 4)).sum(dim=3)
    assert torch.equal(released.nearest(points, weights, books), table.argmin(dim=2))


def test_released_nearest_does_not_depend_on_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    points, weights, books = _numbers(5, 70, 2), torch.ones(70, 2).double(), _numbers(5, 16, 2, seed=2)
    whole = released.nearest(points, weights, books)
    for chunk in (16, 16 * 33, 16 * 150):
        monkeypatch.setattr(released, "_CHUNK", chunk)
        assert torch.equal(released.nearest(points, weights, books), whole)


def _released_em(points: Tensor, weights: Tensor, books: Tensor, steps: int) -> Tensor:
    """All the steps, cluster by cluster, never stopping early."""
    books = books.clone()
    for _ in range(steps):
        codes = released.nearest(points, weights, books)
        for group, centroids in enumerate(books):
            for c in range(len(centroids)):
                members = codes[group] == c
                mass = weights[members].sum(dim=0).clamp(min=1e-10)
                centroids[c] = (weights[members] * points[group][members]).sum(dim=0) / mass
    return books


def test_released_em_stops_early_without_changing_anything_and_empties_become_zero() -> None:
    points, weights = _numbers(3, 60, 2), _numbers(60, 2, seed=1).abs() + 0.1
    start = released.mahalanobis_seeds(points, 8)
    start[1, 3] = 1e3
    found, steps = released.em(points, weights, start, 100)
    assert 1 < steps < 50
    torch.testing.assert_close(found, _released_em(points, weights, start, 100), rtol=0, atol=1e-13)
    assert not bool(_released_em(points, weights, start, 1)[1, 3].any())
    assert not bool(released.em(points, weights, start, 1)[0][1, 3].any())


def test_released_seeds_lie_at_equally_spaced_ranks_of_the_mahalanobis_distance() -> None:
    points = _numbers(2, 50, 3) @ _numbers(3, 3, seed=3)
    seeds = released.mahalanobis_seeds(points, 8)
    for x, found in zip(points.numpy(), seeds.numpy(), strict=True):
        gaps = x - x.mean(axis=0)
        distance = [gap @ np.linalg.inv(np.cov(x.T)) @ gap for gap in gaps]
        np.testing.assert_array_equal(found, x[np.argsort(distance)][[0, 7, 14, 21, 28, 35, 42, 49]])


def test_released_seeds_take_points_in_a_plane_and_a_single_point() -> None:
    flat = _numbers(1, 20, 1).expand(1, 20, 2).contiguous()
    assert bool(torch.isfinite(released.mahalanobis_seeds(flat, 4)).all())
    assert not bool(released.mahalanobis_seeds(torch.zeros(1, 20, 2).double(), 4).any())


def test_released_factor_damps_and_gives_dead_channels_a_one() -> None:
    hessian = _matrix(1, 12)[1]
    hessian[3] = hessian[:, 3] = 0
    upper = released.inverse_factor(torch.from_numpy(hessian)).numpy()
    wanted = hessian.copy()
    wanted[3, 3] = 1
    wanted += 0.01 * np.diag(wanted).mean() * np.eye(12)
    np.testing.assert_allclose(upper, inverse_factor(wanted), rtol=1e-9, atol=1e-12)


def test_released_scales_are_logarithms_to_base_ten_and_zeros_count_as_one() -> None:
    weight = torch.from_numpy(_matrix(9, 8)[0])
    codes, z, a = released.log_scales(weight, 4)
    logs = weight.view(9, 2, 4).abs().amax(dim=2).log10()
    torch.testing.assert_close(z, logs.amin(dim=0))
    torch.testing.assert_close(z + 15 * a, logs.amax(dim=0))
    error = released.decode_scales(codes, z, a, 4)[:, ::4].log10() - logs
    assert bool((error.abs() <= a / 2 * (1 + 1e-9)).all())
    weight[4] = 0
    codes, z, a = released.log_scales(weight, 4)
    torch.testing.assert_close(released.decode_scales(codes, z, a, 4)[4], torch.ones(8).double())
    equal = released.log_scales(torch.full((3, 4), 0.5).double(), 4)
    torch.testing.assert_close(released.decode_scales(*equal, 4), torch.full((3, 4), 0.5).double())


def test_released_codebooks_take_the_whole_int8_range() -> None:
    books = _numbers(2, 3, 8, 2)
    books[1, 2] = 0
    codes, scale = released.int8(books)
    assert codes[0].abs().amax(dim=(1, 2)).tolist() == [127, 127, 127]
    gaps = (released.dequantized(codes, scale) - books).abs().amax(dim=(2, 3))
    assert bool((gaps <= scale / 2 * (1 + 1e-9)).all()) and not bool(gaps[1, 2])


# ---------------------------------------------------------------- released: the whole

#: Output rows, inputs, d, k, group rows, group columns, scale block, standard deviation of the weights, and the loss
#: tr(E H E^T) that the published code itself (github.com/Qualcomm-AI-research/gptvq at 2db0930, its .float() casts made
#: float64) reaches. "small" restarts its gradient steps three times; "empty" has as many centroids as vectors.
_PUBLISHED: dict[str, tuple[int, int, int, int, int, int, int, float, float]] = {
    "plain": (48, 256, 2, 16, 16, 128, 0, 0.05, 1053.404483275813),
    "long vectors": (32, 192, 4, 32, 32, 192, 0, 0.05, 1341.0381705916639),
    "scalars": (16, 128, 1, 4, 2, 64, 0, 0.05, 131.0939035406418),
    "group starts inside a block": (48, 192, 2, 8, 24, 96, 0, 0.05, 1443.0759066977441),
    "scales": (48, 256, 2, 16, 16, 128, 16, 0.05, 1203.167084390954),
    "scales of whole groups": (32, 320, 4, 16, 32, 64, 64, 0.05, 3532.046187705653),
    "empty": (16, 64, 4, 128, 8, 64, 0, 0.05, 0.06423234435109652),
    "small": (48, 128, 2, 16, 16, 128, 0, 1e-4, 0.0019092562167549963),
}


def _published_case(out: int, inp: int, size: float) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(7)
    weight = normal_weight(rng, out, inp).astype(np.float64) * (size / 0.05)
    x = activations(rng, inp, tokens=512)
    x[:, 5] = 0
    return torch.from_numpy(weight), torch.from_numpy(x.T @ x / 2)


@pytest.mark.parametrize("name", _PUBLISHED)
def test_released_reaches_the_loss_of_the_published_code(name: str) -> None:
    out, inp, d, k, rows, columns, block, size, loss = _PUBLISHED[name]
    weight, hessian = _published_case(out, inp, size)
    found = gptvq_released(weight, hessian, d, k, rows, columns, block)
    error = (weight - found.values).numpy()
    assert _loss(error, hessian.numpy()) == pytest.approx(loss, rel=1e-7)
    assert found.loss[1] == pytest.approx(loss, rel=1e-7)


@pytest.mark.parametrize("name", ["plain", "scales"])
def test_released_values_are_those_of_its_parts(name: str) -> None:
    out, inp, d, k, rows, columns, block, size, _ = _PUBLISHED[name]
    found = gptvq_released(*_published_case(out, inp, size), d, k, rows, columns, block)
    books = found.codebooks.double() * found.codebook_scales[..., None, None]
    scales = None
    if block:
        assert found.scale_codes is not None and found.scale_z is not None and found.scale_a is not None
        assert int(found.scale_codes.min()) == 0 and int(found.scale_codes.max()) == 15
        scales = 10 ** (found.scale_z + found.scale_a * found.scale_codes).repeat_interleave(block, dim=1).numpy()
    values = decode(found.indices.numpy(), books.numpy(), Tiles(rows, columns, d), inp, scales)
    np.testing.assert_allclose(found.values.numpy(), values, atol=1e-15)


def test_released_recursion_of_scalars_is_that_of_gptq() -> None:
    """With d = 1 nothing is left of the faulty weights and of the missing compensation: plain error feedback."""
    weight, hessian = (x.numpy() for x in _published_case(12, 128, 0.05))
    found = gptvq_released(torch.from_numpy(weight), torch.from_numpy(hessian), 1, 8, 5, 128, update=False)
    books = (found.codebooks.double() * found.codebook_scales[..., None, None]).numpy()
    wanted = hessian.copy()
    wanted[5, 5] = 1
    wanted += 0.01 * np.diag(wanted).mean() * np.eye(128)
    weight[:, 5] = 0

    def quantize(values: np.ndarray, first: int, rest: np.ndarray) -> np.ndarray:
        own = books[np.arange(12) // 5, 0, :, 0]
        return own[np.arange(12), np.abs(values - own).argmin(axis=1)][:, None]

    values, _ = error_feedback(weight, wanted, quantize)
    np.testing.assert_allclose(found.values.numpy(), values, atol=1e-12)


def test_released_scales_make_the_codes_of_a_block_blind_to_compensation() -> None:
    """Inside one block of 128 columns the codes of scaled scalars are those of no feedback at all."""
    weight, hessian = (torch.from_numpy(x) for x in _matrix(12, 128))
    alone = torch.eye(128, dtype=torch.float64)
    scaled = [gptvq_released(weight, h, 1, 4, 4, 128, 16, update=False).indices for h in (hessian, alone)]
    plain = [gptvq_released(weight, h, 1, 4, 4, 128, update=False).indices for h in (hessian, alone)]
    assert torch.equal(*scaled)
    assert (plain[0] != plain[1]).double().mean() > 0.05


def test_released_takes_smaller_last_groups() -> None:
    weight, hessian = _published_case(20, 136, 0.05)
    found = gptvq_released(weight, hessian, 2, 8, 12, 96)
    assert found.codebooks.shape == (2, 2, 8, 2)
    whole = gptvq_released(weight[:12], hessian, 2, 8, 12, 96)
    assert torch.equal(found.indices[:12], whole.indices)
    assert torch.equal(found.indices[12:], gptvq_released(weight[12:], hessian, 2, 8, 8, 96).indices)


def test_released_in_float32_is_as_good_as_in_float64() -> None:
    weight, hessian = _published_case(48, 256, 0.05)
    exact = gptvq_released(weight, hessian, 4, 32, 48)
    quick = gptvq_released(weight, hessian, 4, 32, 48, dtype=torch.float32)
    assert quick.values.dtype == torch.float32
    assert (quick.indices == exact.indices).double().mean() > 0.9
    assert quick.loss[1] == pytest.approx(exact.loss[1], rel=0.02)


@pytest.mark.parametrize(
    ("inp", "d", "columns", "scale"), [(10, 4, 8, 0), (12, 3, 6, 0), (12, 2, 3, 0), (12, 2, 4, 8), (16, 4, 8, 2)]
)
def test_released_refuses_sizes_that_do_not_fit(inp: int, d: int, columns: int, scale: int) -> None:
    weight, hessian = (torch.from_numpy(x) for x in _matrix(4, inp))
    with pytest.raises(ValueError, match="cannot be cut"):
        gptvq_released(weight, hessian, d, 4, 4, columns, scale)


def test_released_refuses_numbers_that_are_not_finite() -> None:
    weight, hessian = (torch.from_numpy(x) for x in _matrix(4, 8))
    with pytest.raises(ValueError, match="NaN"):
        gptvq_released(weight / 0, hessian, 2, 4, 4)
    with pytest.raises(ValueError, match="Cholesky"):
        gptvq_released(weight, -hessian, 2, 4, 4)


# ---------------------------------------------------------------- released: as a method of the benchmarks

_SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "quality" / "released.py"


def _run(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(_SCRIPT), *arguments, "--json"]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_the_benchmark_method_quantizes_a_model_within_its_bits(
    tiny_llama: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report = _run(
        *("quantize", str(tiny_llama), str(out), "--method", "gptvq_released", "--bits", "2.5", "--ctx", "32"),
        *("--samples", "4", "--calib", str(tiny_text_file), "--set", "vector_length=2"),
    )
    assert 2.3 < report["bits_per_weight"] <= 2.5
    assert all(m["bits_per_weight"] <= 2.5 and 0 < m["error"] < 0.2 for m in report["matrices"])
    stored = json.loads((out / "config.json").read_text())["quantization_config"]
    layouts = json.dumps(stored)
    assert '"direction": "row"' in layouts and '"codebook_dtype": "int8"' in layouts
