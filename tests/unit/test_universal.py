"""The universal method: losses that only fall, rotations that pay, budgets, odd matrices and hostile files."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from formats.checkpoints import edit_json, write_native
from octavo import codebooks, formats
from octavo._core.errors import FormatError, NumericalError, UsageError
from octavo.algorithms import get
from octavo.layout import Layout
from octavo.math.hessian import damped, proxy_loss
from octavo.weight import VQWeight
from oracle.matrices import activations, normal_weight, second_moment

#: The name of the smallest codebook with two stages, and of one whose name is written in the tests.
_BOOK = min((n for n in codebooks.names() if len(codebooks.parse(n)[1]) == 2), key=lambda n: codebooks.get(n).bits)
_NAME = "gaussian-v8-k256-256"


def _case(out: int, inp: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and the second moment of inputs with correlated channels of different size."""
    rng = np.random.default_rng([seed, out, inp])
    hessian = second_moment(activations(rng, inp, 4 * inp + 64))
    return torch.from_numpy(normal_weight(rng, out, inp)), torch.from_numpy(hessian)


def _quantize(weight: Tensor, hessian: Tensor | None, seed: int = 0, **options: Any) -> VQWeight:
    method = get("universal")(**{"codebook": _BOOK, **options})
    return method.quantize(weight, hessian=hessian, generator=torch.Generator().manual_seed(seed))


def _proxy(weight: Tensor, hessian: Tensor, **options: Any) -> float:
    return proxy_loss(weight, _quantize(weight, hessian, **options).dequantize(), hessian)


# ---------------------------------------------------------------- what makes it better


@pytest.mark.parametrize("scale_bits", [1, 4, 8])
@pytest.mark.parametrize("options", [{}, {"direction": "column", "transform": "both"}, {"scale_block": 16}])
def test_more_sweeps_never_raise_the_loss(options: dict[str, Any], scale_bits: int) -> None:
    weight, hessian = _case(40, 64, seed=scale_bits)
    hessian = damped(hessian, 0.01)
    # Damping once more changes nothing of note, and the loss is that which the method sees.
    losses = [
        _proxy(weight, hessian, sweeps=sweeps, scale_bits=scale_bits, damping=1e-9, **options) for sweeps in range(5)
    ]
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(losses)), losses
    assert losses[-1] < 0.97 * losses[0]


def test_rotations_pay_on_outlier_channels() -> None:
    weight, hessian = _case(64, 128)
    weight[:, [3, 50, 51, 90]] *= 20
    weight[[7, 30]] *= 10
    hessian = torch.eye(128)
    losses = {side: _proxy(weight, hessian, transform=side) for side in ("none", "input", "both")}
    assert losses["input"] < 0.5 * losses["none"]
    assert losses["both"] < 0.5 * losses["none"]


def test_a_wider_beam_loses_no_more_on_average() -> None:
    narrow, wide = (sum(_proxy(*_case(40, 64, seed), beam=beam, sweeps=0) for seed in range(4)) for beam in (1, 64))
    assert wide < narrow


@pytest.mark.parametrize("name", codebooks.names())
def test_gaussian_weights_lose_what_the_codebook_promises(name: str) -> None:
    """Scales fitted by least squares gain a little; nothing else distinguishes the weights from the training's."""
    weight = torch.randn(96, 256)
    result = _quantize(weight, None, codebook=name, transform="none", sweeps=0, beam=64)
    error = float((result.dequantize() - weight).square().mean() / weight.square().mean())
    assert error == pytest.approx(codebooks.get(name).distortion, rel=0.06)


# ---------------------------------------------------------------- size and importance


_BLOCK = [((192, 192), False), ((64, 192), True), ((512, 192), False), ((192, 512), False)] * 2


@pytest.mark.parametrize("bits", [1.2, 1.7, 2.0, 2.25, 2.6, 3.1, 3.3, 4.0, 4.4])
def test_the_layouts_of_a_model_stay_within_a_fractional_budget(bits: float) -> None:
    layouts = get("universal")(bits=bits).layouts(_BLOCK)
    weights = sum(layout.weights for layout in layouts)
    size = sum(layout.bits() for layout in layouts)
    assert size <= bits * weights
    assert size >= 0.75 * bits * weights
    assert [(layout.shape, layout.bias) for layout in layouts] == _BLOCK


