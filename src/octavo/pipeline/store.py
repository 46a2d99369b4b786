"""The work directory of a job: content-addressed, committed block by block (or step by step), resumable.

``objects/<sha256>`` holds immutable files, ``CURRENT`` names the newest manifest and is the only commit point. A
manifest lists everything that a resume needs and names its predecessor, so that a damaged object costs one block, not
the job.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from octavo._core import io
from octavo._core.errors import FormatError, ResourceError, UsageError

STORE_VERSION = 1
_HASH_CHARS = 64
#: What a work folder may hold.
_OWN = ("LOCK", "CURRENT", "objects", "source", "output", "quantized", "tuning", "read", "gradients")


@dataclass
class State:
    """What has been committed.

    Attributes:
        blocks: of a quantization, one entry per finished block. hidden: the object with the states that leave the last.
        guide: of a quantization, what :mod:`octavo.pipeline.guide` found out before the first block.
        tuning: of a tuning, how far it is; ``step`` and ``objects`` (purpose -> object name) are known here.
    """

    blocks: list[dict[str, Any]] = field(default_factory=list)
    hidden: str | None = None
    tuning: dict[str, Any] | None = None
    guide: dict[str, Any] | None = None

    def __str__(self) -> str:
        return f"{len(self.blocks)} finished blocks" if self.tuning is None else f"tuning step {self.tuning['step']}"


class Store:
    """One job's work directory; use it under a :class:`octavo._core.io.FolderLock`."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self.identity = dict(identity)
        self.state = State()
        self.notes: list[str] = []
        self._objects = folder / "objects"
        self._current = folder / "CURRENT"
        self._manifest: str | None = None

    # ---------------------------------------------------------------- opening

    def create(self) -> None:
        """Start a new job in an empty folder."""
        self._objects.mkdir(parents=True, exist_ok=True)
        self._commit()

    def exists(self) -> bool:
        """Whether the folder holds a committed job."""
        return self._current.exists()

    def resume(self) -> None:
        """Take up the newest intact state.

        Raises:
            UsageError: the job was started with other settings; every differing field is named with both values.
            FormatError: nothing intact is left, or the store is of another version.
        """
        name: str | None = self._current.read_bytes().decode("ascii", "replace").strip()
        while name:
            manifest = self._read_manifest(name)
            if manifest is None:
                raise FormatError(
                    f"{self.folder}: {''.join(f'{note}; ' for note in self.notes)}the manifest {name[:12]} is missing "
                    "or damaged, and with it the way to older ones. Use --force-new to start again beside it; nothing "
                    "here is overwritten."
                )
            self._check_identity(manifest)
            damaged = [o for o in _referenced(manifest) if not self._intact(o)]
            state = State(manifest["blocks"], manifest["hidden"], manifest.get("tuning"), manifest.get("guide"))
            if not damaged:
                self.state, self._manifest = state, name
                for leftover in self._objects.glob(".*.tmp"):
                    leftover.unlink()
                return
            self.notes.append(
                f"work folder: object {damaged[0][:12]} is missing or damaged; going back from "
                f"{state} to the state before"
            )
            name = manifest["previous"]
        raise FormatError(
            f"{self.folder}: no intact state is left. Use --force-new to start again beside it; nothing here is "
            "overwritten."
        )

    def _read_manifest(self, name: str) -> dict[str, Any] | None:
        if len(name) != _HASH_CHARS or not self._intact(name):
            return None
        manifest = io.read_json(self._objects / name, "job manifest")
        if manifest.get("store_version") != STORE_VERSION:
            raise FormatError(
                f"{self.folder} was written by store version {manifest.get('store_version')}, this is version "
                f"{STORE_VERSION}. Finish it with the Octavo that began it, or use --force-new."
            )
        return manifest

    def _check_identity(self, manifest: Mapping[str, Any]) -> None:
        old, new = _flat(manifest["identity"]), _flat(json.loads(json.dumps(self.identity)))
        differing = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
        if differing:
            lines = "; ".join(f"{k}: was {old.get(k)!r}, now {new.get(k)!r}" for k in differing)
            raise UsageError(
                f"{self.folder} holds a job with other settings, so resuming would mix two results. {lines}. Repeat "
                "the old settings, or use --force-new to start again beside it."
            )

    def _intact(self, name: str) -> bool:
        path = self._objects / name
        return path.is_file() and io.sha256_file(path) == name

    # ---------------------------------------------------------------- writing

    def put_tensors(self, tensors: Mapping[str, Tensor]) -> str:
        """Store named tensors durably; returns the object's name."""
        temporary = self._objects / f".{os.getpid()}.tmp"
        try:
            with io.disk_errors(self.folder):
                save_file(dict(tensors), temporary)
            io.fsync_file(temporary)
            name = io.sha256_file(temporary)
            os.replace(temporary, self._objects / name)
        except Exception as error:
            temporary.unlink(missing_ok=True)
            if "No space left" in str(error) or "File too large" in str(error):
                # safetensors reports the operating system's error as text only.
                raise ResourceError(
                    f"cannot write {self.folder}: {error}. Free some space and run the same command with --resume; "
                    "nothing that was committed before is lost."
                ) from error
            raise
        io.fsync_dir(self._objects)
        return name

    def get_tensors(self, name: str) -> dict[str, Tensor]:
        """Read an object written by :meth:`put_tensors`."""
        return load_file(self._objects / name)

    def commit_block(self, entry: dict[str, Any], hidden: str | None) -> None:
        """Make one more block durable; after the return a kill loses nothing of it."""
        self.state.blocks.append(entry)
        self.state.hidden = hidden
        self._commit()

    def commit_guide(self, entry: dict[str, Any]) -> None:
        """Make durable what was found out before the first block."""
        self.state.guide = entry
        self._commit()

    def commit_tuning(self, entry: dict[str, Any]) -> None:
        """Make the state of a tuning durable, in place of the one before."""
        self.state.tuning = entry
        self._commit()

    def _commit(self) -> None:
        manifest = {
            "store_version": STORE_VERSION,
            "identity": self.identity,
            "previous": self._manifest,
            "blocks": self.state.blocks,
            "hidden": self.state.hidden,
        }
        if self.state.tuning is not None:
            manifest["tuning"] = self.state.tuning
        if self.state.guide is not None:
            manifest["guide"] = self.state.guide
        data = json.dumps(manifest, sort_keys=True).encode()
        name = hashlib.sha256(data).hexdigest()
        io.write_bytes(self._objects / name, data)
        io.write_bytes(self._current, f"{name}\n".encode())
        previous, self._manifest = self._manifest, name
        self._collect_garbage(manifest, previous)

    def _collect_garbage(self, manifest: Mapping[str, Any], previous: str | None) -> None:
        """Drop what neither the current nor the previous state needs (old hidden states, mostly)."""
        keep = {self._manifest, previous, *_referenced(manifest)}
        before = self._read_manifest(previous) if previous else None
        if before is not None:
            keep |= set(_referenced(before))
        for path in self._objects.iterdir():
            if path.name not in keep and len(path.name) == _HASH_CHARS:
                path.unlink()

    def remove(self) -> None:
        """Delete the work directory after the output has been verified."""
        # First the pointer: a rest without it is litter, never a damaged job.
        self._current.unlink()
        shutil.rmtree(self.folder)


