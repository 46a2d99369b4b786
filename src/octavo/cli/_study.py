"""What the commands of ``octavo study`` share."""

from __future__ import annotations

import math
from typing import Annotated, Any

import typer

from octavo._core.errors import UsageError

Keep = Annotated[bool, typer.Option("--keep", help="Keep the quantized models in DIR/models.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the study in DIR; finished rows stay.")]


def machine() -> dict[str, Any]:
    """What the document says about this machine."""
    from octavo.cli.doctor import examine

    return {name: fact for name, fact in examine().items() if name != "executable"}


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
