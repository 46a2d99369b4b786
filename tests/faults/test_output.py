"""Where the output goes: nobody's files are touched, everybody may read it, and it says nothing about its maker."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faults.jobs import digests, gptq, make_quick, run, with_config
from octavo import formats
from octavo._core.errors import Interrupted, UsageError
from octavo.models.adapter import CausalModel
from octavo.pipeline import Event
from octavo.pipeline import run as pipeline_run


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)


def everything(folder: Path) -> dict[str, Any]:
    """Names, kinds and contents of all that is in a folder."""
    return {str(p): (p.is_symlink(), p.is_dir(), p.stat().st_mtime_ns if p.exists() else 0) for p in folder.rglob("*")}


# -------------------------------------------------------------------------------------------------- what is there


def _folder_with_a_file(path: Path) -> None:
    path.mkdir()
    (path / "thesis.txt").write_text("the only copy")


OCCUPANTS: dict[str, Callable[[Path], Any]] = {
    "an empty folder": Path.mkdir,
    "a folder with a file": _folder_with_a_file,
    "a file": Path.touch,
    "a dangling link": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"force_new": True}], ids=["plain", "resume", "force-new"])
@pytest.mark.parametrize("occupant", OCCUPANTS)
def test_an_output_that_exists_is_refused_and_left_alone(
    tiny_llama: Path, tmp_path: Path, occupant: str, how: dict[str, Any]
) -> None:
    """Fault 45."""
    OCCUPANTS[occupant](tmp_path / "out")
    before = everything(tmp_path)
    with pytest.raises(UsageError, match=r"out exists already. Octavo never overwrites"):
        run(tiny_llama, tmp_path / "out", **how)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"force_new": True}], ids=["plain", "resume", "force-new"])
def test_a_folder_of_somebody_else_with_the_work_folders_name_is_left_alone(
    tiny_llama: Path, tmp_path: Path, how: dict[str, Any]
) -> None:
    """Fault 45: at its end a job deletes its work folder, so it must be its own."""
    _folder_with_a_file(tmp_path / "out.work")
    before = everything(tmp_path)
    with pytest.raises(UsageError, match=r"out.work.* holds files that are not Octavo's \(thesis.txt\)"):
        run(tiny_llama, tmp_path / "out", **how)
    assert everything(tmp_path) == before


def test_a_file_with_the_work_folders_name_is_left_alone(tiny_llama: Path, tmp_path: Path) -> None:
    """Fault 45."""
    (tmp_path / "out.work").write_text("shopping list")
    with pytest.raises(UsageError, match="cannot create the work folder"):
        run(tiny_llama, tmp_path / "out")
    assert (tmp_path / "out.work").read_text() == "shopping list"


@pytest.mark.parametrize("late", [False, True], ids=["while it works", "while it is stopped"])
def test_an_output_that_comes_into_being_meanwhile_is_not_overwritten(
    tiny_llama: Path, tmp_path: Path, late: bool
) -> None:
    """Fault 45: the job is finished, but its result waits."""
    out = tmp_path / "out"

    def interfere(event: Event) -> None:
        if event.kind == "block" and event.block == 1 and not out.exists():
            _folder_with_a_file(out)

    with pytest.raises(UsageError, match="has come into being meanwhile; move it away and continue with --resume"):
        run(tiny_llama, out, progress=interfere)
    if late:
        with pytest.raises(UsageError, match="has come into being meanwhile"):
            run(tiny_llama, out, resume=True)
    assert (out / "thesis.txt").read_text() == "the only copy"
    shutil.rmtree(out)
    run(tiny_llama, out, resume=True)
    formats.verify(out)


def test_a_foreign_output_beside_an_unfinished_job_is_refused_before_more_work(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """Fault 45."""
    with pytest.raises(Interrupted):
        run(tiny_llama, tmp_path / "out", stop=lambda: True)
    _folder_with_a_file(tmp_path / "out")
    events: list[Event] = []
    with pytest.raises(UsageError, match="exists already"):
        run(tiny_llama, tmp_path / "out", resume=True, progress=events.append)
    assert not [e for e in events if e.kind == "matrix"]


# -------------------------------------------------------------------------------------------------- where it cannot go


def test_a_missing_parent_is_refused_and_not_created(tiny_llama: Path, tmp_path: Path) -> None:
    """Fault 45: a typing error must not become a tree of folders."""
    with pytest.raises(UsageError, match=r"the folder .*nowhere for the output does not exist; create it first"):
        run(tiny_llama, tmp_path / "nowhere" / "out")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="does not exist"):
        run(tiny_llama, tmp_path / "file" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_a_parent_that_may_not_be_written_is_a_usage_error(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 51 in small. Modes do not bind an administrator, who may run the tests, so the refusal is acted."""

    def refuse(path: Any, *_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(UsageError, match=r"cannot create the work folder .*out.work: Permission denied"):
        run(tiny_llama, tmp_path / "out")


def test_a_job_that_fails_before_its_first_commit_leaves_no_folder(tiny_llama: Path, tmp_path: Path) -> None:
    """Fault 45: a mistyped model name is no reason for litter."""
    with pytest.raises(UsageError, match="does not exist"):
        run(tmp_path / "no-model", tmp_path / "out")
    with pytest.raises(UsageError, match="does not exist"):
        run(tiny_llama, tmp_path / "out", gptq(tmp_path / "no-text.txt"))
    assert list(tmp_path.iterdir()) == []


def test_the_model_is_only_read(tiny_llama: Path, tmp_path: Path) -> None:
    """Fault 51: a shared, read-only cache is a usual place for it."""
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    before = everything(model)
    run(model, tmp_path / "out")
    assert everything(model) == before


# -------------------------------------------------------------------------------------------------- modes and secrets


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002], ids=oct)
def test_published_files_have_the_mode_that_the_umask_gives(tiny_llama: Path, tmp_path: Path, mask: int) -> None:
    """Fault 56: 0644 as a rule, never the 0600 of temporary files."""
    before = os.umask(mask)
    try:
        run(tiny_llama, tmp_path / "out")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~mask
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {0o666 & ~mask}, modes
    assert {"config.json", "model.safetensors", "octavo_manifest.json", "tokenizer.json"} <= modes.keys()


