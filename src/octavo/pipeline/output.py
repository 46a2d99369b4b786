"""From a finished store to a verified checkpoint folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from octavo._core import io
from octavo._core.errors import ResourceError, UsageError
from octavo.formats import native
from octavo.formats.writer import ShardWriter
from octavo.models.adapter import CausalModel
from octavo.pipeline.store import Store
from octavo.weight import Layout


def write_output(
    out: Path,
    model: CausalModel,
    layouts: Mapping[str, Layout],
    store: Store,
    method: str,
    details: Mapping[str, Any],
) -> int:
    """Write the checkpoint inside the work folder, read it back and verify it, then rename it to ``out``.

    An ``out`` that a killed attempt of this very job finished is taken as it is, once it has been verified.

    Returns:
        The size of the weight files in bytes.

    Raises:
        ResourceError: no space; the store is untouched, so ``--resume`` needs only this step again.
        FormatError: what was read back is not what was written.
        UsageError: somebody else made ``out`` in the meantime.
    """
    quantization = native.quantization_config(dict(layouts), method, dict(details))
    if os.path.lexists(out):
        if not native.is_native(out) or native.read_config(out).raw != quantization:
            raise UsageError(f"{out} has come into being meanwhile; move it away and continue with --resume.")
        native.verify(out)
        return _weight_bytes(out)
    partial = store.folder / "output"
    if partial.exists():
        # The rest of a killed attempt.
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        _write(partial, model, store, quantization)
        native.verify(partial)
        os.rename(partial, out)
    except ResourceError:
        shutil.rmtree(partial)
        raise
    io.fsync_dir(out.parent)
    return _weight_bytes(out)


def _write(partial: Path, model: CausalModel, store: Store, quantization: Mapping[str, Any]) -> None:
    for path in model.auxiliary_files():
        with io.disk_errors(partial):
            shutil.copyfile(path, partial / path.name)
        io.fsync_file(partial / path.name)
    writer = ShardWriter(partial)
    for name in model.kept():
        writer.add(model.model_name(name), model.reader.read(name))
    for entry in store.state.blocks:
        for name, tensor in store.get_tensors(entry["object"]).items():
            writer.add(name, tensor)
    writer.finish()
    config = json.loads((model.source.folder / "config.json").read_text("utf-8"))
    # Older versions of transformers wrote the folder that the model came from, which is nobody's business.
    config.pop("_name_or_path", None)
    config["quantization_config"] = quantization
    io.write_json(partial / "config.json", config)
    native.write_manifest(partial)


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
