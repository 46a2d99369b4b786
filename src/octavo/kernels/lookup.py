"""The CPU kernel: codes stay packed, products with centroids are looked up (``csrc/lookup.h``).

A vector of inputs that meets a codebook gives one product per centroid, once for all rows. For many inputs at a time
(prompts) blocks of rows are decoded and multiplied as dense matrices, which reads and decodes every code once as well.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from octavo._core import clib
from octavo.kernels.select import Kernel, registry
from octavo.layout import Layout
from octavo.weight import VQWeight

_BEST_ISA = 0
_VECTORS = (1, 2, 4, 8)
_MOST_STAGES, _MOST_BITS = 4, 8
#: From so many inputs on a product of decoded rows is faster.
_MANY = 12
#: Decoded numbers at a time; whole tiles of 64 rows.
_DECODED = 1 << 22


class PackedMatrix:
    """A weight regrouped for this processor; owns memory of the C++ library.

    Args:
        weight: a layout that :func:`why_not` has nothing against, on the CPU.

    Raises:
        MemoryError: there is no memory for a second copy of the codes.
    """

    def __init__(self, weight: VQWeight) -> None:
        lib = clib.library()
        assert lib is not None
        layout = weight.layout
        self.weight = weight
        books = torch.cat([weight.codebook(stage)[0].float() for stage in range(len(layout.stages))]).contiguous()
        stages = torch.tensor(layout.stages, dtype=torch.int32)
        columns, scales = layout.shape[1], torch.ones(layout.shape[0], 1)
        if layout.block_scale is not None:
            columns, scales = layout.block_scale.columns, weight.block_scales().contiguous()
        indices, bias = weight.tensors["indices"].contiguous(), weight.bias
        bias = None if bias is None else bias.float().contiguous()
        block, signs = (layout.transform.input, weight.tensors["input_signs"]) if layout.transform else (0, None)
        handle = ctypes.c_void_p()
        clib.call(
            lib.octavo_matrix_create,
            *(*layout.shape, layout.vector_length, len(layout.stages), stages.data_ptr(), books.data_ptr()),
            *(indices.data_ptr(), columns, scales.data_ptr(), block, None if signs is None else signs.data_ptr()),
            *(None if bias is None else bias.data_ptr(), clib.threads(), ctypes.addressof(handle)),
        )
        self.handle = handle.value
        self.bias = bias
        weakref.finalize(self, lib.octavo_matrix_destroy, handle.value)

    def multiply(self, x: Tensor, threads: int | None = None, isa: int = _BEST_ISA) -> Tensor:
        """W x + bias for ``x`` [n, in] float32, contiguous; gives [n, out] float32."""
        lib = clib.library()
        assert lib is not None
        y = x.new_empty(x.shape[0], self.weight.layout.shape[0])
        arguments = (self.handle, x.data_ptr(), x.shape[0], y.data_ptr(), threads or clib.threads(), isa)
        clib.call(lib.octavo_matrix_multiply, *arguments)
        return y

    def transformed(self, x: Tensor) -> Tensor:
        """What :meth:`rows` is multiplied by in place of ``x`` [n, in] float32, contiguous."""
        lib = clib.library()
        assert lib is not None
        y = torch.empty_like(x)
        clib.call(lib.octavo_matrix_transform, self.handle, x.data_ptr(), x.shape[0], y.data_ptr(), clib.threads())
        return y

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Rows [first, last) of the matrix before its transform, float32 or bfloat16; ``first`` is a multiple of 64."""
        lib = clib.library()
        assert lib is not None
        found = torch.empty(last - first, self.weight.layout.shape[1], dtype=dtype)
        half = int(dtype == torch.bfloat16)
        clib.call(lib.octavo_matrix_decode, self.handle, first, last, half, found.data_ptr(), clib.threads())
        return found


def why_not(layout: Layout) -> str:
    """Why the kernel cannot run a layout, or an empty string."""
    block = layout.block_scale
    reasons = {
        "column vectors": layout.direction == "column",
        f"vectors of {layout.vector_length}": layout.vector_length not in _VECTORS,
        f"{len(layout.stages)} stages": len(layout.stages) > _MOST_STAGES,
        "codebooks above 256 entries": max(layout.stages) > _MOST_BITS,
        "sign bits": layout.sign_bits,
        "codebooks per tile": layout.tile is not None,
        "uniform grids": layout.codebook_dtype == "grid",
        "zero points": block is not None and block.zero_bits > 0,
        "scales that cut vectors": block is not None
        and block.columns < layout.shape[1]
        and block.columns % layout.vector_length != 0,
        "channel norms": layout.channel_norm != "none",
        "a stored order": layout.permuted,
        "outlier columns": layout.outliers is not None,
        "a transform of the outputs": layout.transform is not None and layout.transform.output > 0,
    }
    found = [reason for reason, holds in reasons.items() if holds]
    return f"it does not know {', '.join(found)}" if found else ""


@registry.register("lookup")
class LookUp(Kernel):
    """C++ on the CPU: products with centroids are looked up, the matrix stays packed."""

    rank = 10
    prepares = True

    @staticmethod
    def missing() -> str:
        return clib.why_missing()

    @staticmethod
    def why_not(layout: Layout, device: torch.device) -> str:
        return f"it runs on the CPU, not on {device.type}" if device.type != "cpu" else why_not(layout)

    @staticmethod
    def takes(x: Tensor) -> bool:
        # Traced and wrapped tensors have no memory that C++ could read, and C++ has no gradients.
        return clib.takes(x) and not (x.requires_grad and torch.is_grad_enabled())

    @staticmethod
    def prepare(weight: VQWeight) -> PackedMatrix:
        return PackedMatrix(weight)

    @staticmethod
    def linear(x: Tensor, prepared: PackedMatrix) -> Tensor:
        rows = x.flatten(0, -2) if x.ndim > 1 else x.unsqueeze(0)
        run: Callable[[Tensor, PackedMatrix], Tensor] = _decoded if rows.shape[0] >= _MANY else _looked_up
        return run(rows, prepared).view(*x.shape[:-1], prepared.weight.layout.shape[0])


def _looked_up(x: Tensor, matrix: PackedMatrix) -> Tensor:
    return matrix.multiply(x.float().contiguous()).to(x.dtype)


def _decoded(x: Tensor, matrix: PackedMatrix) -> Tensor:
    """Blocks of rows as dense matrices, in bfloat16 if ``x`` is, else in float32."""
    out, inp = matrix.weight.layout.shape
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    moved = matrix.transformed(x.float().contiguous()).to(dtype)
    y = torch.empty(x.shape[0], out, dtype=x.dtype)
    step = max(_DECODED // inp // 64, 1) * 64
    for first in range(0, out, step):
        last = min(first + step, out)
        part = functional.linear(moved, matrix.rows(first, last, dtype))
        y[:, first:last] = part if matrix.bias is None else part + matrix.bias[first:last]
    return y
