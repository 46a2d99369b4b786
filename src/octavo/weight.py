"""VQWeight: a vector-quantized matrix.

Algorithms produce a VQWeight, formats store it, kernels consume it. :meth:`VQWeight.dequantize` is the definition of
its value; :meth:`VQWeight.bits` is the only place that counts its size, and counts every stored tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from octavo._core.errors import FormatError, UsageError
from octavo.codebooks import get as get_codebook
from octavo.layout import UNSTORED, CodebookDtype, Direction, Layout
from octavo.math import hadamard
from octavo.math.pack import pack, unpack
from octavo.stored import (
    decode_codebooks,
    index_dtype_to_int64,
    log2_scale_table,
    store_codebooks,
    store_low_rank,
    to_stored,
)


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

    def relaxed(self) -> VQWeight:
        """The same matrix with every continuous quantity (books, scales, norms) in float32, for gradient steps.

        Decodes to the same values; :meth:`rounded` is the way back.
        """
        layout = self.layout
        book: CodebookDtype = layout.codebook_dtype if layout.codebook_dtype in UNSTORED else "float32"
        free = replace(layout, codebook_dtype=book, side_dtype="float32")
        tensors = {}
        for name in free.tensors():
            if name.startswith("codebook_") and name.rsplit("_", 1)[0] == "codebook":
                tensors[name] = self.codebook(int(name.rsplit("_", 1)[1])).clone()
            else:
                tensor = self.tensors[name]
                is_number = tensor.is_floating_point() or name.startswith("codebook_coefficient")
                tensors[name] = tensor.float().clone() if is_number else tensor
        return VQWeight(free, tensors)

    @torch.no_grad()
    def rounded(self, layout: Layout, where: str = "VQWeight") -> VQWeight:
        """A relaxed weight in the stored dtypes of ``layout``.

        Raises:
            NumericalError: a value that the stored dtypes cannot hold; ``where`` names the module.
        """
        tensors: dict[str, Tensor] = {}
        for stage in range(len(layout.stages) if "codebook_0" in self.tensors else 0):
            tensors |= store_codebooks(layout, stage, self.tensors[f"codebook_{stage}"], f"{where}: codebook {stage}")
        if layout.codebook_rank:
            tensors |= store_low_rank(
                layout, self.tensors["codebook_coefficient_0"], self.tensors["codebook_basis_0"], where
            )
        for name, (dtype, _) in layout.tensors().items():
            if name not in tensors:
                value = self.tensors[name]
                tensors[name] = to_stored(value, dtype, f"{where}: {name}") if dtype.is_floating_point else value
        return VQWeight(layout, tensors)

    def validate(self, where: str = "VQWeight") -> None:
        """Check the contents, not only the shapes: finite books and scales, a permutation that is one.

        Every centroid and every scale of a table is checked, used or not: any bit pattern is a legal code.

        Raises:
            FormatError: NaN or infinity, as stored or once decoded to float32, or no permutation; ``where`` names the
                module.
        """
        for name, tensor in self.tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise FormatError(f"{where}: {name} holds NaN or infinity. The file is damaged; fetch it again.")
        for stage in range(len(self.layout.stages)):
            if not bool(torch.isfinite(self.codebook(stage)).all()):
                raise FormatError(
                    f"{where}: centroids of stage {stage} decode to infinity in float32: their factors are too large. "
                    "The file is damaged; fetch it again."
                )
        block = self.layout.block_scale
        if block is not None and block.log2_bits:
            low, step = self.tensors["block_scale_low"], self.tensors["block_scale_step"]
            if not bool(torch.isfinite(log2_scale_table(low, step, block.log2_bits)).all()):
                top = float((low.double() + step.double().clamp(min=0) * ((1 << block.log2_bits) - 1)).max())
                raise FormatError(
                    f"{where}: block_scale_low and block_scale_step reach the scale 2^{top:.4g}, which is infinite in "
                    "float32. The file is damaged; fetch it again."
                )
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
        if layout.codebook:
            return get_codebook(layout.codebook).centroids(stage, dtype).to(self.device).unsqueeze(0)
        if layout.codebook_dtype == "grid":
            return torch.arange(1 << layout.stages[stage], dtype=dtype, device=self.device).view(1, -1, 1)
        return decode_codebooks(layout, stage, self.tensors, dtype)

    def block_scales(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The scales [out, blocks] along rows as numbers; the layout must have them."""
        block = self.layout.block_scale
        assert block is not None
        if not block.log2_bits:
            return self.tensors["block_scale"].to(dtype)
        codes = unpack(self.tensors["block_scale_code"], block.log2_bits, self.layout.shape[0])
        return (
            log2_scale_table(self.tensors["block_scale_low"], self.tensors["block_scale_step"], block.log2_bits, dtype)
            .gather(1, codes)
            .T
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Decode to a dense [out_features, in_features] matrix; every step is done, and rounded, in ``dtype``.

        The order of the steps is that of the VPTQ format: sum of stages, signs, block scales, outlier columns,
        permutation, channel scale, channel offset; then come the transforms, in float32 at least.
        """
        return self.assembled(self.vectors(dtype))

    def vectors(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The decoded vectors [vector rows, vector columns, v] of the main columns: stages added up, signs applied."""
        layout = self.layout
        v, codes = layout.vector_length, self.codes()
        book_id = self.book_ids()
        vectors: Tensor | None = None
        for stage, bits in enumerate(layout.stages):
            book = self.codebook(stage, dtype)
            part = _rows_of(book.reshape(-1, v), codes[stage] + (book_id << bits))
            vectors = part if vectors is None else vectors + part
        assert vectors is not None
        if layout.sign_bits:
            bit = (codes[-1].unsqueeze(-1) >> torch.arange(v, device=self.device)) & 1
            vectors = torch.where(bit.bool(), -vectors, vectors)
        return vectors

    def assembled(self, vectors: Tensor) -> Tensor:
        """The matrix [out_features, in_features] with ``vectors`` in place of what :meth:`vectors` gives.

        It is linear in them but for constants (outliers, offsets), in their dtype.
        """
        layout, dtype = self.layout, vectors.dtype
        out, inp = layout.shape
        main = self._assemble(vectors, layout.direction)[:out, : layout.main_columns]
        if layout.block_scale is not None:
            main = self._apply_block_scale(main, dtype)
        if layout.outliers is not None:
            o = layout.outliers
            index = unpack(self.tensors["outlier_indices"], o.bits, o.columns)
            outliers = _rows_of(self.tensors["outlier_codebook"].to(dtype), index)
            main = torch.cat([self._assemble(outliers, "column")[:out], main], dim=1)
        if layout.permuted:
            order = index_dtype_to_int64(self.tensors["permutation"])
            main = main[:, torch.argsort(order)]
        if layout.channel_norm != "none":
            shape = (1, inp) if layout.channel_norm == "input" else (out, 1)
            main = main * self.tensors["channel_scale"].to(dtype).view(shape)
            main = main + self.tensors["channel_offset"].to(dtype).view(shape)
        if layout.transform is not None:
            main = self._undo_transform(main)
        return main.contiguous()

    def rows(self, index: Tensor) -> VQWeight:
        """The matrix of the rows ``index`` [n >= 1] alone, int64, without its bias: what an embedding looks up.

        Raises:
            UsageError: a layout whose rows depend on each other; see :meth:`Layout.why_no_rows`.
        """
        if reason := self.layout.why_no_rows():
            raise UsageError(f"VQWeight: single rows cannot be decoded of a matrix with {reason}.")
        layout = replace(self.layout, shape=(index.numel(), self.layout.shape[1]), bias=False)
        tensors: dict[str, Tensor] = {}
        for name in layout.tensors():
            tensor = self.tensors[name]
            if name in ("indices", "block_scale", "block_zero"):
                tensor = tensor[index]
            elif name == "block_scale_code":
                assert layout.block_scale is not None
                bits = layout.block_scale.log2_bits
                tensor = pack(unpack(tensor, bits, self.layout.shape[0])[:, index], bits)
            tensors[name] = tensor
        return VQWeight(layout, tensors)

    def _undo_transform(self, main: Tensor) -> Tensor:
        """U^T M V."""
        transform, dtype = self.layout.transform, main.dtype
        assert transform is not None
        wide = torch.promote_types(dtype, torch.float32)
        main = main.to(wide)
        if transform.input:
            main = hadamard.inverse(main, self._signs("input_signs", main.shape[1], wide), transform.input)
        if transform.output:
            main = hadamard.inverse(main.T, self._signs("output_signs", main.shape[0], wide), transform.output).T
        return main.to(dtype)

    def _signs(self, name: str, channels: int, dtype: torch.dtype) -> Tensor:
        return hadamard.unpack_signs(self.tensors[name], channels, dtype)

    @staticmethod
    def _assemble(vectors: Tensor, direction: Direction) -> Tensor:
        """[rows, columns, v] vectors to the (padded) matrix that they tile."""
        rows, columns, v = vectors.shape
        if direction == "column":
            return vectors.transpose(1, 2).reshape(rows * v, columns)
        return vectors.reshape(rows, columns * v)

    def book_ids(self) -> Tensor:
        """Which codebook each index refers to, int64, broadcastable to the index matrix."""
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
        scale = self.block_scales(dtype)
        if block.zero_bits:
            zero = unpack(self.tensors["block_zero"], block.zero_bits, scale.shape[1]).to(dtype)
            main = main - zero[:, which]
        return main * scale[:, which]


def _rows_of(book: Tensor, index: Tensor) -> Tensor:
    """book[index]; the gradient of this form is several times faster on a CPU than that of an embedding."""
    return book.index_select(0, index.reshape(-1)).view(*index.shape, book.shape[1])
