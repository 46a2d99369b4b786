"""Gradients at the outputs of linear layers by one ordinary backward pass through the whole model, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def whole_model(
    folder: Path, tokens: Tensor, layers: Iterable[str], draw: Callable[[Tensor], Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """By layer, its inputs [tokens, in] and the gradient of the loss with respect to its outputs [tokens, out].

    Args:
        tokens: [windows, ctx].
        layers: full module names.
        draw: labels [windows * ctx] for probabilities [windows * ctx, vocabulary].
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    x: dict[str, Tensor] = {}
    g: dict[str, Tensor] = {}

    def listen(name: str) -> None:
        layer = model.get_submodule(name)
        layer.register_forward_pre_hook(lambda _, inputs: x.update({name: inputs[0].detach()}))
        layer.register_full_backward_hook(lambda _, __, out: g.update({name: out[0]}))  # type: ignore[arg-type]

    for name in layers:
        listen(name)
    logits = model(input_ids=tokens, use_cache=False).logits.flatten(0, 1)
    labels = draw(torch.softmax(logits.detach(), dim=-1))
    cross_entropy(logits, labels, reduction="sum").backward()
    return {name: (x[name].flatten(0, -2), g[name].flatten(0, -2)) for name in x}
