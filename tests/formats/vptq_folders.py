"""Small folders in the VPTQ format and in its dialects, from entries of ``config_for_layers``."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from formats.checkpoints import write_plain
from golden.vptq_layers import pack

Entry = dict[str, Any]
Floats = Literal["float16", "bfloat16", "float32", "mixed"]
#: Where the entries stand in config.json.
Form = Literal["paths", "shared", "flat", "text"]
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def make_entry(
    out: int,
    *,
    groups: tuple[int, int],
    vector_length: int = 4,
    centroids: int = 16,
    residual: int = -1,
    outliers: tuple[int, int, int] = (0, -1, -1),
    norm: bool = False,
    norm_dim: int = 0,
    permuted: bool = False,
    packed: bool = True,
    as_float: bool = False,
    bias: bool = False,
) -> Entry:
    """An entry; ``groups``: number and columns of each; ``outliers``: columns, their vector length and centroids."""
    entry: Entry = {
        "in_features": outliers[0] + groups[0] * groups[1],
        "out_features": out,
        "vector_lens": [outliers[1], vector_length],
        "num_centroids": [outliers[2], centroids],
        "num_res_centroids": [-1, residual],
        "group_num": groups[0],
        "group_size": groups[1],
        "outlier_size": outliers[0],
        "enable_norm": norm,
        "enable_perm": permuted,
        "is_indice_packed": packed,
        "indices_as_float": as_float,
        "bias": bias,
    }
    return entry | ({"norm_dim": norm_dim} if norm_dim else {})


def random_entry(rng: random.Random) -> Entry:
    """Any small geometry of the format, the published package's own limits left aside."""
    outliers = (0, -1, -1)
    if rng.random() < 0.5:
        outliers = (rng.randint(1, 5), rng.randint(2, 16), 1 << rng.randint(1, 6))
    norm, packed = rng.random() < 0.6, rng.random() < 0.7
    return make_entry(
        rng.randint(1, 40),
        groups=(rng.randint(1, 4), rng.randint(1, 12)),
        vector_length=rng.randint(1, 16),
        centroids=1 << rng.randint(1, 7),
        residual=1 << rng.randint(1, 8) if rng.random() < 0.5 else -1,
        outliers=outliers,
        norm=norm,
        norm_dim=rng.randint(0, 1) if norm else 0,
        permuted=rng.random() < 0.5,
        packed=packed,
        as_float=rng.random() < 0.5,
        bias=rng.random() < 0.5,
    )


def make_tensors(entry: Entry, seed: int = 0, floats: Floats = "float16", wide: bool = False) -> dict[str, Tensor]:
    """Random tensors for an entry, by their names in the file.

    Args:
        floats: dtype of all float tensors; "mixed" draws one for each.
        wide: permutation and outlier indices in int32, as GPTQModel stores them.
    """
    rng = np.random.default_rng(seed)
    (v0, v), (k0, k), (_, kr) = (entry[key] for key in ("vector_lens", "num_centroids", "num_res_centroids"))
    out, inp, groups, columns = (entry[key] for key in ("out_features", "in_features", "group_num", "group_size"))
    rows = -(-out // v)

    def numbers(*shape: int, scale: float = 1.0, offset: float = 0.0) -> Tensor:
        dtype = _FLOATS[rng.integers(3)] if floats == "mixed" else getattr(torch, floats)
        return torch.from_numpy(rng.standard_normal(shape) * scale + offset).to(dtype)

    def integers(values: np.ndarray, as_float: bool = False) -> Tensor:
        if wide:
            return torch.from_numpy(values.astype(np.int32))
        stored = torch.from_numpy(values.astype(np.uint16).view(np.int16))
        return stored.view(torch.float16) if as_float else stored

    main = rng.integers(k, size=(groups, rows, columns))
    residual = rng.integers(kr, size=main.shape) if kr > 0 else np.zeros_like(main)
    tensors = {"centroids.weight": numbers(groups, k * v)}
    if kr > 0:
        tensors["res_centroids.weight"] = numbers(groups, kr * v, scale=0.25)
    if entry["is_indice_packed"]:
        width = k.bit_length() - 1
        elements = (main | residual << width).astype(np.uint64)
        tensors["indices"] = pack(elements, width + (kr.bit_length() - 1 if kr > 0 else 0))
    else:
        tensors["indices"] = integers(main, entry["indices_as_float"])
        if kr > 0:
            tensors["res_indices"] = integers(residual, entry["indices_as_float"])
    if entry["outlier_size"]:
        codes = rng.integers(k0, size=(1, -(-out // v0), entry["outlier_size"]))
        tensors["outlier_indices"] = integers(codes, entry["indices_as_float"])
        tensors["outlier_centroids.weight"] = numbers(1, k0 * v0, scale=2.0)
    if entry["enable_perm"]:
        tensors["perm"] = integers(rng.permutation(inp))
    if entry["enable_norm"]:
        length = out if entry.get("norm_dim", 0) else inp
        tensors["weight_scale"] = numbers(length, scale=0.2, offset=1.0)
        tensors["weight_bias"] = numbers(length, scale=0.1)
    if entry["bias"]:
        tensors["bias"] = numbers(out)
    return tensors


def quantization(entries: Mapping[str, Entry], form: Form = "paths") -> dict[str, Any]:
    """``quantization_config`` with the entries in one of the forms that exist."""
    if form == "shared":
        # One for all modules of a name.
        leaves = {module.rpartition(".")[2]: entry for module, entry in entries.items()}
        return {"quant_method": "vptq", "shared_layer_config": leaves}
    return {"quant_method": "vptq", **(entries if form == "flat" else {"config_for_layers": dict(entries)})}


def write_folder(
    folder: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    config: Mapping[str, Any],
    form: Form = "paths",
    max_shard_bytes: int = 1 << 30,
) -> Path:
    """Write a checkpoint: tensors by module and name, ``quantization_config``, and one tensor that is not quantized."""
    flat = {f"{module}.{name}": tensor for module, named in tensors.items() for name, tensor in named.items()}
    write_plain(folder, {"norm.weight": torch.ones(6), **flat}, max_shard_bytes)
    parts = {"quantization_config": dict(config)}
    (folder / "config.json").write_text(json.dumps({"text_config": parts} if form == "text" else parts))
    return folder


def raw(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """The tensors as (dtype name, shape, bytes), which is all that the oracle wants to know."""
    return {
        name: (str(t.dtype).removeprefix("torch."), tuple(t.shape), t.reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, t in tensors.items()
    }
