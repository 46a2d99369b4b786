"""Additive codebooks in float64: the best of all sums of centroids, and beam search as the textbooks have it."""

from __future__ import annotations

from itertools import product

import numpy as np


def loss(point: np.ndarray, books: list[np.ndarray], root: np.ndarray, codes: tuple[int, ...]) -> float:
    """|(x - sum_s books[s][codes[s]]) root|^2, of as many books as there are codes."""
    error = point.astype(np.float64)
    for book, code in zip(books, codes, strict=False):
        error = error - book[code]
    return float(((error @ root) ** 2).sum())


def losses(points: np.ndarray, books: list[np.ndarray], root: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """The loss of every point [n] with its codes [n, stages]."""
    return np.array([loss(x, books, root, tuple(c)) for x, c in zip(points, codes, strict=True)])


def exhaustive(points: np.ndarray, books: list[np.ndarray], root: np.ndarray) -> np.ndarray:
    """The best of all codes, the lexicographically first of equals [n, stages]."""
    every = list(product(*(range(len(book)) for book in books)))
    return np.array([min(every, key=lambda codes: (loss(x, books, root, codes), codes)) for x in points])


def beam_search(points: np.ndarray, books: list[np.ndarray], root: np.ndarray, beam: int) -> np.ndarray:
    """Codes [n, stages]: after every stage, only the ``beam`` best beginnings go on."""
    found = []
    for x in points:
        beginnings: list[tuple[int, ...]] = [()]
        for book in books:
            longer = [(*beginning, code) for beginning in beginnings for code in range(len(book))]
            scored = sorted((loss(x, books, root, codes), codes) for codes in longer)
            beginnings = [codes for _, codes in scored[:beam]]
        found.append(beginnings[0])
    return np.array(found, dtype=np.int64).reshape(len(points), len(books))
