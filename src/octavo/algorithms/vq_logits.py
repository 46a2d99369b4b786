"""VQ-Logits (arXiv 2505.10202): a head of K codewords of the model's width, and a map from tokens to codewords.

Logits are worked out for the K codewords and every token gets that of its own: h C^T, gathered by M. Tokens of one
codeword cannot be told apart. Where the paper trains from scratch, this fits a trained model: the map comes from the
rows of its head, the codewords then minimise the divergence from its distributions on calibration text. That is a
convex problem whose exact gradient needs one pass through the original head, whatever K (:mod:`octavo.math.logits`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from octavo._core.errors import UsageError
from octavo.math.hessian import exact_float32
from octavo.math.kmeans import kmeans
from octavo.math.logits import LogitStatistics, tied_loss

Start = Literal["kmeans", "frequency", "random"]

MAX_CODES = 1 << 16
#: Directions of the head's rows, those that logits vary most along, in which k-means measures distances.
_DIRECTIONS = 96
#: Adam: step relative to the root mean square of the codewords, decay rates, and the floor of the denominator.
_STEP, _DECAY, _TINY = 0.03, (0.8, 0.95), 1e-12


@dataclass(frozen=True, kw_only=True)
class VQLogits:
    """Options of the fit.

    Attributes:
        codes: K, at most 65,536.
        start: the map: ``kmeans`` of the head's rows in the metric of their logits, bins of falling ``frequency`` with
            equal shares of the probability (frequent tokens have one of their own), or ``random``.
        steps: full-batch gradient steps for the codewords; 0 leaves the means of the rows.
        maps: how often the map is chosen again by what the codewords have become, with all steps before each.
    """

    codes: int = 2048
    start: Start = "kmeans"
    steps: int = 30
    maps: int = 0

    def __post_init__(self) -> None:
        if self.start not in get_args(Start):
            raise UsageError(f"vq-logits: start wanted {', '.join(get_args(Start))}; got {self.start!r}")
        for name, least, most in (("codes", 2, MAX_CODES), ("steps", 0, 10_000), ("maps", 0, 100)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise UsageError(f"vq-logits: {name} wanted a whole number {least}..{most}, got {value!r}")


@dataclass(frozen=True)
class Calibration:
    """What a head read on calibration text, and what its model made of it.

    Attributes:
        states: [n, width], float32 or bfloat16.
        statistics: of these states, with ``pull``.
    """

    states: Tensor
    statistics: LogitStatistics


@dataclass(frozen=True)
class Fitted:
    """Codewords [k, width] float32, the codeword of each token [tokens] int64, and the mean KL in nats on held-out
    states before and after the steps (of the map that was taken)."""

    codes: Tensor
    map: Tensor
    kl_before: float
    kl_after: float


def fit(
    head: Tensor, train: Calibration, held_out: Calibration, options: VQLogits, generator: torch.Generator
) -> Fitted:
    """Fit a head [tokens, width].

    Args:
        train: gives codewords and map.
        held_out: decides which step is taken.

    Raises:
        UsageError: as many codewords as tokens, or more.
    """
    tokens = head.shape[0]
    if options.codes >= tokens:
        raise UsageError(f"vq-logits: codes wanted fewer than the {tokens:,} tokens, got {options.codes:,}")
    assignment = _start(head, train, options, generator)
    best: Fitted | None = None
    for again in range(options.maps + 1):
        if again and best is not None:
            assignment = reassigned(best.codes, best.map, train)
        codes = _means(head, assignment, options.codes)
        if best is not None:
            # Where classes changed little, so should their codewords.
            codes = torch.where(torch.bincount(assignment, minlength=options.codes).unsqueeze(1) > 0, best.codes, codes)
        found = descend(codes, assignment, train, held_out, options.steps)
        if best is None or found.kl_after < best.kl_after:
            best = found
    assert best is not None
    return best


def _start(head: Tensor, train: Calibration, options: VQLogits, generator: torch.Generator) -> Tensor:
    if options.start == "random":
        # Equal classes: a permutation of the tokens dealt out.
        return torch.randperm(len(head), generator=generator) % options.codes
    if options.start == "frequency":
        return _frequency_bins(train.statistics.mass, options.codes)
    weights = train.statistics.row_weights().float()
    points = head.float() @ _directions(head, train.states)
    return kmeans(
        points, weights / weights.mean(), options.codes, generator=generator, iterations=10, sample=24
    ).indices


def _directions(head: Tensor, states: Tensor) -> Tensor:
    """[width, r]: rows of the head times it have nearly the distances of their logits, E[(h . (a - b))^2]."""
    with exact_float32():
        values, vectors = torch.linalg.eigh((states.T @ states).double() / len(states))
        root = vectors * values.clamp(min=0).sqrt()
        gram = root.T @ (head.T @ head).double() @ root
        _, leading = torch.linalg.eigh(gram)
    return (root @ leading[:, -_DIRECTIONS:]).float()


def _frequency_bins(mass: Tensor, count: int) -> Tensor:
    """Bins of tokens of falling probability: one for each that has more than its share of the rest, equal ones then."""
    order = mass.argsort(descending=True, stable=True)
    falling = mass[order]
    rest = falling.flip(0).cumsum(0).flip(0)
    places = torch.arange(len(mass))
    share = rest / (count - places).clamp(min=1)
    alone = int(((falling > share) & (places < count - 1)).long().cumprod(0).sum())
    upper = (falling[alone:].cumsum(0) - falling[alone:]) / rest[alone].clamp(min=torch.finfo(torch.float64).tiny)
    bins = torch.empty_like(order)
    bins[order[:alone]] = places[:alone]
    bins[order[alone:]] = alone + (upper * (count - alone)).long().clamp(max=count - alone - 1)
    return bins


def _means(head: Tensor, assignment: Tensor, count: int) -> Tensor:
    """Means of the classes' rows [count, width] float32; zero for a class without any."""
    total = torch.zeros(count, head.shape[1])
    for rows, part in zip(head.split(1 << 14), assignment.split(1 << 14), strict=True):
        total.index_add_(0, part, rows.float())
    return total / torch.bincount(assignment, minlength=count).clamp(min=1).unsqueeze(1)


