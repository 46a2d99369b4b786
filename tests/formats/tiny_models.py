"""Tiny models of several architectures, and a stand-in for quantization: random codes for every matrix."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from formats.checkpoints import write_native
from formats.strategies import random_weight
from octavo import formats
from octavo.formats.reader import CheckpointReader
from octavo.layout import BlockScale, Layout, Outliers
from octavo.weight import VQWeight

VOCABULARY = 256
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
#: Name -> a function that builds the model; tied and untied heads, biases, Conv1D.
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**COMMON, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**COMMON, tie_word_embeddings=False)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**COMMON)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
}
#: Every option of a layout that changes which tensors there are, dealt out to the matrices in turn.
STYLES = [
    Layout(
        shape=(1, 8), vector_length=4, stages=(5, 3), permuted=True, channel_norm="input", outliers=Outliers(2, 4, 3)
    ),
    Layout(
        shape=(1, 8), vector_length=2, stages=(4,), direction="row", codebook_dtype="int8", block_scale=BlockScale(8)
    ),
    Layout(shape=(1, 8), vector_length=1, stages=(3,), codebook_dtype="grid", block_scale=BlockScale(16, 3)),
    Layout(
        shape=(1, 8), vector_length=3, stages=(4,), codebook_dtype="bfloat16", side_dtype="bfloat16", sign_bits=True
    ),
    Layout(shape=(1, 8), vector_length=4, stages=(4,), codebook_dtype="float32", side_dtype="float32", tile=(16, 8)),
    Layout(
        shape=(1, 8),
        vector_length=2,
        stages=(3,),
        direction="row",
        codebook_dtype="int4",
        block_scale=BlockScale(8, 0, 4),
    ),
    Layout(shape=(1, 8), vector_length=2, stages=(4,), codebook_dtype="int8", tile=(8, 16), codebook_rank=2),
    Layout(shape=(1, 8), vector_length=2, stages=(4,), tile=(8, 16), codebook_rank=1, block_scale=BlockScale(8, 2, 3)),
]


def write_tokenizer(folder: Path) -> None:
    vocabulary = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def decoded_model(original: Path, weights: dict[str, VQWeight], dtype: torch.dtype) -> Any:
    """The original model with the decoded matrices (and stored biases) in its own linear layers."""
    model = AutoModelForCausalLM.from_pretrained(original, dtype=dtype)
    for name, weight in weights.items():
        layer: Any = model.get_submodule(name)
        matrix = weight.dequantize().to(dtype)
        layer.weight.data.copy_(matrix.t() if isinstance(layer, Conv1D) else matrix)
        if weight.bias is not None:
            layer.bias.data.copy_(weight.bias.to(dtype))
    return model


def quantize(
    original: Path, out: Path, max_shard_bytes: int = 20_000, change: Callable[[dict], Any] | None = None
) -> dict:
    """A native checkpoint with random codes for every matrix of every block."""
    model = AutoModelForCausalLM.from_pretrained(original)
    weights: dict[str, VQWeight] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear | Conv1D) and not name.startswith("lm_head"):
            shape = (layer.nf, layer.nx) if isinstance(layer, Conv1D) else (layer.out_features, layer.in_features)
            style = replace(STYLES[len(weights) % len(STYLES)], shape=shape, bias=layer.bias is not None)
            weights[name] = random_weight(style, len(weights), scale=0.1)
    if change is not None:
        change(weights)
    with CheckpointReader(original) as reader:
        kept = {n: reader.read(n) for n in reader.names() if n.rpartition(".")[0] not in weights}
        config = json.loads((original / "config.json").read_text())
        write_native(out, weights, kept, config, max_shard_bytes)
    for path in original.glob("*token*"):
        shutil.copy(path, out)
    formats.write_manifest(out)
    return weights
