"""Output heads that are no single matrix: rows of two classes, codewords that tokens share, or both."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import prod
from typing import Any

import torch

from octavo._core.errors import FormatError
from octavo.layout import MAX_FEATURES, Layout
from octavo.math.pack import packed_words

#: Names, below the head's module, of the matrices of all tokens, or of the frequent and of the other ones.
WHOLE, CLASSES = ("all",), ("frequent", "rare")
MODULE_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
MAX_CODES = 1 << 16


@dataclass(frozen=True)
class HeadLayout:
    """How the output head ``module`` [tokens, width] is stored.

    Attributes:
        parts: the quantized matrices below it, each with a layout of its own: :data:`WHOLE`, :data:`CLASSES` or none.
        codes: codewords of the model's width that tokens share; 0 for none. Without parts they are the head
            (VQ-Logits); beside parts they choose the candidates that those score.
    """

    module: str
    tokens: int
    width: int
    parts: tuple[str, ...] = ()
    codes: int = 0

    @property
    def map_bits(self) -> int:
        """Bits of a token's codeword."""
        return max((self.codes - 1).bit_length(), 1)

    @property
    def matrices(self) -> tuple[str, ...]:
        """Module paths of the parts."""
        return tuple(f"{self.module}.{part}" for part in self.parts)

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The tensors beside those of the parts, by their names below the module."""
        spec: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        if self.parts == CLASSES:
            spec["classes"] = torch.int32, (1, packed_words(self.tokens, 1))
        if self.codes:
            spec["codes"] = torch.bfloat16, (self.codes, self.width)
            spec["map"] = torch.int32, (1, packed_words(self.tokens, self.map_bits))
        return spec

    def bits(self) -> int:
        """Size of these tensors in bits."""
        return sum(8 * dtype.itemsize * prod(shape) for dtype, shape in self.tensors().values())

    @property
    def weights(self) -> int:
        """Weights of the original head that these tensors, and no part, stand for."""
        return 0 if self.parts else self.tokens * self.width

    def to_dict(self) -> dict[str, Any]:
        """As it stands in config.json."""
        return asdict(self) | {"parts": list(self.parts)}

    @classmethod
    def from_dict(cls, raw: Any, layouts: Mapping[str, Layout], where: str) -> HeadLayout:
        """Read and check an entry of config.json against the layouts of the folder.

        Raises:
            FormatError: anything that :meth:`to_dict` does not write, or parts that do not make up the head.
        """
        names = {field.name for field in fields(cls)}
        if not isinstance(raw, dict) or set(raw) != names:
            raise FormatError(f"{where}: head wanted an object with {', '.join(sorted(names))}, got {raw!r}.")
        module, parts = raw["module"], raw["parts"]
        numbers = [raw[name] for name in ("tokens", "width", "codes")]
        if not isinstance(module, str) or not MODULE_NAME.fullmatch(module):
            raise FormatError(f"{where}: the head's module {module!r} is no module path.")
        if any(type(n) is not int for n in numbers) or not all(1 <= n <= MAX_FEATURES for n in numbers[:2]):
            raise FormatError(f"{where}: the head wanted tokens and width in 1..{MAX_FEATURES}, got {numbers}.")
        if parts not in ([], list(WHOLE), list(CLASSES)) or not 0 <= numbers[2] <= min(MAX_CODES, numbers[0]):
            raise FormatError(f"{where}: the head has parts {parts!r} and {numbers[2]} codewords, which cannot be.")
        head = cls(module, numbers[0], numbers[1], tuple(parts), numbers[2])
        if not head.codes and len(head.parts) < 2:
            raise FormatError(f"{where}: the head has neither codewords nor classes; its matrix needs no such entry.")
        missing = [name for name in head.matrices if name not in layouts]
        if missing or module in layouts:
            raise FormatError(f"{where}: the head's parts and the quantized modules do not fit: {missing or module}.")
        if why := [name for name in head.matrices if layouts[name].bias or layouts[name].why_no_rows()]:
            raise FormatError(f"{where}: parts of the head want rows that can be looked up, and no bias: {why}.")
        shapes = [layouts[name].shape for name in head.matrices]
        if shapes and ({width for _, width in shapes} != {head.width} or sum(n for n, _ in shapes) != head.tokens):
            raise FormatError(f"{where}: parts of {shapes} do not make a head of {head.tokens} x {head.width}.")
        return head
