"""Cyclic coordinate descent: after error feedback every block of columns is chosen once more, all others being fixed.

The loss tr(E H E^T), E = W - Q, as a function of block P alone is a quadratic around Q_P + (E H)_P (H_PP)^-1 with the
metric H_PP. Feedback chose the block without knowing the blocks to come; here they are known (the assignment step of
LNQ, arXiv 2505.07004, Section 4.2, for vectors instead of scalars). The loss never rises.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from octavo.math.hessian import exact_float32
from octavo.math.threads import one_thread

#: choose(targets [out, width], first column, root [width, width]) -> (new values [out, width], take), the values that
#: minimise |(target - value) root|^2; ``take(gains)`` [out], what each row of them lowers the loss by, says which rows
#: are to take them.
Chooser = Callable[[Tensor, int, Tensor], tuple[Tensor, Callable[[Tensor], Tensor]]]

_LAZY = 128
#: Added to the diagonal of a block, relative to the mean, so that blocks of inputs that never fire have a root.
_RIDGE = 1e-6


def coordinate_descent(quantized: Tensor, pull: Tensor, hessian: Tensor, choose: Chooser, width: int) -> Tensor:
    """One sweep over all blocks of ``width`` columns, from left to right.

    Args:
        quantized: [out, in] float32, the values so far; not changed.
        pull: [out, in], (W - Q) H for the target W and these values; overwritten.
        hessian: [in, in], damped.
        choose: finds the best values of a block.
        width: columns of a block (fewer at the end).

    Returns:
        quantized values [out, in].
    """
    result = quantized.clone()
    total, lazy = result.shape[1], max(_LAZY // width, 1) * width
    ridge = _RIDGE * float(hessian.diagonal().mean())
    with exact_float32():
        for start in range(0, total, lazy):
            stop = min(start + lazy, total)
            before = result[:, start:stop].clone()
            # Inside the span every change reaches the rest of the span; beyond it they arrive in one product.
            local = pull[:, start:stop].T.contiguous()
            # On single blocks operations are shorter than waking a second thread.
            with one_thread():
                for first in range(start, stop, width):
                    last = min(first + width, stop)
                    corner = hessian[first:last, first:last].clone()
                    corner.diagonal().add_(ridge)
                    root = torch.linalg.cholesky(corner)
                    force = local[first - start : last - start]
                    old = result[:, first:last]
                    values, take = choose(old + torch.cholesky_solve(force, root).T, first, root)
                    change = values - old
                    gain = 2 * (force.T * change).sum(dim=1) - (change @ root).square().sum(dim=1)
                    change.mul_(take(gain).unsqueeze(1))
                    old += change
                    local[last - start :].addmm_(hessian[first:last, last:stop].T, change.T, alpha=-1)
            pull[:, stop:].addmm_(result[:, start:stop] - before, hessian[start:stop, stop:], alpha=-1)
    return result
