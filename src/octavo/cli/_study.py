"""What the commands of ``octavo study`` share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import typer

from octavo._core.errors import UsageError
from octavo.cli._output import Output, duration, quiet_libraries, resumable

Keep = Annotated[bool, typer.Option("--keep", help="Keep the quantized models in DIR/models.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the study in DIR; finished rows stay.")]


def perform(
    output: Output,
    context: typer.Context,
    run: Callable[..., dict[str, Any]],
    out: str,
    model: str | None,
    options: Any,
    *,
    resume: bool,
    unit: str,
) -> dict[str, Any]:
    """The document of a study's ``run``, with progress on the terminal; Ctrl-C stops it after this ``unit``."""
    from octavo.cli.doctor import examine

    quiet_libraries()
    machine = {name: fact for name, fact in examine().items() if name != "executable"}
    with resumable(output, context, unit) as stop:
        return run(
            out,
            model,
            options,
            resume=resume,
            facts={"command": ["octavo", *(context.obj or ())], "machine": machine},
            say=output.progress,
            progress=output.event,
            stop=stop,
        )


def show(
    output: Output,
    document: dict[str, Any],
    tables: Iterable[tuple[str, str, list[str], list[list[str]]]],
    notes: Iterable[str] = (),
    closing: str = "",
) -> None:
    """The tables of a study with what they show, or its document; ``notes`` of the reader's beside its own."""
    for note in (*document["notes"], *notes):
        output.warn(note)
    output.document(document)
    for title, about, columns, rows in tables:
        output.table(columns, rows, title=title)
        output.say(about + "\n")
    if closing:
        output.say(closing)
    output.say(duration(document["seconds"]))


def index_list(option: str, text: str) -> int | tuple[int, ...]:
    """A number of things, or, with a comma, the indices of some: '7,' is one.

    Raises:
        UsageError: something else.
    """
    found = numbers(option, text, whole=True)
    return found if "," in text else found[0]


def numbers(option: str, text: str, whole: bool = False) -> tuple[Any, ...]:
    """Distinct comma-separated numbers, whole ones as int.

    Raises:
        UsageError: something else.
    """
    try:
        numbers = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    usable = all(math.isfinite(n) and (n == int(n) or not whole) for n in numbers)
    if not numbers or not usable or len(set(numbers)) < len(numbers):
        kind = "whole numbers" if whole else "numbers"
        raise UsageError(f"{option} wanted distinct {kind} with commas between, got {text!r}")
    return tuple(int(n) if n == int(n) else n for n in numbers)
