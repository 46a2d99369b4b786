"""Octavo's own format: sharded safetensors and ``quantization_config`` in config.json, which holds every layout.

Tensors of a quantized matrix are called ``<module>.<name in Layout.tensors()>``; all other tensors of the model keep
their names and bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from octavo._core.errors import FormatError, did_you_mean
from octavo.formats._base import Format, Quantized, Shapes, Spec, Stored, json_values, registry
from octavo.formats.head import MODULE_NAME, HeadLayout
from octavo.formats.manifest import FORMAT_VERSION, octavo_version
from octavo.formats.reader import CheckpointReader
from octavo.layout import Layout
from octavo.weight import VQWeight

QUANT_METHOD = "octavo"
_KEYS = ("quant_method", "format_version", "octavo_version", "method", "layouts", "modules", "head", "details")


@dataclass(frozen=True)
class NativeMatrix(Stored):
    """A matrix stored as the tensors of its layout."""

    def tensors(self) -> Spec:
        return self.layout.tensors()

    def decode(self, tensors: Mapping[str, Tensor], where: str) -> VQWeight:
        return VQWeight(self.layout, tensors)


@registry.register(QUANT_METHOD)
class Native(Format):
    """The format that Octavo writes."""

    name: ClassVar[str] = QUANT_METHOD
    strict: ClassVar[bool] = True
    holds_embeddings: ClassVar[bool] = True

    def check_config(self, raw: Mapping[str, Any], where: str) -> None:
        parse_config(raw, where)

    def describe(
        self, raw: dict[str, Any], where: str, reader: CheckpointReader, shapes: Shapes | None = None
    ) -> Quantized:
        return parse_config(raw, where)

    def is_part(self, leaf: str) -> bool:
        return leaf == "indices" or re.fullmatch(r"codebook_\d+", leaf) is not None

    def quantization_config(
        self,
        layouts: Mapping[str, Layout],
        method: str,
        details: Mapping[str, Any],
        dense: Sequence[str] = (),
        head: HeadLayout | None = None,
    ) -> dict[str, Any]:
        return quantization_config(layouts, method, details, head)

    def encode(self, weight: VQWeight) -> dict[str, Tensor]:
        return dict(weight.tensors)


def quantization_config(
    layouts: Mapping[str, Layout], method: str, details: Mapping[str, Any], head: HeadLayout | None = None
) -> dict[str, Any]:
    """The ``quantization_config`` of config.json: every distinct layout once, and which module has which.

    Raises:
        UsageError: ``details`` is not JSON.
    """
    unique: dict[Layout, int] = {}
    modules = {module: unique.setdefault(layout, len(unique)) for module, layout in layouts.items()}
    config = {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "octavo_version": octavo_version(),
        "method": method,
        "layouts": [layout.to_dict() for layout in unique],
        "modules": modules,
        # Written only where there is one: files without mean what they meant.
        **({} if head is None else {"head": head.to_dict()}),
        "details": dict(details),
    }
    return json_values(config)


def parse_config(raw: Any, where: str) -> Quantized:
    """Check a ``quantization_config``; ``where`` names the file in errors.

    Raises:
        FormatError: another method, another format version, or anything that is not exactly this format.
    """
    if not isinstance(raw, dict) or raw.get("quant_method") != QUANT_METHOD:
        method = raw.get("quant_method") if isinstance(raw, dict) else None
        raise FormatError(
            f"{where}: this is no Octavo checkpoint (quant_method is {method!r}, wanted {QUANT_METHOD!r})."
        )
    found = raw.get("format_version")
    if type(found) is not int or found != FORMAT_VERSION:
        raise FormatError(
            f"{where}: format version {found!r} was written by Octavo {raw.get('octavo_version', '?')}; this is Octavo "
            f"{octavo_version()}, which reads format version {FORMAT_VERSION}. Update Octavo, or quantize again."
        )
    for key in raw:
        if key not in _KEYS:
            raise FormatError(f"{where}: unknown key {key!r} in quantization_config.{did_you_mean(key, _KEYS)}")
    for key, kind in (("method", str), ("layouts", list), ("modules", dict), ("details", dict)):
        if not isinstance(raw.get(key), kind):
            raise FormatError(
                f"{where}: quantization_config wanted {key} of type {kind.__name__}, got {raw.get(key)!r}."
            )
    layouts = []
    for number, entry in enumerate(raw["layouts"]):
        if not isinstance(entry, dict):
            raise FormatError(f"{where}: layout {number} is no object.")
        layouts.append(Layout.from_dict(entry, f"{where}: layout {number}"))
    matrices: dict[str, Stored] = {}
    for module, number in raw["modules"].items():
        if not MODULE_NAME.fullmatch(module):
            raise FormatError(f"{where}: {module!r} is no module path.")
        if type(number) is not int or not 0 <= number < len(layouts):
            raise FormatError(f"{where}: module {module} wanted a layout number below {len(layouts)}, got {number!r}.")
        matrices[module] = NativeMatrix(layouts[number])
    head = None
    if "head" in raw:
        by_module = {module: matrix.layout for module, matrix in matrices.items()}
        head = HeadLayout.from_dict(raw["head"], by_module, where)
    return Quantized(QUANT_METHOD, matrices, raw["method"], raw["details"], raw, head)
