"""Neurons in the order that a method quantizes best, wherever the block then computes the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from octavo.algorithms import Algorithm
from octavo.calibration import capture
from octavo.models.adapter import CausalModel
from octavo.models.neurons import Neurons, find_neurons

#: A block that computes the same may differ by rounding: largest share of what it adds to the hidden states.
_ROUNDING = 1e-3


def load_reordered(
    causal: CausalModel,
    index: int,
    algorithm: Algorithm,
    hidden: Sequence[Tensor],
    kwargs: Sequence[dict[str, Any]],
    note: Callable[[str], None],
) -> nn.Module:
    """Block ``index`` as the method wants it: its neurons in :meth:`Algorithm.row_order`, folded into both neighbours.

    Names say where neurons are, and a forward pass whether that is true: where the block then gives something else
    (functions between the layers that mix channels), it stays as it is.

    Args:
        hidden, kwargs: a batch of what the block is called with; without one nothing is reordered.
        note: takes what the user should know.
    """
    block = causal.load_block(index)
    if not algorithm.orders_rows or not hidden:
        return block
    orders = {neurons: _order(causal, algorithm, neurons) for neurons in _neurons(causal, index)}
    if not orders:
        return block
    where = causal.blocks[index]
    (wanted,) = capture.forward(block, hidden, kwargs, where)
    causal.release_block(index)
    for neurons, order in orders.items():
        for name in neurons.makers:
            causal.reorder(name, outputs=order)
        causal.reorder(neurons.reader, inputs=neurons.inputs(order))
    block = causal.load_block(index)
    (got,) = capture.forward(block, hidden, kwargs, where)
    if (got - wanted).norm() <= _ROUNDING * (wanted - hidden[0]).norm():
        return block
    note(f"{where}: its neurons keep their order, since the block would compute something else in another")
    causal.release_block(index)
    return causal.load_block(index)


def _neurons(causal: CausalModel, index: int) -> list[Neurons]:
    return find_neurons(causal.targets(index), causal.config.get_text_config())


def _order(causal: CausalModel, algorithm: Algorithm, neurons: Neurons) -> Tensor:
    """The order of the makers' outputs, head by head."""
    parts, first = [], 0
    for pieces in zip(*(causal.weight(name).chunk(neurons.heads) for name in neurons.makers), strict=True):
        order = algorithm.row_order(pieces)
        parts.append(order + first)
        first += order.numel()
    return torch.cat(parts)
