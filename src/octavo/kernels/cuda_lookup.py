"""The CUDA kernel for universal codebooks of up to 256 centroids: they stand in shared memory (``cuda/lookup.cu``).

For up to eight inputs the codes are read once and never decoded to memory; inputs are rounded to 8 bits by groups of 32
or 64 behind their transform, or kept in float32 with ``OCTAVO_EXACT=1``. More inputs (prompts, batches) are multiplied
by blocks of decoded rows on tensor cores.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from octavo import codebooks
from octavo.codebooks import get as get_codebook
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
from octavo.layout import Layout
from octavo.math import hadamard
from octavo.weight import VQWeight

_MOST_STAGES, _MOST_BITS, _MOST_TRANSFORM = 4, 8, 256
#: Codes of a lane at a time, rows of a warp: as in the source.
_CODES, _ROWS = 8, 4
#: Inputs of a transform that makes them of similar size.
_EVEN = 64
#: Inputs that are transformed at a time.
_TOKENS = 4096


@dataclass(frozen=True)
class Shape:
    """What a program is compiled for; ``bits`` are those of the codes as the kernel reads them, 4 or 8."""

    source: ClassVar[str] = "lookup"

    vector: int
    bits: tuple[int, ...]
    signs: bool = False

    @property
    def planes(self) -> tuple[int, ...]:
        """Bits of the codes of every plane; signs are one of their own."""
        return (*self.bits, self.vector) if self.signs else self.bits

    @property
    def copies(self) -> int:
        """How often a centroid stands in shared memory: as often as no two lanes meet, or as a block has room for."""
        copies = 128 // self.vector
        while len(self.bits) * 256 * self.vector * copies > 64 * 1024:
            copies //= 2
        return copies

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a block."""
        return len(self.bits) * 256 * self.vector * self.copies

    @property
    def group(self) -> int:
        """Inputs that share a scale when they are rounded."""
        return _CODES * self.vector

    def functions(self) -> dict[str, int]:
        """The functions of the program and their bytes of shared memory."""
        products = dict.fromkeys(map(product_of, COUNTS), self.shared)
        return products | {"octavo_exact": self.shared, "octavo_rotate": 0, "octavo_decode": 0}

    def macros(self) -> dict[str, str]:
        """As the source wants them."""
        stages = {"STAGES": str(len(self.bits)), "SIGNS": str(int(self.signs))}
        return macros_of(self.vector, self.planes, self.copies) | stages


def shape_of(kind: Layout | codebooks.Codebook) -> Shape:
    """The program that a layout or a codebook needs; codes of 5 to 7 bits are kept as bytes."""
    return Shape(kind.vector_length, tuple(4 if bits <= 4 else 8 for bits in kind.stages), kind.sign_bits)


def shapes() -> Mapping[str, Shape]:
    """The programs that the universal codebooks need, by codebook."""
    books = [get_codebook(name) for name in codebooks.names()]
    fitting = [b for b in books if b.vector_length in (4, 8) and max(b.stages) <= _MOST_BITS]
    return {book.name: shape_of(book) for book in fitting}


