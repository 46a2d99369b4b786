"""The block Hadamard transform with random signs: what spreads every channel over a block of channels.

``y = H_b diag(s) x`` on consecutive blocks of b channels, with the Sylvester matrix H_b / sqrt(b), which is symmetric
and orthogonal, and signs s = +-1 (randomised Hadamard transform; QuIP#, arXiv 2402.04396, Section 3). Any number of
channels is a whole number of blocks of the largest power of two that divides it; there is no padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.math.hessian import exact_float32
from octavo.math.pack import pack, unpack


def block_size(channels: int, limit: int) -> int:
    """The largest power of two that divides ``channels`` and is at most ``limit``."""
    return min(channels & -channels, 1 << (max(limit, 1).bit_length() - 1))


def hadamard(x: Tensor, block: int) -> Tensor:
    """``x`` [.., channels] times the block-diagonal Hadamard matrix, orthonormal; ``block`` is a power of two.

    A butterfly of additions in a fixed order, so that every machine rounds alike; differentiable.
    """
    shape, half = x.shape, 1
    while half < block:
        pairs = x.reshape(*shape[:-1], shape[-1] // (2 * half), 2, half)
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack([low + high, low - high], dim=-2)
        half *= 2
    return x.reshape(shape) * block**-0.5 if block > 1 else x


def random_signs(channels: int, generator: torch.Generator) -> Tensor:
    """[channels] of +-1, float32."""
    return torch.randint(0, 2, (channels,), generator=generator).float() * 2 - 1


def pack_signs(signs: Tensor) -> Tensor:
    """Signs [channels] as bits [1, words] int32; a bit that is set stands for -1."""
    return pack((signs < 0).long().unsqueeze(0), 1)


def unpack_signs(words: Tensor, channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The inverse of :func:`pack_signs`."""
    return 1 - 2 * unpack(words, 1, channels)[0].to(dtype)


def forward(x: Tensor, signs: Tensor, block: int) -> Tensor:
    """``H diag(s)`` applied to the last dimension of ``x`` [.., channels]."""
    return hadamard(x * signs, block)


def conjugate(matrix: Tensor, signs: Tensor, block: int) -> Tensor:
    """``V M V^T`` for a symmetric M [channels, channels], V = H diag(s): what the transform makes of a Hessian.

    By products, several times as fast as butterflies on large matrices; decoding does not use it.
    """
    small = hadamard(torch.eye(block, dtype=matrix.dtype, device=matrix.device), block)
    with exact_float32():
        for _ in range(2):
            matrix = ((matrix * signs).reshape(-1, block) @ small).view_as(matrix).T.contiguous()
    return matrix


def inverse(y: Tensor, signs: Tensor, block: int) -> Tensor:
    """``diag(s) H``, the inverse and transpose of :func:`forward`, applied to the last dimension."""
    return hadamard(y, block) * signs
