"""What errors cost, measured: the KL of the model with noise in one matrix after the other.

By the linearity theorem of HIGGS (arXiv 2411.17525) small errors of several matrices cost the sum of what they cost
alone, and each costs in proportion to its square::

    KL(model || model with W_l + E_l for all l) = sum_l alpha_l t_l^2        t_l = |E_l| / |W_l| (Frobenius)

for errors without structure. So one noise per matrix tells alpha, and nothing is assumed: the square of a token's own
gradient leaves out that the errors of all tokens come from one matrix, so that those of values add up over the tokens
that attention averages, and what all keys share cancels.

Errors under feedback are not without structure, though, and :mod:`octavo.pipeline.guide` can only say what feedback
saves token by token; of such sums it saves more. Against matrices that were quantized alone, gradients predict too
little for values and noise too much, by about as much (docs/quality.md): an alternative, no certain improvement.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from octavo._core.errors import UsageError
from octavo._core.seeds import generator
from octavo.calibration import capture
from octavo.models.adapter import CausalModel
from octavo.models.ending import Ending

#: Relative size of the noise. The KL is quadratic in it up to a few percent, and far above rounding.
ERROR = 0.05
#: A mean over fewer tokens than this is too uncertain.
_LEAST_TOKENS = 2048
_LEAST_WINDOWS = 2
#: Hidden states of this many bytes are carried through the blocks together.
_HELD_BYTES = 1 << 29
#: Numbers of one chunk of logits: 64 MiB in float32.
_CHUNK_NUMBERS = 1 << 24


def measure_noise(
    causal: CausalModel,
    tokens: Tensor,
    seed: int,
    *,
    windows: int | None = None,
    error: float = ERROR,
    held_bytes: int = _HELD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """KL per token (nats) over the square of the noise's relative size, alpha, by name of every target.

    Every row of a matrix gets Gaussian noise of the same relative size, as a codebook with a scale per row leaves it,
    and every window another draw of it: where a few inputs are far larger than all others, draws differ by much more
    than texts do.

    Hidden states of as many noisy models as fit in ``held_bytes`` go through the blocks together, so that a block is
    read once for all of them; those that share the blocks up to the noise share the states as well. In memory are one
    block, these states, and a chunk of logits.

    Args:
        causal: the original model. It runs in float32 whatever it is stored in: the rounding of products in bfloat16
            is noise in all matrices at once, not far below what is to be measured in one.
        tokens: int64 [windows, ctx], full windows.
        seed: of the noise, together with the matrix's name alone.
        windows: how many of them, the first ones, are used; by default as many as have 2,048 tokens, two at least.
        error: relative Frobenius norm of the noise.
        held_bytes: at least one noisy model is carried, whatever the number. It changes no result.
        progress: called with (steps done, steps); a step is a block that was read, or the head.

    Raises:
        UsageError: no tokens, windows longer than the model allows, an architecture that cannot be run in parts.
        NumericalError: NaN or infinity in weights or activations; names the block.
    """
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise UsageError(f"noise wants tokens [windows >= 1, ctx >= 1], got shape {list(tokens.shape)}.")
    ctx = tokens.shape[1]
    tokens = tokens[: max(-(-_LEAST_TOKENS // ctx), _LEAST_WINDOWS) if windows is None else windows]
    parts = tokens.split(1)
    inputs = causal.capture_inputs([(ids, None) for ids in parts])
    clean, inputs.hidden = inputs.hidden, []
    together = max(held_bytes // (4 * sum(states.numel() for states in clean)), 1)
    blocks = len(causal.blocks)
    targets = [(i, name) for i in range(blocks) for name in causal.targets(i)]
    groups = [targets[first : first + together] for first in range(0, len(targets), together)]
    # What is needed of the original after a group: what enters the block where the next group begins.
    begins = [0, *(group[0][0] for group in groups[1:])]
    steps, done = sum(blocks - first + 1 for first in begins), 0
    alphas: dict[str, float] = {}
    final: list[Tensor] = []

    def report() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, steps)

    for number, group in enumerate(groups):
        upcoming = begins[number + 1] if number + 1 < len(groups) else group[-1][0]
        noisy: dict[str, list[Tensor]] = {}
        states = clean
        for index in range(begins[number], blocks):
            if index == upcoming:
                clean = states
            where, arguments = causal.blocks[index], [k[index] for k in inputs.kwargs]
            block = causal.load_block(index)
            for name, passed in noisy.items():
                noisy[name] = capture.forward(block, passed, arguments, where)
            for name in (name for i, name in group if i == index):
                noisy[name] = _with_noise(causal, block, name, states, arguments, seed, error)
            # The first group takes the original to its end, with which all others are compared.
            if number == 0 or index < upcoming:
                states = capture.forward(block, states, arguments, where)
            causal.release_block(index)
            report()
        if number == 0:
            final = states
        with causal.ending(parts[0], final[0]) as ending:
            alphas |= {name: kl / error**2 for name, kl in _divergences(ending, parts, final, noisy).items()}
        report()
    return alphas


def _with_noise(
    causal: CausalModel,
    block: nn.Module,
    name: str,
    states: Sequence[Tensor],
    arguments: Sequence[dict[str, Any]],
    seed: int,
    error: float,
) -> list[Tensor]:
    """What leaves a loaded block, window by window, with noise in one of its matrices, which is taken away again."""
    weight, outputs = causal.weight(name), []
    length = weight.norm(dim=1, keepdim=True)
    for number, (entering, others) in enumerate(zip(states, arguments, strict=True)):
        noise = torch.randn(weight.shape, generator=generator(seed, f"noise {number} in {name}"))
        noise *= error * length / noise.norm(dim=1, keepdim=True)
        causal.set_weight(block, name, noise.add_(weight))
        outputs += capture.forward(block, [entering], [others], f"{name} with noise")
    causal.set_weight(block, name, weight)
    return outputs


def _divergences(
    ending: Ending, parts: Sequence[Tensor], final: Sequence[Tensor], noisy: dict[str, list[Tensor]]
) -> dict[str, float]:
    """Mean KL(original || noisy) over all tokens; of both what left the last block is given, window by window."""
    totals = dict.fromkeys(noisy, 0.0)
    for number, ids in enumerate(parts):
        # Copies, because the model's own code may not take what an inference pass gave.
        own = ending.states(ids, final[number].clone()).detach().flatten(0, 1)
        others = {n: ending.states(ids, states[number].clone()).detach().flatten(0, 1) for n, states in noisy.items()}
        step = max(_CHUNK_NUMBERS // ending.vocabulary, 1)
        for start in range(0, len(own), step):
            with torch.no_grad():
                logits = ending.logits(own[start : start + step])
                p = logits.softmax(-1)
                for name, rows in others.items():
                    totals[name] += float(_kl(p, ending.logits(rows[start : start + step]) - logits).sum())
    return {name: total / sum(ids.numel() for ids in parts) for name, total in totals.items()}


def _kl(p: Tensor, change: Tensor) -> Tensor:
    """KL [n] of probabilities p [n, vocabulary] and those whose logits are d, ``change``, above: log E_p e^(d - E_p d).

    ``change`` is overwritten. The difference of two logarithms, whose rounding is of first order in d, would not do:
    in float32 that may be as much as small noise costs.
    """
    change -= (p * change).sum(-1, keepdim=True)
    return change.expm1_().mul_(p).sum(-1).log1p_()