class LookUpMatrix(GpuMatrix):
    """A weight with a universal codebook, its codes by stages, and products with it.

    Args:
        weight: of a layout that :func:`why_not` has nothing against.
        launcher: of the program; None compiles it for the weight's device.
    """

    def __init__(self, weight: VQWeight, launcher: Launcher | None = None) -> None:
        super().__init__(weight)
        layout, device = weight.layout, self.device
        self.shape = shape_of(layout)
        self.launcher = launcher or program(self.shape, device)
        codes, book = weight.codes(), get_codebook(layout.codebook)
        self.vectors = codes[0].shape[1]
        self.places = -(-self.vectors // _CODES)
        self.padded = self.places * self.shape.group
        self.planes: list[Tensor] = []
        for plane, bits in zip(codes, self.shape.planes, strict=True):
            whole = functional.pad(plane.to(torch.uint8), (0, self.places * _CODES - self.vectors))
            self.planes.append((whole[:, ::2] | whole[:, 1::2] << 4 if bits == 4 else whole).contiguous())
        self.books = torch.zeros(len(layout.stages), 256, layout.vector_length, dtype=torch.int8)
        for stage, table in enumerate(book.tables):
            self.books[stage, : table.shape[0]] = table
        self.books = self.books.to(device)
        self.scales = self.floats(self.rows).fill_(1.0)
        if layout.block_scale is not None:
            self.scales = weight.block_scales()[:, 0].contiguous()
        self.signs, self.block = self.floats(1), 1
        if layout.transform is not None:
            self.signs = hadamard.unpack_signs(weight.tensors["input_signs"], self.inputs).contiguous()
            self.block = layout.transform.input
        self.argument = _matrix_type(len(layout.stages), len(codes))(
            (ctypes.c_void_p * len(codes))(*(plane.data_ptr() for plane in self.planes)),
            self.books.data_ptr(),
            (ctypes.c_float * len(layout.stages))(*book.scales),
            self.scales.data_ptr(),
            None if self.bias is None else self.bias.data_ptr(),
            self.rows,
            self.vectors,
        )

    def multiply(self, x: Tensor, exact: bool = False) -> Tensor:
        n = x.shape[0]
        y = torch.empty(n, self.rows, dtype=x.dtype, device=x.device)
        kind, groups = ctypes.c_int(TYPES[x.dtype]), -(-self.rows // _ROWS)
        # Bytes are for inputs that have few digits anyway, and of which a transform has made numbers of similar size.
        if exact or x.dtype == torch.float32 or self.block < _EVEN:
            floats, name = self.rotated(x), "octavo_exact"
            grid = (self.blocks(self.launcher, name, groups), n)
            self._launch(name, grid, self.argument, address(floats), address(y), kind)
            return y
        rounded = torch.empty(n, self.padded, dtype=torch.int8, device=x.device)
        scales = self.floats(n, self.padded // self.shape.group)
        self._rotate(x, rounded, scales, None)
        for first, count in portions(n):
            inputs = (address(rounded[first:]), address(scales[first:]), address(y[first:]))
            name = product_of(count)
            self._launch(name, (self.blocks(self.launcher, name, groups), 1), self.argument, *inputs, kind)
        return y

    def moved(self, x: Tensor) -> tuple[Tensor, None]:
        parts = [self.rotated(part)[:, : self.inputs].to(x.dtype) for part in x.split(_TOKENS)]
        return torch.cat(parts) if len(parts) > 1 else parts[0], None

    def rotated(self, x: Tensor) -> Tensor:
        """The transform of ``x`` [n, in]: [n, padded] float32, zeros at the end."""
        floats = self.floats(x.shape[0], self.padded)
        self._rotate(x, None, None, floats)
        return floats

    def decoded(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Rows [first, last) before their transform, [rows, in]."""
        found = torch.empty(last - first, self.inputs, dtype=dtype, device=self.device)
        whole = [ctypes.c_int64(number) for number in (first, last - first, self.inputs)]
        grid = (min(-(-(last - first) * self.vectors // THREADS), 1 << 16), 1)
        kind = ctypes.c_int(TYPES[dtype])
        self._launch("octavo_decode", grid, self.argument, *whole, address(found), kind, shared=0)
        return found

    def _rotate(self, x: Tensor, rounded: Tensor | None, scales: Tensor | None, floats: Tensor | None) -> None:
        # A warp has 256 inputs.
        grid = (-(-self.padded // (THREADS // 32 * 256)), x.shape[0])
        numbers = (ctypes.c_int64(self.inputs), ctypes.c_int64(self.padded), ctypes.c_int(self.block))
        given = (address(x), ctypes.c_int(TYPES[x.dtype]), address(self.signs), *numbers)
        self._launch("octavo_rotate", grid, *given, address(rounded), address(scales), address(floats), shared=0)

    def _launch(self, name: str, grid: tuple[int, int], *arguments: Any, shared: int | None = None) -> None:
        size = self.shape.shared if shared is None else shared
        self.launcher.launch(name, grid, THREADS, size, self.stream, *arguments)


def _matrix_type(stages: int, planes: int) -> type[ctypes.Structure]:
    """``Matrix`` of the source, which has as many pointers as there are planes of codes."""
    fields = [("codes", ctypes.c_void_p * planes), ("books", ctypes.c_void_p), ("units", ctypes.c_float * stages)]
    fields += [("scales", ctypes.c_void_p), ("bias", ctypes.c_void_p)]
    fields += [("rows", ctypes.c_int64), ("vectors", ctypes.c_int64)]
    return type("Matrix", (ctypes.Structure,), {"_fields_": fields})


def why_not(layout: Layout) -> str:
    """Why the kernel cannot run a layout, or an empty string."""
    block, transform = layout.block_scale, layout.transform
    return in_words(
        {
            "column vectors": layout.direction == "column",
            f"vectors of {layout.vector_length}": layout.vector_length not in (4, 8),
            f"{len(layout.stages)} stages": len(layout.stages) > _MOST_STAGES,
            "codebooks above 256 entries": max(layout.stages) > _MOST_BITS,
            "codebooks that are not universal": not layout.codebook,
            "signs of sums": layout.sign_bits and len(layout.stages) > 1,
            "several scales per row": block is not None and block.columns < layout.shape[1],
            "zero points": block is not None and block.zero_bits > 0,
            "channel norms": layout.channel_norm != "none",
            "a stored order": layout.permuted,
            "outlier columns": layout.outliers is not None,
            "a transform of the outputs": transform is not None and transform.output > 0,
            f"transforms of more than {_MOST_TRANSFORM} inputs": transform is not None
            and transform.input > _MOST_TRANSFORM,
        }
    )


@registry.register("cuda_lookup")
class CudaLookUp(GpuKernel):
    """CUDA C++: centroids of eight bits in shared memory, the matrix stays packed."""

    rank = -1
    refuses = staticmethod(why_not)
    shapes = staticmethod(lambda layout: [shape_of(layout)])
    prepare = staticmethod(LookUpMatrix)
