"""Progress of a long job, reported by callback: the library prints nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal


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
    """

    kind: Literal["phase", "matrix", "block", "step", "note"]
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


Progress = Callable[[Event], None]


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
