"""Matrices that the C++ library regrouped for this processor, and products with them."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from octavo._core import clib
from octavo._core.errors import UsageError
from octavo.kernels.select import Kernel
from octavo.layout import Layout
from octavo.weight import VQWeight

_BEST_ISA = 0
#: Decoded numbers at a time; whole tiles of 64 rows.
_DECODED = 1 << 22
#: From so many inputs on :meth:`PackedMatrix.many` is faster than products of few inputs at a time.
_MANY = 20
#: Inputs of a transform that makes them of similar size, so that eight bits of each are enough.
_EVEN = 64


class PackedMatrix:
    """A weight of which the C++ library holds a copy of its own, freed with this object.

    Args:
        weight: what it was made from.
        handle: what one of the library's ``create`` functions gave.
    """

    def __init__(self, weight: VQWeight, handle: ctypes.c_void_p) -> None:
        self.weight, self.handle = weight, handle.value
        self.bias = None if weight.bias is None else weight.bias.float().contiguous()
        # Not at exit: a thread of a server may be in the library then.
        weakref.finalize(self, _library().octavo_matrix_destroy, self.handle).atexit = False

    def multiply(self, x: Tensor, threads: int | None = None, isa: int = _BEST_ISA) -> Tensor:
        """W x + bias for ``x`` [n, in] float32, contiguous; gives [n, out] float32."""
        y = x.new_empty(x.shape[0], self.weight.layout.shape[0])
        arguments = (self.handle, x.data_ptr(), x.shape[0], y.data_ptr(), threads or clib.threads(), isa)
        clib.call(_library().octavo_matrix_multiply, *arguments)
        return y

    @property
    def has_many(self) -> bool:
        """Whether :meth:`many` runs here, on inputs that it suits."""
        transform = self.weight.layout.transform
        even = transform is not None and transform.input >= _EVEN
        return even and bool(_library().octavo_matrix_has_many(self.handle))

    def many(self, x: Tensor, threads: int | None = None) -> Tensor:
        """:meth:`multiply` for many inputs at once; they are rounded to 8 bits by groups of 128, as are the weights."""
        y = x.new_empty(x.shape[0], self.weight.layout.shape[0])
        arguments = (self.handle, x.data_ptr(), x.shape[0], y.data_ptr(), threads or clib.threads())
        clib.call(_library().octavo_matrix_many, *arguments)
        return y

    def rows_times(self, index: Tensor, x: Tensor, threads: int | None = None) -> Tensor:
        """Products [n] float32 of rows, int64 [n], with ``x`` [in] float32; the bias is left out.

        Raises:
            UsageError: a row that the matrix lacks.
        """
        y = torch.empty(index.numel(), dtype=torch.float32, device="cpu")
        index, x, indices = index.contiguous(), x.contiguous(), self.weight.tensors["indices"].contiguous()
        arguments = (indices.data_ptr(), index.data_ptr(), index.numel(), x.data_ptr(), y.data_ptr())
        if clib.call(_library().octavo_matrix_rows, self.handle, *arguments, threads or clib.threads()):
            raise UsageError(f"rows of a matrix wanted in 0..{self.weight.layout.shape[0] - 1}.")
        return y

    def transformed(self, x: Tensor) -> Tensor:
        """What :meth:`rows` is multiplied by in place of ``x`` [n, in] float32, contiguous."""
        y = torch.empty_like(x)
        arguments = (self.handle, x.data_ptr(), x.shape[0], y.data_ptr(), clib.threads())
        clib.call(_library().octavo_matrix_transform, *arguments)
        return y

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Rows [first, last) of the matrix before its transform, float32 or bfloat16; ``first`` is a multiple of 64."""
        found = torch.empty(last - first, self.weight.layout.shape[1], dtype=dtype)
        half = int(dtype == torch.bfloat16)
        arguments = (self.handle, first, last, half, found.data_ptr(), clib.threads())
        clib.call(_library().octavo_matrix_decode, *arguments)
        return found


class PackedKernel(Kernel):
    """What kernels over packed matrices have in common.

    Attributes:
        many: from so many inputs on a product of decoded rows is faster.
    """

    prepares = True
    many: ClassVar[int]
    #: Why a layout cannot be packed, or an empty string.
    refuses: ClassVar[Callable[[Layout], str]]

    @staticmethod
    def missing() -> str:
        return clib.why_missing()

    @classmethod
    def why_not(cls, layout: Layout, device: torch.device) -> str:
        return f"it runs on the CPU, not on {device.type}" if device.type != "cpu" else cls.refuses(layout)

    @staticmethod
    def takes(x: Tensor) -> bool:
        # Traced and wrapped tensors have no memory that C++ could read, and C++ has no gradients.
        return clib.takes(x) and not (x.requires_grad and torch.is_grad_enabled())

    @classmethod
    def linear(cls, x: Tensor, prepared: PackedMatrix) -> Tensor:
        rows = x.flatten(0, -2) if x.ndim > 1 else x.unsqueeze(0)
        # Whoever computes in float32 wants more digits than bytes have.
        if rows.shape[0] >= _MANY and x.dtype == torch.bfloat16 and prepared.has_many:
            y = prepared.many(rows.float().contiguous()).to(x.dtype)
        elif rows.shape[0] >= cls.many:
            y = decoded(rows, prepared)
        else:
            y = prepared.multiply(rows.float().contiguous()).to(x.dtype)
        return y.view(*x.shape[:-1], prepared.weight.layout.shape[0])


def _library() -> ctypes.CDLL:
    lib = clib.library()
    assert lib is not None
    return lib


def decoded(x: Tensor, matrix: PackedMatrix) -> Tensor:
    """W x + bias for ``x`` [n, in], blocks of rows as dense matrices: in bfloat16 if ``x`` is, else in float32."""
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


def transform_of(weight: VQWeight) -> tuple[int, int | None]:
    """Block of the input transform and address of its signs, as the library wants them."""
    transform = weight.layout.transform
    return (transform.input, weight.tensors["input_signs"].data_ptr()) if transform else (0, None)
