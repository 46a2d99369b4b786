"""The CUDA kernels for column vectors, emulated on the CPU, held to float64; and compiled for every processor."""

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
from octavo.kernels import _gpu, cuda_gather
from octavo.kernels.cuda_gather import GatherMatrix, Shape
from octavo.layout import BlockScale, Layout, Outliers
from octavo.weight import VQWeight
from ops.products import error, multiplied

LAYOUTS = {
    "v8 4096": Layout((24, 40), 8, (12,), "column"),
    "v8 65536 + 256, norm and order": Layout(
        (61, 300), 8, (16, 8), "column", channel_norm="input", permuted=True, bias=True
    ),
    "v8 256 + 16": Layout((40, 9), 8, (8, 4), "column", codebook_dtype="bfloat16"),
    "v6, scales": Layout((20, 33), 6, (8,), "column", block_scale=BlockScale(33)),
    "v16 4096 + 4096": Layout((33, 257), 16, (12, 12), "column"),
    "outliers": Layout(
        (29, 70), 8, (12, 8), "column", channel_norm="input", permuted=True, outliers=Outliers(6, 4, 8), bias=True
    ),
}


def matrix(weight: VQWeight, blocks: int = 2) -> GatherMatrix:
    return GatherMatrix(weight, lambda shape: Emulator(emulator(shape).run, blocks))


@emulated
@pytest.mark.parametrize("name", LAYOUTS)
def test_products_are_those_of_the_decoded_matrix(name: str) -> None:
    layout = LAYOUTS[name]
    assert cuda_gather.why_not(layout) == ""
    weight = random_weight(layout, seed=3)
    packed, x = matrix(weight), torch.randn(7, layout.shape[1])
    wanted = multiplied(weight, x)
    assert error(packed.multiply(x), wanted) < 2e-6
    assert error(packed.multiply_many(x), wanted) < 2e-6
    for dtype, limit in ((torch.float16, 1e-3), (torch.bfloat16, 6e-3)):
        y = packed.multiply(x.to(dtype))
        assert y.dtype == dtype
        assert error(y, multiplied(weight, x.to(dtype))) < limit
        assert error(packed.multiply_many(x.to(dtype)), multiplied(weight, x.to(dtype))) < limit


@emulated
@pytest.mark.parametrize("name", ["v6, scales", "outliers"])
def test_blocks_of_rows_make_up_the_matrix(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(replace(LAYOUTS[name], shape=(200, LAYOUTS[name].shape[1])), seed=6)
    packed, x = matrix(weight), torch.randn(3, weight.layout.shape[1])
    monkeypatch.setattr(_gpu, "_DECODED", 1)
    assert error(packed.multiply_many(x), multiplied(weight, x)) < 2e-6


@emulated
def test_results_do_not_depend_on_the_number_of_blocks_or_tokens() -> None:
    weight = random_weight(LAYOUTS["outliers"], seed=4)
    x = torch.randn(5, 70)
    one = matrix(weight, blocks=1).multiply(x)
    assert torch.equal(one, matrix(weight, blocks=100).multiply(x))
    assert torch.equal(one, torch.cat([matrix(weight).multiply(row[None]) for row in x]))


@emulated
def test_nan_and_infinity_reach_every_output() -> None:
    weight = random_weight(LAYOUTS["v8 4096"], seed=5)
    x = torch.randn(2, 40)
    x[0, 39], x[1, 0] = math.nan, math.inf
    assert not bool(matrix(weight).multiply(x).isfinite().any())


@emulated
def test_codes_lie_beyond_2_31_bytes() -> None:
    """Memory that nobody touches takes none."""
    packed = matrix(random_weight(Layout((16, 4096), 8, (12,), "column"), seed=7))
    wanted, part = packed.decoded(0, 16, torch.float32), packed.parts[0]
    vector_rows = 2**31 // (2 * 4096) + 4
    plane = torch.empty(vector_rows, 4096, dtype=torch.uint16)
    plane[-2:] = part.planes[0]
    part.argument.codes[0], part.argument.rows = plane.data_ptr(), 8 * vector_rows
    assert torch.equal(packed.decoded(8 * vector_rows - 16, 8 * vector_rows, torch.float32), wanted)


def test_what_it_cannot_run_is_said() -> None:
    assert "row vectors" in cuda_gather.why_not(Layout((16, 64), 4, (8,), "row"))
    assert "codebooks per tile" in cuda_gather.why_not(Layout((16, 64), 8, (8,), "column", tile=(16, 32)))
    assert "not on cpu" in cuda_gather.CudaGather.why_not(LAYOUTS["v8 4096"], torch.device("cpu"))


@pytest.mark.skipif(bool(cuda.why_no_compiler()), reason=cuda.why_no_compiler())
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_program_compiles_without_spilling_registers(architecture: str) -> None:
    for shape in (
        Shape(8, (16, 8), torch.float16),
        Shape(8, (16,), torch.bfloat16),
        Shape(16, (16, 16), torch.float16),
    ):
        binary, log = cuda.compile_program(_gpu.source("gather"), shape.macros(), architecture, report=True)
        assert binary[:4] == b"\x7fELF"
        assert not [spill for spill in re.findall(r"(\d+) bytes spill", log) if spill != "0"], log
