"""VQWeight: a vector-quantized matrix, and Layout: what its bytes mean.

Algorithms produce a VQWeight, formats store it, kernels consume it. :meth:`VQWeight.dequantize` is the definition of
its value; :meth:`VQWeight.bits` is the only place that counts its size, and counts every stored tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from octavo._core.errors import FormatError, NumericalError, UsageError, did_you_mean
from octavo.math.pack import pack, packed_words, unpack

Direction = Literal["row", "column"]
CodebookDtype = Literal["float16", "bfloat16", "float32", "int8", "grid"]
SideDtype = Literal["float16", "bfloat16", "float32"]
ChannelNorm = Literal["none", "input", "output"]

_DTYPES: dict[str, torch.dtype] = {
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

    ``w = scale * (value - zero)``; ``zero_bits = 0`` stores no zero point.
    """

    columns: int
    zero_bits: int = 0

    def __post_init__(self) -> None:
        _require_integers("block scale", self.columns, self.zero_bits)
        _require(self.columns >= 1, f"block scale columns wanted >= 1, got {self.columns}")
        _require(0 <= self.zero_bits <= 16, f"zero point bits wanted 0..16, got {self.zero_bits}")


@dataclass(frozen=True)
class Layout:
    """How a matrix [out_features, in_features] is stored. Immutable, JSON-able, validated.

    Attributes:
        shape: true (out_features, in_features); padding is implied.
        vector_length: weights per vector, 1..16.
        direction: ``row``: consecutive inputs of one output (GPTVQ); ``column``: outputs of one input (VPTQ).
        stages: log2 of the codebook size of each additive stage; every bit pattern is a legal index.
        codebook_dtype: stored dtype of the centroids; ``int8`` has one scale per codebook; ``grid`` is the implied
            scalar codebook 0, 1, .., 2^b - 1 of uniform quantizers, which stores nothing.
        side_dtype: stored dtype of all scales and biases.
        sign_bits: each vector carries ``vector_length`` sign bits; centroids are magnitudes.
        tile: (rows, columns) that share a codebook, or None for one codebook per matrix.
        block_scale: scales (and zero points) along rows, or None.
        channel_norm: a scale and an offset per ``input`` column or per ``output`` row, applied last.
        permuted: columns are stored in the order of ``permutation`` (quantized column c is original column perm[c]).
        outliers: leading columns with a codebook of their own, or None.
        bias: the linear layer's bias is stored with the weight.
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
        _require(self.codebook_dtype in (*_DTYPES, "grid"), f"unknown codebook dtype {self.codebook_dtype!r}")
        _require(self.side_dtype in ("float16", "bfloat16", "float32"), f"unknown side dtype {self.side_dtype!r}")
        _require(self.channel_norm in ("none", "input", "output"), f"unknown channel norm {self.channel_norm!r}")
        if self.codebook_dtype == "grid":
            plain = v == 1 and len(self.stages) == 1 and not self.sign_bits and self.tile is None
            _require(plain, "a grid is scalar, with one stage and neither signs nor tiles")
        if self.outliers is not None:
            _require(self.outliers.columns < self.shape[1], "outliers may not take every column")
        if self.tile is not None:
            _require(len(self.tile) == 2 and min(self.tile) >= 1, f"tile wanted (rows, columns), got {self.tile}")
            along = self.tile[0] if self.direction == "column" else self.tile[1]
            _require(along % v == 0, f"tile {self.tile} cuts vectors of length {v}")

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
    def weights(self) -> int:
        """Number of true weights."""
        return self.shape[0] * self.shape[1]

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name -> (dtype, shape) of every stored tensor: the one source for files, buffers and the bit count."""
        out, inp = self.shape
        side = _DTYPES[self.side_dtype]
        rows, columns = self.index_shape
        spec: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "indices": (torch.int32, (rows, packed_words(columns, self.code_bits)))
        }
        books = self.books_shape[0] * self.books_shape[1]
        if self.codebook_dtype != "grid":
            for stage, bits in enumerate(self.stages):
                spec[f"codebook_{stage}"] = (_DTYPES[self.codebook_dtype], (books, 1 << bits, self.vector_length))
                if self.codebook_dtype == "int8":
                    spec[f"codebook_scale_{stage}"] = (side, (books,))
        if self.block_scale is not None:
            blocks = -(-self.main_columns // self.block_scale.columns)
            spec["block_scale"] = (side, (out, blocks))
            if self.block_scale.zero_bits:
                words = packed_words(blocks, self.block_scale.zero_bits)
                spec["block_zero"] = (torch.int32, (out, words))
        if self.outliers is not None:
            o = self.outliers
            words = packed_words(o.columns, o.bits)
            spec["outlier_indices"] = (torch.int32, (-(-out // o.vector_length), words))
            dtype = side if self.codebook_dtype in ("int8", "grid") else _DTYPES[self.codebook_dtype]
            spec["outlier_codebook"] = (dtype, (1 << o.bits, o.vector_length))
        if self.permuted:
            spec["permutation"] = (torch.int16 if inp <= 1 << 16 else torch.int32, (inp,))
        if self.channel_norm != "none":
            length = inp if self.channel_norm == "input" else out
            spec["channel_scale"] = (side, (length,))
            spec["channel_offset"] = (side, (length,))
        if self.bias:
            spec["bias"] = (side, (out,))
        return spec

    def bits(self) -> int:
        """Size in bits of everything that is stored, padding included."""
        total = 0
        for dtype, shape in self.tensors().values():
            count = 8 * dtype.itemsize
            for n in shape:
                count *= n
            total += count
        return total

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
            return cls(**data)
        except (UsageError, TypeError) as error:
            raise FormatError(f"{where}: {error}") from error


def index_dtype_to_int64(permutation: Tensor) -> Tensor:
    """Read a stored permutation; int16 holds the bits of uint16."""
    wide = permutation.to(torch.int64)
    return wide & 0xFFFF if permutation.dtype == torch.int16 else wide


def to_stored(value: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """Cast to a stored float dtype.

    Raises:
        NumericalError: a value that is finite now and would not be after the cast, or all of them vanishing.
    """
    stored = value.to(dtype)
    if bool(value.any()) and not bool(stored.any()):
        raise NumericalError(
            f"{what}: every value is below the range of {dtype} (largest magnitude {float(value.abs().max()):.3g}) and "
            "would be stored as zero. Use --side-dtype bfloat16."
        )
    if not bool(torch.isfinite(stored).all()):
        raise NumericalError(
            f"{what}: {int((~torch.isfinite(stored)).sum())} values are not finite in {dtype} (largest magnitude "
            f"{float(value.abs().max()):.3g}). Use --side-dtype bfloat16, or check the weights for non-finite values."
        )
    return stored


@dataclass(frozen=True)
class VQWeight:
    """A quantized matrix: a :class:`Layout` and exactly the tensors that it names."""

    layout: Layout
    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        expected = self.layout.tensors()
        if self.tensors.keys() != expected.keys():
            missing, extra = expected.keys() - self.tensors.keys(), self.tensors.keys() - expected.keys()
            raise FormatError(f"VQWeight: tensors missing {sorted(missing)}, unknown {sorted(extra)}")
        for name, (dtype, shape) in expected.items():
            tensor = self.tensors[name]
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise FormatError(f"VQWeight: {name} wanted {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")

    @property
    def bias(self) -> Tensor | None:
        """The linear layer's bias [out_features], if it is stored here."""
        return self.tensors.get("bias")

    @property
    def device(self) -> torch.device:
        """Where the indices live."""
        return self.tensors["indices"].device

    def bits(self) -> int:
        """Size in bits: indices, codebooks, scales, zero points, permutation, padding, bias - everything."""
        return sum(8 * t.numel() * t.element_size() for t in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        """:meth:`bits` over the number of true weights."""
        return self.bits() / self.layout.weights

    def to(self, device: torch.device | str) -> VQWeight:
        """The same weight on another device."""
        return replace(self, tensors={k: t.to(device) for k, t in self.tensors.items()})

    def validate(self, where: str = "VQWeight") -> None:
        """Check the contents, not only the shapes: finite books and scales, a permutation that is one.

        Raises:
            FormatError: the data cannot be decoded to a finite matrix; ``where`` names the module.
        """
        for name, tensor in self.tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise FormatError(f"{where}: {name} holds NaN or infinity. The file is damaged; fetch it again.")
        if self.layout.permuted:
            order = index_dtype_to_int64(self.tensors["permutation"])
            if not torch.equal(order.sort().values, torch.arange(order.numel(), device=order.device)):
                raise FormatError(f"{where}: permutation is no permutation of 0..{order.numel() - 1}.")

    # ---------------------------------------------------------------- decoding

    def codes(self) -> list[Tensor]:
        """The index matrices [vector rows, vector columns] of all stages, int64; then the signs, if any."""
        layout = self.layout
        element = unpack(self.tensors["indices"], layout.code_bits, layout.index_shape[1])
        parts, shift = [], 0
        for width in (*layout.stages, *((layout.vector_length,) if layout.sign_bits else ())):
            parts.append((element >> shift) & ((1 << width) - 1))
            shift += width
        return parts

    def codebook(self, stage: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Centroids [books, 2^bits, vector_length] of one stage as numbers."""
        layout = self.layout
        if layout.codebook_dtype == "grid":
            return torch.arange(1 << layout.stages[stage], dtype=dtype, device=self.device).view(1, -1, 1)
        book = self.tensors[f"codebook_{stage}"].to(dtype)
        if layout.codebook_dtype == "int8":
            book = book * self.tensors[f"codebook_scale_{stage}"].to(dtype).view(-1, 1, 1)
        return book

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Decode to a dense [out_features, in_features] matrix; every step is done, and rounded, in ``dtype``.

        The order of the steps is that of the VPTQ format: sum of stages, signs, block scales, outlier columns,
        permutation, channel scale, channel offset.
        """
        layout = self.layout
        out, inp = layout.shape
        v, codes = layout.vector_length, self.codes()
        book_id = self._book_ids()
        vectors: Tensor | None = None
        for stage, bits in enumerate(layout.stages):
            book = self.codebook(stage, dtype)
            part = functional.embedding(codes[stage] + (book_id << bits), book.reshape(-1, v))
            vectors = part if vectors is None else vectors + part
        assert vectors is not None
        if layout.sign_bits:
            bit = (codes[-1].unsqueeze(-1) >> torch.arange(v, device=self.device)) & 1
            vectors = torch.where(bit.bool(), -vectors, vectors)
        main = self._assemble(vectors, layout.direction)[:out, : layout.main_columns]
        if layout.block_scale is not None:
            main = self._apply_block_scale(main, dtype)
        if layout.outliers is not None:
            o = layout.outliers
            index = unpack(self.tensors["outlier_indices"], o.bits, o.columns)
            vectors = functional.embedding(index, self.tensors["outlier_codebook"].to(dtype))
            main = torch.cat([self._assemble(vectors, "column")[:out], main], dim=1)
        if layout.permuted:
            order = index_dtype_to_int64(self.tensors["permutation"])
            main = main[:, torch.argsort(order)]
        if layout.channel_norm != "none":
            shape = (1, inp) if layout.channel_norm == "input" else (out, 1)
            main = main * self.tensors["channel_scale"].to(dtype).view(shape)
            main = main + self.tensors["channel_offset"].to(dtype).view(shape)
        return main.contiguous()

    @staticmethod
    def _assemble(vectors: Tensor, direction: Direction) -> Tensor:
        """[rows, columns, v] vectors to the (padded) matrix that they tile."""
        rows, columns, v = vectors.shape
        if direction == "column":
            return vectors.transpose(1, 2).reshape(rows * v, columns)
        return vectors.reshape(rows, columns * v)

    def _book_ids(self) -> Tensor:
        """Which codebook each index refers to, broadcastable to the index matrix."""
        layout = self.layout
        if layout.tile is None:
            return torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        rows, columns = (torch.arange(n, device=self.device) for n in layout.index_shape)
        v = layout.vector_length
        row_step, column_step = (v, 1) if layout.direction == "column" else (1, v)
        row_tile, column_tile = rows * row_step // layout.tile[0], columns * column_step // layout.tile[1]
        return row_tile.unsqueeze(1) * layout.books_shape[1] + column_tile

    def _apply_block_scale(self, main: Tensor, dtype: torch.dtype) -> Tensor:
        block = self.layout.block_scale
        assert block is not None
        which = torch.arange(main.shape[1], device=self.device) // block.columns
        scale = self.tensors["block_scale"].to(dtype)
        if block.zero_bits:
            zero = unpack(self.tensors["block_zero"], block.zero_bits, scale.shape[1]).to(dtype)
            main = main - zero[:, which]
        return main * scale[:, which]


def pack_codes(layout: Layout, parts: list[Tensor]) -> Tensor:
    """Inverse of :meth:`VQWeight.codes`: index matrices of all stages (then signs) to the packed ``indices`` tensor."""
    element = torch.zeros(layout.index_shape, dtype=torch.int64, device=parts[0].device)
    shift = 0
    widths = (*layout.stages, *((layout.vector_length,) if layout.sign_bits else ()))
    for width, part in zip(widths, parts, strict=True):
        element |= part.to(torch.int64) << shift
        shift += width
    return pack(element, layout.code_bits)
