"""Weighted k-means on vectors of 1..16 weights: the codebook fit of every learned method."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.math.assign import nearest
from octavo.math.threads import one_thread

#: Vectors per centroid that take part in seeding, and D^2-sampling rounds in which the centroids are drawn.
_SEED_VECTORS = 32
_SEED_ROUNDS = 24
#: Lloyd steps over all vectors after the steps on the sample.
_FULL_STEPS = 2
#: Vectors looked at per centroid to be moved, in search of distinct ones.
_REPAIR_SEARCH = 8
#: Below so many weights, one thread is faster than two and their barriers.
_SMALL = 1 << 20


@dataclass(frozen=True)
class KMeansResult:
    """Centroids [k, v] float32, indices [n] int64, the weighted mean squared error, and Lloyd steps taken."""

    centroids: Tensor
    indices: Tensor
    error: float
    steps: int


def kmeans(
    points: Tensor,
    weights: Tensor,
    count: int,
    *,
    generator: torch.Generator,
    iterations: int = 20,
    tolerance: float = 1e-4,
    sample: int | None = None,
    start: Tensor | None = None,
) -> KMeansResult:
    """Minimise sum_n sum_j weights_nj (x_nj - c_nj)^2 by D^2 seeding and Lloyd iterations.

    A weight per vector ([n] or [n, 1]) leaves the assignment unweighted and weights the means; a weight per element
    ([n, v]) enters both. Empty clusters are re-seeded on the vectors with the largest weighted error, so every
    centroid is used whenever there are as many distinct vectors; spare centroids repeat a used one, never NaN.

    Args:
        points: [n, v], float32, finite.
        weights: [n], [n, 1] or [n, v], non-negative, finite; all zero counts as all one.
        count: number of centroids k.
        generator: source of all randomness.
        iterations: at most so many Lloyd steps.
        tolerance: stop when a step lowers the error by less than this share.
        sample: vectors per centroid for the iterations; with more vectors than that a random sample is iterated on
            first, and the last two steps see all of them. None always takes all.
        start: centroids [k, v] to begin with instead of seeding.
    """
    with one_thread(points.numel() < _SMALL):
        return _kmeans(points.contiguous().float(), weights, count, generator, iterations, tolerance, sample, start)


def _kmeans(
    points: Tensor,
    weights: Tensor,
    count: int,
    generator: torch.Generator,
    iterations: int,
    tolerance: float,
    sample: int | None,
    start: Tensor | None,
) -> KMeansResult:
    n, v = points.shape
    weights = weights.reshape(n, -1).float()
    if not bool((weights > 0).any()):
        weights = torch.ones_like(weights)
    importance = weights.sum(dim=1)
    centroids = _seed(points, importance, count, generator) if start is None else start.float().clone()
    steps = 0
    if sample is not None and n > sample * count:
        subset = torch.randperm(n, generator=generator)[: sample * count].to(points.device)
        centroids, steps = _lloyd(points[subset], weights[subset], centroids, iterations, tolerance)
        iterations = min(iterations, _FULL_STEPS)
    centroids, more = _lloyd(points, weights, centroids, iterations, tolerance)
    indices = nearest(points, centroids, _element(weights, v))
    centroids, _ = _means(points, weights, indices, centroids)
    error = float(_distance(points, weights, centroids, indices).sum())
    return KMeansResult(centroids, indices, error / float(weights.expand(n, v).sum()), steps + more)


def _element(weights: Tensor, v: int) -> Tensor | None:
    """Weights as the assignment wants them: None when a vector's elements all weigh the same."""
    return weights.contiguous() if weights.shape[1] == v > 1 else None


