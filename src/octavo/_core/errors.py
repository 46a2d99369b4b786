"""Every error that Octavo raises on purpose.

The class decides the exit code of the command line; the message says what is wrong, where, what was wanted and what
was got, and what to do next.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import ClassVar


class OctavoError(Exception):
    """Base of all errors that are not bugs in Octavo. ``exit_code`` is what the command line returns."""

    exit_code: ClassVar[int] = 1


class UsageError(OctavoError):
    """An option, argument or configuration value that cannot be honoured."""

    exit_code = 2


class FormatError(OctavoError):
    """A file, folder or text that is broken, incomplete, hostile or unknown."""

    exit_code = 3


class NumericalError(OctavoError):
    """Non-finite or otherwise unusable numbers in weights, activations or Hessians."""

    exit_code = 4


class ResourceError(OctavoError):
    """Not enough disk, memory or time, or a resource that somebody else holds."""

    exit_code = 5


class Interrupted(OctavoError):
    """Stopped by the user at a point from which the job resumes bit-identically."""

    exit_code = 130


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the nearest known name, or an empty string."""
    close = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""
