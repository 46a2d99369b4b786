"""GPTVQ as its authors' code does it (van Baalen et al., arXiv 2402.15319, code of 2024), faults included.

A baseline to measure against, written from a description of that code; it shares no code with the package. Where it
differs from the paper, or from what one would do today, the differences are the released code's:

- codebooks are fitted with weights U_jj (H^-1 = U^T U), codes are chosen with weights 1/U_jj; the loss weighs a
  column's error with 1/U_jj^2, so the fit looks at the columns that matter least;
- clusters without members become the zero vector;
- a codebook is fitted on weights that know the errors of finished blocks of 128 columns only, not of the block that
  its group begins in;
- the columns of a vector do not compensate each other's error;
- with block scales the codes of a block of 128 columns are chosen from values that lack the compensation inside it.

Everything is vectorised over rows and groups, in a dtype of choice: float64 for tests, float32 for whole models.
Extended only where that code stops: a last group may be smaller than the others, and singular covariances and
codebooks of zeros do no harm.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

BLOCK = 128
#: Entries of a table of scores that are worked on together; about the size of a cache.
_CHUNK = 1 << 18
_ADAM_STEPS, _LEARNING_RATE = 25, 1e-3
_DAMPING = 0.01
_SCALE_LEVELS = 15


@dataclass(frozen=True)
class Released:
    """A quantized matrix [out, in].

    Attributes:
        indices: int64 [out, in / d].
        codebooks: int8 [row groups, column groups, k, d], to be multiplied by ``codebook_scales``.
        codebook_scales: [row groups, column groups].
        scale_codes: int64 [out, in / Ns] in 0..15, or None; the scale of a block is 10^(z + a * code).
        scale_z, scale_a: [in / Ns], or None.
        values: the dequantized matrix [out, in].
        loss: tr((W - Q) H (W - Q)^T) before the update of the codebooks, and at the end.
        em_steps: EM iterations until the slowest group of each column group stood still (at most those allowed).
    """

    indices: Tensor
    codebooks: Tensor
    codebook_scales: Tensor
    scale_codes: Tensor | None
    scale_z: Tensor | None
    scale_a: Tensor | None
    values: Tensor
    loss: tuple[float, float]
    em_steps: tuple[int, ...]


def gptvq_released(
    weight: Tensor,
    hessian: Tensor,
    vector_length: int,
    centroids: int,
    group_rows: int,
    group_columns: int = 256,
    scale_block: int = 0,
    iterations: int = 100,
    update: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Released:
    """Quantize ``weight`` [out, in] with the second moment ``hessian`` [in, in] of its inputs, not damped.

    Args:
        vector_length: d consecutive inputs of one output; 128 and ``in`` are multiples of it.
        centroids: k.
        group_rows, group_columns: weights that share a codebook.
        scale_block: N_s inputs that share a 4-bit scale; 0 for none.
        iterations: of EM. A group that stands still is left alone, which changes nothing.
        update: the gradient steps on the codebooks at the end.

    Raises:
        ValueError: sizes that do not divide each other, numbers that are not finite, a Hessian without Cholesky factor.
    """
    out, inp = weight.shape
    d = vector_length
    wanted = [(size, d) for size in (inp, BLOCK, group_columns)]
    if scale_block:
        wanted += [(size, scale_block) for size in (inp, BLOCK, group_columns)] + [(scale_block, d)]
    for size, unit in wanted:
        if size % unit:
            raise ValueError(f"{size} columns cannot be cut into pieces of {unit}")
    if not bool(torch.isfinite(weight).all() & torch.isfinite(hessian).all()):
        raise ValueError("the weight or the Hessian holds NaN or infinity")
    original, moment = weight.detach().to(dtype), hessian.detach().to(dtype)
    work, upper = original.clone(), inverse_factor(moment)
    work[:, torch.diagonal(moment) == 0] = 0
    spread = torch.diagonal(upper)
    groups = _Groups(out, group_rows)
    indices = torch.zeros(out, inp // d, dtype=torch.int64)
    books: list[Tensor] = []
    steps: list[int] = []
    scales = torch.ones_like(work) if scale_block else None
    stored_scales: list[tuple[Tensor, Tensor, Tensor]] = []

    with _one_thread() as threads:
        for start in range(0, inp, BLOCK):
            stop = min(start + BLOCK, inp)
            block, factor = work[:, start:stop].clone(), upper[start:stop, start:stop]
            scaled, block_scale = block, torch.ones_like(block)
            if scales is not None:
                codes, z, a = log_scales(block, scale_block)
                stored_scales.append((codes, z, a))
                block_scale = decode_scales(codes, z, a, scale_block)
                # Never refreshed below, while ``block`` takes up the errors of its own columns.
                scaled, scales[:, start:stop] = block / block_scale, block_scale
            errors = torch.zeros_like(block)
            for i in range(0, stop - start, d):
                column = start + i
                if column % group_columns == 0:
                    group = work[:, column : column + group_columns]
                    if scale_block:
                        group = group / decode_scales(*log_scales(group, scale_block), scale_block)
                    importance = spread[column : column + group_columns] if d > 1 else torch.ones(group.shape[1])
                    book, taken = groups.fit(group, importance.to(dtype), d, centroids, iterations, threads)
                    books.append(dequantized(*int8(book)))
                    steps.append(taken)
                importance = 1 / spread[column : column + d] if d > 1 else torch.ones(1, dtype=dtype)
                code = groups.nearest(scaled[:, i : i + d], importance, books[-1])
                indices[:, column // d] = code
                decoded = books[-1][groups.of_row, code] * block_scale[:, i : i + d]
                error = (block[:, i : i + d] - decoded) / spread[column : column + d]
                errors[:, i : i + d] = error
                block[:, i + d :] -= error @ factor[i : i + d, i + d :]
            work[:, stop:] -= errors @ upper[start:stop, stop:]

    final = _Decoder(original, moment, indices, torch.stack(books, dim=1), groups.of_row, group_columns // d, scales)
    before = final.loss(final.books)[0]
    codes8, codebook_scales = final.updated() if update else int8(final.books)
    values = final.decode(dequantized(codes8, codebook_scales))
    after = final.loss(dequantized(codes8, codebook_scales))[0]
    code, z, a = (torch.cat(part, dim=-1) for part in zip(*stored_scales, strict=True)) if scale_block else [None] * 3
    return Released(indices, codes8, codebook_scales, code, z, a, values, (before, after), tuple(steps))


# -------------------------------------------------------------------- pieces, each tested by itself


def inverse_factor(hessian: Tensor) -> Tensor:
    """U, upper triangular, with (H + 0.01 mean(diag H) I)^-1 = U^T U, where dead channels first get H_jj = 1.

    float32 that is not enough for the factorisation gets a second try in float64.
    """
    damped = hessian.clone()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += _DAMPING * diagonal.mean()
    for tried in (damped, damped.double()):
        lower, failed = torch.linalg.cholesky_ex(tried)
        if not bool(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not bool(failed):
                return upper.to(hessian.dtype)
    raise ValueError("the damped Hessian has no Cholesky factor")


def log_scales(values: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """(codes [out, n], z [n], a [n]): the largest magnitude of every ``block`` columns in steps of its logarithm.

    z and a are shared by all rows: log10(scale) = z + a * code. Blocks of zeros count as scale one.
    """
    largest = values.reshape(values.shape[0], -1, block).abs().amax(dim=2)
    logs = torch.where(largest < 1e-8, torch.zeros_like(largest), largest.log10())
    z = logs.amin(dim=0)
    logs = logs - z
    a = (logs.amax(dim=0).clamp(min=1e-8) / _SCALE_LEVELS).clamp(min=1e-8)
    return (logs / a).round().clamp(0, _SCALE_LEVELS).long(), z, a


def decode_scales(codes: Tensor, z: Tensor, a: Tensor, block: int) -> Tensor:
    """The scale of every weight [out, n * block]."""
    return torch.pow(10.0, z + a * codes).repeat_interleave(block, dim=1)


def int8(books: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 centroids, scales [..]) of codebooks [.., k, d]: one scale per codebook, its largest magnitude over 127."""
    scale = books.abs().amax(dim=(-2, -1)) / 127
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (books / scale[..., None, None]).round().clamp(-128, 127).to(torch.int8), scale


