"""Writes the golden checkpoints, which every later Octavo must decode to the same numbers.

``native_v1`` is format version 1 as Octavo 0.1 wrote it; ``native_v1_scales`` has what was added to it later: int4 and
low-rank codebooks, and log2 block scales.

Run it only for a *new* set: ``PYTHONPATH=tests python tests/golden/make_native.py tests/golden/<name of a set>``.
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
from octavo.layout import BlockScale, Layout, Outliers

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
V1 = {
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
#: Every block scale here is a log2 scale.
V1_SCALES = {
    "self_attn.q_proj": Layout(shape=(16, 16), vector_length=4, stages=(4,), codebook_dtype="int4", tile=(8, 8)),
    "self_attn.k_proj": Layout(
        shape=(8, 16), vector_length=2, stages=(3,), direction="row", tile=(4, 8), codebook_rank=2
    ),
    "self_attn.v_proj": Layout(
        shape=(8, 16),
        vector_length=3,
        stages=(2,),
        codebook_dtype="int8",
        side_dtype="bfloat16",
        sign_bits=True,
        tile=(6, 5),
        codebook_rank=3,
    ),
    "self_attn.o_proj": Layout(
        shape=(16, 16),
        vector_length=2,
        stages=(4,),
        direction="row",
        codebook_dtype="int8",
        tile=(16, 8),
        block_scale=BlockScale(8, 0, 4),
    ),
    "mlp.gate_proj": Layout(
        shape=(24, 16),
        vector_length=1,
        stages=(2,),
        codebook_dtype="grid",
        side_dtype="bfloat16",
        block_scale=BlockScale(5, 2, 3),
    ),
    "mlp.up_proj": Layout(
        shape=(24, 16),
        vector_length=3,
        stages=(1, 2),
        direction="row",
        codebook_dtype="int4",
        tile=(10, 6),
        block_scale=BlockScale(6, 0, 8),
        channel_norm="input",
        permuted=True,
        outliers=Outliers(2, 4, 3),
        bias=True,
    ),
    "mlp.down_proj": Layout(
        shape=(16, 24),
        vector_length=4,
        stages=(4,),
        codebook_dtype="float32",
        side_dtype="float32",
        block_scale=BlockScale(7, 0, 1),
        channel_norm="output",
    ),
}
SETS = {"native_v1": V1, "native_v1_scales": V1_SCALES}


def main(folder: Path) -> None:
    """Write ``folder``/checkpoint, the order of its tensors, and what they decode to; the name chooses the set."""
    weights = {
        f"model.layers.0.{name}": random_weight(layout, seed, scale=0.1)
        for seed, (name, layout) in enumerate(SETS[folder.name].items())
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
