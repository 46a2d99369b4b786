"""Codebooks that belong to tiles of rows: nearest centroids, and the fit of all codebooks of a matrix at once.

An error e of a vector counts as |e T|^2 with a matrix T ("root") per column of vectors. With H^-1 = U^T U and T the
inverse of the diagonal block U_PP, that is exactly what the error costs under error feedback: the loss that is left
when all later columns have been adapted to it in the best way.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from octavo._core import clib
from octavo.math.hessian import Factor

Seeding = Literal["mahalanobis", "kmeans++"]
_BEST_ISA = 0
#: Scores that the torch path holds at a time.
_SCORES = 1 << 22
#: Weight of a vector element that only pads the last vector of a row, relative to the others.
_PADDING = 1e-3


def block_roots(factor: Factor, width: int, *, diagonal: bool = False) -> Tensor:
    """The inverses [ceil(columns / width), width, width] of the diagonal blocks of U, float32; H^-1 = U^T U.

    Args:
        factor: of the Hessian. Columns that are missing to a multiple of ``width`` get a tiny weight.
        width: columns of a block.
        diagonal: leave out what couples the columns of a block: diag(1 / U_jj), the weights 1 / U_jj^2 of GPTQ.
    """
    columns = factor.variance.numel()
    blocks = -(-columns // width)
    spare = blocks * width - columns
    deviation = factor.variance.double().sqrt()
    deviation = torch.cat([deviation, deviation.mean().expand(spare) / _PADDING]).view(blocks, width)
    if diagonal:
        return torch.diag_embed(1 / deviation).float()
    index = torch.arange(blocks * width, device=factor.variance.device).view(blocks, width)
    inside = index.clamp(max=columns - 1)
    unit = factor.feedback[inside.unsqueeze(2), inside.unsqueeze(1)].double()
    if spare:
        outside = index[-1] >= columns
        unit[-1, outside] = 0
        unit[-1, :, outside] = 0
        unit[-1].diagonal().fill_(1)
    identity = torch.eye(width, dtype=torch.float64, device=unit.device).expand_as(unit)
    return torch.linalg.solve_triangular(deviation.unsqueeze(2) * unit, identity, upper=True).float()


def nearest_tiles(points: Tensor, books: Tensor, tile_rows: int, root: Tensor | None = None) -> Tensor:
    """``argmin_c |(points[n] - books[n // tile_rows, c]) root|^2`` for every point; equal ones go to the lowest.

    Args:
        points: [n, v] float32.
        books: [ceil(n / tile_rows), k, v] float32.
        tile_rows: points that share a codebook.
        root: [v, v] float32, or None for the identity.

    Returns:
        [n] int64.
    """
    (n, v), (tiles, k, _) = points.shape, books.shape
    assert tiles == -(-n // tile_rows), "octavo bug: one codebook per tile"
    if clib.takes(points, books) and (root is None or clib.takes(root)):
        lib = clib.library()
        if lib is not None:
            points, books = points.contiguous(), books.contiguous()
            root = None if root is None else root.contiguous()
            out = torch.empty(n, dtype=torch.int64)
            arguments = (points.data_ptr(), n, tile_rows, books.data_ptr(), k, v, _at(root), out.data_ptr())
            clib.call(lib.octavo_nearest_tiles, *arguments, clib.threads(), _BEST_ISA)
            return out
        clib.warn_slow_once("nearest-centroid search")
    padded = _padded(points, tiles * tile_rows).view(tiles, 1, tile_rows, v)
    codes, _ = _assign(padded, books, None if root is None else root.unsqueeze(0))
    return codes.reshape(-1)[:n]


def fit_tiles(
    points: Tensor,
    count: int,
    tile_rows: int,
    *,
    generator: torch.Generator,
    roots: Tensor | None = None,
    weights: Tensor | None = None,
    seeding: Seeding = "mahalanobis",
    iterations: int = 30,
    tolerance: float = 1e-4,
) -> Tensor:
    """Fit the codebooks of all tiles: generalised k-means (the EM of GPTVQ, arXiv 2402.15319, Section 3.2).

    Assignments take the nearest centroid under |(x - c) T|^2; a centroid then is the weighted least-squares solution
    (sum s M) c = sum s M x over its vectors, M = T T^T. Empty clusters move onto the worst-served vectors.

    Args:
        points: [rows, vectors, v] float32, finite.
        count: centroids k per codebook.
        tile_rows: rows that share a codebook.
        generator: source of all randomness.
        roots: [vectors, v, v] float32, not singular, or None for the identity.
        weights: [rows, vectors] non-negative weights s of the vectors, or None for ones.
        seeding: ``mahalanobis``: vectors at equally spaced ranks of their Mahalanobis distance from the mean of the
            tile; ``kmeans++``: D^2 sampling.
        iterations: at most so many steps.
        tolerance: a tile stops when a step lowers its error by less than this share.

    Returns:
        centroids [tiles, k, v] float32.
    """
    rows, vectors, v = points.shape
    tiles = -(-rows // tile_rows)
    if seeding == "mahalanobis":
        centroids, uniforms = _mahalanobis(points, count, tile_rows), None
    else:
        centroids = torch.zeros(tiles, count, v, device=points.device)
        uniforms = torch.rand(tiles, count, generator=generator, dtype=torch.float64)
    if clib.takes(points) and all(clib.takes(t) for t in (roots, weights) if t is not None):
        lib = clib.library()
        if lib is not None:
            points = points.contiguous()
            roots = None if roots is None else roots.contiguous()
            weights = None if weights is None else weights.contiguous()
            errors = torch.empty(tiles, dtype=torch.float64)
            clib.call(
                lib.octavo_fit_tiles,
                *(points.data_ptr(), _at(weights), _at(roots), rows, vectors, v, tile_rows, count),
                *(centroids.data_ptr(), _at(uniforms), iterations, tolerance, errors.data_ptr()),
                *(clib.threads(), _BEST_ISA),
            )
            return centroids
        clib.warn_slow_once("codebook fitting")
    return _fit_torch(points, centroids, tile_rows, roots, weights, uniforms, iterations, tolerance)


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _padded(values: Tensor, rows: int) -> Tensor:
    """Rows of zeros at the end."""
    if rows == values.shape[0]:
        return values
    return torch.cat([values, values.new_zeros(rows - values.shape[0], *values.shape[1:])])


def _mahalanobis(points: Tensor, count: int, tile_rows: int) -> Tensor:
    """Vectors at equally spaced ranks of the Mahalanobis distance from the mean of their tile [tiles, count, v]."""
    rows, _, v = points.shape
    whole = rows // tile_rows
    parts = []
    for part, tiles in ((points[: whole * tile_rows], whole), (points[whole * tile_rows :], 1)):
        if part.shape[0] == 0:
            continue
        x = part.reshape(tiles, -1, v)
        centred = x - x.mean(dim=1, keepdim=True)
        covariance = (centred.transpose(1, 2) @ centred).double()
        # A tile whose vectors lie in a plane has a singular covariance.
        ridge = covariance.diagonal(dim1=1, dim2=2).mean(dim=1) * 1e-6 + 1e-30
        covariance += ridge.view(-1, 1, 1) * torch.eye(v, dtype=torch.float64, device=x.device)
        distance = ((centred @ torch.linalg.inv(covariance).float()) * centred).sum(dim=2)
        order = distance.sort(dim=1, stable=True).indices
        ranks = torch.linspace(0, x.shape[1] - 1, count, dtype=torch.float64).round().long().to(x.device)
        chosen = order[:, ranks]
        parts.append(x.gather(1, chosen.unsqueeze(2).expand(-1, -1, v)))
    return torch.cat(parts).contiguous()


# ---------------------------------------------------------------- the same in torch, all tiles at once, on any device


def _assign(points: Tensor, books: Tensor, roots: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes and squared distances [tiles, vectors, rows] of points [tiles, vectors, rows, v]."""
    tiles, vectors, rows, _ = points.shape
    codes = torch.empty(tiles, vectors, rows, dtype=torch.int64, device=points.device)
    distance = torch.empty(tiles, vectors, rows, device=points.device)
    step = max(_SCORES // (rows * books.shape[1]), 1)
    for column in range(vectors):
        x = points[:, column] if roots is None else points[:, column] @ roots[column]
        book = books if roots is None else books @ roots[column]
        for first in range(0, tiles, step):
            part = slice(first, first + step)
            gaps = (x[part].unsqueeze(2) - book[part].unsqueeze(1)).square_().sum(dim=3)
            distance[part, column], codes[part, column] = gaps.min(dim=2)
    return codes, distance


def _fit_torch(
    points: Tensor,
    centroids: Tensor,
    tile_rows: int,
    roots: Tensor | None,
    weights: Tensor | None,
    uniforms: Tensor | None,
    iterations: int,
    tolerance: float,
) -> Tensor:
    rows, vectors, v = points.shape
    tiles, k, _ = centroids.shape
    if weights is None:
        weights = torch.ones(rows, vectors, device=points.device)
    x = _padded(points, tiles * tile_rows).view(tiles, tile_rows, vectors, v).transpose(1, 2)
    s = _padded(weights, tiles * tile_rows).view(tiles, tile_rows, vectors).transpose(1, 2)
    identity = torch.eye(v, device=points.device).expand(vectors, v, v)
    metric = (identity if roots is None else roots @ roots.transpose(1, 2)).double()
    if uniforms is not None:
        centroids = _sample(x, s, roots, uniforms.to(points.device))
    running = torch.ones(tiles, dtype=torch.bool, device=points.device)
    previous = torch.full((tiles,), torch.inf, dtype=torch.float64, device=points.device)
    for _ in range(iterations):
        codes, distance = _assign(x, centroids, roots)
        cost = distance * s
        error = cost.double().sum(dim=(1, 2))
        flat = (codes + k * torch.arange(tiles, device=codes.device).view(-1, 1, 1)).reshape(-1)
        pull = s.double().unsqueeze(3).unsqueeze(4) * metric.view(1, vectors, 1, v, v)
        normal = x.new_zeros(tiles * k, v, v, dtype=torch.float64)
        normal.index_add_(0, flat, pull.reshape(-1, v, v))
        right = x.new_zeros(tiles * k, v, dtype=torch.float64)
        right.index_add_(0, flat, (pull @ x.double().unsqueeze(4)).reshape(-1, v))
        members = torch.zeros(tiles * k, dtype=torch.int64, device=x.device)
        members.index_add_(0, flat, (s > 0).long().reshape(-1))
        used = (members > 0).view(tiles, k)
        normal[members == 0] = torch.eye(v, dtype=torch.float64, device=x.device)
        factor, info = torch.linalg.cholesky_ex(normal)
        solved = torch.cholesky_solve(right.unsqueeze(2), factor).view(tiles, k, v).float()
        updated = torch.where((used & (info == 0).view(tiles, k)).unsqueeze(2), solved, centroids)
        for tile in torch.nonzero(running & ~used.all(dim=1)).flatten().tolist():
            _repair(x[tile], cost[tile], updated[tile], used[tile])
        centroids = torch.where(running.view(-1, 1, 1), updated, centroids)
        running = running & ~(used.all(dim=1) & (previous - error <= tolerance * error))
        previous = error
        if not bool(running.any()):
            break
    return centroids


def _sample(x: Tensor, s: Tensor, roots: Tensor | None, uniforms: Tensor) -> Tensor:
    """D^2 sampling with given uniform numbers [tiles, k]."""
    tiles, _, _, v = x.shape
    moved = x if roots is None else x @ roots.unsqueeze(0)
    closest = torch.ones_like(s)
    flat = x.reshape(tiles, -1, v)
    chosen = []
    for c in range(uniforms.shape[1]):
        chance = (s * closest).double().reshape(tiles, -1).cumsum(dim=1)
        wanted = uniforms[:, c : c + 1] * chance[:, -1:]
        index = torch.searchsorted(chance, wanted, right=True).clamp(max=chance.shape[1] - 1)
        centroid = flat.gather(1, index.unsqueeze(2).expand(-1, -1, v))
        chosen.append(centroid)
        here = centroid.unsqueeze(1) if roots is None else centroid.unsqueeze(1) @ roots.unsqueeze(0)
        gap = (moved - here).square().sum(dim=3)
        closest = gap if c == 0 else torch.minimum(closest, gap)
    return torch.cat(chosen, dim=1)


def _repair(x: Tensor, cost: Tensor, centroids: Tensor, used: Tensor) -> None:
    """Move unused centroids [k, v], in place, onto the worst-served vectors, distinct ones as far as there are."""
    empty = torch.nonzero(~used).flatten().tolist()
    cost, flat = cost.reshape(-1), x.reshape(-1, x.shape[-1])
    order = cost.sort(descending=True, stable=True).indices[: 8 * len(empty)]
    fresh: list[Tensor] = []
    for index in order.tolist():
        if float(cost[index]) > 0 and (not fresh or not torch.equal(flat[index], fresh[-1])):
            fresh.append(flat[index])
    spare = centroids[torch.nonzero(used).flatten()[0]].clone() if bool(used.any()) else centroids[0].clone()
    for position, c in enumerate(empty):
        centroids[c] = fresh[position] if position < len(fresh) else spare
