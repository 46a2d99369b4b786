"""VPTQ folders as other people have them: random layers of the format in a tiny Llama, without Octavo's writer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from conftest import VOCABULARY, make_tokenizer
from formats.checkpoints import write_plain
from golden.vptq_layers import DTYPES, random_layer
from octavo.formats.reader import CheckpointReader
from octavo.weight import VQWeight

#: Wide enough for the kernels of the published package, which want more than 256 inputs.
HIDDEN, INTERMEDIATE, KEYS, BLOCKS = 288, 320, 144, 2
#: Name in a block -> (out, in).
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
MODULES = tuple(f"model.layers.{block}.{name}" for block in range(BLOCKS) for name in SHAPES)
#: What the published package takes in an entry of ``config_for_layers``.
ENTRY_KEYS = {
    *("in_features", "out_features", "vector_lens", "num_centroids", "num_res_centroids", "group_num", "group_size"),
    *("outlier_size", "enable_norm", "enable_perm", "is_indice_packed", "indices_as_float", "bias"),
}


def make_wide(folder: Path, dtype: str = "bfloat16", *, tied: bool = True) -> Path:
    """Save a Llama of two blocks with its tokenizer; every matrix has more than 256 inputs."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=72,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        initializer_range=0.08,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(7)
    model: Any = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    make_tokenizer(add_bos=True).save_pretrained(folder)
    return folder


def entry(
    shape: tuple[int, int],
    main: int,
    v: int,
    *,
    residual: int = 0,
    groups: int = 1,
    outliers: int = 0,
    norm: bool = True,
    permuted: bool = False,
    bias: bool = False,
) -> dict[str, Any]:
    """An entry of ``config_for_layers``; ``main`` and ``residual`` are index bits, outliers have vectors of 4."""
    out, inp = shape
    return {
        "in_features": inp,
        "out_features": out,
        "vector_lens": [4 if outliers else -1, v],
        "num_centroids": [64 if outliers else -1, 1 << main],
        "num_res_centroids": [-1, 1 << residual if residual else -1],
        "group_num": groups,
        "group_size": (inp - outliers) // groups,
        "outlier_size": outliers,
        "enable_norm": norm,
        "enable_perm": permuted,
        "is_indice_packed": True,
        "indices_as_float": False,
        "bias": bias,
    }


#: Settings of the matrices, dealt out in turn: all within what the published package reads.
STYLES: tuple[dict[str, Any], ...] = (
    {"main": 8, "v": 4},
    {"main": 8, "v": 8, "residual": 8, "groups": 2, "outliers": 8, "permuted": True},
    {"main": 10, "v": 6, "residual": 3, "permuted": True},
    {"main": 4, "v": 2, "groups": 2},
    {"main": 12, "v": 12, "outliers": 5, "permuted": True},
    {"main": 4, "v": 16, "residual": 4},
)


def write_vptq(original: Path, out: Path, max_shard_bytes: int = 1 << 30, **raw: Any) -> dict[str, dict[str, Any]]:
    """A VPTQ folder with random layers for all of :data:`MODULES` of a wide model; returns the entries.

    ``raw`` are further keys of ``quantization_config``.
    """
    config = json.loads((original / "config.json").read_text())
    dtype = config["dtype"]
    assert dtype in DTYPES
    entries = {
        module: entry(SHAPES[module.split(".", 3)[3]], **STYLES[index % len(STYLES)])
        for index, module in enumerate(MODULES)
    }
    with CheckpointReader(original) as reader:
        tensors = {name: reader.read(name) for name in reader.names() if name.rpartition(".")[0] not in entries}
    if config["tie_word_embeddings"]:
        # As the published package needs it.
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    for seed, (module, layer) in enumerate(entries.items()):
        made = random_layer({"seed": seed, "dtype": dtype, "exponent": -3, "layer": layer})
        tensors |= {f"{module}.{name}": tensor for name, tensor in made.items()}
    write_plain(out, tensors, max_shard_bytes)
    config["torch_dtype"] = config.pop("dtype")
    config["quantization_config"] = {
        "quant_method": "vptq",
        "config_for_layers": entries,
        "enable_proxy_error": False,
        "modules_to_not_convert": ["lm_head"],
        **raw,
    }
    (out / "config.json").write_text(json.dumps(config))
    for path in original.glob("*token*"):
        shutil.copy(path, out)
    return entries


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder by its name."""
    with CheckpointReader(folder) as reader:
        return {name: reader.read(name).clone() for name in reader.names()}


def same_bits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Equal names, dtypes and bytes."""
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype
        and tensor.shape == other[name].shape
        and _bytes(tensor) == _bytes(other[name])
        for name, tensor in one.items()
    )


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def dense_model(folder: Path, matrices: Mapping[str, Tensor], weights: Mapping[str, VQWeight]) -> Any:
    """A plain float32 model of transformers with these matrices and everything else from the folder.

    Biases are those of ``weights``; what the folder's quantized matrices store is otherwise not looked at.
    """
    config: Any = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    state = {name: t.float() for name, t in tensors_of(folder).items() if name in model.state_dict()}
    for module, matrix in matrices.items():
        state[f"{module}.weight"] = matrix.float()
        bias = weights[module].bias
        if bias is not None:
            state[f"{module}.bias"] = bias.float()
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model
