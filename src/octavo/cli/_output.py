"""What the commands share: results on stdout, progress on stderr, tables, units, interruption.

With ``--json`` stdout carries exactly one JSON document; whatever else a library prints goes to stderr.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from octavo._core.errors import Interrupted, UsageError

if TYPE_CHECKING:
    from octavo.pipeline.events import Event

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, progress on stderr.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only results, warnings and errors.")]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; all cores by default.")]
RemoteCodeOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model. Read it first.")
]
RevisionOption = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a hub model.")]
DtypeOption = Annotated[
    str | None, typer.Option("--dtype", help="Compute dtype: float32 (default on a CPU), bfloat16, float16.")
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1, ..; a GPU by default if there is one.")
]


def _are_numbers(cells: Sequence[str]) -> bool:
    """Whether all that is in a column begins as a number does."""
    found = [cell.lstrip("+-.~")[:1].isdigit() for cell in cells if cell]
    return bool(found) and all(found)


class Output:
    """The two streams of a command. Use as a context manager around all of its work.

    Args:
        as_json: the result is one JSON document; everything else is kept off stdout.
        quiet: no progress.
    """

    def __init__(self, as_json: bool, quiet: bool = False) -> None:
        self.as_json, self.quiet = as_json, quiet
        self._stdout: TextIO = sys.stdout
        self._stack = ExitStack()

    def __enter__(self) -> Output:
        self._stdout = sys.stdout
        if self.as_json:
            self._stack.enter_context(redirect_stdout(sys.stderr))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stack.close()
        if kind is KeyboardInterrupt:
            # An error of ours, so that it is reported like one, in JSON too.
            raise Interrupted("stopped.")

    # ---------------------------------------------------------------- results

    def document(self, value: Mapping[str, Any]) -> None:
        """The JSON result; nothing without ``--json``."""
        if self.as_json:
            print_json(value, self._stdout)

    def say(self, text: str = "") -> None:
        """A line of the result for people; nothing with ``--json``."""
        if not self.as_json:
            # At once: a server says where it listens and then nothing more.
            print(text, file=self._stdout, flush=True)

    def facts(self, rows: Mapping[str, str]) -> None:
        """Aligned ``name  value`` lines."""
        width = max((len(name) for name in rows), default=0)
        for name, value in rows.items():
            self.say(f"{name:<{width}}  {value}")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
        """A table: drawn on a terminal, aligned columns in a pipe. Columns of numbers are aligned on the right."""
        if self.as_json:
            return
        right = [_are_numbers([row[i] for row in rows]) for i in range(len(columns))]
        if self._stdout.isatty():
            from rich.console import Console
            from rich.table import Table

            drawn = Table(title=title or None, title_justify="left")
            for index, column in enumerate(columns):
                drawn.add_column(column, justify="right" if right[index] else "left", overflow="fold")
            for row in rows:
                drawn.add_row(*row)
            Console(file=self._stdout, markup=False).print(drawn)
            return
        if title:
            self.say(title)
        widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
        for row in (columns, *rows):
            cells = [c.rjust(w) if numbers else c.ljust(w) for c, w, numbers in zip(row, widths, right, strict=True)]
            self.say("  ".join(cells).rstrip())

    # ---------------------------------------------------------------- progress

    def progress(self, text: str) -> None:
        """A line on stderr."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """A warning on stderr, whatever ``--quiet`` says."""
        print(f"warning: {text}", file=sys.stderr, flush=True)

    def event(self, event: Event) -> None:
        """Show an event of the pipeline: a line per matrix, per block the time that is left."""
        if event.kind == "note":
            self.warn(event.message)
        elif event.kind == "matrix":
            bits = "" if event.bits is None else f"  {event.bits:6.3f} bits"
            error = "" if event.error is None else f"  error {event.error:.5f}"
            self.progress(f"  {event.message}{bits}{error}  {event.seconds or 0:.1f} s")
        elif event.kind == "block" and event.block is not None:
            left = "" if not event.eta_seconds else f", about {duration(event.eta_seconds)} left"
            took = duration(event.seconds or 0)
            self.progress(f"block {event.block + 1}/{event.blocks} ({event.message}) done in {took}{left}")
        elif event.kind == "step":
            of = f"/{event.steps}" if event.steps else ""
            loss = "" if event.loss is None else f"  KL {event.loss:.5f}"
            held_out = "" if event.kl is None else f"  held out {event.kl:.5f}"
            left = "" if not event.eta_seconds else f"  about {duration(event.eta_seconds)} left"
            self.progress(f"  step {event.step}{of}{loss}{held_out}  {event.seconds or 0:.1f} s{left}")
        else:
            self.progress(event.message)

    def counter(self, what: str) -> Callable[[int, int], None]:
        """A (done, total) callback: a line with the time left every ten seconds and at the end."""
        began = shown = time.monotonic()

        def show(done: int, total: int) -> None:
            nonlocal shown
            now = time.monotonic()
            if now - shown < 10 and done < total:
                return
            shown = now
            left = (now - began) / max(done, 1) * (total - done)
            self.progress(f"{what}: {done}/{total}" + (f", about {duration(left)} left" if done < total else ""))

        return show


def task_counters(output: Output) -> Callable[[str, int, int], None]:
    """A (what, done, total) callback: one :meth:`Output.counter` per ``what``."""
    counters: dict[str, Callable[[int, int], None]] = {}

    def show(what: str, done: int, total: int) -> None:
        counters.setdefault(what, output.counter(what))(done, total)

    return show


def print_json(value: Mapping[str, Any], file: TextIO | None = None) -> None:
    """Print strict JSON; numbers that JSON does not have become null."""
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)
    print(text, file=file or sys.stdout, flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value if isinstance(value, str | int | bool | None) else str(value)


# -------------------------------------------------------------------- units


def size(count: float) -> str:
    """Bytes for people, decimal units."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f} bytes"


