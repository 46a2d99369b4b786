"""What attention takes of a token: the native decoder's kinds of key and value caches, token by token in turn.

    python benchmarks/speed/kv_cache.py QUANTIZED [--context 16 512 2048] [--threads 2] [--out RESULT.json]

The caches hold random numbers, so no prompt is read. ``milliseconds`` are those of a token in C++, ``outside`` those of
them that are not spent in linear layers; medians, and quartiles in brackets.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "quality"))
from table import machine

from octavo._core import clib
from octavo._core.io import write_json
from octavo.integrations.transformers import load
from octavo.math.threads import one_thread
from octavo.runtime.decoder import KV_CACHES, NativeDecoder


def filled(model: Any, kind: str, context: int, tokens: int, threads: int) -> NativeDecoder:
    """A decoder behind ``context`` tokens of random keys and values, with room for ``tokens`` more."""
    decoder, lib = NativeDecoder(model, context + tokens, threads, kind), clib.library()
    assert lib is not None
    layers = model.get_decoder().layers
    heads, width = model.config.num_key_value_heads, layers[0].self_attn.head_dim
    keys, values = torch.randn(2, heads, context, width, generator=torch.Generator().manual_seed(0))
    for block in range(len(layers)):
        arguments = (decoder._session, block, 0, context, keys.data_ptr(), values.data_ptr())
        clib.call(lib.octavo_session_write, *arguments)
    decoder.length = context
    return decoder


def measure(model: Any, context: int, tokens: int, threads: int) -> list[dict[str, Any]]:
    """A row for every kind of cache."""
    decoders = {kind: filled(model, kind, context, tokens + 1, threads) for kind in KV_CACHES}
    taken: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KV_CACHES}
    for turn in range(tokens + 1):
        for kind, decoder in decoders.items():
            with one_thread():
                decoder.run(torch.tensor([turn]))
            whole, linear = decoder.times()
            if turn:
                taken[kind].append((1e3 * whole, 1e3 * (whole - linear)))
    rows: list[dict[str, Any]] = []
    for kind, times in taken.items():
        row: dict[str, Any] = {"kv_cache": kind, "context": context, "threads": threads, "tokens": tokens}
        for name, column in zip(("milliseconds", "outside"), zip(*times, strict=True), strict=True):
            low, row[name], high = statistics.quantiles(column, n=4)
            row[f"{name}_quartiles"] = [low, high]
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quantized")
    parser.add_argument("--context", type=int, nargs="+", default=[16, 512, 2048])
    parser.add_argument("--tokens", type=int, default=100, help="that are measured, of each kind")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    model = load(arguments.quantized, torch.bfloat16)[0]
    rows: list[dict[str, Any]] = []
    for context in arguments.context:
        rows += measure(model, context, arguments.tokens, arguments.threads)
        for row in rows[-len(KV_CACHES) :]:
            low, high = row["outside_quartiles"]
            print(
                f"{row['kv_cache']:8} {context:6} tokens of context {row['milliseconds']:8.2f} ms, "
                f"{row['outside']:6.2f} ms ({low:.2f}-{high:.2f}) outside of linear layers, "
                f"{100 * row['outside'] / row['milliseconds']:5.1f} %",
                flush=True,
            )
    if arguments.out:
        write_json(arguments.out, {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
