"""Tensor parallelism: the part of a VQWeight that one of several ranks holds, cut without decoding or rounding.

Rows (outputs) are for layers whose results are put side by side, columns (inputs) for layers whose results are added up
(Megatron-LM, arXiv 1909.08053, Section 3). What ranks share - centroids, signs of the other side - each has whole.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from octavo._core.errors import UsageError
from octavo.layout import Layout
from octavo.math.pack import pack, unpack
from octavo.stored import index_dtype_to_int64
from octavo.weight import VQWeight

ROWS, COLUMNS = 0, 1


def why_not(layout: Layout, dim: int, world: int) -> str:
    """Why ``world`` ranks cannot hold equal parts of the rows (``dim`` 0) or columns (1) of a layout, or an empty text.

    Whether a stored order gives a rank nothing but outliers is found by :func:`shard` alone.
    """
    features, side = layout.shape[dim], ("outputs", "inputs")[dim]
    if world < 1:
        return f"it wants at least one rank, got {world}"
    if features % world:
        return f"{features} {side} are not divisible by {world}"
    if world == 1:
        return ""
    part = features // world
    outliers, transform, scales, tile = layout.outliers, layout.transform, layout.block_scale, layout.tile
    hadamard = 0 if transform is None else (transform.output, transform.input)[dim]
    if hadamard and part % hadamard:
        return f"{part} {side} per rank cut Hadamard blocks of {hadamard}"
    # No cut may fall into a vector; a part may be a piece of a tile or block, or begin with one.
    vectors = {"vectors": layout.vector_length} if layout.direction == ("column", "row")[dim] else {}
    if dim == ROWS and outliers is not None:
        vectors["outliers' vectors"] = outliers.vector_length
    shared = {} if tile is None else {"codebook tiles": tile[dim]}
    if dim == COLUMNS and scales is not None:
        shared["scale blocks"] = scales.columns
    if dim == COLUMNS and layout.permuted:
        mixed = {name: n for name, n in vectors.items() if n > 1}
        mixed |= {name: n for name, n in shared.items() if n < layout.main_columns}
        names = " and ".join(f"{name} of {n}" for name, n in mixed.items())
        return f"{names} hold inputs in a stored order, and so of every rank" if mixed else ""
    first = outliers.columns if dim == COLUMNS and outliers is not None else 0
    if first >= part:
        return f"{part} inputs per rank are all among the {first} outlier columns"
    for start in range(part - first, features - first, part):
        last = start + part - 1
        cut = {name: n for name, n in vectors.items() if start % n}
        cut |= {name: n for name, n in shared.items() if start % n and start // n != last // n}
        if cut:
            return f"{part} {side} per rank cut " + " and ".join(f"{name} of {n}" for name, n in cut.items())
    return ""


def shard(weight: VQWeight, dim: int, rank: int, world: int) -> VQWeight:
    """The rows (``dim`` 0) or columns (1) that ``rank`` of ``world`` ranks holds; decodes to that slice, bit for bit.

    A bias is cut with the rows. Of columns rank 0 has it and all others have zeros, so that products add up.

    Raises:
        UsageError: no such rank, a layout that cannot be cut in equal parts (see :func:`why_not`), or a part of a
            stored order that holds nothing but outliers.
    """
    if reason := why_not(weight.layout, dim, world):
        raise UsageError(f"{world} ranks cannot share this matrix: {reason}.")
    if not 0 <= rank < world:
        raise UsageError(f"rank wanted 0..{world - 1}, got {rank}.")
    return (_rows if dim == ROWS else _columns)(weight, rank, world)


def _rows(weight: VQWeight, rank: int, world: int) -> VQWeight:
    old, device = weight.layout, weight.device
    count = old.shape[0] // world
    layout = replace(old, shape=(count, old.shape[1]))
    rows = torch.arange(rank * count, (rank + 1) * count, device=device)
    step = old.vector_length if old.direction == "column" else 1
    tensors: dict[str, Tensor] = {}
    for name in layout.tensors():
        tensor = weight.tensors[name]
        if name == "indices":
            tensor = tensor[rows[::step] // step]
        elif name == "outlier_indices":
            assert old.outliers is not None
            tensor = tensor[rows[:: old.outliers.vector_length] // old.outliers.vector_length]
        elif name == "block_scale_code":
            assert old.block_scale is not None
            tensor = _cut(tensor, old.block_scale.log2_bits, old.shape[0], rows)
        elif name == "output_signs":
            tensor = _cut(tensor, 1, old.shape[0], rows)
        elif name in ("block_scale", "block_zero", "bias") or (name.startswith("channel_") and _norms(old, ROWS)):
            tensor = tensor[rows]
        elif old.tile is not None and name.startswith("codebook_"):
            columns = torch.arange(old.books_shape[1], device=device)
            tensor = _books(weight, name, torch.unique_consecutive(rows // old.tile[0]), columns)
        tensors[name] = tensor.contiguous()
    return VQWeight(layout, tensors)


def _columns(weight: VQWeight, rank: int, world: int) -> VQWeight:
    old, device = weight.layout, weight.device
    count = old.shape[1] // world
    order = torch.arange(old.shape[1], device=device)
    if old.permuted:
        order = index_dtype_to_int64(weight.tensors["permutation"])
    mine = ((order >= rank * count) & (order < (rank + 1) * count)).nonzero()[:, 0]
    first = old.shape[1] - old.main_columns
    few, main = mine[mine < first], mine[mine >= first] - first
    if not main.numel():
        raise UsageError(f"{world} ranks cannot share this matrix: all columns of rank {rank} are outliers.")
    outliers, block = old.outliers, old.block_scale
    if outliers is not None:
        outliers = replace(outliers, columns=few.numel()) if few.numel() else None
    if block is not None:
        block = replace(block, columns=min(block.columns, count))
    layout = replace(old, shape=(old.shape[0], count), outliers=outliers, block_scale=block)
    step = old.vector_length if old.direction == "row" else 1
    tensors: dict[str, Tensor] = {}
    for name in layout.tensors():
        tensor = weight.tensors[name]
        if name == "indices":
            tensor = _cut(tensor, old.code_bits, old.index_shape[1], main[::step] // step)
        elif name == "outlier_indices":
            assert old.outliers is not None
            tensor = _cut(tensor, old.outliers.bits, old.outliers.columns, few)
        elif name.startswith("block_"):
            assert old.block_scale is not None
            blocks = torch.unique_consecutive(main // old.block_scale.columns)
            if name == "block_zero":
                tensor = _cut(
                    tensor, old.block_scale.zero_bits, -(-old.main_columns // old.block_scale.columns), blocks
                )
            else:
                tensor = tensor[:, blocks] if name == "block_scale" else tensor[blocks]
        elif name == "permutation":
            tensor = (order[mine] - rank * count).to(torch.int32).to(layout.tensors()[name][0])
        elif name == "input_signs":
            tensor = _cut(tensor, 1, old.shape[1], torch.arange(rank * count, (rank + 1) * count, device=device))
        elif name.startswith("channel_") and _norms(old, COLUMNS):
            tensor = tensor[rank * count : (rank + 1) * count]
        elif name == "bias":
            tensor = tensor if rank == 0 else torch.zeros_like(tensor)
        elif old.tile is not None and name.startswith("codebook_"):
            rows = torch.arange(old.books_shape[0], device=device)
            tensor = _books(weight, name, rows, torch.unique_consecutive(main // old.tile[1]))
        tensors[name] = tensor.contiguous()
    return VQWeight(layout, tensors)


def _norms(layout: Layout, dim: int) -> bool:
    return layout.channel_norm == ("output", "input")[dim]


def _cut(words: Tensor, width: int, count: int, which: Tensor) -> Tensor:
    """Some of the ``count`` columns of packed numbers."""
    return pack(unpack(words, width, count)[:, which], width)


def _books(weight: VQWeight, name: str, rows: Tensor, columns: Tensor) -> Tensor:
    """What a tensor says of the codebooks of these rows and columns of tiles."""
    layout, tensor = weight.layout, weight.tensors[name]
    if name.startswith("codebook_basis"):
        return tensor
    which = (rows.unsqueeze(1) * layout.books_shape[1] + columns).reshape(-1)
    if layout.codebook_dtype == "int4" and not name.startswith("codebook_scale"):
        numbers = unpack(tensor, 4, tensor.shape[1] * 8)
        size = layout.vector_length << layout.stages[int(name.rpartition("_")[2])]
        return pack(numbers[:, : layout.books * size].view(layout.books, size)[which].reshape(1, -1), 4)
    return tensor[which]
