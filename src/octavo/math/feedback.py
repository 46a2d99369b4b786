"""Error feedback (GPTQ, which is LDLQ): quantize columns in order, spread each error over the columns to come.

With H^-1 = U^T U and the unit upper-triangular R = diag(U)^-1 U, quantizing block P of columns with error
E = W_P - Q_P moves the rest by W_F <- W_F - E (R_PP)^-1 R_PF, which is the exact minimiser of tr(E H E^T) over the
columns that are still free. For blocks of width one R_PP is 1 (Frantar et al., arXiv 2210.17323, Eq. 3).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from octavo.math.hessian import Factor, exact_float32
from octavo.math.threads import one_thread

#: quantize(columns [out, width], first column, upcoming [out, >= width]) -> quantized values [out, width].
#: ``upcoming`` holds the compensated values from the first column to the end of the lazy block: group scales and
#: per-tile codebooks are fitted on it.
BlockQuantizer = Callable[[Tensor, int, Tensor], Tensor]

_LAZY = 128


def error_feedback(
    weight: Tensor,
    factor: Factor,
    quantize: BlockQuantizer,
    width: int = 1,
    lazy: int = _LAZY,
    exact: bool = True,
) -> tuple[Tensor, Tensor]:
    """Quantize the columns of ``weight`` [out, in] from left to right with second-order compensation.

    Args:
        weight: float32 matrix; not changed.
        factor: of the Hessian in the same column order.
        quantize: called once for every ``width`` consecutive columns (fewer at the end) with their compensated values.
        width: columns quantized together.
        lazy: columns whose errors reach the rest of the matrix in one product; rounded down to whole blocks. Inside
            this span every column is fully compensated when its turn comes, as far as groups look ahead.
        exact: compensate the columns of a block together; False leaves (R_PP)^-1 out, as if they were independent.

    Returns:
        (quantized [out, in], compensated [out, in]): the result, and the values that the quantizer was given.
    """
    work = weight.clone()
    quantized = torch.empty_like(work)
    total, lazy = work.shape[1], max(lazy // width, 1) * width
    with exact_float32():
        for start in range(0, total, lazy):
            stop = min(start + lazy, total)
            # Column-major inside the lazy block: a step touches whole contiguous columns.
            block = work[:, start:stop].T.contiguous()
            errors = torch.empty_like(block)
            results = torch.empty_like(block)
            feedback = factor.feedback[start:stop, start:stop]
            # On single columns operations are shorter than waking a second thread.
            with one_thread():
                for i in range(0, stop - start, width):
                    j = min(i + width, stop - start)
                    values = block[i:j].T
                    results[i:j] = quantize(values, start + i, block[i:].T).T
                    error = block[i:j] - results[i:j]
                    if j - i > 1 and exact:
                        # (R_PP)^-1 applied from the right, E R_PP^-1, here transposed.
                        corner = feedback[i:j, i:j].T
                        error = torch.linalg.solve_triangular(corner, error, upper=False, unitriangular=True)
                    errors[i:j] = error
                    block[j:].addmm_(feedback[i:j, j:].T, error, alpha=-1)
            quantized[:, start:stop] = results.T
            work[:, start:stop] = block.T
            work[:, stop:].addmm_(errors.T, factor.feedback[start:stop, stop:], alpha=-1)
    return quantized, work
