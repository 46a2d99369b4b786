"""What every quantization method offers, and the table of methods."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from octavo._core.config import from_dict, to_dict
from octavo._core.errors import UsageError, did_you_mean
from octavo._core.registry import Registry
from octavo.algorithms._choose import allocate
from octavo.algorithms._input import bias_tensors, checked
from octavo.layout import Layout, SideDtype
from octavo.math.hessian import factorize
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
        shrink: how far second moments are drawn towards their diagonal, as a multiple of the share of chance in them
            (:meth:`octavo.math.hessian.HessianAccumulator.shrinkage`); 0 takes them as they were seen.
    """

    bits: float = 2.25
    side_dtype: SideDtype = "float16"
    shrink: float = 0.0

    name: ClassVar[str]
    #: Whether the method uses second-order statistics; those that do not need no calibration text.
    needs_hessian: ClassVar[bool] = True
    #: Whether ``bits`` is a limit for everything stored, or the width of the indices alone.
    counts_all_bits: ClassVar[bool] = True
    #: How much a matrix's size counts when bits are shared out and nothing is known of what its errors cost.
    size_power: ClassVar[float] = 1.0
    #: What is decided by what errors cost in the end, unless the user decides: see :mod:`octavo.pipeline.guide`.
    guided: ClassVar[Literal["none", "weights", "bits", "both"]] = "none"
    #: How far matrices make up for what earlier blocks lost, 0 to 1, unless the user decides.
    catch_up: ClassVar[float] = 0.0
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
        if isinstance(self.shrink, bool) or not (isinstance(self.shrink, int | float) and 0 <= self.shrink < math.inf):
            raise UsageError(f"{self.name}: shrink wanted a number >= 0, got {self.shrink!r}")
        if self.shrink and not self.needs_hessian:
            raise UsageError(f"{self.name}: there are no second moments to shrink; leave shrink out")

    def layout(self, shape: tuple[int, int], bias: bool = False) -> Layout:
        """The layout that a matrix of this shape (out, in) gets if it is the only one.

        Raises:
            UsageError: no layout of this method fits the bits asked at this shape.
        """
        return self.layouts([(shape, bias)])[0]

    def layouts(
        self,
        shapes: Sequence[tuple[tuple[int, int], bool]],
        allowed: Callable[[Layout], bool] | None = None,
        size: Callable[[Layout], int] = Layout.bits,
        importance: Sequence[float] | None = None,
        budget: int | None = None,
    ) -> list[Layout]:
        """The layouts of a whole model's matrices, between which the bits are shared out.

        Args:
            shapes: (out, in) and whether there is a bias, of every matrix.
            allowed: layouts that are preferred; a matrix that has none of them takes its others.
            size: what a layout takes in the files, in bits.
            importance: what an error as large as the weights would cost, matrix by matrix; by default the number of
                weights to the power :attr:`size_power`.
            budget: bits for all of them, :attr:`bits` a weight unless given.

        Raises:
            UsageError: no layout of this method fits the options at a shape.
        """
        candidates = {key: list(self.candidates(*key)) for key in set(shapes)}
        for (shape, _), options in candidates.items():
            if not options:
                raise UsageError(
                    f"{self.name}: no codebooks fit a matrix of {shape} within these options (bits {self.bits}). Leave "
                    "more open, or give the size of the codebooks and the vector length as well."
                )
        if allowed is not None:
            # If none is, whoever forbids them has the words for it.
            candidates = {key: [x for x in options if allowed(x)] or options for key, options in candidates.items()}
        if importance is None:
            importance = [(shape[0] * shape[1]) ** self.size_power for shape, _ in shapes]
        if budget is None:
            budget = math.floor(self.bits * sum(out * inp for (out, inp), _ in shapes))
        return allocate([candidates[key] for key in shapes], budget, importance, size)

    @property
    def block_tuning(self) -> Mapping[str, Any] | None:
        """How blocks are tuned after they are quantized, unless the user decides: options of
        :class:`octavo.pipeline.block_tune.BlockTuneOptions`, or None for not at all."""
        return None

    @property
    def orders_rows(self) -> bool:
        """Whether there is a :meth:`row_order`."""
        return False

    def row_order(self, weights: Sequence[Tensor]) -> Tensor:
        """The order [rows] int64 that the rows of matrices [rows, columns] had best be quantized in, one for all."""
        raise NotImplementedError

    def stream(self, name: str, shape: tuple[int, int]) -> str:
        """What the random numbers of a matrix (out, in) depend on, besides the run's seed: by default its name."""
        return name

    @abstractmethod
    def candidates(self, shape: tuple[int, int], bias: bool) -> Iterable[Layout]:
        """The layouts that a matrix of this shape (out, in) may get: a function of the options and the shape alone."""

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

    def sensitivity(self, weight: Tensor, hessian: Tensor, generator: torch.Generator, name: str = "matrix") -> float:
        """The output loss tr(E H E^T) for errors as large as the weights, what error feedback saves counted.

        A codebook of relative distortion D loses about D times that: under feedback column j of the weights counts
        with 1 / U_jj^2, H^-1 = U^T U. The methods' own preparation of the weights is taken into account.

        Raises:
            NumericalError: a Hessian that cannot be factorised.
        """
        weight, checked_hessian = checked(weight, hessian, name)
        if checked_hessian is None:
            return 0.0
        factor = factorize(checked_hessian, name)
        return float((weight.square().sum(dim=0) / factor.variance).sum(dtype=torch.float64))

    @abstractmethod
    def _encode(self, problem: Problem) -> dict[str, Tensor]:
        """The method itself: every tensor of the layout except the bias."""


def identity_options(algorithm: Algorithm) -> dict[str, Any]:
    """The options by which a job is known: those that came later count only where they change something."""
    options = to_dict(algorithm)
    if not options["shrink"]:
        del options["shrink"]
    return options


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
