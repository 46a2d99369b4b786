"""What the dimension of the vectors brings: Gaussian vectors, a model's matrices, the model itself, at equal bits.

GPTVQ (arXiv 2402.15319) calls it the blessing of dimensionality. At R bits per weight, vectors of d weights share a
codebook of 2^(R d) centroids. A memoryless Gaussian source cannot be stored with a relative error below 2^(-2R), an
SQNR (energy over squared error) of 6.02 R dB: the limit that all gaps here are measured to.

Each part gives a row per R and d: :func:`gaussian` k-means on Gaussian vectors; :func:`layers` on matrices, plain and
as a method stores them at R + overhead true bits; :func:`model` the divergence of the model quantized at those bits.
:mod:`octavo.report.study` makes a resumable job of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo import algorithms
from octavo._core.errors import NumericalError, UsageError
from octavo._core.seeds import generator
from octavo.math.assign import nearest
from octavo.math.kmeans import KMeansResult, kmeans
from octavo.models.adapter import CausalModel
from octavo.pipeline.events import Progress
from octavo.report.measure import Made, Row, Texts, measure, quantize

PARTS = ("gaussian", "layers", "model")
#: SQNR that one bit is worth.
DB_PER_BIT = 20 * math.log10(2)

#: Vectors per centroid and, for small codebooks, vectors in all: enough for 0.01 dB.
_PER_CENTROID, _VECTORS = 48, 1 << 20
#: Lloyd steps, and distances computed in them, which keep the largest codebooks to a few minutes on two cores.
_STEPS, _LEAST_STEPS, _DISTANCES = 100, 8, 2e11


@dataclass(frozen=True, kw_only=True)
class Options(Texts):
    """What to measure, and how.

    Attributes:
        dimensions, bits: d and R of the rows. parts: some of :data:`PARTS`.
        overhead: bits per weight on top of R for codebooks and scales where all bits are counted.
        blocks: indices of the blocks whose matrices are measured, or how many, spread evenly.
        method: any that has a ``vector_length``.
        max_centroids: k-means rows of larger codebooks are not measured; their ``reason`` says so.
        others: as for :class:`~octavo.report.measure.Texts`.

    Raises:
        UsageError: values that no row could be made with.
    """

    dimensions: tuple[int, ...] = (1, 2, 4, 8)
    bits: tuple[float, ...] = (2, 3, 4)
    parts: tuple[str, ...] = PARTS
    overhead: float = 0.25
    blocks: int | tuple[int, ...] = 3
    method: str = "gptvq"
    max_centroids: int = 1 << 16

    def __post_init__(self) -> None:
        if not self.parts or not set(self.parts) <= set(PARTS):
            raise UsageError(f"study: some of {', '.join(PARTS)} wanted, got {', '.join(self.parts) or 'nothing'}")
        if not self.dimensions or not all(type(d) is int and 1 <= d <= 16 for d in self.dimensions):
            raise UsageError(f"study: dimensions wanted whole numbers 1..16, got {list(self.dimensions)}")
        if not self.bits or not all(0 < rate <= 8 for rate in self.bits):
            raise UsageError(f"study: bits wanted numbers above 0, at most 8, got {list(self.bits)}")
        if not 0 <= self.overhead <= 4 or not 2 <= self.max_centroids <= 1 << 16:
            got = f"{self.overhead} and {self.max_centroids}"
            raise UsageError(f"study: overhead wanted 0..4 bits and max_centroids 2..65536, got {got}")
        if self.parts != ("gaussian",):
            build = algorithms.get(self.method)
            if "vector_length" not in _option_names(self.method):
                raise UsageError(f"study: method {self.method} has no vector_length that could be studied")
            # What suits no matrix is refused now; what does not fit one matrix will be a row's reason.
            for d in self.dimensions:
                build(vector_length=d)
            for rate in self.bits:
                build(bits=rate + self.overhead)


# ------------------------------------------------------------------------------------------------ Gaussian vectors


def gaussian(d: int, rate: float, options: Options) -> Row:
    """k-means on unit Gaussian vectors, against the rate-distortion limit and the best scalar quantizer.

    The error on the vectors of the fit is too low, that on fresh vectors too high by about as much; ``sqnr_db`` is that
    of their mean.
    """
    try:
        k = 1 << _index_bits(d, rate, options)
    except UsageError as error:
        return {"sqnr_db": None, "gap_db": None, "reason": str(error)}
    count = max(_PER_CENTROID * k, _VECTORS)
    steps = max(min(_STEPS, int(_DISTANCES / (count * k))), _LEAST_STEPS)
    random = generator(options.seed, f"gaussian {d} {rate:g}")
    seen, fresh = (torch.randn(n, d, generator=random) for n in (count, min(count, _VECTORS)))
    fit = _fit(seen, k, random, iterations=steps, tolerance=1e-5)
    train = _relative_error(seen, fit.centroids[fit.indices])
    test = _relative_error(fresh, fit.centroids[nearest(fresh, fit.centroids)])
    sqnr = _db((train + test) / 2)
    return {
        "centroids": k,
        "vectors": count,
        "fresh_vectors": fresh.shape[0],
        "steps": fit.steps,
        "sqnr_train_db": _db(train),
        "sqnr_fresh_db": _db(test),
        "sqnr_db": sqnr,
        "gap_db": rate * DB_PER_BIT - sqnr,
        "lloyd_max_db": lloyd_max_db(int(rate)) if rate == int(rate) else None,
        "effective_bits": sqnr / DB_PER_BIT,
        "reason": None,
    }


@cache
def lloyd_max_db(bits: int) -> float:
    """SQNR in dB of the best scalar quantizer with 2^bits levels on a Gaussian source."""
    centroids = mass = _many_levels(1 << bits)
    infinity = torch.tensor([math.inf], dtype=torch.float64)
    for _ in range(20_000):
        edges = torch.cat([-infinity, (centroids[1:] + centroids[:-1]) / 2, infinity])
        mass = torch.special.ndtr(edges).diff()
        density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
        previous, centroids = centroids, -density.diff() / mass
        if float((centroids - previous).abs().max()) < 1e-10:
            break
    return _db(1 - float((mass * centroids.square()).sum()))


def _many_levels(count: int) -> Tensor:
    """The best levels of a scalar quantizer for a unit Gaussian if there are many: [count] float64."""
    return math.sqrt(3) * torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)


def _fit(points: Tensor, k: int, random: torch.Generator, **options: Any) -> KMeansResult:
    """k-means on vectors [n, d] of about unit variance."""
    # On a line Lloyd's steps hardly move mass from one end to the other: the start decides.
    start = _many_levels(k).float().unsqueeze(1) if points.shape[1] == 1 else None
    return kmeans(points, torch.ones(points.shape[0]), k, generator=random, start=start, **options)


# ------------------------------------------------------------------------------------------------ matrices of a model


def layers(d: int, rate: float, options: Options, causal: CausalModel) -> Row:
    """SQNR of a model's matrices without any calibration: plain k-means, and a method at equal true bits.

    ``plain_*``: one codebook per matrix, fitted to d consecutive inputs of a row at R index bits; ``plain_bits`` adds
    the codebook in float16. ``equal_*``: the layouts that the method chooses for the matrices at R + overhead bits with
    vectors of d, quantized without a Hessian; ``equal_bits`` counts everything. A row's SQNR is that of the mean
    relative error, weighted by the matrices' sizes, and None if a matrix has none; ``reason`` tells why. ``matrices``
    has every matrix by itself.
    """
    blocks = choose_blocks(options.blocks, len(causal.blocks))
    shapes = {name: target.shape for block in blocks for name, target in causal.targets(block).items()}
    # Without a Hessian there is nothing to update the codebooks for.
    update = {"update": "none"} if "update" in _option_names(options.method) else {}
    algorithm = algorithms.get(options.method)(bits=rate + options.overhead, vector_length=d, **update)
    refused, layouts = None, {}
    try:
        layouts = dict(zip(shapes, algorithm.layouts([(shape, False) for shape in shapes.values()]), strict=True))
    except UsageError as error:
        refused = error

    def plain(weight: Tensor, name: str) -> Row:
        return _plain(weight, d, rate, options, generator(options.seed, f"{name} {d} {rate:g}"))

    def equal(weight: Tensor, name: str) -> Row:
        if refused is not None:
            raise refused
        random = generator(options.seed, name)
        stored = algorithm.quantize(weight, layout=layouts[name], generator=random, name=name)
        error = _relative_error(weight, stored.dequantize())
        return {"equal_bits": stored.bits_per_weight, "equal_error": error, "layout": stored.layout.to_dict()}

    matrices = []
    for name, shape in shapes.items():
        weight = causal.weight(name)
        row: Row = {"module": name, "shape": list(shape), "weights": weight.numel()}
        for kind, quantizer in (("plain", plain), ("equal", equal)):
            try:
                row |= quantizer(weight, name) | {f"{kind}_reason": None}
            except (UsageError, NumericalError) as error:
                row |= {f"{kind}_bits": None, f"{kind}_error": None, f"{kind}_reason": str(error)}
        matrices.append(row)
    causal.reader.close()
    found: Row = {"target_bits": rate + options.overhead}
    for kind in ("plain", "equal"):
        error, true_bits = _mean(matrices, f"{kind}_error"), _mean(matrices, f"{kind}_bits")
        sqnr = None if error is None else _db(error)
        spent = rate if kind == "plain" else true_bits
        gap = None if sqnr is None or spent is None else spent * DB_PER_BIT - sqnr
        found |= {f"{kind}_bits": true_bits, f"{kind}_sqnr_db": sqnr, f"{kind}_gap_db": gap}
    return found | {"reason": _reasons(matrices), "matrices": matrices}


def choose_blocks(wanted: int | Sequence[int], count: int, option: str = "layers") -> list[int]:
    """Indices of blocks: the given ones, or ``wanted`` of ``count``: the first, the last, and evenly between.

    A model with fewer blocks gives all it has. Errors name the ``option``.

    Raises:
        UsageError: no block, or one that is not there.
    """
    if isinstance(wanted, int):
        if wanted < 1:
            raise UsageError(f"{option} wanted at least 1 block, got {wanted}")
        wanted = min(wanted, count)
        spread = max(wanted - 1, 1)
        return [(2 * i * (count - 1) + spread) // (2 * spread) for i in range(wanted)]
    if not wanted or not all(0 <= i < count for i in wanted):
        raise UsageError(f"{option} wanted block indices 0..{count - 1} of this model, got {list(wanted)}")
    return sorted(set(wanted))


def _plain(weight: Tensor, d: int, rate: float, options: Options, random: torch.Generator) -> Row:
    """One codebook for the whole matrix: no scales, no importance, no feedback."""
    if weight.shape[1] % d:
        raise UsageError(f"the number of inputs is no multiple of {d}")
    index_bits = _index_bits(d, rate, options)
    if weight.numel() // d < 2 << index_bits:
        raise UsageError(f"fewer than two vectors for each of 2^{index_bits} centroids, which would store the matrix")
    points = weight.reshape(-1, d) / weight.square().mean().sqrt().clamp(min=1e-30)
    fit = _fit(points, 1 << index_bits, random, sample=max(256, (1 << 18) >> index_bits))
    true_bits = rate + 16 * (d << index_bits) / weight.numel()
    return {"plain_bits": true_bits, "plain_error": _relative_error(points, fit.centroids[fit.indices])}


def _mean(matrices: Sequence[Row], key: str) -> float | None:
    """Mean over all weights, None if a matrix has no value."""
    if any(row[key] is None for row in matrices):
        return None
    return sum(row[key] * row["weights"] for row in matrices) / sum(row["weights"] for row in matrices)


def _reasons(matrices: Sequence[Row]) -> str | None:
    """Why numbers are missing: each reason once, with the number of matrices."""
    found = [f"{kind}: {row[f'{kind}_reason']}" for kind in ("plain", "equal") for row in matrices]
    counts = {text: found.count(text) for text in found if not text.endswith(": None")}
    return "; ".join(f"{text} ({count} of {len(matrices)} matrices)" for text, count in counts.items()) or None


# ------------------------------------------------------------------------------------------------ the whole model


def model(
    d: int,
    rate: float,
    options: Options,
    source: str | Path,
    out: Path,
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
) -> Row:
    """KL divergence, perplexity and top-1 agreement of the model quantized at R + overhead true bits.

    The model is written to ``out`` and left there; one that is there already, or unfinished, is taken up.
    ``bits_per_weight`` is what it really takes, which is more where no layout keeps the limit; a refusal or failure is
    the row's ``reason``.

    Raises:
        Interrupted: ``stop`` said so; a model that was begun continues at the next call.
        ResourceError: disk or memory is short.
    """
    bits = rate + options.overhead

    def make() -> Made:
        report, notes = quantize(
            source,
            out,
            options,
            method=options.method,
            bits=bits,
            options={"vector_length": d},
            progress=progress,
            stop=stop,
        )
        return {"quantize_seconds": report.seconds, "peak_bytes": report.peak_bytes} if report else {}, notes

    return measure(make, out, source, options, bits)


# ------------------------------------------------------------------------------------------------ shared


def _option_names(method: str) -> set[str]:
    return {field.name for field in fields(algorithms.registry.get(method))}


def _index_bits(d: int, rate: float, options: Options) -> int:
    """R d, the bits of an index.

    Raises:
        UsageError: there is no codebook of 2^(R d) centroids.
    """
    if abs(rate * d - round(rate * d)) > 1e-9:
        raise UsageError(f"{rate:g} x {d} is no whole number of index bits")
    if 2.0 ** (rate * d) > options.max_centroids:
        raise UsageError(f"2^{rate * d:g} centroids are more than {options.max_centroids}")
    return round(rate * d)


def _relative_error(values: Tensor, decoded: Tensor) -> float:
    """Squared error over energy; 0 for zeros that stay zeros."""
    error, energy = (float(x.double().square().sum()) for x in (values - decoded, values))
    return error / energy if energy > 0 else error


def _db(error: float) -> float:
    return -10 * math.log10(max(error, 1e-30))
