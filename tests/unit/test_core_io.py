"""Atomic files, JSON of strangers, free space, folder locks."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from octavo._core import io
from octavo._core.errors import FormatError, ResourceError

# ---------------------------------------------------------------- files

_STEPS = ["open", "fsync", "replace", "fsync-folder"]


def _break(monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException) -> None:
    """Make one step of an atomic write fail."""
    real_fsync, calls = os.fsync, iter(range(9))

    def fail(*_: object, **__: object) -> None:
        raise error

    def fsync(descriptor: int) -> None:
        if next(calls) == (step == "fsync-folder"):
            raise error
        real_fsync(descriptor)

    if step == "open":
        monkeypatch.setattr(io, "open", fail, raising=False)
    elif step == "replace":
        monkeypatch.setattr(os, "replace", fail)
    else:
        monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("existed", [True, False])
@pytest.mark.parametrize("step", _STEPS)
def test_a_failed_write_leaves_the_old_file_or_the_whole_new_one(
    step: str, existed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.json"
    if existed:
        path.write_bytes(b"old")
    with monkeypatch.context() as patch:
        _break(patch, step, OSError(errno.EIO, "input/output error"))
        with pytest.raises(OSError, match="input/output error"):
            io.write_bytes(path, b"new content")
    kept = [b"old"] if existed else []
    got = [file.read_bytes() for file in tmp_path.iterdir()]
    assert got == ([b"new content"] if step == "fsync-folder" else kept), "no temporary file may stay"
    io.write_bytes(path, b"newer")
    assert path.read_bytes() == b"newer"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("step", ["open", "fsync", "replace"])
def test_a_full_disk_is_a_resource_error_that_names_the_file(
    step: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.json"
    path.write_bytes(b"old")
    with monkeypatch.context() as patch:
        _break(patch, step, OSError(number, os.strerror(number)))
        with pytest.raises(ResourceError, match=r"model\.json: .*nothing that was committed before is lost"):
            io.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["model.json"]


def test_a_real_size_limit_leaves_no_partial_file(tmp_path: Path) -> None:
    program = (
        "import resource, signal, sys, pathlib\n"
        "from octavo._core import io, errors\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))\n"
        "try: io.write_bytes(pathlib.Path(sys.argv[1]), bytes(50000))\n"
        "except errors.ResourceError as error: sys.exit(error.exit_code)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "big")], check=False)
    assert done.returncode == 5
    assert os.listdir(tmp_path) == []


def test_an_interrupt_during_a_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state"
    path.write_bytes(b"old")
    _break(monkeypatch, "fsync", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        io.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["state"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_get_the_mode_of_the_umask(mask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        assert io.default_mode() == mode
        assert os.umask(mask) == mask, "asking for the mode must not change the mask"
        io.write_json(tmp_path / "x.json", {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.json").stat().st_mode) == mode


def test_json_is_stable_readable_and_comes_back(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None], "a": {"ü": "né"}}
    io.write_json(tmp_path / "a.json", value)
    io.write_json(tmp_path / "b.json", dict(reversed(value.items())))
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert "né" in (tmp_path / "a.json").read_text(encoding="utf-8")
    assert io.read_json(tmp_path / "a.json") == value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b'{"a": 1', "not valid JSON"),
        (b'"\xff\xfe\x80"', "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b"1" * 10_000, "not valid JSON"),
    ],
    ids=["empty", "cut", "not-utf8", "deep", "long-number"],
)
def test_broken_json_is_a_format_error_with_the_path(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_bytes(content)
    with pytest.raises(FormatError, match=rf"the index .*index\.json .*{message}") as caught:
        io.read_json(tmp_path / "index.json", "the index")
    assert len(str(caught.value)) < 500 + len(str(tmp_path))


def test_json_that_is_missing_a_folder_or_huge_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FormatError, match=r"missing\.json does not exist"):
        io.read_json(tmp_path / "missing.json")
    with pytest.raises(FormatError, match="cannot be read"):
        io.read_json(tmp_path)
    with open(tmp_path / "huge.json", "wb") as file:
        file.truncate(io.MAX_JSON_BYTES + 1)
    monkeypatch.setattr(json, "loads", None)
    with pytest.raises(FormatError, match="67,108,865 bytes"):
        io.read_json(tmp_path / "huge.json")


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert io.sha256_file(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_missing_space_is_refused_with_both_numbers(tmp_path: Path) -> None:
    io.require_space(tmp_path / "not" / "there" / "yet", 1, "the output")
    with pytest.raises(ResourceError, match=r"the output needs about 1000000000\.00 GB on .* but only .* GB are free"):
        io.require_space(tmp_path / "not" / "there" / "yet", 10**18, "the output")


# ---------------------------------------------------------------- lock


def test_a_second_holder_is_refused_and_told_who_has_it(tmp_path: Path) -> None:
    with (
        io.FolderLock(tmp_path),
        pytest.raises(ResourceError, match=rf"is in use by pid {os.getpid()} on "),
        io.FolderLock(tmp_path),
    ):
        pytest.fail("locked twice")
    with io.FolderLock(tmp_path):
        pass


def test_a_killed_holder_leaves_a_file_but_no_lock(tmp_path: Path) -> None:
    program = (
        "import sys, time, pathlib\n"
        "from octavo._core.io import FolderLock\n"
        "with FolderLock(pathlib.Path(sys.argv[1])):\n"
        "    print('locked', flush=True); time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"locked\n"
    with pytest.raises(ResourceError, match=f"pid {holder.pid} on "), io.FolderLock(tmp_path):
        pytest.fail("locked twice")
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert (tmp_path / "LOCK").exists()
    with io.FolderLock(tmp_path):
        assert (tmp_path / "LOCK").read_text().startswith(f"pid {os.getpid()} on ")
