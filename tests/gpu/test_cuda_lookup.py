"""The CUDA kernels on a GPU: against float64, inside CUDA graphs, on side streams, beyond 2^31 codes."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from emulation.test_cuda_gather import LAYOUTS
from emulation.test_cuda_lookup import BOOKS, LIMIT, weight_of
from emulation.test_cuda_tables import LAYOUTS as TILED
from formats.strategies import random_weight
from octavo.kernels import _gpu, select
from octavo.kernels.cuda_lookup import LookUpMatrix
from octavo.layout import Layout
from octavo.nn import VQLinear
from ops.products import error, multiplied

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
GPU = torch.device("cuda")


@pytest.mark.parametrize("name", BOOKS)
@pytest.mark.parametrize("shape", [(70, 576), (4096, 4096), (1000, 11008), (5, 24)])
def test_products_are_those_of_the_decoded_matrix(name: str, shape: tuple[int, int]) -> None:
    weight = weight_of(name, shape, bias=True).to(GPU)
    packed = LookUpMatrix(weight)
    for n in (1, 2, 7, 8, 300):
        x = torch.randn(n, shape[1], device=GPU)
        wanted = multiplied(weight, x)
        assert error(packed.multiply(x.half()), wanted) < LIMIT
        assert error(packed.multiply(x), wanted) < 1e-5
        assert error(packed.multiply_many(x), wanted) < 2e-3, "TF32 at most"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_layer_on_the_gpu_takes_this_kernel(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weight_of(BOOKS[0], (256, 512))
    layer = VQLinear.from_weight(weight).to(GPU)
    monkeypatch.setenv(select.ENVIRONMENT, "cuda_lookup")
    for n in (1, 64):
        x = torch.randn(n, 512, device=GPU, dtype=dtype)
        y = layer(x)
        assert y.dtype == dtype
        assert error(y.cpu(), multiplied(weight, x.cpu())) < 2 * LIMIT


@pytest.mark.parametrize(
    ("kernel", "layout"),
    [("cuda_gather", layout) for layout in LAYOUTS.values()] + [("cuda_tables", layout) for layout in TILED.values()],
)
def test_column_vectors_and_codebooks_per_tile_too(
    kernel: str, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = random_weight(layout, seed=1)
    monkeypatch.setenv(select.ENVIRONMENT, kernel)
    layer = VQLinear.from_weight(weight).to(GPU)
    for n in (1, 3, 8, 40):
        x = torch.randn(n, weight.layout.shape[1], device=GPU)
        assert error(layer(x).cpu(), multiplied(weight, x.cpu())) < 2e-3, "TF32 at most"


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("name", BOOKS)
def test_triton_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weight_of(name, (130, 576), bias=True)
    monkeypatch.setenv(select.ENVIRONMENT, "triton_lookup")
    layer = VQLinear.from_weight(weight).to(GPU)
    for n in (1, 3, 40):
        x = torch.randn(n, 576, device=GPU)
        assert error(layer(x).cpu(), multiplied(weight, x.cpu())) < 1e-5
        assert error(layer(x.bfloat16()).cpu(), multiplied(weight, x.bfloat16().cpu())) < 1e-2


def test_it_runs_in_graphs_and_on_other_streams() -> None:
    weight = weight_of(BOOKS[0], (512, 1024)).to(GPU)
    packed, x = LookUpMatrix(weight), torch.randn(1, 1024, device=GPU)
    wanted = packed.multiply(x).clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = packed.multiply(x)
    stream.synchronize()
    assert torch.equal(y, wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = _gpu.cuda_linear(x, packed.handle, 512, False)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, packed.multiply(x))
    # Functions that have not run before can be captured as well.
    x, graph = torch.randn(4, 1024, device=GPU).half(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = _gpu.cuda_linear(x, packed.handle, 512, False)
    graph.replay()
    assert torch.equal(y, packed.multiply(x))


def test_more_codes_than_32_bits_count() -> None:
    """Codes of 2^31 bytes a plane: 2^31 / 512 rows of 4,096 inputs."""
    rows = 2**31 // 512 + 8
    if torch.cuda.mem_get_info()[0] < 3 * rows * 512:
        pytest.skip("the device has no room for 2^31 codes")
    packed = LookUpMatrix(weight_of("gaussian-v8-k256", (16, 4096)).to(GPU))
    small = packed.planes[0]
    packed.planes[0] = small.repeat(-(-rows // 16), 1)[:rows].contiguous()
    packed.scales, packed.rows = packed.scales.repeat(-(-rows // 16))[:rows].contiguous(), rows
    packed.argument.codes[0], packed.argument.scales = packed.planes[0].data_ptr(), packed.scales.data_ptr()
    packed.argument.rows = rows
    x = torch.randn(1, 4096, device=GPU)
    y = packed.multiply(x)
    assert torch.equal(y[0, -8:], y[0, rows % 16 + 8 : rows % 16 + 16] if rows % 16 else y[0, 8:16])
