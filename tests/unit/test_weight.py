"""Layout and VQWeight: validation, JSON, the bit count, and what may be stored. Decoding has tests of its own."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from formats.strategies import layouts, random_weight
from octavo._core.errors import FormatError, NumericalError, UsageError
from octavo.weight import BlockScale, Layout, Outliers, VQWeight, index_dtype_to_int64, pack_codes, to_stored

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


def _plain(**changes: Any) -> Layout:
    return Layout(**{"shape": (8, 12), "vector_length": 4, "stages": (3,), **changes})


# ---------------------------------------------------------------- validation


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": (8,)}, "shape wanted"),
        ({"shape": (8, 12, 1)}, "shape wanted"),
        ({"shape": (0, 12)}, "features wanted 1"),
        ({"shape": (8, -1)}, "features wanted 1"),
        ({"shape": (8, (1 << 24) + 1)}, "features wanted 1"),
        ({"shape": (8.0, 12)}, "shape wanted integers"),
        ({"shape": (True, 12)}, "shape wanted integers"),
        ({"vector_length": 0}, "vector length wanted"),
        ({"vector_length": 17}, "vector length wanted"),
        ({"vector_length": 4.0}, "vector length wanted"),
        ({"direction": "diagonal"}, "direction wanted"),
        ({"stages": ()}, "at least one codebook"),
        ({"stages": (0,)}, "stage bits wanted"),
        ({"stages": (17,)}, "stage bits wanted"),
        ({"stages": (3.0,)}, "stages wanted integers"),
        ({"stages": (16, 16, 1)}, "33 bits; 32 is the limit"),
        ({"stages": (15, 15), "sign_bits": True}, "34 bits; 32 is the limit"),
        ({"codebook_dtype": "float8"}, "unknown codebook dtype 'float8'"),
        ({"side_dtype": "int8"}, "unknown side dtype 'int8'"),
        ({"channel_norm": "both"}, "unknown channel norm 'both'"),
        ({"codebook_dtype": "grid"}, "a grid is scalar"),
        ({"codebook_dtype": "grid", "vector_length": 1, "stages": (2, 2)}, "a grid is scalar"),
        ({"codebook_dtype": "grid", "vector_length": 1, "sign_bits": True}, "a grid is scalar"),
        ({"outliers": Outliers(12, 4, 8)}, "every column"),
        ({"tile": (8,)}, "tile wanted"),
        ({"tile": (0, 4)}, "tile wanted"),
        ({"tile": (8, 4.0)}, "tile wanted integers"),
        ({"tile": (6, 4)}, "cuts vectors of length 4"),
        ({"tile": (4, 6), "direction": "row"}, "cuts vectors of length 4"),
    ],
)
def test_every_rule_of_a_layout_has_its_own_refusal(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=rf"layout: .*{message}"):
        _plain(**changes)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Outliers(0, 4, 8), "outlier columns wanted >= 1, got 0"),
        (lambda: Outliers(1, 0, 8), r"outlier vector length 1\.\.16, got 0"),
        (lambda: Outliers(1, 17, 8), r"outlier vector length 1\.\.16, got 17"),
        (lambda: Outliers(1, 4, 0), r"outlier index bits 1\.\.16, got 0"),
        (lambda: Outliers(1, 4, 17), r"outlier index bits 1\.\.16, got 17"),
        (lambda: Outliers(2.5, 4, 8), "wanted integers"),  # type: ignore[arg-type]
        (lambda: BlockScale(0), "block scale columns wanted >= 1, got 0"),
        (lambda: BlockScale(8, -1), r"zero point bits wanted 0\.\.16, got -1"),
        (lambda: BlockScale(8, 17), r"zero point bits wanted 0\.\.16, got 17"),
        (lambda: BlockScale(True), "wanted integers"),
    ],
)
def test_outliers_and_block_scales_are_validated(build: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build()


# ---------------------------------------------------------------- JSON


@settings(max_examples=200, deadline=None)
@given(layout=layouts())
def test_a_layout_survives_json(layout: Layout) -> None:
    text = json.dumps(layout.to_dict())
    again = Layout.from_dict(json.loads(text))
    assert again == layout
    assert hash(again) == hash(layout)
    assert json.dumps(again.to_dict()) == text


def test_only_what_differs_from_the_defaults_is_written() -> None:
    assert _plain().to_dict() == {"shape": (8, 12), "vector_length": 4, "stages": (3,)}
    spelled_out = {"shape": [8, 12], "vector_length": 4, "stages": [3], "direction": "column", "tile": None}
    again = Layout.from_dict(json.loads(json.dumps({**spelled_out, "codebook_dtype": "float16", "bias": False})))
    assert again.to_dict() == _plain().to_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vector_lenght": 4}, "unknown layout key 'vector_lenght'. Did you mean 'vector_length'"),
        ({"shape": None}, "module 7"),
        ({"shape": "ab"}, "integers"),
        ({"shape": [8, "12"]}, "integers"),
        ({"stages": 3}, "module 7"),
        ({"stages": [[3]]}, "integers"),
        ({"vector_length": "4"}, "vector length"),
        ({"direction": ["column"]}, "direction"),
        ({"codebook_dtype": {"a": 1}}, "codebook dtype"),
        ({"tile": 0}, "module 7"),
        ({"tile": [4]}, "tile wanted"),
        ({"outliers": {"columns": 2}}, "missing"),
        ({"outliers": {"columns": 2, "vector_length": 4, "bits": 8, "rows": 1}}, "rows"),
        ({"outliers": {"columns": "2", "vector_length": 4, "bits": 8}}, "integers"),
        ({"outliers": [2, 4, 8]}, "module 7"),
        ({"block_scale": 64}, "module 7"),
        ({"block_scale": {"columns": 1e9}}, "integers"),
        ({"sign_bits": "no"}, "sign_bits"),
        ({"permuted": 1}, "permuted"),
        ({"bias": "false"}, "bias"),
    ],
)
def test_json_that_is_no_layout_is_refused_with_its_place(changes: dict[str, Any], message: str) -> None:
    values = {"shape": [8, 12], "vector_length": 4, "stages": [3], **changes}
    with pytest.raises(FormatError, match=f"module 7.*{message}" if message != "module 7" else message):
        Layout.from_dict(values, "module 7")


def test_missing_keys_are_refused() -> None:
    with pytest.raises(FormatError, match=r"config: .*stages"):
        Layout.from_dict({"shape": [8, 12], "vector_length": 4}, "config")


# ---------------------------------------------------------------- size


@settings(max_examples=150, deadline=None)
@given(layout=layouts())
def test_the_bit_count_is_that_of_the_bytes_stored(layout: Layout) -> None:
    weight = random_weight(layout)
    stored = 8 * sum(
        tensor.numpy(force=True).nbytes if tensor.dtype != torch.bfloat16 else 2 * tensor.numel()
        for tensor in weight.tensors.values()
    )
    assert weight.bits() == layout.bits() == stored
    assert weight.bits_per_weight == layout.bits_per_weight == stored / (layout.shape[0] * layout.shape[1])
    # Padding and side data only ever add to the index bits of whole vectors.
    assert layout.bits() >= layout.nominal_bits * layout.shape[0] * layout.main_columns * 0.999


def test_nominal_bits_count_indices_and_signs_only() -> None:
    assert _plain(stages=(8,)).nominal_bits == 2.0
    assert _plain(stages=(8, 4)).nominal_bits == 3.0
    assert _plain(stages=(8,), sign_bits=True).nominal_bits == 3.0


def test_every_part_of_a_full_layout_is_counted() -> None:
    # 26 vector columns after 4 outliers of 50... each row of 46 elements with 5 + 4 + 3 bits: 18 words of 32 bits.
    words, books = 18, 3 * 7
    parts = {
        "indices": 10 * words * 32,
        "codebook_0": books * 32 * 3 * 8,
        "codebook_scale_0": books * 16,
        "codebook_1": books * 16 * 3 * 8,
        "codebook_scale_1": books * 16,
        "block_scale": 30 * 6 * 16,
        "block_zero": 30 * 32,
        "outlier_indices": 15 * 32,
        "outlier_codebook": 64 * 2 * 16,
        "permutation": 50 * 16,
        "channel_scale": 50 * 16,
        "channel_offset": 50 * 16,
        "bias": 30 * 16,
    }
    assert set(_FULL.tensors()) == set(parts)
    assert _FULL.bits() == sum(parts.values())


def test_grids_store_no_codebook() -> None:
    layout = _plain(codebook_dtype="grid", vector_length=1, block_scale=BlockScale(4))
    assert set(layout.tensors()) == {"indices", "block_scale"}


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


@pytest.mark.parametrize("name", ["codebook_scale_1", "block_scale", "outlier_codebook", "channel_offset", "bias"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_validate_finds_numbers_that_are_none(name: str, value: float) -> None:
    weight = VQWeight(_FULL, _tensors(_FULL))
    weight.validate("layer 3")
    weight.tensors[name].view(-1)[-1] = value
    with pytest.raises(FormatError, match=f"layer 3: {name} holds NaN or infinity"):
        weight.validate("layer 3")


@pytest.mark.parametrize("bad", [0, -1, 50])
def test_validate_finds_a_permutation_that_is_none(bad: int) -> None:
    weight = VQWeight(_FULL, _tensors(_FULL, permutation=torch.arange(50, dtype=torch.int16)))
    weight.validate()
    weight.tensors["permutation"][7] = bad
    with pytest.raises(FormatError, match=r"layer 3: permutation is no permutation of 0\.\.49"):
        weight.validate("layer 3")


@settings(max_examples=100, deadline=None)
@given(layout=layouts())
def test_codes_come_back_as_they_were_packed(layout: Layout) -> None:
    generator = torch.Generator().manual_seed(1)
    widths = (*layout.stages, *((layout.vector_length,) if layout.sign_bits else ()))
    parts = [torch.randint(0, 1 << width, layout.index_shape, generator=generator) for width in widths]
    weight = VQWeight(layout, _tensors(layout, indices=pack_codes(layout, parts)))
    for got, wanted in zip(weight.codes(), parts, strict=True):
        assert torch.equal(got, wanted)


def test_int16_permutations_are_unsigned() -> None:
    order = torch.arange(65_536).flip(0)
    assert torch.equal(index_dtype_to_int64(order.to(torch.int16)), order)
    assert torch.equal(index_dtype_to_int64(order.to(torch.int32)), order)
    assert _plain(shape=(1, 65_536), permuted=True).tensors()["permutation"][0] == torch.int16
    assert _plain(shape=(1, 65_537), permuted=True).tensors()["permutation"][0] == torch.int32


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
