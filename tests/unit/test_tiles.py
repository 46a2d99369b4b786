"""Codebooks of tiles: the C++ library and plain torch against float64, and what their fits must survive."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo._core import clib
from octavo.math.hessian import factorize
from octavo.math.tiles import Seeding, block_roots, fit_tiles, nearest_tiles
from oracle.feedback import damped
from oracle.gptvq import em, inverse_factor
from oracle.matrices import activations, second_moment

_LENGTHS = (1, 2, 3, 4, 5, 8, 16)
#: (points, points per tile, centroids): a single one, ragged last tiles, a tile larger than all points, odd book sizes.
_SIZES = [(1, 1, 1), (7, 3, 2), (40, 13, 5), (67, 100, 33), (64, 16, 16), (50, 7, 70)]
#: A tolerance that no step meets, so that a fit takes exactly the steps it is given.
_NEVER = -1e30
_SEEDINGS: tuple[Seeding, ...] = ("mahalanobis", "kmeans++")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.fixture(params=["cpp", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test once with the C++ library and once without."""
    if request.param == "torch":
        monkeypatch.setenv(clib.DISABLE, "1")
        monkeypatch.setattr(clib, "warn_slow_once", lambda what: None)
    else:
        assert clib.library() is not None, clib.why_missing()
    return request.param


def _lib() -> Any:
    lib = clib.library()
    assert lib is not None, clib.why_missing()
    return lib


def _isas() -> list[int]:
    return list(range(1, _lib().octavo_isa() + 1))


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _call_nearest(
    points: Tensor, books: Tensor, tile_rows: int, root: Tensor | None, *, threads: int = 1, isa: int = 0
) -> Tensor:
    """The C function on poisoned output."""
    n, k, v = points.shape[0], books.shape[1], books.shape[2]
    guard = torch.full((n + 2,), -999, dtype=torch.int64)
    out = guard[1:-1]
    arguments = (points.data_ptr(), n, tile_rows, books.data_ptr(), k, v, _at(root), out.data_ptr(), threads, isa)
    assert clib.call(_lib().octavo_nearest_tiles, *arguments) == clib.OK
    assert guard[0] == guard[-1] == -999
    assert n == 0 or (int(out.min()) >= 0 and int(out.max()) < k)
    return out


