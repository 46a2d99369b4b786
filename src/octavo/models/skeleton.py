"""The network without its weights: building it, finding its blocks and linear layers, driving it part by part."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from octavo._core.errors import UsageError, did_you_mean
from octavo.models.source import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Target:
    """A linear layer to be quantized.

    Attributes:
        shape: (out_features, in_features).
        bias: it has one.
        transposed: the checkpoint stores [in, out] (transformers' Conv1D).
    """

    shape: tuple[int, int]
    bias: bool
    transposed: bool


@dataclass
class BlockInputs:
    """What the decoder blocks are called with.

    Attributes:
        hidden: per batch, the hidden states [sequences, tokens, width] that enter block 0.
        kwargs: ``kwargs[batch][block]`` are the other arguments; equal ones are the same objects.
        mask: per batch, the attention mask [sequences, tokens] (0 = padding) or None.
    """

    hidden: list[Tensor]
    kwargs: list[list[dict[str, Any]]]
    mask: list[Tensor | None]


def build(source: ModelSource) -> PreTrainedModel:
    """The model in eval mode, with parameters on the meta device and real buffers (rotary tables, embedding scales).

    Raises:
        UsageError: transformers has no causal language model for this configuration.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = deepcopy(source.config)
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        part.use_cache = False
    if getattr(config, "is_encoder_decoder", False):
        raise UsageError(
            f"{source.name} ({config.model_type}) is an encoder-decoder; Octavo takes decoder-only models."
        )
    if getattr(config.get_text_config(), "num_kv_shared_layers", 0):
        raise UsageError(
            f"{source.name}: blocks of {config.model_type} read the keys and values of earlier blocks "
            "(num_kv_shared_layers), so none can be run alone. Octavo does not support this."
        )
    try:
        # Buffers are computed in the default dtype: float32 keeps scales such as sqrt(width) exact for every run dtype.
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=source.trust_remote_code
            )
    except (ValueError, KeyError) as error:
        raise UsageError(
            f"{source.name}: transformers has no causal language model for model_type {config.model_type!r}: "
            f"{str(error)[:300]}"
        ) from error
    return model.eval().requires_grad_(False)


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The decoder's list of blocks and its name: the heaviest ModuleList of num_hidden_layers entries.

    Raises:
        UsageError: there is none.
    """
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    within = {id(m) for m in decoder.modules()}
    found = [
        (name, m)
        for name, m in model.named_modules()
        if isinstance(m, nn.ModuleList) and len(m) == count and id(m) in within
    ]
    if not found:
        lists = {f"{name} ({len(m)})" for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
        raise UsageError(
            f"{type(model).__name__} has no list of {count} decoder blocks (num_hidden_layers); its lists are: "
            f"{', '.join(sorted(lists)[:6]) or 'none'}. Octavo cannot run this architecture block by block."
        )
    return max(found, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def is_linear(module: nn.Module) -> bool:
    """A layer that computes x W^T + b and nothing else: nn.Linear or Conv1D, no subclass with a forward of its own."""
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in (nn.Linear, Conv1D))


def target_of(module: nn.Module) -> Target:
    """The description of a linear layer for which :func:`is_linear` holds."""
    transposed = not isinstance(module, nn.Linear)
    rows, columns = module.weight.shape  # type: ignore[misc]
    return Target((columns, rows) if transposed else (rows, columns), module.bias is not None, transposed)  # type: ignore[arg-type]


def linear_layers(model: PreTrainedModel) -> dict[str, Target]:
    """Every linear layer of a model by module path, the output head among them."""
    return {name: target_of(module) for name, module in model.named_modules() if is_linear(module)}


@dataclass(frozen=True)
class Ends:
    """A model's output head and its embedding.

    Attributes:
        head, embedding: their module paths.
        tied: they are one matrix.
        target: the head.
        targets: what is to be quantized, by path: the head, and the embedding [tokens, width] if it is not tied to it.
        taken: paths whose tensors the output does not have as they are.
    """

    head: str
    embedding: str
    tied: bool
    target: Target
    targets: dict[str, Target]
    taken: frozenset[str]


def find_ends(model: PreTrainedModel, name: str, *, head_only: bool = False) -> Ends:
    """The head and the embedding of a model; with ``head_only`` the embedding stays as it is, even if it is tied.

    Raises:
        UsageError: it has none, or they do more than a linear layer and a look-up.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    plain = {
        "output head": head is not None and is_linear(head),
        "embedding": type(embedding) is nn.Embedding and embedding.max_norm is None,
    }
    for (what, good), module in zip(plain.items(), (head, embedding), strict=True):
        if not good:
            kind = "missing" if module is None else f"a {type(module).__name__}"
            raise UsageError(f"{name}: the {what} of {type(model).__name__} is {kind}; --head-bits cannot quantize it.")
    at_head, at_embedding = paths[id(head)], paths[id(embedding)]
    tied = f"{at_head}.weight" in ties(model) or f"{at_embedding}.weight" in ties(model)
    target = target_of(head)  # type: ignore[arg-type]
    targets = {at_head: target}
    if head_only:
        return Ends(at_head, at_embedding, tied, target, targets, frozenset({at_head}))
    if not tied:
        targets[at_embedding] = Target(tuple(embedding.weight.shape), False, False)  # type: ignore[arg-type]
    return Ends(at_head, at_embedding, tied, target, targets, frozenset({at_head, at_embedding}))


