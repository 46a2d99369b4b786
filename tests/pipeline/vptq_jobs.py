"""Small jobs that write VPTQ's format, and what there is to say about their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from integration.vptq_models import MODULES, tensors_of
from octavo import formats
from octavo.models import quantized

#: Half of the matrices are left as they are: a job takes half a second.
SKIP = ("q_proj", "v_proj", "gate_proj", "up_proj")
QUANTIZED = tuple(module for module in MODULES if not module.endswith(SKIP))
OPTIONS: dict[str, Any] = {"iterations": 1, "sweeps": 0, "sample": 16, "update_columns": 0}
TUNE: dict[str, Any] = {
    **{"ctx": 16, "samples": 36, "held_out": 4, "batch_tokens": 64, "steps": 4, "eval_every": 2, "lr": 2e-3},
    "device": "cpu",
}


def job(text: Path, **changes: Any) -> dict[str, Any]:
    """A job that writes VPTQ's format."""
    settings = {"method": "vptq", "bits": 2.5, "calib": text, "samples": 4, "ctx": 16, "options": OPTIONS}
    return {**settings, "format": "vptq", "skip": SKIP, **changes}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def weights_of(folder: Path) -> dict[str, Tensor]:
    """Decoded in float32."""
    found = formats.read_weights(folder, quantized.shapes(folder))
    return {module: weight.dequantize() for module, weight in found}


def kept_of(folder: Path) -> dict[str, Tensor]:
    """The tensors of no quantized matrix."""
    taken = quantized.check(folder).tensors()
    return {name: tensor for name, tensor in tensors_of(folder).items() if name not in taken}


def logits(folder: Path) -> Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(3, 30)[None]).logits
