"""GPTVQ (van Baalen et al., arXiv 2402.15319): row vectors, a codebook per tile, error feedback vector by vector."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from octavo._core.errors import UsageError
from octavo.algorithms._base import Algorithm, Problem, registry
from octavo.algorithms._choose import stage_choices
from octavo.algorithms._rows import RowCoder, RowOptions, check_choice, check_row_options
from octavo.layout import BlockScale, CodebookDtype, Layout

VECTOR_LENGTHS = (1, 2, 4, 8)
_SCALE_BITS = 4
#: From this length on, a codebook is too large for a few rows.
_LONG = 4
_SCALE_COLUMNS = 512
#: Largest codebook that is chosen without being asked for: the fit takes time in proportion to its size.
_MAX_AUTO_BITS = 12


def _parts(length: int, unit: int) -> list[int]:
    """Sizes of equal parts of a length, in whole units, from small to large."""
    units = -(-length // unit)
    return sorted({-(-units // number) * unit for number in range(1, units + 1)})


def _published(d: int, bits: int, weights: int, scale_block: int = 0, columns: int = 256) -> dict[str, Any]:
    """A setting of the authors' scripts: d, index bits per weight, weights per codebook, columns per scale."""
    book = (1 << (bits * d)) * d * 8 / weights
    return {
        "bits": bits + book + (_SCALE_BITS / scale_block if scale_block else 0),
        "vector_length": d,
        "centroids": 1 << (bits * d),
        "group_rows": weights // columns,
        "group_columns": columns,
        "scale_block": scale_block,
        "scale_norm": "max",
    }


#: The settings of the authors' scripts by d and nominal bits; a suffix tells the columns per scale.
_PRESETS = {
    "1d-2.125": _published(1, 2, 256),
    "1d-2.125-s64": _published(1, 2, 512, 64),
    "2d-2.125": _published(2, 2, 2048),
    "2d-2.125-s64": _published(2, 2, 4096, 64),
    "4d-2.125": _published(4, 2, 65536),
    "4d-2.1875-s64": _published(4, 2, 65536, 64),
    "1d-2.25": _published(1, 2, 128, columns=128),
    "2d-2.25": _published(2, 2, 1024),
    "4d-2.25": _published(4, 2, 32768),
    "1d-3.125": _published(1, 3, 512),
    "2d-3.125": _published(2, 3, 8192),
    "2d-3.125-s64": _published(2, 3, 16384, 64),
    "1d-4.125": _published(1, 4, 1024),
    "1d-4.125-s64": _published(1, 4, 2048, 64),
    "2d-4.125": _published(2, 4, 32768),
    "2d-4.125-s64": _published(2, 4, 65536, 64),
}


