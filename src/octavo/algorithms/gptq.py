"""GPTQ (Frantar et al., arXiv 2210.17323): scalar quantization with second-order error feedback."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from octavo.algorithms._base import Problem, check_damping, registry
from octavo.algorithms._grid import Grid, GridAlgorithm
from octavo.math.feedback import error_feedback
from octavo.math.hessian import factorize


@registry.register("gptq")
@dataclass(frozen=True, kw_only=True)
class GPTQ(GridAlgorithm):
    """Columns are rounded in order, each error compensated by the columns to come.

    Attributes:
        act_order: quantize columns by falling H_jj. The groups stay those of the original order, with grids fitted on
            the original weights, so that no permutation has to be stored.
        damping: relative damping of the Hessian's diagonal.
    """

    name: ClassVar[str] = "gptq"

    act_order: bool = False
    damping: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_damping(self)

    def _encode(self, problem: Problem) -> dict[str, Tensor]:
        weight, hessian, grid = problem.weight, problem.statistics, Grid(problem)
        if self.act_order:
            order = torch.argsort(torch.diagonal(hessian), descending=True, stable=True)
            for group in range(-(-weight.shape[1] // grid.group)):
                grid.fit(group, weight[:, group * grid.group : (group + 1) * grid.group])
            columns = order.tolist()
            weight, hessian = weight[:, order], hessian[order][:, order]
        else:
            columns = range(weight.shape[1])

        def quantize(values: Tensor, position: int, upcoming: Tensor) -> Tensor:
            column = columns[position]
            if not self.act_order and column % grid.group == 0:
                grid.fit(column // grid.group, upcoming[:, : grid.group])
            return grid.round(values, column)

        # Whole groups inside the lazy span, so that a group's grid sees all compensation up to its start.
        lazy = grid.group * max(128 // grid.group, 1)
        error_feedback(weight, factorize(hessian, problem.name, self.damping), quantize, lazy=lazy)
        return grid.tensors()
