"""VPTQ (Liu et al., arXiv 2409.17066): column vectors, channel-independent updates, residual and outlier codebooks."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from octavo._core.errors import UsageError
from octavo.algorithms._base import MAX_BITS, MIN_BITS, Algorithm, Problem, check_damping, registry
from octavo.algorithms._books import output_loss
from octavo.algorithms._choose import VECTOR_LENGTHS, stage_choices
from octavo.algorithms._columns import ColumnCoder, ColumnFit
from octavo.layout import CodebookDtype, Layout, Outliers
from octavo.math.feedback import error_feedback
from octavo.math.hessian import Factor, dead_columns, factorize
from octavo.stored import to_stored

#: Largest codebook that is chosen without being asked for: k-means time per weight grows with 2^bits.
_MAX_AUTO_BITS = 12
#: Share of the bits that the column norm may cost when it is not asked for; its gain is about one percent of the error.
_NORM_BUDGET = 0.01
#: Names of public checkpoints: vector length, centroids, residual centroids (0 or none: no residual).
_COMMUNITY = re.compile(r"v(\d+)-k(\d+)(?:-(\d+))?(?:-woft)?", re.IGNORECASE)


def _published(
    bits: float, v: int, k: int, residual: int = 0, outliers: tuple[float, int] = (0, 0), groups: int = 1
) -> dict[str, Any]:
    """A row of the paper's Table 8; outliers are (percent of the columns, centroids) and take vectors of 4."""
    percent, size = outliers
    fine = {"outlier_percent": percent, "outlier_vector_length": 4, "outlier_centroids": size} if percent else {}
    return {"bits": bits, "vector_length": v, "centroids": k, "residual_centroids": residual, "groups": groups} | fine


#: The settings of the paper, by model and bits, as the authors count them (without permutation and norm).
_PRESETS = {
    "llama2-7b-2.02": _published(2.02, 6, 4096),
    "llama2-7b-2.26": _published(2.26, 12, 4096, 4096, (1, 8192), 4),
    "llama2-13b-2.02": _published(2.02, 6, 4096),
    "llama2-13b-2.18": _published(2.18, 12, 4096, 4096, (2, 8192), 4),
    "llama2-70b-2.07": _published(2.07, 12, 4096, 4096, (1, 4096), 4),
    "llama2-70b-2.11": _published(2.11, 12, 4096, 4096, (1, 8192), 8),
    "llama3-8b-2.08": _published(2.08, 12, 4096, 4096, (1, 4096)),
    "llama3-8b-2.24": _published(2.24, 6, 4096, 0, (1, 8192), 16),
    "llama3-70b-2.02": _published(2.02, 12, 4096, 4096),
    "llama3-70b-2.07": _published(2.07, 6, 4096, 0, (1, 4096), 16),
}


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
        update_columns: columns that are quantized from the same values before their errors are fed back to the rest.
            1 is the paper's channel-independent update; the vector length is what methods with vectors along a row must
            do; 0 feeds nothing back.
        codebook_dtype: of the centroids; ``auto`` takes int8 with one scale per codebook.
        iterations: most Lloyd steps of each k-means; refits of a sweep take a quarter of it.
        sample: vectors per centroid in k-means; of a larger matrix a random sample is fitted first, and the last steps
            take every vector. 0 always takes all.
        sweeps: further feedback passes, each with the codebooks refitted on the compensated weights of the one before;
            the best pass is kept.
        damping: relative damping of the Hessian's diagonal.
    """

    name: ClassVar[str] = "vptq"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType(_PRESETS)
    preset_pattern: ClassVar[str] = "names of public VPTQ checkpoints such as v8-k65536-256"

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
    update_columns: int = 1
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
        for option, least in (("iterations", 1), ("sample", 0), ("sweeps", 0), ("update_columns", 0)):
            value = getattr(self, option)
            if type(value) is not int or value < least:
                raise UsageError(f"vptq: {option} wanted a whole number >= {least}, got {value!r}")

    # ---------------------------------------------------------------- layout

    @classmethod
    def named(cls, name: str) -> Mapping[str, Any] | None:
        options = super().named(name)
        found = _COMMUNITY.fullmatch(name)
        if options is None and found:
            v, k, residual = (int(part or 0) for part in found.groups())
            index_bits = sum(max(size.bit_length() - 1, 0) for size in (k, residual)) / max(v, 1)
            bits = min(max(index_bits, MIN_BITS), MAX_BITS)
            options = {"bits": bits, "vector_length": v, "centroids": k, "residual_centroids": residual}
        # As the published code stores them.
        return options and {**options, "norm": True, "codebook_dtype": "float16"}

    def candidates(self, shape: tuple[int, int], bias: bool) -> Iterator[Layout]:
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
        coder = ColumnCoder(layout, weight.device, name)
        # A column's error counts with 1/U_jj^2 where later columns make up for it, else with H_jj.
        diagonal = torch.diagonal(hessian)
        importance = 1 / factor.variance if self.update_columns else diagonal + self.damping * diagonal.mean()
        fit = ColumnFit(importance, dead, problem.generator, self.iterations, self.sample)
        fit.codebooks(coder, weight)
        if len(layout.stages) > 1:
            quantized, compensated = self._sweep(weight, factor, coder)
            fit.residual(coder, compensated - quantized)
        best, least = None, math.inf
        for sweep in range(self.sweeps + 1):
            quantized, compensated = self._sweep(weight, factor, coder)
            if self.update_columns == 1:
                # The proxy loss, up to damping: under feedback every column's error counts by itself.
                loss = float(((compensated - quantized).square().sum(dim=0) / factor.variance).sum())
            else:
                loss = output_loss(weight, quantized, hessian)
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

    def _sweep(self, weight: Tensor, factor: Factor, coder: ColumnCoder) -> tuple[Tensor, Tensor]:
        """(quantized, compensated) of one pass over all columns, as :func:`error_feedback` gives them."""
        if self.update_columns:
            return error_feedback(weight, factor, coder.quantize, self.update_columns)
        return coder.quantize(weight, 0, weight), weight


def _column_norm(weight: Tensor, layout: Layout, name: str) -> tuple[Tensor, Tensor]:
    """Standard deviation and mean [in] of every input column, as stored; a constant column has scale one."""
    dtype = layout.tensors()["channel_scale"][0]
    offset = to_stored(weight.mean(dim=0), dtype, f"{name}: column means")
    scale = to_stored((weight - offset.float()).square().mean(dim=0).sqrt(), dtype, f"{name}: column scales")
    return torch.where(scale > 0, scale, torch.ones_like(scale)), offset