def ties(model: PreTrainedModel) -> dict[str, str]:
    """Name of a tensor that checkpoints may leave out -> the one that it is tied to."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def matches(name: str, pattern: str) -> bool:
    """Does the glob ``pattern`` match whole consecutive segments of the dotted ``name``?

    ``mlp.gate`` matches ``layers.0.mlp.gate`` and everything below it, but not ``layers.0.mlp.gate_proj``.
    """
    parts, wanted = name.split("."), pattern.split(".")
    return any(
        all(fnmatchcase(part, glob) for part, glob in zip(parts[start:], wanted, strict=False))
        for start in range(len(parts) - len(wanted) + 1)
    )


def find_targets(blocks: Mapping[str, nn.Module], skip: Sequence[str], model_name: str) -> list[dict[str, Target]]:
    """Per block, its linear layers by full name, without the skipped ones.

    Raises:
        UsageError: a skip pattern that matches nothing, or matrices that are neither linear layers nor skipped.
    """
    targets: list[dict[str, Target]] = []
    used: set[str] = set()
    unseen: dict[str, tuple[int, ...]] = {}
    seen_weights = all_weights = 0
    known: set[str] = set()
    for prefix, block in blocks.items():
        found: dict[str, Target] = {}
        for name, module in block.named_modules(prefix=prefix):
            known.add(name.removeprefix(prefix + "."))
            hits = [pattern for pattern in skip if matches(name, pattern)]
            if hits and any(True for _ in module.parameters()):
                used.update(hits)
            linear = is_linear(module)
            if linear and not hits:
                found[name] = target_of(module)
            for leaf, parameter in module.named_parameters(recurse=False):
                full = f"{name}.{leaf}"
                hits = [pattern for pattern in skip if matches(full, pattern)]
                used.update(hits)
                if parameter.dim() < 2:
                    continue
                all_weights += parameter.numel()
                seen_weights += parameter.numel() if linear else 0
                if not linear and not hits:
                    unseen[full] = tuple(parameter.shape)
        targets.append(found)
    for pattern in skip:
        if pattern not in used:
            ends = {".".join(name.split(".")[i:]) for name in known for i in range(name.count(".") + 1)}
            raise UsageError(
                f"skip pattern {pattern!r} matches no module in the decoder blocks of {model_name}."
                f"{did_you_mean(pattern, sorted(ends))} Patterns are globs over whole dotted segments, such as "
                "'mlp.down_proj' or 'layers.0'."
            )
    if unseen:
        _refuse_unseen(unseen, seen_weights, all_weights, model_name)
    return targets


def _refuse_unseen(unseen: Mapping[str, tuple[int, ...]], seen: int, total: int, model_name: str) -> None:
    kinds: dict[tuple[str, tuple[int, ...]], int] = {}
    for name, shape in unseen.items():
        key = (re.sub(r"\.\d+(?=\.)", ".*", name), shape)
        kinds[key] = kinds.get(key, 0) + 1
    ordered = sorted(kinds.items(), key=lambda item: -item[1] * prod(item[0][1]))
    lines = [
        f"{count} x {name} {list(shape)}{' (fused 3-D experts)' if len(shape) == 3 and 'expert' in name else ''}"
        for (name, shape), count in ordered
    ]
    more = f"; and {len(lines) - 6} more kinds" if len(lines) > 6 else ""
    example = ".".join(ordered[0][0][0].removesuffix(".weight").split(".")[-2:])
    share = min(round(100 * seen / total), 99)
    raise UsageError(
        f"{model_name}: only {share} % of the weights in the decoder blocks are linear layers that Octavo can see "
        f"({seen:,} of {total:,}). Not seen: {'; '.join(lines[:6])}{more}. Octavo cannot quantize these; to keep them "
        f"as they are, name them in skip patterns of whole dotted segments, such as '{example}'."
    )


# -------------------------------------------------------------------------------------------------- driving


class Finished(Exception):
    """Raised by a stand-in to end a forward pass early."""


class Unused:
    """Stands for what a block returns besides hidden states; it must not reach another block."""


#: Called instead of a block: (index, hidden states, other arguments) -> what the block returns.
StandIn = Callable[[int, Tensor, dict[str, Any]], Any]


@contextmanager
def stand_ins(blocks: Sequence[nn.Module], name: str, replace: StandIn) -> Iterator[None]:
    """For one forward pass, the blocks do not compute: ``replace`` answers for them, in their place in the real model.

    It also checks what block-by-block work relies on: every block runs once and in order, and the model hands on the
    hidden states exactly as the block before returned them.

    Raises:
        UsageError: (from the forward pass) the model does otherwise.
    """
    state: dict[str, Any] = {"next": 0, "last": None, "version": 0}

    def forward(index: int, signature: inspect.Signature, *args: Any, **kwargs: Any) -> Any:
        where = f"{name}.{index}"
        hidden, others = _split_arguments(signature, args, kwargs, where)
        if index != state["next"]:
            raise UsageError(
                f"{where} is called where block {state['next']} is due: Octavo needs blocks that run once and in order."
            )
        if index > 0 and (hidden is not state["last"] or hidden._version != state["version"]):
            raise UsageError(
                f"the model changes the hidden states between {name}.{index - 1} and {where}; running it block by "
                "block would calibrate on wrong inputs. Octavo does not support this architecture."
            )
        if any(isinstance(value, Unused) for value in others.values()):
            raise UsageError(f"{where} gets more than hidden states from the block before it; it cannot be run alone.")
        if hidden.device.type == "meta":
            raise UsageError(f"{where}: the model computed its hidden states from weights that Octavo did not load.")
        answer = replace(index, hidden, others)
        passed = answer[0] if isinstance(answer, tuple) else answer
        state.update(next=index + 1, last=passed, version=passed._version)
        return answer

    for index, block in enumerate(blocks):
        block.forward = partial(forward, index, inspect.signature(type(block).forward))
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _split_arguments(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any], where: str
) -> tuple[Tensor, dict[str, Any]]:
    """A block's call as its hidden states and named other arguments."""
    bound = signature.bind(None, *args, **kwargs)
    named: dict[str, Any] = {}
    for key, value in list(bound.arguments.items())[1:]:
        kind = signature.parameters[key].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            raise UsageError(f"{where} takes unnamed arguments; Octavo cannot replay them.")
        named.update(value if kind is inspect.Parameter.VAR_KEYWORD else {key: value})
    first = next(iter(named), None)
    hidden = named.pop(first) if first is not None else None
    if not isinstance(hidden, Tensor):
        raise UsageError(f"{where} does not take hidden states as its first argument, but {type(hidden).__name__}.")
    return hidden, named


