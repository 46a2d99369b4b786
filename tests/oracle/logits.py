"""Textbook versions, float64, one context and one token after the other: row weights, tied classes, top-k."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def softmax(logits: Array) -> Array:
    shifted = np.exp(logits - logits.max())
    return shifted / shifted.sum()


def row_weights(logits: Array, smoothing: float) -> Array:
    """E[p~ (1 - p~)] over contexts [n, tokens]."""
    tokens, total = logits.shape[1], np.zeros(logits.shape[1])
    for context in logits:
        p = softmax(context)
        for k in range(tokens):
            smooth = (1 - smoothing) * p[k] + smoothing / tokens
            total[k] += smooth * (1 - smooth)
    return total / len(logits)


def divergence(p: Array, q: Array) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def tied_divergence(codes: Array, token_codes: list[int], states: Array, logits: Array) -> float:
    """Mean KL(softmax(logits) || softmax of h . codes[token_codes]) over contexts."""
    rows = np.stack([codes[c] for c in token_codes])
    return float(np.mean([divergence(softmax(z), softmax(rows @ h)) for h, z in zip(states, logits, strict=True)]))


def tied_gradient(codes: Array, token_codes: list[int], states: Array, logits: Array, step: float = 1e-5) -> Array:
    """The gradient of :func:`tied_divergence` by central differences."""
    gradient = np.zeros_like(codes)
    for place in np.ndindex(*codes.shape):
        moved = [codes.copy(), codes.copy()]
        moved[0][place] += step
        moved[1][place] -= step
        up, down = (tied_divergence(c, token_codes, states, logits) for c in moved)
        gradient[place] = (up - down) / (2 * step)
    return gradient


def top(logits: Array, k: int) -> list[int]:
    """Indices of the k largest, falling; of equal ones the lowest index first."""
    return sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:k]


def fair_top1(reference: Array, logits: Array) -> float:
    """Probability that one of the largest logits, drawn at random, is the reference's largest."""
    best = [i for i in range(len(logits)) if logits[i] == logits.max()]
    return (int(np.argmax(reference)) in best) / len(best)
