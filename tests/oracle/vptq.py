"""VPTQ's recursion in float64, given what was stored: which codes should the columns have got?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from oracle.feedback import damped, error_feedback


@dataclass
class Column:
    """How one column was coded: the codebook [k, v] and the codes [ceil(out / v)] of every additive stage."""

    books: Sequence[np.ndarray]
    codes: Sequence[np.ndarray]


@dataclass
class Replay:
    """What a replay found: the decoded matrix, how many codes were not the nearest, and by how much at most.

    ``worst`` is the excess of the squared distance, relative to the vector's squared length plus the least distance.
    """

    values: np.ndarray
    different: int
    total: int
    worst: float


def replay(weight: np.ndarray, hessian: np.ndarray, columns: Sequence[Column], together: int = 1) -> Replay:
    """Run the recursion over ``weight`` [out, in] (in processing order, H damped and in the same order).

    ``together`` columns are coded from the same values before their errors are fed back; 0 feeds nothing back.

    At every column each stage's nearest centroid to what is left is computed and compared with the code that was
    stored; the recursion goes on with the stored one, so that one near tie does not spoil all the columns after it.
    Elements past the end of the last vector have no say in its code.
    """
    found = Replay(np.zeros(weight.shape), 0, 0, 0.0)
    out = weight.shape[0]

    def one(values: np.ndarray, position: int) -> np.ndarray:
        column = columns[position]
        v = column.books[0].shape[1]
        left = np.zeros(-(-out // v) * v)
        left[:out] = values
        left, inside = left.reshape(-1, v), (np.arange(left.size) < out).reshape(-1, v)
        for book, codes in zip(column.books, column.codes, strict=True):
            distance = ((left[:, None] - book[None]) ** 2 * inside[:, None]).sum(axis=2)
            least = distance.min(axis=1)
            excess = distance[np.arange(len(codes)), codes] - least
            scale = least + (left**2 * inside).sum(axis=1)
            found.worst = max(found.worst, float((excess / np.where(scale > 0, scale, 1)).max()))
            found.different += int((excess > 0).sum())
            found.total += len(codes)
            left = left - book[codes]
        return values - left.reshape(-1)[:out]

    def quantize(values: np.ndarray, position: int, rest: np.ndarray) -> np.ndarray:
        return np.stack([one(column, position + i) for i, column in enumerate(values.T)], axis=1)

    found.values = error_feedback(weight, hessian, quantize, together)[0] if together else quantize(weight, 0, weight)
    return found


@dataclass
class Stored:
    """The contents of a quantized matrix as numbers.

    Attributes:
        books: per stage, centroids [groups, k, v].
        codes: per stage, indices [vector rows, main columns] in the order of the file.
        group_columns: main columns that share a codebook.
        outlier_book, outlier_codes: [k, v] and [vector rows, outlier columns], or None.
        permutation: file column c is original column permutation[c]; None when the file has the original order.
        scale, offset: of every original column, or None.
    """

    books: Sequence[np.ndarray]
    codes: Sequence[np.ndarray]
    group_columns: int
    outlier_book: np.ndarray | None = None
    outlier_codes: np.ndarray | None = None
    permutation: np.ndarray | None = None
    scale: np.ndarray | None = None
    offset: np.ndarray | None = None


def processing_order(hessian: np.ndarray, scale: np.ndarray | None, permute: bool) -> np.ndarray:
    """Columns by falling diagonal of the Hessian of the normalised weights; equal ones keep their order."""
    diagonal = np.diag(hessian).astype(np.float64) * (1 if scale is None else scale**2)
    return np.argsort(-diagonal, kind="stable") if permute else np.arange(len(diagonal))


def recode(
    weight: np.ndarray,
    hessian: np.ndarray,
    stored: Stored,
    permute: bool = True,
    damping: float = 0.01,
    together: int = 1,
) -> Replay:
    """Replay the quantization of ``weight``; the values come back in the original order and scale."""
    work, h = weight.astype(np.float64), hessian.astype(np.float64)
    if stored.scale is not None:
        assert stored.offset is not None
        work = (work - stored.offset) / stored.scale
        h = h * np.outer(stored.scale, stored.scale)
    order = processing_order(hessian, stored.scale, permute)
    if stored.permutation is not None:
        np.testing.assert_array_equal(stored.permutation, order)
    place = np.arange(len(order)) if stored.permutation is not None else order
    columns = [_column(stored, int(file_column)) for file_column in place]
    found = replay(work[:, order], damped(h, damping)[np.ix_(order, order)], columns, together)
    found.values = found.values[:, np.argsort(order)]
    if stored.scale is not None:
        found.values = found.values * stored.scale + stored.offset
    return found


def _column(stored: Stored, file_column: int) -> Column:
    outliers = 0 if stored.outlier_codes is None else stored.outlier_codes.shape[1]
    if file_column < outliers:
        assert stored.outlier_book is not None
        assert stored.outlier_codes is not None
        return Column([stored.outlier_book], [stored.outlier_codes[:, file_column]])
    main = file_column - outliers
    group = main // stored.group_columns
    return Column([book[group] for book in stored.books], [codes[:, main] for codes in stored.codes])


def column_weights(hessian: np.ndarray) -> np.ndarray:
    """What an error in column j costs after the later columns have made up for it: 1 / (H_jj..)^-1_00 [in]."""
    return np.array([1 / np.linalg.inv(hessian[j:, j:])[0, 0] for j in range(len(hessian))])


def vectors(matrix: np.ndarray, v: int) -> np.ndarray:
    """Vectors of v consecutive outputs, column by column, of a matrix [out, in] whose height v divides."""
    return matrix.T.reshape(-1, v)


def first_pass_error(weight: np.ndarray, hessian: np.ndarray, book: np.ndarray) -> np.ndarray:
    """Compensated minus quantized values [out, in] of a pass with one codebook [k, v] and nearest centroids."""

    def quantize(values: np.ndarray, position: int, rest: np.ndarray) -> np.ndarray:
        points = vectors(values, book.shape[1])
        nearest = ((points[:, None] - book[None]) ** 2).sum(axis=2).argmin(axis=1)
        return book[nearest].reshape(-1, 1)

    quantized, compensated = error_feedback(weight, hessian, quantize)
    return compensated - quantized
