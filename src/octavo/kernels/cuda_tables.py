"""The CUDA kernel for row vectors with codebooks per tile, GPTVQ's: products are looked up (``cuda/tables.cu``).

The products of the inputs with every centroid of a column's codebooks are made once, in shared memory, for all rows of
a tile, in float32; rows add them up by their codes. Prompts are multiplied by blocks of decoded rows.
"""

from __future__ import annotations

import ctypes
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
    product_of,
    program,
)
from octavo.kernels.select import in_words, registry
from octavo.layout import Layout
from octavo.math.pack import unpack
from octavo.stored import index_dtype_to_int64, log2_scale_table
from octavo.weight import VQWeight

VECTORS = (1, 2, 4, 8)
WIDTHS = (2, 4, 8, 16)
#: Vector columns at a time, the number of the type of integers, warps of a block: as in the source.
_COLUMNS, _INTEGER, _WARPS = 8, 3, 8
_WORD, _MOST_ROWS = 32, 8
#: Bytes of shared memory of a block, which every processor has without being asked.
_SHARED = 48 * 1024
#: As many columns at a time are enough to hide that threads wait for each other's tables.
_ENOUGH = 4
#: Blocks of a multiprocessor that read as fast as memory does; more of them would only make more sums.
_BLOCKS = 2


@dataclass(frozen=True)
class Shape:
    """What a program is compiled for; ``bits`` are those of a code as the kernel reads it, 2, 4, 8 or 16."""

    source: ClassVar[str] = "tables"

    vector: int
    bits: int

    @property
    def lane_rows(self) -> int:
        """Rows in a word of codes."""
        return _MOST_ROWS if self.bits == 2 else _WORD // self.bits

    def functions(self) -> dict[str, int]:
        """The functions of the program and the most shared memory of each in bytes."""
        return dict.fromkeys(map(product_of, COUNTS), _SHARED) | {"octavo_finish": 0, "octavo_decode": 0}

    def macros(self) -> dict[str, str]:
        """As the source wants them."""
        return {"VECTOR": str(self.vector), "BITS": str(self.bits)}


def shape_of(layout: Layout) -> Shape:
    """The program that a layout's codes need."""
    return Shape(layout.vector_length, next(width for width in WIDTHS if layout.stages[0] <= width))


def shapes() -> list[Shape]:
    """Every program there is."""
    return [Shape(vector, width) for vector in VECTORS for width in WIDTHS]


@dataclass(frozen=True)
class Plan:
    """How a product of so many inputs is launched: threads of a block, columns at a time, bytes of shared memory."""

    threads: int
    step: int
    shared: int


