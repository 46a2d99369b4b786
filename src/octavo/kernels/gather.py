"""The CPU kernel for large codebooks and column vectors: centroids are added up where they lie (``csrc/gather.h``).

VPTQ's books of 65,536 centroids stay in the second-level cache as half floats; every code is one access to it, which is
what bounds the speed. Permutation, channel norms and transform move to the inputs.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from octavo._core import clib
from octavo.kernels._packed import PackedKernel, PackedMatrix, transform_of
from octavo.kernels.select import in_words, registry
from octavo.layout import Layout
from octavo.stored import index_dtype_to_int64
from octavo.weight import VQWeight

_VECTORS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)
_MOST_STAGES = 4


class Vectors(ctypes.Structure):
    """``octavo_vectors`` of ``csrc/octavo_c.h``."""

    _fields_ = (
        ("columns", ctypes.c_int64),
        ("v", ctypes.c_int32),
        ("stages", ctypes.c_int32),
        ("bits", ctypes.c_int32 * 4),
        ("sign_bits", ctypes.c_int32),
        ("books", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
    )


def pack(weight: VQWeight) -> PackedMatrix:
    """Regroup a weight whose layout :func:`why_not` has nothing against, on the CPU.

    Raises:
        MemoryError: there is no memory for a second copy of the codes.
    """
    lib = clib.library()
    assert lib is not None
    layout, kept = weight.layout, []

    def numbers(tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        kept.append(tensor.contiguous())
        return kept[-1].data_ptr()

    def vectors(columns: int, v: int, stages: tuple[int, ...], signs: bool, books: list[Tensor], codes: Tensor) -> Any:
        joined = torch.cat([book.float().reshape(-1) for book in books])
        padded = (ctypes.c_int32 * 4)(*stages)
        return Vectors(columns, v, len(stages), padded, int(signs), numbers(joined), numbers(codes))

    parts = []
    if (outliers := layout.outliers) is not None:
        book, codes = weight.tensors["outlier_codebook"], weight.tensors["outlier_indices"]
        parts.append(vectors(outliers.columns, outliers.vector_length, (outliers.bits,), False, [book], codes))
    books = [weight.codebook(stage)[0] for stage in range(len(layout.stages))]
    main = (layout.main_columns, layout.vector_length, layout.stages, layout.sign_bits)
    parts.append(vectors(*main, books, weight.tensors["indices"]))
    scales = weight.block_scales()[:, 0] if layout.block_scale is not None else None
    order = index_dtype_to_int64(weight.tensors["permutation"]) if layout.permuted else None
    normed = layout.channel_norm == "input"
    scale, offset = (weight.tensors[f"channel_{key}"].float() if normed else None for key in ("scale", "offset"))
    array, handle = (Vectors * len(parts))(*parts), ctypes.c_void_p()
    clib.call(
        lib.octavo_gather_create,
        *(*layout.shape, int(layout.direction == "column"), ctypes.addressof(array), len(parts), numbers(scales)),
        *(numbers(order), numbers(scale), numbers(offset), *transform_of(weight)),
        *(numbers(None if weight.bias is None else weight.bias.float()), clib.threads(), ctypes.addressof(handle)),
    )
    return PackedMatrix(weight, handle)


def why_not(layout: Layout) -> str:
    """Why the kernel cannot run a layout, or an empty string."""
    block, rows = layout.block_scale, layout.direction == "row"
    lengths = {layout.vector_length, layout.outliers.vector_length if layout.outliers else layout.vector_length}
    return in_words(
        {
            f"vectors of {', '.join(map(str, sorted(lengths)))}": not lengths <= set(_VECTORS),
            f"{len(layout.stages)} stages": len(layout.stages) > _MOST_STAGES,
            "codebooks per tile": layout.tile is not None,
            "uniform grids": layout.codebook_dtype == "grid",
            "zero points": block is not None and block.zero_bits > 0,
            "several scales in a row": block is not None and block.columns < layout.main_columns,
            "scales of rows beside outlier columns": block is not None and layout.outliers is not None,
            "norms of the outputs": layout.channel_norm == "output",
            "outlier columns beside row vectors": rows and layout.outliers is not None,
            "a transform of the outputs": layout.transform is not None and layout.transform.output > 0,
        }
    )


@registry.register("gather")
class Gather(PackedKernel):
    """C++ on the CPU: centroids are added up where they lie, for books above 256 entries and column vectors."""

    rank = 5
    many = 4
    refuses = staticmethod(why_not)
    prepare = staticmethod(pack)
