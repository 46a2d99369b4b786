"""JLCM (Yvinec, Dapogny and Bailly, arXiv 2309.17361): codebooks of neuron groups, learned together with the codes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from octavo._core.errors import UsageError
from octavo.algorithms._base import Algorithm, Problem, registry
from octavo.algorithms._rows import RowCoder, RowOptions, check_choice, check_row_options
from octavo.layout import BlockScale, CodebookDtype, Layout
from octavo.math.grouping import grouped_order, shape_features
from octavo.math.moves import POWERS, Rule

_SCALE_BITS = 8
_VECTOR_LENGTHS = (1, 2, 4, 8)
#: Largest codebook: moves look at the distances between all pairs of codewords.
_MAX_BITS = 12


@registry.register("jlcm")
@dataclass(frozen=True, kw_only=True)
class JLCM(RowOptions, Algorithm):
    """Scalars (or row vectors) with a scale per row and a codebook per group of rows; codes and codebooks are trained.

    The first codes come from the passes of :class:`octavo.algorithms._rows.RowOptions`; the training is that of
    :mod:`octavo.pipeline.block_tune`.

    Attributes:
        bits: upper limit for the true bits per weight of all matrices together: codes, codebooks, scales.
        vector_length: 1 as published; 2, 4 and 8 are row vectors.
        groups: codebooks per matrix, evened out over its rows; 1 does without groups; None chooses.
        reorder: put neurons (rows) of like distributions next to each other where that costs nothing; see
            :mod:`octavo.models.neurons`.
        codebook_dtype: of the centroids.
        learn: what is trained on the output of the block: ``none``, ``books`` (with scales and norms) or ``joint``, the
            codes as well.
        rule: how evidence for a move depends on its distance; see :mod:`octavo.math.moves`.
        neighbours: codewords that a vector may move to in one step.
        steps: of the training, per block; None makes passes over the text.
        lr: of codebooks, scales and norms. code_lr: of the codes, in mean gaps of a codebook.
    """

    name: ClassVar[str] = "jlcm"

    bits: float = 2.3
    vector_length: int = 1
    groups: int | None = None
    reorder: bool = True
    codebook_dtype: CodebookDtype = "int8"
    learn: Literal["none", "books", "joint"] = "joint"
    rule: Rule = "proximal"
    neighbours: int = 8
    steps: int | None = None
    lr: float = 6e-3
    code_lr: float = 0.02

    def __post_init__(self) -> None:
        Algorithm.__post_init__(self)
        check_row_options(self)
        for option, choices in (
            ("vector_length", _VECTOR_LENGTHS),
            ("reorder", (True, False)),
            ("codebook_dtype", ("int8", "int4", "float16", "bfloat16", "float32")),
            ("learn", ("none", "books", "joint")),
            ("rule", tuple(POWERS)),
        ):
            check_choice(self, option, choices)
        if self.groups is not None and (type(self.groups) is not int or self.groups < 1):
            raise UsageError(f"jlcm: groups wanted a whole number >= 1, got {self.groups!r}")
        if math.floor(self.bits * self.vector_length) - 1 > _MAX_BITS:
            raise UsageError(
                f"jlcm: {self.bits:g} bits for vectors of {self.vector_length} want codebooks beyond 2^{_MAX_BITS}; "
                "give a shorter vector_length"
            )

    @property
    def block_tuning(self) -> Mapping[str, Any] | None:
        if self.learn == "none":
            return None
        train = ("books", "scales", "norms", *(("codes",) if self.learn == "joint" else ()))
        given: dict[str, Any] = {"train": train, "steps": self.steps, "lr": self.lr}
        if self.learn == "joint":
            given |= {"rule": self.rule, "neighbours": self.neighbours, "code_lr": self.code_lr}
        return given

    @property
    def orders_rows(self) -> bool:
        return self.reorder

    def row_order(self, weights: Sequence[Tensor]) -> Tensor:
        return grouped_order(torch.cat([shape_features(weight) for weight in weights], dim=1))

    # ---------------------------------------------------------------- layout

    def candidates(self, shape: tuple[int, int], bias: bool) -> Iterator[Layout]:
        (out, inp), v = shape, self.vector_length
        wide = -(-inp // v) * v
        middle = self.bits * v
        for height in sorted({-(-out // groups) for groups in self._group_numbers(out)}):
            for index_bits in range(max(math.floor(middle) - 1, 1), min(math.ceil(middle) + 1, _MAX_BITS) + 1):
                # Codebooks of more than half as many centroids as vectors would store the matrix.
                if index_bits > 1 and 2 << index_bits > height * (wide // v):
                    continue
                yield Layout(
                    shape=shape,
                    vector_length=v,
                    stages=(index_bits,),
                    direction="row",
                    codebook_dtype=self.codebook_dtype,
                    side_dtype=self.side_dtype,
                    tile=(height, wide),
                    block_scale=BlockScale(wide, 0, _SCALE_BITS) if height > 1 else None,
                    bias=bias,
                )

    def _group_numbers(self, rows: int) -> Iterator[int]:
        if self.groups is not None:
            yield min(self.groups, rows)
            return
        yield from (1 << power for power in range(rows.bit_length()))
        yield rows

    # ---------------------------------------------------------------- the first codes

    def _encode(self, problem: Problem) -> dict[str, Tensor]:
        return RowCoder(self, problem).run()
