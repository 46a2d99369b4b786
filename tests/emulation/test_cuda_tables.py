"""The CUDA kernel for codebooks per tile, emulated on the CPU, held to float64; and compiled for every processor."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch

from emulation.device import Emulator, emulator
from emulation.test_cuda_lookup import ARCHITECTURES, emulated
from formats.strategies import random_weight
from octavo._core import cuda
from octavo.algorithms.gptvq import GPTVQ
from octavo.kernels import _gpu, cuda_tables
from octavo.kernels.cuda_tables import TableMatrix, plan, shape_of, shapes
from octavo.layout import BlockScale, Layout
from octavo.weight import VQWeight
from ops.products import error, multiplied

#: Tall tiles and those of single rows, tiles that begin within a lane's rows, widths that no step and no tile divides.
LAYOUTS = {
    "v1 k4, a book per row": Layout((37, 70), 1, (2,), "row", codebook_dtype="int8", tile=(1, 64), bias=True),
    "v1 k8, log2 scales": Layout(
        (50, 96), 1, (3,), "row", codebook_dtype="int8", tile=(8, 32), block_scale=BlockScale(16, 0, 4)
    ),
    "v2 k4, a book per row": Layout((40, 64), 2, (2,), "row", codebook_dtype="int8", tile=(1, 32)),
    "v2 k16, order": Layout((67, 300), 2, (4,), "row", codebook_dtype="int8", tile=(9, 256), permuted=True, bias=True),
    "v2 k64, scales": Layout((130, 90), 2, (6,), "row", tile=(17, 44), block_scale=BlockScale(30)),
    "v4 k256, tall, log2 scales": Layout(
        (1100, 72), 4, (8,), "row", codebook_dtype="int8", tile=(1100, 8), block_scale=BlockScale(40, 0, 4)
    ),
    "v4 k256, bfloat16 scales": Layout(
        (99, 201), 4, (8,), "row", codebook_dtype="float16", side_dtype="bfloat16", block_scale=BlockScale(201)
    ),
    "v8 k4096, tall": Layout(
        (70, 176), 8, (12,), "row", codebook_dtype="int8", tile=(70, 88), block_scale=BlockScale(64, 0, 4)
    ),
    "v8 k512": Layout((150, 61), 8, (9,), "row", codebook_dtype="bfloat16", tile=(64, 8), bias=True),
    "v1 of a basis": Layout((33, 40), 1, (3,), "row", codebook_dtype="int8", tile=(4, 40), codebook_rank=2),
    "v4 int4": Layout((33, 40), 4, (4,), "row", codebook_dtype="int4", tile=(16, 40)),
}


def matrix(weight: VQWeight, processors: int = 1, blocks: int = 2) -> TableMatrix:
    made = TableMatrix(weight, Emulator(emulator(shape_of(weight.layout)).run, blocks))
    made.processors = processors
    return made


@emulated
@pytest.mark.parametrize("name", LAYOUTS)
def test_products_are_those_of_the_decoded_matrix(name: str) -> None:
    layout = LAYOUTS[name]
    assert cuda_tables.why_not(layout) == ""
    weight = random_weight(layout, seed=3)
    packed, x = matrix(weight), torch.randn(7, layout.shape[1])
    wanted = multiplied(weight, x)
    assert error(packed.multiply(x), wanted) < 1e-6
    assert error(matrix(weight, processors=7).multiply(x), wanted) < 1e-6
    assert error(packed.multiply_many(x), wanted) < 1e-6
    for dtype, limit in ((torch.float16, 1e-3), (torch.bfloat16, 6e-3)):
        y = packed.multiply(x.to(dtype))
        assert y.dtype == dtype
        assert error(y, multiplied(weight, x.to(dtype))) < limit
        assert error(packed.multiply_many(x.to(dtype)), multiplied(weight, x.to(dtype))) < limit


@emulated
def test_blocks_of_rows_are_decoded_as_the_whole_matrix_is() -> None:
    weight = random_weight(LAYOUTS["v2 k64, scales"], seed=8)
    packed = matrix(weight)
    assert error(packed.decoded(64, 130, torch.float32), weight.dequantize(torch.float64)[64:130]) < 1e-6
    every = packed.decoded(0, 130, torch.float32)
    assert torch.equal(packed.decoded(64, 128, torch.bfloat16), every[64:128].bfloat16())


@emulated
def test_results_do_not_depend_on_the_number_of_tokens() -> None:
    weight = random_weight(LAYOUTS["v2 k16, order"], seed=4)
    x, packed = torch.randn(7, 300), matrix(weight)
    assert error(packed.multiply(x), torch.cat([packed.multiply(row[None]) for row in x]).double()) < 1e-6


@emulated
def test_nan_and_infinity_reach_every_output() -> None:
    weight = random_weight(LAYOUTS["v2 k64, scales"], seed=5)
    x = torch.randn(2, 90)
    x[0, 89], x[1, 0] = math.nan, math.inf
    assert not bool(matrix(weight).multiply(x).isfinite().any())


@emulated
def test_codes_lie_beyond_2_31_bytes() -> None:
    """Memory that nobody touches takes none."""
    packed = matrix(random_weight(Layout((32, 4096), 4, (8,), "row"), seed=7))
    wanted, words = packed.decoded(0, 32, torch.float32), 2**31 // 4096 + 64
    codes = torch.empty(1024, words, dtype=torch.int32)
    codes[:, -8:] = packed.codes
    packed.argument.codes, packed.argument.words, packed.argument.rows = codes.data_ptr(), words, 4 * words
    packed.argument.tile_rows = 4 * words
    assert torch.equal(packed.decoded(4 * words - 32, 4 * words, torch.float32), wanted)


def test_plans_fit_shared_memory_and_prefer_many_rows() -> None:
    for name, layout in LAYOUTS.items():
        for count in (1, 2, 4):
            found = plan(layout, count)
            assert found is None or (found.shared <= 48 * 1024 and 1 <= found.step <= 8), name
    tall = plan(replace(LAYOUTS["v4 k256, tall, log2 scales"], shape=(4096, 4096), tile=(4096, 8)), 1)
    assert tall is not None and (tall.threads, tall.step) == (256, 8)


def test_it_takes_all_that_gptvq_makes_of_a_large_matrix() -> None:
    """Of the settings that are published, and of those that are chosen."""
    for preset in GPTVQ.presets.values():
        for layout in GPTVQ(**preset).candidates((4096, 4096), False):
            assert cuda_tables.why_not(layout) == "", layout
    chosen = [c for c in GPTVQ(bits=2.25).candidates((4096, 4096), False) if 2.0 < c.bits_per_weight <= 2.25]
    assert chosen and all(cuda_tables.why_not(layout) == "" for layout in chosen)


def test_what_it_cannot_run_is_said() -> None:
    assert "column vectors" in cuda_tables.why_not(Layout((16, 64), 4, (8,), "column"))
    assert "scales that cut vectors" in cuda_tables.why_not(
        replace(LAYOUTS["v4 int4"], block_scale=BlockScale(6), tile=None)
    )
    narrow = Layout((64, 64), 4, (12,), "row", tile=(1, 64))
    assert "so many entries for so few rows" in cuda_tables.why_not(narrow)
    assert "not on cpu" in cuda_tables.CudaTables.why_not(LAYOUTS["v4 int4"], torch.device("cpu"))


@pytest.mark.skipif(bool(cuda.why_no_compiler()), reason=cuda.why_no_compiler())
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_program_compiles_without_spilling_registers(architecture: str) -> None:
    # The longest vectors need the most registers.
    for shape in (shape for shape in shapes() if shape.vector == 8):
        binary, log = cuda.compile_program(_gpu.source("tables"), shape.macros(), architecture, report=True)
        assert binary[:4] == b"\x7fELF"
        assert not [spill for spill in re.findall(r"(\d+) bytes spill", log) if spill != "0"], log
