"""Progress of a long job, reported by callback: the library prints nothing."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["phase", "matrix", "block", "step", "note"]


@dataclass(frozen=True)
class Event:
    """One step of a job.

    Attributes:
        kind: ``phase`` begins a phase; ``matrix`` one matrix is done; ``block`` one block is committed; ``step`` one
            step of tuning is done; ``note`` is a warning that also goes into the report.
        message: one line for people.
        block, blocks: zero-based block index and the number of blocks.
        module: full module name.
        bits: true bits per weight of the matrix.
        error: relative proxy error of the matrix, tr(E H E^T) / tr(W H W^T).
        seconds: what the step took.
        eta_seconds: estimate for the rest of the job.
        step, steps: steps of tuning that are done, and how many are planned (None until that is known).
        loss: divergence on the tokens of the step. kl: on the held-out ones, if they were looked at.
        loss_before, loss_after: relative error of a tuned block's output before and after its tuning.
    """

    kind: Kind
    message: str
    block: int | None = None
    blocks: int | None = None
    module: str | None = None
    bits: float | None = None
    error: float | None = None
    seconds: float | None = None
    eta_seconds: float | None = None
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    kl: float | None = None
    loss_before: float | None = None
    loss_after: float | None = None


Progress = Callable[[Event], None]


class Reporter:
    """Passes the events of a job on to its caller, if there is one to listen, and keeps the notes for the report."""

    def __init__(self, progress: Progress | None = None) -> None:
        self._progress = progress
        self.notes: list[str] = []

    def emit(self, kind: Kind, message: str, **values: Any) -> None:
        """Report an :class:`Event`; ``values`` are its other fields."""
        event = Event(kind, message, **values)
        if kind == "note":
            self.notes.append(message)
        if self._progress is not None:
            self._progress(event)

    def note(self, message: str) -> None:
        """A warning, shown now and kept for the report."""
        self.emit("note", message)


def peak_memory() -> int:
    """The largest resident memory of this process so far, in bytes."""
    # macOS counts bytes, all others kibibytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Clock:
    """Wall-clock seconds per named phase of a job."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
