"""Octavo's own format: sharded safetensors, ``quantization_config`` in config.json, and a manifest of checksums.

Tensors of a quantized matrix are called ``<module>.<name in Layout.tensors()>``; all other tensors of the model keep
their names and bytes. ``octavo_manifest.json`` holds size and SHA-256 of every file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from octavo._core.errors import FormatError, UsageError, did_you_mean
from octavo._core.io import read_json, sha256_file, write_json
from octavo.formats.reader import DTYPES, CheckpointReader
from octavo.layout import Layout
from octavo.weight import VQWeight

FORMAT_VERSION = 1
QUANT_METHOD = "octavo"
CONFIG_FILE = "config.json"
MANIFEST_FILE = "octavo_manifest.json"
_KEYS = ("quant_method", "format_version", "octavo_version", "method", "layouts", "modules", "details")
#: Files that can change how a model loads; a README that came later is nobody's problem.
_LOADABLE = (".safetensors", ".json", ".jinja", ".model", ".py", ".bin", ".pt")
_MODULE_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")


@dataclass(frozen=True)
class NativeConfig:
    """What config.json says about the quantized matrices.

    Attributes:
        layouts: module path in the ``AutoModelForCausalLM`` skeleton -> how its matrix is stored.
        method: the algorithm that made them.
        details: what else the writer recorded (bits, calibration, seeds); nothing in it is needed to load.
        raw: ``quantization_config`` as it stands in the file.
    """

    layouts: dict[str, Layout]
    method: str
    details: dict[str, Any]
    raw: dict[str, Any]

    def tensors(self) -> dict[str, tuple[Any, tuple[int, ...]]]:
        """Full name -> (torch dtype, shape) of every tensor of every quantized matrix."""
        return {
            f"{module}.{name}": spec
            for module, layout in self.layouts.items()
            for name, spec in layout.tensors().items()
        }


def octavo_version() -> str:
    """The version of the installed package, for the record in the file."""
    try:
        return version("octavo")
    except PackageNotFoundError:
        return "unknown"


def quantization_config(layouts: Mapping[str, Layout], method: str, details: Mapping[str, Any]) -> dict[str, Any]:
    """The ``quantization_config`` of config.json: every distinct layout once, and which module has which.

    Raises:
        UsageError: ``details`` is not JSON.
    """
    unique: dict[Layout, int] = {}
    modules = {module: unique.setdefault(layout, len(unique)) for module, layout in layouts.items()}
    config = {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "octavo_version": octavo_version(),
        "method": method,
        "layouts": [layout.to_dict() for layout in unique],
        "modules": modules,
        "details": dict(details),
    }
    try:
        return json.loads(json.dumps(config, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UsageError(f"details of the quantization config wanted JSON values: {error}.") from error


def parse_config(raw: Any, where: str) -> NativeConfig:
    """Check a ``quantization_config``; ``where`` names the file in errors.

    Raises:
        FormatError: another method, another format version, or anything that is not exactly this format.
    """
    if not isinstance(raw, dict) or raw.get("quant_method") != QUANT_METHOD:
        method = raw.get("quant_method") if isinstance(raw, dict) else None
        raise FormatError(
            f"{where}: this is no Octavo checkpoint (quant_method is {method!r}, wanted {QUANT_METHOD!r})."
        )
    found = raw.get("format_version")
    if type(found) is not int or found != FORMAT_VERSION:
        raise FormatError(
            f"{where}: format version {found!r} was written by Octavo {raw.get('octavo_version', '?')}; this is Octavo "
            f"{octavo_version()}, which reads format version {FORMAT_VERSION}. Update Octavo, or quantize again."
        )
    for key in raw:
        if key not in _KEYS:
            raise FormatError(f"{where}: unknown key {key!r} in quantization_config.{did_you_mean(key, _KEYS)}")
    for key, kind in (("method", str), ("layouts", list), ("modules", dict), ("details", dict)):
        if not isinstance(raw.get(key), kind):
            raise FormatError(
                f"{where}: quantization_config wanted {key} of type {kind.__name__}, got {raw.get(key)!r}."
            )
    layouts = []
    for number, entry in enumerate(raw["layouts"]):
        if not isinstance(entry, dict):
            raise FormatError(f"{where}: layout {number} is no object.")
        layouts.append(Layout.from_dict(entry, f"{where}: layout {number}"))
    modules = {}
    for module, number in raw["modules"].items():
        if not _MODULE_NAME.fullmatch(module):
            raise FormatError(f"{where}: {module!r} is no module path.")
        if type(number) is not int or not 0 <= number < len(layouts):
            raise FormatError(f"{where}: module {module} wanted a layout number below {len(layouts)}, got {number!r}.")
        modules[module] = layouts[number]
    return NativeConfig(modules, raw["method"], raw["details"], raw)


def is_native(folder: str | Path) -> bool:
    """Whether config.json of ``folder`` claims to be of this format (nothing else is checked)."""
    path = Path(folder) / CONFIG_FILE
    config = read_json(path, "model config") if path.is_file() else None
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def read_config(folder: str | Path) -> NativeConfig:
    """Read and check the quantization part of ``folder``/config.json.

    Raises:
        FormatError: missing, not JSON, not Octavo's, or of another format version.
    """
    path = Path(folder) / CONFIG_FILE
    config = read_json(path, "model config")
    return parse_config(config.get("quantization_config") if isinstance(config, dict) else None, str(path))


def check(folder: str | Path, config: NativeConfig | None = None) -> NativeConfig:
    """Hold config.json, all headers and (sizes only) the manifest against each other; reads no weights.

    Args:
        folder: the checkpoint.
        config: use this instead of the one in ``folder``/config.json.

    Raises:
        FormatError: the first thing that does not fit, with names and numbers.
    """
    root = Path(folder)
    config = config or read_config(root)
    reader = CheckpointReader(root, strict=True)
    _check_tensors(config, reader)
    # A checkpoint that transformers saved again has no manifest, and needs none to load.
    manifest = _read_manifest(root) if (root / MANIFEST_FILE).is_file() else {}
    for path in reader.files:
        size, entry = path.stat().st_size, manifest.get(path.name)
        if entry is not None and entry["bytes"] != size:
            raise FormatError(
                f"{path} has {size} bytes, {MANIFEST_FILE} says {entry['bytes']}. Fetch it again; if you "
                f"saved other weights into this folder yourself, delete {MANIFEST_FILE}."
            )
    return config


def _check_tensors(config: NativeConfig, reader: CheckpointReader) -> None:
    """Every quantized matrix must have exactly its tensors, with the dtypes and shapes of its layout."""
    expected = config.tensors()
    for name, (dtype, shape) in expected.items():
        if name not in reader:
            raise FormatError(
                f"{reader.folder}: tensor {name} is missing. The checkpoint is incomplete; fetch it again."
            )
        code, found = reader.info(name)
        if DTYPES[code] != dtype or found != shape:
            raise FormatError(
                f"{reader.folder}: {name} wanted {dtype} {shape} by its layout in {CONFIG_FILE}, "
                f"got {DTYPES[code]} {found}."
            )
    for name in reader.names():
        module, _, leaf = name.rpartition(".")
        if name in expected:
            continue
        if module in config.layouts:
            raise FormatError(
                f"{reader.folder}: {name} is unknown: the layout of {module} in {CONFIG_FILE} has no {leaf}."
            )
        if leaf == "indices" or re.fullmatch(r"codebook_\d+", leaf):
            raise FormatError(
                f"{reader.folder}: {name} belongs to a quantized matrix that {CONFIG_FILE} does not list."
            )


def read_weights(folder: str | Path) -> Iterator[tuple[str, VQWeight]]:
    """Yield (module, weight) for every quantized matrix, one at a time, after :func:`check`.

    Raises:
        FormatError: the folder fails the check, or a weight cannot be decoded (non-finite books, a bad permutation).
    """
    config = check(folder)
    with CheckpointReader(folder, strict=True) as reader:
        for module, layout in config.layouts.items():
            weight = VQWeight(layout, {name: reader.read(f"{module}.{name}") for name in layout.tensors()})
            weight.validate(module)
            yield module, weight


# ---------------------------------------------------------------- manifest


def write_manifest(folder: str | Path) -> dict[str, Any]:
    """Write ``octavo_manifest.json``: size and SHA-256 of every other file of the folder; call it last."""
    root = Path(folder)
    files = {name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for name, path in _files(root).items()}
    manifest = {"format_version": FORMAT_VERSION, "octavo_version": octavo_version(), "files": files}
    write_json(root / MANIFEST_FILE, manifest)
    return manifest


def verify(folder: str | Path) -> None:
    """Read a folder in full and check headers, checksums and contents.

    Raises:
        FormatError: everything that :func:`problems` finds, one per line.
    """
    found = problems(folder)
    if found:
        raise FormatError("\n".join(found))


def problems(folder: str | Path) -> list[str]:
    """Everything that is wrong with a folder, one sentence each; empty when all is well. Reads every byte."""
    root, found = Path(folder), []
    try:
        for _ in read_weights(root):
            pass
    except FormatError as error:
        found.append(str(error))
    try:
        manifest = _read_manifest(root)
    except FormatError as error:
        return [*found, str(error)]
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


def _read_manifest(root: Path) -> dict[str, dict[str, Any]]:
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