class SharedArguments:
    """Gives equal arguments of different batches one object, so that masks and rotary tables are held once."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[Any, ...], list[Tensor]] = {}
        self._dicts: dict[Any, dict[str, Any]] = {}
        self._alive: list[Any] = []

    def share(self, arguments: dict[str, Any], where: str) -> dict[str, Any]:
        """An equal dictionary, made of objects that were shared before where possible.

        Raises:
            UsageError: the block is handed a key-value cache, so a replay would attend to its own earlier writes.
        """
        replaced = {key: self._replace(value, f"{where}: argument {key}") for key, value in arguments.items()}
        return self._dicts.setdefault(_identity(replaced), replaced)

    def _replace(self, value: Any, where: str) -> Any:
        from transformers.cache_utils import Cache

        if isinstance(value, Tensor):
            known = self._tensors.setdefault((value.shape, value.dtype), [])
            for other in known:
                if other is value or torch.equal(other, value):
                    return other
            known.append(value)
            return value
        if isinstance(value, Cache):
            raise UsageError(
                f"{where} is a key-value cache although use_cache is off; blocks cannot be replayed alone."
            )
        if type(value) in (tuple, list):
            return type(value)(self._replace(v, where) for v in value)
        if type(value) is dict:
            return {k: self._replace(v, where) for k, v in value.items()}
        # Kept alive, because _identity compares other objects by their id.
        self._alive.append(value)
        return value


def _identity(value: Any) -> Any:
    """A hashable key that is equal for structures of the same objects (and of equal plain values)."""
    if type(value) is dict:
        return tuple((key, _identity(v)) for key, v in value.items())
    if type(value) in (tuple, list):
        return (type(value), *(_identity(v) for v in value))
    return (type(value), value if isinstance(value, bool | int | float | str | None) else id(value))
