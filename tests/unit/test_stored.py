"""Numbers to stored tensors and back: packed indices, integer and low-rank codebooks, tables of scales."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from formats.strategies import layouts, random_weight
from octavo._core.errors import NumericalError
from octavo.layout import Layout
from octavo.stored import (
    decode_codebooks,
    index_dtype_to_int64,
    log2_scale_table,
    pack_codes,
    store_codebooks,
    store_low_rank,
    to_stored,
)
from octavo.weight import VQWeight


def _books(layout: Layout, scale: float = 1.0) -> torch.Tensor:
    size = (layout.books, 1 << layout.stages[0], layout.vector_length)
    return torch.randn(size, generator=torch.Generator().manual_seed(4)) * scale


# ---------------------------------------------------------------- indices


@settings(max_examples=100, deadline=None)
@given(layout=layouts())
def test_codes_come_back_as_they_were_packed(layout: Layout) -> None:
    generator = torch.Generator().manual_seed(1)
    widths = (*layout.stages, *((layout.vector_length,) if layout.sign_bits else ()))
    parts = [torch.randint(0, 1 << width, layout.index_shape, generator=generator) for width in widths]
    weight = VQWeight(layout, {**random_weight(layout).tensors, "indices": pack_codes(layout, parts)})
    for got, wanted in zip(weight.codes(), parts, strict=True):
        assert torch.equal(got, wanted)


def test_int16_permutations_are_unsigned() -> None:
    order = torch.arange(65_536).flip(0)
    assert torch.equal(index_dtype_to_int64(order.to(torch.int16)), order)
    assert torch.equal(index_dtype_to_int64(order.to(torch.int32)), order)
    assert Layout((1, 65_536), 4, (3,), permuted=True).tensors()["permutation"][0] == torch.int16
    assert Layout((1, 65_537), 4, (3,), permuted=True).tensors()["permutation"][0] == torch.int32


# ---------------------------------------------------------------- codebooks


def test_int4_books_are_one_stream_of_nibbles() -> None:
    # 2 books of 2 centroids of 3 are 12 nibbles: the second book begins inside the first word.
    layout = Layout((6, 2), 3, (1,), codebook_dtype="int4", tile=(3, 2))
    wanted = torch.tensor([[[7, -7, 0], [1, -1, 2]], [[-7, 3, 4], [5, 6, -6]]])
    scale = torch.tensor([0.5, 0.25])
    stored = store_codebooks(layout, 0, wanted * scale.view(2, 1, 1), "q_proj")
    words = [f"{int(word) & 0xFFFFFFFF:08x}" for word in stored["codebook_0"][0]]
    # Lowest nibble first, 8 is zero, the rest of the last word is empty.
    assert words == ["b1a7981f", "00002edc"]
    assert stored["codebook_scale_0"].tolist() == [0.5, 0.25]
    assert torch.equal(decode_codebooks(layout, 0, stored), wanted * scale.view(2, 1, 1))


@pytest.mark.parametrize("side", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_integer_books_are_off_by_half_a_step_at_most(kind: str, side: str) -> None:
    layout = Layout((30, 20), 5, (4,), codebook_dtype=kind, side_dtype=side, tile=(10, 7))  # type: ignore[arg-type]
    books = _books(layout, 0.02)
    stored = store_codebooks(layout, 0, books, "q_proj")
    step = books.abs().amax(dim=(1, 2), keepdim=True) / (127 if kind == "int8" else 7)
    assert bool(((decode_codebooks(layout, 0, stored) - books).abs() <= 0.51 * step).all())


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_book_of_zeros_stays_one(kind: str) -> None:
    layout = Layout((8, 4), 4, (2,), codebook_dtype=kind, tile=(4, 4))  # type: ignore[arg-type]
    books = _books(layout)
    books[1] = 0
    stored = store_codebooks(layout, 0, books, "q_proj")
    assert bool(torch.isfinite(stored["codebook_scale_0"]).all())
    assert not bool(decode_codebooks(layout, 0, stored)[1].any())
    stored = store_codebooks(layout, 0, torch.zeros_like(books), "q_proj")
    assert not bool(decode_codebooks(layout, 0, stored).any())


@pytest.mark.parametrize(("kind", "limit"), [("float16", 2e-3), ("bfloat16", 2e-2), ("float32", 1e-6), ("int8", 2e-2)])
def test_low_rank_books_are_sums_of_scaled_bases(kind: str, limit: float) -> None:
    layout = Layout((40, 30), 4, (3,), tile=(4, 3), codebook_dtype=kind, side_dtype="float32", codebook_rank=3)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(5)
    coefficients = torch.randn(layout.books, 3, generator=generator) * torch.tensor([1.0, 30.0, 0.0])
    basis = torch.randn(3, 8, 4, generator=generator)
    stored = store_low_rank(layout, coefficients, basis, "q_proj")
    spec = layout.tensors()
    assert {name: (t.dtype, tuple(t.shape)) for name, t in stored.items()} == {name: spec[name] for name in stored}
    wanted = torch.einsum("br,rkv->bkv", coefficients, basis)
    error = (decode_codebooks(layout, 0, stored) - wanted).abs().max()
    assert float(error) < limit * float(wanted.abs().max())


def test_low_rank_parts_beyond_the_stored_dtype_are_refused() -> None:
    layout = Layout((8, 8), 4, (2,), codebook_rank=1)
    fits, too_large = torch.ones(1, 1), torch.full((1, 4, 4), 7e4)
    with pytest.raises(NumericalError, match=r"q_proj: codebook basis: 16 values are not finite in torch\.float16"):
        store_low_rank(layout, fits, too_large, "q_proj")
    with pytest.raises(NumericalError, match="q_proj: codebook coefficients: 1 values are not finite"):
        store_low_rank(layout, 7e4 * fits, too_large, "q_proj")


@pytest.mark.parametrize("factor", [1e10, 1e-12])
def test_numbers_that_cannot_be_stored_name_the_option_of_their_own_dtype(factor: float) -> None:
    floats = Layout((8, 8), 4, (2,), codebook_dtype="float16", side_dtype="bfloat16")
    integers = Layout((8, 8), 4, (2,), codebook_dtype="int8", side_dtype="float16")
    books, scales = r"Use --set codebook_dtype=bfloat16(\.|, or)", r"Use --side-dtype bfloat16(\.|, or)"
    for layout, advice in ((floats, books), (integers, scales)):
        with pytest.raises(NumericalError, match=advice):
            store_codebooks(layout, 0, _books(layout, factor), "q_proj")
    coefficients, basis = torch.ones(1, 1), torch.ones(1, 4, 4)
    layout = Layout((8, 8), 4, (2,), codebook_rank=1)
    with pytest.raises(NumericalError, match=books):
        store_low_rank(layout, factor * coefficients, basis, "q_proj")
    with pytest.raises(NumericalError, match=scales):
        store_low_rank(layout, coefficients, factor * basis, "q_proj")
    # Who does not say which it is gets both.
    with pytest.raises(NumericalError, match="--side-dtype bfloat16 .*--set codebook_dtype=bfloat16"):
        to_stored(factor * coefficients, torch.float16, "q_proj: outlier codebook")


# ---------------------------------------------------------------- scales


@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_table_of_log2_scales_is_rounded_once(bits: int, dtype: torch.dtype) -> None:
    low = torch.tensor([-7.3, 0.0, 5.1]).to(dtype)
    step = torch.tensor([0.11, 0.0, -0.07]).to(dtype)
    table = log2_scale_table(low, step, bits)
    assert table.shape == (3, 1 << bits)
    wanted = [
        [2.0 ** (a + b * code) for code in range(1 << bits)] for a, b in zip(low.tolist(), step.tolist(), strict=True)
    ]
    np.testing.assert_allclose(table.numpy(), np.array(wanted, dtype=np.float32), rtol=1.2e-7, atol=0)
    np.testing.assert_allclose(log2_scale_table(low, step, bits, torch.float64).numpy(), wanted, rtol=1e-15, atol=0)
