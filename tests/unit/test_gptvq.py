"""GPTVQ: its codes and codebooks against float64, its layouts, and what each of its parts is good for."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from octavo._core.errors import NumericalError, UsageError
from octavo.algorithms import get, preset, registry
from octavo.algorithms._books import BookMap, least_squares
from octavo.layout import BlockScale, Layout
from octavo.math.hessian import proxy_loss
from octavo.stored import index_dtype_to_int64
from octavo.weight import VQWeight
from oracle import feedback
from oracle.gptvq import Tiles, decode, gptvq, least_squares_books
from oracle.matrices import Case, activations, normal_weight, second_moment

#: One pass, nothing but the choice of codes under codebooks that are stored as they were fitted.
_PLAIN: dict[str, Any] = {
    "bits": 16,
    "vector_length": 2,
    "centroids": 16,
    "group_rows": 16,
    "group_columns": 32,
    "scale_block": 0,
    "metric": "block",
    "exact_feedback": True,
    "update": "none",
    "rounds": 0,
    "codebook_dtype": "float32",
    "side_dtype": "float32",
}


def _case(
    out: int = 40, inp: int = 70, seed: int = 0, correlation: float = 0.7, spread: float = 0.0, faint: bool = False
) -> Case:
    """``spread``: how much rows differ in size; ``faint``: every second 8 columns are a tenth as large."""
    rng = np.random.default_rng(seed)
    weight = normal_weight(rng, out, inp) * np.exp(spread * rng.normal(size=(out, 1)))
    if faint:
        weight[:, np.arange(inp) // 8 % 2 == 1] /= 10
    return Case(weight.astype(np.float32), second_moment(activations(rng, inp, correlation=correlation)))


def _quantize(case: Case, **options: Any) -> VQWeight:
    return get("gptvq")(**options).quantize(torch.from_numpy(case.weight), hessian=torch.from_numpy(case.hessian))


def _loss(case: Case, result: VQWeight) -> float:
    return feedback.proxy_loss(case.weight, result.dequantize().double().numpy(), case.hessian)


def _tiles(layout: Layout) -> Tiles:
    assert layout.tile is not None
    return Tiles(*layout.tile, layout.vector_length)


def _books(result: VQWeight) -> np.ndarray:
    layout = result.layout
    return result.codebook(0).double().numpy().reshape(*layout.books_shape, -1, layout.vector_length)


def _scales(result: VQWeight) -> np.ndarray | None:
    block = result.layout.block_scale
    if block is None:
        return None
    return result.block_scales().double().numpy()[:, np.arange(result.layout.shape[1]) // block.columns]


# ---------------------------------------------------------------- against float64

_VARIANTS: dict[str, dict[str, Any]] = {
    "block": {},
    "diagonal": {"metric": "diagonal"},
    "no-metric": {"metric": "none"},
    "inexact": {"exact_feedback": False},
    "inexact-diagonal": {"exact_feedback": False, "metric": "diagonal", "vector_length": 4},
    "scalars": {"vector_length": 1, "centroids": 4},
    "fours": {"vector_length": 4},
    "eights": {"vector_length": 8},
    "scales": {"scale_block": 16},
    "scales-once": {"scale_block": 16, "refresh": False},
    "scales-of-eights": {"scale_block": 16, "vector_length": 8, "scale_norm": "max"},
    "scales-wider-than-tiles": {"scale_block": 48, "scale_norm": "max"},
    "one-book": {"group_rows": 1000, "group_columns": 0},
    "single-rows": {"group_rows": 1, "vector_length": 1, "centroids": 4},
    "mahalanobis": {"init": "mahalanobis"},
    "damping": {"damping": 0.2},
    "permuted": {"permute": True},
    "permuted-scales": {"permute": True, "scale_block": 24, "vector_length": 4},
    "int8": {"codebook_dtype": "int8"},
    "int4": {"codebook_dtype": "int4"},
    "float16": {"codebook_dtype": "float16", "side_dtype": "float16", "scale_block": 32},
    "bfloat16": {"codebook_dtype": "bfloat16", "side_dtype": "bfloat16", "scale_block": 32},
}


@pytest.mark.parametrize("shape", [(40, 70), (17, 33), (12, 5), (1, 24), (9, 1)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("variant", _VARIANTS)
def test_every_code_is_the_nearest_one_in_the_float64_recursion(variant: str, shape: tuple[int, int]) -> None:
    """Ragged tiles, vectors that are cut by the last column, and vectors longer than the matrix included."""
    options = _PLAIN | _VARIANTS[variant]
    case = _case(*shape)
    result = _quantize(case, **options)
    layout = result.layout
    assert (layout.vector_length, layout.stages) == (
        options["vector_length"],
        (options["centroids"].bit_length() - 1,),
    )
    order = np.arange(shape[1])
    if options.get("permute"):
        order = index_dtype_to_int64(result.tensors["permutation"]).numpy()
        assert bool((np.diff(np.diag(case.hessian)[order]) <= 0).all())
    codes = result.codes()[0].numpy()
    replay = gptvq(
        case.weight[:, order],
        case.hessian[np.ix_(order, order)],
        _books(result),
        _tiles(layout),
        metric=options["metric"],
        coupled=options["exact_feedback"],
        scales=_scales(result),
        follow=codes,
        damping=options.get("damping", 0.01),
    )
    assert replay.worst < 1e-5
    assert replay.different <= max(codes.size // 200, 1)
    values = result.dequantize().double().numpy()[:, order]
    np.testing.assert_allclose(values, replay.values, rtol=0, atol=1e-5 * np.abs(case.weight).max())


@pytest.mark.parametrize("variant", ["block", "no-metric", "scalars", "fours", "eights", "scales", "one-book"])
@pytest.mark.parametrize("shape", [(40, 70), (17, 33)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_least_squares_reaches_the_minimum_for_its_codes(variant: str, shape: tuple[int, int]) -> None:
    options = _PLAIN | _VARIANTS[variant]
    case = _case(*shape)
    before = _quantize(case, **options)
    after = _quantize(case, **options | {"update": "least_squares"})
    codes, tiles, scales = before.codes()[0].numpy(), _tiles(before.layout), _scales(before)
    assert np.array_equal(after.codes()[0].numpy(), codes)
    books = least_squares_books(case.weight, case.hessian, codes, tiles, _books(before), scales)
    start = _loss(case, before)

    def loss(values: np.ndarray) -> float:
        return feedback.proxy_loss(case.weight, values, case.hessian)

    least = loss(decode(codes, books, tiles, shape[1], scales))
    assert least < start
    # The method stops when nearly all is gained; given more steps, the same function goes down to the minimum.
    assert least <= _loss(case, after) * (1 + 1e-5) < least + 0.05 * (start - least)
    rows, vectors = codes.shape
    across = np.arange(vectors) * tiles.width // tiles.columns
    book = np.arange(rows)[:, None] // tiles.rows * before.layout.books_shape[1] + across
    chart = BookMap(
        torch.from_numpy(book * options["centroids"] + codes),
        None if scales is None else torch.from_numpy(scales).float(),
        shape[1],
    )
    flat = before.codebook(0).reshape(-1, tiles.width)
    weight, hessian = torch.from_numpy(case.weight), torch.from_numpy(case.hessian)
    np.testing.assert_array_equal(chart.expand(flat), before.dequantize())
    solved = chart.expand(least_squares(flat, chart, weight, hessian, steps=200, tolerance=1e-6))
    # Where there are about as many centroids as vectors the loss is nearly nothing, as is what is missing.
    assert loss(solved.double().numpy()) == pytest.approx(least, rel=1e-5, abs=1e-5 * start)


@pytest.mark.parametrize("dtype", ["float32", "int8", "int4"])
@pytest.mark.parametrize("update", ["least_squares", "adam"])
@pytest.mark.parametrize("variant", ["block", "scalars", "scales", "permuted"])
def test_an_update_never_raises_the_loss(variant: str, update: str, dtype: str) -> None:
    for seed in range(3):
        case = _case(24, 40, seed)
        options = _PLAIN | _VARIANTS[variant] | {"codebook_dtype": dtype}
        before = _loss(case, _quantize(case, **options))
        after = _loss(case, _quantize(case, **options | {"update": update}))
        assert after <= before * (1 + 1e-6)
        if dtype == "float32":
            assert after < before * (0.995 if update == "least_squares" else 1)


@pytest.mark.parametrize("options", [{}, {"scale_block": 16}, {"vector_length": 4}, {"update": "adam"}])
def test_more_rounds_never_lose_more_and_mostly_gain(options: dict[str, Any]) -> None:
    gained = 0
    for seed in range(3):
        case = _case(24, 40, seed)
        losses = [
            _loss(case, _quantize(case, **_PLAIN | {"update": "least_squares"} | options | {"rounds": rounds}))
            for rounds in range(4)
        ]
        assert all(later <= earlier * (1 + 1e-5) for earlier, later in pairwise(losses))
        gained += losses[-1] < losses[0]
    assert gained >= 2


# ---------------------------------------------------------------- codebooks as stored


@pytest.mark.parametrize("dtype", ["auto", "int8", "int4", "float16", "bfloat16", "float32"])
def test_codebooks_are_stored_as_asked(dtype: str) -> None:
    case = _case()
    result = _quantize(case, **_PLAIN | {"codebook_dtype": dtype, "update": "least_squares", "side_dtype": "float16"})
    result.validate()
    assert result.layout.codebook_dtype == ("int8" if dtype == "auto" else dtype)
    assert result.bits() == result.layout.bits()
    exact = _loss(case, _quantize(case, **_PLAIN | {"update": "least_squares"}))
    # Small differences change a code, and that all the codes after it.
    assert _loss(case, result) < exact * (1.6 if dtype == "int4" else 1.15)


@pytest.mark.parametrize("update", ["none", "least_squares", "adam"])
@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_low_rank_codebooks_save_bits_and_lose_little(dtype: str, update: str) -> None:
    case = _case(48, 64)
    options = _PLAIN | {
        "vector_length": 1,
        "centroids": 8,
        "group_rows": 1,
        "codebook_dtype": dtype,
        "update": update,
        "side_dtype": "float16",
    }
    full, low = _quantize(case, **options), _quantize(case, **options | {"svd_rank": 0.5})
    low.validate()
    assert low.layout.codebook_rank == 4
    assert low.tensors["codebook_coefficient_0"].shape == (48 * 2, 4)
    assert low.tensors["codebook_basis_0"].shape == (4, 8, 1)
    assert low.bits() == low.layout.bits() < full.bits()
    assert _loss(case, full) < _loss(case, low) < 2 * _loss(case, full)
    # The codes are the nearest ones under the codebooks that are stored.
    tiles, codes = _tiles(low.layout), low.codes()[0].numpy()
    replay = gptvq(case.weight, case.hessian, _books(low), tiles, follow=codes)
    assert replay.worst < 1e-5


@pytest.mark.parametrize("update", ["none", "adam"])
def test_a_rank_above_the_number_of_codebooks_loses_nothing(update: str) -> None:
    case = _case(3, 60)
    options = _PLAIN | {"vector_length": 1, "centroids": 16, "group_rows": 1, "group_columns": 0, "update": update}
    low = _quantize(case, **options | {"svd_rank": 0.5})
    low.validate()
    assert (low.layout.books, low.layout.codebook_rank) == (3, 8)
    assert not bool(low.tensors["codebook_basis_0"][3:].any())
    assert _loss(case, low) < 1.1 * _loss(case, _quantize(case, **options))


# ---------------------------------------------------------------- layouts

_SHAPES = [(64, 64), (128, 96), (100, 130), (576, 576), (1536, 576), (7, 256), (256, 40), (251, 202), (1, 256)]
_SHAPES += [(16, 16), (256, 1), (1, 1), (3, 5)]


def _least(shape: tuple[int, int]) -> float:
    """Bits per weight of the smallest layout with a single codebook."""
    return min(
        Layout(
            shape=shape,
            direction="row",
            vector_length=v,
            stages=(1,),
            codebook_dtype="int8",
            tile=(shape[0], -(-shape[1] // v) * v),
        ).bits_per_weight
        for v in (1, 2, 4, 8)
    )


@pytest.mark.parametrize("bits", [2.0, 2.125, 2.25, 2.5, 3, 4])
def test_chosen_layouts_keep_the_limit_wherever_that_is_possible(bits: float) -> None:
    for shape in _SHAPES:
        layout = get("gptvq")(bits=bits).layout(shape)
        assert layout.bits_per_weight <= bits or _least(shape) > bits, shape
        assert layout == get("gptvq")(bits=bits).layout(shape)
        assert layout.direction == "row"
        assert layout.shape == shape
        assert layout.codebook_dtype == "int8"
        assert layout.vector_length in (1, 2, 4, 8)
        assert layout.tile is not None
        assert layout.tile[1] % layout.vector_length == 0
        assert layout.block_scale is None or layout.block_scale.columns % layout.vector_length == 0
        assert Layout.from_dict(layout.to_dict()) == layout


@pytest.mark.parametrize("v", [1, 2, 4, 8])
def test_a_vector_length_that_is_given_is_kept_within_the_limit(v: int) -> None:
    for shape in [(128, 96), (576, 576), (251, 202)]:
        layout = get("gptvq")(bits=2.25, vector_length=v).layout(shape)
        assert layout.vector_length == v
        assert layout.bits_per_weight <= 2.25


@pytest.mark.parametrize("bits", [2.125, 3])
def test_a_models_matrices_share_the_limit(bits: float) -> None:
    shapes = [((576, 576), False), ((192, 576), False), ((1536, 576), True), ((576, 1536), False)] * 3
    layouts = get("gptvq")(bits=bits).layouts(shapes)
    total, weights = sum(x.bits() for x in layouts), sum(x.weights for x in layouts)
    assert 0.97 * bits * weights < total <= bits * weights
    assert [(x.shape, x.bias) for x in layouts] == shapes
    assert layouts == get("gptvq")(bits=bits).layouts(shapes)


def test_explicit_sizes_are_the_sizes_of_the_layout() -> None:
    options: dict[str, Any] = {"vector_length": 2, "centroids": 64, "group_rows": 30, "group_columns": 64}
    layout = get("gptvq")(**options, bits=8, scale_block=32, permute=True).layout((120, 128))
    assert layout == Layout(
        shape=(120, 128),
        vector_length=2,
        stages=(6,),
        direction="row",
        codebook_dtype="int8",
        tile=(30, 64),
        block_scale=BlockScale(32, 0, 4),
        permuted=True,
    )
    # Evened out: 100 rows are 4 groups of 25 rather than 3 of 30 and one of 10.
    assert get("gptvq")(**options, bits=8, scale_block=0).layout((100, 128)).tile == (25, 64)
    assert get("gptvq")(**options | {"group_columns": 0}, bits=8).layout((30, 127)).tile == (30, 128)
    cut = get("gptvq")(vector_length=8, centroids=16, group_rows=4, scale_block=12, bits=8).layout((8, 20))
    assert cut.block_scale == BlockScale(16, 0, 4)
    assert cut.tile == (4, 24)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vector_length": 3}, "vector_length wanted one of None, 1, 2, 4, 8; got 3"),
        ({"vector_length": 0}, "vector_length wanted one of"),
        ({"vector_length": True}, "vector_length wanted one of"),
        ({"centroids": 100}, r"centroids wanted a power of two, 2\.\.65536, got 100"),
        ({"centroids": 1}, "centroids wanted a power of two"),
        ({"centroids": 1 << 17}, "centroids wanted a power of two"),
        ({"centroids": 256.0}, "centroids wanted a power of two"),
        ({"group_rows": 0}, "group_rows wanted a whole number >= 1, got 0"),
        ({"group_rows": 2.0}, "group_rows wanted a whole number"),
        ({"group_columns": -1}, "group_columns wanted a whole number >= 0, got -1"),
        ({"scale_block": 4}, "scale_block wanted 0 or a whole number >= 8, got 4"),
        ({"scale_block": 16.0}, "scale_block wanted"),
        ({"scale_norm": "l1"}, "scale_norm wanted one of max, rms; got 'l1'"),
        ({"refresh": 1}, "refresh wanted one of True, False; got 1"),
        ({"exact_feedback": "no"}, "exact_feedback wanted one of"),
        ({"permute": 0}, "permute wanted one of"),
        ({"init": "cdf"}, "init wanted one of"),
        ({"metric": "hessian"}, "metric wanted one of block, diagonal, none; got 'hessian'"),
        ({"iterations": 0}, "iterations wanted a whole number >= 1"),
        ({"rounds": -1}, "rounds wanted a whole number >= 0"),
        ({"update": "sgd"}, "update wanted one of"),
        ({"codebook_dtype": "grid"}, "codebook_dtype wanted one of auto, int8"),
        ({"svd_rank": 0.5}, "give vector_length=1 as well"),
        ({"svd_rank": 1.0, "vector_length": 1}, "0 <= share < 1, got 1.0"),
        ({"svd_rank": -0.1, "vector_length": 1}, "svd_rank wanted"),
        ({"svd_rank": float("nan"), "vector_length": 1}, "svd_rank wanted"),
        ({"svd_rank": 0.5, "vector_length": 1, "codebook_dtype": "int4"}, "not int4"),
        ({"damping": 0}, "damping wanted"),
        ({"damping": float("nan")}, "damping wanted"),
        ({"bits": 0.1}, "bits wanted"),
        ({"grouprows": 4}, "unknown option 'grouprows'.*group_rows"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        get("gptvq")(**options)


def test_bits_that_no_codebook_can_keep_are_refused_by_shape() -> None:
    with pytest.raises(UsageError, match=r"no codebooks fit a matrix of \(64, 64\).*bits 0.5"):
        get("gptvq")(bits=0.5, vector_length=1).layout((64, 64))


# ---------------------------------------------------------------- hard matrices


@pytest.mark.parametrize("v", [1, 2, 4, 8])
@pytest.mark.parametrize("scale_block", [0, 16])
@pytest.mark.parametrize("kind", ["zero", "constant", "row", "column", "one", "zero-rows"])
def test_degenerate_matrices_are_stored_nearly_exactly(kind: str, scale_block: int, v: int) -> None:
    shape = {"row": (1, 40), "column": (40, 1), "one": (1, 1)}.get(kind, (24, 40))
    case = _case(*shape)
    if kind == "zero":
        case.weight[:] = 0
    elif kind == "constant":
        case.weight[:] = -0.3
    elif kind == "zero-rows":
        case.weight[::2] = 0
    options = {"bits": 16, "vector_length": v, "centroids": 64, "scale_block": scale_block, "codebook_dtype": "int8"}
    result = _quantize(case, **options)
    result.validate()
    values = result.dequantize()
    assert bool(torch.isfinite(values).all())
    if kind == "zero":
        assert not bool(values.any())
    # One codebook for everything, and 64 centroids: exact up to int8 where there are few distinct vectors.
    limit = {"zero-rows": 0.3, "row": 0.05}.get(kind, 1e-4)
    assert _loss(case, result) < limit
    if kind == "zero-rows":
        rms = values.square().mean(dim=1).sqrt()
        assert float(rms[::2].max()) < 0.2 * float(rms[1::2].mean())


def test_dead_inputs_cost_the_live_ones_nothing() -> None:
    rng = np.random.default_rng(2)
    x = activations(rng, 64)
    dead = rng.permutation(64)[:16]
    x[:, dead] = 0
    case = Case(normal_weight(rng, 32, 64), second_moment(x))
    wild = case.weight.copy()
    wild[:, dead] *= 3
    for options in ({"metric": "block"}, {"metric": "diagonal"}, {"scale_block": 16}):
        losses = [
            _loss(c, _quantize(c, **_PLAIN | {"update": "least_squares"} | options))
            for c in (case, Case(wild, case.hessian))
        ]
        assert max(losses) < 0.1
        assert bool(torch.isfinite(_quantize(case, **_PLAIN | options).dequantize()).all())


def test_a_hessian_of_low_rank_is_used_to_the_full() -> None:
    """From 16 tokens there are only 16 directions in which an error shows; 48 columns are free to make up for it."""
    rng = np.random.default_rng(3)
    case = Case(normal_weight(rng, 32, 64), second_moment(activations(rng, 64, tokens=16)))
    plain = Case(case.weight, np.eye(64, dtype=np.float32))
    options = _PLAIN | {"update": "least_squares"}
    assert _loss(case, _quantize(case, **options)) < 0.3 * _loss(case, _quantize(plain, **options))
    result = _quantize(Case(case.weight, np.ones((64, 64), np.float32)), **options)
    assert bool(torch.isfinite(result.dequantize()).all())


def test_without_a_hessian_it_is_plain_vector_quantization() -> None:
    case = _case(32, 48)
    weight = torch.from_numpy(case.weight)
    result = get("gptvq")(**_PLAIN | {"group_columns": 0}).quantize(weight)
    identity = _quantize(Case(case.weight, np.eye(48, dtype=np.float32)), **_PLAIN | {"group_columns": 0})
    assert torch.equal(result.dequantize(), identity.dequantize())
    codes, books = result.codes()[0], result.codebook(0)
    for group, rows in enumerate((slice(0, 16), slice(16, 32))):
        gaps = (weight[rows].reshape(-1, 1, 2) - books[group]).square().sum(dim=2)
        assert torch.equal(gaps.argmin(dim=1), codes[rows].reshape(-1))


# ---------------------------------------------------------------- the range of numbers


@pytest.mark.parametrize("norm", ["max", "rms"])
@pytest.mark.parametrize("size", [1e-24, 1e-9, 1e6, 1e20, 1e30])
def test_log2_scales_take_any_size_out_of_the_codebooks(size: float, norm: str) -> None:
    """float16 side data: the exponent of a scale is stored, not the scale."""
    case = _case(24, 40)
    sizes = {"vector_length": 2, "centroids": 16, "group_columns": 0, "scale_block": 16, "scale_norm": norm, "bits": 8}
    # The square of such weights is beyond float32, and with it the loss that updates go by: they must do no harm.
    here = _loss(case, _quantize(case, **sizes, update="none", rounds=0))
    result = _quantize(Case(case.weight * np.float32(size), case.hessian), **sizes)
    result.validate()
    there = feedback.proxy_loss(case.weight, result.dequantize().double().numpy() / size, case.hessian)
    assert there < 1.3 * here


@pytest.mark.parametrize("dtype", ["int8", "int4", "float16"])
@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_codebooks_out_of_the_range_of_float16_are_refused_by_name(size: float, dtype: str) -> None:
    case = _case(24, 40)
    options = {"vector_length": 2, "centroids": 16, "group_columns": 0, "scale_block": 0, "codebook_dtype": dtype}
    method = get("gptvq")(**options, bits=8)
    with pytest.raises(NumericalError, match=r"blocks\.1\.up: codebooks: .*float16"):
        method.quantize(torch.from_numpy(case.weight * np.float32(size)), name="blocks.1.up")
    if dtype != "float16":
        free = {**options, "side_dtype": "bfloat16", "bits": 8}
        large = _quantize(Case(case.weight * np.float32(size), case.hessian), **free)
        same = feedback.proxy_loss(case.weight, large.dequantize().double().numpy() / size, case.hessian)
        assert same == pytest.approx(_loss(case, _quantize(case, **free)), rel=0.2)


def test_row_sizes_that_differ_by_decades_fit_the_16_steps_of_a_scale() -> None:
    case = _case(32, 64)
    case.weight[:] *= np.logspace(-3, 3, 32, dtype=np.float32)[:, None]
    result = _quantize(
        case, **_PLAIN | {"scale_block": 16, "group_columns": 0, "group_rows": 32, "side_dtype": "float16"}
    )
    error = (result.dequantize() - torch.from_numpy(case.weight)).square().mean(dim=1)
    share = error / torch.from_numpy(case.weight).square().mean(dim=1)
    # A step is a factor of 2.5: no row is off by more than its square root.
    assert float(share.max()) < 1


# ---------------------------------------------------------------- what the parts are good for


def _mean_loss(cases: list[Case], **options: Any) -> float:
    return float(np.mean([_loss(case, _quantize(case, **options)) for case in cases]))


def test_longer_vectors_lose_less_at_the_same_true_bits() -> None:
    case = _case(384, 512)
    weight, hessian = torch.from_numpy(case.weight), torch.from_numpy(case.hessian)
    losses = []
    for v in (1, 2, 4):
        result = get("gptvq")(bits=2.25, vector_length=v).quantize(weight, hessian=hessian)
        assert 2.1 < result.bits_per_weight <= 2.25
        losses.append(proxy_loss(weight, result.dequantize(), hessian))
    assert losses[1] < 0.85 * losses[0]
    assert losses[2] < 0.85 * losses[1]


_PARTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "metric-over-none": ({"metric": "block"}, {"metric": "none"}, {}),
    "diagonal-over-none": ({"metric": "diagonal"}, {"metric": "none"}, {}),
    "block-over-diagonal": (
        {"metric": "block", "vector_length": 4},
        {"metric": "diagonal", "vector_length": 4},
        {"correlation": 0.9},
    ),
    "exact-feedback": (
        {"exact_feedback": True, "vector_length": 4},
        {"exact_feedback": False, "vector_length": 4},
        {"correlation": 0.9},
    ),
    "least-squares": ({"update": "least_squares"}, {"update": "none"}, {}),
    "adam": ({"update": "adam"}, {"update": "none"}, {}),
    "second-pass": ({"update": "least_squares", "rounds": 1}, {"update": "least_squares"}, {}),
    # Faint columns that take the errors of others are no longer faint.
    "refresh": (
        {"scale_block": 8, "refresh": True},
        {"scale_block": 8, "refresh": False},
        {"correlation": 0.95, "faint": True},
    ),
    "scales-of-rows": ({"scale_block": 32}, {"scale_block": 0}, {"spread": 1.0}),
    "more-steps": ({"iterations": 30}, {"iterations": 1}, {}),
}


@pytest.mark.parametrize("part", _PARTS)
def test_each_part_lowers_the_loss_where_it_should(part: str) -> None:
    using, without, kind = _PARTS[part]
    cases = [_case(64, 96, seed, **kind) for seed in range(6)]
    gain = _mean_loss(cases, **_PLAIN | without) / _mean_loss(cases, **_PLAIN | using)
    assert gain > 1.01


# ---------------------------------------------------------------- published settings


@pytest.mark.parametrize("name", sorted(registry.get("gptvq").presets))
def test_a_preset_is_what_its_name_says_and_its_true_bits_are_shown(name: str) -> None:
    method, options = preset(name)
    d, bits = name.removesuffix("-s64").split("-")
    layout = get(method)(**options).layout((4096, 4096))
    assert (layout.direction, layout.vector_length, options["bits"]) == ("row", int(d[0]), float(bits))
    assert layout.nominal_bits == int(float(bits))
    assert (layout.block_scale == BlockScale(64, 0, 4)) == name.endswith("-s64")
    # What the authors leave out: a float16 scale per codebook, and two numbers per column of scale blocks.
    assert layout.tile is not None
    books = 16 / (layout.tile[0] * layout.tile[1])
    assert layout.bits_per_weight == pytest.approx(float(bits) + books, abs=2e-4)


def test_an_unknown_preset_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UsageError, match=r"unknown preset '4d-2\.26'.*Did you mean '4d-2\.25'"):
        preset("4d-2.26")
