"""An order of rows in which rows whose weights are distributed alike stand next to each other."""

from __future__ import annotations

import torch
from torch import Tensor

#: Quantiles that describe the shape of a row's distribution.
_QUANTILES = 16
_ITERATIONS = 20
#: Rows that are sorted at a time.
_ROWS = 256


def shape_features(weight: Tensor) -> Tensor:
    """Quantiles [rows, 16] of every row of a matrix [rows, columns] over the row's root mean square, float64.

    The quantiles are those at (i + 1/2) / 16; rows of zeros have zeros.
    """
    # In pieces: sorting takes several times the memory of what is sorted.
    return torch.cat([_shape_features(piece) for piece in weight.split(_ROWS)])


def _shape_features(weight: Tensor) -> Tensor:
    values = weight.double()
    size = values.square().mean(dim=1, keepdim=True).sqrt()
    shape = values / torch.where(size > 0, size, 1)
    at = (torch.arange(_QUANTILES, dtype=torch.float64, device=weight.device) + 0.5) / _QUANTILES
    return shape.quantile(at, dim=1).T


def grouped_order(features: Tensor) -> Tensor:
    """The order [n] int64 of points [n, f] in which every half, quarter, eighth, .. is a cluster of equal size.

    Bisecting k-means: points are split into two halves by balanced 2-means, and each half again, down to single ones,
    so that one order serves every number of groups.
    """
    order = torch.arange(features.shape[0], device=features.device)
    parts = [order]
    while any(part.numel() > 2 for part in parts):
        parts = [half for part in parts for half in (_halves(features, part) if part.numel() > 2 else (part,))]
    return torch.cat(parts)


def _halves(features: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
    """The points ``part`` in two halves, the first one the larger if they are odd."""
    x = features[part]
    x = x - x.mean(dim=0)
    size = (part.numel() + 1) // 2
    # The first direction is that of the point farthest from the mean, so that nothing is left to chance.
    direction = x[x.square().sum(dim=1).argmax()]
    chosen: Tensor | None = None
    for _ in range(_ITERATIONS):
        ranked = (x @ direction).argsort(stable=True)
        first = torch.zeros(part.numel(), dtype=torch.bool, device=part.device)
        first[ranked[:size]] = True
        if chosen is not None and torch.equal(first, chosen):
            break
        chosen = first
        # With halves of fixed sizes, the nearer centroid is decided by the projection on their difference.
        direction = x[~first].mean(dim=0) - x[first].mean(dim=0)
    assert chosen is not None
    return part[chosen], part[~chosen]
