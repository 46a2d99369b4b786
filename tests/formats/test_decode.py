"""VQWeight.dequantize against the independent decoder, for layouts over all options."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.strategies import layouts, random_weight, raw
from octavo.weight import Layout
from oracle.decode import decode


def largest(weight_layout: Layout, matrix: np.ndarray) -> float:
    """Scale of the rounding errors: grids and zero points cancel, so the intermediate values count too."""
    block = weight_layout.block_scale
    grid = 1 << weight_layout.stages[0] if weight_layout.codebook_dtype == "grid" else 1
    zero = 1 << block.zero_bits if block else 1
    return float(np.abs(matrix).max()) + 128.0 * (grid + zero)


@settings(max_examples=150, deadline=None)
@given(layout=layouts(), seed=st.integers(0, 2**31))
def test_dequantize_equals_the_independent_decoder(layout: Layout, seed: int) -> None:
    weight = random_weight(layout, seed)
    wanted = decode(layout.to_dict(), raw(weight))
    double = weight.dequantize(torch.float64).numpy()
    single = weight.dequantize().numpy()
    assert double.shape == layout.shape
    scale = largest(layout, wanted)
    np.testing.assert_allclose(double, wanted, rtol=0, atol=1e-13 * scale)
    np.testing.assert_allclose(single, wanted, rtol=0, atol=1e-5 * scale)


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
