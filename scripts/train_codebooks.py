#!/usr/bin/env python3
"""Train the universal codebooks of src/octavo/codebooks from a seed, on vectors drawn from N(0, 1).

    python scripts/train_codebooks.py OUT_FOLDER [--only NAME ..] [--seed 0]

The stages of an additive codebook are fitted together: the nearest sums of fresh vectors, then the least-squares books
for them, in turn. Then everything is rounded to int8, and the integers are refined in the same way. The SHA-256 of each
file is printed; on the same kind of processor, with the same versions of Octavo and torch, it is that of the shipped
file. Elsewhere float sums may round differently.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from octavo import codebooks
from octavo._core.io import sha256_file, write_bytes
from octavo._core.seeds import generator
from octavo.math.additive import nearest_additive
from octavo.math.assign import nearest
from octavo.math.kmeans import kmeans

#: The integer scale is a multiple of 2^-18: int8 times it, and sums of those, are then exact in float32.
SCALE_BITS = 18
#: Shares of the scale that just holds every centroid. A smaller one clips some and rounds all others finer.
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
START_VECTORS = 1 << 17
#: Scales that are tried for a lattice start, and the perturbation of a product start.
LATTICE_SCALES = (0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 1.0, 1.1, 1.2)
PERTURBATION = 0.03
INTEGER_ROUNDS = 6
TEST_VECTORS = 1 << 20
#: Beam of the last measurement of three stages; two are searched exactly.
FINE_BEAM = 512


@dataclass(frozen=True)
class Plan:
    """How to train one codebook.

    Attributes:
        start: ``kmeans``; ``product`` (each stage a k-means of some of the elements, slightly perturbed); ``lattice``
            (two stages whose sums are points of E8); ``sums`` (those of ``base``, as one stage); or ``residual``
            (``base``, and a k-means of what it leaves).
        rounds, vectors: assignments and refits, and fresh vectors in each.
        beam: of the search while training.
        shared: one scale for all stages, and integer sums within int8.
        base: the shipped codebook, of two stages, that others start from.
    """

    start: str = "kmeans"
    rounds: int = 200
    vectors: int = 1 << 17
    beam: int = 32
    shared: bool = False
    base: str = "gaussian-v8-k256-256"


PLANS = {
    "gaussian-v8-k256-256": Plan("lattice", rounds=1200, beam=16, shared=True),
    "gaussian-v8-k256": Plan(rounds=400),
    "gaussian-v8-k4096": Plan(vectors=1 << 18),
    "gaussian-v8-k256-16": Plan("lattice", rounds=300, shared=True),
    "gaussian-v8-k256-64": Plan("product", rounds=300, beam=64, shared=True),
    "gaussian-v8-k256-256-16": Plan("residual"),
    "gaussian-v8-k256-256-256": Plan("residual"),
    "gaussian-v8-k256-signs": Plan(rounds=400),
    "gaussian-v4-k256": Plan(rounds=400),
    "gaussian-v4-k256-16": Plan("product", rounds=300, beam=64),
    "gaussian-v4-k256-signs": Plan(rounds=400),
    "gaussian-v4-k256-64": Plan("product", rounds=300, beam=64),
    "gaussian-v4-k256-256": Plan("product", rounds=300, beam=64),
    "gaussian-v4-k256-256-256": Plan("residual", rounds=100, base="gaussian-v4-k256-256"),
    "gaussian-v2-k16": Plan(rounds=400),
    "gaussian-v2-k64": Plan(rounds=400),
    "gaussian-v2-k256": Plan(rounds=400),
    "gaussian-v8-k65536": Plan("sums", rounds=30, vectors=1 << 20),
}


class Source:
    """Fresh vectors of N(0, 1), or of its magnitudes."""

    def __init__(self, vector_length: int, magnitudes: bool, stream: torch.Generator) -> None:
        self.vector_length, self.magnitudes, self.stream = vector_length, magnitudes, stream

    def draw(self, count: int) -> Tensor:
        """[count, v]."""
        points = torch.randn(count, self.vector_length, generator=self.stream)
        return points.abs_() if self.magnitudes else points


def search(points: Tensor, books: list[Tensor], beam: int) -> Tensor:
    """[n, stages]: the codes of the nearest sums."""
    if len(books) == 1:
        return nearest(points, books[0]).unsqueeze(1)
    return nearest_additive(points, books, None, beam)


def error(points: Tensor, books: list[Tensor], beam: int) -> float:
    """Mean squared error per element."""
    total = 0.0
    for part in points.split(1 << 17):
        codes = search(part, books, beam)
        sums = torch.stack([book[codes[:, t]] for t, book in enumerate(books)]).sum(dim=0)
        total += float((part - sums).double().square().sum())
    return total / points.numel()


# ---------------------------------------------------------------- starts


def start(plan: Plan, source: Source, sizes: list[int]) -> list[Tensor]:
    """The first books, [k, v] each."""
    points = source.draw(START_VECTORS)
    if plan.start == "kmeans":
        return [_kmeans(points, sizes[0], source.stream)]
    if plan.start == "product":
        return _product(points, sizes, source.stream)
    if plan.start == "lattice":
        books = _lattice(sizes, source.stream)
        tries = [[scale * book for book in books] for scale in LATTICE_SCALES]
        return min(tries, key=lambda books: error(points[: 1 << 14], books, plan.beam))
    trained = codebooks.get(plan.base)
    first, second = books = [trained.centroids(0), trained.centroids(1)]
    if plan.start == "sums":
        return [(first[:, None] + second[None]).reshape(-1, source.vector_length)]
    codes = search(points, books, plan.beam)
    return [*books, _kmeans(points - first[codes[:, 0]] - second[codes[:, 1]], sizes[2], source.stream)]


def _kmeans(points: Tensor, size: int, stream: torch.Generator) -> Tensor:
    return kmeans(points, torch.ones(len(points)), size, generator=stream).centroids


def _product(points: Tensor, sizes: list[int], stream: torch.Generator) -> list[Tensor]:
    """Elements are shared out in proportion to the bits of the stages."""
    v = points.shape[1]
    bits = torch.tensor([math.log2(size) for size in sizes])
    edges = [0, *(bits.cumsum(0) / bits.sum() * v).round().int().tolist()]
    books = []
    for t, size in enumerate(sizes):
        part = slice(edges[t], edges[t + 1])
        book = PERTURBATION * torch.randn(size, v, generator=stream)
        book[:, part] += _kmeans(points[:, part], size, stream)
        books.append(book)
    return books


def _lattice(sizes: list[int], stream: torch.Generator) -> list[Tensor]:
    """Sums are points of E8, each once: a short point of every coset of a sublattice, and short points of that.

    E8 contains its image under F, which takes (a, b) to (a + b, a - b) in every pair of elements. There are 16 cosets
    of F and, as F F = 2, 256 of F F.
    """
    whole = torch.cartesian_prod(*[torch.arange(-2.0, 3.0)] * 8)
    points = torch.cat([whole, whole + 0.5])
    points = points[_in_lattice(points) & (points.square().sum(dim=1) <= 4)]
    points = points[torch.randperm(len(points), generator=stream)]
    points = points[points.square().sum(dim=1).argsort(stable=True)]
    turn = torch.block_diag(*[torch.tensor([[1.0, 1.0], [1.0, -1.0]])] * 4)
    turn = turn if sizes[1] == 16 else turn @ turn
    short = points[:1]
    for point in points:
        if not bool(_in_lattice((point - short) @ torch.linalg.inv(turn)).any()):
            short = torch.cat([short, point[None]])
    assert len(short) == sizes[1]
    return [points[: sizes[0]] @ turn, short]


def _in_lattice(points: Tensor) -> Tensor:
    """[n]: whether points are in E8: integers, or all of them plus one half, and of even sum. Exact on halves."""
    whole = (points == points.round()).all(dim=1) | (points + 0.5 == (points + 0.5).round()).all(dim=1)
    return whole & (points.sum(dim=1) % 2 == 0)


# ---------------------------------------------------------------- training


class Moments:
    """Running normal equations of the books: how often centroids meet, and the sums of the vectors they serve.

    With C the 0/1 matrix of which centroid (of all stages, one after the other) serves which vector of X, the books B
    that minimise |X - C B|^2 solve (C^T C) B = C^T X. One stage alone has a diagonal C^T C, kept as a vector.
    """

    def __init__(self, books: list[Tensor]) -> None:
        self.sizes = [len(book) for book in books]
        self.total = sum(self.sizes)
        self.meets = torch.zeros(self.total if len(books) == 1 else (self.total, self.total), dtype=torch.float64)
        self.sums = torch.zeros(self.total, books[0].shape[1], dtype=torch.float64)

    def add(self, points: Tensor, codes: Tensor, memory: float) -> None:
        """Forget all but the share ``memory`` of what was, and take these vectors in."""
        self.meets *= memory
        self.sums *= memory
        rows = codes + torch.tensor([0, *self.sizes[:-1]]).cumsum(0)
        for row in rows.T:
            self.sums.index_add_(0, row, points.double())
            for other in rows.T if len(self.sizes) > 1 else [None]:
                cell = row if other is None else row * self.total + other
                self.meets.view(-1).add_(torch.bincount(cell, minlength=self.meets.numel()))

    def step(self, books: list[Tensor], relaxation: float) -> list[Tensor]:
        """From ``books`` towards the least-squares books; centroids without vectors stay where they are."""
        old = torch.cat(books).double()
        if len(books) == 1:
            move = torch.where(self.meets[:, None] > 0, self.sums / self.meets.clamp(min=1)[:, None] - old, 0.0)
        else:
            # Adding a vector to one book and taking it from another changes no sum: the ridge settles that.
            ridge = RIDGE * self.meets.diagonal().mean() * torch.eye(self.total, dtype=torch.float64)
            move = torch.linalg.solve(self.meets + ridge, self.sums - self.meets @ old)
        return list((old + relaxation * move).float().split(self.sizes))

    def usage(self) -> list[Tensor]:
        """How many vectors every centroid serves, per stage."""
        counts = self.meets if self.meets.ndim == 1 else self.meets.diagonal()
        return list(counts.split(self.sizes))


#: Ridge of the normal equations, as a share of the mean usage of a centroid.
RIDGE = 1e-4
#: Steps go beyond the least-squares books by this factor, until the last fifth of the rounds. There, and before, the
#: normal equations remember this share of themselves.
RELAXATION = 1.7
MEMORY, LAST_MEMORY = 0.8, 0.95


def train(plan: Plan, source: Source, books: list[Tensor]) -> tuple[list[Tensor], Moments]:
    """Float books after all rounds."""
    moments = Moments(books)
    for number in range(plan.rounds):
        points = source.draw(plan.vectors)
        codes = search(points, books, plan.beam)
        last = number >= 0.8 * plan.rounds
        moments.add(points, codes, 0.0 if number < 5 else LAST_MEMORY if last else MEMORY)
        books = moments.step(books, 1.0 if last else RELAXATION)
        if len(books) == 1 and number < plan.rounds // 2:
            unused = moments.usage()[0] == 0
            books[0][unused] = points[: int(unused.sum())]
    # The mean of a later stage belongs to the first: their ranges are then the smallest.
    for t, used in enumerate(moments.usage()[1:], 1):
        mean = (books[t] * used[:, None]).sum(dim=0).div(used.sum()).float()
        books[0], books[t] = books[0] + mean, books[t] - mean
    return books, moments


# ---------------------------------------------------------------- integers


def scales(books: list[Tensor], shared: bool, clip: float) -> list[float]:
    """Scale of every stage: one for all, or one halved as often as the range of the stage allows."""
    if shared:
        largest = max(float(torch.stack([(sign * b).amax(dim=0) for b in books]).sum(dim=0).max()) for sign in (1, -1))
        ranges = [largest * clip] * len(books)
    else:
        ranges = [float(book.abs().max()) * clip for book in books]
    base = math.ceil(max(ranges) / 127 * 2**SCALE_BITS) / 2**SCALE_BITS
    return [base / 2 ** int(math.log2(127 * base / wanted)) for wanted in ranges]


def _limits(tables: list[Tensor], stage: int, shared: bool) -> tuple[Tensor, Tensor]:
    """Least and greatest integers of each element of a stage, given the other stages."""
    edge = torch.full_like(tables[0][0], 127.0)
    if not shared:
        return -edge, edge
    others = [table for t, table in enumerate(tables) if t != stage]
    low, high = sum(b.amin(dim=0) for b in others), sum(b.amax(dim=0) for b in others)
    return -edge - low, edge - high


def round_books(books: list[Tensor], scale: list[float], shared: bool) -> list[Tensor]:
    """Nearest integers, float64 [k, v], within their limits."""
    tables = [(book.double() / s).round() for book, s in zip(books, scale, strict=True)]
    for t in range(len(tables)):
        tables[t] = tables[t].clamp(*_limits(tables, t, shared))
    return tables


def refine(tables: list[Tensor], scale: list[float], shared: bool, moments: Moments) -> list[Tensor]:
    """Coordinate descent of the normal equations over integers: one centroid after the other."""
    sizes = moments.sizes
    factors = torch.cat([torch.full((size, 1), s, dtype=torch.float64) for size, s in zip(sizes, scale, strict=True)])
    counts = torch.cat(moments.usage()).clamp(min=1e-9)
    first = 0
    for t, size in enumerate(sizes):
        low, high = _limits(tables, t, shared)
        rows = torch.cat(tables)
        for row in range(first, first + size):
            met = (
                moments.meets[row] @ (rows * factors)
                if moments.meets.ndim == 2
                else rows[row] * factors[row] * counts[row]
            )
            best = rows[row] + (moments.sums[row] - met) / (counts[row] * factors[row])
            rows[row] = best.round().clamp(low, high) if counts[row] >= 1 else rows[row]
        tables = list(rows.split(sizes))
        first += size
    return tables


def scaled(tables: list[Tensor], scale: list[float]) -> list[Tensor]:
    """Float32 books, [k, v] each."""
    return [table.float() * s for table, s in zip(tables, scale, strict=True)]


def to_integers(plan: Plan, source: Source, books: list[Tensor], moments: Moments) -> tuple[list[Tensor], list[float]]:
    """The integer tables and scales nearest in distortion to the float books."""
    points = source.draw(plan.vectors)
    found = []
    for clip in CLIPS:
        scale = scales(books, plan.shared, clip)
        found.append((error(points, scaled(round_books(books, scale, plan.shared), scale), plan.beam), clip))
    scale = scales(books, plan.shared, min(found)[1])
    tables = round_books(books, scale, plan.shared)
    for _ in range(INTEGER_ROUNDS):
        points = source.draw(plan.vectors)
        moments.add(points, search(points, scaled(tables, scale), plan.beam), LAST_MEMORY)
        tables = refine(tables, scale, plan.shared, moments)
    return tables, scale


def ordered(table: Tensor) -> Tensor:
    """Int8, the shortest centroid first; of equally long ones, in the order of their elements."""
    rows = sorted(table.int().tolist(), key=lambda row: (sum(x * x for x in row), row))
    return torch.tensor(rows, dtype=torch.int8)


def build(name: str, seed: int) -> tuple[bytes, str]:
    """The file of a codebook, and what is to be said about it."""
    began, plan = time.process_time(), PLANS[name]
    vector_length, stages, signs = codebooks.parse(name)
    source = Source(vector_length, signs, generator(seed, name))
    books, moments = train(plan, source, start(plan, source, [1 << bits for bits in stages]))
    tables, scale = to_integers(plan, source, books, moments)
    test = Source(vector_length, signs, generator(seed, f"test of {name}")).draw(TEST_VECTORS)
    before, after = (error(test, b, FINE_BEAM) for b in (books, scaled(tables, scale)))
    tensors = {f"table{t}": ordered(table) for t, table in enumerate(tables)}
    tensors["scales"] = torch.tensor(scale, dtype=torch.float32)
    tensors["distortion"] = torch.tensor(after, dtype=torch.float64)
    return save(tensors), f"float {before:.5f}, int8 {after:.5f}, {time.process_time() - began:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(PLANS), metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.only or PLANS:
        data, told = build(name, arguments.seed)
        path = arguments.out / f"{name}.safetensors"
        write_bytes(path, data)
        print(f'    "{name}": "{sha256_file(path)}",  # {told}', flush=True)


if __name__ == "__main__":
    main()