@pytest.mark.parametrize("bits", [1.5, 2.0, 2.5, 3.0, 3.7])
def test_what_matters_a_hundred_times_more_never_gets_fewer_bits(bits: float) -> None:
    shapes = [((256, 192), False)] * 5
    for position in range(5):
        importance = [1.0] * 5
        importance[position] = 100.0
        layouts = get("universal")(bits=bits).layouts(shapes, importance=importance)
        sizes = [layout.bits() for layout in layouts]
        assert sizes[position] == max(sizes)
    assert sizes[position] > min(sizes)


def test_a_codebook_that_is_named_is_taken_at_any_budget() -> None:
    for bits in (0.5, 2.0, 16.0):
        layouts = get("universal")(bits=bits, codebook=_BOOK).layouts(_BLOCK)
        assert {layout.codebook for layout in layouts} == {_BOOK}
        assert all(layout.nominal_bits == codebooks.get(_BOOK).bits for layout in layouts)


def test_layouts_have_the_largest_transforms_that_fit() -> None:
    def sides(shape: tuple[int, int], **options: Any) -> tuple[int, int] | None:
        transform = get("universal")(codebook=_BOOK, **options).layout(shape).transform
        return (transform.input, transform.output) if transform else None

    assert sides((96, 576), transform="both") == (64, 32)
    assert sides((96, 576)) == (64, 0)
    assert sides((96, 576), transform="output") == (0, 32)
    assert sides((96, 576), transform="none") is None
    assert sides((4096, 11_008), transform="both", block=1024) == (256, 1024)
    assert sides((8, 4096), block=100) == (64, 0)
    # A side that is odd has no transform.
    assert sides((7, 9), transform="both") is None
    assert sides((7, 12), transform="both") == (4, 0)


@pytest.mark.parametrize(("scale_block", "columns"), [(0, 50), (1, 8), (8, 8), (9, 16), (50, 50), (10**9, 50)])
def test_scales_are_shared_by_whole_vectors(scale_block: int, columns: int) -> None:
    layout = get("universal")(codebook=_NAME, scale_block=scale_block).layout((6, 50))
    assert layout.block_scale is not None
    assert layout.block_scale.columns == columns


@pytest.mark.parametrize("transform", ["input", "both"])
def test_sensitivity_is_the_loss_of_error_feedback_per_distortion(transform: str) -> None:
    """Rotated, the elements of a vector matter about equally: a codebook cannot favour some of them."""
    weight, hessian = _case(64, 96)
    method = get("universal")(codebook=_NAME, transform=transform, sweeps=0)
    result = method.quantize(weight, hessian=hessian, generator=torch.Generator().manual_seed(5))
    error = (weight - result.dequantize()).double()
    lost = float(((error @ damped(hessian, 0.01).double()) * error).sum())
    predicted = method.sensitivity(weight, hessian, torch.Generator().manual_seed(5))
    assert lost == pytest.approx(predicted * codebooks.get(_NAME).distortion, rel=0.15)


def test_sensitivity_refuses_what_quantizing_refuses() -> None:
    weight, hessian = _case(6, 8)
    method, rng = get("universal")(codebook=_BOOK), torch.Generator()
    with pytest.raises(UsageError, match=r"q_proj: the Hessian wanted \(8, 8\), got \(7, 7\)"):
        method.sensitivity(weight, hessian[1:, 1:], rng, "q_proj")
    with pytest.raises(UsageError, match=r"q_proj: a weight wanted \[out, in\]"):
        method.sensitivity(weight[0], hessian, rng, "q_proj")
    weight[1, 2] = torch.nan
    with pytest.raises(NumericalError, match="q_proj: 1 of 48 weights are NaN"):
        method.sensitivity(weight, hessian, rng, "q_proj")
    assert method.sensitivity(torch.ones(6, 8), torch.zeros(8, 8), rng) == 0.0


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    "bad",
    [
        *({"direction": value} for value in ("diagonal", 3, None)),
        *({"transform": value} for value in ("left", True, None)),
        *({"block": value} for value in (1, 0, -4, 65_537, 64.0, "64", True)),
        *({"scale_block": value} for value in (-1, 1.5, None, False)),
        *({"scale_bits": value} for value in (0, 9, 4.0)),
        *({"beam": value} for value in (0, 4097, 2.5)),
        *({"passes": value} for value in (0, 11, True)),
        *({"sweeps": value} for value in (-1, 101, 1.0)),
        *({"damping": value} for value in (0, -0.1, math.inf, math.nan, "0.1")),
        *({"shrink": value} for value in (-1, math.inf, math.nan, "2", True)),
    ],
)
def test_every_option_is_checked(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"universal: {next(iter(bad))} wanted"):
        get("universal")(codebook=_BOOK, **bad)


