"""Full disks: a ResourceError with advice, everything that was committed kept, nothing of other people's touched."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from faults.jobs import WRITES, before_each, digests, file_size_limit, gptq, make_quick, run
from octavo._core.errors import ResourceError
from octavo.cli import main
from octavo.pipeline import Event


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)


def failing_at(number: int) -> Callable[[], None]:
    """An action that finds the disk full at its ``number``-th call."""
    calls = []

    def act() -> None:
        calls.append(None)
        if len(calls) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return act


@contextmanager
def before_each_write(act: Callable[[], None]) -> Iterator[None]:
    """Call ``act`` before everything that needs room on the disk; making a folder that exists does not."""
    real = os.mkdir
    with before_each(WRITES, act), pytest.MonkeyPatch.context() as patch:
        watched = os.mkdir

        def mkdir(path: str | os.PathLike[str], mode: int = 0o777) -> None:
            (real if os.path.isdir(path) else watched)(path, mode)

        patch.setattr(os, "mkdir", mkdir)
        yield


def test_a_disk_that_is_full_at_any_write_costs_nothing_but_the_resume(tiny_llama: Path, tmp_path: Path) -> None:
    """Faults 40 and 44: the first write, the second, and so on to the last."""
    run(tiny_llama, tmp_path / "whole")
    expected = digests(tmp_path / "whole")
    writes: list[None] = []
    with before_each_write(lambda: writes.append(None)):
        run(tiny_llama, tmp_path / "counted")
    assert len(writes) > 30
    # As many as were counted, all of which must end the job: not until the first that does not.
    for number in range(1, len(writes) + 1):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "precious.txt").write_text("of the user")
        with before_each_write(failing_at(number)), pytest.raises(ResourceError) as caught:
            run(tiny_llama, folder / "out")
        message = str(caught.value)
        assert "No space left on device" in message and "--resume" in message and str(folder) in message, number
        assert not list(folder.rglob("*.tmp")), f"{number}: its own temporary files are gone"
        assert not (folder / "out.work" / "output").exists(), f"{number}: so is what was written of the output"
        run(tiny_llama, folder / "out", resume=True)
        assert digests(folder / "out") == expected, number
        assert sorted(path.name for path in folder.iterdir()) == ["out", "precious.txt"]
    with before_each_write(failing_at(len(writes) + 1)):
        run(tiny_llama, tmp_path / "beyond")
    assert digests(tmp_path / "beyond") == expected


def test_hidden_states_that_do_not_fit_leave_the_block_before_committed(
    tiny_llama: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    """Fault 44: a real limit of the operating system, in the middle of the job."""
    settings = gptq(tiny_text_file, ctx=64, samples=16)
    run(tiny_llama, tmp_path / "whole", settings)
    hidden = 16 * 64 * 64 * 4
    with file_size_limit(hidden), pytest.raises(ResourceError, match=r"cannot write .*File too large.*--resume"):
        run(tiny_llama, tmp_path / "out", settings)
    work = tmp_path / "out.work"
    assert not list(work.rglob("*.tmp"))
    assert json.loads((work / "objects" / (work / "CURRENT").read_text().strip()).read_text())["blocks"] == []
    run(tiny_llama, tmp_path / "out", settings, resume=True)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_an_output_that_does_not_fit_leaves_all_blocks_committed(tiny_llama: Path, tmp_path: Path) -> None:
    """Faults 43 and 44: only the writing is to be done again."""
    run(tiny_llama, tmp_path / "whole")
    shard = (tmp_path / "whole" / "model.safetensors").stat().st_size
    with file_size_limit(shard - 1), pytest.raises(ResourceError, match=r"cannot write .*File too large.*--resume"):
        run(tiny_llama, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.work" / "output").exists(), "what was written of it is not left in the way"
    events: list[Event] = []
    run(tiny_llama, tmp_path / "out", resume=True, progress=events.append)
    assert [e.kind for e in events if e.kind in ("matrix", "block")] == []
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_the_command_line_says_full_disk_with_code_5_and_continues_after_it(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault 44."""
    command = ["quantize", str(tiny_llama), str(tmp_path / "out"), "--method", "rtn", "--bits", "4", "--json"]
    with file_size_limit(8192):
        code = main(command)
    error = json.loads(capsys.readouterr().out)["error"]
    assert (code, error["kind"]) == (5, "ResourceError")
    assert "File too large" in error["message"] and "--resume" in error["message"]
    assert main([*command, "--resume"]) == 0
    assert json.loads(capsys.readouterr().out)["file_bytes"] > 8192


@pytest.mark.parametrize("free", [0, 100_000])
def test_too_little_space_is_found_before_the_work_with_both_numbers(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    """Fault 44."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
    with pytest.raises(ResourceError, match=r"the job \(output and work\) needs about .* GB .* only 0.00 GB are free"):
        run(tiny_llama, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_space_that_ran_out_meanwhile_is_found_before_the_shard_is_written(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 44."""
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(ResourceError, match="shard 1 needs about"):

        def fill(event: Event) -> None:
            if event.kind == "block":
                patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))

        run(tiny_llama, tmp_path / "out", progress=fill)
    run(tiny_llama, tmp_path / "out", resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