def dequantized(codes: Tensor, scale: Tensor) -> Tensor:
    """Inverse of :func:`int8`."""
    return codes.to(scale.dtype) * scale[..., None, None]


def mahalanobis_seeds(points: Tensor, k: int) -> Tensor:
    """k of the points [groups, n, d], at equally spaced ranks of their Mahalanobis distance from the mean.

    The covariance is not divided by n, which does not change the ranks.
    """
    centered = points - points.mean(dim=1, keepdim=True)
    covariance = centered.mT @ centered
    inverse, failed = torch.linalg.inv_ex(covariance)
    if bool(failed.any()):
        inverse = torch.linalg.pinv(covariance, hermitian=True)
    order = ((centered @ inverse) * centered).sum(dim=2).argsort(dim=1, stable=True)
    ranks = torch.linspace(0, points.shape[1] - 1, k).round().long()
    return points.gather(1, order[:, ranks].unsqueeze(2).expand(-1, -1, points.shape[2]))


def nearest(points: Tensor, weights: Tensor, books: Tensor) -> Tensor:
    """argmin_k sum_j w_nj (x_nj - c_kj)^2 [groups, n]; points [groups, n, d], weights [n, d], books [groups, k, d]."""
    return _nearest(_features(points, weights), books)


def em(points: Tensor, weights: Tensor, books: Tensor, iterations: int) -> tuple[Tensor, int]:
    """Lloyd's iteration with weights [n, d] per element, the same for all groups; returns (books, steps taken).

    Points [groups, n, d], books [groups, k, d]. Clusters without members become zero.
    """
    books, (total, k, d) = books.clone(), books.shape
    features = _features(points, weights)
    active = torch.arange(total)
    codes = torch.full(points.shape[:2], -1)
    for step in range(iterations):
        found = _nearest(features, books[active])
        moved = (found != codes).any(dim=1)
        if not bool(moved.all()):
            # The means of the same clusters are the same means: these groups are done.
            active, features, found = active[moved], features[moved], found[moved]
            if active.numel() == 0:
                return books, step
        codes = found
        n = codes.shape[1]
        flat = (codes + k * torch.arange(active.numel()).unsqueeze(1)).reshape(-1)
        sums = features.new_zeros(active.numel() * k, 2 * d)
        sums.index_add_(0, flat, features.mT.reshape(active.numel() * n, 2 * d))
        books[active] = (sums[:, :d] / sums[:, d:].clamp(min=1e-10)).reshape(-1, k, d)
    return books, iterations


