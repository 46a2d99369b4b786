"""Optimal brain surgery, column block by column block: the inverse Hessian is shrunk by Gaussian elimination.

No Cholesky factor is involved, so this is a different road to the result of GPTQ.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

#: quantize(values [out, width], first column, compensated rest [out, >= width]) -> values [out, width]
Quantize = Callable[[np.ndarray, int, np.ndarray], np.ndarray]


def damped(hessian: np.ndarray, damping: float = 0.01) -> np.ndarray:
    """H + damping * mean(diag H) I, where channels that never fired first get the mean diagonal."""
    h = hessian.astype(np.float64)
    h = (h + h.T) / 2
    mean = np.clip(np.diag(h), 0, None).mean()
    np.fill_diagonal(h, np.where(np.diag(h) <= 0, mean, np.diag(h)) + damping * mean)
    return h


def error_feedback(
    weight: np.ndarray, hessian: np.ndarray, quantize: Quantize, width: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Quantize ``weight`` [out, in] from left to right; ``hessian`` [in, in] is positive definite (already damped).

    After block P: W_F -= (W_P - Q_P) (Hinv_PP)^-1 Hinv_PF, and P is eliminated from Hinv.
    Returns the quantized matrix and the values that the quantizer was given.
    """
    work, quantized = weight.astype(np.float64).copy(), np.zeros(weight.shape)
    inverse = np.linalg.inv(hessian.astype(np.float64))
    total = work.shape[1]
    for first in range(0, total, width):
        stop = min(first + width, total)
        values = work[:, first:stop]
        quantized[:, first:stop] = quantize(values, first, work[:, first:])
        step = np.linalg.solve(inverse[first:stop, first:stop], inverse[first:stop, stop:])
        work[:, stop:] -= (values - quantized[:, first:stop]) @ step
        inverse[stop:, stop:] -= inverse[stop:, first:stop] @ step
    return quantized, work


def best_free_columns(weight: np.ndarray, hessian: np.ndarray, quantized: np.ndarray) -> np.ndarray:
    """The free columns that minimise tr(E H E^T), E = W - Q, when the first columns of Q are fixed.

    ``quantized`` [out, p] are the fixed columns. Solved as one least-squares problem per row: with H = L L^T,
    tr(E H E^T) = |E L|^2.
    """
    root = np.linalg.cholesky(hessian.astype(np.float64))
    fixed = quantized.shape[1]
    weight = weight.astype(np.float64)
    constant = (weight[:, :fixed] - quantized) @ root[:fixed]
    free_error = np.linalg.lstsq(root[fixed:].T, -constant.T, rcond=None)[0].T
    return weight[:, fixed:] - free_error


def proxy_loss(weight: np.ndarray, quantized: np.ndarray, hessian: np.ndarray) -> float:
    """tr(E H E^T) / tr(W H W^T), element by element of the definition."""
    w, e, h = weight.astype(np.float64), weight.astype(np.float64) - quantized, hessian.astype(np.float64)
    top, bottom = np.trace(e @ h @ e.T), np.trace(w @ h @ w.T)
    return float(top / bottom) if bottom > 0 else 0.0
