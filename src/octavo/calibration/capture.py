"""Running one decoder block over the calibration set, and the Hessians of its linear layers on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from octavo._core.errors import NumericalError, UsageError
from octavo.math.hessian import HessianAccumulator, exact_float32


@dataclass(frozen=True)
class Captured:
    """What :func:`collect` saw.

    Attributes:
        hessians: statistics by target; targets that read the same tensors (q/k/v, gate/up) have the same object.
        drifts: by target, E[s (x_o - x) x^T] [in, in] with the inputs x_o of the original model; empty without those.
        originals: what leaves the block in the original model; empty likewise.
        unused: targets that saw no input (only with ``allow_unused``); their statistics are empty.
    """

    hessians: dict[str, HessianAccumulator]
    unused: tuple[str, ...]
    drifts: dict[str, Tensor] = field(default_factory=dict)
    originals: list[Tensor] = field(default_factory=list)

    @property
    def bad_tokens(self) -> dict[str, int]:
        """Non-finite rows that were left out, by target; only targets that had any."""
        return {name: h.bad_tokens for name, h in self.hessians.items() if h.bad_tokens}


def collect(
    block: nn.Module,
    targets: Sequence[str],
    hidden: Sequence[Tensor],
    kwargs: Sequence[dict[str, Any]],
    mask: Sequence[Tensor | None],
    *,
    where: str = "block",
    allow_unused: bool = False,
    weights: Mapping[str, Tensor] | None = None,
    originals: Sequence[Tensor] | None = None,
) -> Captured:
    """Run ``block`` over all batches and accumulate E[s x x^T] for the inputs x of its linear layers, in float32.

    Args:
        block: a decoder block with real weights.
        targets: names of linear layers relative to the block.
        hidden: per batch, hidden states [sequences, tokens, width].
        kwargs: per batch, the block's other arguments.
        mask: per batch, [sequences, tokens] with 0 for padding, whose rows are left out, or None.
        where: the block's name, for messages.
        allow_unused: accept targets that no token reaches (experts that are never routed to).
        weights: by target, the weights s [tokens of all batches] of the tokens; targets that are missing count every
            token alike. Such targets share their statistics with no other.
        originals: per batch, what enters the block in the original model, for the drifts.

    Raises:
        NumericalError: a layer collected no inputs.
        UsageError: padding that cannot be told apart in a layer's input, or layers that share inputs only sometimes.
    """
    _check_lengths(where, hidden, kwargs, mask, *([originals] if originals else []))
    state = _Collector(where, weights or {})
    passed: list[Tensor] = []
    handles = [
        block.get_submodule(name).register_forward_pre_hook(
            lambda module, args, named, name=name: state.add(name, args, named), with_kwargs=True
        )
        for name in targets
    ]
    try:
        with torch.inference_mode():
            for number, (states, arguments, padding) in enumerate(zip(hidden, kwargs, mask, strict=True)):
                state.begin(padding)
                if originals:
                    state.recording = True
                    output = block(originals[number], **arguments)
                    passed.append(output[0] if isinstance(output, tuple) else output)
                    state.recording = False
                block(states, **arguments)
                state.end()
    finally:
        for handle in handles:
            handle.remove()
    state.check_weights()
    unused = tuple(name for name in targets if name not in state.hessians)
    if unused and not allow_unused:
        raise NumericalError(
            f"{where}: layer collected no inputs: {', '.join(unused)}. No calibration token reaches it; use more "
            "calibration text (mixtures of experts), or skip the layer (--skip) if the model never calls it."
        )
    for name in unused:
        state.hessians[name] = HessianAccumulator(_in_features(block.get_submodule(name)))
    drifts = {name: state.drift(name) for name in targets} if originals else {}
    return Captured({name: state.hessians[name] for name in targets}, unused, drifts, passed)


def forward(
    block: nn.Module, hidden: Sequence[Tensor], kwargs: Sequence[dict[str, Any]], where: str = "block"
) -> list[Tensor]:
    """The block's output hidden states [sequences, tokens, width] for every batch.

    Raises:
        NumericalError: an output holds NaN or infinity; ``where`` names the block.
    """
    _check_lengths(where, hidden, kwargs)
    outputs: list[Tensor] = []
    with torch.inference_mode():
        for number, (states, arguments) in enumerate(zip(hidden, kwargs, strict=True)):
            output = block(states, **arguments)
            output = output[0] if isinstance(output, tuple) else output
            if not bool(torch.isfinite(output.sum())) and not bool(torch.isfinite(output).all()):
                bad = int((~torch.isfinite(output)).sum())
                raise NumericalError(
                    f"{where}: {bad} of {output.numel()} output values are NaN or infinite in calibration batch "
                    f"{number}. Check the checkpoint; if this block was just quantized, its weights went wrong."
                )
            outputs.append(output)
    return outputs


class _Collector:
    """Assigns every layer input to an accumulator; inputs that are one and the same tensor share theirs."""

    def __init__(self, where: str, weights: Mapping[str, Tensor]) -> None:
        self.hessians: dict[str, HessianAccumulator] = {}
        self._where = where
        self._weights = weights
        self._position = dict.fromkeys(weights, 0)
        #: The block is running on the original model's states.
        self.recording = False
        self._recorded: dict[str, Tensor] = {}
        self._drifts: dict[int, Tensor] = {}
        self._batch = -1
        self._born: dict[int, int] = {}
        self._mask: Tensor | None = None
        # Of this batch: id of an input -> (the input, held so that the id stays its own; who has taken it).
        self._seen: dict[int, tuple[Tensor, list[HessianAccumulator]]] = {}

    def begin(self, mask: Tensor | None) -> None:
        self._batch += 1
        self._mask = None if mask is None or bool(mask.bool().all()) else mask.bool()

    def end(self) -> None:
        self._seen.clear()
        self._recorded.clear()

    def drift(self, name: str) -> Tensor:
        """E[s (x_o - x) x^T] of a target."""
        hessian = self.hessians[name]
        width = hessian.in_features
        return self._drifts.get(id(hessian), torch.zeros(width, width)) / max(hessian.tokens, 1)

    def add(self, name: str, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        where = f"{self._where}.{name}"
        x = _first_tensor((*args, *named.values()))
        if x is None:
            raise UsageError(f"{where} was called without a tensor; Octavo cannot collect its inputs.")
        if self.recording:
            self._recorded[name] = _rows(x, self._mask, where)
            return
        if name in self._weights:
            self._add_weighted(name, _rows(x, self._mask, where))
            return
        mine = self.hessians.get(name)
        takers = self._seen.setdefault(id(x), (x, []))[1]
        if mine is None:
            # An accumulator of an earlier batch holds inputs that a newcomer never saw.
            mine = next((taker for taker in takers if self._born[id(taker)] == self._batch), None)
            if mine is None:
                mine = HessianAccumulator(x.shape[-1], device=x.device)
                self._born[id(mine)] = self._batch
            self.hessians[name] = mine
        elif mine not in takers and sum(mine is other for other in self.hessians.values()) > 1:
            self._check_still_shared(where, mine)
        if mine not in takers:
            takers.append(mine)
            rows = _rows(x, self._mask, where)
            mine.add(rows)
            self._add_drift(name, mine, rows)

    def check_weights(self) -> None:
        """Weights that no row was left for belonged to other rows, too."""
        for name, used in self._position.items():
            if name in self.hessians and used != (count := self._weights[name].shape[0]):
                raise UsageError(
                    f"{self._where}.{name} reads {used} rows, but there are {count} token weights: it does not see "
                    "every token. Quantize with --guided none."
                )

    def _add_weighted(self, name: str, rows: Tensor) -> None:
        first = self._position[name]
        part = self._weights[name][first : first + rows.shape[0]]
        if part.shape[0] != rows.shape[0]:
            raise UsageError(
                f"{self._where}.{name} reads more rows than there are token weights ({self._weights[name].shape[0]}); "
                "it is called more than once a token. Quantize with --guided none."
            )
        self._position[name] += rows.shape[0]
        if name not in self.hessians:
            self.hessians[name] = HessianAccumulator(rows.shape[1], device=rows.device)
        self.hessians[name].add(rows, part)
        self._add_drift(name, self.hessians[name], rows, part)

    def _add_drift(self, name: str, hessian: HessianAccumulator, rows: Tensor, weights: Tensor | None = None) -> None:
        original = self._recorded.get(name)
        if original is None or original.shape != rows.shape:
            # Experts see other tokens than in the original; they are taken as they come.
            return
        gap = (original - rows).float()
        good = torch.isfinite(gap.sum(dim=1)) & torch.isfinite(rows.sum(dim=1))
        gap, rows = torch.where(good.unsqueeze(1), gap, 0.0), torch.where(good.unsqueeze(1), rows.float(), 0.0)
        if weights is not None:
            gap = gap * weights.to(gap.device).unsqueeze(1)
        with exact_float32():
            total = self._drifts.setdefault(id(hessian), torch.zeros(rows.shape[1], rows.shape[1], device=rows.device))
            total.addmm_(gap.T, rows)

    def _check_still_shared(self, where: str, mine: HessianAccumulator) -> None:
        """Layers that once shared an input must go on to; a second tensor for one accumulator means they do not."""
        if any(mine in takers for _, takers in self._seen.values()):
            raise UsageError(
                f"{where} shares its input with other layers in some calls and not in others; Octavo cannot collect "
                "statistics for it. Skip the layer with --skip."
            )


def _first_tensor(values: Sequence[Any]) -> Tensor | None:
    for value in values:
        if isinstance(value, Tensor):
            return value
        if isinstance(value, tuple | list) and (inner := _first_tensor(value)) is not None:
            return inner
    return None


def _rows(x: Tensor, mask: Tensor | None, where: str) -> Tensor:
    """The rows [tokens, in] of an input of any rank, without padding."""
    rows = x.reshape(-1, x.shape[-1])
    if mask is None:
        return rows
    if x.shape[:2] == mask.shape:
        per_token = x.shape[2:-1].numel()
        return rows[mask.reshape(-1).repeat_interleave(per_token)]
    if rows.shape[0] == mask.numel():
        return rows[mask.reshape(-1)]
    raise UsageError(
        f"{where}: inputs of shape {list(x.shape)} do not tell which rows are padding of a batch {list(mask.shape)}. "
        "Calibrate with full windows, without padding."
    )


def _in_features(module: nn.Module) -> int:
    rows, columns = module.weight.shape  # type: ignore[misc]
    return columns if isinstance(module, nn.Linear) else rows  # type: ignore[return-value]


def _check_lengths(where: str, *lists: Sequence[Any]) -> None:
    lengths = {len(values) for values in lists}
    if len(lengths) != 1 or 0 in lengths:
        raise UsageError(f"{where}: wanted equally many batches of everything and at least one, got {sorted(lengths)}")