def parse_size(text: str | None) -> int | None:
    """Bytes of '900MB', '3.5 GB' (decimal units), '1GiB' or a plain number; None stays None.

    Raises:
        UsageError: no such size.
    """
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(?:([kmgt])(i?)b?|b|bytes)?\s*", text, re.IGNORECASE)
    count = 0
    if found:
        number, unit, binary = found.groups()
        count = int(float(number) * (1024 if binary else 1000) ** ("kmgt".index(unit.lower()) + 1 if unit else 0))
    if count < 1:
        raise UsageError(f"--size wanted bytes such as 900MB, 3.5GB or 1GiB, got {text!r}.")
    return count


def parse_bits_of(pairs: Sequence[str] | None) -> dict[str, float]:
    """``PATTERN=BITS`` texts to bits by pattern.

    Raises:
        UsageError: no '=', or bits that are no number.
    """
    found: dict[str, float] = {}
    for pair in pairs or ():
        pattern, _, bits = pair.rpartition("=")
        try:
            found[pattern] = float(bits)
        except ValueError:
            pattern = ""
        if not pattern:
            raise UsageError(f"--bits-of wanted PATTERN=BITS such as mlp.down_proj=3, got {pair!r}.")
    return found


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def with_error(value: float | None, error: float | None, digits: int = 3) -> str:
    """``12.345 +- 0.120``; a dash for what was not measured."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" + ("" if error is None else f" +- {error:.{digits}f}")


# -------------------------------------------------------------------- set-up


def use_threads(count: int | None) -> None:
    """Limit torch, and the C++ library, to ``count`` threads, whatever the environment says of the latter."""
    if count is not None:
        import torch

        os.environ.pop("OCTAVO_THREADS", None)
        torch.set_num_threads(count)


def quiet_libraries() -> None:
    """Keep the progress bars of transformers, and of what it uses, out of ours."""
    # Read once, when tqdm is first imported: the GGUF converter has no other switch.
    os.environ.setdefault("TQDM_DISABLE", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def parse_settings(pairs: Sequence[str], option: str = "--set") -> dict[str, Any]:
    """``KEY=VALUE`` texts to options; the value is read as JSON, and is a text if it is none.

    Raises:
        UsageError: no '=', an empty key, or a key that occurs twice.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise UsageError(f"{option} wanted KEY=VALUE, got {pair!r}.")
        if key in options:
            raise UsageError(f"{option} {key} is given twice; which one is meant?")
        try:
            options[key] = json.loads(text)
        except ValueError:
            options[key] = text
    return options


@contextmanager
def graceful_stop(out: Output, what: str) -> Iterator[Callable[[], bool]]:
    """First Ctrl-C: the yielded function turns True, and the work ends at its next safe point. Second: at once."""
    asked = False

    def on_interrupt(*_: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        out.warn(f"stopping after {what}, which will be saved; press Ctrl-C again to stop at once.")

    try:
        before = signal.signal(signal.SIGINT, on_interrupt)
    except ValueError:
        # Not the main thread: whoever runs us there owns the signals.
        yield lambda: False
        return
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def resumable(output: Output, context: typer.Context, what: str) -> Iterator[Callable[[], bool]]:
    """:func:`graceful_stop` after ``what``; an interruption ends with the command that continues."""
    kept = [part for part in context.obj or ["quantize", ".."] if part not in ("--resume", "--force-new")]
    advice = f"\nContinue with: {shlex.join(['octavo', *kept, '--resume'])}"
    with graceful_stop(output, what) as stop:
        try:
            yield stop
        except Interrupted as error:
            raise Interrupted(f"{error}{advice}") from error
        except KeyboardInterrupt as error:
            raise Interrupted(f"stopped at once; what was saved before is kept.{advice}") from error
