"""Where the neurons of a block may be put in another order without changing what it computes.

The hidden units of an MLP are rows of the matrices that make them and columns of the one that reads them; only
element-wise functions lie between. The channels of a value head are rows of the value matrix, and columns of the output
matrix once for each query head that reads the head. Queries and keys are bound by rotary embeddings, and the residual
stream by every matrix of the model: they stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from octavo.models.skeleton import Target

#: Names of the layers of an MLP: those that make its hidden units, and the one that reads them.
_MLPS = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("w1", "w3"), "w2"),
    (("up_proj",), "down_proj"),
    (("c_fc",), "c_proj"),
    (("fc1",), "fc2"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
)
_VALUES = (("v_proj", "o_proj"), ("v_proj", "out_proj"), ("v_proj", "dense"))


@dataclass(frozen=True)
class Neurons:
    """Channels between layers: outputs of ``makers``, inputs of ``reader``.

    Attributes:
        makers, reader: full module names.
        heads: equal parts of the outputs, within which channels may change places.
        repeats: how often each part is among the reader's inputs, one copy next to the other.
    """

    makers: tuple[str, ...]
    reader: str
    heads: int = 1
    repeats: int = 1

    def inputs(self, outputs: Tensor) -> Tensor:
        """The order of the reader's inputs that goes with one of the makers' outputs, which keeps to the heads."""
        width = outputs.numel() // self.heads
        first = torch.arange(self.heads, device=outputs.device).unsqueeze(1) * width
        within = (outputs.view(self.heads, width) - first).repeat_interleave(self.repeats, dim=0)
        start = torch.arange(len(within), device=outputs.device).unsqueeze(1) * width
        return (within + start).flatten()


def find_neurons(targets: Mapping[str, Target], config: Any) -> list[Neurons]:
    """The MLPs and value heads of a block by their layers' names, all of which must be among its targets.

    Args:
        targets: the linear layers to be quantized, by full module name.
        config: of the text model, for its number of attention heads.
    """
    found = []
    for parent in sorted({name.rpartition(".")[0] for name in targets}):
        for makers, reader in _MLPS:
            names = tuple(f"{parent}.{name}" for name in (*makers, reader))
            if all(name in targets for name in names):
                units = {targets[name].shape[0] for name in names[:-1]} | {targets[names[-1]].shape[1]}
                if len(units) == 1:
                    found.append(Neurons(names[:-1], names[-1]))
                break
        for value, output in _VALUES:
            names = f"{parent}.{value}", f"{parent}.{output}"
            if all(name in targets for name in names):
                found += _value_heads(*names, targets, config)
                break
    return found


def _value_heads(value: str, output: str, targets: Mapping[str, Target], config: Any) -> list[Neurons]:
    """Value heads and the output matrix, if the shapes are those of attention in heads."""
    queries, (channels, read) = config.num_attention_heads, (targets[value].shape[0], targets[output].shape[1])
    width = read // queries
    if read % queries or not width or channels % width or queries % (channels // width):
        return []
    heads = channels // width
    return [Neurons((value,), output, heads, queries // heads)]
