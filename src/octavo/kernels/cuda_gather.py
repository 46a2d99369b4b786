"""The CUDA kernel for vectors along the outputs, VPTQ's: large books are read where they lie (``cuda/gather.cu``).

Norms and order of the inputs are seen to once per product, not once per row of vectors; outlier columns are a matrix of
their own, whose sums the others are added to. Centroids and inputs are not rounded. Prompts are multiplied by blocks of
decoded rows, which takes a pass over the codes per prompt; a code is 32 bytes of the second-level cache whatever is
done with it, as much as eight decoded weights are written and read with: decoding costs twice what ``_gpu`` works out.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from octavo.kernels._gpu import (
    COUNTS,
    THREADS,
    TYPES,
    GpuKernel,
    GpuMatrix,
    Launcher,
    address,
    macros_of,
    portions,
    product_of,
    program,
)
from octavo.kernels.select import in_words, registry
from octavo.layout import DTYPES, Layout
from octavo.math.pack import unpack
from octavo.stored import index_dtype_to_int64
from octavo.weight import VQWeight

_MOST_STAGES = 4
#: Codes of a lane at a time, as in the source.
_CODES = 8
#: Inputs that are put in order at a time.
_TOKENS = 4096
_BOOKS = {torch.float16: "kFloat16", torch.bfloat16: "kBfloat16"}


@dataclass(frozen=True)
class Shape:
    """What a program is compiled for; ``bits`` are those of the codes as the kernel reads them, 8 or 16."""

    source: ClassVar[str] = "gather"

    vector: int
    bits: tuple[int, ...]
    dtype: torch.dtype

    @property
    def copies(self) -> int:
        """How often a centroid stands in shared memory: as often as no two of the lanes that are served meet."""
        copies = 1
        while 2 * copies * 2 * self.vector <= 128 and self.bits.count(8) * 256 * 2 * self.vector * 2 * copies <= 65536:
            copies *= 2
        return copies

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a block."""
        return self.bits.count(8) * 256 * 2 * self.vector * self.copies

    def functions(self) -> dict[str, int]:
        """The functions of the program and their bytes of shared memory."""
        products = dict.fromkeys(map(product_of, COUNTS), self.shared)
        return products | {"octavo_order": 4 * THREADS, "octavo_decode": 0}

    def macros(self) -> dict[str, str]:
        """As the source wants them."""
        return macros_of(self.vector, self.bits, self.copies) | {"BOOKS": _BOOKS[self.dtype]}


def shapes_of(layout: Layout) -> list[Shape]:
    """The programs that a layout needs: that of its outlier columns, if any, then that of the others."""
    dtype, specs = DTYPES[layout.codebook_dtype], [(layout.vector_length, layout.stages)]
    if (outliers := layout.outliers) is not None:
        specs.insert(0, (outliers.vector_length, (outliers.bits,)))
    return [Shape(v, tuple(8 if bits <= 8 else 16 for bits in stages), dtype) for v, stages in specs]


def shapes() -> list[Shape]:
    """The programs that published files need, and what `octavo quantize --method vptq` makes of most models."""
    stages = ((16,), (16, 8), (16, 16), (8,), (8, 8))
    return [Shape(v, bits, dtype) for v in (4, 8, 16) for bits in stages for dtype in _BOOKS]


#: Makes the launcher of a shape.
Launchers = Callable[[Shape], Launcher]


