"""Transforms, universal codebooks and coordinate descent in float64, each spelled out by brute force."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from oracle.feedback import damped, error_feedback

#: Of two decisions whose losses differ by less than this share, float32 may take either.
CLOSE = 3e-5
#: A code of a scale that is so near the middle between two may be rounded either way.
_MIDDLE = 1e-2


# ---------------------------------------------------------------- transforms


def sylvester(size: int) -> np.ndarray:
    """The Hadamard matrix of a power of two, entries +-1: H_2n = [[H_n, H_n], [H_n, -H_n]]."""
    if size == 1:
        return np.ones((1, 1))
    half = sylvester(size // 2)
    return np.block([[half, half], [half, -half]])


def transform(channels: int, block: int, signs: np.ndarray | None = None) -> np.ndarray:
    """The orthogonal matrix [channels, channels] of a block Hadamard transform after signs; ``block`` 0 is none."""
    if not block:
        return np.eye(channels)
    matrix = np.kron(np.eye(channels // block), sylvester(block)) / np.sqrt(block)
    return matrix if signs is None else matrix * signs


# ---------------------------------------------------------------- coordinate descent


def loss(weight: np.ndarray, quantized: np.ndarray, hessian: np.ndarray) -> float:
    """tr(E H E^T) with E = W - Q."""
    error = weight - quantized
    return float(np.einsum("oi,ij,oj->", error, hessian, error))


def coordinate_descent(
    weight: np.ndarray, quantized: np.ndarray, hessian: np.ndarray, choices: np.ndarray, width: int
) -> np.ndarray:
    """Every block of ``width`` columns of every row takes the best of ``choices`` [k, width], all else being fixed.

    A block at the right end that is narrower takes the first elements of a choice. Losses are those of the whole row.
    """
    result = quantized.astype(np.float64).copy()
    for first in range(0, weight.shape[1], width):
        here = slice(first, min(first + width, weight.shape[1]))
        for row in range(weight.shape[0]):
            error = np.repeat(weight[None, row] - result[None, row], len(choices), axis=0)
            error[:, here] = weight[row, here] - choices[:, : here.stop - first]
            losses = np.einsum("ki,ij,kj->k", error, hessian, error)
            best = int(losses.argmin())
            kept = weight[row] - result[row]
            if losses[best] < kept @ hessian @ kept:
                result[row, here] = choices[best, : here.stop - first]
    return result


# ---------------------------------------------------------------- the method


@dataclass
class Settings:
    """What the method is told, and the tables of its codebook.

    Attributes:
        books: [k, v] of every stage.
        input, output: the matrices of the transforms.
        column: vectors of outputs.
        scale_columns, scale_bits: columns that share a scale, bits of its logarithm.
        passes, sweeps: of error feedback, of coordinate descent.
        damping: of the Hessian.
    """

    books: Sequence[np.ndarray]
    input: np.ndarray
    output: np.ndarray
    column: bool
    scale_columns: int
    scale_bits: int
    passes: int
    sweeps: int
    damping: float = 0.01


@dataclass
class Result:
    """What the method made of a matrix.

    Attributes:
        values: the decoded matrix [out, in] in the original basis.
        inner: the same between the transforms.
        chosen: [stages, vector rows, vector columns], the codes.
        close: [out], rows of ``inner`` with a decision that float32 may take either way.
    """

    values: np.ndarray
    inner: np.ndarray
    chosen: np.ndarray
    close: np.ndarray


class _Run:
    def __init__(self, weight: np.ndarray, hessian: np.ndarray, settings: Settings) -> None:
        self.s = settings
        self.weight, self.hessian = weight, hessian
        out, inp = weight.shape
        self.v = settings.books[0].shape[1]
        self.codes = np.array(list(product(*(range(len(book)) for book in settings.books)))).T
        self.sums = np.sum([book[codes] for book, codes in zip(settings.books, self.codes, strict=True)], axis=0)
        self.width = 1 if settings.column else self.v
        shape = (-(-out // self.v), inp) if settings.column else (out, -(-inp // self.v))
        self.chosen = np.zeros((len(settings.books), *shape), dtype=np.int64)
        self.close = np.zeros(out, dtype=bool)
        self.cut: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    # ------------------------------------------------ scales

    def spread(self, values: np.ndarray) -> None:
        """The root mean square of every row, or block of it."""
        step = self.s.scale_columns
        blocks = [values[:, first : first + step] for first in range(0, values.shape[1], step)]
        self.store(np.stack([np.sqrt((block**2).mean(axis=1)) for block in blocks], axis=1))

    def store(self, scales: np.ndarray) -> None:
        """Logarithms on a grid for every block of columns, which begins at the least and reaches the largest."""
        top = scales.max(axis=0)
        logs = np.log2(np.maximum(scales, np.where(top > 0, top, 1) * 2.0**-16))
        last = 2**self.s.scale_bits - 1
        low, span = logs.min(axis=0), np.ptp(logs, axis=0)
        step = np.where(span > 0, span / last * (1 + 1 / 128), 1)
        place = (logs - low) / step
        # Equal scales are apart by rounding errors, which do not count.
        self.close |= ((np.abs(place % 1 - 0.5) < _MIDDLE) & (span > 1e-5)).any(axis=1)
        self.scales = 2 ** (low + step * np.clip(np.rint(place), 0, last))

    def along(self) -> np.ndarray:
        return np.repeat(self.scales, self.s.scale_columns, axis=1)[:, : self.weight.shape[1]]

    def refit(self, quantized: np.ndarray) -> np.ndarray:
        """Least squares for the scales of one block of columns after the other."""
        before, scales = self.scales.copy(), self.scales.copy()
        points, current = quantized / self.along(), quantized.copy()
        for block in range(scales.shape[1]):
            here = slice(block * self.s.scale_columns, (block + 1) * self.s.scale_columns)
            mine = np.zeros_like(current)
            mine[:, here] = current[:, here]
            top = np.einsum("oi,ij,oj->o", self.weight - current, self.hessian, mine)
            bottom = np.einsum("oi,ij,oj->o", mine, self.hessian, mine)
            step = np.clip(np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0), -0.5, 1.0)
            scales[:, block] *= 1 + step
            current[:, here] *= 1 + step[:, None]
        self.store(scales)
        if loss(self.weight, points * self.along(), self.hessian) > loss(self.weight, quantized, self.hessian):
            # The grid is too coarse to be worth it.
            self.scales = before
        return points * self.along()

    # ------------------------------------------------ codes

    def choices(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """The different sums of centroids [k, length], cut to so many elements, and which sum each of them is."""
        if length == self.v:
            return self.sums, np.arange(len(self.sums))
        if length not in self.cut:
            self.cut[length] = np.unique(self.sums[:, :length], axis=0, return_index=True)
        return self.cut[length]

    def nearest(self, values: np.ndarray, first: int, metric: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Codes [stages, vectors] of a block of columns [out, width], and its values; marks close decisions."""
        out = len(values)
        scale = self.scales[:, first // self.s.scale_columns][:, None]
        points = values / scale
        if self.s.column:
            points = np.concatenate([points[:, 0], np.zeros(-out % self.v)]).reshape(-1, self.v)
            metric = np.eye(self.v)
        sums, which = self.choices(points.shape[1])
        losses = ((sums @ metric) * sums).sum(axis=1) - 2 * points @ metric @ sums.T
        best = losses.argmin(axis=1)
        each = np.arange(len(points))
        least = losses[each, best]
        losses[each, best] = np.inf
        size = ((points @ metric) * points).sum(axis=1)
        close = losses.min(axis=1) - least <= CLOSE * (least + 2 * size)
        self.close |= close.repeat(self.v)[:out] if self.s.column else close
        decoded = sums[best].reshape(-1, 1)[:out] if self.s.column else sums[best]
        return self.codes[:, which[best]], decoded * scale

    def place(self, first: int) -> int:
        return first if self.s.column else first // self.v

    def feed(self, values: np.ndarray, first: int, rest: np.ndarray) -> np.ndarray:
        """Nearest in the metric that the later columns leave: the Schur complement of the block."""
        end = first + values.shape[1]
        here, later = slice(first, end), slice(end, None)
        h = self.hessian
        metric = h[here, here] - h[here, later] @ np.linalg.solve(h[later, later], h[later, here])
        self.chosen[:, :, self.place(first)], decoded = self.nearest(values, first, metric)
        return decoded

    def sweep(self, quantized: np.ndarray) -> np.ndarray:
        result = quantized.copy()
        out, inp = result.shape
        length = self.v if self.s.column else 1
        for first in range(0, inp, self.width):
            here = slice(first, min(first + self.width, inp))
            metric = self.hessian[here, here]
            pull = (self.weight - result) @ self.hessian[:, here]
            target = result[:, here] + np.linalg.solve(metric, pull.T).T
            codes, decoded = self.nearest(target, first, metric)
            change = decoded - result[:, here]
            gain = 2 * (pull * change).sum(axis=1) - ((change @ metric) * change).sum(axis=1)
            for vector in range(-(-out // length)):
                rows = slice(vector * length, (vector + 1) * length)
                if gain[rows].sum() > 0:
                    result[rows, here] = decoded[rows]
                    self.chosen[:, vector, self.place(first)] = codes[:, vector]
        return result


def universal(weight: np.ndarray, hessian: np.ndarray, settings: Settings) -> Result:
    """Transform, error feedback, then scales by least squares and coordinate descent in turn."""
    u, v = settings.output, settings.input
    inner = u @ weight.astype(np.float64) @ v.T
    run = _Run(inner, damped(v @ hessian.astype(np.float64) @ v.T, settings.damping), settings)
    run.spread(inner)
    for number in range(settings.passes):
        quantized, compensated = error_feedback(inner, run.hessian, run.feed, run.width)
        if number < settings.passes - 1:
            run.spread(compensated)
    for _ in range(settings.sweeps):
        quantized = run.sweep(run.refit(quantized))
    quantized = run.refit(quantized)
    return Result(u.T @ quantized @ v, quantized, run.chosen, run.close)
