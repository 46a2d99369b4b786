"""The work folder: what a damaged, foreign or changed one says, and that nothing committed is ever lost in silence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from faults.jobs import file_size_limit
from octavo._core.errors import FormatError, ResourceError, UsageError
from octavo._core.io import FolderLock
from octavo.pipeline import store as store_module
from octavo.pipeline.store import Store, set_aside

IDENTITY: dict[str, Any] = {"method": "rtn", "seed": 0, "options": {"bits": 4, "group_size": 64}, "skip": []}


def commit(store: Store, number: int) -> None:
    """A block whose object and hidden states are its number."""
    entry = {"object": store.put_tensors({"w": torch.full((8,), number)}), "matrices": [], "notes": []}
    store.commit_block(entry, store.put_tensors({"batch_0": torch.full((4,), -1.0 - number)}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A work folder with three committed blocks."""
    store = Store(tmp_path / "out.work", IDENTITY)
    store.create()
    for number in range(3):
        commit(store, number)
    return tmp_path / "out.work"


def resumed(folder: Path, **changes: Any) -> Store:
    store = Store(folder, IDENTITY | changes)
    store.resume()
    return store


def damage(path: Path) -> None:
    """Flip one bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def manifest(folder: Path) -> Path:
    return folder / "objects" / (folder / "CURRENT").read_text().strip()


# -------------------------------------------------------------------------------------------------- taking up


def test_a_resumed_store_has_what_was_committed(folder: Path) -> None:
    """Fault 40."""
    store = resumed(folder)
    assert store.exists() and store.notes == []
    assert [int(store.get_tensors(e["object"])["w"][0]) for e in store.state.blocks] == [0, 1, 2]
    assert store.state.hidden is not None
    assert float(store.get_tensors(store.state.hidden)["batch_0"][0]) == -3
    commit(store, 3)
    assert len(resumed(folder).state.blocks) == 4


def test_objects_are_named_after_their_contents_and_old_hidden_states_are_let_go(folder: Path) -> None:
    """Fault 48: a name proves its content; three blocks, two states of two manifests stay, and nothing else."""
    for path in (folder / "objects").iterdir():
        assert path.name == store_module.io.sha256_file(path)
    assert len(list((folder / "objects").iterdir())) == 3 + 2 + 2


def test_the_rest_of_a_killed_write_is_cleared_away(folder: Path) -> None:
    """Fault 40."""
    leftover = folder / "objects" / ".12345.tmp"
    leftover.write_bytes(b"half a tensor")
    assert len(resumed(folder).state.blocks) == 3
    assert not leftover.exists()


# -------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("how", [damage, Path.unlink, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("part", ["object", "hidden"])
def test_a_damaged_object_costs_one_block_and_is_said_to(folder: Path, part: str, how: Any) -> None:
    """Fault 48: back to the state before, by name and number; never silently from zero."""
    state = resumed(folder).state
    name = state.hidden if part == "hidden" else state.blocks[-1]["object"]
    assert name is not None
    how(folder / "objects" / name)
    store = resumed(folder)
    (note,) = store.notes
    assert f"object {name[:12]} is missing or damaged; going back from 3 finished blocks" in note
    assert len(store.state.blocks) == 2
    assert store.state.hidden is not None
    assert float(store.get_tensors(store.state.hidden)["batch_0"][0]) == -2
    commit(store, 2)
    assert resumed(folder).notes == []
    assert len(resumed(folder).state.blocks) == 3


def test_damage_further_back_than_two_states_is_an_error_that_keeps_everything(folder: Path) -> None:
    """Fault 48."""
    name = resumed(folder).state.blocks[0]["object"]
    damage(folder / "objects" / name)
    before = sorted(path.name for path in (folder / "objects").iterdir())
    with pytest.raises(FormatError, match=rf"object {name[:12]} is missing or damaged.*--force-new"):
        resumed(folder)
    assert sorted(path.name for path in (folder / "objects").iterdir()) == before


@pytest.mark.parametrize("how", [damage, Path.unlink, lambda path: path.write_bytes(b"{}")])
def test_a_damaged_manifest_is_an_error_that_keeps_everything(folder: Path, how: Any) -> None:
    """Fault 48."""
    path = manifest(folder)
    how(path)
    before = sorted(entry.name for entry in (folder / "objects").iterdir())
    with pytest.raises(FormatError, match=f"the manifest {path.name[:12]} is missing or damaged.*--force-new"):
        resumed(folder)
    assert sorted(entry.name for entry in (folder / "objects").iterdir()) == before


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe\x00", b"../" * 20 + b"../x", b"0" * 64, b"latest\n"])
def test_a_damaged_pointer_is_an_error_that_keeps_everything(folder: Path, content: bytes) -> None:
    """Fault 48."""
    (folder / "CURRENT").write_bytes(content)
    with pytest.raises(FormatError, match=r"(missing or damaged|no intact state is left).*--force-new"):
        resumed(folder)
    assert len(list((folder / "objects").iterdir())) == 7


def test_a_store_of_another_version_is_refused_with_both(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 55."""
    monkeypatch.setattr(store_module, "STORE_VERSION", 2)
    with pytest.raises(FormatError, match="store version 1, this is version 2"):
        resumed(folder)


