"""The choice of vector length and codebook sizes: its model of the distortion, its budget, its optimality."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from octavo.algorithms import _choose, get
from octavo.algorithms._choose import (
    _TOLERANCE,
    VECTOR_LENGTHS,
    allocate,
    predicted_distortion,
    stage_choices,
    stage_distortion,
)
from octavo.layout import Layout
from octavo.math.kmeans import kmeans

_FEATURES = st.integers(64, 3000)
_SHAPES = st.lists(st.tuples(st.tuples(_FEATURES, _FEATURES), st.booleans()), min_size=1, max_size=6)
_SMALL = st.integers(64, 600)
_FEW_SMALL_SHAPES = st.lists(st.tuples(st.tuples(_SMALL, _SMALL), st.booleans()), min_size=1, max_size=4)
#: The matrices of a block of SmolLM2-135M.
_BLOCK = [
    (shape, False) for shape in ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))
]


def _allocate(tables: list[list[Layout]], bits: float, power: float = 1.0) -> list[Layout]:
    """A matrix counts with its number of weights to a power; so many bits per weight."""
    weights = [options[0].weights for options in tables]
    return allocate(tables, math.floor(bits * sum(weights)), [n**power for n in weights])


def _size(layouts: list[Layout]) -> int:
    return sum(layout.bits() for layout in layouts)


def _distortion(layouts: list[Layout], size_power: float = 1.0) -> float:
    return sum(predicted_distortion(layout) * layout.weights**size_power for layout in layouts)


def _layout(v: int, *stages: int, shape: tuple[int, int] = (512, 512), **options: Any) -> Layout:
    return Layout(shape=shape, vector_length=v, stages=stages, **options)


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize(("bits", "lloyd_max"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_scalar_distortion_is_that_of_lloyd_max_quantizers(bits: int, lloyd_max: float) -> None:
    assert abs(10 * math.log10(stage_distortion(1, bits) / lloyd_max)) < 0.3


@pytest.mark.parametrize(("v", "bits"), [(2, 2), (2, 4), (2, 6), (3, 6), (4, 4), (4, 8), (6, 6)])
def test_vector_distortion_is_that_of_simulated_codebooks(v: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(v)
    points = torch.randn(max(6000, 100 << bits), v, generator=generator)
    error = kmeans(points, torch.ones(len(points)), 1 << bits, generator=generator, iterations=15).error
    fitted = stage_distortion(v, bits) * (1 - 2**bits / len(points))
    assert abs(10 * math.log10(fitted / error)) < 0.35


@pytest.mark.parametrize("v", VECTOR_LENGTHS)
def test_distortion_falls_with_every_bit_and_starts_at_the_variance(v: int) -> None:
    values = [stage_distortion(v, bits) for bits in range(17)]
    assert values[0] == pytest.approx(1.0)
    assert all(after < before for before, after in itertools.pairwise(values))
    # No quantizer beats the rate-distortion bound.
    assert all(value >= 2 ** (-2 * bits / v) * (1 - 1e-9) for bits, value in enumerate(values))


def test_small_matrices_are_predicted_to_fit_better_and_int8_books_worse() -> None:
    assert predicted_distortion(_layout(4, 8, shape=(64, 64))) < predicted_distortion(_layout(4, 8))
    assert predicted_distortion(_layout(4, 8, codebook_dtype="int8")) > predicted_distortion(_layout(4, 8))
    assert predicted_distortion(_layout(4, 8, 4)) < predicted_distortion(_layout(4, 8))
    # A codebook of the same index bits is better in one piece.
    assert predicted_distortion(_layout(4, 8)) < predicted_distortion(_layout(4, 4, 4))


def test_stage_choices_are_codebooks_that_do_not_store_the_matrix() -> None:
    single = list(stage_choices(1000, 4, 3, 1, 12))
    assert single == [(b,) for b in range(1, 9)]  # half of 1000 vectors: 2^8
    assert list(stage_choices(10**6, 4, 3, 1, 12))[-1] == (12,)
    assert list(stage_choices(10**6, 4, 3, 1, 10))[-1] == (10,)
    pairs = list(stage_choices(10**6, 4, 3, 2, 12))
    assert all(main >= residual >= 1 and main + residual <= 12 for main, residual in pairs)
    assert (6, 6) in pairs
    for vectors in (1, 2, 3):
        assert list(stage_choices(vectors, 1, 0.5, 1, 12)) in ([], [(1,)])


# ---------------------------------------------------------------- the budget


@settings(max_examples=25, deadline=None)
@given(shapes=_SHAPES, bits=st.floats(1.0, 6.0))
def test_a_models_matrices_stay_within_the_budget_together(
    shapes: list[tuple[tuple[int, int], bool]], bits: float
) -> None:
    layouts = get("vptq")(bits=bits).layouts(shapes)
    assert [(layout.shape, layout.bias) for layout in layouts] == shapes
    weights = sum(layout.weights for layout in layouts)
    assert _size(layouts) <= bits * weights
    # Most of it is used, too: single matrices have few choices between two codebook sizes.
    assert _size(layouts) >= 0.75 * min(bits, 4) * weights


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("shape", [(576, 576), (1536, 8960), (64, 2000)])
def test_more_bits_never_predict_more_error(shape: tuple[int, int], count: int) -> None:
    budgets = np.linspace(0.6, 5.0, 23)
    errors = [_distortion(get("vptq")(bits=float(bits)).layouts([(shape, False)] * count)) for bits in budgets]
    # For a single matrix the choice is exact.
    allowed = 1e-9 if count == 1 else _TOLERANCE
    assert all(after <= before * (1 + allowed) for before, after in itertools.pairwise(errors))
    assert errors[-1] < errors[0] / 20


@settings(max_examples=25, deadline=None)
@given(shapes=_FEW_SMALL_SHAPES, bits=st.floats(1.0, 4.0), more=st.floats(0.001, 1.0))
@example(shapes=[((403, 113), False), ((64, 115), False)], bits=4.0, more=0.125)
def test_a_larger_budget_never_predicts_more_error_for_a_model(
    shapes: list[tuple[tuple[int, int], bool]], bits: float, more: float
) -> None:
    """The larger budget comes with more candidates, too. A norm is decided by the budget: none, to compare like."""
    small, large = (get("vptq")(bits=b, norm=False).layouts(shapes) for b in (bits, bits + more))
    assert _distortion(large) <= _distortion(small) * (1 + _TOLERANCE)


@pytest.mark.parametrize("method", ["vptq", "gptvq"])
def test_a_larger_budget_never_predicts_more_error_for_thirty_blocks(method: str) -> None:
    power = get(method)().size_power
    errors = []
    for bits in (2.0, 2.001, 2.01, 2.1, 2.25, 2.26, 3.0, 3.003):
        layouts = get(method)(bits=bits).layouts(_BLOCK * 30)
        assert _size(layouts) <= bits * sum(layout.weights for layout in layouts)
        errors.append(_distortion(layouts, power))
    assert all(after <= before * (1 + _TOLERANCE) for before, after in itertools.pairwise(errors))


@pytest.mark.parametrize("bits", [1.5, 2.0, 2.28, 3.0, 4.0])
@pytest.mark.parametrize("shape", [(256, 256), (576, 576), (251, 202)])
def test_no_better_layout_of_a_single_matrix_fits_the_budget(shape: tuple[int, int], bits: float) -> None:
    method = get("vptq")(bits=bits)
    chosen = method.layout(shape)
    fitting = [c for c in method.candidates(shape, False) if c.bits() <= bits * c.weights]
    best = min(fitting, key=predicted_distortion)
    assert predicted_distortion(chosen) == pytest.approx(predicted_distortion(best)), f"{best} fits"


def _random_tables(seed: int) -> list[list[Layout]]:
    rng = np.random.default_rng(seed)
    tables = []
    for _ in range(3):
        shape = (int(rng.integers(100, 400)), int(rng.integers(100, 400)))
        sizes = rng.choice(40, size=5, replace=False)
        tables.append([_layout(int(1 + s % 4), int(1 + s // 4), shape=shape) for s in sizes])
    return tables


@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("seed", range(12))
def test_the_allocation_is_the_best_of_all_combinations(seed: int, power: float) -> None:
    """Exhaustive search over three matrices, and over four of which two are equal."""
    tables = _random_tables(seed)
    for chosen_from in (tables, [*tables, tables[seed % 3]]):
        weights = sum(options[0].weights for options in chosen_from)
        combinations = [(_size(list(c)), _distortion(list(c), power)) for c in itertools.product(*chosen_from)]
        for bits in np.quantile([size / weights for size, _ in combinations], [0.02, 0.1, 0.4, 0.7, 0.95]):
            chosen = _allocate(chosen_from, float(bits), power)
            assert _size(chosen) <= bits * weights
            best = min(error for size, error in combinations if size <= bits * weights)
            assert _distortion(chosen, power) <= best * (1 + _TOLERANCE)


def test_a_search_that_outgrows_its_memory_still_keeps_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [((200 + 37 * i, 300 - 11 * i), False) for i in range(8)]
    for bits in (2.0, 3.5):
        best = get("vptq")(bits=bits).layouts(shapes)
        with monkeypatch.context() as patch:
            patch.setattr(_choose, "_STATES", 1)
            quick = get("vptq")(bits=bits).layouts(shapes)
        assert _size(quick) <= bits * sum(layout.weights for layout in quick)
        assert _distortion(best) <= _distortion(quick) * (1 + _TOLERANCE)
        assert _distortion(quick) < _distortion(best) * 1.1


def test_candidates_that_are_worse_and_no_smaller_change_nothing() -> None:
    tables = _random_tables(0)
    # The same codebooks in float32 cost more and, in the model, are as good as in float16.
    more = [[*options, *(replace(layout, codebook_dtype="float32") for layout in options)] for options in tables]
    for bits in (2.0, 3.0, 5.0):
        assert _allocate(more, bits) == _allocate(tables, bits)


def test_every_budget_that_a_candidate_meets_exactly_is_met() -> None:
    tables = [[_layout(2, b, codebook_dtype="int8") for b in range(1, 10)]]
    for layout in tables[0]:
        assert _allocate(tables, layout.bits_per_weight) == [layout]


@pytest.mark.parametrize("method", ["vptq", "gptvq"])
def test_equal_matrices_get_few_different_layouts_in_runs_that_fill_the_budget(method: str) -> None:
    layouts = get(method)(bits=2.4).layouts([((576, 576), False)] * 30)
    assert 2.39 < _size(layouts) / sum(layout.weights for layout in layouts) <= 2.4
    runs = [list(run) for _, run in itertools.groupby(layouts)]
    assert len(runs) == len(set(layouts)) <= 4
    assert sum(sorted(map(len, runs))[-2:]) >= 28, "two layouts but for a few matrices"
    sizes = [layout.bits() for layout in layouts]
    assert sizes == sorted(sizes, reverse=True), "the first matrices get the larger layouts"


def test_thousands_of_matrices_fill_the_budget() -> None:
    layouts = get("vptq")(bits=2.25).layouts(_BLOCK * 400)
    assert 2.2499 < _size(layouts) / sum(layout.weights for layout in layouts) <= 2.25
    for shape in {shape for shape, _ in _BLOCK}:
        assert len({layout for layout in layouts if layout.shape == shape}) <= 4


def test_matrices_too_small_for_the_budget_get_their_smallest_layout() -> None:
    for shape in ((1, 1), (4, 4), (300, 1)):
        method = get("vptq")(bits=1.0)
        smallest = min(c.bits() for c in method.candidates(shape, False))
        assert method.layout(shape).bits() == smallest > shape[0] * shape[1]


def test_no_matrices_no_layouts() -> None:
    assert get("vptq")().layouts([]) == []


def test_small_models_get_small_codebooks() -> None:
    for shape in ((576, 576), (1536, 576), (192, 576), (288, 288)):
        layout = get("vptq")(bits=2.25).layout(shape)
        assert max(layout.stages) <= 12
        books = layout.bits() - layout.weights * layout.nominal_bits
        assert books < 0.2 * layout.bits()
