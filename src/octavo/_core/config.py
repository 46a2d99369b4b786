"""Frozen dataclasses to and from plain dictionaries, with unknown keys refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, TypeVar

from octavo._core.errors import UsageError, did_you_mean

C = TypeVar("C")


def from_dict(cls: type[C], values: Mapping[str, Any], where: str) -> C:
    """Build the dataclass ``cls`` from ``values``; its ``__post_init__`` validates.

    Raises:
        UsageError: a key that ``cls`` does not have, or a missing or unusable value.
    """
    known = [f.name for f in fields(cls) if f.init]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise UsageError(f"{where}: unknown option {key!r}.{did_you_mean(key, known)} Known: {', '.join(known)}.")
    try:
        return cls(**values)
    except TypeError as error:
        raise UsageError(f"{where}: {error}") from error


def to_dict(config: Any) -> dict[str, Any]:
    """The inverse of :func:`from_dict`."""
    return asdict(config)
