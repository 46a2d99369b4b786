"""Lloyd's iteration and the exact optimum in one dimension, in float64."""

from __future__ import annotations

import numpy as np


def distances(points: np.ndarray, weights: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Weighted squared distances [n, k] of points [n, v] with element weights [n, v] to centroids [k, v]."""
    table = np.empty((len(points), len(centroids)))
    for k, centroid in enumerate(centroids):
        table[:, k] = (weights * (points - centroid) ** 2).sum(axis=1)
    return table


def lloyd(
    points: np.ndarray, weights: np.ndarray, centroids: np.ndarray, rounds: int
) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """``rounds`` times: nearest centroid for every point, then weighted means; clusters without weight stay.

    Returns the centroids [k, v], the assignment of the last round [n] and the total error after every round.
    """
    points, centroids = points.astype(np.float64), centroids.astype(np.float64).copy()
    weights = np.broadcast_to(weights.astype(np.float64).reshape(len(points), -1), points.shape)
    indices, errors = np.zeros(len(points), dtype=np.int64), []
    for _ in range(rounds):
        indices = distances(points, weights, centroids).argmin(axis=1)
        for k in range(len(centroids)):
            members = indices == k
            mass = weights[members].sum(axis=0)
            total = (weights[members] * points[members]).sum(axis=0)
            centroids[k] = np.where(mass > 0, total / np.where(mass > 0, mass, 1), centroids[k])
        errors.append(float((weights * (points - centroids[indices]) ** 2).sum()))
    return centroids, indices, errors


def optimal_error_1d(points: np.ndarray, weights: np.ndarray, count: int) -> float:
    """The least weighted squared error of ``count`` centroids for scalars [n], by dynamic programming."""
    order = np.argsort(points)
    x, w = points[order].astype(np.float64), weights[order].astype(np.float64)
    sums = [np.concatenate([[0.0], np.cumsum(w * x**power)]) for power in (0, 1, 2)]
    n = len(x)

    def cost(first: int, last: int) -> float:
        mass, linear, square = (s[last] - s[first] for s in sums)
        return square - linear * linear / mass if mass > 0 else 0.0

    best = [0.0] + [np.inf] * n
    for _ in range(count):
        best = [0.0, *(min(best[i] + cost(i, j) for i in range(j)) for j in range(1, n + 1))]
    return float(best[n])
