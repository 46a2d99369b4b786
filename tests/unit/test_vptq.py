"""VPTQ: its recursion against float64, and what each of its options does."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from octavo._core.errors import NumericalError, UsageError
from octavo.algorithms import get, preset, registry
from octavo.layout import Layout
from octavo.math.hessian import proxy_loss
from octavo.stored import index_dtype_to_int64
from octavo.weight import VQWeight
from oracle.matrices import Case, activations, families, family, normal_weight, second_moment
from oracle.vptq import Stored, recode


def _case(out: int = 60, inp: int = 44, seed: int = 0) -> Case:
    rng = np.random.default_rng(seed)
    return Case(normal_weight(rng, out, inp), second_moment(activations(rng, inp)))


def _quantize(case: Case, **options: Any) -> VQWeight:
    method = get("vptq")(**{"side_dtype": case.side_dtype, **options})
    return method.quantize(torch.from_numpy(case.weight), hessian=torch.from_numpy(case.hessian))


def _loss(case: Case, result: VQWeight) -> float:
    return proxy_loss(torch.from_numpy(case.weight), result.dequantize(), torch.from_numpy(case.hessian))


def _stored(result: VQWeight) -> Stored:
    layout = result.layout
    numbers = {name: t.double().numpy() for name, t in result.tensors.items() if t.is_floating_point()}
    stored = Stored(
        books=[result.codebook(stage).double().numpy() for stage in range(len(layout.stages))],
        codes=[codes.numpy() for codes in result.codes()],
        group_columns=layout.tile[1] if layout.tile else layout.main_columns,
        scale=numbers.get("channel_scale"),
        offset=numbers.get("channel_offset"),
    )
    if layout.outliers is not None:
        o = layout.outliers
        bits = np.unpackbits(result.tensors["outlier_indices"].numpy().view(np.uint8), axis=1, bitorder="little")
        codes = bits[:, : o.columns * o.bits].reshape(-1, o.columns, o.bits).astype(np.int64)
        stored.outlier_codes, stored.outlier_book = codes @ (1 << np.arange(o.bits)), numbers["outlier_codebook"]
    if layout.permuted:
        stored.permutation = index_dtype_to_int64(result.tensors["permutation"]).numpy()
    return stored


# ---------------------------------------------------------------- against float64

_PLAIN = {"vector_length": 4, "centroids": 32, "norm": False}
_VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scalar": {"vector_length": 1, "centroids": 4},
    "long-vectors": {"vector_length": 16, "centroids": 64},
    "float16-book": {"codebook_dtype": "float16"},
    "bfloat16-book": {"codebook_dtype": "bfloat16"},
    "float32-book": {"codebook_dtype": "float32"},
    "in-order": {"permute": False},
    "residual": {"residual_centroids": 16},
    "groups": {"groups": 3},
    "groups-in-order": {"groups": 3, "permute": False},
    "outliers": {"outlier_percent": 5},
    "norm": {"norm": True},
    "no-sweeps": {"sweeps": 0},
    "sampled": {"sample": 2},
    "damping": {"damping": 0.1},
    "several-columns-at-once": {"update_columns": 4, "residual_centroids": 8},
    "more-columns-than-a-lazy-span": {"update_columns": 300},
    "no-feedback": {"update_columns": 0, "residual_centroids": 8, "outlier_percent": 5},
    "everything": {
        "residual_centroids": 8,
        "groups": 2,
        "outlier_percent": 7,
        "outlier_vector_length": 2,
        "outlier_centroids": 64,
        "norm": True,
        "codebook_dtype": "float16",
        "sweeps": 2,
    },
}


@pytest.mark.parametrize("out", [60, 53, 3], ids=["whole-vectors", "cut-vector", "fewer-outputs-than-v"])
@pytest.mark.parametrize("variant", _VARIANTS)
def test_every_code_is_the_nearest_one_in_the_float64_recursion(variant: str, out: int) -> None:
    options = {**_PLAIN, **_VARIANTS[variant]}
    case = _case(out)
    result = _quantize(case, **options)
    replay = recode(
        case.weight,
        case.hessian,
        _stored(result),
        result.layout.permuted or options.get("permute", True),
        options.get("damping", 0.01),
        options.get("update_columns", 1),
    )
    assert replay.worst < 1e-5
    assert replay.different <= max(replay.total // 200, 1)
    scale = np.abs(case.weight).max()
    np.testing.assert_allclose(result.dequantize().double().numpy(), replay.values, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("name", families())
def test_the_recursion_is_right_on_every_family(name: str) -> None:
    case = family(name)
    result = _quantize(case, bits=2.28)
    replay = recode(case.weight, case.hessian, _stored(result))
    # Digits that a float32 factorisation loses on a nearly singular matrix.
    assert replay.worst < (1e-3 if name == "rank_1_hessian" else 3e-5)
    # float32 cannot tell equal vectors of equal rows from each other; real choices differ nearly never.
    assert replay.different <= max(replay.total // 100, 1) or case.exact
    np.testing.assert_allclose(
        result.dequantize().double().numpy(), replay.values, rtol=0, atol=1e-4 * max(np.abs(case.weight).max(), 1e-30)
    )


# ---------------------------------------------------------------- options


def test_explicit_sizes_are_the_sizes_of_the_layout() -> None:
    layout = get("vptq")(vector_length=6, centroids=64, residual_centroids=16, norm=False).layout((120, 40))
    assert layout == Layout(shape=(120, 40), vector_length=6, stages=(6, 4), codebook_dtype="int8")
    alone = get("vptq")(vector_length=3, centroids=128, residual_centroids=0).layout((120, 40))
    assert (alone.vector_length, alone.stages) == (3, (7,))
    chosen = get("vptq")(bits=3, vector_length=2, residual_centroids=0).layout((512, 512))
    assert (chosen.vector_length, len(chosen.stages)) == (2, 1)
    wanted = get("vptq")(bits=3, residual_centroids=16).layout((512, 512))
    assert wanted.stages[1:] == (4,)


@pytest.mark.parametrize("dtype", ["int8", "float16", "bfloat16", "float32"])
def test_codebooks_are_stored_as_asked(dtype: str) -> None:
    case = _case()
    result = _quantize(case, **_PLAIN, codebook_dtype=dtype)
    book = result.tensors["codebook_0"]
    assert str(book.dtype) == f"torch.{dtype}"
    assert ("codebook_scale_0" in result.tensors) == (dtype == "int8")
    if dtype == "int8":
        assert int(book.abs().max()) == 127
    assert _loss(case, result) == pytest.approx(
        _loss(case, _quantize(case, **_PLAIN, codebook_dtype="float32")), rel=0.1
    )


def test_the_quantization_order_is_stored_only_where_decoding_needs_it() -> None:
    case = _case()
    for options in ({}, {"residual_centroids": 8}, {"groups": 2, "permute": False}):
        result = _quantize(case, **_PLAIN, **options)
        assert not result.layout.permuted
        assert "permutation" not in result.tensors
        # The matrix comes out in the order of the channels: it resembles the weight.
        assert _loss(case, result) < 0.5
    order = torch.from_numpy(np.argsort(-np.diag(case.hessian), kind="stable").copy())
    for options in ({"groups": 2}, {"outlier_percent": 5}):
        result = _quantize(case, **_PLAIN, **options)
        assert torch.equal(index_dtype_to_int64(result.tensors["permutation"]), order)
        assert _loss(case, result) < 0.5


@pytest.mark.parametrize("name", ["well_conditioned", "few_tokens", "mixed_channels", "dead_columns"])
def test_quantizing_heavy_channels_first_loses_less(name: str) -> None:
    losses = [_loss(family(name), _quantize(family(name), **_PLAIN, permute=permute)) for permute in (True, False)]
    assert losses[0] < 0.95 * losses[1]


def test_outlier_columns_are_the_heaviest_and_are_coded_finer() -> None:
    case = _case(128, 80)
    result = _quantize(case, **_PLAIN, outlier_percent=4, outlier_vector_length=2, outlier_centroids=256)
    assert result.layout.outliers is not None
    assert result.layout.outliers.columns == 4  # 4 % of 80, rounded up
    heavy = torch.from_numpy(np.argsort(-np.diag(case.hessian))[:4].copy())
    error = (result.dequantize() - torch.from_numpy(case.weight)).square().mean(dim=0)
    rest = torch.ones(80, dtype=torch.bool)
    rest[heavy] = False
    assert float(error[heavy].max()) < 0.1 * float(error[rest].mean())
    grouped = get("vptq")(**_PLAIN, outlier_percent=4, groups=3).layout((128, 80))
    assert grouped.outliers is not None
    assert grouped.outliers.columns == 5, "what the division into groups leaves over"


def test_groups_have_codebooks_of_their_own_and_fit_better() -> None:
    case = family("well_conditioned")
    one, four = (_quantize(case, **_PLAIN, groups=groups) for groups in (1, 4))
    assert one.codebook(0).shape[0] == 1
    assert four.codebook(0).shape[0] == four.layout.books_shape[1] == 4
    assert _loss(case, four) < _loss(case, one)
    many = _quantize(_case(8, 3), **_PLAIN, groups=50)
    assert many.codebook(0).shape[0] <= 3


def test_a_residual_codebook_lowers_the_loss() -> None:
    case = family("well_conditioned")
    losses = [_loss(case, _quantize(case, **_PLAIN, residual_centroids=size)) for size in (0, 4, 32)]
    assert losses[0] > 1.2 * losses[1] > 1.44 * losses[2]


def test_the_norm_stores_mean_and_standard_deviation_of_every_column() -> None:
    case = _case()
    result = _quantize(case, **_PLAIN | {"norm": True})
    weight = case.weight.astype(np.float64)
    np.testing.assert_allclose(result.tensors["channel_offset"].numpy(), weight.mean(axis=0), rtol=0, atol=1e-4)
    np.testing.assert_allclose(result.tensors["channel_scale"].numpy(), weight.std(axis=0), rtol=2e-3)
    equal = _quantize(Case(np.full((20, 6), 0.5, np.float32), np.eye(6, dtype=np.float32)), **_PLAIN | {"norm": True})
    torch.testing.assert_close(equal.dequantize(), torch.full((20, 6), 0.5))


def test_the_norms_scale_is_folded_into_the_hessian() -> None:
    """Against the same codes for the normalised matrix under the Hessian as it was, on very different columns."""
    rng = np.random.default_rng(4)
    spread = np.exp(1.5 * rng.normal(size=96))
    # Channels that are large where the weight is small: without folding the order and the weights are all wrong.
    x = activations(rng, 96) / spread
    case = Case(
        (normal_weight(rng, 128, 96) * spread).astype(np.float32), second_moment(x * np.exp(rng.normal(size=96)))
    )
    options = {**_PLAIN, "side_dtype": "float32"}
    folded = _quantize(case, **options | {"norm": True})
    scale, offset = (folded.tensors[name].numpy() for name in ("channel_scale", "channel_offset"))
    unfolded = _quantize(Case((case.weight - offset) / scale, case.hessian), **options)
    plain = unfolded.dequantize() * torch.from_numpy(scale) + torch.from_numpy(offset)
    weight, hessian = torch.from_numpy(case.weight), torch.from_numpy(case.hessian)
    assert _loss(case, folded) < 0.9 * proxy_loss(weight, plain, hessian)


def test_the_norm_is_taken_by_itself_only_where_it_is_cheap() -> None:
    assert get("vptq")(bits=2.25).layout((256, 256)).channel_norm == "none"
    assert get("vptq")(bits=2.25).layout((4096, 256)).channel_norm == "input"
    assert get("vptq")(bits=2.25, norm=False).layout((4096, 256)).channel_norm == "none"


@pytest.mark.parametrize("name", ["few_tokens", "rank_1_hessian", "constant_rows", "ragged", "low"])
def test_sweeps_do_not_raise_the_loss(name: str) -> None:
    losses = [_loss(family(name), _quantize(family(name), bits=2.28, sweeps=sweeps)) for sweeps in range(4)]
    # Below 1e-5 of the weights it is the damping that is minimised.
    assert all(after <= max(before, 1e-5) for before, after in pairwise(losses)), losses


@pytest.mark.parametrize("name", ["few_tokens", "duplicate_columns"])
def test_a_sweep_pays(name: str) -> None:
    before, after = (_loss(family(name), _quantize(family(name), **_PLAIN, sweeps=sweeps)) for sweeps in (0, 1))
    assert after < 0.95 * before


def test_a_codebook_that_float16_cannot_hold_is_refused_by_name() -> None:
    case = _case()
    large = Case(case.weight * 1e7, case.hessian)
    with pytest.raises(NumericalError, match="matrix: codebook 0: .*float16"):
        _quantize(large, **_PLAIN, codebook_dtype="float16")
    with pytest.raises(NumericalError, match="matrix: column (means|scales): .*float16"):
        _quantize(large, **_PLAIN | {"norm": True})
    assert _loss(large, _quantize(large, **_PLAIN, side_dtype="bfloat16")) < 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vector_length": 0}, r"vector_length wanted 1\.\.16, got 0"),
        ({"vector_length": 17}, r"vector_length wanted 1\.\.16, got 17"),
        ({"centroids": 100}, r"centroids wanted a power of two, 2\.\.65536, got 100"),
        ({"centroids": 1}, "centroids wanted a power of two"),
        ({"centroids": 0}, "centroids wanted a power of two"),
        ({"centroids": 1 << 17}, "centroids wanted a power of two"),
        ({"centroids": 256.0}, "centroids wanted a power of two"),
        ({"residual_centroids": 3}, "residual_centroids wanted a power of two"),
        ({"outlier_centroids": 0}, "outlier_centroids wanted a power of two"),
        ({"outlier_percent": 1.0, "outlier_vector_length": 0}, "outlier vector length"),
        ({"outlier_percent": -1}, r"outlier_percent wanted 0\.\.50"),
        ({"outlier_percent": 50}, r"outlier_percent wanted 0\.\.50"),
        ({"outlier_percent": float("nan")}, r"outlier_percent wanted 0\.\.50"),
        ({"groups": 0}, "groups wanted a whole number >= 1"),
        ({"groups": 2.0}, "groups wanted a whole number >= 1"),
        ({"codebook_dtype": "grid"}, "codebook_dtype wanted auto"),
        ({"iterations": 0}, "iterations wanted .*>= 1"),
        ({"iterations": 2.5}, "iterations wanted"),
        ({"sweeps": -1}, "sweeps wanted .*>= 0"),
        ({"damping": -0.5}, "damping"),
        ({"damping": float("nan")}, "damping"),
        ({"sample": -1}, "sample"),
        ({"permutation": True}, "unknown option 'permutation'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        get("vptq")(**options).layout((64, 64))


def test_a_residual_that_does_not_fit_the_matrix_is_refused_by_shape() -> None:
    with pytest.raises(UsageError, match=r"16, 16"):
        get("vptq")(residual_centroids=4096).layout((16, 16))


def test_feedback_column_by_column_beats_feedback_by_blocks_and_none() -> None:
    case = _case(240, 96)
    options = {"vector_length": 4, "centroids": 64, "residual_centroids": 0, "norm": False}
    loss = {n: _loss(case, _quantize(case, update_columns=n, **options)) for n in (1, 4, 32, 0)}
    assert loss[1] < loss[4] < loss[32] < loss[0]


# ---------------------------------------------------------------- presets


@pytest.mark.parametrize(
    ("name", "stages", "bits"),
    [
        ("v8-k65536-256", (16, 8), 3.0),
        ("v8-k65536-0", (16,), 2.0),
        ("V16-K65536-65536-woft", (16, 16), 2.0),
        ("v4-k256", (8,), 2.0),
    ],
)
def test_names_of_public_checkpoints_are_presets(name: str, stages: tuple[int, ...], bits: float) -> None:
    method, options = preset(name)
    assert (method, options["bits"]) == ("vptq", bits)
    layout = get(method)(**options).layout((4096, 4096))
    assert (layout.stages, layout.nominal_bits) == (stages, bits)
    assert (layout.codebook_dtype, layout.channel_norm, layout.tile) == ("float16", "input", None)


@pytest.mark.parametrize("name", registry.get("vptq").presets)
def test_settings_of_the_paper_have_the_bits_that_it_says(name: str) -> None:
    """Table 8 counts indices and codebooks of a whole model, not permutation, norm and outliers' rounding."""
    model, size, bits = name.split("-")
    hidden, inner, kv = {
        "llama27b": (4096, 11008, 4096),
        "llama213b": (5120, 13824, 5120),
        "llama270b": (8192, 28672, 1024),
        "llama38b": (4096, 14336, 1024),
        "llama370b": (8192, 28672, 1024),
    }[model + size]
    shapes = [(hidden, hidden)] * 2 + [(kv, hidden)] * 2 + [(inner, hidden)] * 2 + [(hidden, inner)]
    layouts = get("vptq")(**preset(name)[1]).layouts([(shape, False) for shape in shapes])
    side = sum(32 * inp for _, inp in shapes) + sum(16 * x.shape[1] for x in layouts if x.permuted)
    counted = (sum(layout.bits() for layout in layouts) - side) / sum(layout.weights for layout in layouts)
    assert counted == pytest.approx(float(bits), abs=0.06)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v8-k65536-255", "power of two"),
        ("v17-k256", "vector_length wanted 1..16"),
        ("v8-k3", "power of two"),
        ("v8k256", "unknown preset 'v8k256'.*names of public VPTQ checkpoints such as v8-k65536-256"),
    ],
)
def test_names_that_are_no_preset_are_refused(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        get(preset(name)[0])(**preset(name)[1])
