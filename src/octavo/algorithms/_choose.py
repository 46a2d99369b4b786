"""From bits per weight to vector length and codebook sizes: a model of the distortion, and an exhaustive search."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from octavo.codebooks import get as get_codebook
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
#: How far, relatively, the predicted error of an allocation may be from the least one.
_TOLERANCE = 1e-4
#: More kinds of matrices (and layouts of them) than this are not tried in pairs: it would take too long.
_PAIRED = 32
#: Most partial allocations that the search keeps.
_STATES = 2000


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
    if layout.codebook:
        return get_codebook(layout.codebook).distortion
    rows, columns = layout.index_shape
    books = layout.books_shape[0] * layout.books_shape[1]
    vectors = max(rows * columns // books, 1)
    total = _RESIDUAL_PENALTY ** (len(layout.stages) - 1)
    for bits in layout.stages:
        share = 2**bits / vectors
        gain = share if layout.tile is None else _ADAPTATION * math.sqrt(share)
        total *= stage_distortion(layout.vector_length, bits) * max(1 - gain, 0.0)
    return total + (_INT8_NOISE if layout.codebook_dtype == "int8" else 0.0)


@dataclass(frozen=True)
class _Kind:
    """The matrices that share a list of candidates, and those of them that are worth their bits.

    Attributes:
        members: which matrices.
        layouts: by rising size; every one is larger and better than the one before.
        bits, errors: [layouts] int64 and float64, of one matrix.
        hull: indices of the layouts on the lower convex hull of errors over bits, first and last included.
    """

    members: list[int]
    layouts: list[Layout]
    bits: np.ndarray
    errors: np.ndarray
    hull: list[int]

    @classmethod
    def of(
        cls, options: Sequence[Layout], members: list[int], importance: float, size: Callable[[Layout], int]
    ) -> _Kind:
        bits = np.array([size(layout) for layout in options])
        errors = np.array([predicted_distortion(layout) * importance for layout in options])
        order = _worthwhile(bits, errors)
        bits, errors = bits[order], errors[order]
        hull: list[int] = []
        for i in range(len(order)):
            while len(hull) > 1:
                a, b = hull[-2:]
                if (errors[a] - errors[b]) * (bits[i] - bits[a]) > (errors[a] - errors[i]) * (bits[b] - bits[a]):
                    break
                hull.pop()
            hull.append(i)
        return cls(members, [options[i] for i in order], bits, errors, hull)


#: The plan of a kind: how many of its matrices take which of its layouts.
_Plan = list[Counter[int]]


def _worthwhile(bits: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Indices of the choices that no other one matches in both, by rising bits and falling errors."""
    order = np.lexsort((errors, bits))
    falling = errors[order]
    return order[np.r_[True, falling[1:] < np.minimum.accumulate(falling)[:-1]]]


