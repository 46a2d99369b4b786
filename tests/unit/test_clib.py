"""The C++ library against plain torch and float64: nearest centroid, bit streams, and what happens without it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo._core import clib
from octavo.math import assign
from octavo.math.assign import nearest
from octavo.math.pack import _pack_torch, _unpack_torch, pack, packed_words, unpack

# Odd sizes around the lane counts (4, 8, 16) and the blocks of up to 64 points.
_SIZES = [(1, 1), (5, 2), (17, 3), (64, 16), (67, 255), (150, 257)]
_FAR = 12345.0


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def _isas() -> list[int]:
    lib = clib.library()
    assert lib is not None, clib.why_missing()
    return list(range(1, lib.octavo_isa() + 1))


def _call(points: Tensor, book: Tensor, weights: Tensor | None = None, *, threads: int = 1, isa: int = 0) -> Tensor:
    """The C function on poisoned output: an element that is not written fails the range check."""
    lib = clib.library()
    assert lib is not None, clib.why_missing()
    guard = torch.full((points.shape[0] + 2,), -999, dtype=torch.int64)
    out = guard[1:-1]
    weights_at = None if weights is None else weights.data_ptr()
    arguments = (points.data_ptr(), weights_at, points.shape[0], book.data_ptr(), book.shape[0], book.shape[1])
    assert clib.call(lib.octavo_nearest, *arguments, out.data_ptr(), threads, isa) == clib.OK
    assert guard[0] == guard[-1] == -999
    assert out.numel() == 0 or (int(out.min()) >= 0 and int(out.max()) < book.shape[0])
    return out


def _distances(points: Tensor, book: Tensor, weights: Tensor | None) -> Tensor:
    gaps = (points.double()[:, None] - book.double()[None]).square()
    return (gaps if weights is None else gaps * weights.double()[:, None]).sum(-1)


def _assert_nearest(chosen: Tensor, points: Tensor, book: Tensor, weights: Tensor | None, slack: float = 2e-6) -> None:
    distances = _distances(points, book, weights)
    least = distances.min(dim=1).values
    got = distances.gather(1, chosen[:, None])[:, 0]
    scale = points.double().square().sum(1) if weights is None else (weights.double() * points.double().square()).sum(1)
    assert bool((got - least <= slack * (least + scale)).all())


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("v", range(1, 17))
def test_every_instruction_set_finds_a_nearest_centroid(v: int, weighted: bool, generator: torch.Generator) -> None:
    for n, k in _SIZES:
        points, book = torch.randn(n, v, generator=generator), torch.randn(k, v, generator=generator)
        weights = torch.rand(n, v, generator=generator) * 10 if weighted else None
        for isa in _isas():
            _assert_nearest(_call(points, book, weights, isa=isa), points, book, weights)
        _assert_nearest(assign._nearest_torch(points, book, weights), points, book, weights)


@pytest.mark.parametrize("v", range(1, 17))
def test_small_integers_give_exactly_the_lowest_of_equal_centroids(v: int, generator: torch.Generator) -> None:
    points = torch.randint(-3, 4, (201, v), generator=generator).float()
    book = torch.randint(-2, 3, (77, v), generator=generator).float()
    weights = torch.tensor([0.0, 1.0, 4.0])[torch.randint(0, 3, (201, v), generator=generator)]
    for given_weights in (None, weights):
        expected = _distances(points, book, given_weights).argmin(dim=1)
        for isa in _isas():
            assert torch.equal(_call(points, book, given_weights, isa=isa), expected)
        assert torch.equal(assign._nearest_torch(points, book, given_weights), expected)


def test_the_public_function_takes_the_cpp_path_and_strided_tensors(generator: torch.Generator) -> None:
    points, book = torch.randn(4, 300, generator=generator).T, torch.randn(60, 8, generator=generator)[::2, ::2]
    weights = torch.rand(300, 8, generator=generator)[:, 1::2]
    plain = (points.contiguous(), book.contiguous(), weights.contiguous())
    assert torch.equal(nearest(points, book), _call(plain[0], plain[1]))
    assert torch.equal(nearest(points, book, weights), _call(*plain))


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_threads_do_not_change_the_result(weighted: bool, generator: torch.Generator) -> None:
    points, book = torch.randn(60_001, 4, generator=generator), torch.randn(300, 4, generator=generator)
    weights = torch.rand(60_001, 4, generator=generator) if weighted else None
    alone = _call(points, book, weights, threads=1)
    assert torch.equal(_call(points, book, weights, threads=3), alone)
    assert torch.equal(_call(points, book, weights, threads=64), alone)


@pytest.mark.parametrize("v", [1, 3, 4, 16])
def test_a_book_far_from_the_origin_loses_no_digits(v: int, generator: torch.Generator) -> None:
    points = torch.randn(300, v, generator=generator) + _FAR
    book = torch.randn(500, v, generator=generator) + _FAR
    for chosen in (nearest(points, book), assign._nearest_torch(points, book, None)):
        _assert_nearest(chosen, points - _FAR, book - _FAR, None, slack=1e-5)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("v", [1, 2, 4, 9])
def test_nan_and_infinity_give_a_legal_index(v: int, weighted: bool, generator: torch.Generator) -> None:
    points, book = torch.randn(40, v, generator=generator), torch.randn(33, v, generator=generator)
    weights = torch.ones(40, v) if weighted else None
    points[3] = torch.nan
    points[4, 0] = torch.nan
    points[5, -1] = torch.inf
    book[0, 0] = torch.nan
    book[20] = torch.nan
    expected = assign._nearest_torch(points, book, weights)
    for isa in _isas():
        chosen = _call(points, book, weights, isa=isa)
        assert chosen[3] == chosen[4] == 0
        assert not bool(torch.isin(chosen[6:], torch.tensor([0, 20])).any())
        assert torch.equal(chosen[6:], expected[6:])
    assert bool((_call(points, torch.full_like(book, torch.nan), weights) == 0).all())


def test_no_points_give_no_indices() -> None:
    assert nearest(torch.empty(0, 4), torch.ones(3, 4)).shape == (0,)
    assert assign._nearest_torch(torch.empty(0, 4), torch.ones(3, 4), None).shape == (0,)


@pytest.mark.parametrize(
    ("points", "book", "weights", "message"),
    [
        (torch.ones(3, 4), torch.ones(2, 5), None, r"\(3, 4\) and \(2, 5\)"),
        (torch.ones(3, 4), torch.ones(0, 4), None, r"book \[k, v\] wanted"),
        (torch.ones(3), torch.ones(2, 1), None, "points"),
        (torch.ones(3, 4), torch.ones(2, 4), torch.ones(3, 1), r"weights wanted \(3, 4\), got \(3, 1\)"),
        (torch.ones(3, 4).double(), torch.ones(2, 4), None, "points wanted float32, got torch.float64"),
        (torch.ones(3, 4), torch.ones(2, 4).half(), None, "book wanted float32"),
    ],
)
def test_wrong_shapes_and_dtypes_are_refused(
    points: Tensor, book: Tensor, weights: Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        nearest(points, book, weights)


# ---------------------------------------------------------------- bit streams


@settings(max_examples=150, deadline=None)
@given(width=st.integers(1, 32), rows=st.integers(0, 4), count=st.integers(0, 70), seed=st.integers(0, 2**31))
def test_unpack_inverts_pack_and_cpp_words_equal_torch_words(width: int, rows: int, count: int, seed: int) -> None:
    codes = torch.randint(0, 1 << width, (rows, count), generator=torch.Generator().manual_seed(seed))
    words = pack(codes, width)
    assert words.dtype == torch.int32
    assert words.shape == (rows, packed_words(count, width))
    assert torch.equal(words, _pack_torch(codes, width))
    assert torch.equal(unpack(words, width, count), codes)
    assert torch.equal(_unpack_torch(words, width, count), codes)


@pytest.mark.parametrize("width", [3, 12, 32])
def test_packing_many_rows_on_threads_equals_packing_them_one_by_one(width: int, generator: torch.Generator) -> None:
    codes = torch.randint(0, 1 << width, (3000, 101), generator=generator)
    lib = clib.library()
    assert lib is not None
    words = torch.full((3000, packed_words(101, width)), -1, dtype=torch.int32)
    back = torch.full_like(codes, -1)
    assert clib.call(lib.octavo_pack, codes.data_ptr(), 3000, 101, width, words.data_ptr(), 4) == clib.OK
    assert torch.equal(words, _pack_torch(codes, width))
    assert clib.call(lib.octavo_unpack, words.data_ptr(), 3000, 101, width, back.data_ptr(), 4) == clib.OK
    assert torch.equal(back, codes)


@pytest.mark.parametrize("strided", [False, True])
def test_packing_takes_transposed_and_narrow_integers(strided: bool) -> None:
    codes = torch.arange(30, dtype=torch.uint8).reshape(5, 6)
    codes = codes.T if strided else codes
    assert torch.equal(unpack(pack(codes, 5), 5, codes.shape[1]), codes.long())


@pytest.mark.parametrize("no_clib", ["0", "1"])
@pytest.mark.parametrize("bad", [-1, 8, 1 << 40])
def test_a_code_that_does_not_fit_is_refused_on_both_paths(
    bad: int, no_clib: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(clib.DISABLE, no_clib)
    monkeypatch.setattr(clib, "warn_slow_once", lambda what: None)
    with pytest.raises(ValueError, match=rf"codes wanted in \[0, 2\^3\), got \[{min(bad, 1)}, {max(bad, 7)}\]"):
        pack(torch.tensor([[1, 7, bad]]), 3)


@pytest.mark.parametrize("width", [0, 33])
def test_widths_outside_of_1_to_32_are_refused(width: int) -> None:
    with pytest.raises(ValueError, match=r"width wanted 1\.\.32"):
        pack(torch.zeros(1, 1, dtype=torch.int64), width)
    with pytest.raises(ValueError, match=r"width wanted 1\.\.32"):
        unpack(torch.zeros(1, 1, dtype=torch.int32), width, 1)


# ---------------------------------------------------------------- with and without the library


def test_the_library_is_loaded_and_is_of_this_version() -> None:
    import octavo

    assert clib.why_missing() == ""
    assert clib.version() == octavo.__version__
    assert clib.cpu_features() in ("baseline", "AVX2 + FMA", "AVX-512", "AVX-512 VBMI + VNNI")


def test_an_instruction_set_that_is_not_there_is_a_bug_not_a_crash() -> None:
    points = torch.ones(1, 1)
    with pytest.raises(AssertionError, match="octavo bug"):
        _call(points, points, isa=9)


_WITHOUT = """
import warnings, torch
warnings.simplefilter("always")
from octavo._core import clib
from octavo.math.assign import nearest
from octavo.math.pack import pack, unpack
assert clib.library() is None and clib.version() is None and clib.cpu_features() == "none"
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        assert nearest(torch.tensor([[1.0], [9.0]]), torch.tensor([[0.0], [8.0]])).tolist() == [0, 1]
        assert unpack(pack(torch.tensor([[1, 5]]), 3), 3, 2).tolist() == [[1, 5]]
