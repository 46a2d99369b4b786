"""A quantized folder together with its model's skeleton: for files that do not say the shapes of their matrices."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from octavo import formats
from octavo._core.errors import FormatError
from octavo.formats import Quantized, Shapes
from octavo.models import skeleton
from octavo.models.source import resolve


def check(folder: str | Path, raw: dict[str, Any] | None = None, *, trust_remote_code: bool = False) -> Quantized:
    """:func:`octavo.formats.check`, with shapes from the model's configuration where a file needs them.

    Raises:
        FormatError: the first thing that does not fit.
        UsageError: a configuration that transformers has no causal language model for, if it is needed.
    """
    return formats.check(folder, raw, shapes(folder, trust_remote_code=trust_remote_code))


def shapes(folder: str | Path, *, trust_remote_code: bool = False) -> Shapes:
    """The shapes of a folder's linear layers, by a skeleton that is built when the first one is asked for.

    Called with a module that is no linear layer, it raises FormatError.
    """

    @cache
    def layers() -> dict[str, skeleton.Target]:
        return skeleton.linear_layers(skeleton.build(resolve(folder, trust_remote_code=trust_remote_code)))

    def shape(module: str) -> tuple[int, int]:
        try:
            return layers()[module].shape
        except KeyError:
            raise FormatError(f"{folder}: {module} is quantized, but no linear layer of the model.") from None

    return shape
