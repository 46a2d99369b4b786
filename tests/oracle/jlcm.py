"""JLCM in float64, for small matrices: the grouping of rows, and a step of the training of codes, vector by vector."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def shape_features(weight: np.ndarray) -> np.ndarray:
    """Sixteen quantiles [rows, 16] of every row over its root mean square."""
    found = []
    for row in weight.astype(np.float64):
        size = np.sqrt((row**2).mean())
        shape = row / size if size > 0 else row
        found.append([np.quantile(shape, (i + 0.5) / 16) for i in range(16)])
    return np.array(found)


def grouped_order(points: np.ndarray) -> list[int]:
    """Balanced 2-means, and again on each half: the numbers of the points, like ones next to each other."""

    def split(members: list[int]) -> list[int]:
        if len(members) <= 2:
            return members
        x = points[members].astype(np.float64)
        size, mean = (len(members) + 1) // 2, x.mean(axis=0)
        far = x[((x - mean) ** 2).sum(axis=1).argmax()]
        # Nearest to the mirror image of the farthest point rather than to that point itself.
        centres = 2 * mean - far, far
        first: set[int] = set()
        for _ in range(20):
            gain = [((p - centres[0]) ** 2).sum() - ((p - centres[1]) ** 2).sum() for p in x]
            now = set(np.argsort(gain, kind="stable")[:size].tolist())
            if now == first:
                break
            first = now
            other = set(range(len(members))) - first
            centres = x[sorted(first)].mean(axis=0), x[sorted(other)].mean(axis=0)
        halves = [m for i, m in enumerate(members) if i in first], [m for i, m in enumerate(members) if i not in first]
        return split(halves[0]) + split(halves[1])

    return split(list(range(len(points))))


def move(code: int, push: np.ndarray, book: np.ndarray, rule: str, neighbours: int) -> int:
    """Where a vector goes whose codeword is book[code] and that descent would push by ``push``.

    With the way d to another codeword, the natural gradient of a soft assignment is (push . d), in proportion to the
    distance; ``ste`` counts it in units of the squared distance to the nearest codeword. ``proximal`` divides by |d|^2:
    1/2 is then where the other codeword is as near to the pushed vector as its own.
    """
    ways = {c: book[c] - book[code] for c in range(len(book)) if c != code}
    nearest = sorted(ways, key=lambda c: float(ways[c] @ ways[c]))[:neighbours]
    lengths = {c: float(ways[c] @ ways[c]) for c in nearest}
    shortest = min(length for length in lengths.values() if length > 0)
    best, result = 0.5, code
    for c in nearest:
        if lengths[c] == 0:
            continue
        evidence = float(push @ ways[c]) / (lengths[c] if rule == "proximal" else shortest)
        if evidence > best:
            best, result = evidence, c
    return result


@dataclass
class State:
    """Displacements [rows, columns, v] in mean gaps, codes [rows, columns], and the sums of squares so far."""

    value: np.ndarray
    codes: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    steps: int = 0

    @classmethod
    def of(cls, codes: np.ndarray, v: int) -> State:
        return cls(np.zeros((*codes.shape, v)), codes.copy(), np.zeros(len(codes)), np.zeros((codes.shape[1], v)))


def mean_gap(book: np.ndarray) -> float:
    """The mean distance from a codeword to the nearest other one."""
    gaps = [min(np.linalg.norm(a - b) for j, b in enumerate(book) if j != i) for i, a in enumerate(book)]
    return float(np.mean(gaps))


def learn(
    state: State, slope: np.ndarray, books: np.ndarray, owner: np.ndarray, rate: float, rule: str, neighbours: int
) -> None:
    """One step: ``slope`` [rows, columns, v] is the gradient of the loss with respect to the decoded vectors.

    Gradients count in gaps, over the root of (running mean square of the row) (that of the column) / (mean of all).
    """
    gaps = np.array([mean_gap(book) for book in books.astype(np.float64)])
    gradient = slope.astype(np.float64) * gaps[owner][:, :, None]
    state.steps += 1
    state.rows = 0.99 * state.rows + 0.01 * (gradient**2).mean(axis=(1, 2))
    state.columns = 0.99 * state.columns + 0.01 * (gradient**2).mean(axis=0)
    seen = 1 - 0.99**state.steps
    rows, columns = state.rows / seen, state.columns / seen
    size = np.sqrt(rows[:, None, None] * columns[None] / rows.mean())
    state.value -= rate * np.divide(gradient, size, out=np.zeros_like(gradient), where=size > 0)
    for r, c in np.ndindex(*state.codes.shape):
        push = state.value[r, c] * gaps[owner[r, c]]
        code = move(int(state.codes[r, c]), push, books[owner[r, c]].astype(np.float64), rule, neighbours)
        if code != state.codes[r, c]:
            state.codes[r, c], state.value[r, c] = code, 0