def _class_pull(calibration: Calibration, assignment: Tensor, count: int) -> Tensor:
    pull = calibration.statistics.pull
    assert pull is not None
    return torch.zeros(count, pull.shape[1]).index_add_(0, assignment, pull)


def descend(codes: Tensor, assignment: Tensor, train: Calibration, held_out: Calibration, steps: int) -> Fitted:
    """Adam on the whole of ``train`` for codewords [k, width] and a map [tokens]; the best step on ``held_out``."""
    counts = torch.bincount(assignment, minlength=len(codes))
    problems = [
        (part.states, _class_pull(part, assignment, len(codes)), part.statistics.entropy) for part in (train, held_out)
    ]
    rate = _STEP * float(codes.square().mean().sqrt())
    first, second = torch.zeros_like(codes), torch.zeros_like(codes)
    best_codes = codes
    before = best = tied_loss(codes, counts, *problems[1])[0]
    for step in range(1, steps + 1):
        gradient = tied_loss(codes, counts, *problems[0])[1]
        first.lerp_(gradient, 1 - _DECAY[0])
        second.lerp_(gradient.square(), 1 - _DECAY[1])
        ratio = (first / (1 - _DECAY[0] ** step)) / ((second / (1 - _DECAY[1] ** step)).sqrt() + _TINY)
        # Down to nothing in the end: the exact gradient of a convex loss has no noise to average out.
        codes = codes - rate * (1 - (step - 1) / steps) * ratio
        loss = tied_loss(codes, counts, *problems[1])[0]
        if loss < best:
            best, best_codes = loss, codes
    return Fitted(best_codes, assignment, before, best)


def reassigned(codes: Tensor, assignment: Tensor, calibration: Calibration) -> Tensor:
    """The map [tokens] that suits codewords best to first order: argmax_c sum_h p_i(h) s_c(h) - q_c(h).

    A token that moves to class c gains sum p_i s_c, and its share q_c = e^{s_c} / Z of every Z is what it costs.
    """
    states, pull = calibration.states, calibration.statistics.pull
    assert pull is not None
    counts = torch.bincount(assignment, minlength=len(codes))
    log_counts, narrow = counts.float().log(), codes.to(states.dtype)
    cost = torch.zeros(len(codes), dtype=torch.float64)
    for part in states.split(1024):
        scores = (part @ narrow.T).float()
        cost += (scores - (scores + log_counts).logsumexp(dim=1, keepdim=True)).exp().sum(dim=0, dtype=torch.float64)
    found = [(part @ codes.T - cost.float()).argmax(dim=1) for part in pull.split(1 << 12)]
    return torch.cat(found)
