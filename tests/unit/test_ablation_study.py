"""VPTQ's ablations: which rows there are, how they are made, saved and shown."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from octavo._core.errors import FormatError, Interrupted, NumericalError, ResourceError, UsageError
from octavo.formats.reader import CheckpointReader
from octavo.models.adapter import CausalModel
from octavo.models.source import resolve
from octavo.pipeline import run as pipeline
from octavo.pipeline import tune as tuning
from octavo.report import ablation, ablation_study, ablation_tables, plots
from octavo.report.ablation import Options

FILES = ["ablation.json", "ablation.md", "ablation.svg"]


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
def few(tiny_text_file: Path) -> Options:
    """Two rows on little text."""
    text = str(tiny_text_file)
    return Options(text=text, calib=text, ctx=32, samples=4, max_tokens=128, bits=3.0, parts=("groups",), groups=(1, 2))


def names(document: dict[str, Any]) -> list[str]:
    return [row["name"] for row in document["rows"]]


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on nothing may be quantized."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr(pipeline, "quantize", fail)


# ------------------------------------------------------------------------------------------------ the rows


def test_every_comparison_starts_with_the_same_base_row() -> None:
    settings = Options().settings()
    assert tuple(settings) == ablation.PARTS
    assert {rows[0].name for rows in settings.values()} == {"base"}
    assert dict(settings["vector"][0].options) == {"vector_length": 4, "residual_centroids": 0}
    assert {part: [row.name for row in rows[1:]] for part, rows in settings.items()} == {
        "vector": ["v2", "v6", "v8"],
        "residual": ["v8", "v8-r256", "v12", "v12-r4096"],
        "outliers": ["outliers-1", "outliers-2", "outliers-5"],
        "groups": ["groups-2", "groups-4", "groups-8"],
        "update": ["update-4", "update-0"],
        "tuning": ["tuned-blocks", "tuned-end", "tuned-both"],
    }
    # The row that the base row equals gives it its title.
    assert settings["outliers"][0].what == "0 % outlier columns (base)"
    assert settings["residual"][0].what == "base: vectors of 4, one codebook"


def test_rows_of_one_name_are_made_in_one_way() -> None:
    for base in ({}, {"groups": 2, "norm": False}, {"vector_length": 6, "centroids": 256}):
        rows = [row for part in Options(base=base).settings().values() for row in part]
        made: dict[str, Any] = {}
        for row in rows:
            assert made.setdefault(row.name, (row.options, row.tuned)) == (row.options, row.tuned)


def test_each_row_differs_from_the_base_in_one_thing() -> None:
    settings = Options(base={"norm": False, "centroids": 256, "vector_length": 6}).settings()
    base = settings["groups"][0].options
    assert base["vector_length"] == 6
    for part, option in (("outliers", "outlier_percent"), ("groups", "groups"), ("update", "update_columns")):
        for row in settings[part][1:]:
            assert {key for key in row.options if row.options[key] != base.get(key)} == {option}
    assert [row.options["update_columns"] for row in settings["update"][1:]] == [6, 0]
    # Other vector lengths find codebooks of their own.
    for row in settings["vector"][1:]:
        assert "centroids" not in row.options
        assert row.options["norm"] is False


def test_a_vector_length_without_the_base_keeps_both() -> None:
    rows = Options(parts=("vector",), vector_lengths=(2, 8)).settings()["vector"]
    assert [row.name for row in rows] == ["base", "v2", "v8"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"parts": ("vectors",)}, "Did you mean 'vector'"),
        ({"parts": ()}, "got none"),
        ({"base": {"grups": 2}}, "Did you mean 'groups'"),
        ({"base": {"bits": 3}}, "parameter of their own"),
        ({"base": {"sweeps": -1}}, "sweeps"),
        ({"vector_lengths": (17,)}, "vector_length"),
        ({"outlier_percents": (80,)}, "outlier_percent"),
        ({"groups": (0,)}, "groups"),
        ({"tune": {"stepps": 2}}, "Did you mean 'steps'"),
        ({"tune_blocks": {"stepps": 2}}, "Did you mean 'steps'"),
    ],
)
def test_options_that_no_row_could_have_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Options(**values)


def test_long_vectors_are_left_out_where_their_codebooks_alone_exceed_the_bits(tiny_llama: Path) -> None:
    assert list(ablation.too_small(CausalModel(resolve(tiny_llama)), Options())) == ["v12-r4096"]

    def model(rows: int, columns: int) -> CausalModel:
        target = SimpleNamespace(shape=(rows, columns), bias=False)
        return cast("CausalModel", SimpleNamespace(blocks=["b"], targets=lambda index: {"x": target}))

    (reason,) = ablation.too_small(model(512, 512), Options()).values()
    assert reason.endswith("bits") and float(reason.split()[-2]) > 4
    assert ablation.too_small(model(4096, 4096), Options()) == {}
    assert ablation.too_small(model(512, 512), Options(parts=("vector",))) == {}


# ------------------------------------------------------------------------------------------------ the job


def test_rows_are_measured_at_the_same_bits(tiny_llama: Path, tmp_path: Path, few: Options, jobs: list[str]) -> None:
    out = tmp_path / "out"
    document = ablation_study.run(out, tiny_llama, few)
    assert jobs == names(document) == ["base", "groups-2"]
    assert document["parts"]["groups"][1] == {"name": "groups-2", "what": "2 column groups"}
    for row in document["rows"]:
        assert row["reason"] is None
        assert 2.8 < row["bits_per_weight"] <= row["target_bits"] == 3
        assert row["kl"] > 0 and row["kl_se"] > 0 and 0 < row["proxy_error"] < 1
        assert row["seconds"] > row["quantize_seconds"] > 0
    assert document["rows"][1]["options"] == {"vector_length": 4, "residual_centroids": 0, "groups": 2}
    assert sorted(path.name for path in out.iterdir()) == FILES
    stored = json.loads((out / "ablation.json").read_text())
    assert stored == {key: value for key, value in document.items() if key != "notes"}


def test_a_study_that_was_killed_continues_without_repeating_rows(
    tiny_llama: Path, tmp_path: Path, few: Options, jobs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, quantize = tmp_path / "out", pipeline.quantize

    def killed(model: Any, path: Path, **more: Any) -> Any:
        if jobs:
            raise KeyboardInterrupt
        return quantize(model, path, **more)

    monkeypatch.setattr(pipeline, "quantize", killed)
    with pytest.raises(KeyboardInterrupt):
        ablation_study.run(out, tiny_llama, few)
    stopped = json.loads((out / "ablation.json").read_text())
    assert (names(stopped), stopped["complete"]) == (["base"], False)
    ablation_study.redraw(out / "ablation.json")
    assert "not finished" in (out / "ablation.md").read_text()

    with pytest.raises(UsageError, match="--resume"):
        ablation_study.run(out, tiny_llama, few)
    with pytest.raises(UsageError, match=r"rows bits: 3.0, now 2.5"):
        ablation_study.run(out, tiny_llama, replace(few, bits=2.5), resume=True)
    with pytest.raises(UsageError, match=r"rows base: .*norm"):
        ablation_study.run(out, tiny_llama, replace(few, base={"norm": True}), resume=True)
    monkeypatch.setattr(pipeline, "quantize", quantize)
    document = ablation_study.run(out, tiny_llama, few, resume=True)
    assert jobs == ["base", "groups-2"]
    assert document["complete"] is True
    assert document["rows"][0] == stopped["rows"][0]

    # Another part: only what is new is measured, and what is there stays.
    more = ablation_study.run(out, tiny_llama, replace(few, parts=("update",)), resume=True)
    assert jobs[2:] == ["update-4", "update-0"]
    assert names(more) == ["base", "groups-2", "update-4", "update-0"]
    assert {part: len(rows) for part, rows in more["parts"].items()} == {"groups": 2, "update": 3}
    assert "Groups" in (out / "ablation.md").read_text()


def test_a_stop_ends_a_study_between_rows(tiny_llama: Path, tmp_path: Path, few: Options) -> None:
    said: list[str] = []
    with pytest.raises(Interrupted, match="before row groups-2"):
        ablation_study.run(tmp_path, tiny_llama, few, say=said.append, stop=lambda: len(said) == 1)
    assert names(json.loads((tmp_path / "ablation.json").read_text())) == ["base"]
    assert said[0].startswith("base: true bits 2.9")


def test_a_row_that_fails_is_recorded_and_the_others_are_measured(
    tiny_llama: Path, tmp_path: Path, few: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize, error = pipeline.quantize, NumericalError("the seventh matrix is odd")

    def fail(model: Any, out: Path, **options: Any) -> Any:
        if Path(out).name == "groups-2":
            raise error
        return quantize(model, out, **options)

    monkeypatch.setattr(pipeline, "quantize", fail)
    document = ablation_study.run(tmp_path / "a", tiny_llama, replace(few, groups=(1, 2, 4)))
    base, failed, other = document["rows"]
    assert (failed["kl"], failed["reason"]) == (None, "the seventh matrix is odd")
    assert base["kl"] > 0 and other["kl"] > 0
    assert (
        "| 2 column groups | - | - | - | - | - | - | - | the seventh matrix is odd |"
        in (tmp_path / "a" / "ablation.md").read_text()
    )

    # No codebooks fit: not this row's fault that a test has to make up.
    residual = ablation_study.run(tmp_path / "b", tiny_llama, replace(few, parts=("residual",)))
    assert "no codebooks fit" in residual["rows"][-1]["reason"]
    assert names(residual) == ["base", "v8", "v8-r256"]
    assert "v12-r4096 is left out" in (tmp_path / "b" / "ablation.md").read_text()

    # A full disk concerns all rows.
    error = ResourceError("no space")
    with pytest.raises(ResourceError, match="no space"):
        ablation_study.run(tmp_path / "c", tiny_llama, few)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"blocks": (5,)}, "^blocks wanted block indices 0..1"),
        ({"max_tokens": 16}, "max_tokens"),
        ({"samples": 100_000}, "too little text"),
        ({"text": "nowhere.txt"}, "nowhere.txt"),
        ({"parts": ("tuning",), "tune": {"calib": "nowhere.txt"}}, "nowhere.txt"),
    ],
)
def test_what_would_fail_later_is_refused_before_any_work(
    tiny_llama: Path,
    tmp_path: Path,
    few: Options,
    values: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forbid(monkeypatch)
    with pytest.raises((UsageError, FormatError), match=message):
        ablation_study.run(tmp_path / "out", tiny_llama, replace(few, **values))
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_files_is_left_alone(tiny_llama: Path, tmp_path: Path, few: Options) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UsageError, match=r"thesis\.tex"):
        ablation_study.run(tmp_path, tiny_llama, few, resume=True)
    (tmp_path / "ablation.json").write_text('{"study": "vptq"}')
    with pytest.raises(FormatError, match="no result of `octavo study vptq`"):
        ablation_study.redraw(tmp_path / "ablation.json")


def test_only_the_chosen_blocks_are_quantized(tiny_llama: Path, tmp_path: Path, few: Options) -> None:
    options = replace(few, groups=(1,), blocks=(1,), keep=True)
    document = ablation_study.run(tmp_path, tiny_llama, options)
    assert "only 1 of 2 decoder blocks quantized (1; the first is 0)" in (tmp_path / "ablation.md").read_text()
    assert document["settings"]["rows"]["blocks"] == [1]
    original, written = CheckpointReader(tiny_llama), CheckpointReader(tmp_path / "models" / "base")
    untouched = [name for name in original.names() if "layers.1." not in name or "norm" in name]
    assert len([name for name in untouched if "layers.0." in name and name.endswith("proj.weight")]) == 7
    for name in untouched:
        assert torch.equal(original.read(name), written.read(name))
    assert "model.layers.1.mlp.up_proj.weight" not in written.names()
    # Whoever asks for other blocks wants another study.
    with pytest.raises(UsageError, match=r"rows blocks: \[1\], now \[0\]"):
        ablation_study.run(tmp_path, tiny_llama, replace(few, blocks=(0,)), resume=True)


# ------------------------------------------------------------------------------------------------ fine-tuning


def test_tuned_rows_start_from_models_that_stay_as_long_as_they_are_needed(
    tiny_llama: Path, tmp_path: Path, few: Options, jobs: list[str]
) -> None:
    there: dict[str, list[str]] = {}

    def look(line: str) -> None:
        there[line.partition(":")[0]] = sorted(path.name for path in (tmp_path / "models").iterdir())

    changes: dict[str, Any] = {"parts": ("groups", "tuning"), "tune": {"steps": 2}, "tune_blocks": {"steps": 2}}
    document = ablation_study.run(tmp_path, tiny_llama, replace(few, **changes), say=look)
    # Looked at before the row's own model goes.
    assert there == {
        "base": ["base"],
        "groups-2": ["base", "groups-2"],
        "tuned-blocks": ["base", "tuned-blocks"],
        "tuned-end": ["base", "tuned-blocks", "tuned-end"],
        "tuned-both": ["tuned-blocks", "tuned-both"],
    }
    assert jobs == ["base", "groups-2", "tuned-blocks"]
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    rows = {row["name"]: row for row in document["rows"]}
    for name in ("tuned-blocks", "tuned-end", "tuned-both"):
        assert rows[name]["reason"] is None
        assert rows[name]["bits_per_weight"] == rows["base"]["bits_per_weight"]
        assert (rows[name]["tune_seconds"] is None) == (name == "tuned-blocks")
    assert rows["tuned-end"]["tune"]["steps"] == 2
    assert rows["tuned-blocks"]["kl"] != rows["base"]["kl"]
    # Each starts from its own model.
    assert rows["tuned-end"]["tune"]["kl_before"] != rows["tuned-both"]["tune"]["kl_before"]
    assert "tuning s" in (tmp_path / "ablation.md").read_text()


def test_a_model_that_is_gone_is_made_again_for_tuning(
    tiny_llama: Path, tmp_path: Path, few: Options, jobs: list[str]
) -> None:
    ablation_study.run(tmp_path, tiny_llama, replace(few, groups=(1,)))
    changes: dict[str, Any] = {"parts": ("tuning",), "tune": {"steps": 2}, "tune_blocks": {"steps": 1}}
    document = ablation_study.run(tmp_path, tiny_llama, replace(few, **changes), resume=True)
    assert jobs == ["base", "tuned-blocks", "base"]
    assert names(document) == ["base", "tuned-blocks", "tuned-end", "tuned-both"]
    assert all(row["reason"] is None for row in document["rows"])
    assert not (tmp_path / "models").exists()
    with pytest.raises(UsageError, match="tuning end"):
        ablation_study.run(tmp_path, tiny_llama, replace(few, **{**changes, "tune": {"steps": 3}}), resume=True)


def test_tuning_that_was_stopped_continues(
    tiny_llama: Path, tmp_path: Path, few: Options, jobs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(few, parts=("tuning",), tune={"steps": 3, "held_out": 1}, tune_blocks={"steps": 1})
    tune = tuning.tune

    def stopped(*arguments: Any, **more: Any) -> Any:
        return tune(*arguments, **{**more, "stop": lambda: True})

    monkeypatch.setattr(tuning, "tune", stopped)
    with pytest.raises(Interrupted):
        ablation_study.run(tmp_path, tiny_llama, options)
    monkeypatch.setattr(tuning, "tune", tune)
    document = ablation_study.run(tmp_path, tiny_llama, options, resume=True)
    assert jobs == ["base", "tuned-blocks"]
    row = document["rows"][2]
    assert (row["name"], row["tune"]["steps"], row["reason"]) == ("tuned-end", 3, None)
    assert "tuned in several runs; the seconds are the last one's" in row["notes"]
    assert not (tmp_path / "models").exists()


# ------------------------------------------------------------------------------------------------ tables and plot


def _row(name: str, kl: float | None, **more: Any) -> dict[str, Any]:
    row = {"name": name, "tuned": "none", "kl": kl, "kl_se": kl and 0.01, "reason": None, "notes": [], **more}
    measured = {"bits_per_weight": 2.25, "perplexity": 20.5, "perplexity_se": None, "top1": 0.75, "top1_se": 0.002}
    measured |= {"proxy_error": 0.01234, "quantize_seconds": 100.0, "reference_perplexity": 18.25, "tokens": 4092}
    return row | (measured | {"windows": 4, "ctx": 1024} if kl is not None else {})


def _document() -> dict[str, Any]:
    """A document as it may be after reading: parts in another order, a failed row, one that is still to come."""
    base = {"name": "base", "what": "0 % outlier columns (base)"}
    return {
        "study": "vptq",
        "octavo": "0.1.0",
        "versions": {"torch": "2.9"},
        "command": ["octavo", "study", "vptq", "a b"],
        "machine": {},
        "model": "tiny {braces}",
        "complete": True,
        "seconds": 125.0,
        "settings": {"rows": {"bits": 2.25, "blocks": [0, 1]}},
        "blocks_in_all": 2,
        "left_out": {"v12-r4096": "too | small."},
        "parts": {
            "tuning": [base | {"what": "base"}, {"name": "tuned-end", "what": "tuned end to end"}],
            "outliers": [
                base,
                {"name": "outliers-1", "what": "1 % outlier columns"},
                {"name": "outliers-2", "what": "2 % outlier columns"},
                {"name": "outliers-5", "what": "5 % outlier columns"},
            ],
        },
        "rows": [
            _row("base", 0.2),
            _row("outliers-1", 0.15),
            _row("outliers-2", None, reason="failed"),
            _row("tuned-end", 0.1, tuned="end", tune_seconds=7.0),
        ],
    }


def test_markdown_has_every_row_with_its_change_or_its_reason() -> None:
    text = ablation_tables.markdown(_document())
    measured = "20.50 | 0.750 ± 0.002 | 0.01234 | 100 |"
    assert "octavo study vptq 'a b'" in text
    assert "tiny {braces} with vptq at 2.25 true bits" in text
    assert "all decoder blocks quantized" in text
    assert "v12-r4096 is left out: too | small.\n" in text
    assert f"| 0 % outlier columns (base) | 2.250 | 0.2000 ± 0.0100 | - | {measured}  |" in text
    assert f"| 1 % outlier columns | 2.250 | 0.1500 ± 0.0100 | -25.0 | {measured}  |" in text
    assert "| 2 % outlier columns | - | - | - | - | - | - | - | failed |" in text
    assert f"| tuned end to end | 2.250 | 0.1000 ± 0.0100 | -50.0 | {measured} 7 |  |" in text
    assert "5 % outlier columns" not in text
    assert text.index("## Outlier columns") < text.index("## Fine-tuning")


def test_the_plot_comes_from_the_document_alone() -> None:
    document = _document()
    picture = plots.ablation(document)
    assert picture == plots.ablation(json.loads(json.dumps(document, sort_keys=True)))
    text = picture.decode()
    for part in ("<svg", "outliers", "tuning", "1 % outlier columns", "tuned end to end", "KL per token"):
        assert part in text
    # The failed row, and the one that is still to come.
    assert text.count("not measured") == 2
    assert "not measured" not in plots.ablation(document | {"parts": {"tuning": document["parts"]["tuning"]}}).decode()
