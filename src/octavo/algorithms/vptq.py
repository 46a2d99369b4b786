"""VPTQ (Liu et al., arXiv 2409.17066): column vectors, channel-independent updates, residual and outlier codebooks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from octavo._core.errors import UsageError
from octavo.algorithms._base import Algorithm, Problem, check_damping, registry
from octavo.algorithms._choose import VECTOR_LENGTHS, allocate, stage_choices
from octavo.layout import CodebookDtype, Layout, Outliers
from octavo.math.assign import nearest
from octavo.math.feedback import error_feedback
from octavo.math.hessian import Factor, dead_columns, factorize
from octavo.math.kmeans import kmeans
from octavo.math.pack import pack
from octavo.stored import decode_codebooks, pack_codes, store_codebooks, to_stored

#: Largest codebook that is chosen without being asked for: k-means time per weight grows with 2^bits.
_MAX_AUTO_BITS = 12
#: Share of the bits that the column norm may cost when it is not asked for; its gain is about one percent of the error.
_NORM_BUDGET = 0.01


@registry.register("vptq")
@dataclass(frozen=True, kw_only=True)
class VPTQ(Algorithm):
    """Vectors of consecutive outputs of one input column, quantized column by column with error feedback.

    A column's vectors share one entry of the Hessian, so plain nearest-centroid assignment is exact and the feedback
    recursion of GPTQ holds unchanged (the paper's channel independence, Section 3.2).

    Attributes:
        bits: upper limit for the true bits per weight of all matrices together: indices, codebooks and all side data.
            The options below are chosen for it, matrix size by matrix size, wherever they are left open.
        vector_length: v; None chooses.
        centroids: size k of the main codebook, a power of two; None chooses.
        residual_centroids: size of the residual codebook; 0 for none; None chooses.
        groups: column groups with a codebook each.
        outlier_percent: share of the columns, in percent, with the largest Hessian entries, that get a finer codebook.
        outlier_vector_length, outlier_centroids: that codebook.
        norm: store mean and standard deviation of every input column and quantize the normalised matrix, with the
            scale folded into the Hessian; None decides by its cost of 32 bits per column.
        permute: quantize columns by falling H_jj. Without groups and outliers the order costs nothing to store.
        codebook_dtype: of the centroids; ``auto`` takes int8 with one scale per codebook.
        iterations: most Lloyd steps of each k-means; refits of a sweep take a quarter of it.
        sample: vectors per centroid in k-means; of a larger matrix a random sample is fitted first, and the last steps
            take every vector. 0 always takes all.
        sweeps: further feedback passes, each with the codebooks refitted on the compensated weights of the one before;
            the best pass is kept.
        damping: relative damping of the Hessian's diagonal.
    """

    name: ClassVar[str] = "vptq"

    bits: float = 2.25
    vector_length: int | None = None
    centroids: int | None = None
    residual_centroids: int | None = None
    groups: int = 1
    outlier_percent: float = 0.0
    outlier_vector_length: int = 4
    outlier_centroids: int = 256
    norm: bool | None = None
    permute: bool = True
    codebook_dtype: CodebookDtype | Literal["auto"] = "auto"
    iterations: int = 20
    sample: int = 256
    sweeps: int = 1
    damping: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vector_length is not None and self.vector_length not in range(1, 17):
            raise UsageError(f"vptq: vector_length wanted 1..16, got {self.vector_length!r}")
        for option in ("centroids", "residual_centroids", "outlier_centroids"):
            size = getattr(self, option)
            allowed = size is None or (option == "residual_centroids" and size == 0)
            if not allowed and (type(size) is not int or size < 2 or size > 65536 or size & (size - 1)):
                raise UsageError(f"vptq: {option} wanted a power of two, 2..65536, got {size!r}")
        if type(self.groups) is not int or self.groups < 1:
            raise UsageError(f"vptq: groups wanted a whole number >= 1, got {self.groups!r}")
        if not 0 <= self.outlier_percent < 50:
            raise UsageError(f"vptq: outlier_percent wanted 0..50, got {self.outlier_percent}")
        check_damping(self)
        if self.codebook_dtype not in ("auto", "int8", "float16", "bfloat16", "float32"):
            raise UsageError(f"vptq: codebook_dtype wanted auto, int8, float16, .., got {self.codebook_dtype!r}")
        for option, least in (("iterations", 1), ("sample", 0), ("sweeps", 0)):
            value = getattr(self, option)
            if type(value) is not int or value < least:
                raise UsageError(f"vptq: {option} wanted a whole number >= {least}, got {value!r}")

    # ---------------------------------------------------------------- layout

    def layout(self, shape: tuple[int, int], bias: bool = False) -> Layout:
        return self.layouts([(shape, bias)])[0]

    def layouts(self, shapes: Sequence[tuple[tuple[int, int], bool]]) -> list[Layout]:
        candidates = {key: list(self._candidates(*key)) for key in set(shapes)}
        for (shape, _), options in candidates.items():
            if not options:
                raise UsageError(
                    f"vptq: no codebooks fit a matrix of {shape} within these options (bits {self.bits}, residual of "
                    f"{self.residual_centroids}). Leave more open, or give centroids and vector_length as well."
                )
        return allocate([candidates[key] for key in shapes], self.bits)

    def _candidates(self, shape: tuple[int, int], bias: bool) -> Iterator[Layout]:
        out, inp = shape
        outliers = self._outliers(inp)
        columns = inp - (outliers.columns if outliers else 0)
        groups = min(self.groups, columns)
        norm = self.norm if self.norm is not None else 32 / out <= _NORM_BUDGET * self.bits
        for v in (self.vector_length,) if self.vector_length else VECTOR_LENGTHS:
            rows = -(-out // v)
            tile = None if groups == 1 else (rows * v, -(-columns // groups))
            for stages in self._stages(rows * columns // groups, v):
                yield Layout(
                    shape=shape,
                    vector_length=v,
                    stages=stages,
                    direction="column",
                    codebook_dtype="int8" if self.codebook_dtype == "auto" else self.codebook_dtype,
                    side_dtype=self.side_dtype,
                    tile=tile,
                    channel_norm="input" if norm else "none",
                    permuted=self.permute and (groups > 1 or outliers is not None),
                    outliers=outliers,
                    bias=bias,
                )

    def _stages(self, vectors: int, v: int) -> Iterator[tuple[int, ...]]:
        if self.centroids is not None:
            main = self.centroids.bit_length() - 1
            if self.residual_centroids:
                yield main, self.residual_centroids.bit_length() - 1
            else:
                yield (main,)
            return
        if not self.residual_centroids:
            yield from stage_choices(vectors, v, self.bits + 1, 1, _MAX_AUTO_BITS)
        if self.residual_centroids != 0:
            wanted = self.residual_centroids and self.residual_centroids.bit_length() - 1
            for stages in stage_choices(vectors, v, self.bits + 1, 2, _MAX_AUTO_BITS):
                if wanted is None or stages[1] == wanted:
                    yield stages

    def _outliers(self, columns: int) -> Outliers | None:
        """As in the released code: the remainder of the division into groups goes to the outliers."""
        if self.outlier_percent == 0:
            return None
        count = math.ceil(self.outlier_percent / 100 * columns)
        count += (columns - count) % self.groups
        if count >= columns:
            return None
        return Outliers(count, self.outlier_vector_length, self.outlier_centroids.bit_length() - 1)

    # ---------------------------------------------------------------- quantization

    def _encode(self, problem: Problem) -> dict[str, Tensor]:
        weight, hessian, layout, name = problem.weight, problem.statistics, problem.layout, problem.name
        tensors: dict[str, Tensor] = {}
        if layout.channel_norm == "input":
            scale, offset = _column_norm(weight, layout, name)
            tensors |= {"channel_scale": scale, "channel_offset": offset}
            s = scale.float()
            weight = (weight - offset.float()) / s
            hessian = hessian * s.unsqueeze(0) * s.unsqueeze(1)
        order = torch.arange(weight.shape[1], device=weight.device)
        if self.permute:
            order = torch.argsort(torch.diagonal(hessian), descending=True, stable=True)
            weight, hessian = weight[:, order], hessian[order][:, order]
        factor = factorize(hessian, name, self.damping)
        dead = dead_columns(hessian)
        coder = _ColumnCoder(layout, weight.device, name)
        fit = _Fit(weight, factor, dead, problem.generator, self.iterations, self.sample)
        fit.codebooks(coder, weight)
        if len(layout.stages) > 1:
            quantized, compensated = error_feedback(weight, factor, coder.quantize)
            fit.residual(coder, compensated - quantized)
        best, least = None, math.inf
        for sweep in range(self.sweeps + 1):
            quantized, compensated = error_feedback(weight, factor, coder.quantize)
            # The proxy loss, up to damping: under feedback every column's error counts by itself.
            loss = float(((compensated - quantized).square().sum(dim=0) / factor.variance).sum())
            if best is None or loss < least:
                best, least = coder.snapshot(), loss
            if sweep < self.sweeps:
                fit.refit(coder, compensated)
        assert best is not None
        if layout.permuted:
            dtype = layout.tensors()["permutation"][0]
            tensors["permutation"] = order.to(dtype)
            back = torch.arange(order.numel(), device=order.device)
        else:
            back = torch.argsort(order)
        return tensors | best.tensors(back)


def _column_norm(weight: Tensor, layout: Layout, name: str) -> tuple[Tensor, Tensor]:
    """Standard deviation and mean [in] of every input column, as stored; a constant column has scale one."""
    dtype = layout.tensors()["channel_scale"][0]
    offset = to_stored(weight.mean(dim=0), dtype, f"{name}: column means")
    scale = to_stored((weight - offset.float()).square().mean(dim=0).sqrt(), dtype, f"{name}: column scales")
    return torch.where(scale > 0, scale, torch.ones_like(scale)), offset


def to_vectors(columns: Tensor, v: int) -> Tensor:
    """[out, n] columns to vectors [n * ceil(out / v), v], column by column, zero-padded at the bottom."""
    padded = functional.pad(columns.T, (0, -columns.shape[0] % v))
    return padded.reshape(-1, v)


@dataclass
class _ColumnCoder:
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

    def snapshot(self) -> _ColumnCoder:
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
        """Quantize one column [out, 1]; a :data:`octavo.math.feedback.BlockQuantizer`."""
        out = values.shape[0]
        column = values.reshape(1, out)
        if position < self.outliers:
            assert self.outlier_book is not None
            decoded, self.outlier_codes[position] = _encode(column, self.outlier_book)
        else:
            position -= self.outliers
            decoded = None
            for stage, book in enumerate(self.main[position // self.group_columns]):
                part, self.codes[stage][position] = _encode(column if decoded is None else column - decoded, book)
                decoded = part if decoded is None else decoded + part
            assert decoded is not None
        return decoded.reshape(out, 1)

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
class _Fit:
    """k-means fits of the codebooks: weights are 1/U_jj^2, the weight of a column's error under feedback."""

    weight: Tensor
    factor: Factor
    dead: Tensor
    generator: torch.Generator
    iterations: int
    sample: int

    def __post_init__(self) -> None:
        importance = 1 / self.factor.variance
        # Dead channels were given the mean diagonal to be factorised; they must not pull centroids.
        self.importance = torch.where(self.dead, importance * 1e-3, importance)

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

    def codebooks(self, coder: _ColumnCoder, values: Tensor) -> None:
        """Main codebooks of all groups, and the outliers' one."""
        layout = coder.layout
        if layout.outliers:
            o = layout.outliers
            vectors, weights = self._vectors(values, slice(0, o.columns), o.vector_length)
            coder.set_outlier_book(self._kmeans(vectors, weights, 1 << o.bits))
        for group in range(coder.groups):
            self._fit(coder, values, group, 0)

    def residual(self, coder: _ColumnCoder, error: Tensor) -> None:
        """Residual codebooks on what the first pass left."""
        for group in range(coder.groups):
            self._fit(coder, error, group, 1)

    def _fit(self, coder: _ColumnCoder, values: Tensor, group: int, stage: int) -> None:
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

    def refit(self, coder: _ColumnCoder, compensated: Tensor) -> None:
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
