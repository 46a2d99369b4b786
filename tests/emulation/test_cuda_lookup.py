"""The CUDA kernels, emulated on the CPU, held to float64; and compiled for every processor where NVRTC is installed."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import replace

import pytest
import torch

from emulation.device import COMPILER, Emulator, emulator
from formats.strategies import random_weight
from octavo import codebooks
from octavo._core import cuda
from octavo._core.errors import UsageError
from octavo.kernels import _gpu, cuda_lookup
from octavo.kernels.cuda_lookup import LookUpMatrix, shape_of, shapes
from octavo.layout import BlockScale, Layout, Transform
from octavo.weight import VQWeight
from ops.products import error, multiplied

emulated = pytest.mark.skipif(
    COMPILER is None or sys.platform != "linux",
    reason="emulation wants a C++ compiler, and coroutines as Linux has them",
)
BOOKS = ("gaussian-v8-k256-256", "gaussian-v8-k256", "gaussian-v8-k256-256-16", "gaussian-v4-k256-64")
BOOKS += ("gaussian-v4-k256-256", "gaussian-v8-k256-256-256", "gaussian-v8-k256-signs", "gaussian-v4-k256-signs")
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
#: Of the relative RMS error where inputs are rounded to bytes.
LIMIT = 1e-2


def weight_of(name: str, shape: tuple[int, int], *, bias: bool = False, seed: int = 0) -> VQWeight:
    book, block = codebooks.get(name), math.gcd(shape[1], 256)
    layout = Layout(
        shape,
        book.vector_length,
        book.stages,
        direction="row",
        codebook_dtype="universal",
        sign_bits=book.sign_bits,
        codebook=name,
        block_scale=BlockScale(shape[1], 0, 8),
        bias=bias,
        transform=Transform(block) if block > 1 else None,
    )
    return random_weight(layout, seed=seed)


def matrix(weight: VQWeight, blocks: int = 2) -> LookUpMatrix:
    return LookUpMatrix(weight, Emulator(emulator(shape_of(weight.layout)).run, blocks))


@emulated
@pytest.mark.parametrize("name", BOOKS)
def test_products_are_those_of_the_decoded_matrix(name: str) -> None:
    """Widths that fill no warp, one, and several; rows that fill no group; more groups than blocks."""
    generator = torch.Generator().manual_seed(1)
    for shape in ((5, 64), (70, 576), (3, 2304), (33, 24)):
        weight = weight_of(name, shape, bias=shape[0] % 2 == 1, seed=shape[0])
        packed = matrix(weight)
        x = torch.randn(7, shape[1], generator=generator)
        wanted = multiplied(weight, x)
        assert error(packed.multiply(x), wanted) < 1e-6
        assert error(packed.multiply_many(x), wanted) < 1e-6
        rounded = packed.multiply(x.half())
        assert error(rounded, wanted) < LIMIT
        if packed.block >= 64:
            # Inputs became bytes.
            assert error(rounded, wanted) > 1e-3


@emulated
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_goes_in_and_out(dtype: torch.dtype) -> None:
    weight = weight_of(BOOKS[0], (37, 320), bias=True)
    packed, x = matrix(weight), torch.randn(3, 320).to(dtype)
    wanted = multiplied(weight, x)
    limit = 3e-3 if dtype == torch.bfloat16 else 5e-4
    assert packed.multiply(x).dtype == dtype
    assert error(packed.multiply(x, exact=True), wanted) < limit
    assert error(packed.multiply(x), wanted) < LIMIT + limit
    assert error(packed.multiply_many(x), wanted) < 2 * limit


@emulated
def test_conversions_are_those_of_torch() -> None:
    """Every half and bfloat16 number, and floats between and beyond them, infinite and not a number."""
    packed = matrix(weight_of("gaussian-v8-k256", (4, 256)))
    packed.block, packed.signs = 1, torch.ones(1)
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(1 << 16).to(torch.int32).to(torch.uint16).view(dtype).view(-1, 256)
        assert torch.equal(packed.rotated(every).nan_to_num(7e30), every.float().nan_to_num(7e30)), dtype
    # Decoded with scales as they come, a row of ones: what a float becomes.
    floats = torch.cat(
        [torch.randn(3000).mul_(10.0 ** torch.randint(-9, 7, (3000,))), torch.tensor([65519.9, 65520.0])]
    )
    floats = torch.cat([floats, torch.tensor([math.nan, math.inf, -math.inf, 0.0, 6e-8, 2.9e-8, 3.39e38])])
    packed = matrix(weight_of("gaussian-v8-k256", (floats.numel(), 8)))
    packed.scales.copy_(floats)
    packed.books.fill_(1)
    packed.argument.units[0] = 1.0
    for dtype in (torch.float16, torch.bfloat16):
        got = packed.decoded(0, floats.numel(), dtype)[:, 0]
        assert torch.equal(got.nan_to_num(7.0, 8.0, 9.0), floats.to(dtype).nan_to_num(7.0, 8.0, 9.0)), dtype


@emulated
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_torchs_default_dtype_is_of_no_account(default: torch.dtype) -> None:
    weight, x = weight_of(BOOKS[0], (37, 320), bias=True), torch.randn(3, 320)
    wanted, before = multiplied(weight, x), torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        packed = matrix(weight)
        exact, rounded, many = packed.multiply(x), packed.multiply(x.half()), packed.multiply_many(x)
    finally:
        torch.set_default_dtype(before)
    assert error(exact, wanted) < 1e-6
    assert error(rounded, wanted) < LIMIT
    assert error(many, wanted) < 1e-6


@emulated
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_decoded_rows_are_rounded_once(dtype: torch.dtype) -> None:
    weight = weight_of(BOOKS[0], (40, 96))
    packed = matrix(weight)
    exact = packed.decoded(3, 37, torch.float32)
    assert torch.equal(packed.decoded(3, 37, dtype), exact.to(dtype))
    # Halves without range for the numbers, and numbers in their subnormal range.
    for factor in (1e6, 1e-5, 1e-9):
        packed.scales.mul_(factor)
        assert torch.equal(packed.decoded(0, 40, dtype), packed.decoded(0, 40, torch.float32).to(dtype))
        packed.scales.div_(factor)


@emulated
def test_zeros_nan_and_infinity_reach_what_they_should() -> None:
    weight = weight_of(BOOKS[0], (9, 512), bias=True)
    packed = matrix(weight)
    x = torch.randn(4, 512).half()
    x[0] = 0
    x[1, 5] = math.nan
    x[2, 300] = -math.inf
    y = packed.multiply(x)
    assert weight.bias is not None
    torch.testing.assert_close(y[0], weight.bias.half())
    assert not bool(y[1].isfinite().any())
    assert not bool(y[2].isfinite().any())
    assert error(y[3:], multiplied(weight, x[3:])) < LIMIT


@emulated
def test_results_do_not_depend_on_the_number_of_blocks_or_tokens() -> None:
    weight = weight_of(BOOKS[0], (130, 256))
    x = torch.randn(8, 256).half()
    one = matrix(weight, blocks=1).multiply(x)
    assert torch.equal(one, matrix(weight, blocks=100).multiply(x))
    assert torch.equal(one, torch.cat([matrix(weight).multiply(row[None]) for row in x]))


@emulated
def test_codes_lie_beyond_2_31_bytes() -> None:
    """Memory that nobody touches takes none."""
    packed = matrix(weight_of("gaussian-v8-k256", (16, 4096)))
    wanted, rows = packed.decoded(0, 16, torch.float32), 2**31 // 512 + 32
    plane, scales = torch.empty(rows, 512, dtype=torch.uint8), torch.empty(rows)
    plane[-16:], scales[-16:] = packed.planes[0], packed.scales
    packed.argument.codes[0], packed.argument.scales = plane.data_ptr(), scales.data_ptr()
    packed.argument.rows = rows
    assert torch.equal(packed.decoded(rows - 16, rows, torch.float32), wanted)


@emulated
def test_the_operator_is_one_that_torch_can_trace() -> None:
    weight = weight_of(BOOKS[0], (24, 64), bias=True)
    packed = matrix(weight)
    for n in (0, 1, 9):
        x = torch.randn(n, 64)
        torch.library.opcheck(_gpu.cuda_linear, (x, packed.handle, 24, False))
        x = x.view(n, 1, 64)
        assert cuda_lookup.CudaLookUp.linear(x, packed).shape == (n, 1, 24)
    with pytest.raises(UsageError, match="the matrix was freed"):
        _gpu.cuda_linear(torch.randn(1, 64), 1 << 40, 24, False)
    traced = torch.compile(lambda x: _gpu.cuda_linear(x, packed.handle, 24, True) + 1, backend="eager")
    x = torch.randn(2, 64).T.contiguous().T
    assert error(traced(x) - 1, multiplied(weight, x)) < 1e-6


def test_no_magnitude_is_zero() -> None:
    """The kernel counts on it."""
    signed = [book for book in map(codebooks.get, codebooks.names()) if book.sign_bits]
    assert signed and all(int(table.min()) > 0 for book in signed for table in book.tables)


def test_what_it_cannot_run_is_said() -> None:
    plain = weight_of(BOOKS[0], (16, 64)).layout
    assert cuda_lookup.why_not(plain) == ""
    assert "several scales per row" in cuda_lookup.why_not(replace(plain, block_scale=BlockScale(32, 0, 8)))
    learned = Layout((16, 64), 4, (8,), "column")
    assert "column vectors, codebooks that are not universal" in cuda_lookup.why_not(learned)
    assert "not on cpu" in cuda_lookup.CudaLookUp.why_not(plain, torch.device("cpu"))


@pytest.mark.skipif(bool(cuda.why_no_compiler()), reason=cuda.why_no_compiler())
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_program_compiles_without_spilling_registers(architecture: str) -> None:
    names = ("gaussian-v8-k256-256", "gaussian-v4-k256-256", "gaussian-v8-k256-256-16", "gaussian-v8-k256-signs")
    for name in (*names, "gaussian-v4-k256-signs"):
        binary, log = cuda.compile_program(_gpu.source("lookup"), shapes()[name].macros(), architecture, report=True)
        assert binary[:4] == b"\x7fELF"
        assert not [spill for spill in re.findall(r"(\d+) bytes spill", log) if spill != "0"], log
