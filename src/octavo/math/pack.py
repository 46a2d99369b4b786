"""Bit streams: rows of unsigned integers of 1..32 bits in little-endian 32-bit words.

Element ``j`` of a row occupies stream bits ``[j * width, (j + 1) * width)``; stream bit ``n`` is bit ``n % 32`` of word
``n // 32``; the last word of a row is padded with zeros. This is also the order of VPTQ checkpoints.

The torch functions below are the definition and serve every device; CPU tensors go through the C++ library.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from octavo._core import clib

WORD = 32


def packed_words(count: int, width: int) -> int:
    """Number of 32-bit words that hold ``count`` elements of ``width`` bits."""
    return -(-count * width // WORD)


def pack(codes: Tensor, width: int) -> Tensor:
    """Pack ``codes`` [rows, count] (integers in [0, 2^width)) into int32 words [rows, packed_words(count, width)].

    Raises:
        ValueError: a width outside 1..32, or a code that does not fit it.
    """
    if not 1 <= width <= WORD:
        raise ValueError(f"pack: width wanted 1..32, got {width}")
    codes = codes.to(torch.int64)
    if clib.takes(codes):
        lib = clib.library()
        if lib is not None:
            codes = codes.contiguous()
            rows, count = codes.shape
            words = torch.empty(rows, packed_words(count, width), dtype=torch.int32)
            arguments = (codes.data_ptr(), rows, count, width, words.data_ptr())
            if clib.call(lib.octavo_pack, *arguments, clib.threads()) == clib.OUT_OF_RANGE:
                _refuse_misfits(codes, width)
            return words
        clib.warn_slow_once("bit packing")
    return _pack_torch(codes, width)


def unpack(words: Tensor, width: int, count: int) -> Tensor:
    """Unpack int32 ``words`` [rows, packed_words(count, width)] into int64 codes [rows, count].

    Raises:
        ValueError: a width outside 1..32 or a word count that does not match.
    """
    if not 1 <= width <= WORD:
        raise ValueError(f"unpack: width wanted 1..32, got {width}")
    if words.shape[1] != packed_words(count, width):
        raise ValueError(f"unpack: wanted {packed_words(count, width)} words per row, got {words.shape[1]}")
    if words.dtype == torch.int32 and clib.takes(words):
        lib = clib.library()
        if lib is not None:
            words = words.contiguous()
            codes = torch.empty(words.shape[0], count, dtype=torch.int64)
            arguments = (words.data_ptr(), words.shape[0], count, width, codes.data_ptr())
            clib.call(lib.octavo_unpack, *arguments, clib.threads())
            return codes
        clib.warn_slow_once("bit unpacking")
    return _unpack_torch(words, width, count)


def _refuse_misfits(codes: Tensor, width: int) -> None:
    if is_compiling():
        return  # A graph has no numbers to look at.
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >> width):
        raise ValueError(f"pack: codes wanted in [0, 2^{width}), got [{int(codes.min())}, {int(codes.max())}]")


def _pack_torch(codes: Tensor, width: int) -> Tensor:
    _refuse_misfits(codes, width)
    rows, count = codes.shape
    words = packed_words(count, width)
    start = torch.arange(count, device=codes.device) * width
    shifted = codes << (start % WORD)
    # Two words per element; the spare column catches the (zero) high part of the last element.
    stream = torch.zeros(rows, words + 1, dtype=torch.int64, device=codes.device)
    stream.index_add_(1, start // WORD, shifted & 0xFFFFFFFF)
    stream.index_add_(1, start // WORD + 1, shifted >> WORD)
    return stream[:, :words].to(torch.int32)


def _unpack_torch(words: Tensor, width: int, count: int) -> Tensor:
    stream = torch.nn.functional.pad(words.to(torch.int64) & 0xFFFFFFFF, (0, 1))
    start = torch.arange(count, device=words.device) * width
    offset = start % WORD
    low = stream[:, start // WORD] >> offset
    high = stream[:, start // WORD + 1] << (WORD - offset)
    return (low | high) & ((1 << width) - 1)
