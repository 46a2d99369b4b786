"""GPTQ in float64: grids per group of columns, and the elimination of one column after another."""

from __future__ import annotations

import numpy as np

from oracle.feedback import damped, error_feedback
from oracle.rtn import Grids, Rounded


def gptq(
    weight: np.ndarray,
    hessian: np.ndarray,
    bits: int,
    group: int,
    scale_dtype: type = np.float32,
    act_order: bool = False,
    damping: float = 0.01,
) -> Rounded:
    """Grids are fitted on the compensated group when its first column comes up; with ``act_order`` on the original."""
    inp = weight.shape[1]
    grids = Grids((weight.shape[0], inp), bits, group, scale_dtype)
    order = np.argsort(-np.diag(hessian), kind="stable") if act_order else np.arange(inp)
    if act_order:
        for index in range(grids.scale.shape[1]):
            columns = slice(index * grids.group, (index + 1) * grids.group)
            grids.fit(index, weight[:, columns].astype(np.float64))

    def quantize(values: np.ndarray, position: int, rest: np.ndarray) -> np.ndarray:
        column = int(order[position])
        if not act_order and column % grids.group == 0:
            grids.fit(column // grids.group, rest[:, : grids.group])
        return grids.round(values[:, 0], column)[:, None]

    values, _ = error_feedback(weight[:, order], damped(hessian, damping)[np.ix_(order, order)], quantize)
    return Rounded(grids.codes, grids.scale, grids.zero, values[:, np.argsort(order)], grids.close)
