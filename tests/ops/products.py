"""What kernels are held to: products with the decoded matrix in float64."""

from __future__ import annotations

from torch import Tensor, float64
from torch.nn import functional

from octavo._core import clib
from octavo.weight import VQWeight


def isas() -> list[int]:
    """The instruction sets that can be run here."""
    lib = clib.library()
    return [] if lib is None else list(range(1, lib.octavo_isa() + 1))


def multiplied(weight: VQWeight, x: Tensor) -> Tensor:
    """W x + bias in float64 from the definition."""
    bias = None if weight.bias is None else weight.bias.double()
    return functional.linear(x.double(), weight.dequantize(float64), bias)


def error(y: Tensor, wanted: Tensor) -> float:
    """Relative RMS error."""
    return float((y.double() - wanted).norm() / wanted.norm())
