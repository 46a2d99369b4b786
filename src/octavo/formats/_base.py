"""What a format of quantized checkpoints is: how config.json and tensors say which VQWeights a folder holds."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from octavo._core.errors import UsageError
from octavo._core.registry import Registry
from octavo.formats.head import HeadLayout
from octavo.formats.reader import CheckpointReader
from octavo.layout import Layout
from octavo.weight import VQWeight

CONFIG_FILE = "config.json"
#: Name -> (dtype, shape) of stored tensors.
Spec = dict[str, tuple[torch.dtype, tuple[int, ...]]]
#: Module path -> (out_features, in_features) in the model's skeleton.
Shapes = Callable[[str], tuple[int, int]]


@dataclass(frozen=True)
class Stored(ABC):
    """One quantized matrix as the files of a format hold it.

    Attributes:
        layout: of the :class:`VQWeight` that it decodes to.
    """

    layout: Layout

    @abstractmethod
    def tensors(self) -> Spec:
        """The stored tensors by their names below the module's."""

    @abstractmethod
    def decode(self, tensors: Mapping[str, Tensor], where: str) -> VQWeight:
        """The weight, from exactly the tensors that :meth:`tensors` names.

        Raises:
            FormatError: contents that cannot be; ``where`` names the module.
        """

    def check_contents(self, read: Callable[[str], Tensor], where: str) -> None:  # noqa: B027
        """Look at small tensors, read by name, for what no header tells: called before anything large is loaded.

        Raises:
            FormatError: contents that cannot be.
        """

    def bits(self) -> int:
        """Size of the stored tensors in bits, everything counted."""
        return sum(8 * dtype.itemsize * prod(shape) for dtype, shape in self.tensors().values())


@dataclass(frozen=True)
class Quantized:
    """What config.json and the headers of a folder say about its quantized matrices.

    Attributes:
        format: name of the format.
        matrices: module path in the ``AutoModelForCausalLM`` skeleton -> how its matrix is stored.
        method: the algorithm that made them.
        details: what else the writer recorded (bits, calibration, seeds); nothing in it is needed to load.
        raw: ``quantization_config`` as it stands in the file.
        head: the output head, if it is more or less than one of the matrices.
    """

    format: str
    matrices: dict[str, Stored]
    method: str
    details: dict[str, Any]
    raw: dict[str, Any]
    head: HeadLayout | None = None

    @property
    def layouts(self) -> dict[str, Layout]:
        """Module path -> layout of its VQWeight."""
        return {module: matrix.layout for module, matrix in self.matrices.items()}

    def tensors(self) -> Spec:
        """Full name -> (dtype, shape) of every tensor of every quantized matrix, and of the head."""
        found = {
            f"{module}.{name}": spec
            for module, matrix in self.matrices.items()
            for name, spec in matrix.tensors().items()
        }
        return found | self.head_tensors()

    def head_tensors(self) -> Spec:
        """Those of them that belong to the head and to none of the matrices."""
        if self.head is None:
            return {}
        return {f"{self.head.module}.{name}": spec for name, spec in self.head.tensors().items()}

    @property
    def bits_per_weight(self) -> float:
        """All stored bits of all quantized matrices, the head's among them, over their weights."""
        bits, weights = (self.head.bits(), self.head.weights) if self.head else (0, 0)
        for matrix in self.matrices.values():
            bits += matrix.bits()
            weights += matrix.layout.weights
        return bits / weights


def json_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """A ``quantization_config`` as it will be read again.

    Raises:
        UsageError: something in it, the details most likely, is not JSON.
    """
    try:
        return json.loads(json.dumps(config, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UsageError(f"details of the quantization config wanted JSON values: {error}.") from error


class Format(ABC):
    """A format; stateless. ``name`` is the ``quant_method`` of its checkpoints.

    ``strict`` refuses files that the format's only writer never makes, such as weights that the index does not list.
    ``writes_ties`` stores a tensor that is tied to another one as well, for loaders that do not tie.
    ``holds_embeddings``: quantized matrices may be embeddings, and a head that is tied to one.
    """

    name: ClassVar[str]
    strict: ClassVar[bool] = False
    writes_ties: ClassVar[bool] = False
    holds_embeddings: ClassVar[bool] = False

    @abstractmethod
    def check_config(self, raw: Mapping[str, Any], where: str) -> None:
        """Check what can be checked of a ``quantization_config`` without the weights.

        Raises:
            FormatError: it is none of this format, or none that this version reads.
        """

    @abstractmethod
    def describe(
        self, raw: dict[str, Any], where: str, reader: CheckpointReader, shapes: Shapes | None = None
    ) -> Quantized:
        """What a folder holds, from ``quantization_config`` and headers.

        Args:
            where: names config.json in errors.
            shapes: of the model's linear layers, for dialects whose files do not say them.

        Raises:
            FormatError: a config that cannot be.
        """

    @abstractmethod
    def is_part(self, leaf: str) -> bool:
        """Whether a tensor of this last name can only belong to a quantized matrix."""

    @abstractmethod
    def quantization_config(
        self,
        layouts: Mapping[str, Layout],
        method: str,
        details: Mapping[str, Any],
        dense: Sequence[str] = (),
        head: HeadLayout | None = None,
    ) -> dict[str, Any]:
        """The ``quantization_config`` of a folder to be written.

        Args:
            layouts: module path -> layout that :meth:`refusals` has nothing against.
            details: JSON values for the record.
            dense: the model's linear layers that are not quantized.
            head: the output head, if it is no single matrix; only where ``holds_embeddings``.
        """

    @abstractmethod
    def encode(self, weight: VQWeight) -> dict[str, Tensor]:
        """The stored tensors of a weight, by their names below the module's; inverse of :meth:`Stored.decode`."""

    def bits(self, layout: Layout) -> int:
        """Size in bits of a matrix of this layout in the format, everything counted."""
        return layout.bits()

    def adapt(self, layout: Layout, dtype: torch.dtype) -> Layout:
        """The layout nearest to ``layout`` for a model of ``dtype``; a weight is brought into it by :meth:`fit`."""
        return layout

    def fit(self, weight: VQWeight, layout: Layout, where: str) -> VQWeight:
        """A weight in the layout that :meth:`adapt` gave for its own, its numbers rounded to the new dtypes."""
        return weight

    def refusals(self, layout: Layout) -> list[str]:
        """Why a layout cannot be written, one sentence each with the nearest that can; empty if it can."""
        return []

    def options(self, options: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        """A method's options, those that were left open set to what this format needs for a model of ``dtype``."""
        return dict(options)

    def model_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """config.json of the original as the quantized folder has it, but for ``quantization_config``."""
        return config

    def require(self, layouts: Mapping[str, Layout]) -> None:
        """Refuse layouts that cannot be written.

        Raises:
            UsageError: with the reasons and the nearest settings that can be written.
        """
        reasons: dict[str, list[str]] = {}
        for module, layout in layouts.items():
            for reason in self.refusals(layout):
                reasons.setdefault(reason, []).append(module)
        if reasons:
            lines = [
                f"- {modules[0]}{f' and {len(modules) - 1} more' if len(modules) > 1 else ''}: {reason}"
                for reason, modules in reasons.items()
            ]
            raise UsageError(f"the {self.name} format cannot hold these matrices:\n" + "\n".join(lines))


registry: Registry[type[Format]] = Registry("format", "octavo.formats")


def get(name: str) -> Format:
    """A format by name.

    Raises:
        UsageError: unknown.
    """
    return registry.get(name)()
