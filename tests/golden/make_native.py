"""Writes ``native_v1``: a checkpoint of format version 1 that every later Octavo must decode to the same numbers.

Run it only for a *new* format version: ``PYTHONPATH=tests python tests/golden/make_native.py tests/golden/native_v2``.
The old folders stay as they are, since they stand for files that people have.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from formats.checkpoints import write_native
from formats.strategies import random_weight
from octavo.weight import BlockScale, Layout, Outliers

HIDDEN, INTERMEDIATE, VOCABULARY = 16, 24, 32
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "dtype": "float32",
}
LAYOUTS = {
    "self_attn.q_proj": Layout(shape=(16, 16), vector_length=4, stages=(4,), channel_norm="input", permuted=True),
    "self_attn.k_proj": Layout(
        shape=(8, 16),
        vector_length=3,
        stages=(3, 2),
        codebook_dtype="bfloat16",
        outliers=Outliers(2, 4, 3),
        tile=(6, 5),
    ),
    "self_attn.v_proj": Layout(
        shape=(8, 16), vector_length=2, stages=(3,), direction="row", codebook_dtype="int8", sign_bits=True, tile=(4, 8)
    ),
    "self_attn.o_proj": Layout(
        shape=(16, 16),
        vector_length=1,
        stages=(2,),
        codebook_dtype="grid",
        block_scale=BlockScale(5, 2),
        side_dtype="bfloat16",
    ),
    "mlp.gate_proj": Layout(shape=(24, 16), vector_length=5, stages=(2, 2, 2), codebook_dtype="float32", bias=True),
    "mlp.up_proj": Layout(
        shape=(24, 16), vector_length=4, stages=(5,), direction="row", block_scale=BlockScale(8), channel_norm="output"
    ),
    "mlp.down_proj": Layout(
        shape=(16, 24), vector_length=4, stages=(4,), permuted=True, side_dtype="float32", outliers=Outliers(1, 2, 2)
    ),
}


def main(folder: Path) -> None:
    """Write ``folder``/checkpoint, the order of its tensors, and what they decode to."""
    weights = {
        f"model.layers.0.{name}": random_weight(layout, seed, scale=0.1)
        for seed, (name, layout) in enumerate(LAYOUTS.items())
    }
    generator = torch.Generator().manual_seed(len(weights))
    kept = {"model.embed_tokens.weight": torch.randn(VOCABULARY, HIDDEN, generator=generator)}
    for name in ("layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm"):
        kept[f"model.{name}.weight"] = 1 + 0.1 * torch.randn(HIDDEN, generator=generator)
    write_native(folder / "checkpoint", weights, kept, CONFIG, max_shard_bytes=3000)
    order = [*kept, *(f"{module}.{name}" for module, weight in weights.items() for name in weight.tensors)]
    (folder / "order.json").write_text(json.dumps(order, indent=1) + "\n")
    decoded = {module: weight.dequantize() for module, weight in weights.items()}
    save_file(decoded, folder / "decoded.safetensors")
    (folder / "decoded.safetensors").chmod(0o644)
    hashes = {module: hashlib.sha256(matrix.numpy().tobytes()).hexdigest() for module, matrix in decoded.items()}
    (folder / "decoded.json").write_text(json.dumps(hashes, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
