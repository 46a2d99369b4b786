"""Numbers to stored tensors and back: float side data, codebooks, scales, packed indices."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from octavo._core.errors import NumericalError
from octavo.layout import DTYPES, Layout
from octavo.math.pack import pack, unpack

#: int4 codebook entries are stored as unsigned numbers; this one is zero.
_INT4_ZERO = 8
#: The options that choose the stored dtype, with a value of a wider range than float16.
_WIDE_SIDE = "--side-dtype bfloat16"
_WIDE_BOOKS = "--set codebook_dtype=bfloat16"


def index_dtype_to_int64(permutation: Tensor) -> Tensor:
    """Read a stored permutation; int16 holds the bits of uint16."""
    wide = permutation.to(torch.int64)
    return wide & 0xFFFF if permutation.dtype == torch.int16 else wide


def to_stored(
    value: Tensor, dtype: torch.dtype, what: str, remedy: str = f"{_WIDE_SIDE} (for codebooks: {_WIDE_BOOKS})"
) -> Tensor:
    """Cast to a stored float dtype; errors call it ``what`` and advise ``remedy``, the option that widens its range.

    Raises:
        NumericalError: a value that is finite now and would not be after the cast, or all of them vanishing.
    """
    stored = value.to(dtype)
    if bool(value.any()) and not bool(stored.any()):
        raise NumericalError(
            f"{what}: every value is below the range of {dtype} (largest magnitude {float(value.abs().max()):.3g}) and "
            f"would be stored as zero. Use {remedy}."
        )
    if not bool(torch.isfinite(stored).all()):
        raise NumericalError(
            f"{what}: {int((~torch.isfinite(stored)).sum())} values are not finite in {dtype} (largest magnitude "
            f"{float(value.abs().max()):.3g}). Use {remedy}, or check the weights for non-finite values."
        )
    return stored


def decode_codebooks(
    layout: Layout, stage: int, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Centroids [books, 2^bits, vector_length] of one stage as numbers; the layout is no grid."""
    if layout.codebook_rank:
        coefficients = tensors["codebook_coefficient_0"].to(dtype)
        basis = tensors["codebook_basis_0"].to(dtype)
        # One product after the other: a matrix product may round differently from machine to machine.
        book = coefficients[:, 0].view(-1, 1, 1) * basis[0]
        for r in range(1, layout.codebook_rank):
            book = book + coefficients[:, r].view(-1, 1, 1) * basis[r]
        return book
    book = tensors[f"codebook_{stage}"]
    if layout.codebook_dtype == "int4":
        books = tensors[f"codebook_scale_{stage}"].numel()
        size = (books, 1 << layout.stages[stage], layout.vector_length)
        book = unpack(book, 4, math.prod(size)).reshape(size) - _INT4_ZERO
    book = book.to(dtype)
    if layout.codebook_dtype in ("int8", "int4"):
        book = book * tensors[f"codebook_scale_{stage}"].to(dtype).view(-1, 1, 1)
    return book


def log2_scale_table(low: Tensor, step: Tensor, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The scales [blocks, 2^bits] that codes stand for; through float64, so that every machine rounds alike."""
    exponent = low.double().unsqueeze(1) + step.double().unsqueeze(1) * torch.arange(1 << bits, device=low.device)
    return torch.exp2(exponent).to(dtype)


def store_codebooks(layout: Layout, stage: int, centroids: Tensor, where: str) -> dict[str, Tensor]:
    """Round centroids [books, 2^bits, vector_length] to what the layout stores for a stage.

    Integer codebooks get the scale that maps the largest magnitude of each codebook to the largest integer.

    Raises:
        NumericalError: values that the stored dtype cannot hold.
    """
    name, dtype = f"codebook_{stage}", layout.codebook_dtype
    if dtype not in ("int8", "int4"):
        return {name: to_stored(centroids, DTYPES[dtype], where, _WIDE_BOOKS)}
    top = 127 if dtype == "int8" else 7
    scale = to_stored(centroids.abs().amax(dim=(1, 2)) / top, DTYPES[layout.side_dtype], where, _WIDE_SIDE)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    integers = (centroids / scale.float().view(-1, 1, 1)).round().clamp(-top, top)
    stored = integers.to(torch.int8) if dtype == "int8" else pack(integers.long().reshape(1, -1) + _INT4_ZERO, 4)
    return {name: stored, f"codebook_scale_{stage}": scale}


def store_low_rank(layout: Layout, coefficients: Tensor, basis: Tensor, where: str) -> dict[str, Tensor]:
    """Round coefficients [books, rank] and basis codebooks [rank, 2^bits, vector_length] to what is stored.

    int8 coefficients use the whole range of every basis codebook; the basis carries their scale.

    Raises:
        NumericalError: values that the stored dtypes cannot hold.
    """
    dtype = DTYPES[layout.codebook_dtype]
    if dtype == torch.int8:
        scale = coefficients.abs().amax(dim=0) / 127
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        basis = basis * scale.view(-1, 1, 1)
        coefficients = (coefficients / scale).round().clamp(-127, 127)
    return {
        "codebook_coefficient_0": to_stored(coefficients, dtype, f"{where}: codebook coefficients", _WIDE_BOOKS),
        "codebook_basis_0": to_stored(basis, DTYPES[layout.side_dtype], f"{where}: codebook basis", _WIDE_SIDE),
    }


def pack_codes(layout: Layout, parts: list[Tensor]) -> Tensor:
    """Inverse of :meth:`VQWeight.codes`: index matrices of all stages (then signs) to the packed ``indices`` tensor."""
    element = torch.zeros(layout.index_shape, dtype=torch.int64, device=parts[0].device)
    shift = 0
    widths = (*layout.stages, *((layout.vector_length,) if layout.sign_bits else ()))
    for width, part in zip(widths, parts, strict=True):
        element |= part.to(torch.int64) << shift
        shift += width
    return pack(element, layout.code_bits)