def test_published_files_say_nothing_of_paths_people_and_tokens(
    tiny_llama: Path, tiny_text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 56: not even where the model was when somebody saved it."""
    secret = "hf_" + "s3cr3tt0k3n" * 3
    monkeypatch.setenv("HF_TOKEN", secret)
    model = with_config(tiny_llama, tmp_path / "model", _name_or_path="/home/alice/private/model")
    report = run(model, tmp_path / "out", gptq(tiny_text_file), keep_work=True)
    forbidden = [
        str(tmp_path),
        str(tiny_text_file.parent),
        str(Path.home()) + "/",
        "alice",
        secret,
    ]
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    work = tmp_path / "out.work"
    files.append(work / "objects" / (work / "CURRENT").read_text().strip())
    for path in files:
        content = path.read_bytes()
        assert [word for word in forbidden if word.encode() in content] == [], path.name
    plain = {key: value for key, value in report.to_dict().items() if key != "output"}
    assert [word for word in forbidden if word in json.dumps(plain)] == []
    assert formats.check(tmp_path / "out").details["source"] == "model"


def test_another_folder_of_the_same_model_gives_the_same_fingerprint_and_bytes(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """Faults 47 and 56: neither knows where the files were."""
    (tmp_path / "elsewhere").mkdir()
    moved = Path(shutil.copytree(tiny_llama, tmp_path / "elsewhere" / tiny_llama.name))
    run(tiny_llama, tmp_path / "a")
    run(moved, tmp_path / "b")
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    prints = {CausalModel(pipeline_run.resolve(folder)).fingerprint() for folder in (tiny_llama, moved)}
    assert len(prints) == 1
