"""Does the native decoder, token by token, say what the decoded model says? KL of both to the original, in one run.

    python benchmarks/speed/agreement.py QUANTIZED ORIGINAL --text FILE [--tokens 512] [--kv-cache int8] [--out JSON]

``kl_decoded``: original || the matrices decoded to float32 in transformers; ``kl_native``: original || native decoder;
``kl_between``: decoded || native, what look-ups, rounded keys and values and other roundings cost by themselves.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from octavo._core.io import write_json
from octavo.calibration.data import read_text, windows
from octavo.integrations.transformers import load
from octavo.runtime.decoder import DEFAULT_KV_CACHE, KV_CACHES, NativeDecoder


@torch.inference_mode()
def log_probabilities(folder: str, ids: Tensor) -> Tensor:
    """[tokens, vocabulary] of a model in float32, its matrices decoded."""
    model = load(folder, torch.float32, decode="dense")[0]
    return model(ids.unsqueeze(0)).logits[0].log_softmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quantized")
    parser.add_argument("original")
    parser.add_argument("--text", required=True)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--kv-cache", choices=KV_CACHES, default=DEFAULT_KV_CACHE)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    packed, tokenizer = load(arguments.quantized, torch.float32, decode="packed")
    ids = windows(tokenizer, read_text(arguments.text), arguments.tokens, 1, None, source=arguments.text).ids[0]
    decoder = NativeDecoder(packed, len(ids), kv_cache=arguments.kv_cache)
    native = torch.stack([decoder.run(ids[i : i + 1]) for i in range(len(ids))]).log_softmax(-1)
    original, decoded = (log_probabilities(folder, ids) for folder in (arguments.original, arguments.quantized))

    def divergence(one: Tensor, other: Tensor) -> float:
        return float((one.exp() * (one - other)).sum(-1).double().mean())

    found = {
        "tokens": len(ids),
        "kv_cache": arguments.kv_cache,
        "kl_decoded": divergence(original, decoded),
        "kl_native": divergence(original, native),
        "kl_between": divergence(decoded, native),
        "same_top_token": float((decoded.argmax(-1) == native.argmax(-1)).float().mean()),
    }
    print(found)
    if arguments.out:
        write_json(arguments.out, found)


if __name__ == "__main__":
    main()
