"""How much of a second moment is chance, from its definition: pieces of text as independent samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def shrinkage(pieces: Sequence[np.ndarray], weights: Sequence[np.ndarray] | None = None) -> float:
    """Sum of the variances of all S_ij, i != j, over the sum of their squares; S = sum over pieces of x^T diag(s) x.

    The variance of a piece's sum grows with its tokens.
    ``pieces`` are inputs [tokens, in], ``weights`` [tokens] of each or ones.
    """
    weights = weights or [np.ones(len(x)) for x in pieces]
    parts = np.array([np.einsum("t,ti,tj->ij", s, x, x) for s, x in zip(weights, pieces, strict=True)])
    sizes = np.array([len(x) for x in pieces])
    n, width, mean = sizes.sum(), parts.shape[1], parts.sum(axis=0) / sizes.sum()
    variance = square = 0.0
    for i in range(width):
        for j in range(width):
            if i != j:
                gaps = (parts[:, i, j] - sizes * mean[i, j]) ** 2 / sizes
                variance += n * gaps.sum() / (len(parts) - 1)
                square += parts[:, i, j].sum() ** 2
    return min(variance / square, 1.0)
