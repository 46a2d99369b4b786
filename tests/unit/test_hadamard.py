"""The block Hadamard transform with signs, against the textbook's matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.math import hadamard
from octavo.math.hadamard import block_size, pack_signs, random_signs, unpack_signs
from oracle.universal import sylvester, transform

#: Features of layers of real models, and sizes that are nearly or not at all a power of two.
_SIZES = (1, 2, 3, 7, 9, 64, 96, 576, 1536, 4095, 4096, 8960, 11008, 14336)


def _signs(channels: int) -> torch.Tensor:
    return random_signs(channels, torch.Generator().manual_seed(channels))


# ---------------------------------------------------------------- the matrix


@pytest.mark.parametrize("block", [1, 2, 4, 64, 256])
def test_the_transform_of_the_unit_vectors_is_sylvesters_matrix(block: int) -> None:
    got = hadamard.hadamard(torch.eye(block, dtype=torch.float64), block).numpy()
    np.testing.assert_allclose(got, sylvester(block) / np.sqrt(block), rtol=1e-15, atol=0)
    assert np.array_equal(got, got.T)
    np.testing.assert_allclose(got @ got, np.eye(block), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("channels", "block"), [(12, 4), (24, 8), (7, 1), (576, 64), (1536, 256), (30, 2)])
def test_blocks_are_transformed_each_for_itself_after_the_signs(channels: int, block: int) -> None:
    x, signs = torch.randn(3, 5, channels, dtype=torch.float64), _signs(channels).double()
    matrix = transform(channels, block, signs.numpy())
    np.testing.assert_allclose(hadamard.forward(x, signs, block).numpy(), x.numpy() @ matrix.T, rtol=0, atol=1e-13)
    np.testing.assert_allclose(hadamard.inverse(x, signs, block).numpy(), x.numpy() @ matrix, rtol=0, atol=1e-13)


@pytest.mark.parametrize("limit", [1, 64, 256, 65_536])
@pytest.mark.parametrize("channels", _SIZES)
def test_the_inverse_undoes_the_transform_of_any_number_of_channels(channels: int, limit: int) -> None:
    block = block_size(channels, limit)
    x, signs = torch.randn(2, channels), _signs(channels)
    y = hadamard.forward(x, signs, block)
    assert y.dtype == torch.float32 and y.shape == x.shape
    torch.testing.assert_close(hadamard.inverse(y, signs, block), x, rtol=0, atol=1e-5)
    torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1), rtol=1e-5, atol=0)


@given(channels=st.integers(1, 1 << 24), limit=st.integers(1, 1 << 20))
def test_a_block_is_the_largest_power_of_two_that_divides_the_channels_within_the_limit(
    channels: int, limit: int
) -> None:
    powers = [1 << e for e in range(25)]
    assert block_size(channels, limit) == max(p for p in powers if channels % p == 0 and p <= limit)


def test_blocks_of_real_layers() -> None:
    assert [block_size(n, 256) for n in (576, 1536, 8960, 11008, 14336, 4096, 7)] == [64, 256, 256, 256, 256, 256, 1]
    assert [block_size(n, 1 << 16) for n in (576, 1536, 8960, 11008, 14336, 4096)] == [64, 512, 256, 256, 2048, 4096]
    # A limit that is no power of two counts as the one below.
    assert [block_size(4096, limit) for limit in (0, 1, 2, 3, 255, 257)] == [1, 1, 2, 2, 128, 256]


# ---------------------------------------------------------------- numbers


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(0, 9), exponent=st.integers(0, 8), odd=st.integers(1, 5))
def test_the_shape_of_the_batch_does_not_change_a_bit(rows: int, exponent: int, odd: int) -> None:
    block = 1 << exponent
    x, signs = torch.randn(rows, block * odd), _signs(block * odd)
    together = hadamard.forward(x, signs, block)
    assert together.shape == x.shape
    for row, alone in zip(together, x, strict=True):
        assert torch.equal(hadamard.forward(alone, signs, block), row)
    assert torch.equal(hadamard.forward(x.unsqueeze(1), signs, block).squeeze(1), together)
    assert torch.equal(hadamard.forward(x.T.contiguous().T, signs, block), together)


def test_numbers_that_fit_are_transformed_exactly() -> None:
    # Whole numbers, and a block whose root is one: every sum is exact in float32.
    x = torch.randint(-1000, 1000, (4, 256)).float()
    exact = hadamard.hadamard(x.double(), 256)
    assert torch.equal(hadamard.hadamard(x, 256).double(), exact)
    assert torch.equal(hadamard.hadamard(hadamard.hadamard(x, 256), 256), x)


@pytest.mark.parametrize("block", [1, 2, 8])
def test_gradients_are_those_of_finite_differences(block: int) -> None:
    x, signs = torch.randn(2, 8, dtype=torch.float64, requires_grad=True), _signs(8).double()
    assert torch.autograd.gradcheck(lambda t: hadamard.forward(t, signs, block), (x,))
    assert torch.autograd.gradcheck(lambda t: hadamard.inverse(t, signs, block), (x,))


def test_the_input_is_not_changed() -> None:
    x, signs = torch.randn(3, 8), _signs(8)
    before = x.clone()
    for block in (1, 4):
        hadamard.forward(x, signs, block).zero_()
        hadamard.inverse(x, signs, block).zero_()
        assert torch.equal(x, before)


# ---------------------------------------------------------------- signs


@pytest.mark.parametrize("channels", [1, 31, 32, 33, 576, 4095])
def test_signs_survive_packing(channels: int) -> None:
    signs = _signs(channels)
    words = pack_signs(signs)
    assert words.dtype == torch.int32 and words.shape == (1, -(-channels // 32))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        again = unpack_signs(words, channels, dtype)
        assert again.dtype == dtype
        assert torch.equal(again.float(), signs)


def test_a_bit_that_is_set_stands_for_minus() -> None:
    assert pack_signs(torch.tensor([1.0, -1.0, 1.0, -1.0])).tolist() == [[0b1010]]
    assert unpack_signs(torch.tensor([[0b0110]], dtype=torch.int32), 4).tolist() == [1.0, -1.0, -1.0, 1.0]


def test_signs_are_balanced_and_follow_from_the_generator() -> None:
    one, again = (random_signs(10_000, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, again)
    assert set(one.tolist()) == {-1.0, 1.0}
    assert abs(float(one.mean())) < 0.05
    assert not torch.equal(one, random_signs(10_000, torch.Generator().manual_seed(4)))


@pytest.mark.parametrize(("channels", "block"), [(64, 16), (48, 16), (8, 8), (6, 2), (5, 1)])
def test_conjugation_is_the_transform_from_both_sides(channels: int, block: int) -> None:
    matrix = torch.randn(channels, channels, dtype=torch.float64)
    matrix = (matrix @ matrix.T).contiguous().T  # as a caller may have it
    before, signs = matrix.clone(), hadamard.random_signs(channels, torch.Generator().manual_seed(1)).double()
    v = torch.from_numpy(transform(channels, block, signs.numpy()))
    torch.testing.assert_close(hadamard.conjugate(matrix, signs, block), v @ matrix @ v.T)
    assert torch.equal(matrix, before)
