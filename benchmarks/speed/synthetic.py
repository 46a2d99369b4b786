"""Models of a given shape with random weights, for timing alone: an Octavo folder, and GGUF files for llama.cpp.

    python benchmarks/speed/synthetic.py OUT [--layers 8] [--codebook gaussian-v8-k256-256] [--type Q4_K --type IQ2_XXS]

writes OUT/octavo and OUT/TYPE.gguf, Llama-2-7B's blocks unless told otherwise, all with a head of 4,096 rows in 16
bits. What they compute is noise; every bit pattern of these types is a weight, so they are as fast as real ones.

    octavo bench OUT/octavo --peer OUT/Q4_K.gguf --peer OUT/IQ2_XXS.gguf --threads 2 --json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from octavo import codebooks, formats
from octavo.formats import ShardWriter, native
from octavo.layout import BlockScale, Layout, Transform
from octavo.math import hadamard

VOCABULARY = 4096
#: Bytes and weights of a block of each type, and where its half-precision scales are.
BLOCKS = {
    "Q4_0": (18, 32, (0,)),
    "Q4_K": (144, 256, (0, 2)),
    "Q2_K": (84, 256, (80, 82)),
    "IQ2_XXS": (66, 256, (0,)),
    "IQ2_XS": (74, 256, (0,)),
    "IQ3_XXS": (98, 256, (0,)),
    "TQ2_0": (66, 256, (64,)),
}


def shapes(hidden: int, intermediate: int) -> dict[str, tuple[int, int]]:
    """(out, in) of the matrices of a block, by module."""
    attention = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    mlp = {f"mlp.{name}_proj": (intermediate, hidden) for name in ("gate", "up")}
    return {**attention, **mlp, "mlp.down_proj": (hidden, intermediate)}


def layout_of(codebook: str, shape: tuple[int, int]) -> Layout:
    """What `octavo quantize` makes of a matrix with a universal codebook."""
    book = codebooks.get(codebook)
    return Layout(
        shape,
        book.vector_length,
        book.stages,
        direction="row",
        codebook_dtype="universal",
        sign_bits=book.sign_bits,
        codebook=codebook,
        block_scale=BlockScale(shape[1], 0, 8),
        transform=Transform(hadamard.block_size(shape[1], 256)),
    )


def random_tensors(layout: Layout, generator: torch.Generator) -> dict[str, Tensor]:
    """Random codes, and scales that keep activations in range."""
    tensors: dict[str, Tensor] = {}
    for name, (dtype, shape) in layout.tensors().items():
        if name == "permutation":
            tensors[name] = torch.randperm(layout.shape[1], generator=generator).to(dtype)
        elif name == "input_signs":
            # Matrices that read the same vector have the same signs, as in models that are quantized.
            tensors[name] = torch.randint(-(2**31), 2**31, shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        elif dtype == torch.int32:
            tensors[name] = torch.randint(-(2**31), 2**31, shape, generator=generator).to(dtype)
        elif dtype == torch.int8:
            tensors[name] = torch.randint(-127, 128, shape, generator=generator).to(dtype)
        elif name.startswith("codebook_") and not name.startswith("codebook_scale"):
            # Not zeros, of which products take less power, and so less time on a GPU.
            tensors[name] = (torch.randn(shape, generator=generator) * 0.02).to(dtype)
        else:
            sizes = {"block_scale_low": -0.5 * float(np.log2(layout.shape[1])), "channel_scale": 1.0}
            size = 0.01 if name.startswith("codebook_scale") else sizes.get(name, 0.0)
            tensors[name] = torch.full(shape, size, dtype=dtype)
    return tensors


def write_octavo(folder: Path, config: dict[str, int], codebook: str) -> None:
    """An Octavo checkpoint with a tokenizer of numbered words."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    generator = torch.Generator().manual_seed(0)
    layouts: dict[str, Layout] = {}
    for layer in range(config["num_hidden_layers"]):
        for name, shape in shapes(config["hidden_size"], config["intermediate_size"]).items():
            layouts[f"model.layers.{layer}.{name}"] = layout_of(codebook, shape)
    writer = ShardWriter(folder)
    for name, layout in layouts.items():
        for key, tensor in random_tensors(layout, generator).items():
            writer.add(f"{name}.{key}", tensor)
    for name, tensor in dense(config, generator):
        writer.add(name, tensor)
    writer.finish()
    llama = LlamaConfig(**config, vocab_size=VOCABULARY, tie_word_embeddings=False, dtype="bfloat16").to_dict()
    llama["architectures"] = ["LlamaForCausalLM"]
    llama["quantization_config"] = native.quantization_config(layouts, "universal", {})
    (folder / "config.json").write_text(json.dumps(llama))
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1").save_pretrained(folder)
    formats.write_manifest(folder)


def dense(config: dict[str, int], generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """Embedding, head and norms in bfloat16."""
    hidden = config["hidden_size"]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        yield name, (torch.randn(VOCABULARY, hidden, generator=generator) * 0.02).bfloat16()
    norms = [f"model.layers.{i}.{n}_layernorm" for i in range(config["num_hidden_layers"]) for n in NORMS]
    for name in (*norms, "model.norm"):
        yield f"{name}.weight", torch.ones(hidden, dtype=torch.bfloat16)


NORMS = ("input", "post_attention")


def write_gguf(path: Path, config: dict[str, int], kind: str) -> None:
    """The same shape for llama.cpp, all matrices of the blocks of one type."""
    size, weights, scales = BLOCKS[kind]
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("none")
    random = np.random.default_rng(0)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    names["mlp.down_proj"] = "ffn_down"
    for layer in range(config["num_hidden_layers"]):
        for name, (out, inp) in shapes(hidden, config["intermediate_size"]).items():
            data = random.integers(0, 256, (out * inp // weights, size), dtype=np.uint8)
            for at in scales:
                data[:, at : at + 2] = np.frombuffer(np.float16(1e-3).tobytes(), np.uint8)
            raw = data.reshape(out, inp // weights * size)
            kind_number = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(f"blk.{layer}.{names[name]}.weight", raw, raw_dtype=kind_number)
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(hidden, np.float32))
    for name in ("token_embd.weight", "output.weight"):
        writer.add_tensor(name, (0.02 * random.standard_normal((VOCABULARY, hidden))).astype(np.float16))
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    for option, value in (("layers", 8), ("hidden", 4096), ("intermediate", 11008), ("heads", 32)):
        parser.add_argument(f"--{option}", type=int, default=value)
    parser.add_argument("--codebook", default="gaussian-v8-k256-256")
    parser.add_argument("--type", action="append", choices=sorted(BLOCKS), default=[], help="repeatable")
    arguments = parser.parse_args()
    config = {
        "hidden_size": arguments.hidden,
        "intermediate_size": arguments.intermediate,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": arguments.heads,
        "num_key_value_heads": arguments.heads,
        "max_position_embeddings": 4096,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not (arguments.out / "octavo").exists():
        write_octavo(arguments.out / "octavo", config, arguments.codebook)
    for kind in arguments.type:
        write_gguf(arguments.out / f"{kind}.gguf", config, kind)


if __name__ == "__main__":
    main()
