"""``octavo_manifest.json``: size and SHA-256 of every file of a folder."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from octavo._core.errors import FormatError
from octavo._core.io import read_json, sha256_file, write_json

FORMAT_VERSION = 1
MANIFEST_FILE = "octavo_manifest.json"
#: Files that can change how a model loads; a README that came later is nobody's problem.
_LOADABLE = (".safetensors", ".json", ".jinja", ".model", ".py", ".bin", ".pt")


def octavo_version() -> str:
    """The version of the installed package, for the record in the file."""
    try:
        return version("octavo")
    except PackageNotFoundError:
        return "unknown"


def write_manifest(folder: str | Path) -> dict[str, Any]:
    """Write ``octavo_manifest.json``: size and SHA-256 of every other file of the folder; call it last."""
    root = Path(folder)
    files = {name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for name, path in _files(root).items()}
    manifest = {"format_version": FORMAT_VERSION, "octavo_version": octavo_version(), "files": files}
    write_json(root / MANIFEST_FILE, manifest)
    return manifest


def check_sizes(root: Path, files: Iterable[Path]) -> None:
    """Hold the sizes of some files against the manifest, if there is one.

    Raises:
        FormatError: a size that differs, or a manifest that is none.
    """
    # A checkpoint that transformers saved again has no manifest, and needs none to load.
    manifest = _read(root) if (root / MANIFEST_FILE).is_file() else {}
    for path in files:
        size, entry = path.stat().st_size, manifest.get(path.name)
        if entry is not None and entry["bytes"] != size:
            raise FormatError(
                f"{path} has {size} bytes, {MANIFEST_FILE} says {entry['bytes']}. Fetch it again; if you "
                f"saved other weights into this folder yourself, delete {MANIFEST_FILE}."
            )


def problems(root: Path) -> list[str]:
    """What the manifest says of a folder that is not so, one sentence each; reads every byte."""
    try:
        manifest = _read(root)
    except FormatError as error:
        return [str(error)]
    found = []
    present = _files(root) if root.is_dir() else {}
    for name, entry in manifest.items():
        if name not in present:
            found.append(f"{root / name} is missing, {MANIFEST_FILE} lists it.")
        elif (size := present[name].stat().st_size) != entry["bytes"]:
            found.append(f"{root / name} has {size} bytes, {MANIFEST_FILE} says {entry['bytes']}.")
        elif sha256_file(present[name]) != entry["sha256"]:
            found.append(f"{root / name} was changed or damaged: its SHA-256 is not the one in {MANIFEST_FILE}.")
    for name in present:
        if name not in manifest and Path(name).suffix in _LOADABLE:
            found.append(f"{root / name} is not listed in {MANIFEST_FILE}.")
    return found


def _files(root: Path) -> dict[str, Path]:
    """All files below ``root`` but the manifest, hidden and temporary ones, by relative name."""
    found = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}
    return {
        name: path
        for name, path in found.items()
        if name != MANIFEST_FILE and not any(p[0] == "." for p in name.split("/"))
    }


def _read(root: Path) -> dict[str, dict[str, Any]]:
    path = root / MANIFEST_FILE
    manifest = read_json(path, "manifest")
    found = manifest.get("format_version") if isinstance(manifest, dict) else None
    if type(found) is not int or found != FORMAT_VERSION:
        raise FormatError(f"{path}: format version {found!r} is unknown; this Octavo reads version {FORMAT_VERSION}.")
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise FormatError(f"{path}: an object 'files' is wanted.")
    for name, entry in files.items():
        parts = name.replace("\\", "/").split("/")
        if not name or ".." in parts or "" in parts:
            raise FormatError(f"{path}: {name!r} is no file name inside the folder.")
        if (
            not isinstance(entry, dict)
            or type(entry.get("bytes")) is not int
            or not isinstance(entry.get("sha256"), str)
        ):
            raise FormatError(f"{path}: {name} wanted 'bytes' and 'sha256'.")
    return files
