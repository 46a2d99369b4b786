"""The universal codebooks: immutable files, exact decoding, and the distortion that each one states."""

from __future__ import annotations

import hashlib
import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from octavo import codebooks
from octavo._core.errors import FormatError, UsageError
from octavo.codebooks import Codebook

FOLDER = Path(codebooks.__file__).parent
NAMES = codebooks.names()
ADDITIVE = [name for name in NAMES if len(codebooks.parse(name)[1]) > 1]
#: Sums of all stages but the last that the oracle below extends by the last.
KEPT = 512


def _squared_errors(book: Codebook, points: np.ndarray) -> np.ndarray:
    """[n]: squared error per weight of the nearest sums, float64, by comparing with all sums of up to two stages."""
    tables = [table.numpy().astype(np.float64) * scale for table, scale in zip(book.tables, book.scales, strict=True)]
    points = np.abs(points) if book.sign_bits else points
    sums = tables[0]
    for table in tables[1:2]:
        sums = (sums[:, None, :] + table[None, :, :]).reshape(-1, book.vector_length)
    norms, out = np.square(sums).sum(axis=1), []
    for point in points:
        distances = norms - 2 * (sums @ point)
        if len(tables) < 3:
            best = distances.min()
        else:
            near = np.argpartition(distances, KEPT)[:KEPT]
            added = np.square(tables[2]).sum(axis=1) - 2 * (tables[2] @ point)
            best = (distances[near, None] + added + 2 * (sums[near] @ tables[2].T)).min()
        out.append((best + np.square(point).sum()) / book.vector_length)
    return np.array(out)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_says_what_the_tables_are(name: str) -> None:
    book = codebooks.get(name)
    assert (book.name, book.vector_length, book.stages, book.sign_bits) == (name, *codebooks.parse(name))
    assert book.bits == (sum(book.stages) + book.vector_length * book.sign_bits) / book.vector_length
    assert len(book.tables) == len(book.scales) == len(book.stages)
    for stage, (bits, table) in enumerate(zip(book.stages, book.tables, strict=True)):
        assert table.shape == (1 << bits, book.vector_length)
        assert table.dtype is torch.int8
        assert int(table.min()) >= (0 if book.sign_bits else -127)
        assert len(torch.unique(table, dim=0)) == len(table)
        norms = table.int().square().sum(dim=1)
        assert bool((norms.diff() >= 0).all())
        assert book.centroids(stage).shape == table.shape


@pytest.mark.parametrize("name", NAMES)
def test_centroids_and_their_sums_are_exact_in_float32(name: str) -> None:
    book = codebooks.get(name)
    single, double = torch.zeros(500, book.vector_length), torch.zeros(500, book.vector_length, dtype=torch.float64)
    for stage, (table, scale) in enumerate(zip(book.tables, book.scales, strict=True)):
        pick = torch.randint(len(table), (500,))
        assert torch.equal(book.centroids(stage).double(), table.double() * scale)
        single, double = single + book.centroids(stage)[pick], double + table[pick].double() * scale
    assert torch.equal(single.double(), double)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_centroids_are_cast_after_the_product_in_float32(dtype: torch.dtype) -> None:
    book = codebooks.get(NAMES[0])
    assert torch.equal(book.centroids(0, dtype), (book.tables[0].float() * book.scales[0]).to(dtype))


@pytest.mark.parametrize("name", ADDITIVE)
def test_scales_differ_by_powers_of_two_and_sums_of_small_codebooks_fit_int8(name: str) -> None:
    book = codebooks.get(name)
    ratios = [math.log2(max(book.scales) / scale) for scale in book.scales]
    assert ratios == [round(ratio) for ratio in ratios]
    if book.vector_length == 8 and book.bits <= 2:
        assert not any(ratios)
        high = torch.stack([table.int().amax(dim=0) for table in book.tables]).sum(dim=0)
        low = torch.stack([table.int().amin(dim=0) for table in book.tables]).sum(dim=0)
        assert int(high.max()) <= 127
        assert int(low.min()) >= -127


@pytest.mark.parametrize("name", NAMES)
def test_the_stated_distortion_is_that_of_fresh_gaussian_vectors(name: str) -> None:
    book = codebooks.get(name)
    count = 400 if max(book.stages) == 16 or len(book.stages) > 1 else 4000
    found = _squared_errors(book, np.random.default_rng().standard_normal((count, book.vector_length)))
    assert abs(found.mean() - book.distortion) <= 5 * found.std() / math.sqrt(count)
    assert 2 ** (-2 * book.bits) < book.distortion


def test_more_bits_of_the_same_vector_length_mean_less_distortion() -> None:
    books = sorted(map(codebooks.get, NAMES), key=lambda book: (book.vector_length, book.bits))
    for small, large in itertools.pairwise(books):
        if small.vector_length == large.vector_length and small.bits < large.bits:
            assert small.distortion > large.distortion, (small.name, large.name)


# ---------------------------------------------------------------- files


def test_there_is_one_file_for_every_name_and_none_besides() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.safetensors")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_file_is_the_one_that_its_name_promised(name: str) -> None:
    data = (FOLDER / f"{name}.safetensors").read_bytes()
    assert hashlib.sha256(data).hexdigest() == codebooks._SHA256[name]


def test_a_damaged_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = NAMES[0]
    data = bytearray((FOLDER / f"{name}.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / f"{name}.safetensors").write_bytes(data)
    monkeypatch.setattr(codebooks, "__file__", str(tmp_path / "__init__.py"))
    codebooks.get.cache_clear()
    with pytest.raises(FormatError, match="damaged: SHA-256 wanted .* Install Octavo again"):
        codebooks.get(name)


def test_a_missing_file_is_reported_with_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codebooks, "__file__", str(tmp_path / "__init__.py"))
    codebooks.get.cache_clear()
    with pytest.raises(FormatError, match=f"{NAMES[0]}.safetensors cannot be read: No such file"):
        codebooks.get(NAMES[0])


def test_an_unknown_name_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(UsageError, match=f"'{NAMES[0]}x' is unknown. Did you mean '{NAMES[0]}'"):
        codebooks.get(f"{NAMES[0]}x")


def test_a_codebook_is_read_once() -> None:
    assert codebooks.get(NAMES[0]) is codebooks.get(NAMES[0])


_IMPORT = """
import sys
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
from octavo import codebooks
codebooks.names()
assert not [path for path in opened if path.endswith(".safetensors")], opened
codebooks.get(codebooks.names()[0])
assert len([path for path in opened if path.endswith(".safetensors")]) == 1, opened
"""


def test_importing_reads_no_table_and_getting_reads_one() -> None:
    done = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