def _lloyd(points: Tensor, weights: Tensor, centroids: Tensor, iterations: int, tolerance: float) -> tuple[Tensor, int]:
    """Lloyd steps until the error stalls; returns centroids and steps taken."""
    element = _element(weights, points.shape[1])
    previous = float("inf")
    for step in range(1, iterations + 1):
        indices = nearest(points, centroids, element)
        centroids, used = _means(points, weights, indices, centroids)
        distance = _distance(points, weights, centroids, indices)
        error = float(distance.sum())
        if not bool(used.all()):
            centroids = _repair(points, distance, centroids, used)
        elif previous - error <= tolerance * error:
            return centroids, step
        previous = error
    return centroids, iterations


def _distance(points: Tensor, weights: Tensor, centroids: Tensor, indices: Tensor) -> Tensor:
    """Weighted squared error [n] of each vector."""
    difference = points - centroids[indices]
    return (difference.square_().mul_(weights)).sum(dim=1)


def _means(points: Tensor, weights: Tensor, indices: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted means of the clusters and the mask of clusters with weight; the others keep their old centroid.

    Sums run in float64: a cluster may hold a million vectors.
    """
    k, v = old.shape
    mass = torch.zeros(k, weights.shape[1], dtype=torch.float64, device=points.device)
    total = torch.zeros(k, v, dtype=torch.float64, device=points.device)
    mass.index_add_(0, indices, weights.double())
    total.index_add_(0, indices, (points * weights).double())
    # An element of a cluster may have no weight at all while others have: it keeps its old value.
    means = torch.where(mass > 0, total / mass.clamp(min=1e-300), old.double()).float()
    return means, mass.sum(dim=1) > 0


def _repair(points: Tensor, distance: Tensor, centroids: Tensor, used: Tensor) -> Tensor:
    """Move unused centroids onto the worst-served vectors, distinct ones as far as there are."""
    empty = torch.nonzero(~used).flatten()
    # Copies of one vector share their distance, so they stand together among the worst: look further than needed.
    worst = torch.topk(distance, min(_REPAIR_SEARCH * empty.numel(), distance.numel())).indices
    fresh = torch.unique(points[worst[distance[worst] > 0]], dim=0)[: empty.numel()]
    centroids = centroids.clone()
    centroids[empty[: fresh.shape[0]]] = fresh
    if fresh.shape[0] < empty.numel() and bool(used.any()):
        # Fewer distinct vectors than centroids: the spare ones repeat one that is used.
        centroids[empty[fresh.shape[0] :]] = centroids[torch.nonzero(used).flatten()[0]].clone()
    return centroids


def _seed(points: Tensor, importance: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """D^2 sampling on a random subset, several centroids a round: k-means++ up to 24 centroids, k-means|| beyond.

    A whole pass per centroid would cost more than the Lloyd steps that it saves.
    """
    size = max(_SEED_VECTORS * count, 4096)
    if size < points.shape[0]:
        subset = torch.randperm(points.shape[0], generator=generator)[:size].to(points.device)
        points, importance = points[subset], importance[subset]
    chosen = points[_draw(importance, 1, generator)]
    closest = (points - chosen).square_().sum(dim=1)
    while chosen.shape[0] < count:
        # Rounds grow with what is there already, so that the first, most informative draws are careful ones.
        size = min(max(count // _SEED_ROUNDS, 1), chosen.shape[0], count - chosen.shape[0])
        new = points[_draw(closest * importance, size, generator)]
        chosen = torch.cat([chosen, new])
        torch.minimum(closest, (points - new[nearest(points, new)]).square_().sum(dim=1), out=closest)
    return chosen


def _draw(probability: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` indices with the given unnormalised probabilities, with replacement, by inverse transform."""
    cumulative = probability.double().cumsum(0)
    if float(cumulative[-1]) <= 0:
        return torch.randint(probability.numel(), (count,), generator=generator).to(probability.device)
    uniform = torch.rand(count, generator=generator, dtype=torch.float64).to(probability.device) * cumulative[-1]
    return torch.searchsorted(cumulative, uniform, right=True).clamp(max=probability.numel() - 1)
