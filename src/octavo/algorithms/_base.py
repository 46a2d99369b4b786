"""What every quantization method offers, and the table of methods."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from octavo._core.config import from_dict
from octavo._core.errors import UsageError, did_you_mean
from octavo._core.registry import Registry
from octavo.algorithms._input import bias_tensors, checked
from octavo.layout import Layout, SideDtype
from octavo.weight import VQWeight

MIN_BITS, MAX_BITS = 0.5, 16.0


@dataclass(frozen=True)
class Problem:
    """One matrix to be quantized, checked: weight [out, in] float32, its layout, and what to work with.

    ``hessian`` is None where all inputs count the same: none was given, or no token reached the layer.
    """

    weight: Tensor
    hessian: Tensor | None
    layout: Layout
    generator: torch.Generator
    name: str

    @property
    def statistics(self) -> Tensor:
        """The Hessian [in, in], or the identity in its place."""
        if self.hessian is not None:
            return self.hessian
        return torch.eye(self.weight.shape[1], device=self.weight.device)


@dataclass(frozen=True, kw_only=True)
class Algorithm(ABC):
    """A method with its options: a frozen dataclass, so that it can be hashed, compared and stored.

    Attributes:
        bits: the size asked for, in bits per weight; what it counts is said by each method.
        side_dtype: stored dtype of scales, offsets and biases.
    """

    bits: float = 2.25
    side_dtype: SideDtype = "float16"

    name: ClassVar[str]
    #: Whether the method uses second-order statistics; those that do not need no calibration text.
    needs_hessian: ClassVar[bool] = True
    #: Whether ``bits`` is a limit for everything stored, or the width of the indices alone.
    counts_all_bits: ClassVar[bool] = True
    #: Published settings: name -> options, ``bits`` among them.
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType({})
    #: Presets that follow a pattern, in words for messages; see :meth:`named`.
    preset_pattern: ClassVar[str] = ""

    @classmethod
    def named(cls, name: str) -> Mapping[str, Any] | None:
        """Options of the preset of this name, ``bits`` among them; None if there is none."""
        return cls.presets.get(name)

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int | float):
            raise UsageError(f"{self.name}: bits wanted a number, got {self.bits!r}")
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise UsageError(f"{self.name}: bits wanted {MIN_BITS}..{MAX_BITS}, got {self.bits}")
        if self.side_dtype not in ("float16", "bfloat16", "float32"):
            raise UsageError(f"{self.name}: side_dtype wanted float16, bfloat16 or float32, got {self.side_dtype!r}")

    @abstractmethod
    def layout(self, shape: tuple[int, int], bias: bool = False) -> Layout:
        """The layout that a matrix of this shape (out, in) will get: a function of the options and the shape alone.

        Raises:
            UsageError: no layout of this method fits the bits asked at this shape.
        """

    def layouts(
        self,
        shapes: Sequence[tuple[tuple[int, int], bool]],
        allowed: Callable[[Layout], bool] | None = None,
        size: Callable[[Layout], int] = Layout.bits,
    ) -> list[Layout]:
        """The layouts of a whole model's matrices, given as (shape, bias); methods may trade bits between them.

        Methods that choose prefer layouts that are ``allowed``; those that have no choice do not ask. ``size`` is what
        a layout takes in the files, in bits.
        """
        return [self.layout(shape, bias) for shape, bias in shapes]

    def quantize(
        self,
        weight: Tensor,
        *,
        layout: Layout | None = None,
        hessian: Tensor | None = None,
        generator: torch.Generator | None = None,
        bias: Tensor | None = None,
        name: str = "matrix",
    ) -> VQWeight:
        """Quantize one matrix.

        Args:
            weight: [out, in], any float dtype, finite.
            layout: one of this method's layouts for this shape; None takes :meth:`layout`.
            hessian: E[x x^T] [in, in] of the layer's inputs, float32; None stands for the identity.
            generator: source of all randomness; None means a fresh one with seed 0.
            bias: [out], stored with the weight.
            name: the module's name, for error messages.

        Raises:
            UsageError: shapes that do not belong together.
            NumericalError: non-finite input, or values that the stored dtypes cannot hold.
        """
        weight, hessian = checked(weight, hessian, name)
        layout = layout or self.layout((weight.shape[0], weight.shape[1]), bias is not None)
        generator = generator if generator is not None else torch.Generator().manual_seed(0)
        tensors = self._encode(Problem(weight, hessian, layout, generator, name))
        return VQWeight(layout, {**tensors, **bias_tensors(layout, bias, name)})

    @abstractmethod
    def _encode(self, problem: Problem) -> dict[str, Tensor]:
        """The method itself: every tensor of the layout except the bias."""


def check_damping(algorithm: Any) -> None:
    """Refuse a relative damping that is no positive number."""
    if not (isinstance(algorithm.damping, int | float) and 0 < algorithm.damping < math.inf):
        raise UsageError(f"{algorithm.name}: damping wanted a number above 0, got {algorithm.damping!r}")


registry: Registry[type[Algorithm]] = Registry("method", "octavo.algorithms")


def get(name: str) -> Callable[..., Algorithm]:
    """The constructor of a method by name; it takes the method's options and refuses unknown ones.

    Raises:
        UsageError: unknown method.
    """
    return partial(_build, registry.get(name))


def _build(cls: type[Algorithm], **options: Any) -> Algorithm:
    return from_dict(cls, options, f"method {cls.name}")


def names() -> list[str]:
    """All methods."""
    return registry.names()


def preset(name: str) -> tuple[str, dict[str, Any]]:
    """Method and options (``bits`` among them) of a published setting.

    Raises:
        UsageError: unknown preset.
    """
    methods = [(method, registry.get(method)) for method in names()]
    for method, cls in methods:
        if (options := cls.named(name)) is not None:
            return method, dict(options)
    known = [key for _, cls in methods for key in cls.presets]
    patterns = [cls.preset_pattern for _, cls in methods if cls.preset_pattern]
    raise UsageError(f"unknown preset {name!r}; there are {', '.join(known + patterns)}.{did_you_mean(name, known)}")
