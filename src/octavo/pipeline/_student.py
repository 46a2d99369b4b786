"""The quantized model while it is tuned: float32, with trainable side data, measured against the original's answers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from octavo import formats
from octavo._core.errors import FormatError, UsageError
from octavo.calibration.products import calibration_products
from octavo.formats.reader import DTYPES, CheckpointReader
from octavo.models import skeleton
from octavo.models.names import match_names
from octavo.models.source import ModelSource
from octavo.nn import VQLinear
from octavo.pipeline._tunable import PARTS, TunableLinear, norms_of, train_norm

#: Numbers of one chunk of logits: 64 MiB in float32.
_CHUNK_NUMBERS = 1 << 24


class Student(nn.Module):
    """A quantized checkpoint as a float32 model whose continuous quantities can be trained.

    Args:
        source: the folder; it must be a checked native one.
        train: the :data:`PARTS` to train.
        device: where it runs.

    Attributes:
        tuned: name in the checkpoint (of an untouched layout: of the relaxed one) -> parameter.
        units: by the same names, the natural step size of each.
        layers: module path -> its layer.
        memory_share: the share of the memory that the inputs of all layers may take in a step, and that matrices may
            take which are decoded once.

    Raises:
        FormatError: transformers cannot load it.
        UsageError: there is nothing of the given parts, or an architecture that cannot be split before its head.
    """

    def __init__(self, source: ModelSource, train: Sequence[str], device: torch.device) -> None:
        super().__init__()
        self.name, self.device, self._stored = source.name, device, source.dtype
        self.memory_share = 0.25
        self.config = formats.check(source.folder)
        self.reader = CheckpointReader(source.folder, strict=True)
        self.model = _load(source).requires_grad_(False).to(device)
        names = match_names(self.model, self.reader)
        self.tuned: dict[str, nn.Parameter] = {}
        self.units: dict[str, float] = {}
        self.layers: dict[str, TunableLinear] = {}
        self._norms: dict[str, tuple[nn.Module, str]] = {}
        ends = (self.model.get_output_embeddings(), self.model.get_input_embeddings())
        parts = self.config.head.matrices if self.config.head else ()
        for name in self.config.layouts:
            old = self.model.get_submodule(name)
            if name in parts or any(old is end for end in ends):
                # Both models go through the quantized head: what it lost is not the blocks' to make up for.
                continue
            assert isinstance(old, VQLinear)
            layer = self.layers[name] = TunableLinear(old.vq_weight(), train, name)
            self.model.set_submodule(name, layer)
            for key, parameter in layer.named_parameters(recurse=False):
                self.tuned[f"{name}.{key}"], self.units[f"{name}.{key}"] = parameter, layer.unit(key)
        dense = 4 * sum(layer.start.layout.weights for layer in self.layers.values())
        for layer in self.layers.values():
            layer.decode_once = dense < _memory(device) * self.memory_share
        if "norms" in train:
            for name, module, leaf in norms_of(self.model):
                self._round_norm(names[name], module, leaf)
        if not self.tuned:
            missing, parts = ", ".join(train), ", ".join(PARTS)
            raise UsageError(f"{self.name} has nothing of {missing} to train; the parts of a model are {parts}.")
        _, self._blocks = skeleton.find_blocks(self.model)
        self._decoder = self.model.get_decoder()
        self._probe()

    def _round_norm(self, stored: str, module: nn.Module, leaf: str) -> None:
        self._norms[stored] = module, leaf
        dtype = DTYPES[self.reader.info(stored)[0]]
        self.tuned[stored], self.units[stored] = train_norm(module, leaf, dtype)

    # ---------------------------------------------------------------- running

    def states(self, ids: Tensor, *, exact: bool = False) -> Tensor:
        """What the head reads [sequences, tokens, width], for token ids [sequences, tokens]."""
        with calibration_products(torch.float32 if exact else self._stored, self.device):
            output = self._decoder(input_ids=ids.to(self.device), use_cache=False)
        # The model's own code wants its own kind of answer from the stand-in in `logits`.
        self._answer = type(output)
        return output.last_hidden_state.float()

    def logits(self, states: Tensor) -> Tensor:
        """Logits [n, vocabulary] of what :meth:`states` gave, [n, width], by the model's own code.

        Soft caps and scales of logits are thus done as the model does them, without the whole tensor of logits.
        """
        states = states.unsqueeze(0)
        blank = torch.zeros(states.shape[:2], dtype=torch.int64, device=states.device)
        self._decoder.forward = lambda *_, **__: self._answer(last_hidden_state=states)
        try:
            return self.model(input_ids=blank, use_cache=False).logits.squeeze(0)
        finally:
            del self._decoder.forward

    @torch.no_grad()
    def _probe(self) -> None:
        ids = torch.arange(8, device=self.device).unsqueeze(0)
        whole, parts = self.model(input_ids=ids, use_cache=False).logits, self.logits(self.states(ids, exact=True)[0])
        if whole.shape[1:] != parts.shape or not torch.allclose(whole[0], parts, rtol=1e-4, atol=1e-5):
            raise UsageError(
                f"{self.name}: {type(self.model).__name__} does more between its decoder and its logits than can be "
                "run apart; Octavo cannot tune this architecture."
            )

    def divergence(self, states: Tensor, original: Tensor, scale: float | None = None) -> tuple[float, Tensor | None]:
        """The sum over positions of KL(original || student) in nats, in chunks that bound the memory.

        Args:
            states: [n, width], what the student's head reads; original: the same of the original model.
            scale: if given, the gradient of ``scale`` times the sum with respect to ``states`` is computed too.
        """
        total, gradients = 0.0, []
        step = max(_CHUNK_NUMBERS // self.model.config.get_text_config().vocab_size, 1)
        for part, theirs in zip(states.detach().split(step), original.split(step), strict=True):
            mine = part.requires_grad_(scale is not None)
            with torch.set_grad_enabled(scale is not None):
                logits = self.logits(mine)
            with torch.no_grad():
                log_p = torch.log_softmax(self.logits(theirs.to(self.device)).float(), dim=-1)
                log_q = torch.log_softmax(logits.detach().float(), dim=-1)
                p = log_p.exp()
                total += float(log_p.sub_(log_q).mul_(p).sum(-1).double().sum())
                if scale is not None:
                    # d KL / d logits = q - p.
                    slope = log_q.exp_().sub_(p).mul_(scale)
                    gradients += torch.autograd.grad(logits, mine, slope.to(logits.dtype))
        return total, torch.cat(gradients) if scale is not None else None

    def step(self, ids: Tensor, original: Tensor) -> float:
        """Mean divergence over all positions of [sequences, tokens] but each sequence's last; adds up gradients.

        ``original`` [sequences, tokens, width] is what the original's head reads.
        """
        positions = ids.shape[0] * (ids.shape[1] - 1)
        with self._less_memory(ids.numel()):
            states = self.states(ids)[:, :-1].flatten(0, 1)
            total, gradient = self.divergence(states, original[:, :-1].flatten(0, 1), 1 / positions)
            states.backward(gradient)
        return total / positions

    @contextmanager
    def _less_memory(self, tokens: int) -> Iterator[None]:
        """While inside, a forward pass keeps no decoded matrix; the backward pass decodes each of them again.

        Where even the inputs of the layers would take too much, it keeps those of the blocks alone and runs each block
        twice. Both ways give the same numbers.
        """
        # About half as much again is kept of norms, activations and attention.
        inputs = 6 * tokens * sum(sum(layer.start.layout.shape) for layer in self.layers.values())
        by_block = inputs > _memory(self.device) * self.memory_share
        for layer in self.layers.values():
            layer.decode_again = not by_block
        if by_block:
            for block in self._blocks:
                block.forward = _checkpointed(block.forward)
        try:
            yield
        finally:
            if by_block:
                for block in self._blocks:
                    del block.forward

    @torch.no_grad()
    def measure(self, ids: Tensor, original: Callable[[int], Tensor], batch: int, *, at_start: bool = False) -> float:
        """Mean divergence over held-out windows [windows, tokens], ``batch`` at a time.

        Args:
            original: gives what the original's head reads [tokens, width] in window i.
            at_start: with the matrices as they were before tuning.
        """
        total = 0.0
        for layer in self.layers.values():
            layer.at_start = at_start
        for part in torch.arange(len(ids)).split(batch):
            theirs = torch.stack([original(int(i)) for i in part])
            states = self.states(ids[part])[:, :-1].flatten(0, 1)
            total += self.divergence(states, theirs[:, :-1].flatten(0, 1))[0]
        for layer in self.layers.values():
            layer.at_start = False
        return total / (ids.shape[0] * (ids.shape[1] - 1))

    # ---------------------------------------------------------------- values

    def values(self) -> dict[str, Tensor]:
        """Copies of all tuned tensors, on the CPU."""
        return {name: parameter.detach().to("cpu", copy=True) for name, parameter in self.tuned.items()}

    @torch.no_grad()
    def set_values(self, values: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`values` gave."""
        for name, parameter in self.tuned.items():
            parameter.copy_(values[name])

    def stored(self, *, at_start: bool) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the tuned checkpoint with its name; those that cannot change and the norms come first."""
        for name in self.reader.names():
            if name in self._norms and not at_start:
                module, leaf = self._norms[name]
                yield name, getattr(module, leaf).detach().cpu().to(DTYPES[self.reader.info(name)[0]])
            elif name.rpartition(".")[0] not in self.layers:
                yield name, self.reader.read(name)
        for name, layer in self.layers.items():
            for key, tensor in (layer.start if at_start else layer.rounded()).tensors.items():
                yield f"{name}.{key}", tensor


def _load(source: ModelSource) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.folder, dtype=torch.float32, local_files_only=True, trust_remote_code=source.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise FormatError(f"{source.folder}: transformers cannot load this model: {error}") from error
    return model.eval()


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