@registry.register("gptvq")
@dataclass(frozen=True, kw_only=True)
class GPTVQ(RowOptions, Algorithm):
    """Vectors of consecutive inputs of one output, quantized from left to right with second-order error feedback.

    The options of the passes over a matrix are those of :class:`octavo.algorithms._rows.RowOptions`.

    Attributes:
        bits: upper limit for the true bits per weight of all matrices together: indices, codebooks, all side data.
            What is left open below is chosen for it, matrix size by matrix size.
        vector_length: d, one of 1, 2, 4, 8; None chooses.
        centroids: size k of the codebooks, a power of two; None chooses.
        group_rows: rows that share a codebook; evened out over the matrix; None chooses.
        group_columns: columns that share a codebook; 0 for all; evened out over the matrix; None chooses, or takes 256
            if ``group_rows`` is given.
        scale_block: columns of a row that share a 4-bit log2 scale; 0 for no scales; None takes 512 for d >= 4, else 0.
        codebook_dtype: of the centroids; ``auto`` takes int8 with one scale per codebook.
        svd_rank: above 0, store the codebooks of scalars (d = 1) as combinations of so many times k basis codebooks.
        permute: quantize columns by falling H_jj, and store the order: 16 bits per column.
    """

    name: ClassVar[str] = "gptvq"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType(_PRESETS)

    #: On SmolLM2 at 2.25 bits 0.5 gave a KL of 0.93 and 0.98 in
    #: two runs and 1 gave 1.04; vptq, whose codebooks belong to whole matrices, did better with 1 (1.04 against 1.11).
    size_power: ClassVar[float] = 0.5

    bits: float = 2.25
    vector_length: int | None = None
    centroids: int | None = None
    group_rows: int | None = None
    group_columns: int | None = None
    scale_block: int | None = None
    codebook_dtype: CodebookDtype | Literal["auto"] = "auto"
    svd_rank: float = 0.0
    permute: bool = False

    def __post_init__(self) -> None:
        Algorithm.__post_init__(self)
        check_row_options(self)
        for option, choices in (
            ("vector_length", (None, *VECTOR_LENGTHS)),
            ("codebook_dtype", ("auto", "int8", "int4", "float16", "bfloat16", "float32")),
            ("permute", (True, False)),
        ):
            check_choice(self, option, choices)
        k = self.centroids
        if k is not None and (type(k) is not int or k < 2 or k > 65536 or k & (k - 1)):
            raise UsageError(f"gptvq: centroids wanted a power of two, 2..65536, got {k!r}")
        for option, least in (("group_rows", 1), ("group_columns", 0)):
            value = getattr(self, option)
            if value is not None and (type(value) is not int or value < least):
                raise UsageError(f"gptvq: {option} wanted a whole number >= {least}, got {value!r}")
        if self.scale_block not in (None, 0) and (type(self.scale_block) is not int or self.scale_block < 8):
            raise UsageError(f"gptvq: scale_block wanted 0 or a whole number >= 8, got {self.scale_block!r}")
        if not isinstance(self.svd_rank, int | float) or not 0 <= self.svd_rank < 1:
            raise UsageError(f"gptvq: svd_rank wanted a share of the centroids, 0 <= share < 1, got {self.svd_rank!r}")
        if self.svd_rank and self.vector_length != 1:
            raise UsageError("gptvq: svd_rank is for scalars; give vector_length=1 as well")
        if self.svd_rank and self.codebook_dtype == "int4":
            raise UsageError("gptvq: svd_rank stores int8 or float coefficients, not int4")

    # ---------------------------------------------------------------- layout

    def candidates(self, shape: tuple[int, int], bias: bool) -> Iterator[Layout]:
        for v in (self.vector_length,) if self.vector_length else VECTOR_LENGTHS:
            scale = self._scale_columns(shape[1], v)
            for tile in self._tiles(shape, v):
                for index_bits in self._index_bits(tile[0] * tile[1] // v, v):
                    rank = max(round(self.svd_rank * (1 << index_bits)), 1) if self.svd_rank else 0
                    yield Layout(
                        shape=shape,
                        vector_length=v,
                        stages=(index_bits,),
                        direction="row",
                        codebook_dtype="int8" if self.codebook_dtype == "auto" else self.codebook_dtype,
                        side_dtype=self.side_dtype,
                        tile=tile,
                        block_scale=BlockScale(scale, 0, _SCALE_BITS) if scale else None,
                        permuted=self.permute,
                        bias=bias,
                        codebook_rank=rank,
                    )

    def _index_bits(self, vectors: int, v: int) -> Iterator[int]:
        if self.centroids is not None:
            yield self.centroids.bit_length() - 1
        else:
            yield from (bits for (bits,) in stage_choices(vectors, v, self.bits, 1, _MAX_AUTO_BITS))

    def _scale_columns(self, columns: int, v: int) -> int:
        """Columns per scale in whole vectors, 0 for none.

        Codebooks of long vectors are shared by many rows, whose sizes differ; a scale per stretch of a row takes that
        away for next to nothing. Codebooks of short vectors belong to few rows and adapt by themselves.
        """
        if self.scale_block is None:
            return min(_SCALE_COLUMNS, -(-columns // v) * v) if v >= _LONG else 0
        return -(-self.scale_block // v) * v

    def _tiles(self, shape: tuple[int, int], v: int) -> Iterator[tuple[int, int]]:
        """Tile sizes worth trying.

        Codebooks of long vectors are as tall as the matrix and as narrow as the bits allow: the vectors of a column
        share a metric, and the later a codebook is fitted, the more compensation its weights hold. Those of short
        vectors are small enough for single rows, where magnitudes differ most.
        """
        out, inp = shape
        wide = -(-inp // v) * v
        if self.group_rows is None and self.group_columns is None and v >= _LONG:
            yield from ((out, width) for width in _parts(inp, v))
            yield from ((height, v) for height in _parts(out, 1) if height < out)
            return
        columns = 256 if self.group_columns is None else self.group_columns or wide
        number = max(round(inp / min(columns, wide)), 1)
        width = -(-inp // (number * v)) * v
        if self.group_rows is not None:
            yield -(-out // -(-out // min(self.group_rows, out))), width
            return
        yield from ((height, width) for height in _parts(out, 1))
        if self.group_columns is None:
            yield from ((1, narrow) for narrow in _parts(inp, v) if narrow < width)
            yield out, wide

    # ---------------------------------------------------------------- quantization

    def _encode(self, problem: Problem) -> dict[str, Tensor]:
        if not problem.layout.permuted:
            return RowCoder(self, problem).run()
        hessian = problem.statistics
        order = torch.argsort(torch.diagonal(hessian), descending=True, stable=True)
        sorted_problem = replace(problem, weight=problem.weight[:, order], hessian=hessian[order][:, order])
        dtype = problem.layout.tensors()["permutation"][0]
        return RowCoder(self, sorted_problem).run() | {"permutation": order.to(dtype)}