def test_only_methods_with_second_moments_can_shrink_them() -> None:
    assert (get("universal")().shrink, get("gptq")().shrink, get("vptq")(shrink=1).shrink) == (2, 0, 1)
    with pytest.raises(UsageError, match="rtn: there are no second moments to shrink"):
        get("rtn")(shrink=1)


@pytest.mark.parametrize("name", ["", "gaussian", _BOOK + "0", f"{_BOOK}/../{_BOOK}", 7])
def test_an_unknown_codebook_is_refused_at_once(name: Any) -> None:
    with pytest.raises(UsageError, match=r"codebook.* (unknown|wanted)"):
        get("universal")(codebook=name)


# ---------------------------------------------------------------- odd matrices


@pytest.mark.parametrize("direction", ["row", "column"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 33), (33, 1), (7, 9), (9, 7), (1, 8), (8, 1), (17, 24), (3, 130)])
def test_matrices_of_any_shape_are_quantized(shape: tuple[int, int], direction: str) -> None:
    weight, hessian = _case(*shape)
    for options in ({}, {"transform": "both", "scale_block": 16}, {"side_dtype": "bfloat16", "scale_bits": 2}):
        result = _quantize(weight, hessian, direction=direction, **options)
        result.validate()
        assert result.layout.shape == shape
        assert proxy_loss(weight, result.dequantize(), hessian) < 0.5


@pytest.mark.parametrize("options", [{}, {"direction": "column"}, {"scale_block": 8, "transform": "none"}])
def test_zeros_stay_zeros_and_do_not_spoil_the_rest(options: dict[str, Any]) -> None:
    weight, hessian = _case(24, 32)
    assert float(_quantize(torch.zeros(24, 32), hessian, **options).dequantize().abs().max()) < 1e-30
    plain = _proxy(weight, hessian, **options)
    weight[[3, 17]] = 0
    weight[:, 8:16] = 0
    result = _quantize(weight, hessian, **options)
    result.validate()
    matrix = result.dequantize()
    assert (
        float(matrix[[3, 17]].abs().max()) < (1e-4 if options.get("direction") != "column" else 1) * weight.abs().max()
    )
    assert proxy_loss(weight, matrix, hessian) < 1.5 * plain


@pytest.mark.parametrize("scale_bits", [1, 8])
def test_rows_of_equal_size_need_no_steps(scale_bits: int) -> None:
    """Their logarithms differ by rounding errors: steps of less than float16 can hold."""
    matrices = [torch.randn(60, 1, 8), torch.sign(torch.randn(8, 4, 16)), torch.full((1, 5, 16), 0.3)]
    for matrix in itertools.chain.from_iterable(matrices):
        for transform in ("none", "input"):
            result = _quantize(matrix, None, scale_bits=scale_bits, transform=transform, sweeps=1)
            assert proxy_loss(matrix, result.dequantize(), torch.eye(matrix.shape[1])) < 0.4


@pytest.mark.parametrize("factor", [2.0**-110, 2.0**-60, 2.0**60, 2.0**110])
def test_the_unit_of_the_weights_does_not_matter_within_float32(factor: float) -> None:
    weight, hessian = _case(12, 32)
    plain = _proxy(weight, hessian, sweeps=0)
    matrix = _quantize(weight * factor, hessian, sweeps=3).dequantize() / factor
    # Beyond about 1e19 and below 1e-19 sweeps see no gains, because squares leave float32.
    assert proxy_loss(weight, matrix, hessian) < 1.1 * plain


