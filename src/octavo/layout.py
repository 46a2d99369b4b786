"""Layout: what the bytes of a vector-quantized matrix mean, and how many there are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import torch

from octavo._core.errors import FormatError, UsageError, did_you_mean
from octavo.codebooks import get as get_codebook
from octavo.math.pack import packed_words

Direction = Literal["row", "column"]
CodebookDtype = Literal["float16", "bfloat16", "float32", "int8", "int4", "grid", "universal"]
SideDtype = Literal["float16", "bfloat16", "float32"]
#: Codebooks that store nothing: they are implied, or known by name.
UNSTORED = ("grid", "universal")
ChannelNorm = Literal["none", "input", "output"]

DTYPES: dict[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "int8": torch.int8,
}
MAX_VECTOR_LENGTH = 16
MAX_STAGE_BITS = 16
MAX_FEATURES = 1 << 24


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(f"layout: {message}")


def _require_integers(what: str, *values: object) -> None:
    _require(all(type(x) is int for x in values), f"{what} wanted integers, got {values}")


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


@dataclass(frozen=True)
class Outliers:
    """The first ``columns`` columns (in quantized order) that have a codebook of their own, without residual.

    Their vectors are ``vector_length`` consecutive outputs of one input; ``bits`` is log2 of the codebook size.
    """

    columns: int
    vector_length: int
    bits: int

    def __post_init__(self) -> None:
        _require_integers("outliers", self.columns, self.vector_length, self.bits)
        _require(self.columns >= 1, f"outlier columns wanted >= 1, got {self.columns}")
        _require(1 <= self.vector_length <= MAX_VECTOR_LENGTH, f"outlier vector length 1..16, got {self.vector_length}")
        _require(1 <= self.bits <= MAX_STAGE_BITS, f"outlier index bits 1..16, got {self.bits}")


@dataclass(frozen=True)
class BlockScale:
    """One scale for every ``columns`` consecutive columns of a row, and an integer zero point of ``zero_bits`` bits.

    ``w = scale * (value - zero)``; ``zero_bits = 0`` stores no zero point. With ``log2_bits`` a scale is
    ``2^(low + step * code)``: a code of so many bits per block, low and step per block of columns, shared by all rows
    (GPTVQ, arXiv 2402.15319, Section 3.2).
    """

    columns: int
    zero_bits: int = 0
    log2_bits: int = 0

    def __post_init__(self) -> None:
        _require_integers("block scale", self.columns, self.zero_bits, self.log2_bits)
        _require(0 <= self.log2_bits <= 8, f"log2 scale bits wanted 0..8, got {self.log2_bits}")
        _require(self.columns >= 1, f"block scale columns wanted >= 1, got {self.columns}")
        _require(0 <= self.zero_bits <= 16, f"zero point bits wanted 0..16, got {self.zero_bits}")


@dataclass(frozen=True)
class Transform:
    """What is stored is the matrix between two block Hadamard transforms with signs: W = U^T M V.

    ``input`` is the block size of V, which acts on the layer's inputs (y = M (V x)), ``output`` that of U, which acts
    on its outputs; powers of two that divide the features, 0 for none. The signs are stored, a bit per channel. See
    :mod:`octavo.math.hadamard`.
    """

    input: int = 0
    output: int = 0

    def __post_init__(self) -> None:
        _require_integers("transform", self.input, self.output)
        for block in (self.input, self.output):
            _require(
                block == 0 or (block > 1 and block & (block - 1) == 0), f"transform block {block} is no power of 2"
            )
        _require(self.input > 0 or self.output > 0, "a transform of neither side is none")


@dataclass(frozen=True)
class Layout:
    """How a matrix [out_features, in_features] is stored. Immutable, JSON-able, validated.

    Attributes:
        shape: true (out_features, in_features); padding is implied.
        vector_length: weights per vector, 1..16.
        direction: ``row``: consecutive inputs of one output (GPTVQ); ``column``: outputs of one input (VPTQ).
        stages: log2 of the codebook size of each additive stage; every bit pattern is a legal index.
        codebook_dtype: stored dtype of the centroids; ``int8`` and ``int4`` have one scale per codebook; ``grid`` is
            the implied scalar codebook 0, 1, .., 2^b - 1 of uniform quantizers, ``universal`` the one of
            :mod:`octavo.codebooks` that ``codebook`` names; these two store nothing.
        codebook_rank: each codebook is a combination of so many basis codebooks, which all tiles share: coefficients
            [books, rank] in ``codebook_dtype`` times a basis in ``side_dtype``; 0 stores the codebooks themselves.
        side_dtype: stored dtype of all scales and biases.
        sign_bits: each vector carries ``vector_length`` sign bits; centroids are magnitudes.
        tile: (rows, columns) that share a codebook, or None for one codebook per matrix.
        block_scale: scales (and zero points) along rows, or None.
        channel_norm: a scale and an offset per ``input`` column or per ``output`` row, applied last.
        permuted: columns are stored in the order of ``permutation`` (quantized column c is original column perm[c]).
        outliers: leading columns with a codebook of their own, or None.
        bias: the linear layer's bias is stored with the weight.
        codebook: name of the universal codebook.
        transform: the orthogonal transforms between which the matrix is stored, or None; undone last.
    """

    shape: tuple[int, int]
    vector_length: int
    stages: tuple[int, ...]
    direction: Direction = "column"
    codebook_dtype: CodebookDtype = "float16"
    side_dtype: SideDtype = "float16"
    sign_bits: bool = False
    tile: tuple[int, int] | None = None
    block_scale: BlockScale | None = None
    channel_norm: ChannelNorm = "none"
    permuted: bool = False
    outliers: Outliers | None = None
    bias: bool = False
    codebook_rank: int = 0
    codebook: str = ""
    transform: Transform | None = None

    def __post_init__(self) -> None:
        v = self.vector_length
        for name, value in (("shape", self.shape), ("stages", self.stages), ("tile", self.tile or ())):
            _require_integers(name, *value)
        for name, flag in (("sign_bits", self.sign_bits), ("permuted", self.permuted), ("bias", self.bias)):
            _require(type(flag) is bool, f"{name} wanted true or false, got {flag!r}")
        _require(len(self.shape) == 2, f"shape wanted (out, in), got {self.shape}")
        _require(
            all(1 <= n <= MAX_FEATURES for n in self.shape), f"features wanted 1..{MAX_FEATURES}, got {self.shape}"
        )
        _require(type(v) is int and 1 <= v <= MAX_VECTOR_LENGTH, f"vector length wanted 1..16, got {v}")
        _require(self.direction in ("row", "column"), f"direction wanted 'row' or 'column', got {self.direction!r}")
        _require(len(self.stages) >= 1, "at least one codebook stage is needed")
        _require(all(1 <= b <= MAX_STAGE_BITS for b in self.stages), f"stage bits wanted 1..16, got {self.stages}")
        _require(self.code_bits <= 32, f"a vector's indices and signs take {self.code_bits} bits; 32 is the limit")
        _require(self.codebook_dtype in get_args(CodebookDtype), f"unknown codebook dtype {self.codebook_dtype!r}")
        _require(self.side_dtype in ("float16", "bfloat16", "float32"), f"unknown side dtype {self.side_dtype!r}")
        _require(self.channel_norm in ("none", "input", "output"), f"unknown channel norm {self.channel_norm!r}")
        if self.codebook_dtype == "grid":
            plain = v == 1 and len(self.stages) == 1 and not self.sign_bits and self.tile is None
            _require(plain, "a grid is scalar, with one stage and neither signs nor tiles")
        self._check_codebook_name()
        if self.transform is not None:
            for block, features in ((self.transform.output, self.shape[0]), (self.transform.input, self.shape[1])):
                _require(block == 0 or features % block == 0, f"transform block {block} does not divide {features}")
        _require_integers("codebook rank", self.codebook_rank)
        if self.codebook_rank:
            _require(0 < self.codebook_rank <= 1 << 16, f"codebook rank wanted 0..65536, got {self.codebook_rank}")
            low_rank = self.codebook_dtype not in (*UNSTORED, "int4") and len(self.stages) == 1
            _require(low_rank, "a codebook rank needs one stage with a codebook that is stored, and not as int4")
        if self.outliers is not None:
            _require(self.outliers.columns < self.shape[1], "outliers may not take every column")
        if self.tile is not None:
            _require(len(self.tile) == 2 and min(self.tile) >= 1, f"tile wanted (rows, columns), got {self.tile}")
            along = self.tile[0] if self.direction == "column" else self.tile[1]
            _require(along % v == 0, f"tile {self.tile} cuts vectors of length {v}")

    def _check_codebook_name(self) -> None:
        _require(isinstance(self.codebook, str), f"codebook wanted a name, got {self.codebook!r}")
        _require(
            (self.codebook_dtype == "universal") == bool(self.codebook),
            "universal codebooks, and only they, have a name",
        )
        if self.codebook:
            book = get_codebook(self.codebook)
            mine = (self.vector_length, self.stages, self.sign_bits)
            theirs = (book.vector_length, book.stages, book.sign_bits)
            _require(mine == theirs, f"{self.codebook} has (vector length, stages, signs) {theirs}, not {mine}")
            _require(self.tile is None and self.codebook_rank == 0, "a universal codebook has neither tiles nor a rank")

    # ---------------------------------------------------------------- geometry

    @property
    def code_bits(self) -> int:
        """Bits of one packed element: the indices of all stages (first stage lowest), then the signs."""
        return sum(self.stages) + (self.vector_length if self.sign_bits else 0)

    @property
    def main_columns(self) -> int:
        """Columns that are not outliers."""
        return self.shape[1] - (self.outliers.columns if self.outliers else 0)

    @property
    def index_shape(self) -> tuple[int, int]:
        """Shape of the index matrix of the main columns: (vector rows, vector columns)."""
        rows, columns = self.shape[0], self.main_columns
        if self.direction == "column":
            return -(-rows // self.vector_length), columns
        return rows, -(-columns // self.vector_length)

    @property
    def books_shape(self) -> tuple[int, int]:
        """How many codebooks there are along the rows and along the columns."""
        if self.tile is None:
            return 1, 1
        return -(-self.shape[0] // self.tile[0]), -(-self.main_columns // self.tile[1])

    @property
    def books(self) -> int:
        """How many codebooks there are per stage."""
        return math.prod(self.books_shape)

    @property
    def weights(self) -> int:
        """Number of true weights."""
        return self.shape[0] * self.shape[1]

    def why_no_rows(self) -> str:
        """What keeps single rows from being decoded without the others, or an empty string."""
        reasons = {
            "column vectors": self.direction == "column" or self.outliers is not None,
            "codebooks per tile": self.tile is not None,
            "channel norms of rows": self.channel_norm == "output",
            "a transform of the outputs": self.transform is not None and self.transform.output > 0,
        }
        return ", ".join(reason for reason, holds in reasons.items() if holds)

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name -> (dtype, shape) of every stored tensor: the one source for files, buffers and the bit count."""
        out, inp = self.shape
        side = DTYPES[self.side_dtype]
        rows, columns = self.index_shape
        spec: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "indices": (torch.int32, (rows, packed_words(columns, self.code_bits)))
        }
        books = self.books
        if self.codebook_rank:
            size = (1 << self.stages[0], self.vector_length)
            spec["codebook_coefficient_0"] = (DTYPES[self.codebook_dtype], (books, self.codebook_rank))
            spec["codebook_basis_0"] = (side, (self.codebook_rank, *size))
        elif self.codebook_dtype not in UNSTORED:
            for stage, bits in enumerate(self.stages):
                size = (books, 1 << bits, self.vector_length)
                if self.codebook_dtype == "int4":
                    spec[f"codebook_{stage}"] = (torch.int32, (1, packed_words(math.prod(size), 4)))
                else:
                    spec[f"codebook_{stage}"] = (DTYPES[self.codebook_dtype], size)
                if self.codebook_dtype in ("int8", "int4"):
                    spec[f"codebook_scale_{stage}"] = (side, (books,))
        if self.block_scale is not None:
            blocks = -(-self.main_columns // self.block_scale.columns)
            if log2_bits := self.block_scale.log2_bits:
                # Along the rows, so that short rows waste no bits.
                spec["block_scale_code"] = (torch.int32, (blocks, packed_words(out, log2_bits)))
                spec["block_scale_low"] = spec["block_scale_step"] = (side, (blocks,))
            else:
                spec["block_scale"] = (side, (out, blocks))
            if self.block_scale.zero_bits:
                words = packed_words(blocks, self.block_scale.zero_bits)
                spec["block_zero"] = (torch.int32, (out, words))
        if self.outliers is not None:
            o = self.outliers
            words = packed_words(o.columns, o.bits)
            spec["outlier_indices"] = (torch.int32, (-(-out // o.vector_length), words))
            dtype = side if self.codebook_dtype in ("int8", "int4", *UNSTORED) else DTYPES[self.codebook_dtype]
            spec["outlier_codebook"] = (dtype, (1 << o.bits, o.vector_length))
        if self.permuted:
            spec["permutation"] = (torch.int16 if inp <= 1 << 16 else torch.int32, (inp,))
        if self.channel_norm != "none":
            length = inp if self.channel_norm == "input" else out
            spec["channel_scale"] = (side, (length,))
            spec["channel_offset"] = (side, (length,))
        if self.transform is not None:
            sides = (("input_signs", self.transform.input, inp), ("output_signs", self.transform.output, out))
            spec |= {name: (torch.int32, (1, packed_words(n, 1))) for name, block, n in sides if block}
        if self.bias:
            spec["bias"] = (side, (out,))
        return spec

    def bits(self) -> int:
        """Size in bits of everything that is stored, padding included."""
        return sum(8 * dtype.itemsize * math.prod(shape) for dtype, shape in self.tensors().values())

    @property
    def nominal_bits(self) -> float:
        """Index bits per weight alone; never shown without :attr:`bits_per_weight`."""
        return self.code_bits / self.vector_length

    @property
    def bits_per_weight(self) -> float:
        """All stored bits over true weights."""
        return self.bits() / self.weights

    # ---------------------------------------------------------------- (de)serialisation

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary without default values; the inverse of :meth:`from_dict`."""
        full = asdict(self)
        if self.block_scale is not None and not self.block_scale.log2_bits:
            del full["block_scale"]["log2_bits"]  # Readers that came before the key refuse it, whatever its value.
        return {f.name: full[f.name] for f in fields(self) if f.default != full[f.name]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "layout") -> Layout:
        """Read a layout from JSON data.

        Raises:
            FormatError: unknown keys, missing keys, or values that are no layout.
        """
        known = [f.name for f in fields(cls)]
        for key in values:
            if key not in known:
                raise FormatError(f"{where}: unknown layout key {key!r}.{did_you_mean(key, known)}")
        data = {k: _tuples(v) for k, v in values.items()}
        try:
            if data.get("outliers") is not None:
                data["outliers"] = Outliers(**data["outliers"])
            if data.get("block_scale") is not None:
                data["block_scale"] = BlockScale(**data["block_scale"])
            if data.get("transform") is not None:
                data["transform"] = Transform(**data["transform"])
            return cls(**data)
        except (UsageError, TypeError) as error:
            raise FormatError(f"{where}: {error}") from error
