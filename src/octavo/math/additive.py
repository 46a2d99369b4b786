"""Additive codebooks: the sum of centroids, one of each book, that is nearest to a vector, by beam search."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from octavo._core import clib
from octavo.math.assign import nearest

_BEST_ISA = 0
_MAX_STAGES, _MAX_BOOK, _MAX_VECTOR, _MAX_BEAM = 4, 4096, 16, 1 << 16
#: Larger elements, after the books were scaled to about 1, count as not finite.
_MAX_ELEMENT = 1e30
#: Scores that the torch path holds at a time: fits a CPU cache; with all that is made of them, 200 MB on a GPU.
_CPU_SCORES, _DEVICE_SCORES = 1 << 20, 1 << 23


def nearest_additive(
    points: Tensor, books: Sequence[Tensor], root: Tensor | None = None, beam: int = 32, threads: int | None = None
) -> Tensor:
    """Codes that minimise ``|(points[n] - sum_s books[s][codes[n, s]]) root|^2``, by beam search.

    After every stage the ``beam`` best sums of centroids are kept, and each is extended by all centroids of the next
    book; the best of the last stage is the answer. Of equal sums the one with the lowest first code comes first, then
    the lowest second code, and so on. Two books with ``beam`` not below the size of the first are searched exactly.

    The scale of points, books and root is of no account. A centroid with NaN or infinity is not chosen; a point with
    one of them, or more than 1e30 times as large as all centroids, gets zeros, and so does every point if a book has no
    finite centroid.

    Args:
        points: [n, v] float32, v in 1..16.
        books: 1..4 books [k_s, v] float32, k_s in 1..4096. The products of the centroids of every two books are held
            in memory: 4 k_s k_t bytes.
        root: [v, v] float32, or None for the identity.
        beam: sums to keep, 1..65536.
        threads: of the C++ search; as many as torch uses unless given.

    Returns:
        [n, stages] int64 on the device of ``points``.

    Raises:
        ValueError: shapes, dtypes or sizes out of these bounds.
    """
    _check(points, books, root, beam)
    n, v = points.shape
    stages = len(books)
    if stages == 1:
        x, (book,) = _moved(points, books, root)
        return nearest(x.masked_fill(~_usable(x), torch.nan), book).unsqueeze(1)
    if clib.takes(points, *books) and (root is None or clib.takes(root)):
        lib = clib.library()
        if lib is not None:
            points, joined = points.contiguous(), torch.cat(list(books))
            root = None if root is None else root.contiguous()
            root_at = None if root is None else root.data_ptr()
            sizes = torch.tensor([book.shape[0] for book in books], dtype=torch.int64)
            out = torch.empty(n, stages, dtype=torch.int64)
            arguments = (points.data_ptr(), n, v, joined.data_ptr(), sizes.data_ptr(), stages, root_at, beam)
            clib.call(lib.octavo_nearest_additive, *arguments, out.data_ptr(), threads or clib.threads(), _BEST_ISA)
            return out
        clib.warn_slow_once("additive codebook search")
    return _search_torch(points, books, root, beam)


def _check(points: Tensor, books: Sequence[Tensor], root: Tensor | None, beam: int) -> None:
    where = "nearest_additive"
    if points.ndim != 2 or not 1 <= points.shape[1] <= _MAX_VECTOR:
        raise ValueError(f"{where}: points [n, 1..{_MAX_VECTOR}] wanted, got {(*points.shape,)}")
    v = points.shape[1]
    if not 1 <= len(books) <= _MAX_STAGES:
        raise ValueError(f"{where}: 1..{_MAX_STAGES} books wanted, got {len(books)}")
    for book in books:
        if book.ndim != 2 or book.shape[1] != v or not 1 <= book.shape[0] <= _MAX_BOOK:
            raise ValueError(f"{where}: books [1..{_MAX_BOOK}, {v}] wanted, got {(*book.shape,)}")
    if root is not None and root.shape != (v, v):
        raise ValueError(f"{where}: root wanted {(v, v)}, got {(*root.shape,)}")
    for tensor in (points, *books, *(() if root is None else (root,))):
        if tensor.dtype is not torch.float32:
            raise ValueError(f"{where}: float32 wanted, got {tensor.dtype}")
    if not 1 <= beam <= _MAX_BEAM:
        raise ValueError(f"{where}: beam wanted 1..{_MAX_BEAM}, got {beam}")


def _unit_scale(values: Tensor) -> Tensor:
    """The power of two [] that brings the largest finite value to between 1/2 and 1: no digit changes."""
    exponent = torch.frexp(values.abs().nan_to_num(0.0, 0.0, 0.0).max()).exponent
    return torch.ldexp(torch.ones((), device=values.device), (-exponent).clamp(-126, 126))


def _moved(points: Tensor, books: Sequence[Tensor], root: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """Points and books, scaled and times root: nearest under the root becomes nearest."""
    scale = _unit_scale(torch.cat(list(books)))
    if root is None:
        return points * scale, [book * scale for book in books]
    root = root * _unit_scale(root)
    return (points * scale) @ root, [(book * scale) @ root for book in books]


def _usable(vectors: Tensor) -> Tensor:
    """[n, 1]: vectors [n, v] without NaN and infinity."""
    return (vectors.abs() <= _MAX_ELEMENT).all(dim=1, keepdim=True)


def _search_torch(points: Tensor, books: Sequence[Tensor], root: Tensor | None, beam: int) -> Tensor:
    """The same in torch, in chunks of points, on any device."""
    x, moved = _moved(points, books, root)
    usable = _usable(x)
    x = torch.where(usable, x, 0.0)
    finite = [_usable(book) for book in moved]
    books = [torch.where(use, book, 0.0) for use, book in zip(finite, moved, strict=True)]
    norms = [
        torch.where(use.squeeze(1), book.square().sum(dim=1), torch.inf)
        for use, book in zip(finite, books, strict=True)
    ]
    # pairs[t][s] [k_s, k_t] = 2 B_s B_t^T
    pairs = [[2.0 * earlier @ book.T for earlier in books[:stage]] for stage, book in enumerate(books)]
    widest, kept = 1, 1
    for book in books:
        widest = max(widest, kept * book.shape[0])
        kept = min(beam, kept * book.shape[0])
    step = max((_CPU_SCORES if points.device.type == "cpu" else _DEVICE_SCORES) // widest, 1)
    out = torch.zeros(points.shape[0], len(books), dtype=torch.int64, device=points.device)
    for first in range(0, points.shape[0], step):
        part = slice(first, first + step)
        codes, total = _search_chunk(x[part], books, norms, pairs, beam)
        out[part] = torch.where(usable[part] & total.isfinite(), codes, 0)
    return out


def _search_chunk(
    x: Tensor, books: Sequence[Tensor], norms: list[Tensor], pairs: list[list[Tensor]], beam: int
) -> tuple[Tensor, Tensor]:
    """Codes [m, stages] of points [m, v] and their distances [m, 1], less |x|^2."""
    total = x.new_zeros(x.shape[0], 1)
    codes: list[Tensor] = []
    for stage, book in enumerate(books):
        k = book.shape[0]
        score = torch.addmm(norms[stage], x, book.T, alpha=-2.0).unsqueeze(1)
        for pair, code in zip(pairs[stage], codes, strict=True):
            score = score + pair[code]
        score = (score + total.unsqueeze(2)).flatten(1)
        if stage == len(books) - 1:
            total, chosen = score.min(dim=1, keepdim=True)
        else:
            chosen = _lowest(score, min(beam, score.shape[1]))
            total = score.gather(1, chosen)
        codes = [*(code.gather(1, chosen // k) for code in codes), chosen % k]
    return torch.cat(codes, dim=1), total


def _lowest(score: Tensor, count: int) -> Tensor:
    """Indices [m, count] of the lowest scores [m, width], rising; the first of equal ones."""
    border = score.topk(count, dim=1, largest=False).values[:, -1:]
    below, equal = score < border, score == border
    spare = count - below.sum(dim=1, keepdim=True)
    chosen = below | (equal & (equal.cumsum(dim=1, dtype=torch.int32) <= spare))
    return chosen.nonzero()[:, 1].view(-1, count)
