"""The CPU kernel that looks products up, held to float64 on every instruction set, odd shapes and many threads."""

from __future__ import annotations

import copy
import gc
import math
import pickle
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from formats.strategies import layouts, random_weight
from octavo import codebooks
from octavo._core import clib
from octavo._core.errors import UsageError
from octavo.kernels import _packed, lookup, select
from octavo.kernels.lookup import pack
from octavo.layout import BlockScale, Layout, Transform
from octavo.nn import VQLinear
from octavo.weight import VQWeight
from ops.products import error, isas, multiplied

pytestmark = pytest.mark.skipif(clib.library() is None, reason=f"no C++ library: {clib.why_missing()}")
CPU = torch.device("cpu")
#: Of the relative RMS error; activations rounded to int8 would cost five times as much.
LIMIT = 2e-3
#: Books of codes of 4, 6 and 8 bits, and of fewer that are stored as those.
STAGES = ((8,), (8, 8), (8, 4), (8, 6), (8, 8, 4), (8, 8, 8), (8, 8, 8, 8), (6,), (4, 4), (3,), (5, 7), (1, 2))


def row_layout(shape: tuple[int, int], v: int, stages: Sequence[int], block: int = 0, *, bias: bool = False) -> Layout:
    scale = BlockScale(block or shape[1], 0, 8)
    transform = shape[1] & -shape[1]
    return Layout(
        shape,
        v,
        tuple(stages),
        direction="row",
        codebook_dtype="int8",
        side_dtype="float32",
        block_scale=scale,
        bias=bias,
        transform=Transform(min(transform, 64)) if transform > 1 else None,
    )


def universal_layout(name: str, shape: tuple[int, int], *, bias: bool = False) -> Layout:
    book = codebooks.get(name)
    return Layout(
        shape,
        book.vector_length,
        book.stages,
        direction="row",
        codebook_dtype="universal",
        codebook=book.name,
        block_scale=BlockScale(shape[1], 0, 8),
        bias=bias,
        transform=Transform(64),
    )


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("v", [1, 2, 4, 8])
def test_products_are_those_of_the_decoded_matrix(v: int, stages: tuple[int, ...]) -> None:
    """Far inside the rounding of int8 activations, which costs about 1e-2."""
    generator = torch.Generator().manual_seed(v)
    for shape, block in (((70, 96), 0), ((64, 8), 0), ((129, 40), 8), ((576, 24), 16), ((1, 13), 0), ((33, 8 * v), 0)):
        weight = random_weight(row_layout(shape, v, stages, block, bias=shape[0] % 2 == 0), seed=shape[0])
        matrix, wanted = pack(weight), None
        for n in (1, 2, 9):
            x = torch.randn(n, shape[1], generator=generator)
            wanted = multiplied(weight, x)
            for isa in isas():
                for threads in (1, 3):
                    # The products of a single sum may cancel; what they were rounded by does not.
                    limit = LIMIT if n * shape[0] > 1 else 10 * LIMIT
                    assert error(matrix.multiply(x, threads, isa), wanted) < limit, (shape, n, isa, threads)


def test_every_element_of_the_output_is_written() -> None:
    lib = clib.library()
    assert lib is not None
    weight = random_weight(row_layout((200, 64), 8, (8, 8), bias=True))
    matrix, x = pack(weight), torch.randn(3, 64)
    for isa in isas():
        y = torch.full((3, 200), math.nan)
        assert clib.call(lib.octavo_matrix_multiply, matrix.handle, x.data_ptr(), 3, y.data_ptr(), 2, isa) == clib.OK
        assert error(y, multiplied(weight, x)) < LIMIT