# -------------------------------------------------------------------------------------------------- other settings


def test_every_differing_setting_is_named_with_both_values(folder: Path) -> None:
    """Fault 47."""
    with pytest.raises(UsageError) as caught:
        resumed(folder, seed=7, options={"bits": 3, "group_size": 64}, calibration={"ctx": 16, "samples": 2})
    message = str(caught.value)
    for part in ("options.bits: was 4, now 3", "seed: was 0, now 7", "calibration.ctx: was None, now 16"):
        assert part in message
    assert "group_size" not in message and "method" not in message
    assert "--force-new" in message
    assert len(resumed(folder).state.blocks) == 3, "a refusal changes nothing"


def test_settings_that_json_writes_differently_are_the_same(folder: Path) -> None:
    """Fault 47: tuples and lists, for one."""
    assert len(resumed(folder, skip=()).state.blocks) == 3


def test_a_store_set_aside_keeps_everything_under_the_next_free_name(folder: Path) -> None:
    """Fault 47: a new generation, never an overwritten one."""
    names = sorted(path.name for path in (folder / "objects").iterdir())
    folder.with_name("out.work.1").mkdir()
    aside = set_aside(folder)
    assert aside.name == "out.work.2"
    assert not folder.exists()
    assert sorted(path.name for path in (aside / "objects").iterdir()) == names
    assert len(resumed(aside).state.blocks) == 3


# -------------------------------------------------------------------------------------------------- full disk, two jobs


def test_a_full_disk_while_committing_leaves_the_state_before(folder: Path) -> None:
    """Fault 44: safetensors reports it as text only."""
    store = resumed(folder)
    before = sorted(path.name for path in (folder / "objects").iterdir())
    with file_size_limit(4096), pytest.raises(ResourceError, match=r"cannot write .*File too large.*--resume"):
        store.put_tensors({"w": torch.zeros(4096)})
    assert sorted(path.name for path in (folder / "objects").iterdir()) == before
    assert len(resumed(folder).state.blocks) == 3


HOLDER = """
import sys
from pathlib import Path
from octavo._core.io import FolderLock
with FolderLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_names_the_process_that_holds_it_and_dies_with_it(tmp_path: Path) -> None:
    """Fault 46: kill -9 leaves a file, but no lock."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], **pipes) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(ResourceError, match=rf"in use by pid {holder.pid} on "), FolderLock(tmp_path):
            pass
        holder.kill()
    assert str(holder.pid) in (tmp_path / "LOCK").read_text()
    with FolderLock(tmp_path):
        assert f"pid {os.getpid()} on" in (tmp_path / "LOCK").read_text()
        assert str(holder.pid) not in (tmp_path / "LOCK").read_text().split()


def test_the_manifest_is_json_that_says_what_job_it_is(folder: Path) -> None:
    """Fault 56: and has no path in it."""
    content = json.loads(manifest(folder).read_text())
    assert content["identity"] == IDENTITY
    assert str(folder.parent) not in manifest(folder).read_text()
