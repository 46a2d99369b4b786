"""The work directory of a quantization job: content-addressed, committed block by block, resumable.

``objects/<sha256>`` holds immutable files, ``CURRENT`` names the newest manifest and is the only commit point. A
manifest lists everything that a resume needs and names its predecessor, so that a damaged object costs one block, not
the job.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from octavo._core import io
from octavo._core.errors import FormatError, ResourceError, UsageError

STORE_VERSION = 1
_HASH_CHARS = 64


@dataclass
class State:
    """What has been committed: one entry per finished block, and the object with the hidden states that leave it."""

    blocks: list[dict[str, Any]] = field(default_factory=list)
    hidden: str | None = None


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
            if not damaged:
                self.state = State(manifest["blocks"], manifest["hidden"])
                self._manifest = name
                for leftover in self._objects.glob(".*.tmp"):
                    leftover.unlink()
                return
            self.notes.append(
                f"work folder: object {damaged[0][:12]} is missing or damaged; going back from "
                f"{len(manifest['blocks'])} finished blocks to the state before"
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

    def _commit(self) -> None:
        manifest = {
            "store_version": STORE_VERSION,
            "identity": self.identity,
            "previous": self._manifest,
            "blocks": self.state.blocks,
            "hidden": self.state.hidden,
        }
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
    return [*objects, *([manifest["hidden"]] if manifest["hidden"] else [])]


def set_aside(folder: Path) -> Path:
    """Move an old work directory out of the way (``--force-new``); returns its new name."""
    number = 1
    while (target := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    os.rename(folder, target)
    return target
