"""Parts of matrices for tensor parallelism: exact slices of what the whole decodes to, or a reason."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.strategies import layouts, random_weight
from octavo._core.errors import UsageError
from octavo.layout import BlockScale, Layout, Outliers, Transform
from octavo.parallel import shard, why_not
from octavo.weight import VQWeight

#: One of every way in which a matrix may be stored, all of which 4 ranks can share.
PLAIN = Layout((64, 96), 4, (6,), "row", codebook_dtype="int8", bias=True)
BOTH = {
    "row vectors": PLAIN,
    "column vectors": replace(PLAIN, direction="column", sign_bits=True),
    "residual": replace(PLAIN, stages=(6, 3)),
    "scales": replace(PLAIN, block_scale=BlockScale(8, 3)),
    "log2 scales": replace(PLAIN, block_scale=BlockScale(8, 3, 5)),
    "a scale per row": replace(PLAIN, block_scale=BlockScale(96)),
    "tiles": replace(PLAIN, tile=(8, 24)),
    "int4 tiles": replace(PLAIN, tile=(16, 12), codebook_dtype="int4", vector_length=3, stages=(3, 2)),
    "large tiles": replace(PLAIN, tile=(32, 48), direction="column"),
    "one tile": replace(PLAIN, tile=(64, 96)),
    "low rank": replace(PLAIN, tile=(16, 24), codebook_rank=3),
    "input norms": replace(PLAIN, channel_norm="input"),
    "output norms": replace(PLAIN, channel_norm="output"),
    "input transform": replace(PLAIN, transform=Transform(8)),
    "transforms": replace(PLAIN, transform=Transform(8, 16)),
    "order": replace(PLAIN, direction="column", permuted=True, channel_norm="input", transform=Transform(8)),
    "outliers in order": replace(PLAIN, direction="column", permuted=True, outliers=Outliers(3, 4, 5)),
    "outliers": replace(PLAIN, direction="column", outliers=Outliers(7, 2, 5)),
    "outliers and row vectors": replace(PLAIN, outliers=Outliers(8, 2, 5)),
    "grid": Layout((64, 96), 1, (3,), "row", codebook_dtype="grid", block_scale=BlockScale(96, 3), permuted=True),
    "universal": Layout(
        (64, 96), 8, (8, 8), "row", codebook_dtype="universal", codebook="gaussian-v8-k256-256",
        block_scale=BlockScale(96, 0, 8), transform=Transform(8),
    ),
}  # fmt: skip


def same(part: VQWeight, weight: VQWeight, dim: int, rank: int, world: int) -> None:
    """The part is the slice of the matrix; biases of rows are cut, those of columns add up to one."""
    matrix = weight.dequantize()
    assert torch.equal(part.dequantize(), matrix.chunk(world, dim)[rank])
    assert part.layout.shape == tuple(n // world if d == dim else n for d, n in enumerate(matrix.shape))
    if weight.bias is not None:
        assert part.bias is not None
        wanted = weight.bias.chunk(world)[rank] if dim == 0 else weight.bias * (rank == 0)
        assert torch.equal(part.bias, wanted)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", BOTH)
def test_parts_decode_to_slices(name: str, dim: int, world: int) -> None:
    weight = random_weight(BOTH[name], 5)
    assert why_not(weight.layout, dim, world) == ""
    for rank in range(world):
        same(shard(weight, dim, rank, world), weight, dim, rank, world)


def only_outliers(weight: VQWeight, rank: int, world: int) -> bool:
    count, o = weight.layout.shape[1] // world, weight.layout.outliers
    first = weight.tensors["permutation"][: o.columns if o else 0].tolist()
    return set(range(rank * count, (rank + 1) * count)) <= set(first)


@settings(max_examples=400, deadline=None)
@given(layout=layouts(), seed=st.integers(0, 2**31), dim=st.integers(0, 1), data=st.data())
def test_whatever_can_be_cut_is_cut_exactly(layout: Layout, seed: int, dim: int, data: st.DataObject) -> None:
    features = layout.shape[dim]
    world = data.draw(st.sampled_from([n for n in range(1, 9) if features % n == 0]))
    weight = random_weight(layout, seed)
    if reason := why_not(layout, dim, world):
        assert world > 1
        with pytest.raises(UsageError) as error:
            shard(weight, dim, 0, world)
        assert str(error.value) == f"{world} ranks cannot share this matrix: {reason}."
        return
    for rank in range(world):
        if dim == 1 and layout.permuted and only_outliers(weight, rank, world):
            with pytest.raises(UsageError, match=f"all columns of rank {rank} are outliers"):
                shard(weight, dim, rank, world)
        else:
            part = shard(weight, dim, rank, world)
            assert torch.equal(part.dequantize(), weight.dequantize().chunk(world, dim)[rank])


@pytest.mark.parametrize(
    ("layout", "dim", "world", "message"),
    [
        (PLAIN, 0, 3, "64 outputs are not divisible by 3"),
        (PLAIN, 1, 5, "96 inputs are not divisible by 5"),
        (PLAIN, 1, 0, "at least one rank, got 0"),
        (PLAIN, 1, 16, "6 inputs per rank cut vectors of 4"),
        (replace(PLAIN, direction="column", vector_length=3), 0, 2, "32 outputs per rank cut vectors of 3"),
        (BOTH["tiles"], 1, 3, "32 inputs per rank cut codebook tiles of 24"),
        (BOTH["tiles"], 0, 16, ""),
        (replace(PLAIN, block_scale=BlockScale(40)), 1, 2, "48 inputs per rank cut scale blocks of 40"),
        (BOTH["transforms"], 0, 8, "8 outputs per rank cut Hadamard blocks of 16"),
        (BOTH["input transform"], 1, 8, "12 inputs per rank cut Hadamard blocks of 8"),
        (BOTH["outliers"], 0, 64, "1 outputs per rank cut vectors of 4"),
        (replace(BOTH["outliers"], outliers=Outliers(7, 3, 5)), 0, 2, "32 outputs per rank cut outliers' vectors of 3"),
        (replace(PLAIN, outliers=Outliers(30, 2, 5)), 1, 4, "24 inputs per rank are all among the 30 outlier columns"),
        (replace(PLAIN, outliers=Outliers(6, 2, 5)), 1, 2, "48 inputs per rank cut vectors of 4"),
        (replace(PLAIN, permuted=True), 1, 2, "vectors of 4 hold inputs in a stored order, and so of every rank"),
        (
            replace(BOTH["order"], block_scale=BlockScale(8)),
            1,
            2,
            "scale blocks of 8 hold inputs in a stored order, and so of every rank",
        ),
    ],
)
def test_what_cannot_be_cut_is_said(layout: Layout, dim: int, world: int, message: str) -> None:
    assert message in why_not(layout, dim, world)
    assert bool(message) == bool(why_not(layout, dim, world))


@pytest.mark.parametrize("rank", [-1, 2])
def test_there_are_no_other_ranks(rank: int) -> None:
    with pytest.raises(UsageError, match=rf"rank wanted 0\.\.1, got {rank}"):
        shard(random_weight(PLAIN), 0, rank, 2)


def test_products_of_parts_make_the_whole() -> None:
    weight = random_weight(BOTH["log2 scales"], 2, scale=0.1)
    x = torch.randn(3, 96, dtype=torch.float64)
    matrix = weight.dequantize(torch.float64)
    rows = [shard(weight, 0, rank, 4).dequantize(torch.float64) for rank in range(4)]
    torch.testing.assert_close(torch.cat([x @ part.T for part in rows], dim=1), x @ matrix.T)
    columns = [shard(weight, 1, rank, 4).dequantize(torch.float64) for rank in range(4)]
    torch.testing.assert_close(sum(a @ b.T for a, b in zip(x.chunk(4, 1), columns, strict=True)), x @ matrix.T)
    assert math.prod(weight.layout.shape) == 4 * columns[0].numel()
