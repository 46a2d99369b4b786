"""Durable, atomic file operations. Everything that Octavo writes goes through here.

A reader sees the old file or the whole new one, never a part; after a return the bytes are on the disk.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from octavo._core.errors import FormatError, ResourceError

_CHUNK = 1 << 22
#: JSON files of a checkpoint are small; a larger one is hostile or broken (an index of 100,000 tensors is 10 MB).
MAX_JSON_BYTES = 64 << 20


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn 'disk full', 'file too large' and quota errors into a ResourceError that names the path."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ResourceError(
                f"cannot write {path}: {os.strerror(error.errno)}. Free some space (or raise the limit) and run the "
                "same command with --resume; nothing that was committed before is lost."
            ) from error
        raise


def fsync_dir(path: Path) -> None:
    """Flush a directory entry, so that a rename survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Flush a file that somebody else wrote (safetensors does not fsync)."""
    with disk_errors(path), open(path, "rb+") as file:
        os.fsync(file.fileno())


def default_mode() -> int:
    """The mode that the umask gives to a new file (safetensors forces 0600)."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` atomically and durably.

    Raises:
        ResourceError: the disk is full; the old file, if any, is untouched and the temporary one is gone.
    """
    # Neither threads nor containers with a folder in common may share it.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid4().hex}.tmp")
    try:
        with disk_errors(path):
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            fsync_dir(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as stable, readable JSON, atomically."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())


def read_json(path: Path, what: str = "JSON file") -> Any:
    """Read a JSON file of a sane size.

    Raises:
        FormatError: missing, too large, not UTF-8, not JSON, or nested too deeply.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise FormatError(f"{what} {path} has {size:,} bytes; more than {MAX_JSON_BYTES:,} is not plausible.")
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise FormatError(f"{what} {path} does not exist.") from error
    except (IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise FormatError(f"{what} {path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{what} {path} is not valid JSON: {str(error)[:200]}") from error


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def require_space(folder: Path, needed: int, what: str) -> None:
    """Check that ``needed`` bytes fit on the file system of ``folder``.

    Raises:
        ResourceError: they do not; both numbers are in the message.
    """
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ResourceError(
            f"{what} needs about {needed / 1e9:.2f} GB on {folder}, but only {free / 1e9:.2f} GB are free. "
            "Free some space or choose another output folder."
        )


class FolderLock:
    """An exclusive lock on a folder that dies with its process (flock), with the holder's pid and host inside."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "LOCK"
        self._file: Any = None

    def __enter__(self) -> FolderLock:
        import fcntl

        self._file = open(self._path, "a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.seek(0)
            holder = self._file.read().strip() or "an unknown process"
            self._file.close()
            raise ResourceError(
                f"{self._path.parent} is in use by {holder}. Wait for it or stop it; the lock ends with that process, "
                "a stale file alone never blocks."
            ) from error
        self._file.truncate(0)
        self._file.write(f"pid {os.getpid()} on {socket.gethostname()}")
        self._file.flush()
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
