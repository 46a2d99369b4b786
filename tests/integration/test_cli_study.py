"""``octavo study dimension`` from the command line: files, documents, refusals, interruption."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from octavo._core.errors import Interrupted
from octavo.cli import main
from octavo.pipeline import run as pipeline
from octavo.report import dimension

STUDY = ("study", "dimension")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dimension, "_VECTORS", 4096)


def call(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command in this process."""
    capsys.readouterr()
    code = main([*STUDY, *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_help_is_there_in_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "--help"]) == 0
    assert "dimension" in capsys.readouterr().out
    code, out, _ = call(capsys, "--help")
    assert code == 0
    assert out.isascii()
    for option in ("--out", "--redraw", "--layers", "--resume", "--keep", "--json"):
        assert option in out


def test_a_study_writes_its_three_files_and_one_document(
    capsys: pytest.CaptureFixture[str], tiny_llama: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    texts = ("--text", tiny_text_file, "--calib", tiny_text_file, "--ctx", 32, "--samples", 2, "--max-tokens", 128)
    which = ("--dimensions", "1,2", "--bits", "2,3", "--layers", "0,", "--overhead", 0.5, "--keep")
    code, printed, err = call(capsys, tiny_llama, "--out", out, *texts, *which, "--json")
    assert code == 0, err
    document, stored = json.loads(printed), json.loads((out / "dimension.json").read_text())
    assert document.pop("notes") == []
    assert document == stored
    assert stored["command"][:3] == ["octavo", *STUDY]
    assert stored["machine"]["threads"]["torch"] >= 1
    assert "executable" not in stored["machine"]
    for rows in stored["rows"].values():
        assert [(row["bits"], row["dimension"]) for row in rows] == [(2, 1), (2, 2), (3, 1), (3, 2)]
        assert all(row["seconds"] > 0 and row["reason"] is None for row in rows)
    assert all(row["kl"] > 0 and row["bits_per_weight"] <= row["target_bits"] for row in stored["rows"]["model"])
    assert len(list((out / "models").iterdir())) == 4
    assert "model: R 3, d 2" in err

    before = {name: (out / name).read_bytes() for name in ("dimension.md", "dimension.svg")}
    for name in before:
        (out / name).unlink()
    code, printed, _ = call(capsys, "--redraw", out / "dimension.json")
    assert code == 0
    assert {name: (out / name).read_bytes() for name in before} == before
    assert "Gaussian vectors" in printed and "The quantized model" in printed


def test_without_matplotlib_a_note_names_the_extra(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    code, out, err = call(
        capsys, "--out", tmp_path / "out", "--no-layers", "--no-model", "--dimensions", "1", "--bits", 2
    )
    assert code == 0
    assert 'pip install "octavo[report]"' in err
    assert "9.3" in out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["dimension.json", "dimension.md"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--out", "OUT"), "MODEL is missing"),
        ((), "--out is missing"),
        (("--out", "OUT", "--dimensions", "1,x"), "--dimensions"),
        (("--out", "OUT", "--dimensions", "1.5"), "--dimensions"),
        (("--out", "OUT", "--bits", "2,2"), "--bits"),
        (("--out", "OUT", "--bits", "inf"), "--bits"),
        (("--out", "OUT", "--layers", ","), "--layers"),
        (("--out", "OUT", "--no-gaussian", "--no-layers", "--no-model"), "some of gaussian"),
        (("nowhere-model", "--out", "OUT", "--no-model"), "nowhere-model"),
        (("--redraw", "nowhere.json"), "nowhere.json"),
    ],
)
def test_bad_options_are_refused_before_any_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    out = tmp_path / "out"
    code, printed, _ = call(capsys, *(str(out) if part == "OUT" else part for part in arguments), "--json")
    assert code in (2, 3)
    assert message in json.loads(printed)["error"]["message"]
    assert not out.exists()


def test_an_interrupted_study_tells_how_to_continue(
    capsys: pytest.CaptureFixture[str],
    tiny_llama: Path,
    tiny_text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quantize = pipeline.quantize

    def interrupted(*arguments: Any, **options: Any) -> Any:
        # As if Ctrl-C came during the first block.
        return quantize(*arguments, **{**options, "stop": lambda: True})

    monkeypatch.setattr(pipeline, "quantize", interrupted)
    texts = ("--text", tiny_text_file, "--calib", tiny_text_file, "--ctx", 32, "--samples", 2, "--max-tokens", 128)
    arguments = (tiny_llama, "--out", tmp_path / "out", "--dimensions", 2, "--bits", 2, "--no-layers", *texts)
    code, _, err = call(capsys, *arguments)
    assert code == Interrupted.exit_code
    assert "Continue with: octavo study dimension" in err and "--resume" in err
    monkeypatch.setattr(pipeline, "quantize", quantize)
    code, _, err = call(capsys, *arguments, "--resume")
    assert code == 0, err
    (row,) = json.loads((tmp_path / "out" / "dimension.json").read_text())["rows"]["model"]
    assert row["kl"] > 0
    assert "quantized in several runs; the seconds are the last one's" in row["notes"]
    assert not (tmp_path / "out" / "models").exists()
