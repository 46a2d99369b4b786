"""The dimension study: numbers against theory, and what it does with rows that it cannot or need not measure."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo import algorithms
from octavo._core.errors import FormatError, Interrupted, NumericalError, UsageError
from octavo.models.adapter import CausalModel
from octavo.models.source import resolve
from octavo.pipeline import run as pipeline
from octavo.report import dimension, plots, study, tables
from octavo.report.dimension import Options


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the models that were really quantized, in order."""
    done: list[str] = []
    quantize = pipeline.quantize

    def count(model: Any, out: Path, **options: Any) -> Any:
        report = quantize(model, out, **options)
        done.append(Path(out).name)
        return report

    monkeypatch.setattr(pipeline, "quantize", count)
    return done


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few Gaussian vectors."""
    monkeypatch.setattr(dimension, "_VECTORS", 4096)


@pytest.fixture
def texts(tiny_text_file: Path) -> dict[str, Any]:
    return {"text": str(tiny_text_file), "calib": str(tiny_text_file), "ctx": 32, "samples": 2, "max_tokens": 128}


# ------------------------------------------------------------------------------------------------ Gaussian vectors


def test_the_best_scalar_quantizers_are_those_of_max() -> None:
    # Mean squared errors of Max (1960), Table I.
    for bits, error in {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}.items():
        assert dimension.lloyd_max_db(bits) == pytest.approx(-10 * math.log10(error), abs=0.01)


def test_k_means_finds_them_and_longer_vectors_come_nearer_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dimension, "_VECTORS", 1 << 16)
    rows = [dimension.gaussian(d, 2, Options()) for d in (1, 2, 4)]
    scalar, pairs, fours = (row["sqnr_db"] for row in rows)
    assert scalar == pytest.approx(9.30, abs=0.1)
    assert scalar + 0.2 < pairs < fours - 0.2
    for d, row in zip((1, 2, 4), rows, strict=True):
        assert row["gap_db"] == pytest.approx(12.0412 - row["sqnr_db"], abs=1e-4)
        assert 1.5 < row["gap_db"] < 2.9
        assert row["effective_bits"] == pytest.approx(row["sqnr_db"] / 6.0206, abs=1e-4)
        assert min(row["sqnr_train_db"], row["sqnr_fresh_db"]) <= row["sqnr_db"]
        assert (row["centroids"], row["vectors"], row["reason"]) == (1 << 2 * d, 1 << 16, None)
        assert 1 <= row["steps"] <= 100
    # What the fit saw is overestimated: most with the fewest vectors per centroid.
    assert rows[2]["sqnr_train_db"] > rows[2]["sqnr_fresh_db"]


def test_scalars_reach_the_best_quantizer_at_four_bits_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dimension, "_VECTORS", 1 << 17)
    row = dimension.gaussian(1, 4, Options())
    assert row["sqnr_db"] == pytest.approx(row["lloyd_max_db"], abs=0.05)


@pytest.mark.usefixtures("small")
def test_the_same_seed_gives_the_same_numbers() -> None:
    first, again, other = (dimension.gaussian(2, 2, Options(seed=seed))["sqnr_db"] for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.usefixtures("small")
def test_codebooks_that_are_too_large_are_rows_with_a_reason() -> None:
    large, broken, fine = (dimension.gaussian(d, rate, Options()) for d, rate in ((8, 3), (1, 1.5), (2, 1.5)))
    assert (large["sqnr_db"], large["reason"]) == (None, "2^24 centroids are more than 65536")
    assert (broken["gap_db"], broken["reason"]) == (None, "1.5 x 1 is no whole number of index bits")
    assert (fine["centroids"], fine["lloyd_max_db"]) == (8, None)


# ------------------------------------------------------------------------------------------------ matrices


@pytest.mark.parametrize(
    ("wanted", "blocks"), [(1, [0]), (2, [0, 29]), (3, [0, 15, 29]), (99, [*range(30)]), ((7, 2), [2, 7])]
)
def test_blocks_are_spread_evenly_or_given(wanted: Any, blocks: list[int]) -> None:
    assert dimension.choose_blocks(wanted, 30) == blocks


@pytest.mark.parametrize("wanted", [0, (), (30,), (-1, 2)])
def test_blocks_that_are_not_there_are_refused(wanted: Any) -> None:
    with pytest.raises(UsageError, match="layers wanted"):
        dimension.choose_blocks(wanted, 30)


def test_matrices_are_measured_plain_and_at_equal_true_bits(tiny_llama: Path) -> None:
    causal = CausalModel(resolve(tiny_llama))
    rows = [dimension.layers(d, 2, Options(blocks=(1,), overhead=0.5), causal) for d in (1, 2, 4)]
    for d, row in zip((1, 2, 4), rows, strict=True):
        assert {m["module"].split(".")[2] for m in row["matrices"]} == {"1"}
        assert len(row["matrices"]) == 7
        assert row["plain_bits"] == pytest.approx(2 + 7 * 16 * d * 4**d / _weights(row))
        assert row["target_bits"] == 2.5
        assert 1.5 < row["equal_bits"] <= 2.5
        assert row["equal_gap_db"] == pytest.approx(row["equal_bits"] * 6.0206 - row["equal_sqnr_db"], abs=1e-3)
        assert {m["layout"]["vector_length"] for m in row["matrices"]} == {d}
        errors = sum(m["plain_error"] * m["weights"] for m in row["matrices"]) / _weights(row)
        assert row["plain_sqnr_db"] == pytest.approx(-10 * math.log10(errors))
    # These weights are Gaussian; a codebook of their own cannot be worse than one for the source.
    scalar, pairs, fours = (row["plain_sqnr_db"] for row in rows)
    assert scalar == pytest.approx(9.3, abs=0.15)
    assert scalar < pairs < fours


def _weights(row: dict[str, Any]) -> int:
    return sum(matrix["weights"] for matrix in row["matrices"])


def test_a_matrix_without_a_number_leaves_the_mean_open_and_says_why(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    causal = CausalModel(resolve(tiny_llama))
    row = dimension.layers(4, 2, Options(blocks=(0,), max_centroids=16), causal)
    assert row["plain_sqnr_db"] is None
    assert row["equal_sqnr_db"] is not None
    assert row["reason"] == "plain: 2^8 centroids are more than 16 (7 of 7 matrices)"

    def fail(*_: Any, **__: Any) -> None:
        raise UsageError("nothing fits")

    method = algorithms.registry.get("gptvq")
    for name in ("layouts", "quantize"):
        with monkeypatch.context() as patch:
            patch.setattr(method, name, fail)
            row = dimension.layers(4, 3, Options(blocks=(0,)), causal)
        assert row["equal_sqnr_db"] is None
        assert "fewer than two vectors for each of 2^12 centroids" in row["reason"]
        assert row["reason"].endswith("equal: nothing fits (7 of 7 matrices)")


# ------------------------------------------------------------------------------------------------ the whole model


def test_models_are_measured_at_equal_true_bits(
    tiny_llama: Path, tmp_path: Path, texts: dict[str, Any], jobs: list[str]
) -> None:
    options = Options(overhead=0.5, **texts)
    low, high = (dimension.model(2, rate, options, tiny_llama, tmp_path / f"{rate}") for rate in (2, 4))
    assert jobs == ["2", "4"]
    assert low["bits_per_weight"] <= 2.5 < high["bits_per_weight"] <= 4.5
    assert low["kl"] > 3 * high["kl"] > 0
    assert low["tokens"] == 4 * 31
    assert low["quantize_seconds"] > 0


def test_kept_models_are_used_again(tiny_llama: Path, tmp_path: Path, texts: dict[str, Any], jobs: list[str]) -> None:
    first, again = (dimension.model(2, 2, Options(**texts), tiny_llama, tmp_path / "out") for _ in range(2))
    assert len(jobs) == 1
    assert again["kl"] == first["kl"]
    assert again["notes"] == ["quantized by an earlier run"]


def test_a_model_that_takes_more_bits_or_cannot_be_made_says_so(
    tiny_llama: Path, tmp_path: Path, texts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = dimension.model(1, 1, Options(overhead=0, **texts), tiny_llama, tmp_path / "more")
    assert row["bits_per_weight"] > 1
    assert f"{row['bits_per_weight']:.3f} bits are more than 1" in row["notes"]

    def fail(*_: Any, **__: Any) -> None:
        raise NumericalError("the seventh matrix is odd")

    monkeypatch.setattr(pipeline, "quantize", fail)
    row = dimension.model(2, 2, Options(**texts), tiny_llama, tmp_path / "failed")
    assert (row["kl"], row["bits_per_weight"], row["reason"]) == (None, None, "the seventh matrix is odd")


# ------------------------------------------------------------------------------------------------ the job


@pytest.mark.usefixtures("small")
def test_a_study_that_was_killed_continues_without_repeating_rows(
    tiny_llama: Path, tmp_path: Path, texts: dict[str, Any], jobs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "study"
    options = Options(dimensions=(1, 2), bits=(2,), blocks=1, **texts)
    quantize = pipeline.quantize

    def killed(model: Any, path: Path, **more: Any) -> Any:
        if jobs:
            raise KeyboardInterrupt
        return quantize(model, path, **more)

    monkeypatch.setattr(pipeline, "quantize", killed)
    with pytest.raises(KeyboardInterrupt):
        study.run(out, tiny_llama, options)
    stopped = json.loads((out / study.JSON).read_text())
    assert {part: len(rows) for part, rows in stopped["rows"].items()} == {"gaussian": 2, "layers": 2, "model": 1}
    assert stopped["complete"] is False
    study.redraw(out / study.JSON)
    assert "not finished" in (out / study.MARKDOWN).read_text()

    with pytest.raises(UsageError, match="--resume"):
        study.run(out, tiny_llama, options)
    monkeypatch.setattr(pipeline, "quantize", quantize)
    document = study.run(out, tiny_llama, options, resume=True)
    assert jobs == ["gptvq-d1-2bit", "gptvq-d2-2bit"]
    assert document["complete"] is True
    assert document["seconds"] > stopped["seconds"]
    for part, rows in stopped["rows"].items():
        assert document["rows"][part][: len(rows)] == rows
    assert sorted(path.name for path in out.iterdir()) == ["dimension.json", "dimension.md", "dimension.svg"]

    # Everything is there: only what is new is measured.
    more = study.run(out, tiny_llama, Options(dimensions=(1, 2, 4), bits=(2,), blocks=1, **texts), resume=True)
    assert jobs[2:] == ["gptvq-d4-2bit"]
    assert [row["dimension"] for row in more["rows"]["model"]] == [1, 2, 4]


@pytest.mark.usefixtures("small")
def test_a_stop_ends_a_study_between_rows(tmp_path: Path) -> None:
    options, done = Options(dimensions=(1, 2), bits=(2,), parts=("gaussian",)), []
    with pytest.raises(Interrupted, match="R = 2, d = 2"):
        study.run(tmp_path, None, options, say=done.append, stop=lambda: len(done) == 1)
    (row,) = json.loads((tmp_path / study.JSON).read_text())["rows"]["gaussian"]
    assert (row["dimension"], row["limit_db"]) == (1, pytest.approx(12.041, abs=0.001))


@pytest.mark.usefixtures("small")
def test_a_study_does_not_mix_settings(tiny_llama: Path, tmp_path: Path) -> None:
    options = {"dimensions": (1,), "bits": (2,), "parts": ("layers",), "blocks": 1}
    study.run(tmp_path, tiny_llama, Options(**options))
    with pytest.raises(UsageError, match=r"layers overhead: 0.25, now 0.5"):
        study.run(tmp_path, tiny_llama, Options(**options, overhead=0.5), resume=True)
    # Another part is none of its business.
    document = study.run(tmp_path, None, Options(dimensions=(1,), bits=(2,), parts=("gaussian",)), resume=True)
    assert [len(document["rows"][part]) for part in study.PARTS] == [1, 1, 0]
    assert document["model"] == tiny_llama.name


@pytest.mark.usefixtures("small")
def test_a_skipped_row_is_made_when_the_limit_allows_it(tmp_path: Path) -> None:
    def measure(limit: int, resume: bool = False) -> list[dict[str, Any]]:
        options = Options(dimensions=(2,), bits=(2,), parts=("gaussian",), max_centroids=limit)
        return study.run(tmp_path, None, options, resume=resume)["rows"]["gaussian"]

    assert [row["sqnr_db"] for row in measure(8)] == [None]
    assert [row["centroids"] for row in measure(16, resume=True)] == [16]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"parts": ()}, "some of gaussian"),
        ({"dimensions": (0,)}, "dimensions wanted"),
        ({"dimensions": ()}, "dimensions wanted"),
        ({"dimensions": (3,)}, "vector_length"),
        ({"bits": (9,)}, "bits wanted"),
        ({"bits": (0.1,), "overhead": 0}, "bits wanted"),
        ({"overhead": -1}, "overhead wanted"),
        ({"max_centroids": 1}, "max_centroids"),
        ({"method": "gptvc"}, "Did you mean"),
        ({"method": "rtn"}, "no vector_length"),
    ],
)
def test_options_that_no_row_could_have_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Options(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"blocks": (5,)}, "block indices 0..1"),
        ({"max_tokens": 16}, "max_tokens"),
        ({"samples": 100_000}, "too little text"),
        ({"text": "nowhere.txt"}, "nowhere.txt"),
        ({"ctx": 100_000, "max_tokens": None}, "positions of the model"),
    ],
)
def test_what_would_fail_later_is_refused_before_any_work(
    tiny_llama: Path, tmp_path: Path, texts: dict[str, Any], values: dict[str, Any], message: str
) -> None:
    with pytest.raises((UsageError, FormatError), match=message):
        study.run(tmp_path / "out", tiny_llama, Options(**{**texts, **values}))
    assert not (tmp_path / "out").exists()


def test_a_study_of_a_model_wants_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="MODEL is missing"):
        study.run(tmp_path / "out", None, Options())


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UsageError, match=r"thesis\.tex"):
        study.run(tmp_path, None, Options(parts=("gaussian",)), resume=True)
    (tmp_path / study.JSON).write_text('{"study": "dimension"}')
    with pytest.raises(FormatError, match="no result of"):
        study.redraw(tmp_path / study.JSON)


# ------------------------------------------------------------------------------------------------ tables and plot


def _document() -> dict[str, Any]:
    """A document as it may be after hand: every kind of row, numbers that are easy to find."""
    gaussian = {"bits": 2, "dimension": 1, "limit_db": 12.04, "seconds": 1.0, "reason": None}
    gaussian |= {"centroids": 4, "vectors": 1048576, "steps": 13, "sqnr_train_db": 9.29, "sqnr_fresh_db": 9.31}
    gaussian |= {"sqnr_db": 9.3, "gap_db": 2.74, "lloyd_max_db": 9.3, "effective_bits": 1.5447}
    skipped = {"bits": 2, "dimension": 8, "sqnr_db": None, "gap_db": None, "seconds": 0.0, "reason": "too | large"}
    layers = {"bits": 2, "dimension": 1, "target_bits": 2.25, "plain_bits": 2.001, "plain_sqnr_db": 9.1}
    layers |= {"plain_gap_db": 2.94, "equal_bits": 2.249, "equal_sqnr_db": None, "equal_gap_db": None, "seconds": 3.0}
    layers |= {"reason": "equal: no", "matrices": []}
    model = {"bits": 2, "dimension": 1, "target_bits": 2.25, "bits_per_weight": 2.2488, "kl": 0.1234, "kl_se": 0.01}
    model |= {"perplexity": 20.5, "perplexity_se": None, "top1": 0.75, "top1_se": 0.002, "quantize_seconds": 100.0}
    model |= {"seconds": 120.0, "reason": None, "notes": ["odd"], "reference_perplexity": 18.25, "tokens": 4092}
    model |= {"windows": 4, "ctx": 1024}
    failed = {
        "bits": 3,
        "dimension": 8,
        "target_bits": 3.25,
        "kl": None,
        "notes": [],
        "reason": "failed",
        "seconds": 1.0,
    }
    return {
        "study": "dimension",
        "octavo": "0.1.0",
        "versions": {"torch": "2.9"},
        "command": ["octavo", "study", "a b"],
        "machine": {"platform": "Linux", "threads": {"torch": 2}},
        "model": "tiny",
        "complete": True,
        "seconds": 125.0,
        "settings": {"layers": {"blocks": [0, 1], "method": "gptvq"}, "model": {"method": "gptvq"}},
        "rows": {"gaussian": [gaussian, skipped], "layers": [layers], "model": [model, failed]},
    }


def test_markdown_has_every_row_with_its_numbers_or_its_reason() -> None:
    text = tables.markdown(_document())
    assert "octavo study 'a b'" in text
    assert "| 2 | 1 | 4 | 1,048,576 | 13 | 9.29 | 9.31 | 9.30 | 2.74 | 9.30 | 1.545 | 1.0 |  |" in text
    assert "| 2 | 8 | - | - | - | - | - | - | - | - | - | 0.0 | too \\| large |" in text
    assert "| 2 | 1 | 9.10 | 2.94 | 2.001 | 2.25 | 2.249 | - | - | 3.0 | equal: no |" in text
    assert "| 2 | 1 | 2.25 | 2.249 | 0.1234 ± 0.0100 | 20.50 | 0.750 ± 0.002 | 100 | 120.0 | odd |" in text
    assert "| 3 | 8 | 3.25 | - | - | - | - | - | 1.0 | failed |" in text
    assert "tiny, blocks 0, 1" in text
    assert "original: 18.25" in text
    assert "4,092 tokens in 4 windows of 1024" in text
    assert text.count("## ") == 3
    widths = {line.count(" | ") for line in text.splitlines() if line.startswith("| 2 | 1 | 4 ")}
    assert widths == {12}


def test_empty_and_failed_parts_have_no_numbers() -> None:
    document = _document()
    document["rows"] = {"gaussian": [], "layers": [], "model": document["rows"]["model"][1:]}
    ((title, about, columns, rows),) = tables.tables(document)
    assert (title, about) == ("The quantized model", "No row could be measured.")
    assert len(columns) == len(rows[0])
    assert plots.dimension(document).count(b"not measured") == 3


def test_the_plot_comes_from_the_document_alone() -> None:
    document = json.loads(json.dumps(_document()))
    picture = plots.dimension(document)
    assert picture == plots.dimension(document)
    text = picture.decode()
    for part in ("<svg", "Gaussian vectors", "Matrices", "Quantized model", "2 bits", "d = 1", "KL per token"):
        assert part in text
    assert "not measured" not in text


def test_without_matplotlib_there_is_a_note_and_everything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(document: Any) -> bytes:
        raise ImportError("No module named 'matplotlib'")

    monkeypatch.setattr(plots, "dimension", missing)
    (note,) = study.write(_document(), tmp_path)
    assert 'pip install "octavo[report]"' in note
    assert [path.name for path in tmp_path.iterdir()] == [study.MARKDOWN]


def test_a_matrix_of_zeros_is_stored_without_error() -> None:
    zeros = torch.zeros(8, 8)
    assert dimension._relative_error(zeros, zeros) == 0
    assert math.isfinite(dimension._db(0.0))
