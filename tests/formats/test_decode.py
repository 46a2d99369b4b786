"""VQWeight.dequantize against the independent decoder, for layouts over all options."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.strategies import layouts, random_weight, raw
from octavo.layout import BlockScale, Layout
from octavo.weight import VQWeight
from oracle.decode import decode


def largest(weight: VQWeight, matrix: np.ndarray) -> float:
    """Scale of the rounding errors: grids, zero points and terms cancel, so the intermediate values count too."""
    layout = weight.layout
    block = layout.block_scale
    grid = 1 << layout.stages[0] if layout.codebook_dtype == "grid" else 1
    zero = 1 << block.zero_bits if block else 1
    factor = max(1.0, float(weight.block_scales().abs().max())) if block and block.log2_bits else 1.0
    return float(np.abs(matrix).max()) + 128.0 * (grid + zero + layout.codebook_rank) * factor


@settings(max_examples=150, deadline=None)
@given(layout=layouts(), seed=st.integers(0, 2**31))
def test_dequantize_equals_the_independent_decoder(layout: Layout, seed: int) -> None:
    weight = random_weight(layout, seed)
    wanted = decode(layout.to_dict(), raw(weight))
    double = weight.dequantize(torch.float64).numpy()
    single = weight.dequantize().numpy()
    assert double.shape == layout.shape
    scale = largest(weight, wanted)
    np.testing.assert_allclose(double, wanted, rtol=0, atol=1e-13 * scale)
    np.testing.assert_allclose(single, wanted, rtol=0, atol=1e-5 * scale)


def _by_hand(layout: Layout, **values: list[Any]) -> list[list[float]]:
    """What both decoders make of tensors that are spelled out."""
    spec = layout.tensors()
    tensors = {name: torch.tensor(value, dtype=spec[name][0]).reshape(spec[name][1]) for name, value in values.items()}
    weight = VQWeight(layout, tensors)
    independent = decode(layout.to_dict(), raw(weight))
    np.testing.assert_allclose(independent, weight.dequantize(torch.float64).numpy(), rtol=1e-14, atol=0)
    return weight.dequantize().tolist()


def test_int4_centroids_by_hand() -> None:
    # 2 books of 2 centroids of 2: nibbles 0 1 2 3, then 8 9 14 15, less 8 and times the book's scale.
    layout = Layout((2, 2), 2, (1,), direction="row", codebook_dtype="int4", tile=(1, 2))
    books = {"codebook_0": [0xFE983210 - (1 << 32)], "codebook_scale_0": [0.5, 2.0]}
    assert _by_hand(layout, indices=[0, 0], **books) == [[-4.0, -3.5], [0.0, 2.0]]
    assert _by_hand(layout, indices=[1, 1], **books) == [[-3.0, -2.5], [12.0, 14.0]]


def test_low_rank_centroids_by_hand() -> None:
    layout = Layout((2, 2), 2, (1,), direction="row", tile=(1, 2), codebook_rank=2)
    matrix = _by_hand(
        layout,
        indices=[0, 1],
        codebook_coefficient_0=[1.0, 10.0, 2.0, -1.0],
        codebook_basis_0=[1.0, 2.0, 3.0, 4.0, 0.5, 0.25, 8.0, 16.0],
    )
    assert matrix == [[1 * 1 + 10 * 0.5, 1 * 2 + 10 * 0.25], [2 * 3 - 8, 2 * 4 - 16]]


def test_log2_scales_by_hand() -> None:
    # Grid levels 1 and 1, 1, blocks of 2 and 1 columns; codes of the rows 0, 3 in block 0 and 1, 2 in block 1.
    layout = Layout((2, 3), 1, (1,), direction="row", codebook_dtype="grid", block_scale=BlockScale(2, log2_bits=2))
    matrix = _by_hand(
        layout,
        indices=[0b111, 0b101],
        block_scale_code=[0b1100, 0b1001],
        block_scale_low=[-1.0, 4.0],
        block_scale_step=[1.0, -0.5],
    )
    assert matrix == [[0.5, 0.5, pytest.approx(2**3.5)], [4.0, 0.0, 8.0]]


@pytest.mark.parametrize("inputs", [40_000, 65_536, 65_537])
def test_permutations_beyond_int16_are_read_as_unsigned(inputs: int) -> None:
    layout = Layout(shape=(1, inputs), vector_length=1, stages=(2,), permuted=True, channel_norm="input")
    weight = random_weight(layout)
    assert weight.tensors["permutation"].dtype == (torch.int16 if inputs <= 65_536 else torch.int32)
    weight.validate()
    np.testing.assert_allclose(weight.dequantize(torch.float64).numpy(), decode(layout.to_dict(), raw(weight)))


@settings(max_examples=100, deadline=None)
@given(layout=layouts(), seed=st.integers(0, 2**31))
def test_bits_counts_every_stored_byte(layout: Layout, seed: int) -> None:
    stored = sum(len(data) for _, _, data in raw(random_weight(layout, seed)).values())
    assert layout.bits() == 8 * stored == random_weight(layout, seed).bits()
