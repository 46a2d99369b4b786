"""Gradients of the loss at the output of every linear layer, with the memory of one decoder block.

The loss is the cross entropy of labels y_t that are drawn from the model's own prediction at every position t::

    loss = sum_t -log p(y_t | tokens up to t)        g_z = d loss / d z    for the output z of a linear layer

so E[g_z g_z^T] over the labels is the Fisher information: KL(model || model with z + d) = 1/2 d^T E[g_z g_z^T] d + ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from octavo._core import io
from octavo._core.errors import NumericalError, ResourceError, UsageError
from octavo.calibration import capture
from octavo.calibration.products import calibration_products
from octavo.models.adapter import CausalModel
from octavo.models.ending import Ending
from octavo.models.skeleton import Target

#: Sequences per pass are chosen so that a batch has about this many tokens.
_BATCH_TOKENS = 4096
#: Numbers of one chunk of logits: 64 MiB in float32.
_CHUNK_NUMBERS = 1 << 24

#: Called with (block index, full module name, inputs x [tokens, in], output gradients g [tokens, out]), in float32.
Visit = Callable[[int, str, Tensor, Tensor], None]


def backpropagate(
    causal: CausalModel,
    tokens: Tensor,
    visit: Visit,
    *,
    generator: torch.Generator,
    folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Walk the loss's gradient back through the blocks and show every target's inputs and output gradients.

    The blocks are run forward once, keeping what enters each of them, and then from the last to the first a second
    time with autograd. In memory are one block, its activations for one batch, and hidden states of all tokens twice
    (with ``folder``) or once per block.

    Args:
        causal: the original model; it runs in float32.
        tokens: int64 [windows, ctx], full windows. Every position predicts a label, the last one of a window too.
        visit: called once per batch and target: blocks from last to first, batches of a block in order. A target that
            a batch does not reach has 0 rows, one that is called more often (experts) the rows of all its calls. The
            tensors are for reading, layers may share them.
        generator: of the labels, one number per position; equal states give equal bits.
        folder: where the blocks' inputs are kept, in one file each (float32, windows * ctx * width numbers) that is
            removed after use and after an error; None keeps them in memory.
        progress: called with (steps done, steps); a step is a block in either direction, or the head.

    Raises:
        UsageError: no tokens, windows longer than the model allows, an architecture that cannot be run in parts.
        NumericalError: NaN or infinity in weights, activations or gradients; names the block.
        ResourceError: no space in ``folder``.
    """
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise UsageError(f"gradients want tokens [windows >= 1, ctx >= 1], got shape {list(tokens.shape)}.")
    batches = tokens.split(max(_BATCH_TOKENS // tokens.shape[1], 1))
    blocks = len(causal.blocks)

    def report(done: int) -> None:
        if progress is not None:
            progress(done, 2 * blocks + 1)

    with _Kept(folder) as kept:
        inputs = causal.capture_inputs([(ids, None) for ids in batches])
        states, inputs.hidden = inputs.hidden, []
        kept.require_space(4 * blocks * sum(part.numel() for part in states))
        for index, name in enumerate(causal.blocks):
            kept.put(index, states)
            block = causal.load_block(index)
            with calibration_products(causal.source.dtype):
                states = capture.forward(block, states, [k[index] for k in inputs.kwargs], name)
            causal.release_block(index)
            report(index + 1)
        # From here on `states` holds what there is of d loss / d states, batch by batch.
        with causal.ending(batches[0], states[0]) as ending:
            for number, ids in enumerate(batches):
                states[number] = _loss_gradient(ending, ids, states[number], generator, causal.source.name)
        report(blocks + 1)
        for index in reversed(range(blocks)):
            where = causal.blocks[index]
            block = causal.load_block(index)
            targets = {name.removeprefix(f"{where}."): target for name, target in causal.targets(index).items()}
            for number, arguments in enumerate(inputs.kwargs):
                with calibration_products(causal.source.dtype):
                    found, states[number] = block_gradients(
                        block, targets, kept.get(index, number), arguments[index], states[number], where
                    )
                for name in targets:
                    # Popped, so that none of them outlives its use.
                    visit(index, f"{where}.{name}", *found.pop(name))
            kept.drop(index)
            causal.release_block(index)
            report(2 * blocks + 1 - index)


def draw_labels(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """One label [n], int64, per row of ``probabilities`` [n, vocabulary], by inverting the cumulative distribution.

    It takes one number of ``generator`` per row, so the labels do not depend on how the rows are cut into calls.
    """
    # Sums in float32 would lose all tokens that are less likely than 6e-8, which may be likely together.
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    drawn = torch.rand(len(probabilities), 1, generator=generator, dtype=torch.float64, device=generator.device)
    thresholds = drawn.to(probabilities.device) * cumulative[:, -1:]
    labels = torch.searchsorted(cumulative, thresholds, right=True).squeeze(1)
    return labels.clamp_(max=probabilities.shape[1] - 1)


def token_weights(g: Tensor) -> Tensor:
    """How much every token's outputs matter: s_t = mean_j (d loss / d z_tj)^2 for gradients ``g`` [tokens, out].

    The weights [tokens] of GuidedQuant (Kim et al. 2025, arXiv 2505.07004) with all outputs in one group.
    """
    return g.square().mean(dim=1)


def block_gradients(
    block: nn.Module,
    targets: Mapping[str, Target],
    states: Tensor,
    arguments: dict[str, Any],
    gradient: Tensor,
    where: str = "block",
) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
    """Run ``block`` on one batch and push a gradient back through it.

    Args:
        block: a decoder block with real weights.
        targets: linear layers by their name relative to the block.
        states: [sequences, tokens, width], what enters the block.
        arguments: the block's other arguments.
        gradient: of the loss with respect to the block's output, of the shape of ``states``.
        where: the block's name, for messages.

    Returns:
        By target, its inputs [rows, in] and the gradient with respect to its outputs [rows, out], over all of its
        calls; and the gradient with respect to ``states``.

    Raises:
        NumericalError: a gradient holds NaN or infinity.
        UsageError: the block overwrites an input of a target.
    """
    calls: dict[str, list[_Call]] = {name: [] for name in targets}

    def record(name: str, args: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        # An output that does not depend on the states has a gradient all the same.
        output.requires_grad_()
        calls[name].append(_Call(next(iter((*args, *named.values()))), output))

    handles = [
        block.get_submodule(name).register_forward_hook(
            lambda _, args, named, output, name=name: record(name, args, named, output), with_kwargs=True
        )
        for name in targets
    ]
    leaf = states.detach().requires_grad_()
    try:
        with torch.enable_grad():
            output = block(leaf, **arguments)
            output = output[0] if isinstance(output, tuple) else output
            torch.autograd.backward(output, gradient)
    finally:
        for handle in handles:
            handle.remove()
    found = {name: _join(calls[name], target, states, f"{where}.{name}") for name, target in targets.items()}
    assert leaf.grad is not None
    _require_finite(leaf.grad, f"{where}, at its input")
    return found, leaf.grad


class _Call:
    """One call of a linear layer: its input, and the gradient that arrives at its output."""

    def __init__(self, x: Tensor, output: Tensor) -> None:
        self._x, self._version = x.detach(), x._version
        # A hook, and not `output.grad`, sees the output as it was before later operations change it in place.
        self._g = output.new_zeros(())
        self._shape = output.shape
        output.register_hook(self._receive)

    def _receive(self, g: Tensor) -> None:
        self._g = g.detach()

    def rows(self, where: str) -> tuple[Tensor, Tensor]:
        """The inputs [rows, in] and gradients [rows, out]; these are zero if nothing depends on the output."""
        if self._x._version != self._version:
            raise UsageError(
                f"{where}: the model overwrites the layer's input before the block ends, so it cannot be kept for the "
                "way back. Skip the layer (--skip), or use a method that needs no gradients."
            )
        g = self._g.expand(self._shape)
        return self._x.reshape(-1, self._x.shape[-1]).float(), g.reshape(-1, g.shape[-1]).float()


def _join(calls: Sequence[_Call], target: Target, like: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """Inputs and gradients of all calls of a layer."""
    rows, columns = target.shape
    if not calls:
        return like.new_empty(0, columns), like.new_empty(0, rows)
    pairs = [call.rows(where) for call in calls]
    x, g = pairs[0] if len(pairs) == 1 else map(torch.cat, zip(*pairs, strict=True))
    _require_finite(g, f"{where}, at its output")
    return x, g


def _loss_gradient(ending: Ending, ids: Tensor, final: Tensor, generator: torch.Generator, name: str) -> Tensor:
    """The gradient of the loss of one batch with respect to what left the last block, [sequences, tokens, width]."""
    # A copy, because what an inference pass gave cannot take part in autograd.
    final = final.clone().requires_grad_()
    states = ending.states(ids, final)
    slopes: list[Tensor] = []
    for rows in states.detach().flatten(0, 1).split(max(_CHUNK_NUMBERS // ending.vocabulary, 1)):
        rows.requires_grad_()
        with torch.enable_grad():
            logits = ending.logits(rows)
        # d loss / d logits = p - [the label].
        slope = torch.softmax(logits.detach(), dim=-1)
        _require_finite(slope, f"{name}, in its predictions", "values")
        labels = draw_labels(slope, generator).unsqueeze(1)
        slope.scatter_add_(1, labels, slope.new_full(labels.shape, -1.0))
        slopes += torch.autograd.grad(logits, rows, slope)
    torch.autograd.backward(states, torch.cat(slopes).view_as(states))
    assert final.grad is not None
    _require_finite(final.grad, f"{name}, at the output of its last block")
    return final.grad


def _require_finite(values: Tensor, where: str, what: str = "gradients") -> None:
    # A finite sum proves finite entries; a sum that overflows is settled by the exact test.
    if not bool(torch.isfinite(values.sum())) and not bool(torch.isfinite(values).all()):
        bad = int((~torch.isfinite(values)).sum())
        raise NumericalError(
            f"{where}: {bad} of {values.numel()} {what} are NaN or infinite. Check the checkpoint (octavo verify); a "
            "model whose gradients overflow float32 can only be quantized by methods that need none."
        )


class _Kept:
    """What entered each block: in files of a folder, or in memory. On exit nothing is left."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._held: dict[int, list[Tensor]] = {}
        self._files: dict[int, Path] = {}

    def __enter__(self) -> _Kept:
        return self

    def __exit__(self, *_: object) -> None:
        for index in [*self._files, *self._held]:
            self.drop(index)

    def require_space(self, needed: int) -> None:
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            io.require_space(self._folder, needed, "the hidden states of all blocks")

    def put(self, index: int, states: Sequence[Tensor]) -> None:
        if self._folder is None:
            self._held[index] = list(states)
            return
        path = self._files[index] = self._folder / f"states_{index}.safetensors"
        try:
            with io.disk_errors(path):
                save_file({f"batch_{number}": part.contiguous() for number, part in enumerate(states)}, path)
        except Exception as error:
            if "No space left" in str(error) or "File too large" in str(error):
                # safetensors reports the operating system's error as text only.
                raise ResourceError(f"cannot write {path}: {error}. Free some space and run the job again.") from error
            raise

    def get(self, index: int, number: int) -> Tensor:
        """A copy of its own: inference tensors cannot take part in autograd, mapped memory may round differently."""
        if self._folder is None:
            return self._held[index][number].clone()
        with safe_open(self._files[index], framework="pt") as file:
            return file.get_tensor(f"batch_{number}").clone()

    def drop(self, index: int) -> None:
        self._held.pop(index, None)
        if path := self._files.pop(index, None):
            path.unlink(missing_ok=True)
