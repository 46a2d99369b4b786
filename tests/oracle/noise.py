"""What noise in one matrix costs, by two ordinary forward passes of the whole model in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo._core.seeds import generator


def whole_model(folder: Path) -> Any:
    """The model as transformers loads it, in float64."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def divergence(model: Any, tokens: Tensor, name: str, seed: int, error: float, transposed: bool = False) -> float:
    """KL per token between the model and itself with noise of relative size ``error`` in every row of matrix ``name``.

    Every window has noise of its own.

    Args:
        tokens: [windows, ctx].
        transposed: the layer stores [in, out].
    """
    parameter = model.get_submodule(name).weight
    original = parameter.detach().clone()
    weight = original.T if transposed else original
    total = 0.0
    for number, ids in enumerate(tokens.split(1)):
        # Drawn as numbers for a float32 matrix [out, in].
        drawn = torch.randn(weight.shape, generator=generator(seed, f"noise {number} in {name}")).double()
        noise = drawn * (error * weight.norm(dim=1) / drawn.norm(dim=1)).unsqueeze(1)
        torch.testing.assert_close(noise.norm() / weight.norm(), torch.tensor(error, dtype=torch.float64))
        with torch.no_grad():
            log_p = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
            parameter.add_(noise.T if transposed else noise)
            log_q = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
            parameter.copy_(original)
        total += float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    return total / len(tokens)