for warning in caught:
    print(warning.category.__name__, warning.filename.rsplit("/", 1)[-1], warning.message)
"""


def test_without_the_library_each_operation_works_and_warns_once() -> None:
    environment = {**os.environ, clib.DISABLE: "1", "PYTHONWARNINGS": "default"}
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("SlowPathWarning")]
    assert [line.split(" runs in plain torch")[0].split(" ", 2)[2] for line in lines] == [
        "nearest-centroid search",
        "bit packing",
        "bit unpacking",
    ]
    assert all(f"switched off by {clib.DISABLE}=1" in line for line in lines)


@pytest.mark.parametrize("content", [None, b"not a library"], ids=["absent", "broken"])
def test_a_missing_or_broken_library_says_what_to_install(
    content: bytes | None, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content is not None:
        (tmp_path / clib._NAMES.get(sys.platform, "liboctavo_c.so")).write_bytes(content)
    monkeypatch.delenv(clib.LIBRARY, raising=False)
    monkeypatch.setattr(clib, "_folders", lambda: [tmp_path])
    lib, why = clib._load.__wrapped__()
    assert lib is None
    assert "C++17 compiler" in why
    assert "pip install --force-reinstall ." in why
    assert ("was not built" in why) == (content is None)


def test_tensors_without_memory_of_their_own_are_left_to_torch() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    assert clib.takes(torch.ones(2), torch.nn.Parameter(torch.ones(2)))
    assert not clib.takes(torch.ones(2, device="meta"))
    with FakeTensorMode():
        fake = torch.empty(3, 2, dtype=torch.int32)
        assert not clib.takes(fake)
        assert unpack(fake, 8, 8).shape == (3, 8)
