"""VQWeight: which tensors it takes, what validate() refuses, relaxing and rounding. Decoding has tests of its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from formats.strategies import layouts, random_weight
from octavo._core.errors import FormatError, NumericalError
from octavo.layout import BlockScale, Layout, Outliers, Transform
from octavo.math.hadamard import unpack_signs
from octavo.stored import to_stored
from octavo.weight import VQWeight
from oracle import universal as oracle

_FULL = Layout(
    shape=(30, 50),
    vector_length=3,
    stages=(5, 4),
    codebook_dtype="int8",
    side_dtype="bfloat16",
    sign_bits=True,
    tile=(12, 7),
    block_scale=BlockScale(8, 3),
    channel_norm="input",
    permuted=True,
    outliers=Outliers(4, 2, 6),
    bias=True,
)


_LOW_RANK = Layout(
    shape=(12, 20),
    vector_length=2,
    stages=(3,),
    direction="row",
    codebook_dtype="int8",
    side_dtype="bfloat16",
    tile=(6, 10),
    block_scale=BlockScale(8, 3, 4),
    codebook_rank=2,
)
_INT4 = Layout(
    shape=(9, 14),
    vector_length=3,
    stages=(3, 2),
    codebook_dtype="int4",
    tile=(6, 5),
    block_scale=BlockScale(5, 0, 2),
    channel_norm="output",
)
_TRANSFORMED = Layout(
    shape=(12, 20),
    vector_length=8,
    stages=(8, 8),
    direction="row",
    codebook_dtype="universal",
    block_scale=BlockScale(8, 0, 3),
    channel_norm="output",
    codebook="gaussian-v8-k256-256",
    transform=Transform(4, 2),
)


# ---------------------------------------------------------------- contents


def _tensors(layout: Layout, **changes: Tensor | None) -> dict[str, Tensor]:
    tensors = {**random_weight(layout).tensors, **changes}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": None}, r"missing \['bias'\]"),
        ({"extra": torch.zeros(1)}, r"unknown \['extra'\]"),
        (
            {"bias": torch.zeros(29, dtype=torch.bfloat16)},
            r"bias wanted torch.bfloat16 \(30,\), got torch.bfloat16 \(29,\)",
        ),
        ({"bias": torch.zeros(30)}, r"bias wanted torch.bfloat16 \(30,\), got torch.float32 \(30,\)"),
        ({"indices": torch.zeros(10, 17, dtype=torch.int32)}, r"indices wanted torch.int32 \(10, 18\)"),
    ],
)
def test_tensors_that_do_not_match_the_layout_are_refused(changes: dict[str, Tensor | None], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        VQWeight(_FULL, _tensors(_FULL, **changes))


@pytest.mark.parametrize("layout", [_LOW_RANK, _INT4, _TRANSFORMED])
def test_every_tensor_of_the_newer_options_must_have_its_shape_and_dtype(layout: Layout) -> None:
    for name, tensor in random_weight(layout).tensors.items():
        for wrong in (tensor[1:], tensor.unsqueeze(0), tensor.to(torch.float64)):
            with pytest.raises(FormatError, match=f"VQWeight: {name} wanted"):
                VQWeight(layout, _tensors(layout, **{name: wrong}))
        with pytest.raises(FormatError, match=f"missing .*{name}"):
            VQWeight(layout, _tensors(layout, **{name: None}))
    with pytest.raises(FormatError, match="unknown"):
        VQWeight(layout, _tensors(layout, block_scale=torch.ones(layout.shape[0], 3)))


_FLOATS = [
    *((_FULL, name) for name in ("codebook_scale_1", "block_scale", "outlier_codebook", "channel_offset", "bias")),
    *((_LOW_RANK, name) for name in ("codebook_basis_0", "block_scale_low", "block_scale_step")),
    (replace(_LOW_RANK, codebook_dtype="float16"), "codebook_coefficient_0"),
    *((_INT4, name) for name in ("codebook_scale_0", "codebook_scale_1", "block_scale_step")),
]


@pytest.mark.parametrize(("layout", "name"), _FLOATS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_validate_finds_numbers_that_are_none(layout: Layout, name: str, value: float) -> None:
    weight = VQWeight(layout, _tensors(layout))
    weight.validate("layer 3")
    weight.tensors[name].view(-1)[-1] = value
    with pytest.raises(FormatError, match=f"layer 3: {name} holds NaN or infinity"):
        weight.validate("layer 3")


@pytest.mark.parametrize(
    ("low", "step", "top"), [(120.0, 1.0, "135"), (130.0, -1.0, "130"), (0.0, 1e30, "1.5\\d*e\\+31")]
)
def test_validate_finds_tables_of_scales_that_overflow(low: float, step: float, top: str) -> None:
    tensors = _tensors(_LOW_RANK)
    tensors["block_scale_low"][1], tensors["block_scale_step"][1] = low, step
    # No code need stand for the infinite entry: the codes are not looked at.
    tensors["block_scale_code"].zero_()
    with pytest.raises(FormatError, match=rf"layer 3: block_scale_low .* reach the scale 2\^{top},"):
        VQWeight(_LOW_RANK, tensors).validate("layer 3")


def test_scales_that_vanish_are_finite() -> None:
    tensors = _tensors(_LOW_RANK)
    tensors["block_scale_low"].fill_(-1e30)
    weight = VQWeight(_LOW_RANK, tensors)
    weight.validate()
    assert not bool(weight.dequantize().any())


@pytest.mark.parametrize(
    "layout", [replace(_LOW_RANK, codebook_dtype="bfloat16"), replace(_INT4, side_dtype="float32")]
)
def test_validate_finds_centroids_that_overflow(layout: Layout) -> None:
    tensors = _tensors(layout)
    for name in ("codebook_coefficient_0", "codebook_basis_0", "codebook_scale_0"):
        if name in tensors:
            tensors[name].fill_(3e38)
    with pytest.raises(FormatError, match="layer 3: centroids of stage 0 decode to infinity in float32"):
        VQWeight(layout, tensors).validate("layer 3")


@pytest.mark.parametrize("bad", [0, -1, 50])
def test_validate_finds_a_permutation_that_is_none(bad: int) -> None:
    weight = VQWeight(_FULL, _tensors(_FULL, permutation=torch.arange(50, dtype=torch.int16)))
    weight.validate()
    weight.tensors["permutation"][7] = bad
    with pytest.raises(FormatError, match=r"layer 3: permutation is no permutation of 0\.\.49"):
        weight.validate("layer 3")


def test_moving_keeps_layout_and_contents() -> None:
    weight = random_weight(_FULL)
    moved = weight.to("cpu")
    assert moved.layout == weight.layout
    assert all(torch.equal(moved.tensors[name], tensor) for name, tensor in weight.tensors.items())


def test_a_value_beyond_the_stored_dtype_is_refused_with_name_and_size() -> None:
    assert to_stored(torch.tensor([65504.0]), torch.float16, "q_proj: scales").dtype == torch.float16
    with pytest.raises(NumericalError, match=r"q_proj: scales: 2 values .*float16.*largest magnitude 7e\+04.*bfloat16"):
        to_stored(torch.tensor([1.0, 7e4, -7e4]), torch.float16, "q_proj: scales")
    with pytest.raises(NumericalError, match="1 values are not finite"):
        to_stored(torch.tensor([torch.nan]), torch.float32, "bias")


# ---------------------------------------------------------------- transforms


@pytest.mark.parametrize("transform", [Transform(4), Transform(0, 4), Transform(2, 4)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_transforms_are_undone_in_float32_at_least_and_rounded_once(transform: Transform, dtype: torch.dtype) -> None:
    weight = random_weight(replace(_TRANSFORMED, transform=transform))
    bare = {name: tensor for name, tensor in weight.tensors.items() if not name.endswith("signs")}
    inner = VQWeight(replace(_TRANSFORMED, transform=None), bare).dequantize(dtype)
    input_side, output_side = (
        torch.from_numpy(oracle.transform(n, block, unpack_signs(weight.tensors[name], n).numpy() if block else None))
        for name, n, block in (("input_signs", 20, transform.input), ("output_signs", 12, transform.output))
    )
    wanted = output_side.T @ inner.double() @ input_side
    got = weight.dequantize(dtype)
    assert got.dtype == dtype
    rounding = torch.finfo(dtype).eps / 2 + torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    assert bool(((got.double() - wanted).abs() <= rounding * wanted.abs() + 1e-6 * inner.double().abs().max()).all())


# ---------------------------------------------------------------- relaxing and rounding


@settings(max_examples=150, deadline=None)
@given(layout=layouts())
def test_a_relaxed_weight_decodes_to_the_same_numbers(layout: Layout) -> None:
    weight = random_weight(layout)
    relaxed = weight.relaxed()
    assert torch.equal(relaxed.dequantize(), weight.dequantize())
    for name, tensor in relaxed.tensors.items():
        if tensor.is_floating_point():
            assert tensor.dtype == torch.float32
        else:
            assert torch.equal(tensor, weight.tensors[name])
    unchanged = ("shape", "vector_length", "stages", "tile", "block_scale", "outliers", "codebook_rank", "codebook")
    assert all(getattr(relaxed.layout, name) == getattr(layout, name) for name in (*unchanged, "transform"))


@settings(max_examples=150, deadline=None)
@given(layout=layouts())
def test_an_unchanged_relaxed_weight_is_rounded_to_what_it_was(layout: Layout) -> None:
    weight = random_weight(layout)
    again = weight.relaxed().rounded(layout)
    assert again.layout == layout
    integers = layout.codebook_dtype in ("int8", "int4")
    for name, tensor in weight.tensors.items():
        if not (integers and name.startswith("codebook")):
            assert torch.equal(again.tensors[name], tensor), name
    # Integers find a new scale: half a step of it, and the rounding of what carries it.
    for stage in range(len(layout.stages) if integers else 0):
        old, new = weight.codebook(stage), again.codebook(stage)
        if layout.codebook_rank:
            coefficients = weight.tensors["codebook_coefficient_0"].float().abs()
            basis = weight.tensors["codebook_basis_0"].float().abs()
            rounding = torch.finfo(weight.tensors["codebook_basis_0"].dtype).eps
            per_term = 0.51 * coefficients.amax(dim=0) / 127 + rounding * coefficients
            allowed = torch.einsum("br,rkv->bkv", per_term, basis)
        else:
            top = 127 if layout.codebook_dtype == "int8" else 7
            allowed = 0.51 * old.abs().amax(dim=(1, 2), keepdim=True) / top
        # Scales below the normal numbers of float16 are less exact.
        assert bool(((new - old).abs() <= allowed + 1e-5).all())


def test_rounding_what_does_not_fit_names_module_and_tensor() -> None:
    relaxed = random_weight(replace(_FULL, side_dtype="float16")).relaxed()
    relaxed.tensors["block_scale"][0, 0] = 1e6
    with pytest.raises(NumericalError, match=r"layer 3: block_scale: 1 values are not finite in torch\.float16"):
        relaxed.rounded(replace(_FULL, side_dtype="float16"), "layer 3")


@pytest.mark.parametrize(
    "layout",
    [
        replace(_FULL, shape=(9, 14), stages=(2, 1), tile=(6, 5)),
        replace(_LOW_RANK, shape=(8, 12)),
        _INT4,
        Layout((5, 9), 1, (3,), codebook_dtype="grid", direction="row", block_scale=BlockScale(4, 3, 3)),
        Layout((6, 8), 2, (2,), permuted=True, channel_norm="output", block_scale=BlockScale(3), side_dtype="bfloat16"),
        _TRANSFORMED,
        replace(_INT4, transform=Transform(input=2)),
    ],
    ids=["full", "low rank", "int4", "grid", "plain", "universal", "int4 transformed"],
)
def test_gradients_of_a_relaxed_weight_are_those_of_finite_differences(layout: Layout) -> None:
    relaxed = random_weight(layout, 2).relaxed()
    towards = torch.randn(layout.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    free = {n: t.clone().requires_grad_() for n, t in relaxed.tensors.items() if t.is_floating_point() and n != "bias"}
    assert free

    def inner(tensors: dict[str, Tensor]) -> Tensor:
        weight = VQWeight(relaxed.layout, {**relaxed.tensors, **tensors})
        return (weight.dequantize(torch.float64) * towards).sum()

    inner(free).backward()
    for name, tensor in free.items():
        assert tensor.grad is not None, name
        assert bool(tensor.grad.any()), name
        flat = tensor.detach().reshape(-1)
        slopes = []
        for i in range(flat.numel()):
            # All but the scales' exponents enter linearly, so that only the cubic term of 2^x is lost.
            ends = []
            for sign in (-1, 1):
                moved = flat.clone()
                moved[i] += sign * 2.0**-10
                ends.append((float(moved[i]), float(inner({name: moved.reshape(tensor.shape)}))))
            (a, low), (b, high) = ends
            slopes.append((high - low) / (b - a))
        wanted = torch.tensor(slopes, dtype=torch.float64).reshape(tensor.shape)
        limit = 1e-4 * float(wanted.abs().max())
        torch.testing.assert_close(
            tensor.grad.double(), wanted, rtol=1e-4, atol=limit, msg=lambda m, n=name: f"{n}: {m}"
        )
