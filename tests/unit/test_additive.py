"""Additive codebooks: the C++ library on every instruction set and plain torch against beam search in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo._core import clib
from octavo.math import additive
from octavo.math.additive import nearest_additive
from oracle.additive import beam_search, exhaustive, losses

Search = Callable[[Tensor, Sequence[Tensor], Tensor | None, int], Tensor]

#: (points, sizes of the books, beam): one of everything, odd sizes around the lane counts, beams that are narrower and
#: wider than the first book, that take all of it but one, and that keep more than there are lanes in what they keep.
_SIZES = [
    (1, (1, 1), 1),
    (5, (7, 3), 3),
    (3, (17, 33), 16),
    (4, (33, 16), 100),
    (3, (31, 5), 30),
    (3, (8, 9, 5), 4),
    (2, (4, 67, 3), 80),
    (2, (5, 1, 18), 40),
    (2, (6, 5, 4, 7), 9),
    (2, (3, 4, 2, 3), 1000),
]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def _lib() -> Any:
    lib = clib.library()
    assert lib is not None, clib.why_missing()
    return lib


def _call(
    points: Tensor, books: Sequence[Tensor], root: Tensor | None, beam: int, *, threads: int = 1, isa: int = 0
) -> Tensor:
    """The C function on poisoned output: an element that is not written fails the range check."""
    (n, v), stages = points.shape, len(books)
    guard = torch.full((n + 2, stages), -999, dtype=torch.int64)
    out, joined, sizes = guard[1:-1], torch.cat(list(books)), torch.tensor([book.shape[0] for book in books])
    root_at = None if root is None else root.data_ptr()
    arguments = (points.data_ptr(), n, v, joined.data_ptr(), sizes.data_ptr(), stages, root_at, beam)
    assert clib.call(_lib().octavo_nearest_additive, *arguments, out.data_ptr(), threads, isa) == clib.OK
    assert bool((guard[0] == -999).all()) and bool((guard[-1] == -999).all())
    assert bool((out >= 0).all()) and bool((out < sizes).all())
    return out


def _on(isa: int) -> Search:
    return lambda points, books, root, beam: _call(points, books, root, beam, isa=isa)


def _searches() -> list[Search]:
    """The C function on every instruction set of this machine, and its definition in torch."""
    return [*(_on(isa) for isa in range(1, _lib().octavo_isa() + 1)), additive._search_torch]


def _random(
    n: int, sizes: Sequence[int], v: int, generator: torch.Generator
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """Points, ever finer books, and a metric as error feedback has them: triangular, far from the identity."""
    books = [torch.randn(k, v, generator=generator) * 0.6**stage for stage, k in enumerate(sizes)]
    root = torch.randn(v, v, generator=generator).triu(1) * 0.4 + torch.diag(torch.rand(v, generator=generator) + 0.3)
    return torch.randn(n, v, generator=generator), books, root


def _integers(
    n: int, sizes: Sequence[int], v: int, generator: torch.Generator
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """Small integers: sums of products are exact, and many of them are equal."""

    def draw(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=generator).float()

    return draw(n, v), [draw(k, v) for k in sizes], draw(v, v)


def _doubles(
    points: Tensor, books: Sequence[Tensor], root: Tensor | None
) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    metric = torch.eye(points.shape[1]) if root is None else root
    return points.double().numpy(), [book.double().numpy() for book in books], metric.double().numpy()


def _assert_as_good(codes: Tensor, wanted: np.ndarray, points: Tensor, books: Sequence[Tensor], root: Tensor | None):
    """The losses are those of the wanted codes, up to rounding of |x|^2 and of the |b|^2."""
    x, b, metric = _doubles(points, books, root)
    got, best = losses(x, b, metric, codes.numpy()), losses(x, b, metric, wanted)
    size = ((x @ metric) ** 2).sum(axis=1) + sum(float(((book @ metric) ** 2).sum(axis=1).max()) for book in b)
    assert np.all(np.abs(got - best) <= 3e-6 * (best + size))


@pytest.mark.parametrize("rooted", [False, True], ids=["plain", "root"])
@pytest.mark.parametrize("v", range(1, 17))
def test_every_instruction_set_is_as_good_as_textbook_beam_search(
    v: int, rooted: bool, generator: torch.Generator
) -> None:
    for n, sizes, beam in _SIZES:
        points, books, root = _random(n, sizes, v, generator)
        root = root if rooted else None
        wanted = beam_search(*_doubles(points, books, root), beam)
        for search in _searches():
            _assert_as_good(search(points, books, root, beam), wanted, points, books, root)


@pytest.mark.parametrize("scale", [2.0**-66, 1.0, 2.0**66])
@pytest.mark.parametrize("v", [1, 2, 3, 5, 8, 16])
def test_exact_arithmetic_gives_exactly_the_first_of_equal_codes(
    v: int, scale: float, generator: torch.Generator
) -> None:
    for n, sizes, beam in _SIZES:
        points, books, root = _integers(n, sizes, v, generator)
        for metric in (None, root):
            wanted = torch.from_numpy(beam_search(*_doubles(points, books, metric), beam))
            scaled = [book * scale for book in books]
            for search in _searches():
                assert torch.equal(search(points * scale, scaled, metric, beam), wanted)
                if metric is not None:
                    assert torch.equal(search(points, books, metric * scale, beam), wanted)


@pytest.mark.parametrize("sizes", [(19, 40), (9, 6, 7), (4, 3, 5, 3)])
def test_a_beam_of_all_sums_is_exact(sizes: tuple[int, ...], generator: torch.Generator) -> None:
    points, books, root = _random(12, sizes, 4, generator)
    everything = int(np.prod(sizes[:-1]))
    for metric in (None, root):
        wanted = exhaustive(*_doubles(points, books, metric))
        for search in _searches():
            _assert_as_good(search(points, books, metric, everything), wanted, points, books, metric)


@pytest.mark.parametrize("scale", [1e-20, 3e-7, 1.0, 1e20])
def test_the_scale_of_the_weights_and_of_the_metric_is_of_no_account(scale: float, generator: torch.Generator) -> None:
    points, books, root = _random(30, (40, 16, 16), 8, generator)
    assert root is not None
    wanted = beam_search(*_doubles(points[:6], books, root), 8)
    for stages in (1, 3):
        first = [books[0]] if stages == 1 else books
        for search in [*(_searches() if stages > 1 else []), nearest_additive]:
            codes = search(points * scale, [book * scale for book in first], root / scale, 8)
            if stages > 1:
                _assert_as_good(codes[:6], wanted, points[:6], books, root)
            _assert_as_good(codes, search(points, first, root, 8).numpy(), points, first, root)


def test_wide_books_and_beams_lose_no_candidate(generator: torch.Generator) -> None:
    for sizes, beam in [
        ((256, 256), 32),
        ((256, 256), 256),
        ((4, 256, 16), 100),
        ((256, 250, 16), 32),
        ((4096, 16), 8),
    ]:
        points, books, root = _random(40, sizes, 8, generator)
        wanted = additive._search_torch(points, books, root, beam).numpy()
        for search in _searches():
            _assert_as_good(search(points, books, root, beam), wanted, points, books, root)
        integers = _integers(40, sizes, 8, generator)
        for search in _searches():
            assert torch.equal(search(*integers, beam), additive._search_torch(*integers, beam))


def test_candidates_in_one_lane_overflow_into_a_new_choice(generator: torch.Generator) -> None:
    """Every 16th centroid of the second book is near: the minima of the lanes tell little about what is to be kept."""
    books = [torch.randn(40, 4, generator=generator) * 0.01, torch.randn(512, 4, generator=generator) + 50.0]
    books[1][::16] = torch.randn(32, 4, generator=generator) * 0.1
    books.append(torch.randn(20, 4, generator=generator) * 0.05)
    points = torch.randn(3, 4, generator=generator) * 0.1
    wanted = beam_search(*_doubles(points, books, None), 20)
    for search in _searches():
        x, b, metric = _doubles(points, books, None)
        got = losses(x, b, metric, search(points, books, None, 20).numpy())
        # The far centroids set the scale of the rounding, 1e-7 of 50^2.
        assert np.all(got - losses(x, b, metric, wanted) <= 3e-6 * 50.0**2)


def test_one_book_is_the_nearest_centroid(generator: torch.Generator) -> None:
    for n, k, v in ((0, 3, 4), (1, 1, 1), (70, 300, 5)):
        points, books, root = _random(n, (k,), v, generator)
        for metric in (None, root):
            codes = nearest_additive(points, books, metric)
            assert codes.shape == (n, 1)
            wanted = beam_search(*_doubles(points, books, metric), 1)
            _assert_as_good(codes, wanted, points, books, metric)
            _assert_as_good(additive._search_torch(points, books, metric, 1), wanted, points, books, metric)


def test_no_points_give_no_codes(generator: torch.Generator) -> None:
    for sizes in ((5,), (5, 6), (5, 6, 7)):
        points, books, root = _random(0, sizes, 4, generator)
        for search in [*(_searches() if len(sizes) > 1 else []), nearest_additive, additive._search_torch]:
            assert search(points, books, root, 4).shape == (0, len(sizes))


def test_the_public_function_takes_the_cpp_path_and_strided_tensors(generator: torch.Generator) -> None:
    points, books, root = _random(50, (60, 40), 8, generator)
    assert root is not None
    strided = torch.empty(8, 50).T.copy_(points), [torch.empty(8, len(b)).T.copy_(b) for b in books]
    transposed = torch.empty(8, 8).T.copy_(root)
    assert torch.equal(nearest_additive(*strided, transposed, 7), _call(points, books, root, 7))


def test_threads_do_not_change_the_result(generator: torch.Generator) -> None:
    for sizes, beam in (((256, 256), 16), ((64, 64, 64), 8)):
        points, books, root = _random(3001, sizes, 4, generator)
        alone = _call(points, books, root, beam)
        assert torch.equal(_call(points, books, root, beam, threads=3), alone)
        assert torch.equal(_call(points, books, root, beam, threads=64), alone)


def test_chunks_do_not_change_the_result_of_torch(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    points, books, root = _random(50, (20, 30, 10), 4, generator)
    whole = additive._search_torch(points, books, root, 8)
    monkeypatch.setattr(additive, "_CPU_SCORES", 7 * 8 * 30)
    assert torch.equal(additive._search_torch(points, books, root, 8), whole)


def test_without_the_library_torch_takes_over_and_says_so(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setenv(clib.DISABLE, "1")
    monkeypatch.setattr(clib, "warn_slow_once", said.append)
    points, books, root = _random(5, (9, 8), 3, generator)
    assert torch.equal(nearest_additive(points, books, root, 4), additive._search_torch(points, books, root, 4))
    assert said == ["additive codebook search"]


@pytest.mark.parametrize("sizes", [(33,), (33, 20), (33, 20, 18)])
@pytest.mark.parametrize("v", [1, 2, 4, 9])
def test_what_is_not_finite_is_not_chosen_and_gets_zeros(
    v: int, sizes: tuple[int, ...], generator: torch.Generator
) -> None:
    points, books, root = _random(20, sizes, v, generator)
    searches = [*(_searches() if len(sizes) > 1 else []), nearest_additive, additive._search_torch]
    clean = [book.clone() for book in books]
    clean[0], clean[-1] = clean[0][1:20], clean[-1][2:]
    points[3] = torch.nan
    points[4, 0] = torch.nan
    points[5, -1] = torch.inf
    points[6] = -torch.inf
    books[0][0, 0] = torch.nan
    books[0][20:] = torch.inf
    books[-1][0] = torch.nan
    books[-1][1] = -torch.inf
    if len(sizes) == 1:
        clean = [books[0][2:20]]
    for metric in (None, root):
        for search in searches:
            codes = search(points, books, metric, 8)
            assert bool((codes[3:7] == 0).all())
            moved = codes.clone()
            moved[:, 0] -= 1
            moved[:, -1] -= 2 if len(sizes) > 1 else 1
            keep = [0, 1, 2, *range(7, 20)]
            wanted = beam_search(*_doubles(points[keep], clean, metric), 8)
            _assert_as_good(moved[keep], wanted, points[keep], clean, metric)
            for stage in range(len(sizes)):
                hopeless = [torch.full_like(b, torch.nan) if s == stage else b for s, b in enumerate(books)]
                assert bool((search(points, hopeless, metric, 8) == 0).all())
            assert bool((search(points, books, torch.full((v, v), torch.nan), 8) == 0).all())


def test_fewer_finite_centroids_than_the_beam_keeps(generator: torch.Generator) -> None:
    points, books, root = _random(9, (50, 40, 30), 4, generator)
    books[0][3:] = torch.nan
    books[1][2:] = torch.inf
    wanted = beam_search(*_doubles(points, [books[0][:3], books[1][:2], books[2]], root), 20)
    for search in _searches():
        _assert_as_good(search(points, books, root, 20), wanted, points, [books[0][:3], books[1][:2], books[2]], root)


@pytest.mark.parametrize(
    ("points", "books", "root", "beam", "message"),
    [
        (torch.ones(3), [torch.ones(2, 1)], None, 1, r"points \[n, 1\.\.16\] wanted, got \(3,\)"),
        (torch.ones(3, 17), [torch.ones(2, 17)], None, 1, r"points .* got \(3, 17\)"),
        (torch.ones(3, 4), [], None, 1, r"1\.\.4 books wanted, got 0"),
        (torch.ones(3, 4), [torch.ones(2, 4)] * 5, None, 1, r"1\.\.4 books wanted, got 5"),
        (torch.ones(3, 4), [torch.ones(2, 4), torch.ones(2, 5)], None, 1, r"books .* got \(2, 5\)"),
        (torch.ones(3, 4), [torch.ones(0, 4)], None, 1, r"books .* got \(0, 4\)"),
        (torch.ones(3, 4), [torch.ones(4097, 4)], None, 1, r"books \[1\.\.4096, 4\] wanted"),
        (torch.ones(3, 4), [torch.ones(2, 4)], torch.ones(4), 1, r"root wanted \(4, 4\), got \(4,\)"),
        (torch.ones(3, 4), [torch.ones(2, 4).half()], None, 1, "float32 wanted, got torch.float16"),
        (torch.ones(3, 4).double(), [torch.ones(2, 4)], None, 1, "float32 wanted, got torch.float64"),
        (torch.ones(3, 4), [torch.ones(2, 4)], torch.ones(4, 4).double(), 1, "float32 wanted"),
        (torch.ones(3, 4), [torch.ones(2, 4)], None, 0, r"beam wanted 1\.\.65536, got 0"),
        (torch.ones(3, 4), [torch.ones(2, 4)], None, 65537, "beam wanted"),
    ],
)
def test_wrong_shapes_and_dtypes_are_refused(
    points: Tensor, books: list[Tensor], root: Tensor | None, beam: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        nearest_additive(points, books, root, beam)


def test_an_instruction_set_that_is_not_there_is_a_bug_not_a_crash(generator: torch.Generator) -> None:
    points, books, root = _random(2, (3, 3), 2, generator)
    with pytest.raises(AssertionError, match="octavo bug"):
        _call(points, books, root, 2, isa=9)
