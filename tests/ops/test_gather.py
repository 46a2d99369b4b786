"""The CPU kernel that adds centroids up where they lie, held to float64 decoding on every instruction set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from formats.strategies import layouts, random_weight
from octavo._core import clib
from octavo.integrations.transformers import load
from octavo.kernels import gather, select
from octavo.kernels.gather import pack
from octavo.layout import BlockScale, Layout, Outliers, Transform
from octavo.runtime.decoder import NativeDecoder
from ops.products import error, isas, multiplied

pytestmark = pytest.mark.skipif(clib.library() is None, reason=f"no C++ library: {clib.why_missing()}")
#: Large books are kept in half floats.
LIMIT = 1e-3

LAYOUTS = {
    "vptq": Layout((203, 96), 8, (12, 8)),
    "vptq, all of it": Layout(
        (100, 64), 8, (10,), permuted=True, channel_norm="input", outliers=Outliers(5, 4, 6), bias=True
    ),
    "k65536": Layout((64, 80), 8, (16,)),
    "vectors of 12": Layout((100, 33), 12, (9, 9)),
    "vectors of 16": Layout((70, 20), 16, (13,), side_dtype="float32"),
    "rows": Layout((70, 100), 8, (12,), direction="row", block_scale=BlockScale(100, 0, 8), transform=Transform(4)),
    "signs": Layout((70, 96), 8, (8,), direction="row", sign_bits=True, bias=True),
    "signs of 4": Layout((33, 30), 4, (8,), direction="row", sign_bits=True),
    "ternary": Layout((9, 11), 1, (2,), direction="row"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_products_are_those_of_the_decoded_matrix(name: str) -> None:
    weight = random_weight(LAYOUTS[name], scale=0.1)
    matrix = pack(weight)
    # Books of 65,536 are rounded to bytes.
    limit = 1.2e-2 if name == "k65536" else LIMIT
    for n in (1, 3, 9):
        x = torch.randn(n, LAYOUTS[name].shape[1], generator=torch.Generator().manual_seed(n))
        wanted = multiplied(weight, x)
        for isa in isas():
            for threads in (1, 3):
                assert error(matrix.multiply(x, threads, isa), wanted) < limit, (n, isa, threads)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts_are_multiplied_as_decoded_rows(name: str, dtype: torch.dtype) -> None:
    weight, x = random_weight(LAYOUTS[name], scale=0.1), torch.randn(2, 8, LAYOUTS[name].shape[1]).to(dtype)
    y = gather.Gather.linear(x, pack(weight))
    assert y.dtype == dtype
    assert error(y, multiplied(weight, x)) < (1.2e-2 if dtype == torch.float32 else 2e-2)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(layout=layouts(), seed=st.integers(0, 2**31), n=st.sampled_from([0, 1, 3, 17]))
def test_whatever_the_kernel_takes_it_multiplies_right(layout: Layout, seed: int, n: int) -> None:
    if gather.why_not(layout):
        return
    weight = random_weight(layout, seed, scale=0.3)
    x = torch.randn(n, layout.shape[1], generator=torch.Generator().manual_seed(seed))
    wanted, y = multiplied(weight, x), gather.Gather.linear(x, pack(weight))
    scale = functional.linear(x.double().abs(), weight.dequantize(torch.float64).abs()).sum(dim=1, keepdim=True)
    assert y.shape == wanted.shape
    assert bool(((y.double() - wanted).abs() <= 2e-3 * scale + 1e-5).all())


@pytest.mark.parametrize("exponent", [-30, 0, 14])
def test_books_of_any_size_keep_their_digits_as_half_floats(exponent: int) -> None:
    layout = Layout((64, 80), 8, (13,), codebook_dtype="float32", side_dtype="float32")
    weight = random_weight(layout, scale=2.0**exponent)
    x = torch.randn(2, 80)
    assert error(pack(weight).multiply(x), multiplied(weight, x)) < LIMIT


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"vector_length": 7}, "vectors of 7"),
        ({"stages": (4, 4, 4, 4, 4)}, "5 stages"),
        ({"tile": (16, 16)}, "per tile"),
        ({"direction": "row", "block_scale": BlockScale(16)}, "several scales"),
        ({"channel_norm": "output"}, "norms of the outputs"),
        ({"direction": "row", "outliers": Outliers(2, 4, 4)}, "beside row vectors"),
        ({"transform": Transform(0, 8)}, "outputs"),
    ],
)
def test_what_it_cannot_run_it_says(change: dict[str, object], reason: str) -> None:
    options = {"vector_length": 8, "stages": (8,)} | change
    layout = Layout((64, 48), **options)  # type: ignore[arg-type]
    assert reason in gather.why_not(layout)


def test_a_vptq_model_runs_natively(
    tiny_model: Callable[[str], Path], tiny_text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from octavo.pipeline.run import quantize

    monkeypatch.delenv(select.ENVIRONMENT, raising=False)
    quantize(tiny_model("llama"), tmp_path / "out", method="vptq", bits=3, calib=tiny_text_file, samples=4, ctx=32)
    model = load(tmp_path / "out", dtype=torch.float32)[0]
    assert model.octavo_decode == "packed"
    tokens = torch.randint(3, 300, (12,))
    with torch.no_grad():
        wanted = model(tokens.unsqueeze(0)).logits[0]
    decoder = NativeDecoder(model, 16, kv_cache="float16")
    for i in range(12):
        assert float((decoder.run(tokens[i : i + 1]) - wanted[i]).abs().max()) < 5e-3 * float(wanted.abs().max())