class _Part:
    """Columns with books of their own."""

    def __init__(self, shape: Shape, codes: list[Tensor], books: list[Tensor], rows: int) -> None:
        self.shape = shape
        vector_rows, columns = codes[0].shape
        self.columns, self.places = columns, -(-columns // _CODES)
        self.planes, self.books = [], []
        for plane, book, bits in zip(codes, books, self.shape.bits, strict=True):
            padded = functional.pad(plane, (0, self.places * _CODES - columns))
            self.planes.append(padded.to(torch.uint8 if bits == 8 else torch.uint16).contiguous())
            # Those of 256 are copied whole; of larger ones no code reads beyond the end.
            spare = 256 - book.shape[0] if bits == 8 else 0
            self.books.append(functional.pad(book, (0, 0, 0, spare)).contiguous())
        count = len(codes)
        pointers = ctypes.c_void_p * count
        fields = [("codes", pointers), ("books", pointers)]
        fields += [(name, ctypes.c_int64) for name in ("rows", "vector_rows", "places")]
        kind = type("Part", (ctypes.Structure,), {"_fields_": fields})
        self.vector_rows = vector_rows
        self.argument = kind(
            pointers(*(plane.data_ptr() for plane in self.planes)),
            pointers(*(book.data_ptr() for book in self.books)),
            *(rows, vector_rows, self.places),
        )


class _Ending(ctypes.Structure):
    """``Ending`` of the source."""

    _fields_ = (
        ("y", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("added", ctypes.c_void_p),
        ("type", ctypes.c_int),
    )


class GatherMatrix(GpuMatrix):
    """A weight of column vectors, its codes by stages, and products with it.

    Args:
        weight: of a layout that :func:`why_not` has nothing against.
        launchers: of the programs; None compiles them for the weight's device.
    """

    def __init__(self, weight: VQWeight, launchers: Launchers | None = None) -> None:
        super().__init__(weight)
        layout = weight.layout
        self.parts: list[_Part] = []
        found = shapes_of(layout)
        if (outliers := layout.outliers) is not None:
            codes = unpack(weight.tensors["outlier_indices"], outliers.bits, outliers.columns)
            self.parts.append(_Part(found[0], [codes], [weight.tensors["outlier_codebook"]], self.rows))
        books = [weight.codebook(stage)[0].to(found[-1].dtype) for stage in range(len(layout.stages))]
        self.parts.append(_Part(found[-1], weight.codes(), books, self.rows))
        self.launchers = [launchers(s) if launchers else program(s, self.device) for s in found]
        self.vector_rows = math.lcm(*(part.shape.vector for part in self.parts))
        order = torch.arange(self.inputs, device=self.device)
        if layout.permuted:
            order = index_dtype_to_int64(weight.tensors["permutation"])
        pieces = []
        for part in self.parts:
            mine, order = order[: part.columns], order[part.columns :]
            pieces.append(functional.pad(mine, (0, part.places * _CODES - part.columns), value=-1))
        self.order = torch.cat(pieces).to(torch.int32).contiguous()
        normed = layout.channel_norm == "input"
        self.input_scales = weight.tensors["channel_scale"].float().contiguous() if normed else None
        self.offsets = weight.tensors["channel_offset"].float().contiguous() if normed else None
        self.scales = weight.block_scales()[:, 0].contiguous() if layout.block_scale is not None else None

    def multiply(self, x: Tensor, exact: bool = False) -> Tensor:
        n, padded = x.shape[0], self.order.shape[0]
        kind = ctypes.c_int(TYPES[x.dtype])
        y = torch.empty(n, self.rows, dtype=x.dtype, device=x.device)
        moved, added = self._order(x, self.input_scales)
        sums = self.floats(n, self.rows) if len(self.parts) > 1 else None
        for first, count in portions(n):
            column, name = 0, product_of(count)
            for number, (part, launcher) in enumerate(zip(self.parts, self.launchers, strict=True)):
                ending = _Ending(None, None, None, None, kind.value)
                if number + 1 == len(self.parts):
                    ends = (y[first:], self.scales, self.bias, added[first:])
                    ending = _Ending(*(address(end).value for end in ends), kind.value)
                start = moved[first:, column:]
                total = None if sums is None else sums[first:]
                arguments = (part.argument, address(start), ctypes.c_int64(padded), address(total))
                grid = (self.blocks(launcher, name, part.vector_rows), 1)
                add = ctypes.c_int(int(number > 0))
                launcher.launch(name, grid, THREADS, part.shape.shared, self.stream, *arguments, add, ending)
                column += part.places * _CODES
        return y

    def moved(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # Norms go to the weights: an input times its norm might leave the range of half precision.
        moved, added = self._order(x, None)
        return moved.to(x.dtype), added

    def decoded(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Rows [first, last) in the order of the parts, with zeros behind each of them."""
        padded = self.order.shape[0]
        found = torch.empty(last - first, padded, dtype=dtype, device=self.device)
        column, ordered = 0, None
        if self.input_scales is not None:
            ordered = self.input_scales[self.order.clamp(min=0).long()]
        for part, launcher in zip(self.parts, self.launchers, strict=True):
            end = self.scales if part is self.parts[-1] else None
            factors = (address(None if ordered is None else ordered[column:]), address(end))
            places = (ctypes.c_int64(column), ctypes.c_int64(padded))
            sizes = (ctypes.c_int64(first), ctypes.c_int64(last - first), ctypes.c_int64(part.columns))
            blocks = -(-(-(-(last - first) // part.shape.vector) * part.places) // THREADS)
            arguments = (part.argument, *sizes, *factors, *places, address(found), ctypes.c_int(TYPES[dtype]))
            launcher.launch("octavo_decode", (min(blocks, 1 << 16), 1), THREADS, 0, self.stream, *arguments)
            column += part.places * _CODES
        return found

    def _order(self, x: Tensor, scales: Tensor | None) -> tuple[Tensor, Tensor]:
        """Inputs in the order of the parts, times their scales, [n, padded]; and what the offsets add, [n]."""
        n, padded = x.shape[0], self.order.shape[0]
        moved, added = self.floats(n, padded), self.floats(n)
        sizes = (ctypes.c_int(TYPES[x.dtype]), ctypes.c_int64(self.inputs), ctypes.c_int64(padded))
        for first in range(0, n, _TOKENS):
            part = x[first : first + _TOKENS]
            norms = (address(scales), address(self.offsets), address(moved[first:]), address(added[first:]))
            # The first block adds the offsets up.
            grid = (1 + -(-padded // THREADS), part.shape[0])
            arguments = (address(part), *sizes, address(self.order), *norms)
            self.launchers[0].launch("octavo_order", grid, THREADS, 4 * THREADS, self.stream, *arguments)
        return moved, added


def why_not(layout: Layout) -> str:
    """Why the kernel cannot run a layout, or an empty string."""
    block = layout.block_scale
    return in_words(
        {
            "row vectors": layout.direction == "row",
            f"{len(layout.stages)} stages": len(layout.stages) > _MOST_STAGES,
            f"{layout.codebook_dtype} codebooks": layout.codebook_dtype not in ("float16", "bfloat16"),
            "low-rank codebooks": layout.codebook_rank > 0,
            "codebooks per tile": layout.tile is not None,
            "sign bits": layout.sign_bits,
            "zero points": block is not None and block.zero_bits > 0,
            "several scales in a row": block is not None and block.columns < layout.main_columns,
            "scales of rows beside outlier columns": block is not None and layout.outliers is not None,
            "norms of the outputs": layout.channel_norm == "output",
            "transforms": layout.transform is not None,
        }
    )


@registry.register("cuda_gather")
class CudaGather(GpuKernel):
    """CUDA C++: column vectors whose large books lie in the second-level cache, the matrix stays packed."""

    rank = -2
    refuses = staticmethod(why_not)
    shapes = staticmethod(shapes_of)
    prepare = staticmethod(GatherMatrix)
