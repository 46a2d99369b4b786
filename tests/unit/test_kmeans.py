"""Weighted k-means against Lloyd's iteration in float64, the exact optimum in one dimension, and bad inputs."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo.math.kmeans import KMeansResult, kmeans
from oracle import kmeans as oracle

_WEIGHTS = ["one", "per-vector", "per-element"]


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _problem(n: int, v: int, kind: str = "one", seed: int = 0) -> tuple[Tensor, Tensor]:
    """Normal points [n, v] and weights over three decades, [n, 1] or [n, v]."""
    rng = np.random.default_rng(seed)
    points = torch.from_numpy(rng.normal(size=(n, v)).astype(np.float32))
    shape = (n, v) if kind == "per-element" else (n, 1)
    weights = np.ones(shape) if kind == "one" else np.exp(1.2 * rng.normal(size=shape))
    return points, torch.from_numpy(weights.astype(np.float32))


def _run(points: Tensor, weights: Tensor, count: int, seed: int = 0, **options: object) -> KMeansResult:
    return kmeans(points, weights, count, generator=_generator(seed), **options)  # type: ignore[arg-type]


def _error(points: Tensor, weights: Tensor, centroids: Tensor, indices: Tensor) -> float:
    """Weighted mean squared error in float64."""
    full = weights.double().expand(points.shape)
    gap = points.double() - centroids.double()[indices]
    return float((full * gap.square()).sum() / full.sum())


# ---------------------------------------------------------------- against float64


@pytest.mark.parametrize("iterations", [1, 4, 200])
@pytest.mark.parametrize("kind", _WEIGHTS)
@pytest.mark.parametrize(("v", "k"), [(1, 5), (2, 16), (4, 12), (7, 20), (16, 8)])
def test_lloyd_steps_equal_those_of_the_oracle(v: int, k: int, kind: str, iterations: int) -> None:
    points, weights = _problem(400, v, kind, seed=v)
    start = points[:k] * 0.9
    got = _run(points, weights, k, start=start, iterations=iterations, tolerance=0.0)
    assert got.steps <= iterations
    # One more assignment and mean after the last step.
    centroids, indices, errors = oracle.lloyd(points.numpy(), weights.numpy(), start.numpy(), got.steps + 1)
    assert np.unique(indices).size == k, "the problem must not need repair"
    np.testing.assert_array_equal(got.indices.numpy(), indices)
    np.testing.assert_allclose(got.centroids.numpy(), centroids, rtol=1e-5, atol=1e-5)
    assert got.error == pytest.approx(errors[-1] / float(weights.double().expand(400, v).sum()), rel=1e-5)
    if iterations == 200:
        assert got.steps < 200, "converged"
        _, after, _ = oracle.lloyd(points.numpy(), weights.numpy(), got.centroids.numpy(), 1)
        np.testing.assert_array_equal(got.indices.numpy(), after)


@pytest.mark.parametrize("kind", ["one", "per-vector"])
@pytest.mark.parametrize("k", [2, 4, 8])
def test_seeding_ends_near_the_exact_optimum_in_one_dimension(k: int, kind: str) -> None:
    points, weights = _problem(120, 1, kind, seed=k)
    optimum = oracle.optimal_error_1d(points[:, 0].numpy(), weights[:, 0].numpy(), k) / float(weights.double().sum())
    errors = [_run(points, weights, k, seed, iterations=100).error for seed in range(8)]
    assert min(errors) >= optimum * (1 - 1e-5)
    assert min(errors) <= optimum * 1.05
    assert np.median(errors) <= optimum * 1.35


@pytest.mark.parametrize(("k", "v", "error"), [(16, 2, 1e-9), (24, 4, 1e-9), (64, 4, 0.01), (300, 8, 0.01)])
def test_well_separated_clusters_are_found(k: int, v: int, error: float) -> None:
    """Up to 24 clusters all of them. Beyond that several centroids are drawn at a time, and two may share a cluster."""
    generator = _generator(k)
    centres = torch.randn(k, v, generator=generator) * 100
    points = centres.repeat_interleave(40, dim=0) + torch.randn(40 * k, v, generator=generator) * 1e-3
    for seed in range(3):
        assert _run(points, torch.ones(len(points)), k, seed).error <= error * float(points.var())


def test_weights_pull_the_centroids() -> None:
    points = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    per_vector = _run(points, torch.tensor([3.0, 1.0]), 1)
    torch.testing.assert_close(per_vector.centroids, torch.tensor([[0.25, 0.25]]))
    per_element = _run(points, torch.tensor([[3.0, 1.0], [1.0, 3.0]]), 1)
    torch.testing.assert_close(per_element.centroids, torch.tensor([[0.25, 0.75]]))
    unweighted = _run(points, torch.zeros(2), 1)
    torch.testing.assert_close(unweighted.centroids, torch.tensor([[0.5, 0.5]]))


# ---------------------------------------------------------------- invariants


@pytest.mark.parametrize("kind", _WEIGHTS)
@pytest.mark.parametrize("spoiled", [False, True], ids=["", "empty-clusters"])
def test_no_lloyd_step_raises_the_error(kind: str, spoiled: bool) -> None:
    points, weights = _problem(500, 3, kind, seed=3)
    start = points[:24].clone()
    if spoiled:
        start[5:] = start[0]
    errors = [_run(points, weights, 24, start=start, iterations=i, tolerance=0.0).error for i in range(1, 15)]
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(errors))
    assert errors[-1] < errors[0]


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(1, 60),
    v=st.integers(1, 6),
    k=st.integers(1, 40),
    levels=st.integers(1, 4),
    kind=st.sampled_from(["zeros", "one", "sparse", "per-element"]),
    sample=st.sampled_from([None, 1, 4]),
    seed=st.integers(0, 2**20),
)
def test_nothing_makes_it_return_nan_or_an_illegal_index(
    n: int, v: int, k: int, levels: int, kind: str, sample: int | None, seed: int
) -> None:
    generator = _generator(seed)
    points = torch.randint(0, levels, (n, v), generator=generator).float() - 1
    weights = {
        "zeros": torch.zeros(n),
        "one": torch.ones(n),
        "sparse": (torch.rand(n, generator=generator) < 0.2).float(),
        "per-element": (torch.rand(n, v, generator=generator) < 0.5).float(),
    }[kind]
    result = _run(points, weights, k, seed, sample=sample)
    assert result.centroids.shape == (k, v)
    assert result.indices.shape == (n,)
    assert bool(torch.isfinite(result.centroids).all())
    assert math.isfinite(result.error)
    assert int(result.indices.min()) >= 0
    assert int(result.indices.max()) < k
    # Centroids stay inside the range of the points.
    assert bool((result.centroids <= points.amax(0)).all())
    assert bool((result.centroids >= points.amin(0)).all())


@pytest.mark.parametrize("kind", _WEIGHTS)
def test_the_error_reported_is_that_of_the_result(kind: str) -> None:
    points, weights = _problem(700, 4, kind)
    result = _run(points, weights, 32)
    assert result.error == pytest.approx(_error(points, weights, result.centroids, result.indices), rel=1e-5)


@pytest.mark.parametrize("kind", _WEIGHTS)
@pytest.mark.parametrize("scale", [2.0**-30, 2.0**20])
def test_scaling_the_points_scales_the_centroids_and_nothing_else(scale: float, kind: str) -> None:
    points, weights = _problem(600, 3, kind)
    plain, scaled = _run(points, weights, 32), _run(points * scale, weights, 32)
    assert torch.equal(scaled.centroids, plain.centroids * scale)
    assert torch.equal(scaled.indices, plain.indices)
    assert scaled.error == pytest.approx(plain.error * scale**2)


@pytest.mark.parametrize("kind", _WEIGHTS)
@pytest.mark.parametrize("scale", [2.0**-40, 2.0**40])
def test_scaling_all_weights_changes_nothing(scale: float, kind: str) -> None:
    points, weights = _problem(600, 3, kind)
    plain, scaled = _run(points, weights, 32), _run(points, weights * scale, 32)
    assert torch.equal(scaled.centroids, plain.centroids)
    assert torch.equal(scaled.indices, plain.indices)
    assert scaled.error == pytest.approx(plain.error)


@pytest.mark.parametrize("kind", _WEIGHTS)
def test_the_order_of_the_points_does_not_matter_from_a_given_start(kind: str) -> None:
    points, weights = _problem(600, 3, kind)
    order = torch.randperm(600, generator=_generator(1))
    plain = _run(points, weights, 20, start=points[:20])
    shuffled = _run(points[order], weights[order], 20, start=points[:20])
    torch.testing.assert_close(shuffled.centroids, plain.centroids, rtol=1e-6, atol=1e-6)
    assert torch.equal(shuffled.indices, plain.indices[order])


@pytest.mark.parametrize("sample", [None, 8])
def test_the_generator_decides_everything(sample: int | None) -> None:
    points, weights = _problem(900, 4, "per-vector")
    first, again = (_run(points, weights, 40, 5, sample=sample) for _ in range(2))
    other = _run(points, weights, 40, 6, sample=sample)
    assert torch.equal(first.centroids, again.centroids)
    assert torch.equal(first.indices, again.indices)
    assert not torch.equal(first.centroids, other.centroids)


def test_a_sample_costs_little_accuracy() -> None:
    points, weights = _problem(20000, 4, "per-vector")
    full, sampled = _run(points, weights, 64), _run(points, weights, 64, sample=50)
    assert sampled.indices.shape == (20000,)
    assert sampled.error == pytest.approx(_error(points, weights, sampled.centroids, sampled.indices), rel=1e-5)
    assert sampled.error <= 1.03 * full.error


def test_points_weights_and_start_are_not_changed() -> None:
    points, weights = _problem(100, 3, "per-element")
    start = points[:30].clone()
    before = [tensor.clone() for tensor in (points, weights, start)]
    _run(points, weights, 30, start=start)
    assert all(torch.equal(a, b) for a, b in zip(before, (points, weights, start), strict=True))


# ---------------------------------------------------------------- empty clusters


@pytest.mark.parametrize("kind", _WEIGHTS)
@pytest.mark.parametrize("seeded", [True, False])
def test_every_centroid_is_used_when_there_are_enough_vectors(kind: str, seeded: bool) -> None:
    points, weights = _problem(400, 3, kind)
    start = None if seeded else points[:1].repeat(100, 1)
    result = _run(points, weights, 100, start=start)
    assert int(torch.bincount(result.indices, minlength=100).min()) >= 1


@pytest.mark.parametrize("start_at", [None, 0.0, 1e6], ids=["seeded", "all-equal", "far-away"])
@pytest.mark.parametrize("copies", [1, 50])
def test_as_many_distinct_vectors_as_centroids_are_stored_exactly(copies: int, start_at: float | None) -> None:
    distinct = torch.randn(60, 2, generator=_generator(2))
    points = distinct.repeat(copies, 1)
    start = None if start_at is None else torch.full((60, 2), start_at)
    result = _run(points, torch.ones(len(points)), 60, start=start)
    assert result.error == 0.0
    assert torch.equal(result.centroids[result.indices], points)


@pytest.mark.parametrize("distinct", [1, 2, 63])
@pytest.mark.parametrize("kind", _WEIGHTS)
def test_fewer_distinct_vectors_than_centroids_give_no_error(kind: str, distinct: int) -> None:
    base, weights = _problem(300, 3, kind)
    points = base[:distinct].repeat(300 // distinct + 1, 1)[:300]
    result = _run(points, weights, 64)
    assert result.error <= 1e-14
    torch.testing.assert_close(result.centroids[result.indices], points, rtol=1e-6, atol=0)
    # Spare centroids repeat a used one.
    used = result.centroids[result.indices.unique()]
    gaps = (result.centroids[:, None] - used[None]).abs().amax(dim=2)
    assert bool((gaps.amin(dim=1) < 1e-6).all())


def test_fewer_vectors_than_centroids_are_stored_exactly() -> None:
    points, weights = _problem(5, 4)
    result = _run(points, weights, 256)
    assert result.error == 0.0
    assert torch.equal(result.centroids[result.indices], points)


def test_a_sample_without_any_weight_is_survived() -> None:
    points, _ = _problem(400, 2)
    weights = torch.zeros(400)
    weights[7] = 1.0
    for seed in range(5):
        result = _run(points, weights, 4, seed, sample=2)
        assert result.error == pytest.approx(0.0, abs=1e-12)
        torch.testing.assert_close(result.centroids[result.indices[7]], points[7])