def test_a_hessian_without_meaning_in_some_channels_is_no_obstacle() -> None:
    weight, hessian = _case(16, 40)
    dead = torch.zeros(40, dtype=torch.bool)
    dead[[0, 7, 8, 9, 10, 11, 12, 13, 14, 15, 39]] = True
    hessian[dead] = 0
    hessian[:, dead] = 0
    for options in ({}, {"direction": "column"}, {"transform": "none"}):
        assert _proxy(weight, hessian, **options) < 0.2


# ---------------------------------------------------------------- the same every time


@pytest.fixture
def threads() -> Iterator[list[int]]:
    """Numbers of threads to try; afterwards there are as many as before."""
    before = torch.get_num_threads()
    yield [1, 2, 5]
    torch.set_num_threads(before)


@pytest.mark.parametrize("options", [{}, {"direction": "column", "transform": "both"}])
def test_the_number_of_threads_does_not_change_a_bit(threads: list[int], options: dict[str, Any]) -> None:
    weight, hessian = _case(150, 200)
    results: list[VQWeight] = []
    for count in threads:
        torch.set_num_threads(count)
        results.append(_quantize(weight, hessian, sweeps=1, **options))
    for other in results[1:]:
        assert all(torch.equal(other.tensors[name], tensor) for name, tensor in results[0].tensors.items())


def test_signs_follow_from_the_generator_and_nothing_else_is_random() -> None:
    weight, hessian = _case(16, 32)
    first, again, other = (_quantize(weight, hessian, seed, transform="both") for seed in (1, 1, 2))
    assert all(torch.equal(first.tensors[name], again.tensors[name]) for name in first.tensors)
    assert not torch.equal(first.tensors["input_signs"], other.tensors["input_signs"])
    assert not torch.equal(first.tensors["output_signs"], other.tensors["output_signs"])
    plain, still = (_quantize(weight, hessian, seed, transform="none") for seed in (1, 2))
    assert all(torch.equal(plain.tensors[name], still.tensors[name]) for name in plain.tensors)


# ---------------------------------------------------------------- files


def _written(folder: Path) -> Layout:
    weight, hessian = _case(24, 32)
    result = _quantize(weight, hessian, transform="both", codebook=_NAME)
    write_native(folder, {"block.0.up": result}, method="universal")
    back = dict(formats.read_weights(folder))["block.0.up"]
    assert torch.equal(back.dequantize(), result.dequantize())
    return back.layout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codebook": "gaussian-v8-k256-255"}, r"'gaussian-v8-k256-255' is unknown\. Did you mean .* upgrade"),
        ({"codebook": "../../../etc/passwd"}, "'../../../etc/passwd' is unknown"),
        ({"codebook": ""}, "universal codebooks, and only they, have a name"),
        ({"codebook": [_NAME]}, "codebook wanted a name"),
        ({"vector_length": 4}, f"{_NAME} has"),
        ({"transform": {"input": 64}}, "transform block 64 does not divide 32"),
        ({"transform": {"output": 16}}, "transform block 16 does not divide 24"),
        ({"transform": {"input": 2**62, "output": 8}}, f"transform block {2**62} does not divide 32"),
        ({"transform": {"input": -8}}, "transform block -8 is no power of 2"),
        ({"transform": {"input": 24}}, "transform block 24 is no power of 2"),
        ({"transform": {"input": 8.0}}, "transform wanted integers"),
        ({"transform": {}}, "a transform of neither side"),
        ({"transform": "both"}, "block.0.up|mapping"),
        ({"transform": {"input": 8, "output": 8, "third": 8}}, "third"),
        # The signs that this transform wants are not there, or are too many.
        ({"transform": {"input": 32}}, "output_signs"),
        ({"transform": None}, "signs"),
    ],
)
def test_hostile_layouts_in_files_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    _written(tmp_path)

    def edit(config: dict[str, Any]) -> None:
        (layout,) = config["quantization_config"]["layouts"]
        layout.update(change)

    edit_json(tmp_path / "config.json", edit)
    with pytest.raises(FormatError, match=message):
        dict(formats.read_weights(tmp_path))
