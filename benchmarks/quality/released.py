"""Octavo's command line with one more method: ``gptvq_released``, GPTVQ as its authors' code does it.

    python benchmarks/quality/released.py quantize MODEL OUT --method gptvq_released --bits 2.25 --set vector_length=4

The method is a baseline for ``table.py``, not part of the package: it is ``tests/oracle/gptvq_released.py``, whose
result is packed as an ordinary quantized matrix. The output needs nothing of this file to be loaded or measured.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from octavo._core.errors import NumericalError, UsageError
from octavo.algorithms._base import Algorithm, Problem, registry
from octavo.cli.app import main
from octavo.layout import Layout
from octavo.stored import pack_codes, to_stored

_TESTS = str(Path(__file__).resolve().parents[2] / "tests")
sys.path.insert(0, _TESTS)
from oracle.gptvq_released import BLOCK, gptvq_released  # noqa: E402  # pyright: ignore[reportMissingImports]

sys.path.remove(_TESTS)

#: The released code's H is 2 / sequences * sum x x^T over sequences of 2048 tokens. Only the 1 that it writes on the
#: diagonal of dead channels feels the difference from our mean over tokens.
_RELEASED_SCALE = 2 * 2048


@registry.register("gptvq_released")
@dataclass(frozen=True, kw_only=True)
class GPTVQReleased(Algorithm):
    """GPTVQ (arXiv 2402.15319) with the faults of its released code, without block scales.

    Attributes:
        bits: limit of the true bits per weight, everything counted, for each matrix by itself.
        vector_length: d; None takes 4 below 3 bits, 2 from there on, as the authors' scripts do.
        centroids: k; None takes 2^(d * floor(bits)).
        group_rows: rows that share a codebook, evened out over the matrix; None takes the fewest within ``bits``.
        group_columns: columns that share a codebook, evened out over the matrix.
        iterations: of EM.
        update: the gradient steps on the codebooks after the last column.
        dtype: of the computation.
    """

    name: ClassVar[str] = "gptvq_released"

    bits: float = 2.25
    vector_length: int | None = None
    centroids: int | None = None
    group_rows: int | None = None
    group_columns: int = 256
    iterations: int = 100
    update: bool = True
    dtype: Literal["float32", "float64"] = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        d, k = self.vector_length, self.centroids
        if d is not None and (type(d) is not int or not 1 <= d <= 16 or BLOCK % d):
            raise UsageError(f"gptvq_released: vector_length wanted 1, 2, 4, 8 or 16, got {d!r}")
        if k is not None and (type(k) is not int or not 2 <= k <= 65536 or k & (k - 1)):
            raise UsageError(f"gptvq_released: centroids wanted a power of two, 2..65536, got {k!r}")
        for option in ("group_rows", "group_columns", "iterations"):
            value = getattr(self, option)
            if not (value is None and option == "group_rows") and (type(value) is not int or value < 1):
                raise UsageError(f"gptvq_released: {option} wanted a whole number >= 1, got {value!r}")
        if self.group_columns % self._vector_length:
            raise UsageError(
                f"gptvq_released: group_columns wanted a multiple of the vector length {self._vector_length}, got "
                f"{self.group_columns}"
            )
        if self.dtype not in ("float32", "float64"):
            raise UsageError(f"gptvq_released: dtype wanted float32 or float64, got {self.dtype!r}")
        if self._index_bits > 16:
            raise UsageError(
                f"gptvq_released: vectors of {self._vector_length} at {self.bits} bits want 2^{self._index_bits} "
                "centroids; 2^16 is the limit. Give a smaller vector_length, or centroids."
            )

    @property
    def _vector_length(self) -> int:
        return self.vector_length or (4 if self.bits < 3 else 2)

    @property
    def _index_bits(self) -> int:
        if self.centroids is not None:
            return self.centroids.bit_length() - 1
        return max(int(self.bits), 1) * self._vector_length

    def candidates(self, shape: tuple[int, int], bias: bool) -> tuple[Layout, ...]:
        return (self._layout(shape, bias),)

    def _layout(self, shape: tuple[int, int], bias: bool) -> Layout:
        out, inp = shape
        d = self._vector_length
        if inp % d:
            raise UsageError(f"gptvq_released: {inp} inputs cannot be cut into vectors of {d}; set vector_length")

        def grouped(row_groups: int, columns: int) -> Layout:
            return Layout(
                shape=shape,
                vector_length=d,
                stages=(self._index_bits,),
                direction="row",
                codebook_dtype="int8",
                side_dtype=self.side_dtype,
                tile=(-(-out // row_groups), columns),
                bias=bias,
            )

        # Groups of even size, as the method "gptvq" cuts them.
        parts = max(round(inp / min(self.group_columns, inp)), 1)
        columns = -(-inp // (parts * d)) * d
        if self.group_rows is not None:
            return grouped(-(-out // min(self.group_rows, out)), columns)
        if grouped(1, columns).bits_per_weight > self.bits:
            # Not even one group of rows fits: all columns share a codebook. If that is too much, the plan warns.
            columns = inp
        fits, too_many = 1, out + 1
        while too_many - fits > 1:
            groups = (fits + too_many) // 2
            if grouped(groups, columns).bits_per_weight <= self.bits:
                fits = groups
            else:
                too_many = groups
        return grouped(fits, columns)

    def _encode(self, problem: Problem) -> dict[str, Tensor]:
        layout = problem.layout
        assert layout.tile is not None
        options: dict[str, Any] = {"iterations": self.iterations, "update": self.update}
        try:
            found = gptvq_released(
                problem.weight,
                problem.statistics * _RELEASED_SCALE,
                layout.vector_length,
                1 << layout.stages[0],
                *layout.tile,
                dtype=getattr(torch, self.dtype),
                **options,
            )
        except ValueError as error:
            raise NumericalError(f"{problem.name}: {error}. The released code stops here as well.") from error
        scale = found.codebook_scales.reshape(-1)
        dtype = layout.tensors()["codebook_scale_0"][0]
        return {
            "indices": pack_codes(layout, [found.indices]),
            "codebook_0": found.codebooks.reshape(layout.books, 1 << layout.stages[0], layout.vector_length),
            "codebook_scale_0": to_stored(scale, dtype, f"{problem.name}: codebook scales"),
        }


if __name__ == "__main__":
    sys.exit(main())
