"""The loop of :func:`octavo.tune`: steps, measurements, and committed states from which it goes on."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from octavo._core.errors import Interrupted, NumericalError, UsageError
from octavo._core.seeds import generator
from octavo.calibration.data import Tokens
from octavo.pipeline._original import Original
from octavo.pipeline._student import Student
from octavo.pipeline._tunable import PARTS, check_parts
from octavo.pipeline.events import Clock
from octavo.pipeline.store import Store

_WARMUP = 5
_BETAS = (0.9, 0.95)
#: Most windows that are held out unless more are asked for.
_HELD_OUT = 8
#: Unless told otherwise, a state is committed after the step that ends so many seconds after the last one.
_CHECKPOINT_SECONDS = 120.0


@dataclass(frozen=True)
class TuneOptions:
    """How :func:`tune` works.

    Attributes:
        calib: ``bundled``, a text or jsonl file (or several, comma-separated), or ``datasets:NAME``.
        samples: windows of text; None takes what there is, at most 128.
        ctx: tokens per window; None is 1024, or as many as the model allows.
        steps: optimizer steps; None makes one pass over the text, or as many as fit into ``minutes``.
        minutes: a limit for the whole job, from which the number of steps is worked out once, after the first few.
        batch_tokens: tokens per step, at least one window.
        lr: learning rate relative to the root mean square of each tensor; absolute for scales stored as logarithms.
        train: what is trained: ``books``, ``scales``, ``biases``, ``norms``.
        weight_decay: of AdamW.
        held_out: windows that are measured on and not trained on; None is an eighth, at least 1 and at most 8.
        eval_every: steps between two measurements; None is about eight in all.
        patience: measurements without improvement after which the job stops.
        seed: of the choice and order of windows.
        device: ``auto`` is a GPU if there is one.
        checkpoint_every: commit a state every so many steps; None is every 2 minutes.
    """

    calib: str = "bundled"
    samples: int | None = None
    ctx: int | None = None
    steps: int | None = None
    minutes: float | None = None
    batch_tokens: int = 1024
    lr: float = 6e-3
    train: tuple[str, ...] = PARTS
    weight_decay: float = 0.0
    held_out: int | None = None
    eval_every: int | None = None
    patience: int = 3
    seed: int = 0
    device: str = "auto"
    checkpoint_every: int | None = None

    def __post_init__(self) -> None:
        parts = self.train.split(",") if isinstance(self.train, str) else self.train
        object.__setattr__(self, "train", check_parts([part.strip() for part in parts]))
        object.__setattr__(self, "calib", str(self.calib))
        wholes = ("steps", "batch_tokens", "held_out", "eval_every", "patience", "checkpoint_every")
        for name in (*wholes, "samples"):
            value, least = getattr(self, name), 2 if name == "samples" else 1
            if value is not None and (type(value) is not int or value < least):
                raise UsageError(f"tune: {name} wanted a whole number >= {least}, got {value!r}")
        for name, low in (("lr", 0.0), ("minutes", 0.0), ("weight_decay", -math.ulp(0.0))):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and low < value < math.inf):
                raise UsageError(f"tune: {name} wanted a number {'>= 0' if low < 0 else '> 0'}, got {value!r}")

    def place(self) -> torch.device:
        """The device to work on.

        Raises:
            UsageError: it is not there.
        """
        name = self.device if self.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            raise UsageError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error


def learning_rate(step: int, steps: int, warmup: int) -> float:
    """The share of the learning rate in step ``step`` = 0, 1, ..: linear warm-up, then a cosine down to a tenth.

    During the warm-up it does not depend on ``steps``, which may not be known yet.
    """
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup + 1) / max(steps - warmup, 1)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(done, 1.0)))


def plan_steps(options: TuneOptions, done: int, step: float, measure: float, spent: float) -> int:
    """The number of steps that fit into ``options.minutes``, never less than are ``done`` already.

    Args:
        step, measure: seconds of a step and of a measurement. spent: seconds of the job so far.
    """
    assert options.minutes is not None
    left = 60 * options.minutes - spent - measure
    every = options.eval_every
    more = left / (step + measure / every) if every else (left - 8 * measure) / step
    return min(done + max(int(more), 0), options.steps or sys.maxsize)


@dataclass
class TuningState:
    """How far a tuning is, as committed.

    Attributes:
        objects: names in the store of the original's ``states`` and of the ``current`` and ``best`` parameters.
        step: steps that are done. steps: those that are planned, None while that is unknown.
        history: [step, KL on the held-out windows] of every measurement; step 0 is the start.
    """

    objects: dict[str, str] = field(default_factory=dict)
    step: int = 0
    steps: int | None = None
    history: list[list[Any]] = field(default_factory=list)

    @property
    def best(self) -> list[Any]:
        """The entry of ``history`` with the smallest divergence, the first of equal ones."""
        return min(self.history, key=lambda entry: entry[1])

    def finished(self, patience: int) -> bool:
        """Whether all steps are done, or the last ``patience`` measurements were no improvement."""
        if self.steps is None or not self.history:
            return False
        return self.step >= self.steps or len(self.history) - 1 - self.history.index(self.best) >= patience


class Tuning:
    """One call of :func:`tune`: the optimizer's loop over the windows of ``tokens``, the first of which are held out.

    Args:
        emit: called with kind, message and values of every :class:`Event`.
        stop: asked after every step.
        began: when the job began, by :func:`time.perf_counter`.
    """

    def __init__(
        self,
        options: TuneOptions,
        student: Student,
        store: Store,
        tokens: Tokens,
        emit: Callable[..., None],
        stop: Callable[[], bool],
        began: float,
    ) -> None:
        self.options, self.student, self.store, self.ids = options, student, store, tokens.ids
        self.emit, self.stop, self.began = emit, stop, began
        self.clock = Clock()
        self.state = TuningState(**(store.state.tuning or {}))
        count, ctx = self.ids.shape
        self.held_out = options.held_out or max(min(count // 8, _HELD_OUT), 1)
        self._at_once = max(options.batch_tokens // ctx, 1)
        #: Windows per step.
        self.size = min(self._at_once, count - self.held_out)
        groups = [{"params": [p], "unit": student.units[name]} for name, p in student.tuned.items()]
        self._optimizer = torch.optim.AdamW(groups, lr=0.0, betas=_BETAS, weight_decay=options.weight_decay)
        for parameter in student.tuned.values():
            parameter.grad = torch.zeros_like(parameter)

    def run(self, original: Original) -> None:
        """Everything between two models and a committed best state.

        Raises:
            Interrupted: ``stop`` said so; the state is committed.
            NumericalError: something became NaN or infinite.
        """
        state, store = self.state, self.store
        if state.finished(self.options.patience):
            return
        if "states" not in state.objects:
            self._read_answers(original)
        self._states = store.get_tensors(state.objects["states"])
        if not state.history:
            self.emit("phase", f"measuring on {self.held_out * self.ids.shape[1]} held-out tokens")
            start = time.perf_counter()
            kl = self._measure(at_start=True)
            self.emit("step", "before", step=0, kl=kl, seconds=time.perf_counter() - start)
        if "current" in state.objects:
            self._load(store.get_tensors(state.objects["current"]))
        self._train()

    def _read_answers(self, original: Original) -> None:
        def show(done: int, total: int) -> None:
            self.emit("phase", f"block {done} of {total} of the original")

        self.emit("phase", f"reading the original's answers to {self.ids.numel()} tokens")
        with self.clock.phase("original"):
            batches = original.final_states(self.ids, self.student.device, show)
            states = {str(i): window for i, window in enumerate(w for batch in batches for w in batch)}
            self.state.objects["states"] = self.store.put_tensors(states)
            self.store.commit_tuning(asdict(self.state))

    def _theirs(self, window: int) -> Tensor:
        # Mapped from the disk; a copy of its own, since products of unaligned memory may round differently.
        return self._states[str(window)].clone()

    def _train(self) -> None:
        options, state, store = self.options, self.state, self.store
        order = _order(self.held_out, len(self.ids), options.seed, state.step * self.size)
        if state.steps is None and options.minutes is None:
            state.steps = options.steps or -(-(len(self.ids) - self.held_out) // self.size)
        best = store.get_tensors(state.objects["best"]) if "best" in state.objects else None
        committed, committed_at, took = state.step, time.perf_counter(), []
        while not state.finished(options.patience):
            start = time.perf_counter()
            with self.clock.phase("train"), _at_step(state.step + 1):
                loss = self._step([next(order) for _ in range(self.size)])
            state.step += 1
            took.append(time.perf_counter() - start)
            # The first one warms up and does not count if there are others.
            seconds = fmean(took[1:] or took)
            planned = state.steps is None and state.step >= min(_WARMUP, options.steps or _WARMUP)
            if planned:
                self._plan(seconds)
            kl = None
            if state.steps is not None:
                every = options.eval_every or max(-(-state.steps // 8), 1)
                if state.step % every == 0 or state.step >= state.steps:
                    with _at_step(state.step):
                        kl = self._measure()
                    if state.best[0] == state.step:
                        best = self.student.values()
            finished = state.finished(options.patience)
            stopping = not finished and self.stop()
            if options.checkpoint_every:
                due = state.step - committed >= options.checkpoint_every
            else:
                due = time.perf_counter() - committed_at >= _CHECKPOINT_SECONDS
            if planned or due or stopping or finished:
                with self.clock.phase("commit"):
                    state.objects["current"] = store.put_tensors(self._values())
                    if best is not None:
                        state.objects["best"] = store.put_tensors(best)
                    store.commit_tuning(asdict(state))
                committed, committed_at = state.step, time.perf_counter()
            of = f" of {state.steps}" if state.steps else ""
            self.emit(
                "step",
                f"step {state.step}{of}",
                step=state.step,
                steps=state.steps,
                loss=loss,
                kl=kl,
                seconds=time.perf_counter() - start,
                eta_seconds=None if state.steps is None else seconds * (state.steps - state.step),
            )
            if stopping:
                raise Interrupted(
                    f"stopped after step {state.step}{of}, which is committed. Repeat the command with --resume to "
                    "continue; the result will be the same as without the stop."
                )
        if state.best[0] == 0:
            self.emit(
                "note",
                "no step made the held-out text better, so the matrices stay as they are: try a lower --lr, more text "
                "or more steps",
            )

    def _plan(self, step: float) -> None:
        """Decide on the number of steps, once; ``step`` is what one takes."""
        options, state = self.options, self.state
        measure, spent = self.clock.seconds.get("measure", 0.0), time.perf_counter() - self.began
        state.steps = plan_steps(options, state.step, step, measure, spent)
        if state.steps == state.step < (options.steps or sys.maxsize):
            used_up = f"the {options.minutes:g} minutes are used up after {state.step} steps: there will be no more"
            self.emit("note", used_up)
        self.emit("phase", f"{state.steps} steps fit into {options.minutes:g} minutes")

    def _step(self, picked: list[int]) -> float:
        """One step of the optimizer on these windows; returns the loss before it."""
        state, student = self.state, self.student
        self._optimizer.zero_grad(set_to_none=False)
        loss = student.step(self.ids[picked], torch.stack([self._theirs(i) for i in picked]))
        if not math.isfinite(loss):
            raise NumericalError(f"the loss is {loss}")
        for name, parameter in student.tuned.items():
            if not bool(torch.isfinite(parameter.grad).all()):  # type: ignore[arg-type]
                raise NumericalError(f"the gradient of {name} holds NaN or infinity")
        warmup = min(_WARMUP, state.steps or _WARMUP)
        rate = self.options.lr * learning_rate(state.step, state.steps or warmup, warmup)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["unit"]
        self._optimizer.step()
        return loss

    def _measure(self, *, at_start: bool = False) -> float:
        """The divergence on the held-out windows; goes into the history."""
        with self.clock.phase("measure"):
            kl = self.student.measure(self.ids[: self.held_out], self._theirs, self._at_once, at_start=at_start)
        if not math.isfinite(kl):
            raise NumericalError(f"the divergence on held-out text is {kl}")
        self.state.history.append([self.state.step, kl])
        return kl

    def _values(self) -> dict[str, Tensor]:
        """Parameters and moments, for a resume."""
        tensors = {f"value {name}": value for name, value in self.student.values().items()}
        for name, parameter in self.student.tuned.items():
            moments = self._optimizer.state[parameter]
            tensors[f"mean {name}"], tensors[f"square {name}"] = moments["exp_avg"].cpu(), moments["exp_avg_sq"].cpu()
        return tensors

    def _load(self, tensors: dict[str, Tensor]) -> None:
        """Take up what :meth:`_values` gave."""
        self.student.set_values({name: tensors[f"value {name}"] for name in self.student.tuned})
        for name, parameter in self.student.tuned.items():
            self._optimizer.state[parameter] = {
                "step": torch.tensor(float(self.state.step)),
                "exp_avg": tensors[f"mean {name}"].to(parameter.device, copy=True),
                "exp_avg_sq": tensors[f"square {name}"].to(parameter.device, copy=True),
            }


@contextmanager
def _at_step(step: int) -> Iterator[None]:
    """Say in which step numbers have left their range, and what helps."""
    try:
        yield
    except NumericalError as error:
        raise NumericalError(
            f"step {step}: {error}. Use a lower --lr; the committed states are intact, but need a new job for that."
        ) from error


def _order(first: int, count: int, seed: int, skip: int) -> Iterator[int]:
    """Windows first..count - 1 in passes of random order, a function of the seed; ``skip`` of them are left out."""
    epoch, skip = divmod(skip, count - first)
    while True:
        passes = torch.randperm(count - first, generator=generator(seed, f"tune, pass {epoch}"))
        for window in passes[skip:].tolist():
            yield first + window
        epoch, skip = epoch + 1, 0
