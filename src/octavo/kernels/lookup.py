"""The fast CPU kernel: codes stay packed, products with centroids are looked up (``csrc/lookup.h``).

A vector of inputs that meets a codebook gives one product per centroid, once for all rows. For many inputs at a time
(prompts) rows are decoded to bytes and multiplied as such (``csrc/prompt.h``) where inputs are in bfloat16, otherwise
as dense matrices; both read and decode every code once as well.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from octavo._core import clib
from octavo.kernels._packed import PackedKernel, PackedMatrix, transform_of
from octavo.kernels.select import in_words, registry
from octavo.layout import Layout
from octavo.weight import VQWeight

_VECTORS = (1, 2, 4, 8)
_MOST_STAGES, _MOST_BITS = 4, 8


def pack(weight: VQWeight) -> PackedMatrix:
    """Regroup a weight whose layout :func:`why_not` has nothing against, on the CPU.

    Raises:
        MemoryError: there is no memory for a second copy of the codes.
    """
    lib = clib.library()
    assert lib is not None
    layout = weight.layout
    books = torch.cat([weight.codebook(stage)[0].float() for stage in range(len(layout.stages))]).contiguous()
    stages = torch.tensor(layout.stages, dtype=torch.int32)
    columns, scales = layout.shape[1], torch.ones(layout.shape[0], 1, dtype=torch.float32)
    if layout.block_scale is not None:
        columns, scales = layout.block_scale.columns, weight.block_scales().contiguous()
    indices = weight.tensors["indices"].contiguous()
    bias = None if weight.bias is None else weight.bias.float().contiguous()
    handle = ctypes.c_void_p()
    clib.call(
        lib.octavo_lookup_create,
        *(*layout.shape, layout.vector_length, len(layout.stages), stages.data_ptr(), books.data_ptr()),
        *(indices.data_ptr(), columns, scales.data_ptr(), *transform_of(weight)),
        *(None if bias is None else bias.data_ptr(), clib.threads(), ctypes.addressof(handle)),
    )
    return PackedMatrix(weight, handle)


def why_not(layout: Layout) -> str:
    """Why the kernel cannot run a layout, or an empty string."""
    block = layout.block_scale
    return in_words(
        {
            "column vectors": layout.direction == "column",
            f"vectors of {layout.vector_length}": layout.vector_length not in _VECTORS,
            f"{len(layout.stages)} stages": len(layout.stages) > _MOST_STAGES,
            "codebooks above 256 entries": max(layout.stages) > _MOST_BITS,
            "sign bits": layout.sign_bits,
            "codebooks per tile": layout.tile is not None,
            "uniform grids": layout.codebook_dtype == "grid",
            "zero points": block is not None and block.zero_bits > 0,
            "scales that cut vectors": block is not None
            and block.columns < layout.shape[1]
            and block.columns % layout.vector_length != 0,
            "channel norms": layout.channel_norm != "none",
            "a stored order": layout.permuted,
            "outlier columns": layout.outliers is not None,
            "a transform of the outputs": layout.transform is not None and layout.transform.output > 0,
        }
    )


@registry.register("lookup")
class LookUp(PackedKernel):
    """C++ on the CPU: products with centroids are looked up, the matrix stays packed."""

    rank = 10
    many = 96
    refuses = staticmethod(why_not)
    prepare = staticmethod(pack)

    @staticmethod
    def has_rows(layout: Layout) -> bool:
        """Rows with one scale each."""
        return layout.block_scale is None or layout.block_scale.columns >= layout.shape[1]

    @staticmethod
    def rows_times(index: Tensor, x: Tensor, prepared: PackedMatrix) -> Tensor:
        """Tables of the products as for the whole matrix, looked up by the codes of single rows."""
        return prepared.rows_times(index, x.float())
