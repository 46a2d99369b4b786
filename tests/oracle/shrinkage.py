"""How much of a second moment is chance, from its definition: pieces of text as independent samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def shrinkage(pieces: Sequence[np.ndarray], weights: Sequence[np.ndarray] | None = None) -> float:
    """Sum of the variances of all S_ij, i != j, over the sum of their squares; S = sum over pieces of x^T diag(s) x.

    ``pieces`` are inputs [tokens, in], ``weights`` [tokens] of each or ones.
    """
    weights = weights or [np.ones(len(x)) for x in pieces]
    parts = np.array([np.einsum("t,ti,tj->ij", s, x, x) for s, x in zip(weights, pieces, strict=True)])
    n, width = len(parts), parts.shape[1]
    variance = square = 0.0
    for i in range(width):
        for j in range(width):
            if i != j:
                variance += n * parts[:, i, j].var(ddof=1)
                square += parts[:, i, j].sum() ** 2
    return min(variance / square, 1.0)
