"""The Triton kernel by Triton's interpreter, held to float64; and compiled for AMD and NVIDIA without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from emulation.test_cuda_lookup import weight_of
from octavo.kernels import triton_lookup
from octavo.kernels.triton_lookup import TritonLookUp, pack, triton_linear
from octavo.layout import Layout
from ops.products import error, multiplied

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: pip install triton")
interpreted = pytest.mark.skipif(
    find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="Triton is not installed, or does not interpret: pip install triton, TRITON_INTERPRET=1",
)
BOOKS = ("gaussian-v8-k256-256", "gaussian-v8-k256-16", "gaussian-v4-k256-64", "gaussian-v2-k16")
BOOKS += ("gaussian-v8-k256-256-256", "gaussian-v8-k256-signs", "gaussian-v4-k256-signs")


@interpreted
@pytest.mark.parametrize("name", BOOKS)
def test_products_are_those_of_the_decoded_matrix(name: str) -> None:
    """Widths that fill no tile, and several; rows that fill none."""
    for shape in ((70, 576), (33, 24)):
        weight = weight_of(name, shape, bias=shape[0] % 2 == 1, seed=shape[0])
        packed, x = pack(weight), torch.randn(17, shape[1])
        wanted = multiplied(weight, x)
        assert error(TritonLookUp.linear(x[:1], packed), wanted[:1]) < 1e-6
        assert error(TritonLookUp.linear(x[:3], packed), wanted[:3]) < 1e-6
        assert error(TritonLookUp.linear(x, packed), wanted) < 1e-6


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_goes_in_and_out(dtype: torch.dtype) -> None:
    weight = weight_of(BOOKS[0], (37, 320), bias=True)
    packed, x = pack(weight), torch.randn(3, 320).to(dtype)
    limit = 1e-2 if dtype == torch.bfloat16 else 1e-3
    # The interpreter multiplies matrices of bfloat16 as if their bits were integers.
    for n in (1,) if dtype == torch.bfloat16 else (1, 3):
        y = TritonLookUp.linear(x[:n], packed)
        assert y.dtype == dtype
        assert error(y, multiplied(weight, x[:n])) < limit
    assert TritonLookUp.linear(x.view(3, 1, 320), packed).shape == (3, 1, 37)


@interpreted
def test_the_operator_is_one_that_torch_can_trace() -> None:
    m = pack(weight_of(BOOKS[0], (24, 64), bias=True))
    rest = (m.codes, m.books, m.scales, m.bias, m.signs, m.hadamard, m.signed, m.nibbles)
    for n in (0, 1, 3):
        torch.library.opcheck(triton_linear, (torch.randn(n, 64), *rest))


_COMPILE = """
import itertools, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from octavo.kernels import _triton_kernels as kernels

backend, arch = sys.argv[1], sys.argv[2]
target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, 64 if arch == "gfx942" else 32)
for kernel, signs in itertools.product((kernels.one, kernels.many), (False, True)):
    options = {"V": 8, "STAGES": 1 if signs else 2, "NIBBLES": 0, "SIGNS": signs, "BIAS": True}
    options |= {"ROWS": 16, "VECTORS": 32} if kernel is kernels.one else {"TOKENS": 16, "ROWS": 64, "VECTORS": 8}
    pointers = {"x": "*bf16", "codes": "*u8", "books": "*fp16", "scales": "*fp32", "bias": "*fp32", "y": "*bf16"}
    signature = {name: pointers.get(name, "constexpr" if name in options else "i32") for name in kernel.arg_names}
    constants = {(kernel.arg_names.index(name),): value for name, value in options.items()}
    made = triton.compile(ASTSource(kernel, signature, constants), target=target)
    binary = made.asm["cubin" if backend == "cuda" else "hsaco"]
    assert binary[:4] == b"\\x7fELF"
    print(kernel.__name__, signs, len(binary))
"""


@needs_triton
@pytest.mark.parametrize(("backend", "arch"), [("hip", "gfx942"), ("hip", "gfx1100"), ("cuda", "80"), ("cuda", "90")])
def test_it_compiles_where_there_is_no_gpu(backend: str, arch: str) -> None:
    run = [sys.executable, "-c", _COMPILE, backend, arch]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(run, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4


def test_what_it_cannot_run_is_said() -> None:
    assert triton_lookup.why_not(weight_of(BOOKS[0], (16, 64)).layout) == ""
    assert "column vectors, codebooks that are not universal" in triton_lookup.why_not(Layout((16, 64), 4, (8,)))
    assert "not on cpu" in TritonLookUp.why_not(weight_of(BOOKS[0], (16, 64)).layout, torch.device("cpu"))