def plan(layout: Layout, count: int) -> Plan | None:
    """The best plan for ``count`` inputs at a time, or None if the tables of no block fit."""
    height = layout.tile[0] if layout.tile is not None else layout.shape[0]
    lane_rows, found = shape_of(layout).lane_rows, []
    for threads in (256, 128, 64, 32):
        rows = threads * lane_rows
        # A block begins at a multiple of its rows, maybe within a tile.
        tiles = -(-rows // height) + (rows % height != 0 and height % rows != 0)
        column = min(tiles, -(-layout.shape[0] // height)) * (1 << layout.stages[0]) * 4 * count
        if step := min(_SHARED // column, _COLUMNS):
            found.append(Plan(threads, step, step * column))
    return max(found, key=lambda p: (min(p.step, _ENOUGH), p.threads), default=None)


class _Matrix(ctypes.Structure):
    """``Matrix`` of the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "books", "units", "scales", "levels", "bias")),
        *((name, ctypes.c_int) for name in ("rows", "vectors", "words", "tile_rows", "tile_vectors", "tile_columns")),
        *((name, ctypes.c_int) for name in ("scale_vectors", "entry_bits", "level_bits", "book_type", "scale_type")),
    )


class TableMatrix(GpuMatrix):
    """A weight of row vectors, its codes by columns, and products with it.

    Args:
        weight: of a layout that :func:`why_not` has nothing against.
        launcher: of the program; None compiles it for the weight's device.
    """

    def __init__(self, weight: VQWeight, launcher: Launcher | None = None) -> None:
        super().__init__(weight)
        self.layout = layout = weight.layout
        self.shape = shape_of(layout)
        self.launcher = launcher or program(self.shape, self.device)
        plans = {count: plan(layout, count) for count in COUNTS}
        self.plans = {count: found for count, found in plans.items() if found is not None}
        codes, v = weight.codes()[0], layout.vector_length
        self.vectors = codes.shape[1]
        self.codes = _words(codes, self.shape)
        self.books, self.units = _books(weight)
        self.scales, self.levels = _scales(weight)
        self.order = index_dtype_to_int64(weight.tensors["permutation"]) if layout.permuted else None
        block, (tile_rows, tile_columns) = layout.block_scale, layout.tile or (self.rows, self.vectors * v)
        self.argument = _Matrix(
            *(address(t).value for t in (self.codes, self.books, self.units, self.scales, self.levels, self.bias)),
            *(self.rows, self.vectors, self.codes.shape[1]),
            *(tile_rows, tile_columns // v, layout.books_shape[1]),
            # A scale of all columns may end within the last vector, of which the rest is padding.
            -(-block.columns // v) if block is not None else self.vectors,
            *(layout.stages[0], block.log2_bits if block is not None else 0),
            *(_type_of(self.books), 0 if self.scales is None else _type_of(self.scales)),
        )

    def multiply(self, x: Tensor, exact: bool = False) -> Tensor:
        n = x.shape[0]
        y = torch.empty(n, self.rows, dtype=x.dtype, device=x.device)
        # The last vector may have more elements than there are inputs.
        moved = functional.pad(self._ordered(x.float()), (0, self.vectors * self.shape.vector - self.inputs))
        first = 0
        for count, how in self.plans.items():
            while n - first >= count:
                self._portion(moved[first : first + count].contiguous(), how, y[first : first + count])
                first += count
        return y

    def _portion(self, x: Tensor, how: Plan, y: Tensor) -> None:
        count, name = x.shape[0], product_of(x.shape[0])
        down = -(-self.rows // (how.threads * self.shape.lane_rows))
        wanted = max(self.processors * min(self.launcher.resident(name), _BLOCKS) // down, 1)
        share = -(-self.vectors // how.step // wanted) * how.step
        splits = -(-self.vectors // share)
        partial = self.floats(splits, count, self.rows)
        sizes = (ctypes.c_int(share), ctypes.c_int(how.step))
        self._launch(name, (down, splits), how, self.argument, address(x), *sizes, address(partial))
        ending = (ctypes.c_int(splits), ctypes.c_int64(self.rows), address(self.bias), address(y))
        grid = (-(-self.rows // THREADS), count)
        self._launch("octavo_finish", grid, _PLAIN, address(partial), *ending, ctypes.c_int(TYPES[y.dtype]))

    def moved(self, x: Tensor) -> tuple[Tensor, None]:
        return self._ordered(x), None

    def decoded(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        found = torch.empty(last - first, self.inputs, dtype=dtype, device=self.device)
        whole = [ctypes.c_int64(number) for number in (first, last - first, self.inputs)]
        blocks = -(-self.vectors // 32) * -(-(last - first) // (_WARPS * self.shape.lane_rows))
        kind = ctypes.c_int(TYPES[dtype])
        self._launch("octavo_decode", (min(blocks, 1 << 16), 1), _PLAIN, self.argument, *whole, address(found), kind)
        return found

    def _ordered(self, x: Tensor) -> Tensor:
        return x if self.order is None else x.index_select(1, self.order)

    def _launch(self, name: str, grid: tuple[int, int], how: Plan, *arguments: object) -> None:
        self.launcher.launch(name, grid, how.threads, how.shared, self.stream, *arguments)


_PLAIN = Plan(THREADS, 0, 0)


def _words(codes: Tensor, shape: Shape) -> Tensor:
    """Codes [rows, vectors] as words [vectors, words] of ``lane_rows`` rows each, the first lowest."""
    rows = codes.shape[0]
    padded = functional.pad(codes.T, (0, -rows % shape.lane_rows)).reshape(codes.shape[1], -1, shape.lane_rows)
    shift = torch.arange(shape.lane_rows, device=codes.device) * shape.bits
    words = (padded << shift).sum(dim=-1)
    return words.to(torch.uint16 if shape.bits == 2 else torch.int32).contiguous()


def _books(weight: VQWeight) -> tuple[Tensor, Tensor | None]:
    """The codebooks [books, entries, v] as the kernel reads them, and what their integers are worth."""
    layout = weight.layout
    if layout.codebook_rank or layout.codebook_dtype not in ("int8", "float16", "bfloat16"):
        return weight.codebook(0).contiguous(), None
    units = weight.tensors["codebook_scale_0"].float().contiguous() if layout.codebook_dtype == "int8" else None
    return weight.tensors["codebook_0"].contiguous(), units


def _scales(weight: VQWeight) -> tuple[Tensor | None, Tensor | None]:
    """The scales [blocks, rows], or their codes and the table of what those stand for."""
    block = weight.layout.block_scale
    if block is None:
        return None, None
    if not block.log2_bits:
        return weight.tensors["block_scale"].T.contiguous(), None
    low, step = weight.tensors["block_scale_low"], weight.tensors["block_scale_step"]
    codes = unpack(weight.tensors["block_scale_code"], block.log2_bits, weight.layout.shape[0])
    return codes.to(torch.uint8).contiguous(), log2_scale_table(low, step, block.log2_bits).contiguous()


def _type_of(tensor: Tensor) -> int:
    return TYPES.get(tensor.dtype, _INTEGER)


def why_not(layout: Layout) -> str:
    """Why the kernel cannot run a layout, or an empty string."""
    block = layout.block_scale
    reasons = {
        "column vectors": layout.direction == "column",
        f"vectors of {layout.vector_length}": layout.vector_length not in VECTORS,
        f"{len(layout.stages)} stages": len(layout.stages) > 1,
        "sign bits": layout.sign_bits,
        "uniform grids": layout.codebook_dtype == "grid",
        "zero points": block is not None and block.zero_bits > 0,
        "scales that cut vectors": block is not None
        and block.columns < layout.shape[1]
        and block.columns % layout.vector_length != 0,
        "channel norms": layout.channel_norm != "none",
        "outlier columns": layout.outliers is not None,
        "transforms": layout.transform is not None,
    }
    if not any(reasons.values()):
        reasons["codebooks of so many entries for so few rows"] = plan(layout, 1) is None
    return in_words(reasons)


@registry.register("cuda_tables")
class CudaTables(GpuKernel):
    """CUDA C++: products with centroids are looked up, for row vectors with codebooks per tile; stays packed."""

    rank = -2
    refuses = staticmethod(why_not)
    shapes = staticmethod(lambda layout: [shape_of(layout)])
    prepare = staticmethod(TableMatrix)
