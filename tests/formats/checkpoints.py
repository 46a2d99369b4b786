"""Small checkpoints to read, and tools to damage them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo import formats
from octavo.formats import native
from octavo.formats.writer import ShardWriter
from octavo.weight import VQWeight


def write_plain(folder: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int = 1 << 30) -> dict[str, Any]:
    """Write tensors in the given order and return the index."""
    writer = ShardWriter(folder, max_shard_bytes)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    return writer.finish()


def write_native(
    folder: Path,
    weights: Mapping[str, VQWeight],
    kept: Mapping[str, Tensor] | None = None,
    config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 1 << 30,
    method: str = "random",
) -> None:
    """Write a native checkpoint with its config and manifest."""
    tensors = dict(kept or {})
    for module, weight in weights.items():
        tensors |= {f"{module}.{name}": tensor for name, tensor in weight.tensors.items()}
    write_plain(folder, tensors, max_shard_bytes)
    layouts = {module: weight.layout for module, weight in weights.items()}
    quantization = native.quantization_config(layouts, method, {"seed": 0})
    (folder / "config.json").write_text(json.dumps({**(config or {}), "quantization_config": quantization}))
    formats.write_manifest(folder)


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    """Apply ``change`` in place to a JSON file."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def header_and_payload(path: Path) -> tuple[dict[str, Any], bytes]:
    """The parsed header of a safetensors file and the bytes after it."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def put_header(path: Path, header: Mapping[str, Any] | bytes, payload: bytes) -> None:
    """Write a safetensors file with any header, legal or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + payload)


def edit_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Apply ``change`` in place to the header of a safetensors file; the payload stays."""
    header, payload = header_and_payload(path)
    change(header)
    put_header(path, header, payload)


def plain_tensors() -> dict[str, Tensor]:
    """One tensor of every dtype that models use, odd sizes, a scalar."""
    return {
        "b.weight": torch.arange(15, dtype=torch.float32).reshape(3, 5),
        "a.codes": torch.arange(-4, 3, dtype=torch.int8),
        "c.half": torch.tensor([[1.5, -2.0, 65504.0]], dtype=torch.float16),
        "c.brain": torch.tensor([3.0e38, 1e-30], dtype=torch.bfloat16),
        "words": torch.tensor([-(2**31), 2**31 - 1], dtype=torch.int32),
        "perm": torch.tensor([-32768, 32767, 0], dtype=torch.int16),
        "long": torch.tensor([2**62], dtype=torch.int64),
        "flag": torch.tensor([True, False, True]),
        "scalar": torch.tensor(0.1, dtype=torch.float64),
    }
