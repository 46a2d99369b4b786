"""Universal codebooks: a block Hadamard transform makes weights Gaussian, so that one small table serves all matrices.

Between the transforms a row is close to i.i.d. N(0, sigma^2): codebooks trained on a Gaussian source fit every matrix
(QuIP#, arXiv 2402.04396; HIGGS, arXiv 2411.17525), and nothing but a scale per row has to be stored or fitted. Codes
are chosen by error feedback, vector by vector in the metric that later columns leave (GPTVQ's exact feedback), and then
improved by cyclic coordinate descent under the whole Hessian, scales by least squares between the sweeps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from octavo._core.errors import UsageError
from octavo.algorithms._base import Algorithm, Problem, check_damping, registry
from octavo.algorithms._gaussian import GaussianCoder
from octavo.algorithms._input import checked
from octavo.codebooks import get as get_codebook
from octavo.layout import BlockScale, Direction, Layout, Transform
from octavo.math import hadamard
from octavo.math.descent import coordinate_descent
from octavo.math.feedback import error_feedback
from octavo.math.hessian import damped, exact_float32, factorize
from octavo.math.tiles import block_roots

Sides = Literal["input", "output", "both", "none"]

#: Codebooks that are chosen without being asked for, by bits per weight.
_CHOSEN = (
    "gaussian-v8-k256",
    "gaussian-v8-k256-16",
    "gaussian-v8-k256-256",
    "gaussian-v8-k256-256-16",
    "gaussian-v8-k256-256-256",
    "gaussian-v4-k256-64",
    "gaussian-v4-k256-256",
)


@registry.register("universal")
@dataclass(frozen=True, kw_only=True)
class Universal(Algorithm):
    """Universal Gaussian codebooks between Hadamard transforms.

    Attributes:
        bits: upper limit for the true bits per weight of all matrices together; codebooks are chosen for it, matrix by
            matrix. They are part of the package and take no space in the files.
        codebook: name of one for all matrices (see :func:`octavo.codebooks.names`); None chooses.
        direction: vectors of consecutive inputs (``row``) or outputs (``column``).
        transform: the sides that are transformed.
        block: largest block of the Hadamard transforms; the largest power of two that divides the features at most.
        scale_block: columns of a row that share a scale; 0 for whole rows.
        scale_bits: bits of a scale's logarithm, 1..8.
        beam: partial sums of centroids that the search keeps.
        passes: passes of error feedback, each with scales from the compensated weights of the one before.
        sweeps: sweeps of coordinate descent.
        damping: relative damping of the Hessian's diagonal.
    """

    name: ClassVar[str] = "universal"
    guided: ClassVar[Literal["none", "weights", "bits", "both"]] = "both"

    #: Twice the share: inverses, which feedback works with, want more than H itself (docs/quality.md).
    shrink: float = 2.0
    codebook: str | None = None
    direction: Direction = "row"
    transform: Sides = "input"
    block: int = 256
    scale_block: int = 0
    scale_bits: int = 8
    beam: int = 64
    passes: int = 1
    sweeps: int = 2
    damping: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, choices in (("direction", ("row", "column")), ("transform", ("input", "output", "both", "none"))):
            if getattr(self, option) not in choices:
                raise UsageError(f"universal: {option} wanted {', '.join(choices)}; got {getattr(self, option)!r}")
        limits = {"block": (2, 1 << 16), "scale_block": (0, None), "scale_bits": (1, 8), "beam": (1, 4096)}
        limits |= {"passes": (1, 10), "sweeps": (0, 100)}
        for option, (least, most) in limits.items():
            value = getattr(self, option)
            if type(value) is not int or value < least or (most is not None and value > most):
                wanted = f">= {least}" if most is None else f"{least}..{most}"
                raise UsageError(f"universal: {option} wanted a whole number {wanted}, got {value!r}")
        check_damping(self)
        if self.codebook is not None:
            if not isinstance(self.codebook, str):
                raise UsageError(f"universal: codebook wanted a name, got {self.codebook!r}")
            get_codebook(self.codebook)

    # ---------------------------------------------------------------- layout

    def candidates(self, shape: tuple[int, int], bias: bool) -> Iterator[Layout]:
        out, inp = shape
        blocks = [hadamard.block_size(features, self.block) for features in (inp, out)]
        sides = [
            block if block > 1 and self.transform in (side, "both") else 0
            for side, block in zip(("input", "output"), blocks, strict=True)
        ]
        for name in _CHOSEN if self.codebook is None else (self.codebook,):
            book = get_codebook(name)
            v = book.vector_length
            columns = math.ceil(self.scale_block / v) * v or inp
            yield Layout(
                shape=shape,
                vector_length=v,
                stages=book.stages,
                direction=self.direction,
                codebook_dtype="universal",
                side_dtype=self.side_dtype,
                sign_bits=book.sign_bits,
                block_scale=BlockScale(min(columns, inp), 0, self.scale_bits),
                bias=bias,
                codebook=name,
                transform=Transform(*sides) if any(sides) else None,
            )

    # ---------------------------------------------------------------- quantization

    def stream(self, name: str, shape: tuple[int, int]) -> str:
        """One draw of signs for all matrices of a width: those that read the same vector share its transform.

        It, and what kernels precompute of it, is then worked out once for q, k and v and once for gate and up.
        """
        return f"transform of {shape[1]}"

    def sensitivity(self, weight: Tensor, hessian: Tensor, generator: torch.Generator, name: str = "matrix") -> float:
        weight, checked_hessian = checked(weight, hessian, name)
        if checked_hessian is None:
            return 0.0
        layout = next(iter(self.candidates((weight.shape[0], weight.shape[1]), False)))
        weight, hessian, _ = _rotate(weight, checked_hessian, layout.transform, generator)
        return super().sensitivity(weight, hessian, generator, name)

    def _encode(self, problem: Problem) -> dict[str, Tensor]:
        layout = problem.layout
        weight, hessian, signs = _rotate(problem.weight, problem.statistics, layout.transform, problem.generator)
        factor = factorize(hessian, problem.name, self.damping)
        width = layout.vector_length if layout.direction == "row" else 1
        coder = GaussianCoder(layout, self.beam, weight.device, problem.name)
        coder.roots = block_roots(factor, width)
        coder.fit_scales(weight)
        quantized, compensated = error_feedback(weight, factor, coder.feed, width)
        for _ in range(self.passes - 1):
            coder.fit_scales(compensated)
            quantized, compensated = error_feedback(weight, factor, coder.feed, width)
        hessian = damped(hessian, factor.damping)
        with exact_float32():
            image = weight @ hessian
        for _ in range(self.sweeps):
            quantized, pull = coder.refit_scales(weight, image, quantized, hessian)
            quantized = coordinate_descent(quantized, pull, hessian, coder.choose, width)
        coder.refit_scales(weight, image, quantized, hessian)
        return coder.tensors() | {name: hadamard.pack_signs(s) for name, s in signs.items()}


def _rotate(
    weight: Tensor, hessian: Tensor, transform: Transform | None, generator: torch.Generator
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """U W V^T and V H V^T with random signs, and the signs by the name under which they are stored."""
    signs: dict[str, Tensor] = {}
    if transform is None:
        return weight, hessian, signs
    if block := transform.input:
        signs["input_signs"] = s = hadamard.random_signs(weight.shape[1], generator).to(weight.device)
        weight = hadamard.forward(weight, s, block)
        hessian = hadamard.conjugate(hessian, s, block)
    if block := transform.output:
        signs["output_signs"] = s = hadamard.random_signs(weight.shape[0], generator).to(weight.device)
        weight = hadamard.forward(weight.T, s, block).T.contiguous()
    return weight, hessian, signs
