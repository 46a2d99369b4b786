"""Output head and embedding as further quantized matrices: which layouts they get, and what their codes are chosen by.

The head is a linear layer like the others, with the second moment of what it reads; an embedding is looked up, so that
every element of a row counts the same. A matrix that is both at once gets a mixture of the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from octavo._core.errors import UsageError
from octavo.algorithms import Algorithm
from octavo.algorithms.universal import Universal
from octavo.calibration.data import Tokens
from octavo.layout import Layout
from octavo.math.hessian import HessianAccumulator
from octavo.models.adapter import CausalModel

#: For heads alone: finer than any matrix of a block would get.
_FINE = "gaussian-v4-k256-256-256"
#: What an embedding's own errors weigh in a matrix that is head and embedding, against those of the head.
TIED_SHARE = 0.1


def head_algorithm(algorithm: Algorithm) -> Universal:
    """The method for head and embedding: universal codebooks, with the other options of ``algorithm`` if it has them.

    Rows stay apart, for they are looked up one by one.
    """
    base = algorithm if isinstance(algorithm, Universal) else Universal(side_dtype=algorithm.side_dtype)
    return replace(base, codebook=None, direction="row", transform="input", scale_block=0)


def head_layouts(model: CausalModel, algorithm: Algorithm, bits: float) -> dict[str, Layout]:
    """Layouts of the matrices at the ends of a model, with codes of ``bits`` bits per weight; scales come on top.

    Raises:
        UsageError: no codebook has so many bits.
    """
    assert model.ends is not None
    layouts = {}
    for name, target in model.ends.targets.items():
        base, shape = head_algorithm(algorithm), (target.shape, target.bias)
        choices = [*base.candidates(*shape), *replace(base, codebook=_FINE).candidates(*shape)]
        found = {layout.nominal_bits: layout for layout in choices}
        if bits not in found:
            known = ", ".join(f"{b:g}" for b in sorted(found))
            raise UsageError(f"--head-bits wanted one of {known}, got {bits:g}.")
        layouts[name] = found[bits]
    return layouts


def head_statistics(causal: CausalModel, tokens: Tokens, hidden: Sequence[Tensor]) -> HessianAccumulator:
    """The second moment of what the head reads, where ``hidden`` [sequences, tokens, width] left the last block."""
    accumulator, first = HessianAccumulator(hidden[0].shape[-1]), 0
    with causal.ending(tokens.ids[: len(hidden[0])], hidden[0]) as ending:
        for states in hidden:
            ids = tokens.ids[first : first + len(states)]
            # The model's code wants tensors with a version, which states of inference mode lack.
            accumulator.add(ending.states(ids, states.clone()).detach().flatten(0, 1))
            first += len(states)
    return accumulator


def tied_hessian(hessian: Tensor, share: float = TIED_SHARE) -> Tensor:
    """H for a matrix that is embedding as well: (1 - share) H / mean(diag H) + share I, [width, width]."""
    scale = (1 - share) / hessian.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    return hessian * scale + share * torch.eye(len(hessian), dtype=hessian.dtype)
