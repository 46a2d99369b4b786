"""However a job ends before its end, --resume gives the bytes of the job that was never interrupted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import TINY_MODELS
from faults.jobs import DELETIONS, RTN, WRITES, before_each, digests, gptq, make_quick, run, stop_after, vptq
from octavo._core.errors import FormatError, Interrupted, ResourceError, UsageError
from octavo._core.io import FolderLock
from octavo.pipeline import Event

Tiny = Callable[[str], Path]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)


@pytest.fixture
def interrupted(tiny_llama: Path, tiny_text_file: Path, tmp_path: Path) -> Path:
    """The output of a job that was stopped after its first block of two."""
    with pytest.raises(Interrupted):
        run(tiny_llama, tmp_path / "out", gptq(tiny_text_file), stop=stop_after(1))
    assert not (tmp_path / "out").exists()
    return tmp_path / "out"


# -------------------------------------------------------------------------------------------------- interruption


@pytest.mark.parametrize("method", ["rtn", "gptq", "vptq"])
def test_stopping_after_any_block_changes_no_byte(
    tiny_gemma3: Path, tiny_text_file: Path, tmp_path: Path, method: str
) -> None:
    """Faults 40 and 41: what is committed is said, and not computed again."""
    settings = {"rtn": RTN, "gptq": gptq(tiny_text_file), "vptq": vptq(tiny_text_file)}[method]
    run(tiny_gemma3, tmp_path / "whole", settings)
    expected = digests(tmp_path / "whole")
    for blocks in (1, 2):
        out = tmp_path / f"out{blocks}"
        with pytest.raises(Interrupted, match=f"stopped after block {blocks} of 3, which is committed.*--resume"):
            run(tiny_gemma3, out, settings, stop=stop_after(blocks))
        events: list[Event] = []
        run(tiny_gemma3, out, settings, resume=True, progress=events.append)
        assert digests(out) == expected
        assert [e.block for e in events if e.kind == "block"] == list(range(blocks, 3))
    # Stopped at every block, by the last one from within a job that had been resumed twice.
    out = tmp_path / "often"
    for _ in range(2):
        with pytest.raises(Interrupted):
            run(tiny_gemma3, out, settings, resume=True, stop=lambda: True)
    run(tiny_gemma3, out, settings, resume=True, stop=lambda: True)
    assert digests(out) == expected


@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_model_resumes_to_the_same_bytes(
    tiny_model: Tiny, tiny_text_file: Path, tmp_path: Path, name: str
) -> None:
    """Fault 40."""
    settings = gptq(tiny_text_file)
    run(tiny_model(name), tmp_path / "whole", settings)
    with pytest.raises(Interrupted):
        run(tiny_model(name), tmp_path / "out", settings, stop=stop_after(1))
    run(tiny_model(name), tmp_path / "out", settings, resume=True)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_an_interrupt_in_the_middle_of_a_block_costs_that_block_alone(
    tiny_llama: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    """Fault 41: the second Ctrl-C, at any matrix."""
    run(tiny_llama, tmp_path / "whole", vptq(tiny_text_file))
    for matrix in (1, 7, 8, 11):
        seen: list[str] = []

        def press(event: Event, seen: list[str] = seen, matrix: int = matrix) -> None:
            seen.append(event.kind)
            if event.kind == "matrix" and seen.count("matrix") == matrix:
                raise KeyboardInterrupt

        out = tmp_path / f"out{matrix}"
        with pytest.raises(KeyboardInterrupt):
            run(tiny_llama, out, vptq(tiny_text_file), progress=press)
        events: list[Event] = []
        run(tiny_llama, out, vptq(tiny_text_file), resume=True, progress=events.append)
        assert [e.block for e in events if e.kind == "block"] == ([0, 1] if matrix < 8 else [1])
        assert digests(out) == digests(tmp_path / "whole")


def copy_as_a_kill_leaves_it(source: Path, target: Path) -> None:
    """A copy in which files that nobody has flushed and named yet are cut in half."""
    shutil.copytree(source, target)
    for path in target.rglob("*.tmp"):
        os.truncate(path, path.stat().st_size // 2)


def test_a_kill_between_any_two_changes_of_the_disk_loses_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    """Faults 40 and 48: every state that the disk passes through, from the first folder to the last deletion."""
    job, states = tmp_path / "job", {}
    job.mkdir()

    def keep() -> None:
        state = tuple(digests(job).items()) + tuple(sorted(str(p) for p in job.rglob("*")))
        if state not in states:
            states[state] = tmp_path / f"state{len(states)}"
            copy_as_a_kill_leaves_it(job, states[state])

    with before_each([*WRITES, *DELETIONS], keep):
        run(tiny_llama, job / "out")
    expected = digests(job / "out")
    outcomes = []
    for state in states.values():
        if (state / "out").exists() and not (state / "out.work" / "CURRENT").exists():
            # Killed while the work folder of the finished job was being deleted.
            with pytest.raises(UsageError, match=r"exists already.*there is nothing to resume"):
                run(tiny_llama, state / "out", resume=True)
            outcomes.append("finished")
        else:
            report = run(tiny_llama, state / "out", resume=True)
            assert sorted(path.name for path in state.iterdir()) == ["out"]
            outcomes.append("from zero" if any("nothing to resume" in n for n in report.notes) else "resumed")
        assert digests(state / "out") == expected
    assert outcomes == sorted(outcomes, key=("from zero", "resumed", "finished").index)
    assert min(outcomes.count(kind) for kind in ("from zero", "resumed", "finished")) > 2
    assert len(outcomes) > 30


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from faults.jobs import gptq, run
torch.set_num_threads(1)
model, text, folder, *moments = sys.argv[1:]
# Before the first fork, so that the children have all imports already.
run(Path(model), Path(folder, "whole"), gptq(Path(text)))
for moment in moments:
    kind, count = moment.split(":")
    child = os.fork()
    if child == 0:
        seen = []
        def progress(event):
            seen.append(event.kind)
            if event.kind == kind and seen.count(kind) == int(count):
                os.kill(os.getpid(), signal.SIGKILL)
        run(Path(model), Path(folder, moment), gptq(Path(text)), progress=progress)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_sigkill_at_any_moment_is_resumed_to_the_same_bytes(
    tiny_llama: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    """Fault 40: real processes, really killed."""
    moments = ["phase:1", "phase:2", "matrix:3", "block:1", "matrix:12", "block:2", "phase:3"]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tiny_llama), str(tiny_text_file), str(tmp_path), *moments],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.split() == [str(-signal.SIGKILL)] * len(moments), done.stderr
    for moment in moments:
        assert not (tmp_path / moment).exists()
        run(tiny_llama, tmp_path / moment, gptq(tiny_text_file), resume=True)
        assert digests(tmp_path / moment) == digests(tmp_path / "whole"), moment


# -------------------------------------------------------------------------------------------------- what must be asked


def test_an_unfinished_job_is_neither_continued_nor_started_over_unasked(
    interrupted: Path, tiny_llama: Path, tiny_text_file: Path
) -> None:
    """Faults 45 and 47."""
    before = digests(interrupted.with_name("out.work"))
    with pytest.raises(UsageError, match=r"unfinished job.*--resume.*--force-new"):
        run(tiny_llama, interrupted, gptq(tiny_text_file))
    assert digests(interrupted.with_name("out.work")) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 2, "seed": 5}, r"options.bits: was 3, now 2; seed: was 0, now 5\."),
        ({"samples": 3}, r"calibration.samples: was 2, now 3; calibration.tokens: was '\w+', now '\w+'\. Repeat"),
        ({"method": "rtn"}, r"method: was 'gptq', now 'rtn'"),
        ({"skip": ["o_proj"]}, r"skip: was \[\], now \['o_proj'\]\. Repeat"),
        ({"side_dtype": "bfloat16"}, r"options.side_dtype: was 'float16', now 'bfloat16'\. Repeat"),
    ],
)
def test_resuming_with_other_settings_names_each_of_them(
    interrupted: Path, tiny_llama: Path, tiny_text_file: Path, changes: dict[str, Any], message: str
) -> None:
    """Fault 47."""
    before = digests(interrupted.with_name("out.work"))
    with pytest.raises(UsageError, match=message):
        run(tiny_llama, interrupted, gptq(tiny_text_file) | changes, resume=True)
    assert digests(interrupted.with_name("out.work")) == before


def test_resuming_with_another_model_or_text_is_refused(
    interrupted: Path, tiny_mistral: Path, tiny_llama: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    """Fault 47: the contents count, not the names."""
    with pytest.raises(UsageError, match=r"model: was '\w+', now '\w+'"):
        run(tiny_mistral, interrupted, gptq(tiny_text_file), resume=True)
    other = tmp_path / "other.txt"
    other.write_text(tiny_text_file.read_text().replace("river", "brook"))
    with pytest.raises(UsageError, match=r"settings, so .* calibration.tokens: was '\w+', now '\w+'\. Repeat"):
        run(tiny_llama, interrupted, gptq(other), resume=True)
    moved, copied = shutil.copytree(tiny_llama, tmp_path / "moved"), tmp_path / "same.txt"
    shutil.copyfile(tiny_text_file, copied)
    run(moved, interrupted, gptq(copied), resume=True)
    assert interrupted.exists()


def test_force_new_sets_the_old_job_aside(interrupted: Path, tiny_llama: Path, tiny_text_file: Path) -> None:
    """Fault 47."""
    old = interrupted.with_name("out.work")
    before = digests(old)
    report = run(tiny_llama, interrupted, gptq(tiny_text_file, bits=2), force_new=True)
    assert report.notes[0] == "set the unfinished job aside as out.work.1"
    assert not old.exists()
    assert digests(interrupted.with_name("out.work.1")) == before
    # And the old one can still be taken up again.
    interrupted.with_name("out.work.1").rename(interrupted.with_name("again.work"))
    run(tiny_llama, interrupted.with_name("again"), gptq(tiny_text_file), resume=True)


@pytest.mark.parametrize("option", ["resume", "force_new", "keep_work"])
def test_a_job_that_another_process_works_on_is_left_alone(
    interrupted: Path, tiny_llama: Path, tiny_text_file: Path, option: str
) -> None:
    """Fault 46: above all, --force-new must not pull the folder from under it."""
    work = interrupted.with_name("out.work")
    with FolderLock(work):
        before = digests(work)
        with pytest.raises(ResourceError, match=f"in use by pid {os.getpid()} on"):
            run(tiny_llama, interrupted, gptq(tiny_text_file), **{option: True})
        assert digests(work) == before
    assert [path.name for path in interrupted.parent.iterdir()] == ["out.work"]


# -------------------------------------------------------------------------------------------------- damage


def test_a_damaged_block_is_quantized_again_and_the_report_says_so(
    tiny_llama: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    """Fault 48."""
    run(tiny_llama, tmp_path / "out", gptq(tiny_text_file), keep_work=True)
    expected = digests(tmp_path / "out")
    work = tmp_path / "out.work"
    (tmp_path / "out").rename(tmp_path / "whole")
    state = json.loads((work / "objects" / (work / "CURRENT").read_text().strip()).read_text())
    os.truncate(work / "objects" / state["blocks"][-1]["object"], 100)
    events: list[Event] = []
    report = run(tiny_llama, tmp_path / "out", gptq(tiny_text_file), resume=True, progress=events.append)
    assert any("is missing or damaged; going back from 2 finished blocks" in note for note in report.notes)
    assert [e.block for e in events if e.kind == "block"] == [1]
    assert digests(tmp_path / "out") == expected


def test_a_damaged_manifest_stops_the_resume(interrupted: Path, tiny_llama: Path, tiny_text_file: Path) -> None:
    """Fault 48."""
    work = interrupted.with_name("out.work")
    os.truncate(work / "objects" / (work / "CURRENT").read_text().strip(), 50)
    before = digests(work)
    with pytest.raises(FormatError, match=r"manifest \w+ is missing or damaged.*--force-new"):
        run(tiny_llama, interrupted, gptq(tiny_text_file), resume=True)
    assert digests(work) == before
    run(tiny_llama, interrupted, gptq(tiny_text_file), force_new=True)
    assert digests(interrupted.with_name("out.work.1")) == before


def test_resuming_where_nothing_is_starts_from_the_beginning_and_says_so(tiny_llama: Path, tmp_path: Path) -> None:
    """Fault 40: killed before the first commit."""
    report = run(tiny_llama, tmp_path / "out", resume=True)
    assert report.notes == ("nothing to resume in out.work: starting from the beginning",)
