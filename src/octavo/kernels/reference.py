"""The kernel that runs everywhere: decode the whole matrix in plain torch, then multiply."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from octavo.kernels.select import Kernel, registry
from octavo.layout import Layout
from octavo.weight import VQWeight


def linear(x: Tensor, weight: VQWeight) -> Tensor:
    """``x @ W.T + bias`` in the dtype of ``x``: [.., in_features] to [.., out_features].

    The matrix is decoded in float32 and rounded once to the dtype of ``x``, whatever that is: half precision steps
    would lose integer grids above 2^8 or 2^11 and round every scale.
    """
    matrix = weight.dequantize().to(x.dtype)
    bias = None if weight.bias is None else weight.bias.to(x.dtype)
    return functional.linear(x, matrix, bias)


@registry.register("reference")
class Reference(Kernel):
    """Pure torch, any device, any layout; every call pays for decoding the matrix."""

    rank = 0
    slow = (
        "a VQLinear layer decodes its whole matrix at every call, because the reference kernel is the only one that "
        "can run it here. For generation decode once: octavo.load(folder, decode='dense')."
    )

    @staticmethod
    def missing() -> str:
        return ""

    @staticmethod
    def why_not(layout: Layout, device: torch.device) -> str:
        return ""

    @staticmethod
    def linear(x: Tensor, prepared: VQWeight) -> Tensor:
        return linear(x, prepared)
