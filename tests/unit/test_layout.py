"""Layout: validation, JSON, the bit count, and the words for it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from formats.strategies import layouts, random_weight
from octavo._core.errors import FormatError, UsageError
from octavo.cli._layouts import in_words
from octavo.layout import BlockScale, Layout, Outliers, Transform

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

_NAME = "gaussian-v8-k256-256"
_UNIVERSAL: dict[str, Any] = {"vector_length": 8, "stages": (8, 8), "codebook_dtype": "universal", "codebook": _NAME}


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
        ({"codebook_rank": -1}, r"codebook rank wanted 0\.\.65536, got -1"),
        ({"codebook_rank": 65_537}, r"codebook rank wanted 0\.\.65536, got 65537"),
        ({"codebook_rank": 2.0}, "codebook rank wanted integers"),
        ({"codebook_rank": True}, "codebook rank wanted integers"),
        ({"codebook_rank": 2, "stages": (3, 3)}, "a codebook rank needs one stage"),
        ({"codebook_rank": 2, "codebook_dtype": "int4"}, "a codebook that is stored, and not as int4"),
        ({"codebook_rank": 2, "codebook_dtype": "grid", "vector_length": 1}, "a codebook that is stored"),
        ({"outliers": Outliers(12, 4, 8)}, "every column"),
        ({"tile": (8,)}, "tile wanted"),
        ({"tile": (0, 4)}, "tile wanted"),
        ({"tile": (8, 4.0)}, "tile wanted integers"),
        ({"tile": (6, 4)}, "cuts vectors of length 4"),
        ({"tile": (4, 6), "direction": "row"}, "cuts vectors of length 4"),
        ({"codebook": _NAME}, "universal codebooks, and only they, have a name"),
        ({"codebook_dtype": "universal"}, "universal codebooks, and only they, have a name"),
        ({"codebook": None}, "codebook wanted a name, got None"),
        ({"codebook": 8}, "codebook wanted a name, got 8"),
        ({**_UNIVERSAL, "vector_length": 4}, rf"{_NAME} has .* \(8, \(8, 8\), False\), not \(4, \(8, 8\), False\)"),
        ({**_UNIVERSAL, "stages": (8,)}, rf"{_NAME} has .*, not \(8, \(8,\), False\)"),
        ({**_UNIVERSAL, "sign_bits": True}, rf"{_NAME} has .*, not \(8, \(8, 8\), True\)"),
        ({**_UNIVERSAL, "tile": (8, 8)}, "a universal codebook has neither tiles nor a rank"),
        ({"transform": Transform(input=8)}, "transform block 8 does not divide 12"),
        ({"transform": Transform(output=16)}, "transform block 16 does not divide 8"),
        ({"transform": Transform(4, 1 << 70)}, f"transform block {1 << 70} does not divide 8"),
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
        (lambda: BlockScale(8, 0, -1), r"log2 scale bits wanted 0\.\.8, got -1"),
        (lambda: BlockScale(8, 0, 9), r"log2 scale bits wanted 0\.\.8, got 9"),
        (lambda: BlockScale(8, log2_bits=4.0), "wanted integers"),  # type: ignore[arg-type]
        (Transform, "a transform of neither side is none"),
        (lambda: Transform(12), "transform block 12 is no power of 2"),
        (lambda: Transform(4, 1), "transform block 1 is no power of 2"),
        (lambda: Transform(4, -4), "transform block -4 is no power of 2"),
        (lambda: Transform(4.0), "wanted integers"),  # type: ignore[arg-type]
        (lambda: Transform(True, 4), "wanted integers"),
    ],
)
def test_outliers_block_scales_and_transforms_are_validated(build: Any, message: str) -> None:
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
        ({"block_scale": {"columns": 8, "log2_bits": 9}}, "log2 scale bits"),
        ({"block_scale": {"columns": 8, "log2_bits": "4"}}, "integers"),
        ({"block_scale": {"columns": 8, "log_bits": 4}}, "log_bits"),
        ({"codebook_rank": "2"}, "codebook rank"),
        ({"codebook_rank": None}, "codebook rank"),
        ({"codebook_rank": 2, "stages": [3, 3]}, "needs one stage"),
        ({"sign_bits": "no"}, "sign_bits"),
        ({"permuted": 1}, "permuted"),
        ({"bias": "false"}, "bias"),
        (
            {**_UNIVERSAL, "codebook": "gaussian-v8-k256-255"},
            "'gaussian-v8-k256-255' is unknown.*Did you mean.*upgrade",
        ),
        ({**_UNIVERSAL, "codebook": "../../x"}, "'../../x' is unknown"),
        ({**_UNIVERSAL, "codebook": [_NAME]}, "codebook wanted a name"),
        ({**_UNIVERSAL, "codebook": {"name": _NAME}}, "codebook wanted a name"),
        ({**_UNIVERSAL, "codebook": 1e300}, "codebook wanted a name"),
        ({"codebook": None}, "codebook wanted a name"),
        ({"transform": 4}, "module 7"),
        ({"transform": [4, 0]}, "module 7"),
        ({"transform": {}}, "neither side"),
        ({"transform": {"input": 8}}, "transform block 8 does not divide 12"),
        ({"transform": {"input": 4, "output": 1 << 62}}, f"transform block {1 << 62} does not divide 8"),
        ({"transform": {"input": "4"}}, "integers"),
        ({"transform": {"input": 4, "both": 4}}, "both"),
    ],
)
def test_json_that_is_no_layout_is_refused_with_its_place(changes: dict[str, Any], message: str) -> None:
    values = {"shape": [8, 12], "vector_length": 4, "stages": [3], **changes}
    with pytest.raises(FormatError, match=f"module 7.*{message}" if message != "module 7" else message):
        Layout.from_dict(values, "module 7")


def test_keys_that_older_readers_do_not_know_are_written_only_where_they_are_needed() -> None:
    assert _plain(block_scale=BlockScale(6)).to_dict()["block_scale"] == {"columns": 6, "zero_bits": 0}
    log2 = _plain(block_scale=BlockScale(6, 0, 4), codebook_rank=2).to_dict()
    assert log2["block_scale"] == {"columns": 6, "zero_bits": 0, "log2_bits": 4}
    assert log2["codebook_rank"] == 2
    assert not {"codebook_rank", "codebook", "transform"} & _plain().to_dict().keys()


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


def _bits(layout: Layout) -> dict[str, int]:
    """Bits of every tensor, from dtype and shape."""
    return {name: 8 * dtype.itemsize * math.prod(shape) for name, (dtype, shape) in layout.tensors().items()}


def test_int4_books_are_counted_with_their_scales_and_padding() -> None:
    # 2 vector rows of 12 indices of 3 bits: 36 bits take 2 words. 2 x 2 books of 8 centroids of 4: 128 nibbles.
    parts = {"indices": 2 * 2 * 32, "codebook_0": 128 * 4, "codebook_scale_0": 4 * 16}
    layout = _plain(codebook_dtype="int4", tile=(4, 6))
    assert _bits(layout) == parts
    assert layout.bits() == sum(parts.values()) == 704
    # One book of 2 centroids of 5 are 10 nibbles, 40 bits: 2 words.
    assert _bits(_plain(codebook_dtype="int4", vector_length=5, stages=(1,)))["codebook_0"] == 64


def test_low_rank_books_are_counted_as_coefficients_and_basis() -> None:
    parts = {"indices": 2 * 2 * 32, "codebook_coefficient_0": 4 * 2 * 8, "codebook_basis_0": 2 * 8 * 4 * 32}
    layout = _plain(codebook_dtype="int8", side_dtype="float32", tile=(4, 6), codebook_rank=2)
    assert _bits(layout) == parts
    assert layout.bits() == sum(parts.values())


def test_log2_scales_are_counted_as_codes_and_two_numbers_per_block() -> None:
    # 50 columns in blocks of 16: 4 blocks. A block's 30 codes of 4 bits take 4 words; a row's 4 zeros of 3 bits one.
    parts = {
        "indices": 30 * 4 * 32,
        "block_scale_code": 4 * 4 * 32,
        "block_scale_low": 4 * 16,
        "block_scale_step": 4 * 16,
        "block_zero": 30 * 32,
    }
    layout = Layout((30, 50), 1, (2,), codebook_dtype="grid", direction="row", block_scale=BlockScale(16, 3, 4))
    assert _bits(layout) == parts
    assert layout.bits() == sum(parts.values())


def test_universal_codebooks_and_transforms_are_counted_as_scales_and_signs() -> None:
    # 30 rows of 7 vectors of 16 bits: 4 words. 30 codes of 8 bits: 8 words. 50 and 30 signs: 2 words and 1 word.
    parts = {
        "indices": 30 * 4 * 32,
        "block_scale_code": 8 * 32,
        "block_scale_low": 16,
        "block_scale_step": 16,
        "input_signs": 2 * 32,
        "output_signs": 32,
    }
    layout = Layout(
        (30, 50), direction="row", block_scale=BlockScale(50, 0, 8), transform=Transform(2, 2), **_UNIVERSAL
    )
    assert _bits(layout) == parts
    assert layout.bits() == sum(parts.values())
    assert "output_signs" not in replace(layout, transform=Transform(2)).tensors()
    assert "input_signs" not in replace(layout, transform=Transform(0, 2)).tensors()


def test_grids_store_no_codebook() -> None:
    layout = _plain(codebook_dtype="grid", vector_length=1, block_scale=BlockScale(4))
    assert set(layout.tensors()) == {"indices", "block_scale"}


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (
            Layout((64, 96), 2, (6,), direction="row", codebook_dtype="int4", tile=(16, 48)),
            "vectors of 2 inputs, 64 centroids (int4), 8 codebooks, one per 16 x 48 tile",
        ),
        (
            Layout((64, 96), 2, (6,), direction="row", codebook_dtype="int8", tile=(16, 48), codebook_rank=3),
            "vectors of 2 inputs, 64 centroids (rank 3 with int8 coefficients and float16 basis), 8 codebooks, one per "
            "16 x 48 tile",
        ),
        (
            Layout((64, 96), 2, (6,), direction="row", block_scale=BlockScale(32, log2_bits=4)),
            "vectors of 2 inputs, 64 centroids (float16), 4-bit log2 scale per 32 columns",
        ),
        (
            Layout((64, 96), 1, (4,), codebook_dtype="grid", block_scale=BlockScale(32, 4, 5)),
            "uniform grid of 16 levels, 5-bit log2 scale and 4-bit zero per 32 columns",
        ),
        (
            Layout((64, 96), direction="row", transform=Transform(32, 64), **_UNIVERSAL),
            f"vectors of 8 inputs, 256 + 256 centroids ({_NAME}), Hadamard of inputs in blocks of 32 and outputs in "
            "blocks of 64",
        ),
    ],
)
def test_words_name_what_each_option_stores(layout: Layout, words: str) -> None:
    assert in_words(layout) == words
