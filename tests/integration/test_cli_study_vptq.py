"""``octavo study vptq`` from the command line: files, documents, refusals, interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from octavo._core.errors import Interrupted
from octavo.cli import main
from octavo.pipeline import run as pipeline

STUDY = ("study", "vptq")


def call(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command in this process."""
    capsys.readouterr()
    code = main([*STUDY, *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def texts(tiny_text_file: Path) -> tuple[Any, ...]:
    return ("--text", tiny_text_file, "--calib", tiny_text_file, "--ctx", 32, "--samples", 4, "--max-tokens", 128)


def test_help_is_there_in_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "vptq" in printed and "dimension" in printed
    code, out, _ = call(capsys, "--help")
    assert code == 0
    assert out.isascii()
    for option in ("--out", "--redraw", "--parts", "--blocks", "--base", "--tune-set", "--resume", "--keep", "--json"):
        assert option in out


def test_a_study_writes_its_three_files_and_one_document(
    capsys: pytest.CaptureFixture[str], tiny_llama: Path, texts: tuple[Any, ...], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    which = ("--parts", "update,vector", "--vector-lengths", "4,2", "--bits", 3, "--blocks", "1,", "--keep")
    arguments = (tiny_llama, "--out", out, *texts, *which, "--base", "norm=false", "--threads", 1, "--json")
    code, printed, err = call(capsys, *arguments)
    assert code == 0, err
    document, stored = json.loads(printed), json.loads((out / "ablation.json").read_text())
    assert document.pop("notes") == []
    assert document == stored
    assert stored["command"][:3] == ["octavo", *STUDY]
    assert stored["machine"]["threads"]["torch"] == 1
    assert [row["name"] for row in stored["rows"]] == ["base", "v2", "update-4", "update-0"]
    assert all(row["kl"] > 0 and row["options"]["norm"] is False for row in stored["rows"])
    assert stored["settings"]["rows"]["blocks"] == [1]
    assert len(list((out / "models").iterdir())) == 4
    assert "update-0: true bits" in err

    before = {name: (out / name).read_bytes() for name in ("ablation.md", "ablation.svg")}
    for name in before:
        (out / name).unlink()
    code, printed, _ = call(capsys, "--redraw", out / "ablation.json")
    assert code == 0
    assert {name: (out / name).read_bytes() for name in before} == before
    assert printed.index("Vector length") < printed.index("Channel-independent update")
    assert "only 1 of 2 decoder blocks" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--out", "OUT"), "MODEL is missing"),
        (("nowhere-model",), "--out is missing"),
        ((), "--out is missing"),
        (("M", "--out", "OUT", "--parts", "vector,updates"), "Did you mean 'update'"),
        (("M", "--out", "OUT", "--parts", ","), "got none"),
        (("M", "--out", "OUT", "--vector-lengths", "2,x"), "--vector-lengths"),
        (("M", "--out", "OUT", "--outlier-percents", "1,1"), "--outlier-percents"),
        (("M", "--out", "OUT", "--groups", "1.5"), "--groups"),
        (("M", "--out", "OUT", "--blocks", ","), "--blocks"),
        (("M", "--out", "OUT", "--base", "norm"), "--base"),
        (("M", "--out", "OUT", "--base", "nrm=true"), "Did you mean 'norm'"),
        (("M", "--out", "OUT", "--tune-set", "stepps=1"), "Did you mean 'steps'"),
        (("M", "--out", "OUT", "--tune-blocks-set", "stepps=1"), "Did you mean 'steps'"),
        (("M", "--out", "OUT", "--bits", "-1"), "bits"),
        (("nowhere-model", "--out", "OUT"), "nowhere-model"),
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
    texts: tuple[Any, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quantize = pipeline.quantize

    def interrupted(*arguments: Any, **options: Any) -> Any:
        # As if Ctrl-C came during the first block.
        return quantize(*arguments, **{**options, "stop": lambda: True})

    monkeypatch.setattr(pipeline, "quantize", interrupted)
    arguments = (tiny_llama, "--out", tmp_path / "out", "--parts", "groups", "--groups", "1", "--bits", 3, *texts)
    code, _, err = call(capsys, *arguments)
    assert code == Interrupted.exit_code
    assert "Continue with: octavo study vptq" in err and "--resume" in err
    monkeypatch.setattr(pipeline, "quantize", quantize)
    code, printed, err = call(capsys, *arguments, "--resume")
    assert code == 0, err
    (row,) = json.loads((tmp_path / "out" / "ablation.json").read_text())["rows"]
    assert row["kl"] > 0
    assert "quantized in several runs; the seconds are the last one's" in row["notes"]
    assert "1 column group (base)" in printed
    assert not (tmp_path / "out" / "models").exists()
