"""Nearest centroid: the assignment step of every vector quantizer here, by brute force, exact up to float rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo._core import clib

_BEST_ISA = 0
_MAX_VECTOR = 16
# Up to this length, sums of (x - c)^2 are formed directly: books of short vectors are so dense that the cancellation in
# |c|^2 - 2 x.c would pick wrong neighbours.
_DIRECT_VECTOR = 2
# Scores that the torch path holds at a time: fits a CPU cache; large enough to fill a GPU.
_CPU_SCORES, _DEVICE_SCORES = 1 << 20, 1 << 27


def nearest(points: Tensor, book: Tensor, weights: Tensor | None = None) -> Tensor:
    """Index of the centroid nearest to every point, ``argmin_k sum_j weights[n, j] (points[n, j] - book[k, j])^2``.

    Equal distances go to the lowest index. A centroid with NaN is never chosen; a point with NaN gets 0.

    Args:
        points: [n, v] float32.
        book: [k, v] float32, k >= 1.
        weights: [n, v] float32, not negative, or None for ones.

    Returns:
        [n] int64 on the device of ``points``.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    n, v, k = _check(points, book, weights)
    if 1 <= v <= _MAX_VECTOR and clib.takes(points, book) and (weights is None or clib.takes(weights)):
        lib = clib.library()
        if lib is not None:
            points, book = points.contiguous(), book.contiguous()
            weights = None if weights is None else weights.contiguous()
            weights_at = None if weights is None else weights.data_ptr()
            out = torch.empty(n, dtype=torch.int64)
            arguments = (points.data_ptr(), weights_at, n, book.data_ptr(), k, v, out.data_ptr())
            clib.call(lib.octavo_nearest, *arguments, clib.threads(), _BEST_ISA)
            return out
        clib.warn_slow_once("nearest-centroid search")
    return _nearest_torch(points, book, weights)


def _check(points: Tensor, book: Tensor, weights: Tensor | None) -> tuple[int, int, int]:
    shape, (k, *rest) = points.shape, book.shape
    if len(shape) != 2 or rest != [shape[1]] or k < 1:
        raise ValueError(f"nearest: points [n, v] and book [k, v] wanted, got {(*shape,)} and {(*book.shape,)}")
    if weights is not None and weights.shape != shape:
        raise ValueError(f"nearest: weights wanted {(*shape,)}, got {(*weights.shape,)}")
    for name, tensor in (("points", points), ("book", book), ("weights", weights)):
        if tensor is not None and tensor.dtype is not torch.float32:
            raise ValueError(f"nearest: {name} wanted float32, got {tensor.dtype}")
    return shape[0], shape[1], k


def _nearest_torch(points: Tensor, book: Tensor, weights: Tensor | None) -> Tensor:
    """The same in torch, in chunks, on any device."""
    (n, v), k = points.shape, book.shape[0]
    out = torch.empty(n, dtype=torch.int64, device=points.device)
    if v > _DIRECT_VECTOR:
        shift = _shift(book)
        points, book = points - shift, book - shift
    step = max((_CPU_SCORES if points.device.type == "cpu" else _DEVICE_SCORES) // k, 1)
    for first in range(0, n, step):
        part = slice(first, first + step)
        score = _scores(points[part], book, None if weights is None else weights[part])
        # argmin would let NaN win.
        out[part] = score.nan_to_num_(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf).argmin(dim=1)
    return out


def _shift(book: Tensor) -> Tensor:
    """[v]: the mean of a book that lies far from the origin for its size, else zero.

    Distances do not change when points and centroids move together, and near the origin the expanded form of the
    distance loses no digits. Other books stay, and their ties stay exact.
    """
    mean = book.nanmean(dim=0)
    spread = (book - mean).square().nanmean(dim=0).sum()
    return torch.where(mean.square().sum() > 16.0 * spread, mean, 0.0).nan_to_num(0.0, 0.0, 0.0)


def _scores(points: Tensor, book: Tensor, weights: Tensor | None) -> Tensor:
    """[n, k] distances, less whatever does not depend on the centroid."""
    if points.shape[1] <= _DIRECT_VECTOR:
        gap = (points[:, None, :] - book[None, :, :]).square_()
        return gap.sum(dim=2) if weights is None else gap.mul_(weights[:, None, :]).sum(dim=2)
    if weights is None:
        return torch.addmm(0.5 * book.square().sum(dim=1), points, book.T, alpha=-1.0)
    return torch.addmm(weights @ book.square().T, weights * points, book.T, alpha=-2.0)