class _Relaxation:
    """The problem with matrices that may mix two of their layouts: solved step by step, best gain per bit first.

    A step takes one matrix of a kind from a layout on its hull to the next one.
    """

    def __init__(self, kinds: Sequence[_Kind]) -> None:
        self.kinds = kinds
        steps = [(k, *pair) for k, kind in enumerate(kinds) for pair in itertools.pairwise(kind.hull)]
        bits = np.array([kinds[k].bits[after] - kinds[k].bits[before] for k, before, after in steps], dtype=np.int64)
        gains = np.array([kinds[k].errors[before] - kinds[k].errors[after] for k, before, after in steps])
        order = np.argsort(-gains / bits, kind="stable")
        self.steps = [steps[i] for i in order]
        self.bits, self.gains = bits[order], gains[order]
        self._kind = np.array([k for k, _, _ in self.steps], dtype=np.int64)
        self._least = np.array([(kind.bits[0], kind.errors[0]) for kind in kinds])

    def curve(self, counts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """(bits, errors) between which the least error of so many matrices of each kind is linear: a lower bound."""
        bits, errors = np.asarray(counts) @ self._least
        times = np.asarray(counts)[self._kind]
        steps = np.flatnonzero(times)
        taken = (self.bits[steps] * times[steps]).cumsum()
        gained = (self.gains[steps] * times[steps]).cumsum()
        return np.r_[bits, bits + taken], np.r_[errors, errors - gained]

    def plan(self, budget: int) -> _Plan:
        """The longest sequence of steps within the budget; one kind at most has matrices with different layouts."""
        plan = [Counter({0: len(kind.members)}) for kind in self.kinds]
        spare = max(budget - _size(self.kinds, plan), 0)
        for (k, before, after), bits in zip(self.steps, self.bits.tolist(), strict=True):
            taken = min(plan[k][before], spare // bits)
            spare -= taken * bits
            plan[k] = Counter({after: taken, before: plan[k][before] - taken}) + Counter()
            if before in plan[k]:
                break
        return plan


def _size(kinds: Sequence[_Kind], plan: _Plan) -> int:
    return sum(int(kind.bits[i]) * n for kind, counts in zip(kinds, plan, strict=True) for i, n in counts.items())


def _error(kinds: Sequence[_Kind], plan: _Plan) -> float:
    return sum(float(kind.errors[i]) * n for kind, counts in zip(kinds, plan, strict=True) for i, n in counts.items())


def allocate(
    candidates: Sequence[Sequence[Layout]],
    budget: int,
    importance: Sequence[float],
    size: Callable[[Layout], int] = Layout.bits,
) -> list[Layout]:
    """One layout per matrix, so that the sum of predicted distortion times importance is least within a budget.

    The budget is in bits, everything counted by ``size`` (bits of a layout in the files; its own unless a format stores
    more). It is spent by the best gain per bit; what that leaves over goes to the best exchange of one or two layouts,
    again and again; a search follows unless the result is then known to be within a ten-thousandth of the least error.
    If even the smallest candidates exceed the budget (tiny matrices), those are returned; the plan shows it.

    Equal matrices, those that share their list of candidates and their importance, get equal layouts but for what fills
    the budget: one kind is split between two layouts, and a few matrices take others. Of the layouts of a kind the
    larger ones go to its first matrices, each in one run.

    Neither a larger budget nor more candidates predict a larger error, up to a ten-thousandth of it.
    """
    groups: dict[tuple[int, float], list[int]] = {}
    for index, (options, cost) in enumerate(zip(candidates, importance, strict=True)):
        groups.setdefault((id(options), cost), []).append(index)
    kinds = [_Kind.of(candidates[members[0]], members, cost, size) for (_, cost), members in groups.items()]
    if not kinds:
        return []
    relaxation = _Relaxation(kinds)
    plan = relaxation.plan(budget)
    if _size(kinds, plan) <= budget:
        bound = float(np.interp(budget, *relaxation.curve([len(kind.members) for kind in kinds])))
        # The result r is at most (1 + tolerance) times the least error E: it is that close to a lower bound of E, or
        # the search finds E, or nothing that is so much better than r. A larger budget and more candidates can only
        # lower E, so r' <= (1 + tolerance) E' <= (1 + tolerance) E <= (1 + tolerance) r. Only a search that outgrows
        # _STATES proves less: the plan is above the lower bound by less than the gain of one step of one matrix.
        _exchange(kinds, plan, budget, bound * (1 + _TOLERANCE))
        if (error := _error(kinds, plan)) > bound * (1 + _TOLERANCE):
            plan = _search(relaxation, budget, error / (1 + _TOLERANCE)) or plan
    chosen: dict[int, Layout] = {}
    for kind, counts in zip(kinds, plan, strict=True):
        choices = [i for i in sorted(counts, reverse=True) for _ in range(counts[i])]
        chosen |= {member: kind.layouts[i] for member, i in zip(kind.members, choices, strict=True)}
    return [chosen[index] for index in range(len(candidates))]


def _exchange(kinds: Sequence[_Kind], plan: _Plan, budget: int, enough: float) -> None:
    """Exchange the layouts of one or two matrices at once, until the error is ``enough`` or nothing is gained.

    The exchange that gains most comes first; the second matrix may pay for the first. One exchange at least is tried,
    which for a single matrix finds the best layout.
    """
    spare = budget - _size(kinds, plan)
    while True:
        slots = [(k, i) for k, counts in enumerate(plan) for i in sorted(counts)]
        most, best = 0.0, ()
        for position, (k, i) in enumerate(slots):
            one = kinds[k]
            new = int(np.searchsorted(one.bits, one.bits[i] + spare, "right")) - 1
            if (gain := float(one.errors[i] - one.errors[new])) > most:
                most, best = gain, ((k, i, new),)
            room = spare + one.bits[i] - one.bits
            # Two equal matrices may both change; a single one cannot change twice.
            partners = slots[position + (plan[k][i] == 1) :] if len(slots) <= _PAIRED else ()
            for q, j in partners:
                other = kinds[q]
                fitting = np.searchsorted(other.bits, other.bits[j] + room, "right") - 1
                gains = one.errors[i] - one.errors + other.errors[j] - other.errors[fitting]
                gains[fitting < 0] = 0.0
                new = int(gains.argmax())
                if gains[new] > most:
                    most, best = float(gains[new]), ((k, i, new), (q, j, int(fitting[new])))
        # Less than this is rounding, and might come back for ever.
        if most <= 1e-12 * enough:
            return
        for k, i, new in best:
            spare -= int(kinds[k].bits[new] - kinds[k].bits[i])
            plan[k][i] -= 1
            plan[k][new] += 1
            plan[k] += Counter()  # Drops what none takes any more.
        if _error(kinds, plan) <= enough:
            return


def _search(relaxation: _Relaxation, budget: int, limit: float) -> _Plan | None:
    """The best plan if its error is below ``limit``, else None: matrix by matrix, the largest first.

    Of the choices for the matrices so far, only those are kept that no other one matches in bits and error and that
    could stay below the limit if the matrices to come could mix layouts.
    """
    kinds = relaxation.kinds
    left = [len(kind.members) for kind in kinds]
    order = [k for k in sorted(range(len(kinds)), key=lambda k: -int(kinds[k].bits[-1])) for _ in range(left[k])]

    def bounds(bits: np.ndarray, errors: np.ndarray, others: Sequence[int]) -> np.ndarray:
        curve = relaxation.curve(others)
        return np.where(bits + curve[0][0] <= budget, errors + np.interp(budget - bits, *curve), math.inf)

    # A layout that is out of the question in one matrix alone is in all of its kind.
    useful = []
    for k, kind in enumerate(kinds):
        others = [n - (q == k) for q, n in enumerate(left)]
        useful.append(np.flatnonzero(bounds(kind.bits, kind.errors, others) < limit))
    bits, errors = np.zeros(1, dtype=np.int64), np.zeros(1)
    trail = []
    for k in order:
        left[k] -= 1
        bits = (bits[:, None] + kinds[k].bits[useful[k]]).ravel()
        errors = (errors[:, None] + kinds[k].errors[useful[k]]).ravel()
        bound = bounds(bits, errors, left)
        kept = np.flatnonzero(bound < limit)
        if not len(kept):
            return None
        kept = kept[_worthwhile(bits[kept], errors[kept])]
        if len(kept) > _STATES:
            kept = kept[np.sort(np.argsort(bound[kept], kind="stable")[:_STATES])]
        trail.append((k, *np.divmod(kept, len(useful[k]))))
        bits, errors = bits[kept], errors[kept]
    plan = [Counter[int]() for _ in kinds]
    state = int(errors.argmin())
    for k, before, choice in reversed(trail):
        plan[k][int(useful[k][choice[state]])] += 1
        state = int(before[state])
    return plan


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
