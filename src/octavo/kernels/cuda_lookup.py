"""The CUDA kernel for additive books of up to 256 centroids: they stand in shared memory (``cuda/lookup.cu``).

For up to eight inputs the codes are read once and never decoded to memory; inputs are rounded to 8 bits by groups of 32
or 64 behind their transform, or kept in float32 with ``OCTAVO_EXACT=1``. More inputs (prompts, batches) are multiplied
by blocks of decoded rows on tensor cores. Both are custom operators: ``torch.compile`` and CUDA graphs see one node.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from octavo import codebooks
from octavo._core import cuda
from octavo.codebooks import get as get_codebook
from octavo.kernels._packed import in_words
from octavo.kernels.select import Kernel, registry
from octavo.layout import Layout
from octavo.math import hadamard
from octavo.weight import VQWeight

#: Inputs stay in float32 instead of being rounded to bytes.
EXACT = "OCTAVO_EXACT"
_MOST_STAGES, _MOST_BITS = 4, 8
#: Codes of a lane at a time, rows of a warp, threads of a block: as in the source.
_CODES, _ROWS, _THREADS = 8, 4, 256
#: From so many inputs on rows are decoded and multiplied as a dense matrix.
_MANY = 9
#: Decoded numbers at a time: large enough for a product at full speed, small enough for the second-level cache.
_DECODED = 1 << 24
_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


#: Matrices by number, for as long as somebody holds them: operators take tensors and numbers alone.
_live: weakref.WeakValueDictionary[int, GpuMatrix] = weakref.WeakValueDictionary()
_numbers = itertools.count()


class Launcher(Protocol):
    """What runs the functions of a compiled program."""

    def launch(self, name: str, grid: tuple[int, int], threads: int, shared: int, stream: int, *arguments: Any) -> None:
        """Launch a function; see :meth:`octavo._core.cuda.Program.launch`."""
        ...


@dataclass(frozen=True)
class Shape:
    """What a program is compiled for; ``bits`` are those of the codes as the kernel reads them, 4 or 8."""

    vector: int
    bits: tuple[int, ...]

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

    def macros(self) -> dict[str, str]:
        """As the source wants them."""
        bits = ",".join(map(str, self.bits))
        return {
            "VECTOR": str(self.vector),
            "STAGES": str(len(self.bits)),
            "BITS": f"{{{bits}}}",
            "COPIES": str(self.copies),
        }


def shape_of(layout: Layout) -> Shape:
    """The program that a layout needs."""
    return Shape(layout.vector_length, tuple(4 if bits <= 4 else 8 for bits in layout.stages))


def source() -> str:
    """The CUDA source."""
    return files("octavo.kernels").joinpath("cuda/lookup.cu").read_text()


@cache
def program(shape: Shape, device: int) -> Launcher:
    """The compiled program on a CUDA device.

    Raises:
        ResourceError: no compiler, or a driver that refuses.
    """
    major, minor = torch.cuda.get_device_capability(device)
    return cuda.Program(cuda.cached_program(source(), shape.macros(), f"sm_{major}{minor}"), device)


def matrix_type(stages: int) -> type[ctypes.Structure]:
    """``Matrix`` of the source, which has as many pointers as there are stages."""
    fields = [("codes", ctypes.c_void_p * stages), ("books", ctypes.c_void_p), ("units", ctypes.c_float * stages)]
    fields += [("scales", ctypes.c_void_p), ("bias", ctypes.c_void_p)]
    fields += [("rows", ctypes.c_int64), ("vectors", ctypes.c_int64)]
    return type("Matrix", (ctypes.Structure,), {"_fields_": fields})


class GpuMatrix:
    """A weight in the kernel's order, on the device of its tensors.

    Args:
        weight: of a layout that :func:`why_not` has nothing against.
        launcher: of the program; None compiles it for the weight's device.
        blocks: blocks of threads that run at once on the device; more are not launched.
    """

    def __init__(self, weight: VQWeight, launcher: Launcher | None = None, blocks: int | None = None) -> None:
        layout, device = weight.layout, weight.tensors["indices"].device
        self.layout, self.device, self.shape = layout, device, shape_of(layout)
        #: What the operator knows it by.
        self.handle = next(_numbers)
        _live[self.handle] = self
        index = device.index or 0
        self.launcher = program(self.shape, index) if launcher is None else launcher
        # As many blocks of 64 KB of shared memory as fit, and one fewer would leave a processor idle.
        self.blocks = blocks or 3 * torch.cuda.get_device_properties(index).multi_processor_count
        self.rows, self.inputs = layout.shape
        codes = weight.codes()
        self.vectors = codes[0].shape[1]
        self.places = -(-self.vectors // _CODES)
        spare = self.places * _CODES - self.vectors
        self.planes = []
        for plane, bits in zip(codes, self.shape.bits, strict=True):
            bytes_ = functional.pad(plane.to(torch.uint8), (0, spare))
            self.planes.append((bytes_[:, ::2] | bytes_[:, 1::2] << 4 if bits == 4 else bytes_).contiguous())
        self.books, self.units = _books(weight, device)
        self.scales = torch.ones(self.rows, device=device)
        if layout.block_scale is not None:
            self.scales = weight.block_scales()[:, 0].float().contiguous()
        self.bias = None if weight.bias is None else weight.bias.float().contiguous()
        self.signs, self.block = torch.ones(1, device=device), 1
        if layout.transform is not None:
            self.signs = hadamard.unpack_signs(weight.tensors["input_signs"], self.inputs).contiguous()
            self.block = layout.transform.input
        self.argument = matrix_type(len(self.planes))(
            (ctypes.c_void_p * len(self.planes))(*(plane.data_ptr() for plane in self.planes)),
            self.books.data_ptr(),
            (ctypes.c_float * len(self.planes))(*self.units),
            self.scales.data_ptr(),
            None if self.bias is None else self.bias.data_ptr(),
            self.rows,
            self.vectors,
        )

    # ---------------------------------------------------------------- products

    def multiply(self, x: Tensor, exact: bool = False) -> Tensor:
        """W x + bias for ``x`` [n, in] on the device, contiguous; gives [n, out] in its dtype."""
        n, padded = x.shape[0], self.places * self.shape.group
        y = torch.empty(n, self.rows, dtype=x.dtype, device=x.device)
        kind = ctypes.c_int(_TYPES[x.dtype])
        if exact:
            floats = self.rotated(x)
            self._launch("octavo_exact", self._grid(n), self.argument, _at(floats), _at(y), kind)
            return y
        rounded = torch.empty(n, padded, dtype=torch.int8, device=x.device)
        scales = torch.empty(n, padded // self.shape.group, device=x.device)
        self._rotate(x, rounded, scales, None)
        first = 0
        for count in (4, 2, 1):
            while n - first >= count:
                inputs = (_at(rounded[first:]), _at(scales[first:]), _at(y[first:]))
                self._launch(f"octavo_multiply_{count}", self._grid(1), self.argument, *inputs, kind)
                first += count
        return y

    def rotated(self, x: Tensor) -> Tensor:
        """The transform of ``x`` [n, in]: [n, padded] float32, zeros at the end."""
        floats = torch.empty(x.shape[0], self.places * self.shape.group, device=x.device)
        self._rotate(x, None, None, floats)
        return floats

    def decoded(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Rows [first, last) before their transform, [rows, in]."""
        found = torch.empty(last - first, self.inputs, dtype=dtype, device=self.device)
        whole = [ctypes.c_int64(number) for number in (first, last - first, self.inputs)]
        vectors = (last - first) * self.vectors
        grid = (min(-(-vectors // _THREADS), 1 << 16), 1)
        self._launch("octavo_decode", grid, self.argument, *whole, _at(found), ctypes.c_int(_TYPES[dtype]), shared=0)
        return found

    def multiply_many(self, x: Tensor) -> Tensor:
        """:meth:`multiply` for many inputs: blocks of rows are decoded and multiplied as dense matrices."""
        moved = self.rotated(x)[:, : self.inputs].to(x.dtype)
        y = torch.empty(x.shape[0], self.rows, dtype=x.dtype, device=x.device)
        step = max(_DECODED // self.inputs, 1)
        for first in range(0, self.rows, step):
            last = min(first + step, self.rows)
            part = functional.linear(moved, self.decoded(first, last, x.dtype))
            y[:, first:last] = part if self.bias is None else part + self.bias[first:last].to(x.dtype)
        return y

    def _rotate(self, x: Tensor, rounded: Tensor | None, scales: Tensor | None, floats: Tensor | None) -> None:
        padded = self.places * self.shape.group
        # A warp has 256 inputs.
        grid = (-(-padded // (_THREADS // 32 * 256)), x.shape[0])
        numbers = (_at(self.signs), ctypes.c_int64(self.inputs), ctypes.c_int64(padded), ctypes.c_int(self.block))
        results = (_at(rounded), _at(scales), _at(floats))
        self._launch("octavo_rotate", grid, _at(x), ctypes.c_int(_TYPES[x.dtype]), *numbers, *results, shared=0)

    def _grid(self, tokens: int) -> tuple[int, int]:
        """Blocks for all groups of rows, but not more than run at once: each loads the books first."""
        groups = -(-self.rows // _ROWS)
        return min(-(-groups // (_THREADS // 32)), self.blocks), tokens

    def _launch(self, name: str, grid: tuple[int, int], *arguments: Any, shared: int | None = None) -> None:
        stream = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
        size = self.shape.shared if shared is None else shared
        self.launcher.launch(name, grid, _THREADS, size, stream, *arguments)


def _at(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _books(weight: VQWeight, device: torch.device) -> tuple[Tensor, list[float]]:
    """Books [stages, 256, v] int8, zeros behind the last centroid, and the worth of their units."""
    tables = torch.zeros(len(weight.layout.stages), 256, weight.layout.vector_length, dtype=torch.int8)
    book = get_codebook(weight.layout.codebook)
    for stage, table in enumerate(book.tables):
        tables[stage, : table.shape[0]] = table
    return tables.to(device), list(book.scales)


def why_not(layout: Layout) -> str:
    """Why the kernel cannot run a layout, or an empty string."""
    block = layout.block_scale
    return in_words(
        {
            "column vectors": layout.direction == "column",
            f"vectors of {layout.vector_length}": layout.vector_length not in (4, 8),
            f"{len(layout.stages)} stages": len(layout.stages) > _MOST_STAGES,
            "codebooks above 256 entries": max(layout.stages) > _MOST_BITS,
            "codebooks that are not universal": not layout.codebook,
            "sign bits": layout.sign_bits,
            "codebooks per tile": layout.tile is not None,
            "several scales per row": block is not None and block.columns < layout.shape[1],
            "zero points": block is not None and block.zero_bits > 0,
            "channel norms": layout.channel_norm != "none",
            "a stored order": layout.permuted,
            "outlier columns": layout.outliers is not None,
            "a transform of the outputs": layout.transform is not None and layout.transform.output > 0,
            "transforms of more than 256 inputs": layout.transform is not None and layout.transform.input > 256,
        }
    )


@registry.register("cuda")
class CudaLookUp(Kernel):
    """CUDA C++: centroids of eight bits in shared memory, the matrix stays packed."""

    rank = 20
    prepares = True
    prepare = staticmethod(GpuMatrix)

    @staticmethod
    def missing() -> str:
        if not torch.cuda.is_available() or torch.version.cuda is None:
            return "no CUDA device"
        return cuda.why_no_compiler()

    @staticmethod
    def why_not(layout: Layout, device: torch.device) -> str:
        return f"it runs on CUDA, not on {device.type}" if device.type != "cuda" else why_not(layout)

    @staticmethod
    def takes(x: Tensor) -> bool:
        return x.dtype in _TYPES and not (x.requires_grad and torch.is_grad_enabled())

    @staticmethod
    def linear(x: Tensor, prepared: GpuMatrix) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        exact = os.environ.get(EXACT) == "1"
        return cuda_linear(rows, prepared.handle, prepared.rows, exact).view(*x.shape[:-1], prepared.rows)


@torch.library.custom_op("octavo::cuda_linear", mutates_args=())
def cuda_linear(x: Tensor, handle: int, rows: int, exact: bool) -> Tensor:
    """W x + bias for ``x`` [n, in]: [n, rows] in its dtype; ``handle`` is that of a :class:`GpuMatrix`."""
    matrix, x = _live[handle], x.contiguous()
    if x.shape[0] == 0:
        return x.new_empty(0, rows)
    return matrix.multiply_many(x) if x.shape[0] >= _MANY else matrix.multiply(x, exact)


@cuda_linear.register_fake
def _(x: Tensor, handle: int, rows: int, exact: bool) -> Tensor:
    return x.new_empty(x.shape[0], rows)


def targets() -> Mapping[str, Shape]:
    """The programs that the universal codebooks need, by a name for each."""
    shapes = {}
    for name in codebooks.names():
        book = get_codebook(name)
        if not book.sign_bits and book.vector_length in (4, 8) and max(book.stages) <= _MOST_BITS:
            shapes[name] = Shape(book.vector_length, tuple(4 if bits <= 4 else 8 for bits in book.stages))
    return shapes
