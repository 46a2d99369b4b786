"""A quantized folder in another format: the same matrices, read and written one by one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo import formats
from octavo._core import io
from octavo._core.errors import FormatError, UsageError
from octavo.formats import CheckpointReader, Format, Quantized, manifest
from octavo.models import quantized, skeleton
from octavo.models.source import ModelSource, resolve
from octavo.pipeline.output import Contents, check_folders, write_output
from octavo.weight import VQWeight


@dataclass(frozen=True)
class ConvertReport:
    """The outcome of :func:`convert`.

    Attributes:
        format_before, format: names of the formats.
        matrices: how many there are; rounded: how many of them have other values than before, because the format
            stores their numbers in another dtype.
        rounding: root mean square of the change of their weights, relative to the weights; 0 where nothing changed.
        bits_before, bits_per_weight: all stored bits of the matrices over their weights.
        file_bytes: size of the weight files.
    """

    source: str
    output: str
    format_before: str
    format: str
    matrices: int
    rounded: int
    rounding: float
    bits_before: float
    bits_per_weight: float
    file_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


def convert(folder: str | Path, out: str | Path, to: str = "vptq", *, trust_remote_code: bool = False) -> ConvertReport:
    """Write the quantized model of ``folder`` to the new folder ``out`` in the format ``to``.

    Indices never change. Where the format wants another dtype for codebooks and scales than the folder has, they are
    rounded to it, and the report says by how much the weights change.

    Raises:
        UsageError: no such format, nothing quantized in the folder, ``out`` is there already or has no folder to be in,
            or matrices that the format cannot hold, with the reasons and the nearest settings.
        FormatError: a damaged folder.
        ResourceError: no space.
    """
    folder, out, form = Path(folder).expanduser(), Path(out), formats.get(to)
    check_folders(folder, out, "a conversion")
    if os.path.lexists(out):
        raise UsageError(f"{out} is there already; choose a new folder.")
    if not out.parent.is_dir():
        raise UsageError(f"the folder {out.parent} for the output does not exist; create it first.")
    source = resolve(folder, trust_remote_code=trust_remote_code)
    try:
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise UsageError(f"cannot write to {out.parent}: {reason}. Choose an output elsewhere.") from error
    try:
        with io.disk_errors(work):
            return rewrite(source, out, work, form)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def rewrite(source: ModelSource, out: Path, work: Path, form: Format) -> ConvertReport:
    """:func:`convert` of an open folder, with what is unfinished in the folder ``work``."""
    folder, trust = source.folder, source.trust_remote_code
    before = quantized.check(folder, trust_remote_code=trust)
    # The new manifest would vouch for bytes that the old one does not know.
    if (folder / formats.MANIFEST_FILE).is_file() and (found := manifest.problems(folder)):
        raise FormatError("\n".join(found))
    model = skeleton.build(source)
    ties, linear = skeleton.ties(model), skeleton.linear_layers(model)
    tied = {*ties, *ties.values()}
    held = [before.head.module] if before.head else []
    if not form.holds_embeddings and (
        ends := held or [name for name in before.layouts if name not in linear or f"{name}.weight" in tied]
    ):
        raise UsageError(
            f"format {form.name} has no place for a quantized embedding or tied head ({', '.join(ends)}); quantize "
            "without --head-bits."
        )
    converter = _Converter(source, before, form, ties)
    dense = [name for name in linear if name not in (*before.layouts, *held)]
    contents = Contents(form, converter.layouts, before.method, before.details, dense, ties, before.head)
    try:
        # Before anything is written.
        contents.quantization_config()
    except UsageError as error:
        advice = f"`octavo quantize --format {form.name}` chooses layouts that it can hold."
        raise UsageError(f"{error}\n{advice}") from error
    taken = before.tensors().keys() - before.head_tensors()
    with CheckpointReader(folder) as reader:
        kept = {name: reader.bytes(name) for name in reader.names() if name not in taken}
    needed = sum(kept.values()) + contents.twin_bytes(kept)
    needed += sum(-(-form.bits(layout) // 8) for layout in converter.layouts.values())
    io.require_space(out.parent, needed, f"the {form.name} checkpoint")
    file_bytes = write_output(out, work, source, converter.tensors(), contents)
    return ConvertReport(
        source=source.name,
        output=str(out),
        format_before=before.format,
        format=form.name,
        matrices=len(before.matrices),
        rounded=converter.rounded,
        rounding=(converter.changed / converter.total) ** 0.5 if converter.total else 0.0,
        bits_before=before.bits_per_weight,
        bits_per_weight=formats.check(out).bits_per_weight,
        file_bytes=file_bytes,
    )


@dataclass
class _Converter:
    """Reads a folder matrix by matrix, in the layouts of another format."""

    source: ModelSource
    before: Quantized
    form: Format
    ties: Mapping[str, str]
    rounded: int = 0
    changed: float = 0.0
    total: float = 0.0
    layouts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        dtype = self.source.dtype
        self.layouts = {module: self.form.adapt(layout, dtype) for module, layout in self.before.layouts.items()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Everything that the new folder holds, matrices by the names of their layouts."""
        folder, taken = self.source.folder, self.before.tensors().keys() - self.before.head_tensors()
        with CheckpointReader(folder) as reader:
            for name in reader.names():
                # What another format had to store twice is stored once again.
                twice = not self.form.writes_ties and self.ties.get(name, "") in reader
                if name not in taken and not twice:
                    yield name, reader.read(name)
        shapes = quantized.shapes(folder, trust_remote_code=self.source.trust_remote_code)
        for module, weight in formats.read_weights(folder, shapes):
            fitted = self.form.fit(weight, self.layouts[module], module)
            if weight.layout != fitted.layout:
                self._compare(weight, fitted)
            for name, tensor in fitted.tensors.items():
                yield f"{module}.{name}", tensor

    def _compare(self, old: VQWeight, new: VQWeight) -> None:
        before, after = old.dequantize(), new.dequantize()
        same_bias = old.bias is None or new.bias is None or torch.equal(old.bias.float(), new.bias.float())
        self.rounded += not (same_bias and torch.equal(before, after))
        self.changed += float((before - after).double().square().sum())
        self.total += float(before.double().square().sum())
