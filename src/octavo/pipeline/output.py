"""A verified checkpoint folder, or none."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from octavo import formats
from octavo._core import io
from octavo._core.errors import ResourceError, UsageError
from octavo.formats import Format, HeadLayout, ShardWriter
from octavo.layout import Layout
from octavo.models.source import ModelSource
from octavo.weight import VQWeight


@dataclass(frozen=True)
class Contents:
    """What a checkpoint to be written says about itself.

    Attributes:
        form: its format.
        layouts: of the quantized matrices, by module.
        method, details: for the record.
        dense: linear layers of the model that are not quantized.
        ties: tensors that may be left out -> those that they are tied to.
        head: the output head, if it is no single matrix.
    """

    form: Format
    layouts: Mapping[str, Layout]
    method: str
    details: Mapping[str, Any] = field(default_factory=dict)
    dense: Sequence[str] = ()
    ties: Mapping[str, str] = field(default_factory=dict)
    head: HeadLayout | None = None

    def quantization_config(self) -> dict[str, Any]:
        """As it will stand in config.json.

        Raises:
            UsageError: layouts that the format cannot hold, or details that are not JSON.
        """
        return self.form.quantization_config(self.layouts, self.method, self.details, self.dense, self.head)

    def encoded(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Tensors with the names of layouts to those of the format; what belongs to no quantized matrix passes."""
        pending: dict[str, dict[str, Tensor]] = {}
        ties = self.ties if self.form.writes_ties else {}
        held: dict[str, Tensor] = {}
        written: set[str] = set()
        for name, tensor in tensors:
            module, _, leaf = name.rpartition(".")
            layout = self.layouts.get(module)
            if name in ties:
                # Written with its partner, whose values count; a checkpoint may store this one alone.
                held[name] = tensor
                continue
            if layout is None:
                written.add(name)
                for same in (name, *self._twins(name)):
                    yield same, tensor
                continue
            parts = pending.setdefault(module, {})
            parts[leaf] = tensor
            if len(parts) == len(layout.tensors()):
                for key, value in self.form.encode(VQWeight(layout, pending.pop(module))).items():
                    yield f"{module}.{key}", value
        for partner in dict.fromkeys(ties[name] for name in held if ties[name] not in written):
            twins = self._twins(partner)
            tensor = next(held[twin] for twin in twins if twin in held)
            for name in (partner, *twins):
                yield name, tensor

    def _twins(self, partner: str) -> list[str]:
        return [name for name, other in self.ties.items() if other == partner and self.form.writes_ties]

    def twin_bytes(self, kept: Mapping[str, int]) -> int:
        """What storing tied tensors as well adds to the kept tensors, given as name -> bytes."""
        partners = {partner for partner in self.ties.values() if self.form.writes_ties}
        added = 0
        for partner in partners:
            names = (partner, *self._twins(partner))
            size = next((kept[name] for name in names if name in kept), 0)
            added += sum(size for name in names if name not in kept)
        return added


def check_folders(folder: Path, out: Path, what: str) -> None:
    """Refuse a ``folder`` without a quantized model and an ``out`` inside of it; ``what`` names the job.

    Raises:
        UsageError: no folder, nothing quantized in it, or an output inside of it.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder; {what} wants one that `octavo quantize` wrote, or one of VPTQ's.")
    if not formats.is_quantized(folder):
        raise UsageError(f"{folder} holds no quantized model that Octavo reads; {what} wants one.")
    if folder.resolve() in out.resolve().parents:
        raise UsageError(f"{out} lies inside of {folder}; choose an output elsewhere.")


def write_output(
    out: Path, work: Path, source: ModelSource, tensors: Iterable[tuple[str, Tensor]], contents: Contents
) -> int:
    """Write a checkpoint inside the folder ``work``, read it back and verify it, then rename it to ``out``.

    An ``out`` with this very ``quantization_config`` is taken as it is, once it has been verified: a killed attempt of
    the job finished it.

    Args:
        source: where the small files and config.json come from.
        tensors: of the checkpoint, those of quantized matrices by the names of their layouts.

    Returns:
        The size of the weight files in bytes.

    Raises:
        ResourceError: no space; the store is untouched, so ``--resume`` needs only this step again.
        FormatError: what was read back is not what was written.
        UsageError: somebody else made ``out`` in the meantime, or the format cannot hold the matrices.
    """
    quantization = contents.quantization_config()
    if os.path.lexists(out):
        if not formats.is_quantized(out) or formats.raw_config(out) != quantization:
            raise UsageError(f"{out} has come into being meanwhile; move it away and continue with --resume.")
        formats.verify(out)
        return weight_bytes(out)
    partial = work / "output"
    if partial.exists():
        # The rest of a killed attempt.
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        with io.disk_errors(work):
            _write(partial, source, contents.encoded(tensors), contents.form, quantization)
            formats.verify(partial)
            os.rename(partial, out)
    except ResourceError:
        shutil.rmtree(partial)
        raise
    io.fsync_dir(out.parent)
    return weight_bytes(out)


def _write(
    folder: Path,
    source: ModelSource,
    tensors: Iterable[tuple[str, Tensor]],
    form: Format,
    quantization: Mapping[str, Any],
) -> None:
    for path in source.auxiliary_files():
        with io.disk_errors(folder):
            shutil.copyfile(path, folder / path.name)
        io.fsync_file(folder / path.name)
    writer = ShardWriter(folder)
    for name, tensor in tensors:
        writer.add(name, tensor)
    writer.finish()
    config = json.loads((source.folder / formats.CONFIG_FILE).read_text("utf-8"))
    # Older versions of transformers wrote the folder that the model came from, which is nobody's business.
    config.pop("_name_or_path", None)
    if isinstance(config.get("text_config"), dict):
        config["text_config"].pop("quantization_config", None)
    config = {**form.model_config(config), "quantization_config": quantization}
    io.write_json(folder / formats.CONFIG_FILE, config)
    # Last: what it lists is complete.
    formats.write_manifest(folder)


def weight_bytes(folder: Path) -> int:
    """Size of the weight files of a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