@contextmanager
def _one_thread() -> Iterator[int]:
    """One thread per operation: they are too short to wait for a second one. Yields how many there were before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield before
    finally:
        torch.set_num_threads(before)


def _features(points: Tensor, weights: Tensor) -> Tensor:
    """[groups, 2 d, n]: w x and w, whose product with (2 c, -c^2) is the score of a centroid."""
    return torch.cat([points * weights, weights.expand_as(points)], dim=2).mT.contiguous()


def _nearest(features: Tensor, books: Tensor) -> Tensor:
    groups, k, _ = books.shape
    n = features.shape[2]
    table = torch.cat([2 * books, -books.square()], dim=2)
    codes = torch.empty(groups, n, dtype=torch.int64)
    width = max(_CHUNK // k, 1)
    together = max(width // n, 1)
    for g in range(0, groups, together):
        for first in range(0, n, width):
            part = features[g : g + together, :, first : first + width]
            codes[g : g + together, first : first + width] = _first_best(torch.bmm(table[g : g + together], part))
    return codes


def _first_best(scores: Tensor) -> Tensor:
    """The first row with the largest score in every column of tables [groups, k, n]: [groups, n].

    argmax keeps an index for every entry and is slow; most of the work is a plain maximum of about sqrt(k) rows.
    """
    groups, k, n = scores.shape
    if k < 16:
        return scores.max(dim=1).indices
    across = 1 << (math.isqrt(k).bit_length() - 1)
    if k % across:
        return scores.max(dim=1).indices
    pieces = scores.view(groups, across, k // across, n)
    piece = pieces.amax(dim=2).max(dim=1).indices
    chosen = pieces.gather(1, piece.view(groups, 1, 1, n).expand(-1, -1, k // across, -1)).squeeze(1)
    return piece * (k // across) + chosen.max(dim=1).indices


class _Groups:
    """Rows that share codebooks: ``size`` each, the last group may have fewer."""

    def __init__(self, rows: int, size: int) -> None:
        self.size = min(size, rows)
        self.count = -(-rows // self.size)
        self.of_row = torch.arange(rows) // self.size
        self._missing = self.count * self.size - rows

    def fit(
        self, values: Tensor, importance: Tensor, d: int, k: int, iterations: int, threads: int = 1
    ) -> tuple[Tensor, int]:
        """Codebooks [groups, k, d] of a group of columns [out, c] with element weights [c], and the steps they took."""
        whole = (self.count - bool(self._missing)) * self.size
        batches = []
        for rows, size in ((values[:whole], self.size), (values[whole:], self.size - self._missing)):
            if rows.numel():
                points = rows.reshape(-1, size * rows.shape[1] // d, d)
                weights = importance.repeat(size).view(-1, d)
                batches += [(part, weights) for part in points.tensor_split(min(threads, len(points)))]

        def run(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
            return em(*batch, mahalanobis_seeds(batch[0], k), iterations)

        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            found = list(pool.map(run, batches))
        return torch.cat([books for books, _ in found]), max(taken for _, taken in found)

    def nearest(self, vectors: Tensor, importance: Tensor, books: Tensor) -> Tensor:
        """Codes [out] of one vector per row [out, d] with element weights [d]."""
        points = functional.pad(vectors, (0, 0, 0, self._missing)).view(self.count, self.size, -1)
        return nearest(points, importance.expand(self.size, -1), books).view(-1)[: vectors.shape[0]]


class _Decoder:
    """The matrix as a function of its codebooks [row groups, column groups, k, d], all else fixed."""

    def __init__(
        self,
        original: Tensor,
        moment: Tensor,
        indices: Tensor,
        books: Tensor,
        row_group: Tensor,
        vectors_per_group: int,
        scales: Tensor | None,
    ) -> None:
        self.original, self.moment, self.scales, self.books = original, moment, scales, books
        column_group = torch.arange(indices.shape[1]) // vectors_per_group
        book = row_group.unsqueeze(1) * books.shape[1] + column_group
        self._entry = (book * books.shape[2] + indices).view(-1)

    def decode(self, books: Tensor) -> Tensor:
        """The matrix [out, in]."""
        values = books.reshape(-1, books.shape[-1])[self._entry].view_as(self.original)
        return values if self.scales is None else values * self.scales

    def loss(self, books: Tensor) -> tuple[float, Tensor]:
        """tr((W - Q) H (W - Q)^T), and its gradient with respect to the codebooks."""
        error = self.original - self.decode(books)
        slope = error @ self.moment
        loss = float((slope * error).sum())
        slope *= -2
        if self.scales is not None:
            slope *= self.scales
        d = books.shape[-1]
        gradient = books.new_zeros(books.numel() // d, d).index_add_(0, self._entry, slope.view(-1, d))
        return loss, gradient.view_as(books)

    def updated(self) -> tuple[Tensor, Tensor]:
        """Codebooks after the gradient steps, rounded to 8 bits: (int8, scales).

        A loss above the first one, or NaN, at any step but the last starts again with a tenth of the step size. What
        the last step and the rounding do to the loss is not looked at.
        """
        start, rate = self.loss(self.books)[0], _LEARNING_RATE
        while True:
            books = self.books.clone()
            optimizer = torch.optim.Adam([books], lr=rate)
            for _ in range(_ADAM_STEPS):
                loss, books.grad = self.loss(books)
                if not loss <= start:
                    break
                optimizer.step()
            else:
                stored = int8(books)
                if not math.isnan(self.loss(dequantized(*stored))[0]):
                    return stored
            rate /= 10
