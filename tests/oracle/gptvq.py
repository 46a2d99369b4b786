"""GPTVQ with exact block feedback in float64, for small matrices: loops, and no cleverness.

The method quantizes vectors of d consecutive columns from left to right. Write e = w - q for the error of a row,
H^-1 = U^T U with U upper triangular, and z = e U^-1, so that the loss is e H e^T = |z|^2 and e = z U. The first vector
P has e_P = z_P U_PP, so z_P = e_P U_PP^-1 is settled by its own error, whatever comes later. The later columns F have
e_F = z_P U_PF + z_F U_FF, and the loss is least where z_F = 0: at e_F = e_P U_PP^-1 U_PF. Hence

- the best values of the columns to come are W_F - e_P U_PP^-1 U_PF, the target of all further quantization;
- what a vector's error costs for good is |e_P U_PP^-1|^2 = e_P M e_P^T with M = U_PP^-1 U_PP^-T.

Since U_FF belongs to F alone, the same holds for the next vector, with its compensated values in place of the weights,
and the losses of the vectors add up to the loss of the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from oracle.feedback import damped

Metric = Literal["block", "diagonal", "none"]


@dataclass(frozen=True)
class Tiles:
    """Weights that share a codebook, ``rows`` x ``columns``, and the length ``width`` of the vectors in it."""

    rows: int
    columns: int
    width: int

    def book(self, row: int, column: int) -> tuple[int, int]:
        """Where in books [row groups, column groups, k, d] the codebook of a weight is."""
        return row // self.rows, column // self.columns

    def starts(self, total: int) -> range:
        """First columns of all vectors; the last vector of a row may be shorter."""
        return range(0, total, self.width)


@dataclass
class Coded:
    """What :func:`gptvq` found.

    Attributes:
        codes: [out, vectors].
        values: the quantized matrix [out, in].
        compensated: the values [out, in] that the vectors were chosen for.
        different: codes that were followed and are not the nearest.
        worst: the largest excess of their distance, relative to the least distance plus the vector's squared length.
    """

    codes: np.ndarray
    values: np.ndarray
    compensated: np.ndarray
    different: int = 0
    worst: float = 0.0


def inverse_factor(hessian: np.ndarray) -> np.ndarray:
    """U, upper triangular with a positive diagonal, such that H^-1 = U^T U; ``hessian`` is positive definite."""
    return np.linalg.cholesky(np.linalg.inv(hessian.astype(np.float64))).T


def metrics(hessian: np.ndarray, width: int, kind: Metric = "block") -> list[np.ndarray]:
    """M of every vector, for a positive definite (damped) ``hessian``: its error e costs e M e^T.

    ``block``: U_PP^-1 U_PP^-T, here as the Schur complement H_PP - H_PF H_FF^-1 H_FP, which is the same: the loss left
    by an error e_P when the later columns are chosen best. ``diagonal``: 1 / U_jj^2, that of vectors of length one.
    ``none``: the identity.
    """
    h, total = hessian.astype(np.float64), len(hessian)

    def settled(first: int, stop: int) -> np.ndarray:
        p, f = slice(first, stop), slice(stop, total)
        return h[p, p] - h[p, f] @ np.linalg.solve(h[f, f], h[f, p])

    found = []
    for first in range(0, total, width):
        stop = min(first + width, total)
        if kind == "block":
            found.append(settled(first, stop))
        elif kind == "diagonal":
            found.append(np.diag([settled(j, j + 1)[0, 0] for j in range(first, stop)]))
        else:
            found.append(np.eye(stop - first))
    return found


def gptvq(
    weight: np.ndarray,
    hessian: np.ndarray,
    books: np.ndarray,
    tiles: Tiles,
    metric: Metric | Sequence[np.ndarray] = "block",
    coupled: bool = True,
    scales: np.ndarray | None = None,
    follow: np.ndarray | None = None,
    damping: float = 0.01,
) -> Coded:
    """Choose all codes of ``weight`` [out, in], given the codebooks.

    Args:
        hessian: [in, in], not damped.
        books: [row groups, column groups, k, d].
        metric: what counts as near, or M of every vector.
        coupled: compensate by E U_PP^-1 U_PF; otherwise by the sum over the vector's columns of e_j / U_jj U_jF, as if
            each were quantized by itself.
        scales: [out, in] that the decoded values are multiplied with.
        follow: codes [out, vectors] to take instead of the nearest, which are still looked for and compared. One near
            tie, resolved the other way in float32, then does not spoil all the columns after it.
    """
    h = damped(hessian, damping)
    factor = inverse_factor(h)
    norms = metrics(h, tiles.width, metric) if isinstance(metric, str) else metric
    work = weight.astype(np.float64).copy()
    out, total = work.shape
    scale = np.ones_like(work) if scales is None else scales.astype(np.float64)
    starts = tiles.starts(total)
    found = Coded(np.zeros((out, len(starts)), dtype=np.int64), np.zeros_like(work), work)
    for vector, first in enumerate(starts):
        p = slice(first, min(first + tiles.width, total))
        for row in range(out):
            book = books[tiles.book(row, first)].astype(np.float64)[:, : p.stop - first] * scale[row, p]
            gaps = work[row, p] - book
            cost = np.array([gap @ norms[vector] @ gap for gap in gaps])
            code = int(cost.argmin())
            if follow is not None:
                taken = int(follow[row, vector])
                excess = cost[taken] - cost[code]
                reach = cost[code] + work[row, p] @ norms[vector] @ work[row, p]
                found.different += int(excess > 0)
                found.worst = max(found.worst, float(excess / (reach if reach > 0 else 1.0)))
                code = taken
            found.codes[row, vector] = code
            found.values[row, p] = book[code]
        error = work[:, p] - found.values[:, p]
        corner = factor[p, p] if coupled else np.diag(np.diag(factor[p, p]))
        work[:, p.stop :] -= error @ np.linalg.solve(corner, factor[p, p.stop :])
    return found


def decode(codes: np.ndarray, books: np.ndarray, tiles: Tiles, total: int, scales: np.ndarray | None) -> np.ndarray:
    """The matrix [out, total] of ``codes`` [out, vectors]."""
    values = np.zeros((len(codes), total))
    for row, numbers in enumerate(codes):
        for first, code in zip(tiles.starts(total), numbers, strict=True):
            piece = values[row, first : first + tiles.width]
            piece[:] = books[tiles.book(row, first)][code, : len(piece)]
    return values if scales is None else values * scales


# -------------------------------------------------------------------- codebooks


@dataclass
class Fitted:
    """Centroids [k, d], the codes [rows, vectors] of the last assignment, and the loss after every half step."""

    centroids: np.ndarray
    codes: np.ndarray
    losses: list[float]


def em(
    points: np.ndarray,
    norms: Sequence[np.ndarray],
    weights: np.ndarray | None,
    start: np.ndarray,
    iterations: int,
) -> Fitted:
    """Lloyd's iteration on the loss sum_n s_n (x_n - c) M_n (x_n - c)^T, for the vectors of one tile.

    Assignments are nearest under M_n; a centroid then solves (sum s M) c = sum s M x over its members, where the
    gradient of the loss vanishes. Centroids without members stay where they are.

    Args:
        points: [rows, vectors, d].
        norms: M [d, d] of every column of vectors.
        weights: s [rows, vectors]; None for ones.
        start: [k, d].
    """
    x, centroids = points.astype(np.float64), start.astype(np.float64).copy()
    rows, vectors, d = x.shape
    s = np.ones((rows, vectors)) if weights is None else weights.astype(np.float64)
    found = Fitted(centroids, np.zeros((rows, vectors), dtype=np.int64), [])

    def cost(row: int, vector: int, code: int) -> float:
        gap = x[row, vector] - centroids[code]
        return float(s[row, vector] * (gap @ norms[vector] @ gap))

    def loss() -> float:
        return sum(cost(n, p, found.codes[n, p]) for n in range(rows) for p in range(vectors))

    for _ in range(iterations):
        for n in range(rows):
            for p in range(vectors):
                found.codes[n, p] = int(np.argmin([cost(n, p, c) for c in range(len(centroids))]))
        found.losses.append(loss())
        for c in range(len(centroids)):
            left, right = np.zeros((d, d)), np.zeros(d)
            for n, p in np.argwhere(found.codes == c):
                left += s[n, p] * norms[p]
                right += s[n, p] * (norms[p] @ x[n, p])
            if left.any():
                centroids[c] = np.linalg.lstsq(left, right, rcond=None)[0]
        found.losses.append(loss())
    return found


def least_squares_books(
    weight: np.ndarray,
    hessian: np.ndarray,
    codes: np.ndarray,
    tiles: Tiles,
    start: np.ndarray,
    scales: np.ndarray | None = None,
) -> np.ndarray:
    """The codebooks that minimise tr((W - Q(C)) H (W - Q(C))^T), the codes [out, vectors] fixed; H is not damped.

    Row r of the matrix is A_r c, where c holds all centroids of its group of rows, over all groups of columns: H ties
    the columns of a row together, so they cannot be solved for one codebook at a time. The gradient vanishes where
    (sum_r A_r^T H A_r) c = sum_r A_r^T H w_r, with the sums over the rows of the group.

    Args:
        start: [row groups, column groups, k, d]; what no equation settles (unused centroids) keeps these values.
    """
    w, h = weight.astype(np.float64), hessian.astype(np.float64)
    total, (_, _, k, d) = w.shape[1], start.shape
    books = start.astype(np.float64).copy()
    unknowns = books[0].size
    for group in range(len(books)):
        left, right = np.zeros((unknowns, unknowns)), np.zeros(unknowns)
        for row in range(group * tiles.rows, min((group + 1) * tiles.rows, len(w))):
            a = np.zeros((total, unknowns))
            for column in range(total):
                vector, inside = divmod(column, tiles.width)
                place = (tiles.book(row, column)[1] * k + codes[row, vector]) * d + inside
                a[column, place] = 1 if scales is None else scales[row, column]
            left += a.T @ h @ a
            right += a.T @ h @ w[row]
        c = books[group].reshape(-1)
        # Scaled to a unit diagonal, so that the cut-off for singular values means the same for all unknowns.
        size = np.sqrt(np.diag(left))
        size = np.where(size > 0, size, 1)
        step = np.linalg.lstsq(left / np.outer(size, size), (right - left @ c) / size, rcond=1e-12)[0] / size
        books[group] = (c + step).reshape(books[group].shape)
    return books


# -------------------------------------------------------------------- scales


@dataclass
class Log2Scales:
    """Codes [out, blocks], low and step [blocks], and the scale [out, in] of every weight: 2^(low + step * code)."""

    codes: np.ndarray
    low: np.ndarray
    step: np.ndarray
    values: np.ndarray


def log2_scales(weight: np.ndarray, block: int, bits: int = 4, side_dtype: type = np.float64) -> Log2Scales:
    """Scales of every ``block`` columns of a row: its largest magnitude s, as log2(s) in equal steps.

    low = min log2(s) and step = (max - min) / (2^bits - 1) over all rows of a block of columns, rounded to
    ``side_dtype``; code = round((log2(s) - low) / step). Blocks of zeros have no logarithm: they take no part in
    minimum and maximum and get code 0.
    """
    out, total = weight.shape
    top, blocks = 2**bits - 1, -(-total // block)
    found = Log2Scales(
        np.zeros((out, blocks), dtype=np.int64), np.zeros(blocks), np.zeros(blocks), np.ones((out, total))
    )
    for number in range(blocks):
        columns = slice(number * block, (number + 1) * block)
        largest = np.abs(weight[:, columns].astype(np.float64)).max(axis=1)
        live = largest > 0
        logs = np.log2(largest[live])
        if live.any():
            found.low[number] = side_dtype(logs.min())
            found.step[number] = side_dtype((logs.max() - logs.min()) / top)
        low, step = found.low[number], found.step[number]
        found.codes[live, number] = np.clip(np.rint((logs - low) / (step if step > 0 else 1)), 0, top)
        found.values[:, columns] = np.exp2(low + step * found.codes[:, number])[:, None]
    return found
