"""A quantized folder of any format: recognised, checked, read and verified."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from octavo._core.errors import FormatError
from octavo._core.io import read_json
from octavo.formats import manifest
from octavo.formats._base import CONFIG_FILE, Format, Quantized, Shapes, get, registry
from octavo.formats.reader import DTYPES, CheckpointReader
from octavo.weight import VQWeight


def raw_config(folder: str | Path) -> dict[str, Any] | None:
    """The ``quantization_config`` in config.json of a folder, also where a multimodal model keeps it; None without.

    Raises:
        FormatError: a config.json that is no JSON object.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        return None
    config = read_json(path, "model config")
    if not isinstance(config, dict):
        raise FormatError(f"{path}: a JSON object is wanted, got {type(config).__name__}.")
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        if isinstance(part.get("quantization_config"), dict):
            return part["quantization_config"]
    return None


def is_quantized(folder: str | Path) -> bool:
    """Whether config.json of ``folder`` claims to be of a format that Octavo reads (nothing else is checked)."""
    raw = raw_config(folder)
    return raw is not None and raw.get("quant_method") in registry.names()


def format_of(raw: dict[str, Any] | None, where: str) -> Format:
    """The format that a ``quantization_config`` claims.

    Raises:
        FormatError: none that Octavo reads; ``where`` names the file.
    """
    method = raw.get("quant_method") if raw is not None else None
    if method not in registry.names():
        raise FormatError(
            f"{where}: this is no quantized checkpoint that Octavo reads (quant_method is {method!r}, wanted "
            f"{' or '.join(map(repr, registry.names()))})."
        )
    return get(str(method))


def check(folder: str | Path, raw: dict[str, Any] | None = None, shapes: Shapes | None = None) -> Quantized:
    """Hold config.json, all headers and (sizes only) the manifest against each other; reads no large tensor.

    Args:
        folder: the checkpoint.
        raw: use this ``quantization_config`` instead of the one in ``folder``/config.json.
        shapes: (out, in) of the model's linear layers, for files that do not say them.

    Raises:
        FormatError: the first thing that does not fit, with names and numbers.
    """
    root = Path(folder)
    path = root / CONFIG_FILE
    if raw is None:
        if not path.is_file():
            # The same words as for every other file that cannot be read.
            read_json(path, "model config")
        raw = raw_config(root)
    form = format_of(raw, str(path))
    assert raw is not None
    form.check_config(raw, str(path))
    with CheckpointReader(root, strict=form.strict) as reader:
        config = form.describe(raw, str(path), reader, shapes)
        _check_tensors(form, config, reader)
        manifest.check_sizes(root, reader.files)
        for module, matrix in config.matrices.items():
            matrix.check_contents(lambda name, module=module: reader.read(f"{module}.{name}"), f"{root}: {module}")
    return config


def _check_tensors(form: Format, config: Quantized, reader: CheckpointReader) -> None:
    """Every quantized matrix must have exactly its tensors, with the dtypes and shapes that config.json makes them."""
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
        if name in expected:
            continue
        parts = name.split(".")
        # Some formats nest tensors one level below the module.
        owners = (".".join(parts[:-depth]) for depth in (1, 2))
        modules = {*config.matrices, *([config.head.module] if config.head else [])}
        owner = next((module for module in owners if module in modules), None)
        if owner is not None:
            raise FormatError(
                f"{reader.folder}: {name} is unknown: the layout of {owner} in {CONFIG_FILE} has no "
                f"{name.removeprefix(owner + '.')}."
            )
        if form.is_part(parts[-1]):
            raise FormatError(
                f"{reader.folder}: {name} belongs to a quantized matrix that {CONFIG_FILE} does not list."
            )


def read_weights(folder: str | Path, shapes: Shapes | None = None) -> Iterator[tuple[str, VQWeight]]:
    """Yield (module, weight) for every quantized matrix, one at a time, after :func:`check`.

    Raises:
        FormatError: the folder fails the check, or a weight cannot be decoded (non-finite books, a bad permutation).
    """
    config = check(folder, shapes=shapes)
    with CheckpointReader(folder, strict=get(config.format).strict) as reader:
        for module, matrix in config.matrices.items():
            tensors = {name: reader.read(f"{module}.{name}") for name in matrix.tensors()}
            where = f"{folder}: {module}"
            weight = matrix.decode(tensors, where)
            weight.validate(where)
            yield module, weight


def verify(folder: str | Path) -> None:
    """Read a folder that Octavo wrote in full and check headers, checksums and contents.

    Raises:
        FormatError: everything that :func:`problems` finds, one per line.
    """
    found = problems(folder)
    if found:
        raise FormatError("\n".join(found))


def problems(folder: str | Path, shapes: Shapes | None = None) -> list[str]:
    """Everything that is wrong with a folder, one sentence each; empty when all is well. Reads every byte.

    A folder that somebody else wrote in their own format needs no manifest.
    """
    root, found = Path(folder), []
    form = None
    try:
        form = format_of(raw_config(root), str(root / CONFIG_FILE))
        for _ in read_weights(root, shapes):
            pass
    except FormatError as error:
        found.append(str(error))
    if form is not None and not form.strict and not (root / manifest.MANIFEST_FILE).is_file():
        return found
    return found + manifest.problems(root)
