"""Uniform integer grids with a scale and a zero point per group of columns: what rtn and gptq share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from octavo._core.errors import UsageError
from octavo.algorithms._base import Algorithm, Problem
from octavo.layout import BlockScale, Layout
from octavo.math.pack import pack
from octavo.stored import pack_codes, to_stored


@dataclass(frozen=True, kw_only=True)
class GridAlgorithm(Algorithm):
    """Scalar quantization to 2^bits levels per weight.

    Attributes:
        bits: index bits per weight, a whole number; scales and zero points come on top
            (bits + (16 + bits) / group_size in all with float16 scales).
        group_size: consecutive columns of a row that share a scale and a zero point.
    """

    counts_all_bits: ClassVar[bool] = False

    bits: float = 4
    group_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits != int(self.bits) or not 1 <= self.bits <= 8:
            raise UsageError(
                f"{self.name}: bits wanted a whole number 1..8 (scalar indices), got {self.bits}. For fractional bits "
                "per weight use --method vptq."
            )
        if type(self.group_size) is not int or self.group_size < 1:
            raise UsageError(f"{self.name}: group_size wanted a whole number >= 1, got {self.group_size!r}")

    def candidates(self, shape: tuple[int, int], bias: bool) -> tuple[Layout, ...]:
        layout = Layout(
            shape=shape,
            vector_length=1,
            stages=(int(self.bits),),
            direction="row",
            codebook_dtype="grid",
            side_dtype=self.side_dtype,
            block_scale=BlockScale(min(self.group_size, shape[1]), int(self.bits)),
            bias=bias,
        )
        return (layout,)


class Grid:
    """The grids of all groups of a matrix: fitted group by group, then used to round columns."""

    def __init__(self, problem: Problem) -> None:
        layout, device = problem.layout, problem.weight.device
        assert layout.block_scale is not None
        self.layout, self.name = layout, problem.name
        self.top = (1 << layout.stages[0]) - 1
        self.group = layout.block_scale.columns
        dtype, (out, groups) = layout.tensors()["block_scale"]
        self._stored = torch.zeros(out, groups, dtype=dtype, device=device)
        self._scale = torch.ones(out, groups, device=device)
        self._zero = torch.zeros(out, groups, device=device)
        self.codes = torch.zeros(layout.shape, dtype=torch.int64, device=device)

    def fit(self, group: int, values: Tensor) -> None:
        """Fit the grid of one group to ``values`` [out, columns]: its range with zero, scale as stored."""
        low, high = values.amin(dim=1).clamp(max=0), values.amax(dim=1).clamp(min=0)
        scale = (high - low) / self.top
        stored = to_stored(scale, self._stored.dtype, f"{self.name}: scales of column group {group}")
        self._stored[:, group] = stored
        # A group of zeros (or one below the stored dtype's range) decodes to exact zeros: code = zero point.
        usable = torch.where(stored > 0, stored.float(), torch.ones_like(scale))
        self._scale[:, group] = usable
        self._zero[:, group] = (-low / usable).round().clamp(0, self.top)

    def round(self, values: Tensor, column: int) -> Tensor:
        """Round one column [out, 1], remember its codes and return the values that will be decoded."""
        group = column // self.group
        scale, zero = self._scale[:, group : group + 1], self._zero[:, group : group + 1]
        code = (values / scale + zero).round_().clamp_(0, self.top)
        self.codes[:, column : column + 1] = code.long()
        return (code - zero) * self._stored[:, group : group + 1].float()

    def tensors(self) -> dict[str, Tensor]:
        """Everything that was fitted and rounded, as it is stored."""
        layout = self.layout
        assert layout.block_scale is not None
        return {
            "indices": pack_codes(layout, [self.codes]),
            "block_scale": self._stored,
            "block_zero": pack(self._zero.long(), layout.block_scale.zero_bits),
        }
