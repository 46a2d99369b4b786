"""Attention over a cache, held to transformers in float64: instruction sets, groups of heads, shares of threads."""

from __future__ import annotations

import itertools
import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from octavo._core import clib
from octavo._core.errors import UsageError
from octavo.runtime.decoder import KV_CACHES, NativeDecoder
from ops.products import error, isas

pytestmark = pytest.mark.skipif(clib.library() is None, reason=f"no C++ library: {clib.why_missing()}")
CAPACITY = 96
#: (query heads, heads of keys and values, width): groups of 1 to 7, widths that fill registers and some that do not.
SHAPES = ((3, 3, 128), (6, 2, 64), (4, 1, 80), (6, 1, 20), (7, 1, 6), (4, 2, 144))


@cache
def model_of(heads: int, kept: int, width: int, window: int = 0) -> Any:
    """A block whose MLP adds nothing: what its logits say of the last token is what attention found."""
    shape: dict[str, Any] = {"hidden_size": 36 * 7, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 50}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": kept, "head_dim": width}
    torch.manual_seed(heads * width)
    model: Any = (
        MistralForCausalLM(MistralConfig(**shape, sliding_window=window))
        if window
        else LlamaForCausalLM(LlamaConfig(**shape))
    )
    model.model.layers[0].mlp.down_proj.weight.data.zero_()
    # Scores of different sizes: some positions matter, others do not.
    model.model.layers[0].self_attn.q_proj.weight.data *= 20
    return model.double().eval()


def cached(kept: int, positions: int, width: int, kind: str, seed: int) -> Tensor:
    """Keys (even seeds) or values [kept, positions, width] that a cache of this kind holds without rounding."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "float16":
        return torch.randn(kept, positions, width, generator=generator).half().float()
    whole = torch.randint(-127, 128, (kept, positions, width), generator=generator)
    whole[:, :, seed % width] = 127
    scaled = whole.double() * 2.0 ** torch.randint(-9, -5, (kept, positions, 1), generator=generator)
    if seed % 2:
        return scaled.float()
    # Keys are kept behind a Hadamard transform of blocks, here by its definition.
    block = width & -width
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(block)] for i in range(block)]
    transform = torch.tensor(signs, dtype=torch.float64) / block**0.5
    return (scaled.unflatten(-1, (-1, block)) @ transform).flatten(-2).float()


def native(model: Any, kind: str, keys: Tensor, values: Tensor, tokens: Tensor, threads: int, isa: int) -> Tensor:
    """Logits after ``tokens`` behind the given keys and values; everything not written is NaN."""
    lib = clib.library()
    assert lib is not None
    decoder, n = NativeDecoder(model, CAPACITY, kv_cache=kind), keys.shape[1]
    bad = torch.full((keys.shape[0], CAPACITY, keys.shape[2]), math.nan)
    for first, k, v in ((0, bad, bad), (0, keys, values)):
        arguments = (0, first, k.shape[1], k.contiguous().data_ptr(), v.contiguous().data_ptr())
        assert clib.call(lib.octavo_session_write, decoder._session, *arguments) == clib.OK
    found = torch.full((50,), math.nan)
    arguments = (decoder._session, tokens.data_ptr(), len(tokens), n, found.data_ptr(), threads, isa)
    assert clib.call(lib.octavo_session_run, *arguments) == clib.OK
    return found


@torch.no_grad()
def reference(model: Any, keys: Tensor, values: Tensor, tokens: Tensor) -> Tensor:
    past, n = DynamicCache(), keys.shape[1]
    if n:
        past.update(keys.double().unsqueeze(0), values.double().unsqueeze(0), 0)
    return model(tokens.unsqueeze(0), past_key_values=past, cache_position=torch.arange(n, n + len(tokens))).logits[
        0, -1
    ]


@pytest.mark.parametrize("kind", KV_CACHES)
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_is_that_of_transformers_in_float64(shape: tuple[int, int, int], kind: str) -> None:
    """Only the keys and values of the new tokens are rounded."""
    model, limit = model_of(*shape), 1e-3 if kind == "float16" else 2e-2
    for positions, new in itertools.product((0, 1, 4, 13, 71), (1, 3, 11)):
        keys, values = (
            cached(shape[1], positions, shape[2], kind, seed) for seed in (2 * positions, 2 * positions + 1)
        )
        tokens = torch.arange(new) + 7
        wanted = reference(model, keys, values, tokens)
        for isa, threads in itertools.product(isas(), (1, 2, 7)):
            found = native(model, kind, keys, values, tokens, threads, isa)
            assert error(found, wanted) < limit, (positions, new, isa, threads)


@pytest.mark.parametrize("kind", KV_CACHES)
def test_nothing_before_a_window_is_looked_at(kind: str) -> None:
    model, tokens = model_of(6, 2, 64, window=9), torch.tensor([5, 6, 7])
    keys, values = (cached(2, 60, 64, kind, seed) for seed in (0, 1))
    wanted = reference(model, keys, values, tokens)
    keys[:, :52], values[:, :52] = math.nan, math.nan
    for isa, threads in itertools.product(isas(), (1, 3, 16)):
        assert error(native(model, kind, keys, values, tokens, threads, isa), wanted) < 1e-2


@pytest.mark.parametrize("kind", KV_CACHES)
def test_a_bad_key_or_value_is_not_lost(kind: str) -> None:
    model, tokens = model_of(4, 2, 144), torch.tensor([5])
    for which in range(2):
        cache = [cached(2, 20, 144, kind, seed) for seed in (0, 1)]
        cache[which][1, 12, 3] = math.nan
        for isa in isas():
            assert not bool(torch.isfinite(native(model, kind, cache[0], cache[1], tokens, 2, isa)).any())


@pytest.mark.parametrize("width", [6, 144])
def test_what_half_floats_cannot_hold_is_cut_not_infinite(width: int) -> None:
    shape = (7, 1, 6) if width == 6 else (4, 2, 144)
    model, tokens = model_of(*shape), torch.tensor([5])
    keys, values = (cached(shape[1], 20, width, "float16", seed) for seed in (0, 1))
    values[0, 3, 1], values[0, 4, width - 1] = 1e6, -1e6
    wanted = reference(model, keys, values.clamp(-65504, 65504), tokens)
    for isa in isas():
        assert error(native(model, "float16", keys, values, tokens, 2, isa), wanted) < 1e-3


def test_another_kind_of_cache_is_refused() -> None:
    with pytest.raises(UsageError, match="kv_cache wanted one of float16, int8, got 'int4'"):
        NativeDecoder(model_of(4, 2, 144), 8, kv_cache="int4")
