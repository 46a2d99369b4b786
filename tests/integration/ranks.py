"""What each rank of ``test_tensor_parallel.py`` does; a module of its own, which other processes import."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

import octavo.integrations.transformers  # noqa: F401
from octavo.nn import VQLinear


def compute(rank: int, world: int, port: int, folder: Path, out: Path) -> None:
    """Load a folder on ``world`` ranks; logits and generated tokens are left in ``out``, and the shapes of matrices."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    config = DistributedConfig(tp_size=world)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        found = {"logits": model(ids).logits, "tokens": model.generate(ids, max_new_tokens=5, do_sample=False)}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, VQLinear)}
    shapes = {name: layer.layout.shape for name, layer in layers.items()}
    facts = {"shapes": shapes, "serializable": model.hf_quantizer.is_serializable()}
    (out / f"{rank}.json").write_text(json.dumps(facts))
    save_file(found, out / f"{rank}.safetensors")
