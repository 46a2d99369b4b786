"""From bits per weight to vector length and codebook sizes: a model of the distortion, and an exhaustive search."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from octavo.layout import Layout

#: Gap in dB between the best high-rate vector quantizer of dimension v on a Gaussian source and the rate-distortion
#: bound (Zador's formula with the best known lattice second moments).
_ASYMPTOTIC_GAP_DB = {1: 4.35, 2: 3.04, 3: 2.49, 4: 2.11, 5: 1.88, 6: 1.69, 8: 1.38, 10: 1.2, 12: 1.0, 16: 0.78}
VECTOR_LENGTHS = tuple(_ASYMPTOTIC_GAP_DB)
#: Greedy two-stage assignment, measured against what independent stages would give.
_RESIDUAL_PENALTY = 1.15
_ADAPTATION = 1.2
#: A centroid entry rounded to one of 255 levels over about +-4.5 standard deviations, as noise power.
_INT8_NOISE = (4.5 / 127) ** 2 / 12


def stage_distortion(vector_length: int, bits: int) -> float:
    """Mean squared error of k-means with 2^bits centroids on unit Gaussian vectors of this length.

    At finite rate the gap to the bound is smaller than Zador's; the factor 1 - 0.6^(R v^0.6) fits simulated codebooks
    (v = 1, 2, 4, 6 at 1 to 4 bits) to about 0.2 dB.
    """
    rate = bits / vector_length
    gap = _ASYMPTOTIC_GAP_DB.get(vector_length, 2.0) * (1 - 0.6 ** (rate * vector_length**0.6))
    return 2 ** (-2 * rate) * 10 ** (gap / 10)


def predicted_distortion(layout: Layout) -> float:
    """Predicted mean squared error, relative to the weights' variance, of codebooks fitted to the matrix itself.

    With n vectors for k centroids the fit also memorises: its error on its own vectors is about (1 - k/n) of that on
    fresh ones. Codebooks of tiles adapt to where they are, too: on real matrices their error falls like
    1 - 1.2 sqrt(k/n) (d = 1, 2, 4; tiles of 64 to 2^15 vectors; measured by benchmarks/quality/parts.py).
    """
    rows, columns = layout.index_shape
    books = layout.books_shape[0] * layout.books_shape[1]
    vectors = max(rows * columns // books, 1)
    total = _RESIDUAL_PENALTY ** (len(layout.stages) - 1)
    for bits in layout.stages:
        share = 2**bits / vectors
        gain = share if layout.tile is None else _ADAPTATION * math.sqrt(share)
        total *= stage_distortion(layout.vector_length, bits) * max(1 - gain, 0.0)
    return total + (_INT8_NOISE if layout.codebook_dtype == "int8" else 0.0)


def allocate(candidates: Sequence[Sequence[Layout]], bits: float, size_power: float = 1.0) -> list[Layout]:
    """One layout per matrix, so that the predicted squared error of all weights together is least within a budget.

    A matrix counts with its number of weights to the power ``size_power``: 1 minimises the error of all weights, less
    favours small matrices, which cost few bits and hurt as much when they are wrong.

    The budget is ``bits`` times the number of weights, everything counted. Lagrangian relaxation: each matrix takes the
    candidate with the least error + price * bits; the price is the lowest that keeps the budget, and what it leaves
    over is spent on matrices in order, on the choice they make at the next lower price. If even the smallest candidates
    exceed the budget (tiny matrices), those are returned; the plan shows it.
    """
    # Matrices of one shape share their list of candidates; each list is rated once.
    kinds = {
        id(options): [(predicted_distortion(x) * x.weights**size_power, x.bits(), x) for x in options]
        for options in candidates
    }
    tables = [kinds[id(options)] for options in candidates]
    budget = bits * sum(options[0].weights for options in candidates)

    def choose(price: float) -> list[Layout]:
        best = {kind: min(t, key=lambda row: (row[0] + price * row[1], row[1]))[2] for kind, t in kinds.items()}
        return [best[id(options)] for options in candidates]

    def size(layouts: Sequence[Layout]) -> int:
        return sum(layout.bits() for layout in layouts)

    low, high = 1e-12, 1e3
    richer, chosen = choose(low), choose(high)
    if size(richer) <= budget or size(chosen) > budget:
        return richer if size(richer) <= budget else chosen
    while high / low > 1 + 1e-6:
        middle = math.sqrt(low * high)
        layouts = choose(middle)
        if size(layouts) <= budget:
            high, chosen = middle, layouts
        else:
            low, richer = middle, layouts
    spare = budget - size(chosen)
    for index, upgrade in enumerate(richer):
        extra = upgrade.bits() - chosen[index].bits()
        if 0 < extra <= spare:
            spare -= extra
            chosen[index] = upgrade
    # A price only ever selects layouts on the convex hull; what is left may buy one between.
    for index, table in enumerate(tables):
        limit = chosen[index].bits() + spare
        better = min((row for row in table if row[1] <= limit), key=lambda row: (row[0], row[1]))[2]
        spare = limit - better.bits()
        chosen[index] = better
    return chosen


def stage_choices(
    vectors: int, vector_length: int, bits: float, stages: int, max_bits: int
) -> Iterator[tuple[int, ...]]:
    """Index widths worth trying at a vector length: single codebooks, and pairs of equal or falling size.

    Codebooks of more than half as many centroids as there are vectors are left out: they would store the matrix.
    """
    top = min(max_bits, math.floor(bits * vector_length), max(math.floor(math.log2(max(vectors, 2))) - 1, 1))
    for main in range(1, top + 1):
        if stages == 1:
            yield (main,)
        else:
            for residual in range(1, min(main, math.floor(bits * vector_length) - main) + 1):
                yield (main, residual)
