"""The choice of vector length and codebook sizes: its model of the distortion, its budget, its optimality."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.algorithms import get
from octavo.algorithms._choose import (
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


def _size(layouts: list[Layout]) -> int:
    return sum(layout.bits() for layout in layouts)


def _distortion(layouts: list[Layout]) -> float:
    return sum(predicted_distortion(layout) * layout.weights for layout in layouts)


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
    assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(errors))
    assert errors[-1] < errors[0] / 20


@settings(max_examples=12, deadline=None, derandomize=True)
@given(shapes=_SHAPES, bits=st.floats(1.0, 4.0), more=st.floats(0.01, 1.0))
def test_a_larger_budget_never_predicts_more_error_for_a_model(
    shapes: list[tuple[tuple[int, int], bool]], bits: float, more: float
) -> None:
    small, large = (get("vptq")(bits=b, norm=False).layouts(shapes) for b in (bits, bits + more))
    # How the last bits of the budget fall between matrices of different sizes may cost a little.
    assert _distortion(large) <= _distortion(small) * 1.05


@pytest.mark.parametrize("bits", [1.5, 2.0, 2.28, 3.0, 4.0])
@pytest.mark.parametrize("shape", [(256, 256), (576, 576), (251, 202)])
def test_no_better_layout_of_a_single_matrix_fits_the_budget(shape: tuple[int, int], bits: float) -> None:
    method = get("vptq")(bits=bits)
    chosen = method.layout(shape)
    fitting = [c for c in method._candidates(shape, False) if c.bits() <= bits * c.weights]  # type: ignore[attr-defined]
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


@pytest.mark.parametrize("seed", range(12))
def test_the_allocation_is_near_the_best_of_all_combinations(seed: int) -> None:
    """Exhaustive search over three matrices; a price can miss the optimum by one matrix's step, not more."""
    tables = _random_tables(seed)
    weights = sum(options[0].weights for options in tables)
    combinations = [list(c) for c in itertools.product(*tables)]
    sizes = sorted(_size(c) / weights for c in combinations)
    for bits in np.quantile(sizes, [0.1, 0.4, 0.7]):
        chosen = allocate(tables, float(bits))
        assert _size(chosen) <= bits * weights
        best = min((c for c in combinations if _size(c) <= bits * weights), key=_distortion)
        step = max(predicted_distortion(a) * a.weights for a in chosen)
        assert _distortion(chosen) <= _distortion(best) + step


def test_every_budget_that_a_candidate_meets_exactly_is_met() -> None:
    tables = [[_layout(2, b, codebook_dtype="int8") for b in range(1, 10)]]
    for layout in tables[0]:
        assert allocate(tables, layout.bits_per_weight) == [layout]


def test_equal_matrices_get_few_different_layouts_that_fill_the_budget() -> None:
    layouts = get("vptq")(bits=2.4).layouts([((576, 576), False)] * 30)
    assert len(set(layouts)) <= 3
    assert 2.3 < _size(layouts) / sum(layout.weights for layout in layouts) <= 2.4


def test_matrices_too_small_for_the_budget_get_their_smallest_layout() -> None:
    for shape in ((1, 1), (4, 4), (300, 1)):
        method = get("vptq")(bits=1.0)
        smallest = min(c.bits() for c in method._candidates(shape, False))  # type: ignore[attr-defined]
        assert method.layout(shape).bits() == smallest > shape[0] * shape[1]


def test_no_matrices_no_layouts() -> None:
    assert get("vptq")().layouts([]) == []


def test_small_models_get_small_codebooks() -> None:
    for shape in ((576, 576), (1536, 576), (192, 576), (288, 288)):
        layout = get("vptq")(bits=2.25).layout(shape)
        assert max(layout.stages) <= 12
        books = layout.bits() - layout.weights * layout.nominal_bits
        assert books < 0.2 * layout.bits()
