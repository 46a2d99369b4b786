"""Column vectors: the codebooks and codes of one matrix, column by column, and the fits of its codebooks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional

from octavo.layout import Layout
from octavo.math.assign import nearest
from octavo.math.kmeans import kmeans
from octavo.math.pack import pack
from octavo.stored import decode_codebooks, pack_codes, store_codebooks, to_stored


def to_vectors(columns: Tensor, v: int) -> Tensor:
    """[out, n] columns to vectors [n * ceil(out / v), v], column by column, zero-padded at the bottom."""
    padded = functional.pad(columns.T, (0, -columns.shape[0] % v))
    return padded.reshape(-1, v)


@dataclass
class ColumnCoder:
    """The codebooks of a matrix, as they will be stored, and the codes of the columns quantized so far."""

    layout: Layout
    device: torch.device
    name: str
    stored: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        layout = self.layout
        self.outliers = layout.outliers.columns if layout.outliers else 0
        self.group_columns = layout.tile[1] if layout.tile else layout.main_columns
        self.groups = layout.books_shape[1]
        self.main: list[list[Tensor]] = [[] for _ in range(self.groups)]  # [group][stage] -> [k, v]
        self.outlier_book: Tensor | None = None
        rows, columns = layout.index_shape
        self.codes = [torch.zeros(columns, rows, dtype=torch.int64, device=self.device) for _ in layout.stages]
        if layout.outliers:
            rows = -(-layout.shape[0] // layout.outliers.vector_length)
            self.outlier_codes = torch.zeros(self.outliers, rows, dtype=torch.int64, device=self.device)

    def snapshot(self) -> ColumnCoder:
        """A copy whose stored tensors and codes later passes do not touch."""
        copy = replace(self, stored={name: tensor.clone() for name, tensor in self.stored.items()})
        copy.codes = [codes.clone() for codes in self.codes]
        if self.outliers:
            copy.outlier_codes = self.outlier_codes.clone()
        return copy

    def columns(self, group: int) -> slice:
        """The columns (in processing order) of a group."""
        start = self.outliers + group * self.group_columns
        return slice(start, min(start + self.group_columns, self.layout.shape[1]))

    def set_book(self, group: int, stage: int, centroids: Tensor) -> None:
        """Store a codebook; what is used from now on is what the stored form decodes to."""
        one = replace(self.layout, tile=None)
        parts = store_codebooks(one, stage, centroids.unsqueeze(0), f"{self.name}: codebook {stage}")
        for name, (dtype, shape) in self.layout.tensors().items():
            if name in parts:
                self.stored.setdefault(name, torch.zeros(shape, dtype=dtype, device=self.device))[group] = parts[name][
                    0
                ]
        used = decode_codebooks(one, stage, parts)[0]
        if stage < len(self.main[group]):
            self.main[group][stage] = used
        else:
            self.main[group].append(used)

    def set_outlier_book(self, centroids: Tensor) -> None:
        """Store the codebook of the outlier columns."""
        dtype = self.layout.tensors()["outlier_codebook"][0]
        self.stored["outlier_codebook"] = to_stored(centroids, dtype, f"{self.name}: outlier codebook")
        self.outlier_book = self.stored["outlier_codebook"].float()

    def quantize(self, values: Tensor, position: int, upcoming: Tensor) -> Tensor:
        """Quantize some columns [out, n]; a :data:`octavo.math.feedback.BlockQuantizer`."""
        if values.shape[1] == 1:
            return self._column(values.reshape(1, -1), position).reshape(-1, 1)
        columns = [self._column(column.unsqueeze(0), position + i) for i, column in enumerate(values.T.contiguous())]
        return torch.cat(columns).T

    def _column(self, column: Tensor, position: int) -> Tensor:
        """The decoded codes of one column [1, out]."""
        if position < self.outliers:
            assert self.outlier_book is not None
            decoded, self.outlier_codes[position] = _encode(column, self.outlier_book)
            return decoded
        position -= self.outliers
        decoded = None
        for stage, book in enumerate(self.main[position // self.group_columns]):
            part, self.codes[stage][position] = _encode(column if decoded is None else column - decoded, book)
            decoded = part if decoded is None else decoded + part
        assert decoded is not None
        return decoded

    def tensors(self, back: Tensor) -> dict[str, Tensor]:
        """Everything stored except norm, permutation and bias; column c of the file is processed column back[c]."""
        layout = self.layout
        tensors = dict(self.stored)
        order = back[self.outliers :] - self.outliers
        tensors["indices"] = pack_codes(layout, [codes[order].T for codes in self.codes])
        if layout.outliers:
            tensors["outlier_indices"] = pack(self.outlier_codes.T, layout.outliers.bits)
        return tensors


def _encode(column: Tensor, book: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centroids of a column [1, out]: (decoded [1, out], codes [ceil(out / v)]).

    The elements past the end of the last vector have no weight in its choice.
    """
    out, v = column.shape[1], book.shape[1]
    spare = -out % v
    points = functional.pad(column, (0, spare)).reshape(-1, v) if spare else column.reshape(-1, v)
    codes = nearest(points, book)
    if spare:
        mask = torch.ones(1, v, device=column.device)
        mask[:, v - spare :] = 0
        codes[-1:] = nearest(points[-1:], book, mask)
    return book.index_select(0, codes).reshape(1, -1)[:, :out], codes