@pytest.mark.parametrize("name", [n for n in codebooks.names() if "signs" not in n and "k4096" not in n])
def test_universal_codebooks_run_packed(name: str) -> None:
    layout = universal_layout(name, (192, 576))
    weight, x = random_weight(layout, scale=0.1), torch.randn(1, 576)
    assert error(pack(weight).multiply(x), multiplied(weight, x)) < LIMIT


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(layout=layouts(), seed=st.integers(0, 2**31), n=st.sampled_from([0, 1, 3, 17]))
def test_whatever_the_kernel_takes_it_multiplies_right(layout: Layout, seed: int, n: int) -> None:
    if lookup.why_not(layout):
        return
    weight = random_weight(layout, seed, scale=0.3)
    x = torch.randn(n, layout.shape[1], generator=torch.Generator().manual_seed(seed))
    wanted, y = multiplied(weight, x), lookup.LookUp.linear(x, pack(weight))
    # A bound that holds if products cancel: what is rounded are the products, not their sum.
    scale = functional.linear(x.double().abs(), weight.dequantize(torch.float64).abs()).sum(dim=1, keepdim=True)
    assert y.shape == wanted.shape
    assert bool(((y.double() - wanted).abs() <= LIMIT * scale + 1e-6).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_prompts_are_multiplied_as_decoded_rows(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of rows, the last one short, the bias added; exact for float32 up to the order of additions."""
    monkeypatch.setattr(_packed, "_DECODED", 128 * 96)
    weight = random_weight(row_layout((330, 96), 4, (8, 6), bias=True), scale=0.1)
    x = torch.randn(2, 60, 96).to(dtype)
    y = lookup.LookUp.linear(x, pack(weight))
    assert y.dtype == dtype and y.shape == (2, 60, 330)
    limit = 1e-5 if dtype == torch.float32 else 1.5e-2
    assert error(y, multiplied(weight, x)) < limit


@pytest.mark.skipif(not isas() or isas()[-1] < 4, reason="the processor has no AVX-512 VBMI and VNNI")
@pytest.mark.parametrize("name", ["v8-k256", "v8-k256-16", "v8-k256-256", "v8-k256-256-256", "v4-k256", "v4-k256-256"])
def test_prompts_in_bytes_lose_a_hundredth(name: str) -> None:
    """Rows that fill no tile, groups of inputs that are not full, every number of vectors at once, biases."""
    generator = torch.Generator().manual_seed(2)
    for shape in ((130, 1536), (64, 192), (5, 64), (33, 320)):
        weight = random_weight(universal_layout(f"gaussian-{name}", shape, bias=shape[0] > 1), scale=0.1)
        matrix = pack(weight)
        assert matrix.has_many
        for n in (1, 2, 3, 5, 20):
            # Tokens differ in size by orders of magnitude.
            x = torch.randn(n, shape[1], generator=generator) * 10 ** torch.randn(n, 1, generator=generator)
            wanted, y = multiplied(weight, x), matrix.many(x, 1)
            assert max(error(y[i], wanted[i]) for i in range(n)) < 4e-2 and error(y, wanted) < 2e-2
            assert torch.equal(y, matrix.many(x, 3))


@pytest.mark.skipif(not isas() or isas()[-1] < 4, reason="the processor has no AVX-512 VBMI and VNNI")
def test_prompts_in_bytes_write_every_element_and_keep_bad_inputs_apart() -> None:
    lib = clib.library()
    assert lib is not None
    weight = random_weight(universal_layout("gaussian-v8-k256-256", (70, 256)), scale=0.1)
    matrix, x = pack(weight), torch.randn(5, 256)
    x[1, 3], x[3, 200], x[4] = math.nan, math.inf, 0.0
    y = torch.full((5, 70), math.nan)
    assert clib.call(lib.octavo_matrix_many, matrix.handle, x.data_ptr(), 5, y.data_ptr(), 2) == clib.OK
    assert error(y[[0, 2]], multiplied(weight, x[[0, 2]])) < 1.5e-2
    assert not bool(torch.isfinite(y[[1, 3]]).any())
    assert torch.equal(y[4], torch.zeros(70))
    assert lib.octavo_matrix_many(matrix.handle, x.data_ptr(), -1, y.data_ptr(), 1) == clib.BAD_ARGUMENT
    assert matrix.many(x[:0]).shape == (0, 70)


def test_only_bfloat16_with_a_transform_is_rounded_to_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(universal_layout("gaussian-v8-k256-256", (70, 256)), scale=0.1)
    plain = VQWeight(
        replace(weight.layout, transform=None), {k: t for k, t in weight.tensors.items() if k != "input_signs"}
    )
    assert not pack(plain).has_many
    asked: list[int] = []
    monkeypatch.setattr(_packed.PackedMatrix, "many", lambda self, x: asked.append(len(x)) or self.multiply(x))
    for dtype, n in ((torch.float32, 30), (torch.bfloat16, 30), (torch.bfloat16, 3)):
        lookup.LookUp.linear(torch.randn(n, 256).to(dtype), pack(weight))
    assert asked == ([30] if isas() and isas()[-1] >= 4 else [])


def test_decoded_rows_and_transformed_inputs_are_the_matrix() -> None:
    weight = random_weight(row_layout((130, 96), 8, (8, 8, 4), 32))
    matrix, x = pack(weight), torch.randn(5, 96)
    rows = torch.cat([matrix.rows(first, min(first + 64, 130), torch.float32) for first in (0, 64, 128)])
    assert error(matrix.transformed(x) @ rows.T, multiplied(weight, x)) < 1e-6
    assert torch.equal(matrix.rows(64, 130, torch.bfloat16), rows[64:].bfloat16())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_input_spoils_its_own_outputs_and_no_others(bad: float) -> None:
    weight = random_weight(row_layout((70, 64), 8, (8, 8)))
    x = torch.randn(3, 64)
    x[1, 5] = bad
    for isa in isas():
        y = pack(weight).multiply(x, 1, isa)
        assert not bool(torch.isfinite(y[1]).any())
        assert error(y[[0, 2]], multiplied(weight, x[[0, 2]])) < LIMIT


def test_zeros_give_the_bias() -> None:
    weight = random_weight(row_layout((70, 64), 8, (8, 8), bias=True))
    assert weight.bias is not None
    for isa in isas():
        y = pack(weight).multiply(torch.zeros(2, 64), 2, isa)
        assert torch.equal(y, weight.bias.float().expand(2, 70))


def test_large_and_small_inputs_keep_their_digits() -> None:
    weight = random_weight(row_layout((70, 640), 8, (8, 8)))
    x = torch.randn(4, 640) * torch.tensor([1e-15, 1e-6, 1e6, 1e15]).unsqueeze(1)
    y, wanted = pack(weight).multiply(x), multiplied(weight, x)
    for row in range(4):
        assert error(y[row], wanted[row]) < LIMIT


def test_one_large_input_leaves_the_others_their_digits() -> None:
    """No integer of x overflows."""
    weight = random_weight(row_layout((70, 640), 8, (8, 8)))
    plain = VQWeight(
        replace(weight.layout, transform=None), {k: t for k, t in weight.tensors.items() if k != "input_signs"}
    )
    x = torch.ones(2, 640)
    x[0, 100] = 1e4
    x[1, :100], x[1, 101:] = 0.0, 0.0
    for isa in isas():
        assert error(pack(plain).multiply(x, 1, isa), multiplied(plain, x)) < LIMIT


@pytest.mark.parametrize("threads", [1, 2, 5, 64])
def test_threads_change_nothing_but_the_rounding(threads: int) -> None:
    weight = random_weight(row_layout((1300, 768), 8, (8, 8)))
    matrix, x = pack(weight), torch.randn(2, 768)
    y = matrix.multiply(x, threads)
    assert torch.equal(y, matrix.multiply(x, threads))
    assert error(y, matrix.multiply(x, 1).double()) < 1e-5


def test_bad_arguments_are_refused_by_the_library() -> None:
    lib = clib.library()
    assert lib is not None
    matrix = pack(random_weight(row_layout((70, 64), 8, (8, 8))))
    x, y = torch.zeros(1, 64), torch.zeros(1, 70)
    for n, threads, isa in ((-1, 1, 0), (1, 0, 0), (1, 1, 9)):
        status = lib.octavo_matrix_multiply(matrix.handle, x.data_ptr(), n, y.data_ptr(), threads, isa)
        assert status == clib.BAD_ARGUMENT
    assert lib.octavo_matrix_decode(matrix.handle, 32, 64, 0, y.data_ptr(), 1) == clib.BAD_ARGUMENT
    lib.octavo_matrix_destroy(None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"direction": "column"}, "column vectors"),
        ({"vector_length": 3}, "vectors of 3"),
        ({"stages": (9,)}, "above 256"),
        ({"sign_bits": True}, "sign bits"),
        ({"tile": (8, 8)}, "per tile"),
        ({"channel_norm": "input"}, "channel norms"),
        ({"permuted": True}, "order"),
        ({"block_scale": BlockScale(12)}, "cut vectors"),
        ({"block_scale": BlockScale(16, 4)}, "zero points"),
        ({"transform": Transform(0, 8)}, "outputs"),
    ],
)
def test_what_it_cannot_run_it_says(change: dict[str, object], reason: str) -> None:
    options = {"vector_length": 8, "stages": (8, 8), "direction": "row"} | change
    layout = Layout((64, 48), **options)  # type: ignore[arg-type]
    assert reason in lookup.why_not(layout)
    assert select.choose(layout, CPU)[0] != "lookup"


# ------------------------------------------------------------------------------------------------ in a layer


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> VQLinear:
    monkeypatch.delenv(select.ENVIRONMENT, raising=False)
    return VQLinear.from_weight(random_weight(row_layout((70, 64), 8, (8, 8), bias=True)))


def test_a_layer_prepares_its_matrix_once_and_anew_when_it_changes(layer: VQLinear) -> None:
    x = torch.randn(2, 64)
    first = layer.prepared()
    assert error(layer(x), multiplied(layer.vq_weight(), x)) < LIMIT
    assert layer.prepared() is first
    layer.bias.add_(1.0)  # type: ignore[union-attr, operator]
    assert layer.prepared() is not first
    assert error(layer(x), multiplied(layer.vq_weight(), x)) < LIMIT
    other = random_weight(layer.layout, seed=5)
    layer.load_state_dict(dict(other.tensors))
    assert error(layer(x), multiplied(other, x)) < LIMIT


def test_copies_and_pickles_prepare_for_themselves(layer: VQLinear) -> None:
    x = torch.randn(2, 64)
    y = layer(x)
    twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    del layer
    gc.collect()
    for twin in twins:
        assert torch.equal(twin(x), y)


def test_gradients_reach_the_inputs_of_a_packed_layer(layer: VQLinear) -> None:
    x = torch.randn(3, 64, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, layer.vq_weight().dequantize().sum(0).expand(3, 64), rtol=1e-4, atol=1e-3)


def test_a_traced_layer_is_the_reference(layer: VQLinear) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert VQLinear(layer.layout)(torch.randn(2, 64)).shape == (2, 70)


@pytest.mark.parametrize("name", ["gaussian-v8-k256-16", "gaussian-v8-k256-256", "gaussian-v4-k256-256-256"])
def test_single_rows_times_one_input_are_those_of_the_matrix(name: str) -> None:
    """Repeated rows too, without the bias; a row that is not there is refused, and the torch path says the same."""
    layout = universal_layout(name, (150, 128), bias=True)
    weight = random_weight(layout, 3)
    x, index = torch.randn(128, generator=torch.Generator().manual_seed(0)), torch.tensor([149, 0, 7, 7, 64])
    wanted = weight.dequantize(torch.float64)[index] @ x.double()
    packed = pack(weight)
    for threads in (1, 3):
        assert error(packed.rows_times(index, x, threads), wanted) < LIMIT
    assert packed.rows_times(index[:0], x).shape == (0,)
    with pytest.raises(UsageError, match=r"0\.\.149"):
        packed.rows_times(torch.tensor([150]), x)
    layer = VQLinear.from_weight(weight)
    assert error(layer.rows_times(index, x), wanted) < LIMIT
    # Inputs with a gradient are not the library's.
    assert error(layer.rows_times(index, x.requires_grad_()).detach(), wanted) < LIMIT