def _flat(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Nested fields under dotted names, so that a message names exactly what differs."""
    flat: dict[str, Any] = {}
    for key, value in identity.items():
        flat |= {f"{key}.{k}": v for k, v in _flat(value).items()} if isinstance(value, dict) else {key: value}
    return flat


def _referenced(manifest: Mapping[str, Any]) -> list[str]:
    objects = [entry["object"] for entry in manifest["blocks"]]
    objects += [manifest["hidden"]] if manifest["hidden"] else []
    objects += [manifest["guide"]["object"]] if manifest.get("guide") else []
    return [*objects, *(manifest.get("tuning") or {"objects": {}})["objects"].values()]


# -------------------------------------------------------------------------------------------------- the folder itself


def prepare_work(out: Path, resume: bool, force_new: bool, note: Callable[[str], None]) -> Path:
    """The work folder ``OUT.work`` of a job that will write ``out``, made if need be; ``note`` takes warnings.

    Raises:
        UsageError: ``out`` exists, an unfinished job that is neither to be resumed nor to be set aside, a folder that
            cannot be made or holds other people's files.
    """
    work = out.with_name(out.name + ".work")
    begun = (work / "CURRENT").exists()
    # A job that was killed between its last two steps has its finished output beside its work folder.
    if os.path.lexists(out) and not (begun and resume):
        raise UsageError(already_there(out))
    if not out.parent.is_dir():
        raise UsageError(f"the folder {out.parent} for the output does not exist; create it first.")
    if begun and not resume:
        # Under the lock: another process may be at work in there.
        with io.FolderLock(work):
            if not force_new:
                raise UsageError(
                    f"{work} holds an unfinished job. Repeat the command with --resume to continue it, or with "
                    "--force-new to set it aside and start again."
                )
            note(f"set the unfinished job aside as {set_aside(work).name}")
    elif resume and not begun:
        note(f"nothing to resume in {work.name}: starting from the beginning")
    try:
        with io.disk_errors(work):
            work.mkdir(exist_ok=True)
        strangers = sorted(path.name for path in work.iterdir() if path.name not in _OWN and path.name[0] != ".")
    except OSError as error:
        raise UsageError(
            f"cannot create the work folder {work}: {os.strerror(error.errno or 0)}. Choose an output in a folder "
            "that you may write to."
        ) from error
    if strangers:
        raise UsageError(
            f"{work}, where the job's state would go, holds files that are not Octavo's "
            f"({', '.join(strangers[:3])}). Move it away or choose another output."
        )
    return work


def already_there(out: Path) -> str:
    """Why an output that exists is refused."""
    return (
        f"{out} exists already. Octavo never overwrites: choose another output or remove it first. (If it is the "
        f"finished output of an earlier run, as `octavo verify {out}` can tell, there is nothing to resume.)"
    )


@contextmanager
def no_litter(work: Path) -> Iterator[None]:
    """Take the work folder away again when a job fails before there is anything to resume."""
    try:
        yield
    except BaseException:
        if set(os.listdir(work)) <= {"LOCK", "read", "output"}:
            shutil.rmtree(work)
        raise


def set_aside(folder: Path) -> Path:
    """Move an old work directory out of the way (``--force-new``); returns its new name."""
    number = 1
    while (target := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    os.rename(folder, target)
    return target