@dataclass
class ColumnFit:
    """k-means fits of the codebooks, weighted with the importance [in] of a column's error."""

    importance: Tensor
    dead: Tensor
    generator: torch.Generator
    iterations: int
    sample: int

    def __post_init__(self) -> None:
        # Dead channels were given the mean diagonal to be factorised; they must not pull centroids.
        self.importance = torch.where(self.dead, self.importance * 1e-3, self.importance)

    def _vectors(self, values: Tensor, columns: slice, v: int) -> tuple[Tensor, Tensor]:
        """Vectors of some columns and their weights; a last vector that is mostly padding is left out."""
        values = values[:, columns]
        out = values.shape[0]
        importance = self.importance[columns]
        if out % v and out > v:
            values = values[: out - out % v]
        vectors = to_vectors(values, v)
        weights = importance.repeat_interleave(vectors.shape[0] // importance.numel())
        if out < v:
            mask = torch.zeros(v, device=values.device)
            mask[:out] = 1
            return vectors, weights.unsqueeze(1) * mask
        return vectors, weights

    def codebooks(self, coder: ColumnCoder, values: Tensor) -> None:
        """Main codebooks of all groups, and the outliers' one."""
        layout = coder.layout
        if layout.outliers:
            o = layout.outliers
            vectors, weights = self._vectors(values, slice(0, o.columns), o.vector_length)
            coder.set_outlier_book(self._kmeans(vectors, weights, 1 << o.bits))
        for group in range(coder.groups):
            self._fit(coder, values, group, 0)

    def residual(self, coder: ColumnCoder, error: Tensor) -> None:
        """Residual codebooks on what the first pass left."""
        for group in range(coder.groups):
            self._fit(coder, error, group, 1)

    def _fit(self, coder: ColumnCoder, values: Tensor, group: int, stage: int) -> None:
        vectors, weights = self._vectors(values, coder.columns(group), coder.layout.vector_length)
        coder.set_book(group, stage, self._kmeans(vectors, weights, 1 << coder.layout.stages[stage]))

    def _kmeans(self, vectors: Tensor, weights: Tensor, k: int, start: Tensor | None = None) -> Tensor:
        iterations = self.iterations if start is None else max(self.iterations // 4, 1)
        return kmeans(
            vectors,
            weights,
            k,
            generator=self.generator,
            iterations=iterations,
            sample=self.sample or None,
            start=start,
        ).centroids

    def refit(self, coder: ColumnCoder, compensated: Tensor) -> None:
        """Refit each codebook on the values that the feedback pass really had to code, the other stage fixed."""
        for group in range(coder.groups):
            vectors, weights = self._vectors(compensated, coder.columns(group), coder.layout.vector_length)
            for stage in range(len(coder.layout.stages)):
                books = coder.main[group]
                target = vectors
                for other in range(stage):
                    target = target - books[other][nearest(target, books[other])]
                k = 1 << coder.layout.stages[stage]
                coder.set_book(group, stage, self._kmeans(target, weights, k, start=books[stage]))
