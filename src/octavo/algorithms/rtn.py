"""Round to nearest: the baseline without any statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from octavo.algorithms._base import Problem, registry
from octavo.algorithms._grid import Grid, GridAlgorithm


@registry.register("rtn")
@dataclass(frozen=True, kw_only=True)
class RTN(GridAlgorithm):
    """Each group of columns is rounded to its own uniform grid, whatever the inputs are."""

    name: ClassVar[str] = "rtn"
    needs_hessian: ClassVar[bool] = False

    def _encode(self, problem: Problem) -> dict[str, Tensor]:
        weight, grid = problem.weight, Grid(problem)
        for column in range(weight.shape[1]):
            if column % grid.group == 0:
                grid.fit(column // grid.group, weight[:, column : column + grid.group])
            grid.round(weight[:, column : column + 1], column)
        return grid.tensors()
