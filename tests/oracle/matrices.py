"""Named matrices that break quantizers: a weight, the second moment of its inputs, and what makes them hard."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

SIZE = 256
_FAMILIES: dict[str, Callable[[np.random.Generator], Case]] = {}


@dataclass(frozen=True)
class Case:
    """A weight [out, in] and H = E[x x^T] [in, in], both float32.

    ``side_dtype`` is the stored dtype that can hold the numbers. ``exact`` says that grids of 2 bits reproduce the
    matrix up to the rounding of their scales, so that losses are rounding noise and cannot be compared.
    """

    weight: np.ndarray
    hessian: np.ndarray
    side_dtype: str = "float16"
    exact: bool = False


@cache
def family(name: str) -> Case:
    """The matrix of a family; always the same. Not to be changed."""
    return _FAMILIES[name](np.random.default_rng(sum(name.encode())))


def families() -> list[str]:
    """All names."""
    return sorted(_FAMILIES)


def _add(build: Callable[[np.random.Generator], Case]) -> Callable[[np.random.Generator], Case]:
    _FAMILIES[build.__name__] = build
    return build


def normal_weight(rng: np.random.Generator, out: int = SIZE, inp: int = SIZE) -> np.ndarray:
    """Weights as in trained layers: normal, with a standard deviation of 0.05 that differs between rows."""
    return (rng.normal(size=(out, inp)) * 0.05 * np.exp(0.2 * rng.normal(size=(out, 1)))).astype(np.float32)


def activations(rng: np.random.Generator, inp: int = SIZE, tokens: int = 2048, correlation: float = 0.7) -> np.ndarray:
    """Inputs [tokens, inp]: neighbouring channels correlated, channel scales spread over about a decade."""
    x = rng.normal(size=(tokens, inp))
    for column in range(1, inp):
        x[:, column] = correlation * x[:, column - 1] + np.sqrt(1 - correlation**2) * x[:, column]
    return x * np.exp(0.5 * rng.normal(size=inp))


def second_moment(x: np.ndarray) -> np.ndarray:
    """E[x x^T] [in, in] of inputs [tokens, in]."""
    return (x.T @ x / x.shape[0]).astype(np.float32)


@_add
def well_conditioned(rng: np.random.Generator) -> Case:
    return Case(normal_weight(rng), second_moment(activations(rng)))


@_add
def condition_1e12(rng: np.random.Generator) -> Case:
    """Eigenvalues fall over twelve decades, in directions that mix all channels."""
    basis, _ = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))
    hessian = (basis * np.logspace(0, -12, SIZE)) @ basis.T
    return Case(normal_weight(rng), ((hessian + hessian.T) / 2).astype(np.float32))


@_add
def rank_1_hessian(rng: np.random.Generator) -> Case:
    """Every token is a multiple of one vector."""
    x = rng.normal(size=SIZE)
    return Case(normal_weight(rng), np.outer(x, x).astype(np.float32))


@_add
def few_tokens(rng: np.random.Generator) -> Case:
    """A quarter as many calibration tokens as channels."""
    return Case(normal_weight(rng), second_moment(activations(rng, tokens=SIZE // 4)))


@_add
def dead_columns(rng: np.random.Generator) -> Case:
    """A fifth of the input channels never fires."""
    x = activations(rng)
    x[:, rng.permutation(SIZE)[: SIZE // 5]] = 0
    return Case(normal_weight(rng), second_moment(x))


@_add
def duplicate_columns(rng: np.random.Generator) -> Case:
    """Every channel exists twice, with the same weights."""
    half = normal_weight(rng, SIZE, SIZE // 2)
    x = activations(rng, SIZE // 2)
    return Case(np.concatenate([half, half], axis=1), second_moment(np.concatenate([x, x], axis=1)))


@_add
def outlier_weights(rng: np.random.Generator) -> Case:
    """Three columns of the weight are 10,000 times as large as the others."""
    weight = normal_weight(rng)
    weight[:, [5, 100, 200]] *= 1e4
    return Case(weight, second_moment(activations(rng)))


@_add
def outlier_activations(rng: np.random.Generator) -> Case:
    """Three neighbouring, correlated input channels are 10,000 times as large as the others.

    A single such channel has no other that could make up for its error: there, gptq is as good as rtn and no better.
    """
    x = activations(rng)
    x[:, 100:103] *= 1e4
    return Case(normal_weight(rng), second_moment(x))


@_add
def mixed_channels(rng: np.random.Generator) -> Case:
    """Every channel is correlated with all others, and late, weak ones have to make up for early, strong ones."""
    x = rng.normal(size=(2048, SIZE)) @ (rng.normal(size=(SIZE, SIZE)) / 16 + np.eye(SIZE) / 2)
    return Case(normal_weight(rng), second_moment(x * np.exp(0.7 * rng.normal(size=SIZE))))


@_add
def tiny(rng: np.random.Generator) -> Case:
    """Weights of 1e-8, below everything that float16 can hold."""
    weight = (rng.normal(size=(SIZE, SIZE)) * 1e-8).astype(np.float32)
    return Case(weight, second_moment(activations(rng)), side_dtype="bfloat16")


@_add
def tiny_hessian(rng: np.random.Generator) -> Case:
    """Inputs of 1e-8."""
    return Case(normal_weight(rng), second_moment(activations(rng) * 1e-8))


@_add
def constant_rows(rng: np.random.Generator) -> Case:
    return Case(np.repeat(normal_weight(rng, SIZE, 1), SIZE, axis=1), second_moment(activations(rng)), exact=True)


@_add
def constant_columns(rng: np.random.Generator) -> Case:
    return Case(np.repeat(normal_weight(rng, 1, SIZE), SIZE, axis=0), second_moment(activations(rng)))


@_add
def all_equal(rng: np.random.Generator) -> Case:
    return Case(np.full((SIZE, SIZE), 0.3, np.float32), second_moment(activations(rng)), exact=True)


@_add
def all_zero(rng: np.random.Generator) -> Case:
    return Case(np.zeros((SIZE, SIZE), np.float32), second_moment(activations(rng)), exact=True)


@_add
def one_input(rng: np.random.Generator) -> Case:
    """A grid of one weight has a scale for itself: nothing but its rounding is left."""
    return Case(normal_weight(rng, SIZE, 1), second_moment(activations(rng, 1)), exact=True)


@_add
def one_output(rng: np.random.Generator) -> Case:
    return Case(normal_weight(rng, 1, SIZE), second_moment(activations(rng)))


@_add
def one_weight(rng: np.random.Generator) -> Case:
    return Case(normal_weight(rng, 1, 1), second_moment(activations(rng, 1)), exact=True)


@_add
def ragged(rng: np.random.Generator) -> Case:
    """A prime number of outputs: no vector length divides it; 10 columns are left over after the groups."""
    return Case(normal_weight(rng, 251, 202), second_moment(activations(rng, 202)))


@_add
def narrow(rng: np.random.Generator) -> Case:
    """Fewer inputs than a group has columns."""
    return Case(normal_weight(rng, SIZE, 40), second_moment(activations(rng, 40)))


@_add
def low(rng: np.random.Generator) -> Case:
    """Fewer outputs than the longest vector."""
    return Case(normal_weight(rng, 7, SIZE), second_moment(activations(rng)))
