"""A verified checkpoint folder, or none."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from octavo._core import io
from octavo._core.errors import ResourceError, UsageError
from octavo.formats import native
from octavo.formats.writer import ShardWriter
from octavo.models.source import ModelSource


def write_output(
    out: Path,
    work: Path,
    source: ModelSource,
    tensors: Iterable[tuple[str, Tensor]],
    quantization: Mapping[str, Any],
) -> int:
    """Write a checkpoint inside the folder ``work``, read it back and verify it, then rename it to ``out``.

    An ``out`` with this very ``quantization`` is taken as it is, once it has been verified: a killed attempt of the
    job finished it.

    Args:
        source: where the small files and config.json come from.
        tensors: of the checkpoint, by name, in their order.
        quantization: the ``quantization_config``.

    Returns:
        The size of the weight files in bytes.

    Raises:
        ResourceError: no space; the store is untouched, so ``--resume`` needs only this step again.
        FormatError: what was read back is not what was written.
        UsageError: somebody else made ``out`` in the meantime.
    """
    if os.path.lexists(out):
        if not native.is_native(out) or native.read_config(out).raw != quantization:
            raise UsageError(f"{out} has come into being meanwhile; move it away and continue with --resume.")
        native.verify(out)
        return _weight_bytes(out)
    partial = work / "output"
    if partial.exists():
        # The rest of a killed attempt.
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        _write(partial, source, tensors, quantization)
        native.verify(partial)
        os.rename(partial, out)
    except ResourceError:
        shutil.rmtree(partial)
        raise
    io.fsync_dir(out.parent)
    return _weight_bytes(out)


def _write(
    folder: Path, source: ModelSource, tensors: Iterable[tuple[str, Tensor]], quantization: Mapping[str, Any]
) -> None:
    for path in source.auxiliary_files():
        with io.disk_errors(folder):
            shutil.copyfile(path, folder / path.name)
        io.fsync_file(folder / path.name)
    writer = ShardWriter(folder)
    for name, tensor in tensors:
        writer.add(name, tensor)
    writer.finish()
    config = json.loads((source.folder / "config.json").read_text("utf-8"))
    # Older versions of transformers wrote the folder that the model came from, which is nobody's business.
    config.pop("_name_or_path", None)
    config["quantization_config"] = quantization
    io.write_json(folder / "config.json", config)
    # Last: what it lists is complete.
    native.write_manifest(folder)


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
