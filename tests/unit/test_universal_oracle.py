"""The universal method against float64: brute force over all sums of centroids, step by step."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from octavo import codebooks
from octavo.algorithms import get
from octavo.math.hadamard import unpack_signs
from octavo.weight import VQWeight
from oracle import feedback
from oracle import universal as oracle
from oracle.decode import universal as tables
from oracle.matrices import activations, normal_weight, second_moment

_PARTS = {name: codebooks.parse(name) for name in codebooks.names()}
#: Index and sign bits of a vector.
_BITS = {name: sum(stages) + signs * v for name, (v, stages, signs) in _PARTS.items()}
#: Codebooks of which all sums can be tried, and the smallest of them with two stages.
_SMALL = sorted((name for name, bits in _BITS.items() if bits <= 16), key=_BITS.__getitem__)
_BOOK = next(name for name in _SMALL if len(_PARTS[name][1]) == 2)


def _sides(result: VQWeight) -> tuple[np.ndarray, np.ndarray]:
    """The matrices of the transforms of the inputs and of the outputs."""
    transform, (out, inp) = result.layout.transform, result.layout.shape
    blocks = (transform.input, transform.output) if transform else (0, 0)
    names = (("input_signs", inp), ("output_signs", out))
    signs = [unpack_signs(result.tensors[name], n).numpy() if name in result.tensors else None for name, n in names]
    return oracle.transform(inp, blocks[0], signs[0]), oracle.transform(out, blocks[1], signs[1])


def _books(name: str) -> list[np.ndarray]:
    """Centroids of every stage; with signs, the written-out codebook of the one stage, signs counting slowest."""
    books = tables(name)
    if codebooks.get(name).sign_bits:
        # The first element's sign counts fastest.
        signs = np.array([s[::-1] for s in itertools.product((1, -1), repeat=books[0].shape[1])])
        books = [(signs[:, None] * books[0]).reshape(-1, books[0].shape[1])]
    return books


def _compare(out: int, inp: int, name: str = _BOOK, **options: Any) -> None:
    """Values, codes and loss of a matrix are those of the oracle wherever float32 can tell."""
    rng = np.random.default_rng([out, inp])
    weight, hessian = normal_weight(rng, out, inp), second_moment(activations(rng, inp, 4 * inp + 64))
    settings = {"side_dtype": "float32", "beam": 256, "sweeps": 2, **options}
    method = get("universal")(codebook=name, **settings)
    result = method.quantize(torch.from_numpy(weight), hessian=torch.from_numpy(hessian))
    layout = result.layout
    assert layout.block_scale is not None
    input_side, output_side = _sides(result)
    told = oracle.Settings(
        books=_books(name),
        input=input_side,
        output=output_side,
        column=layout.direction == "column",
        scale_columns=layout.block_scale.columns,
        scale_bits=layout.block_scale.log2_bits,
        passes=options.get("passes", 1),
        sweeps=settings["sweeps"],
    )
    wanted = oracle.universal(weight, hessian, told)
    got = result.dequantize(torch.float64).numpy()
    clear = ~wanted.close
    assert clear.mean() > 0.3, "too many rows with a decision that float32 may take either way"
    inner = output_side @ got @ input_side.T
    np.testing.assert_allclose(inner[clear], wanted.inner[clear], rtol=0, atol=1e-5 * np.abs(wanted.inner).max())
    # A decision that is taken the other way costs next to nothing.
    losses = [feedback.proxy_loss(weight, values, hessian) for values in (got, wanted.values)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5 if clear.all() else 2e-2)
    # What is left over after whole vectors can be coded in more than one way.
    v = layout.vector_length
    codes = np.stack([part.numpy() for part in result.codes()])
    if layout.sign_bits:
        codes = codes[:1] + (codes[1:] << layout.stages[0])
    if layout.direction == "column":
        vectors = np.flatnonzero(clear[: out // v * v].reshape(-1, v).all(axis=1))
        assert np.array_equal(codes[:, vectors], wanted.chosen[:, vectors])
    else:
        whole = (slice(None), np.flatnonzero(clear), slice(inp // v))
        assert np.array_equal(codes[whole], wanted.chosen[whole])


@pytest.mark.parametrize("scale_block", [0, 16])
@pytest.mark.parametrize("transform", ["none", "input", "output", "both"])
def test_rows_of_vectors_are_those_of_the_textbook(transform: str, scale_block: int) -> None:
    _compare(16, 24, transform=transform, scale_block=scale_block)


@pytest.mark.parametrize(("transform", "scale_block"), [("none", 0), ("output", 16), ("both", 8)])
def test_columns_of_vectors_are_those_of_the_textbook(transform: str, scale_block: int) -> None:
    _compare(16, 24, direction="column", transform=transform, scale_block=scale_block, sweeps=1)


@pytest.mark.parametrize(
    ("out", "inp", "options"),
    [
        (48, 40, {"scale_block": 16, "passes": 2}),
        (19, 21, {}),
        (13, 18, {"direction": "column", "transform": "input", "sweeps": 1}),
        (9, 7, {"transform": "none", "scale_bits": 4}),
        (20, 32, {"sweeps": 0, "scale_bits": 3}),
        (8, 16, {"block": 4, "passes": 3}),
    ],
)
def test_other_sizes_and_options_are_those_of_the_textbook(out: int, inp: int, options: dict[str, Any]) -> None:
    _compare(out, inp, **options)


@pytest.mark.parametrize("name", _SMALL)
@pytest.mark.parametrize("direction", ["row", "column"])
def test_every_codebook_whose_sums_can_be_tried_is_searched_like_the_textbook(direction: str, name: str) -> None:
    _compare(8, 8, name, direction=direction, sweeps=1)
