"""Random layouts over every option that a layout has, and random weights for them."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from octavo import codebooks
from octavo.layout import BlockScale, Layout, Outliers, Transform
from octavo.weight import VQWeight

FLOATS = ("float16", "bfloat16", "float32")


@st.composite
def layouts(draw: st.DrawFn, max_features: int = 40) -> Layout:
    """Any legal layout of a small matrix, odd sizes and vectors longer than the matrix included."""
    out, inp = (draw(st.integers(1, max_features)) for _ in range(2))
    book = draw(st.sampled_from((*FLOATS, "int8", "int4", "grid", "universal")))
    grid, name = book == "grid", ""
    if book == "universal":
        name = draw(st.sampled_from(codebooks.names()))
        v, stages, signs = codebooks.parse(name)
    else:
        v = 1 if grid else draw(st.integers(1, 16))
        longest, most = (10, 1) if grid else (6, 3)
        stages = tuple(draw(st.lists(st.integers(1, longest), min_size=1, max_size=most)))
        signs = not grid and sum(stages) + v <= 32 and draw(st.booleans())
    rank = draw(st.integers(0, 4)) if book not in ("grid", "int4", "universal") and len(stages) == 1 else 0
    direction = draw(st.sampled_from(("row", "column")))
    outliers = None
    if inp > 1 and draw(st.booleans()):
        outliers = Outliers(draw(st.integers(1, inp - 1)), draw(st.integers(1, 16)), draw(st.integers(1, 6)))
    tile = None
    if not grid and not name and draw(st.booleans()):
        sizes = [draw(st.integers(1, max_features)) for _ in range(2)]
        along = 0 if direction == "column" else 1
        sizes[along] = v * draw(st.integers(1, 4))
        tile = (sizes[0], sizes[1])
    block = None
    if draw(st.booleans()):
        log2_bits = draw(st.one_of(st.just(0), st.integers(1, 8)))
        block = BlockScale(draw(st.integers(1, inp)), draw(st.integers(0, 16)), log2_bits)
    blocks = [draw(st.sampled_from([0, *_blocks(features)])) for features in (inp, out)]
    return Layout(
        shape=(out, inp),
        vector_length=v,
        stages=stages,
        direction=direction,
        codebook_dtype=book,
        side_dtype=draw(st.sampled_from(FLOATS)),
        sign_bits=signs,
        tile=tile,
        block_scale=block,
        channel_norm=draw(st.sampled_from(("none", "input", "output"))),
        permuted=draw(st.booleans()),
        outliers=outliers,
        bias=draw(st.booleans()),
        codebook_rank=rank,
        codebook=name,
        transform=Transform(*blocks) if any(blocks) else None,
    )


def _blocks(features: int) -> list[int]:
    """The powers of two above 1 that divide the features."""
    return [1 << e for e in range(1, features.bit_length()) if features % (1 << e) == 0]


def random_weight(layout: Layout, seed: int = 0, scale: float = 1.0) -> VQWeight:
    """A weight with random bits in every tensor, the padding of the index rows included."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, (dtype, shape) in layout.tensors().items():
        if name == "permutation":
            tensors[name] = torch.randperm(shape[0], generator=generator).to(torch.int32).to(dtype)
        elif dtype.is_floating_point:
            # The largest code takes a step so many times: 2^(low + step * code) must stay an ordinary number.
            steps = 1 << layout.block_scale.log2_bits if name == "block_scale_step" and layout.block_scale else 1
            tensors[name] = (torch.randn(shape, generator=generator) * scale / steps).to(dtype)
        else:
            info = torch.iinfo(dtype)
            tensors[name] = torch.randint(info.min, info.max + 1, shape, generator=generator).to(dtype)
    return VQWeight(layout, tensors)


def raw(weight: VQWeight) -> dict[str, Any]:
    """The tensors as (dtype name, shape, bytes), which is all that the oracle wants to know."""
    return {
        name: (str(t.dtype).removeprefix("torch."), tuple(t.shape), t.reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, t in weight.tensors.items()
    }
