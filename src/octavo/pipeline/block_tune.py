"""Tune each block right after its matrices are quantized: the layer-wise fine-tuning of VPTQ (arXiv 2409.17066).

What a quantized block stores besides indices - codebooks, scales, biases - and its norms are trained until the block's
output is closer to that of the original block. It is the same for every method; size and format stay what they are.
With ``codes`` the indices are trained together with them (JLCM, arXiv 2309.17361; :mod:`octavo.math.moves`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from octavo._core.errors import NumericalError, UsageError
from octavo._core.seeds import generator
from octavo.calibration import capture
from octavo.formats.reader import DTYPES
from octavo.layout import Layout
from octavo.math.moves import POWERS, Rule
from octavo.models.adapter import CausalModel
from octavo.pipeline._tunable import (
    CODES,
    PARTS,
    TunableLinear,
    check_parts,
    has_codes,
    norms_of,
    part_of,
    train_norm,
)
from octavo.pipeline._tuning import learning_rate
from octavo.weight import VQWeight

_WARMUP = 5
_BETAS = (0.9, 0.95)
#: Passes over the windows unless told otherwise, and the fewest steps: with little text, few passes leave gain behind.
_PASSES, _LEAST_STEPS = 4, 48
_MEASUREMENTS = 8


@dataclass(frozen=True)
class BlockTuneOptions:
    """How blocks are tuned.

    Attributes:
        steps: optimizer steps per block; None makes 4 passes over the windows, and at least 48 steps.
        batch_tokens: tokens per step, at least one window.
        lr: learning rate relative to the root mean square of each tensor; absolute for scales stored as logarithms.
        train: what is trained: ``books``, ``scales``, ``biases``, ``norms``, ``codes``.
        held_out: windows that are measured on and not trained on; None is an eighth, at least 1.
        target: the output that a block is to have for the inputs that the quantized blocks before it produce:
            ``input`` is that of the original block for the same inputs; ``original`` is that of the original block
            within the original model, so that a block also makes up for what those before it lost.
        rule, neighbours: how codes move, if they are trained: see :func:`octavo.math.moves.moved`.
        code_lr: learning rate of codes, in mean gaps between the codewords of a codebook.
    """

    steps: int | None = None
    batch_tokens: int = 1024
    lr: float = 6e-3
    train: tuple[str, ...] = ("books", "scales", "norms")
    held_out: int | None = None
    target: Literal["input", "original"] = "input"
    rule: Rule = "proximal"
    neighbours: int = 8
    code_lr: float = 0.02

    def __post_init__(self) -> None:
        parts = self.train.split(",") if isinstance(self.train, str) else self.train
        object.__setattr__(self, "train", check_parts([part.strip() for part in parts], (*PARTS, CODES)))
        for name in ("steps", "batch_tokens", "held_out", "neighbours"):
            value = getattr(self, name)
            if not (value is None and name in ("steps", "held_out")) and (type(value) is not int or value < 1):
                raise UsageError(f"tune_blocks: {name} wanted a whole number >= 1, got {value!r}")
        for name in ("lr", "code_lr"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and 0 < value < math.inf):
                raise UsageError(f"tune_blocks: {name} wanted a number > 0, got {value!r}")
        if self.train == (CODES,):
            raise UsageError("tune_blocks: codes are trained beside numbers; add books, scales or norms to train")
        if self.rule not in POWERS:
            raise UsageError(f"tune_blocks: rule wanted one of {', '.join(POWERS)}, got {self.rule!r}")
        if self.target not in ("original", "input"):
            raise UsageError(f"tune_blocks: target wanted 'original' or 'input', got {self.target!r}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; the options of codes, which came later, only if those are trained."""
        values = {**asdict(self), "train": list(self.train)}
        if CODES not in self.train:
            for name in ("rule", "neighbours", "code_lr"):
                del values[name]
        return values

    def check(self, layouts: Sequence[Layout], tokens: Tensor) -> None:
        """Refuse parts that none of the layouts has, and too few windows [windows, tokens].

        Raises:
            UsageError: there would be nothing to train.
        """
        if CODES in self.train and not any(map(has_codes, layouts)):
            raise UsageError(
                "tune_blocks: codes can be trained that have one stage without signs, of at most 4096 codewords; no "
                "matrix of this method has such."
            )
        there = {part_of(key) for layout in layouts for key in layout.tensors()} | {"norms"}
        if not there & set(self.train):
            raise UsageError(
                f"tune_blocks: the matrices of this method store no {' and no '.join(self.train)}; they and the blocks "
                f"have {', '.join(sorted(part for part in there if part))}."
            )
        split_windows(tokens, self)

    def disk_bytes(self, numbers: int, *, counted: bool) -> int:
        """Disk space beyond a plan's: the hidden states of each model that runs, three times at the worst.

        Args:
            numbers: how many numbers the hidden states are. counted: the plan has those of the quantized model.
        """
        return 3 * 4 * numbers * ((not counted) + (self.target == "original"))

    def details(self, blocks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What the output records of this, from what was committed of each block."""
        tuned = [entry["tuned"] for entry in blocks if entry.get("tuned")]
        means = {key: fmean(row[key] for row in tuned) if tuned else None for key in ("loss_before", "loss_after")}
        return {"tuned_blocks": {**self.to_dict(), "blocks": len(tuned), **means}}


@dataclass(frozen=True)
class BlockTuneReport:
    """What tuning did to one block: mean squared error of its output on held-out windows over the target's variance.

    ``moved`` is the share of the codes that are not what they were.
    """

    block: str
    loss_before: float
    loss_after: float
    best_step: int
    steps: int
    moved: float = 0.0


@dataclass(frozen=True)
class TunedBlock:
    """A block after tuning: its matrices by module, and the norms that changed by their name in the output."""

    weights: dict[str, VQWeight]
    norms: dict[str, Tensor]
    report: BlockTuneReport


class BlockTuner:
    """Tunes the blocks of one job, in order; everything random depends on the seed and the block's name alone.

    Args:
        causal: the original model.
        tokens: ids of the calibration windows [windows, tokens]; the first ones are held out.
        options, seed: as given by the user.

    Raises:
        UsageError: too few windows.
    """

    def __init__(self, causal: CausalModel, tokens: Tensor, options: BlockTuneOptions, seed: int) -> None:
        self.options, self._causal, self._seed = options, causal, seed
        held_out, rest, at_once = split_windows(tokens, options)
        held, training = held_out.split(at_once), rest.split(at_once)
        self._held, self._training = range(len(held)), range(len(held), len(held) + len(training))
        self._groups = [*held, *training]
        # A block's other arguments may depend on how many windows it gets, so each group has its own.
        inputs = causal.capture_inputs([(tokens[group], None) for group in self._groups])
        self._kwargs, self._mask = inputs.kwargs, inputs.mask
        self._stored = {causal.model_name(name): name for name in causal.kept()}
        self._originals: list[Tensor] | None = None
        self._targets: list[Tensor] = []

    # ---------------------------------------------------------------- the second stream of hidden states

    def begin(self, hidden: Sequence[Tensor]) -> None:
        """Start at the first block, which both models give the same inputs."""
        if self.options.target == "original":
            self._originals = list(hidden)

    def restore(self, stored: Mapping[str, Tensor], batches: int) -> None:
        """Take up what :meth:`states` gave."""
        if self.options.target == "original":
            # Copies of their own: matrix products of mapped, unaligned memory may round differently.
            self._originals = [stored[f"original_{i}"].clone() for i in range(batches)]

    def states(self) -> dict[str, Tensor]:
        """The hidden states of the original model that leave the block of the last :meth:`aim`, for a resume."""
        return {f"original_{i}": states for i, states in enumerate(self._originals or ())}

    def aim(self, block: nn.Module, hidden: Sequence[Tensor], kwargs: Sequence[dict[str, Any]], where: str) -> None:
        """Run the block while it still is the original one: its output is what the quantized block is tuned to.

        Args:
            hidden: per batch, what enters the quantized block [sequences, tokens, width].
            kwargs: per batch, the block's other arguments.
        """
        self._targets = capture.forward(block, hidden if self._originals is None else self._originals, kwargs, where)
        if self._originals is not None:
            self._originals = self._targets

    # ---------------------------------------------------------------- tuning

    def tune(
        self, index: int, block: nn.Module, weights: Mapping[str, VQWeight], hidden: Sequence[Tensor]
    ) -> TunedBlock | None:
        """Tune the quantized block ``index``; afterwards it holds the tuned norms and its matrices as they were.

        Returns:
            None if it has nothing to train.

        Raises:
            NumericalError: the loss, a gradient or a tuned value became NaN or infinite.
        """
        name = self._causal.blocks[index]
        # Neither autograd nor parameters exist in inference mode, whatever the caller is in.
        with torch.inference_mode(False), torch.enable_grad():
            student = _Student(block, name, weights, self._norms(block, name), self.options)
            try:
                if not student.parameters or not weights:
                    return None
                data = _Windows(hidden, self._targets, self._groups, [k[index] for k in self._kwargs], self._mask)
                return self._tune(name, student, data)
            finally:
                student.release()

    def _norms(self, block: nn.Module, prefix: str) -> list[tuple[str, torch.dtype, nn.Module, str]]:
        """(name in the output, stored dtype, module, attribute) of the block's norms that are to be trained."""
        found = []
        for name, module, leaf in norms_of(block) if "norms" in self.options.train else ():
            full = f"{prefix}.{name}"
            # A tensor that has another name is shared with other modules and stays.
            if full in self._stored:
                found.append((full, DTYPES[self._causal.reader.info(self._stored[full])[0]], module, leaf))
        return found

    def _tune(self, name: str, student: _Student, data: _Windows) -> TunedBlock:
        options, training = self.options, len(self._training)
        steps = options.steps or max(_PASSES * training, _LEAST_STEPS)
        every = max(steps // _MEASUREMENTS, 1)
        variance = data.variance() or 1.0
        groups = [{"params": [p], "unit": student.units[key]} for key, p in student.parameters.items()]
        optimizer = torch.optim.Adam(groups, lr=0.0, betas=_BETAS)
        with _at_step(name, 0):
            before = best = self._measure(student, data, variance)
        best_step, values = 0, student.values()
        order: list[int] = []
        for step in range(1, steps + 1):
            if not order:
                passes = generator(self._seed, f"{name}: tuning, pass {(step - 1) // training}")
                order = [self._training[i] for i in torch.randperm(training, generator=passes).tolist()]
            with _at_step(name, step):
                optimizer.zero_grad()
                error, count = data.error(student, order.pop())
                loss = error / (count * variance)
                _check(float(loss.detach()), "the loss")
                loss.backward()
                for key, parameter in (student.parameters | student.probes).items():
                    if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
                        raise NumericalError(f"the gradient of {key} holds NaN or infinity")
                share = learning_rate(step - 1, steps, min(_WARMUP, steps))
                for group in optimizer.param_groups:
                    group["lr"] = options.lr * share * group["unit"]
                optimizer.step()
                student.move_codes(options.code_lr * share)
                if step % every == 0 or step == steps:
                    held_out = self._measure(student, data, variance)
                    if held_out < best:
                        best, best_step, values = held_out, step, student.values()
        student.set_values(values)
        report = BlockTuneReport(name, before, best, best_step, steps, student.moved())
        return TunedBlock(student.weights(changed=best_step > 0), student.norms() if best_step else {}, report)

    @torch.no_grad()
    def _measure(self, student: _Student, data: _Windows, variance: float) -> float:
        sums = [data.error(student, group) for group in self._held]
        loss = sum(float(error) for error, _ in sums) / (sum(count for _, count in sums) * variance)
        return _check(loss, "the error on held-out windows")


def split_windows(tokens: Tensor, options: BlockTuneOptions) -> tuple[Tensor, Tensor, int]:
    """Which of the windows [windows, tokens] are held out, which are trained on, and how many make a step.

    Raises:
        UsageError: none is left to train on.
    """
    count, ctx = tokens.shape
    held_out = options.held_out or max(count // 8, 1)
    if count <= held_out:
        raise UsageError(
            f"tune_blocks: {held_out} of {count} calibration window(s) would be held out, and none is left to train "
            f"on: use --samples above {held_out}."
        )
    windows = torch.arange(count)
    return windows[:held_out], windows[held_out:], max(options.batch_tokens // ctx, 1)


class _Windows:
    """What enters and is to leave the block, by groups of windows; batches of both are cut alike."""

    def __init__(
        self,
        hidden: Sequence[Tensor],
        targets: Sequence[Tensor],
        groups: Sequence[Tensor],
        kwargs: Sequence[dict[str, Any]],
        mask: Sequence[Tensor | None],
    ) -> None:
        self._hidden = [window for batch in hidden for window in batch]
        self._targets = [window for batch in targets for window in batch]
        self._groups, self._kwargs, self._mask = groups, kwargs, mask

    def error(self, block: _Student, group: int) -> tuple[Tensor, int]:
        """Sum over the tokens of a group of the mean squared error of the block's output, and the number of tokens."""
        output = block(self._stacked(self._hidden, group), self._kwargs[group])
        errors = (output - self._stacked(self._targets, group)).square().mean(-1)
        mask = self._mask[group]
        if mask is None:
            return errors.sum(), errors.numel()
        return errors[mask.bool()].sum(), int(mask.bool().sum())

    def variance(self) -> float:
        """The variance of the targets, all tokens and channels together."""
        total = squares = count = 0.0
        for group, mask in enumerate(self._mask):
            target = self._stacked(self._targets, group)
            numbers = (target if mask is None else target[mask.bool()]).double()
            total, squares = total + float(numbers.sum()), squares + float(numbers.square().sum())
            count += numbers.numel()
        return squares / count - (total / count) ** 2

    def _stacked(self, windows: Sequence[Tensor], group: int) -> Tensor:
        # Stacking also turns tensors of inference mode into ones that autograd can take.
        return torch.stack([windows[i] for i in self._groups[group].tolist()])


class _Student:
    """A block with trainable matrices and norms; :meth:`release` gives it its own layers back.

    Attributes:
        parameters: name -> what is trained. units: by the same names, the natural step size of each.
        probes: name -> what takes the gradients that move codes.
    """

    def __init__(
        self,
        block: nn.Module,
        prefix: str,
        weights: Mapping[str, VQWeight],
        norms: Sequence[tuple[str, torch.dtype, nn.Module, str]],
        options: BlockTuneOptions,
    ) -> None:
        self._block, self._prefix, self._start = block, prefix, dict(weights)
        self._options = options
        self.probes: dict[str, Tensor] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        self.units: dict[str, float] = {}
        self._own: dict[str, nn.Module] = {}
        self._layers: dict[str, TunableLinear] = {}
        self._norms = norms
        for full, weight in weights.items():
            name = full.removeprefix(prefix + ".")
            layer = TunableLinear(weight, options.train, full)
            # Decoded once more in the backward pass: what is kept for gradients would be many times the matrix.
            layer.decode_again = layer.codes is not None
            trained = dict(layer.named_parameters(recurse=False))
            if not trained and layer.codes is None:
                # The layer that is there has the decoded matrix already.
                continue
            self._layers[full], self._own[name] = layer, block.get_submodule(name)
            block.set_submodule(name, layer)
            for key, parameter in trained.items():
                self.parameters[f"{full}.{key}"], self.units[f"{full}.{key}"] = parameter, layer.unit(key)
            if layer.codes is not None:
                self.probes[f"{full}.indices"] = layer.codes.probe
        for full, dtype, module, leaf in norms:
            self.parameters[full], self.units[full] = train_norm(module, leaf, dtype)

    def __call__(self, states: Tensor, arguments: dict[str, Any]) -> Tensor:
        output = self._block(states, **arguments)
        return output[0] if isinstance(output, tuple) else output

    def move_codes(self, rate: float) -> None:
        """Let the codes that are trained follow the last gradient."""
        for layer in self._layers.values():
            layer.move_codes(rate, self._options.rule, self._options.neighbours)

    def moved(self) -> float:
        """The share of the block's codes that are not what they were."""
        vectors = sum(weight.layout.index_shape[0] * weight.layout.index_shape[1] for weight in self._start.values())
        return sum(layer.moved_codes() for layer in self._layers.values()) / vectors

    def values(self) -> dict[str, Tensor]:
        """Copies of everything that is trained."""
        numbers = {key: parameter.detach().clone() for key, parameter in self.parameters.items()}
        # Moves put new indices in the place of the old ones, which stay what they were.
        return numbers | {f"{full}.indices": layer.indices for full, layer in self._layers.items()}

    @torch.no_grad()
    def set_values(self, values: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`values` gave."""
        for key, parameter in self.parameters.items():
            parameter.copy_(values[key])
        for full, layer in self._layers.items():
            layer.indices = values[f"{full}.indices"]

    def weights(self, *, changed: bool) -> dict[str, VQWeight]:
        """The matrices as they will be stored; those of the start unless ``changed``."""
        return self._start | ({full: layer.rounded() for full, layer in self._layers.items()} if changed else {})

    @torch.no_grad()
    def norms(self) -> dict[str, Tensor]:
        """The norms in their stored dtypes."""
        return {full: getattr(module, leaf).to(dtype) for full, dtype, module, leaf in self._norms}

    def release(self) -> None:
        """Put the block's own layers back; its norms keep their values, rounded."""
        for name, layer in self._own.items():
            self._block.set_submodule(name, layer)
        for _, _, module, leaf in self._norms:
            parametrize.remove_parametrizations(module, leaf, leave_parametrized=True)
            getattr(module, leaf).requires_grad_(False)


def _check(value: float, what: str) -> float:
    if not math.isfinite(value):
        raise NumericalError(f"{what} is {value}")
    return value


@contextmanager
def _at_step(block: str, step: int) -> Iterator[None]:
    """Say where and when numbers have left their range, and what helps."""
    try:
        yield
    except NumericalError as error:
        raise NumericalError(
            f"{block}: tuning step {step}: {error}. Use a lower lr (--tune-blocks-set lr=..); the blocks before are "
            "committed, but another lr needs a new job."
        ) from error