def _call_fit(
    points: Tensor,
    count: int,
    tile_rows: int,
    *,
    start: Tensor | None = None,
    uniforms: Tensor | None = None,
    roots: Tensor | None = None,
    weights: Tensor | None = None,
    iterations: int = 5,
    tolerance: float = _NEVER,
    threads: int = 1,
    isa: int = 0,
) -> tuple[Tensor, Tensor]:
    """The C function from given centroids or given random numbers, on poisoned output: (centroids, errors)."""
    rows, vectors, v = points.shape
    tiles = -(-rows // tile_rows)
    guard = torch.full((tiles + 2, count, v), torch.nan)
    guard[0] = guard[-1] = -999.0
    if start is not None:
        guard[1:-1] = start
    errors = torch.full((tiles + 2,), -999.0, dtype=torch.float64)
    status = clib.call(
        _lib().octavo_fit_tiles,
        *(points.data_ptr(), _at(weights), _at(roots), rows, vectors, v, tile_rows, count),
        *(guard[1:-1].data_ptr(), _at(uniforms), iterations, tolerance, errors[1:-1].data_ptr(), threads, isa),
    )
    assert status == clib.OK
    assert bool((guard[0] == -999).all())
    assert bool((guard[-1] == -999).all())
    assert errors[0] == errors[-1] == -999
    assert bool((errors[1:-1] >= 0).all())
    return guard[1:-1], errors[1:-1]


def _roots(vectors: int, v: int, seed: int = 0) -> Tensor:
    """Metrics as they come from a layer's inputs."""
    x = activations(np.random.default_rng(seed), vectors * v, tokens=8 * vectors * v)
    return block_roots(factorize(torch.from_numpy(second_moment(x))), v).contiguous()


def _norms(roots: Tensor | None, vectors: int, v: int) -> np.ndarray:
    """M = T T^T of every column of vectors, float64."""
    if roots is None:
        return np.broadcast_to(np.eye(v), (vectors, v, v))
    t = roots.double().numpy()
    return t @ t.transpose(0, 2, 1)


def _distances(points: Tensor, books: Tensor, tile_rows: int, root: Tensor | None) -> Tensor:
    """|(x - c) root|^2 [n, k] in float64, of every point and all centroids of its tile."""
    tile = torch.arange(points.shape[0]) // tile_rows
    gaps = points.double().unsqueeze(1) - books.double()[tile]
    return (gaps if root is None else gaps @ root.double()).square().sum(dim=2)


def _assert_nearest(chosen: Tensor, points: Tensor, books: Tensor, tile_rows: int, root: Tensor | None) -> None:
    distances = _distances(points, books, tile_rows, root)
    least = distances.min(dim=1).values
    got = distances.gather(1, chosen.unsqueeze(1)).squeeze(1)
    size = (points.double() if root is None else points.double() @ root.double()).square().sum(dim=1)
    assert bool((got - least <= 4e-6 * (least + size)).all())


def _error(
    points: Tensor, books: Tensor, tile_rows: int, roots: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """The weighted error of every tile [tiles] in float64, each vector at its nearest centroid."""
    rows, vectors, _ = points.shape
    total = torch.zeros(rows, dtype=torch.float64)
    for column in range(vectors):
        root = None if roots is None else roots[column]
        least = _distances(points[:, column], books, tile_rows, root).min(dim=1).values
        total += least if weights is None else least * weights[:, column].double()
    return torch.zeros(books.shape[0], dtype=torch.float64).index_add_(0, torch.arange(rows) // tile_rows, total)


def _spaced_ranks(points: np.ndarray, count: int, tile_rows: int) -> np.ndarray:
    """Vectors at equally spaced ranks of their Mahalanobis distance, tile by tile, in float64 [tiles, count, v]."""
    found = []
    for first in range(0, len(points), tile_rows):
        x = points[first : first + tile_rows].astype(np.float64).reshape(-1, points.shape[2])
        gap = x - x.mean(axis=0)
        distance = ((gap @ np.linalg.inv(gap.T @ gap)) * gap).sum(axis=1)
        ranks = np.rint(np.linspace(0, len(x) - 1, count)).astype(int)
        found.append(x[np.argsort(distance, kind="stable")[ranks]])
    return np.stack(found)


# ---------------------------------------------------------------- nearest centroids


@pytest.mark.parametrize("rooted", [False, True], ids=["plain", "rooted"])
@pytest.mark.parametrize("v", _LENGTHS)
def test_every_path_finds_a_nearest_centroid_of_the_points_own_tile(
    v: int, rooted: bool, path: str, generator: torch.Generator
) -> None:
    root = _roots(1, v)[0] if rooted else None
    for n, tile_rows, k in _SIZES:
        points = torch.randn(n, v, generator=generator)
        books = torch.randn(-(-n // tile_rows), k, v, generator=generator)
        _assert_nearest(nearest_tiles(points, books, tile_rows, root), points, books, tile_rows, root)
        for isa in _isas() if path == "cpp" else ():
            for threads in (1, 3):
                chosen = _call_nearest(points, books, tile_rows, root, threads=threads, isa=isa)
                _assert_nearest(chosen, points, books, tile_rows, root)


@pytest.mark.parametrize("v", _LENGTHS)
def test_small_integers_give_exactly_the_lowest_of_equal_centroids(
    v: int, path: str, generator: torch.Generator
) -> None:
    points = torch.randint(-3, 4, (83, v), generator=generator).float()
    books = torch.randint(-2, 3, (5, 37, v), generator=generator).float()
    books[:, 20:30] = books[:, 5:15]
    root = torch.triu(torch.randint(-2, 3, (v, v), generator=generator).float(), 1) + torch.eye(v)
    for metric in (None, root):
        expected = _distances(points, books, 20, metric).argmin(dim=1)
        assert torch.equal(nearest_tiles(points, books, 20, metric), expected)
        for isa in _isas() if path == "cpp" else ():
            assert torch.equal(_call_nearest(points, books, 20, metric, isa=isa), expected)


@pytest.mark.parametrize("v", [1, 4, 5])
def test_threads_do_not_change_the_codes(v: int, generator: torch.Generator) -> None:
    points, books = torch.randn(30_001, v, generator=generator), torch.randn(61, 200, v, generator=generator)
    for root in (None, _roots(1, v)[0]):
        for isa in _isas():
            alone = _call_nearest(points, books, 500, root, isa=isa)
            assert torch.equal(_call_nearest(points, books, 500, root, threads=3, isa=isa), alone)


def test_strided_tensors_are_read_as_they_are(path: str, generator: torch.Generator) -> None:
    points = torch.randn(4, 90, generator=generator).T
    books = torch.randn(5, 60, 8, generator=generator)[:, ::2, ::2]
    root = _roots(1, 4)[0].T
    plain = points.contiguous(), books.contiguous(), 20, root.contiguous()
    assert torch.equal(nearest_tiles(points, books, 20, root), nearest_tiles(*plain))
    _assert_nearest(nearest_tiles(points, books, 20, root), *plain)


@pytest.mark.parametrize("v", [1, 2, 4, 16])
def test_tiles_far_from_the_origin_keep_their_digits(v: int, path: str, generator: torch.Generator) -> None:
    points, books = torch.randn(60, v, generator=generator), torch.randn(3, 50, v, generator=generator)
    far = torch.tensor([0.0, 3e3, -2e4])
    moved = points + far.repeat_interleave(20).unsqueeze(1), books + far.view(3, 1, 1)
    for root in (None, _roots(1, v)[0] / _roots(1, v)[0].abs().max()):
        chosen = nearest_tiles(*moved, 20, root)
        distances = _distances(*moved, 20, root)
        least, got = distances.min(dim=1).values, distances.gather(1, chosen.unsqueeze(1)).squeeze(1)
        # A sum of v products of 2e4 is rounded to about 0.01; |x|^2 itself would be wrong by 100.
        assert bool((got.sqrt() - least.sqrt() <= 0.02).all())


@pytest.mark.parametrize("scale", [1e-16, 1e16])
@pytest.mark.parametrize("v", [1, 3, 8])
def test_huge_and_tiny_numbers_are_told_apart(v: int, scale: float, path: str, generator: torch.Generator) -> None:
    points = torch.randn(40, v, generator=generator) * scale
    books = torch.randn(4, 20, v, generator=generator) * scale
    for root in (None, _roots(1, v)[0]):
        _assert_nearest(nearest_tiles(points, books, 11, root), points, books, 11, root)


@pytest.mark.parametrize("v", _LENGTHS)
def test_nan_and_infinity_give_legal_codes(v: int, generator: torch.Generator) -> None:
    points, books = torch.randn(40, v, generator=generator), torch.randn(4, 20, v, generator=generator)
    points[3], points[17, 0], points[25, -1], books[1, 7], books[3] = torch.nan, torch.nan, torch.inf, torch.nan, -1e38
    for root in (None, _roots(1, v)[0]):
        for isa in _isas():
            chosen = _call_nearest(points, books, 11, root, isa=isa)
            assert not bool((chosen[11:22] == 7).any())
            _assert_nearest(chosen[:3], points[:3], books, 11, root)


def test_no_points_and_one_centroid(path: str) -> None:
    assert nearest_tiles(torch.empty(0, 4), torch.ones(0, 3, 4), 5).shape == (0,)
    assert nearest_tiles(torch.randn(9, 4), torch.ones(3, 1, 4), 4).tolist() == [0] * 9


# ---------------------------------------------------------------- fits: against float64


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("rooted", [False, True], ids=["identity", "rooted"])
@pytest.mark.parametrize("v", _LENGTHS)
def test_steps_equal_those_of_the_float64_oracle(
    v: int, rooted: bool, weighted: bool, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the documented seeds, on every path; 9 + 9 + 4 rows, so the last tile is ragged."""
    rows, tile_rows, vectors, k = 22, 9, 5, 4
    points = torch.randn(rows, vectors, v, generator=generator)
    roots = _roots(vectors, v) if rooted else None
    weights = torch.rand(rows, vectors, generator=generator) + 0.1 if weighted else None
    seeds = _spaced_ranks(points.numpy(), k, tile_rows)
    wanted, losses = [], []
    for tile, first in enumerate(range(0, rows, tile_rows)):
        part = slice(first, first + tile_rows)
        s = None if weights is None else weights[part].numpy()
        fitted = em(points[part].numpy(), list(_norms(roots, vectors, v)), s, seeds[tile], 3)
        assert len(np.unique(fitted.codes)) == k, "an oracle without repairs is of no use for empty clusters"
        wanted.append(fitted.centroids)
        losses.append(fitted.losses[-2])
    start = torch.from_numpy(seeds).float()
    found = []
    for isa in _isas():
        for threads in (1, 3):
            options: dict[str, Any] = {"iterations": 3, "isa": isa, "threads": threads}
            centroids, errors = _call_fit(points, k, tile_rows, start=start, roots=roots, weights=weights, **options)
            # The error is reported for the last assignment, before the last update.
            np.testing.assert_allclose(errors, losses, rtol=1e-4)
            found.append(centroids)
    for no_clib in ("0", "1"):
        monkeypatch.setenv(clib.DISABLE, no_clib)
        monkeypatch.setattr(clib, "warn_slow_once", lambda what: None)
        found.append(
            fit_tiles(
                points,
                k,
                tile_rows,
                generator=generator,
                roots=roots,
                weights=weights,
                seeding="mahalanobis",
                iterations=3,
                tolerance=_NEVER,
            )
        )
    for centroids in found:
        np.testing.assert_allclose(centroids.double().numpy(), np.stack(wanted), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("seeding", _SEEDINGS)
def test_both_paths_reach_the_same_error_from_the_same_random_numbers(
    seeding: Seeding, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = torch.randn(60, 6, 2, generator=torch.Generator().manual_seed(0))
    roots, weights = _roots(6, 2), torch.rand(60, 6, generator=torch.Generator().manual_seed(1))
    errors = []
    for no_clib in ("0", "1"):
        monkeypatch.setenv(clib.DISABLE, no_clib)
        monkeypatch.setattr(clib, "warn_slow_once", lambda what: None)
        books = fit_tiles(
            points,
            8,
            25,
            generator=torch.Generator().manual_seed(2),
            roots=roots,
            weights=weights,
            seeding=seeding,
            iterations=20,
        )
        assert books.shape == (3, 8, 2)
        errors.append(_error(points, books, 25, roots, weights))
    torch.testing.assert_close(errors[0], errors[1], rtol=1e-3, atol=0)


@pytest.mark.parametrize("v", [1, 2, 5, 8])
def test_no_step_raises_the_error(v: int, path: str, generator: torch.Generator) -> None:
    points = torch.randn(50, 4, v, generator=generator)
    roots, weights = _roots(4, v), torch.rand(50, 4, generator=generator)
    for seeding in _SEEDINGS:
        previous = torch.full((3,), torch.inf, dtype=torch.float64)
        for iterations in (1, 2, 3, 5, 8, 13):
            books = fit_tiles(
                points,
                6,
                20,
                generator=torch.Generator().manual_seed(1),
                roots=roots,
                weights=weights,
                seeding=seeding,
                iterations=iterations,
                tolerance=_NEVER,
            )
            error = _error(points, books, 20, roots, weights)
            assert bool((error <= previous * (1 + 1e-5)).all())
            previous = error


def test_threads_do_not_change_the_centroids(generator: torch.Generator) -> None:
    points, weights = torch.randn(700, 8, 4, generator=generator), torch.rand(700, 8, generator=generator)
    uniforms = torch.rand(44, 7, generator=generator, dtype=torch.float64)
    for isa in _isas():
        options: dict[str, Any] = {"uniforms": uniforms, "roots": _roots(8, 4), "weights": weights, "isa": isa}
        alone, errors = _call_fit(points, 7, 16, **options)
        assert bool(torch.isfinite(alone).all())
        several, same = _call_fit(points, 7, 16, **options, threads=3)
        assert torch.equal(alone, several)
        assert torch.equal(errors, same)


@pytest.mark.parametrize("seeding", _SEEDINGS)
def test_the_generator_decides_everything_and_inputs_stay(
    seeding: Seeding, path: str, generator: torch.Generator
) -> None:
    points = torch.randn(3, 40, 2, generator=generator).transpose(0, 1)
    weights, roots = torch.rand(3, 40, generator=generator).T, _roots(3, 2).transpose(1, 2)
    before = points.clone(), weights.clone(), roots.clone()

    def fit(seed: int, *tensors: Tensor) -> Tensor:
        x, s, t = tensors
        source = torch.Generator().manual_seed(seed)
        return fit_tiles(x, 5, 13, generator=source, roots=t, weights=s, seeding=seeding)

    first = fit(1, points, weights, roots)
    assert torch.equal(first, fit(1, points, weights, roots))
    assert torch.equal(first, fit(1, *(t.contiguous() for t in before)))
    assert torch.equal(first, fit(2, points, weights, roots)) == (seeding == "mahalanobis")
    assert all(torch.equal(old, new) for old, new in zip(before, (points, weights, roots), strict=True))


def test_a_tolerance_ends_a_fit_early_and_costs_little(path: str, generator: torch.Generator) -> None:
    points = torch.randn(200, 4, 2, generator=generator)
    errors = [
        float(
            _error(
                points,
                fit_tiles(
                    points, 8, 200, generator=generator, seeding="mahalanobis", iterations=60, tolerance=tolerance
                ),
                200,
            )
        )
        for tolerance in (0.0, 1e-3, 0.5)
    ]
    assert errors[0] <= errors[1] * (1 + 1e-6) < errors[2]
    assert errors[1] < errors[0] * 1.05


# ---------------------------------------------------------------- fits: what they must survive


@pytest.mark.parametrize("seeding", _SEEDINGS)
@pytest.mark.parametrize("v", [1, 2, 5, 16])
@pytest.mark.parametrize("kind", ["few-vectors", "copies", "all-equal", "zeros"])
def test_as_many_centroids_as_distinct_vectors_store_them_exactly(
    kind: str, v: int, seeding: Seeding, path: str, generator: torch.Generator
) -> None:
    points = torch.randn(11, 3, v, generator=generator)
    k = 13
    if kind == "copies":
        points = points[:2, :2].repeat(6, 2, 1)[:11, :3].contiguous()
    elif kind == "all-equal":
        points = points[:1, :1].expand(11, 3, v).contiguous()
    elif kind == "zeros":
        points = torch.zeros(11, 3, v)
    for roots in (None, _roots(3, v)):
        books = fit_tiles(points, k, 4, generator=generator, roots=roots, seeding=seeding, iterations=40)
        assert books.shape == (3, k, v)
        assert bool(torch.isfinite(books).all())
        # Solving (sum M) c = sum M x for one vector loses digits where M is ill-conditioned.
        assert float(_error(points, books, 4).max()) <= 1e-5 * max(float(points.square().sum()), 1e-30)


@pytest.mark.parametrize("seeding", _SEEDINGS)
@pytest.mark.parametrize("v", [1, 2, 4, 5])
def test_one_centroid_is_the_weighted_mean_under_the_metrics(
    v: int, seeding: Seeding, path: str, generator: torch.Generator
) -> None:
    points, weights = torch.randn(10, 3, v, generator=generator), torch.rand(10, 3, generator=generator)
    roots = _roots(3, v)
    books = fit_tiles(points, 1, 4, generator=generator, roots=roots, weights=weights, seeding=seeding)
    norms, x, s = _norms(roots, 3, v), points.double().numpy(), weights.double().numpy()
    for tile in range(3):
        part = slice(4 * tile, 4 * tile + 4)
        left = np.einsum("rc,cab->ab", s[part], norms)
        right = np.einsum("rc,cab,rcb->a", s[part], norms, x[part])
        np.testing.assert_allclose(books[tile, 0].double().numpy(), np.linalg.solve(left, right), rtol=1e-4, atol=1e-4)
    plain = fit_tiles(points, 1, 4, generator=generator, seeding=seeding)
    np.testing.assert_allclose(plain[1, 0], points[4:8].mean(dim=(0, 1)), rtol=1e-5, atol=1e-5)


def test_vectors_without_weight_neither_seed_nor_pull(path: str, generator: torch.Generator) -> None:
    points, weights = torch.randn(60, 4, 2, generator=generator), torch.ones(60, 4)
    weights[:, 1] = 0
    points[:, 1] += 1e3
    books = fit_tiles(points, 4, 20, generator=generator, weights=weights, seeding="kmeans++")
    assert float(books.abs().max()) < 10
    alone = fit_tiles(points[:, [0, 2, 3]].contiguous(), 4, 20, generator=generator, seeding="kmeans++")
    assert float(_error(points, books, 20, weights=weights).sum()) < 1.5 * float(
        _error(points[:, [0, 2, 3]], alone, 20).sum()
    )


@pytest.mark.parametrize("seeding", _SEEDINGS)
def test_a_tile_without_any_weight_does_not_disturb_the_others(
    seeding: Seeding, path: str, generator: torch.Generator
) -> None:
    points, weights = torch.randn(60, 4, 2, generator=generator), torch.rand(60, 4, generator=generator)
    roots = _roots(4, 2)

    def fit() -> Tensor:
        source = torch.Generator().manual_seed(0)
        return fit_tiles(points, 6, 20, generator=source, roots=roots, weights=weights, seeding=seeding)

    whole = fit()
    weights[20:40] = 0
    books = fit()
    assert torch.equal(books[[0, 2]], whole[[0, 2]])
    assert bool(torch.isfinite(books).all())
    weights.zero_()
    assert bool(torch.isfinite(fit()).all())


@pytest.mark.parametrize("exponent", [-50, 50])
@pytest.mark.parametrize("seeding", _SEEDINGS)
def test_the_scale_of_the_points_does_not_matter(
    exponent: int, seeding: Seeding, path: str, generator: torch.Generator
) -> None:
    points, roots, scale = torch.randn(60, 4, 3, generator=generator), _roots(4, 3), 2.0**exponent

    def error(factor: float) -> Tensor:
        source, x = torch.Generator().manual_seed(0), points * factor
        books = fit_tiles(x, 6, 25, generator=source, roots=roots, seeding=seeding)
        return _error(points, books / factor, 25, roots)

    # The ridge under the covariances of the seeding is not quite scale-free.
    torch.testing.assert_close(error(scale), error(1.0), rtol=1e-6 if seeding == "kmeans++" else 0.1, atol=0)


@pytest.mark.parametrize("seeding", _SEEDINGS)
@pytest.mark.parametrize("v", [1, 3, 8])
def test_a_fit_far_from_the_origin_is_as_good_as_at_the_origin(
    v: int, seeding: Seeding, path: str, generator: torch.Generator
) -> None:
    points, far = torch.randn(60, 5, v, generator=generator), torch.tensor([0.0, 1e3, -5e3])
    moved = points + far.repeat_interleave(20).view(-1, 1, 1)

    def fit(x: Tensor) -> Tensor:
        return fit_tiles(x, 6, 20, generator=torch.Generator().manual_seed(0), seeding=seeding)

    there, here = _error(moved, fit(moved), 20), _error(points, fit(points), 20)
    assert bool((there < 1.25 * here).all())


@pytest.mark.parametrize("seeding", _SEEDINGS)
@pytest.mark.parametrize("v", [1, 2, 5])
@pytest.mark.parametrize("spoiled", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_end_and_stay_in_their_tile(
    spoiled: float, v: int, seeding: Seeding, path: str, generator: torch.Generator
) -> None:
    """Callers check their input; a fit must come to an end all the same, whatever it finds."""
    points = torch.randn(30, 3, v, generator=generator)
    points[12, 1, 0] = spoiled
    for roots in (None, _roots(3, v)):
        books = fit_tiles(points, 6, 10, generator=generator, roots=roots, seeding=seeding)
        assert books.shape == (3, 6, v)
        assert bool(torch.isfinite(books[[0, 2]]).all())


@pytest.mark.parametrize("v", [1, 2, 4])
def test_well_separated_clusters_are_found(v: int, path: str, generator: torch.Generator) -> None:
    """kmeans++ and repairs together; 8 clusters per tile, 100 times as far apart as they are wide."""
    centres = torch.arange(8).float().view(1, 8, 1) * 10 + torch.randn(3, 8, v, generator=generator)
    which = torch.arange(40 * 6).view(1, -1) % 8
    points = centres[:, which[0]] + 0.1 * torch.randn(3, 240, v, generator=generator)
    points = points.view(3 * 40, 6, v)
    books = fit_tiles(points, 8, 40, generator=generator, roots=_roots(6, v), seeding="kmeans++")
    gaps = (books.unsqueeze(2) - centres.unsqueeze(1)).square().sum(dim=3)
    assert float(gaps.min(dim=1).values.max()) < 0.05


# ---------------------------------------------------------------- metrics


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 8, 16, 30])
def test_roots_are_the_inverse_diagonal_blocks_of_the_factor(width: int) -> None:
    """22 columns: the last vector is ragged for most widths, and 30 is wider than the matrix."""
    hessian = second_moment(activations(np.random.default_rng(4), 22, tokens=200))
    upper = inverse_factor(damped(hessian))
    found = factorize(torch.from_numpy(hessian))
    roots = block_roots(found, width)
    single = block_roots(found, width, diagonal=True)
    assert roots.dtype == torch.float32
    assert roots.shape == single.shape == (-(-22 // width), width, width)
    for vector, (root, alone) in enumerate(zip(roots.double().numpy(), single.double().numpy(), strict=True)):
        p = slice(vector * width, min((vector + 1) * width, 22))
        real = p.stop - p.start
        corner = np.linalg.inv(upper[p, p])
        np.testing.assert_allclose(root[:real, :real], corner, rtol=1e-3, atol=1e-4 * np.abs(corner).max())
        np.testing.assert_allclose(alone[:real, :real], np.diag(1 / np.diag(upper[p, p])), rtol=1e-3)
        for metric in (root, alone):
            assert not metric[:real, real:].any()
            assert not metric[real:, :real].any()
            assert not np.tril(metric, -1).any()
            spare = np.diag(metric)[real:]
            # Columns that do not exist must not decide anything, and must not make the equations singular.
            assert (spare > 0).all()
            assert (spare < 0.01 * np.diag(metric)[:real].mean()).all()


def test_padding_does_not_decide_what_is_near() -> None:
    hessian = torch.from_numpy(second_moment(activations(np.random.default_rng(5), 6, tokens=100)))
    root = block_roots(factorize(hessian), 4)[-1]
    generator = torch.Generator().manual_seed(0)
    points, books = torch.randn(50, 4, generator=generator), torch.randn(1, 9, 4, generator=generator)
    points[:, 2:] = 0
    chosen = nearest_tiles(points, books, 50, root)
    short = _distances(points[:, :2], books[:, :, :2], 50, root[:2, :2])
    excess = short.gather(1, chosen.unsqueeze(1)).squeeze(1) - short.min(dim=1).values
    assert float((excess / short.mean(dim=1)).max()) < 1e-4
