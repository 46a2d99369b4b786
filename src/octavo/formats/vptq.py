"""The format of VPTQ checkpoints (arXiv 2409.17066; package vptq 0.0.5), and the dialect that GPTQModel writes.

A layer's geometry stands in config.json: by module path in ``config_for_layers``, by the last part of it in
``shared_layer_config``, or, in the earliest checkpoints, by module path in ``quantization_config`` itself. GPTQModel
has one setting for all layers there, from which geometry follows with the model's shapes. Indices are packed per group
of columns and row of vectors; a Layout packs the whole row. All else agrees with a Layout of column vectors, step by
step of decoding, so that every value is the same bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from octavo._core.errors import FormatError, UsageError
from octavo.formats import _vptq_limits as limits
from octavo.formats._base import Format, Quantized, Shapes, Spec, Stored, json_values, registry
from octavo.formats._vptq_config import Geometry, entries, is_gptqmodel
from octavo.formats.head import MODULE_NAME, HeadLayout
from octavo.formats.manifest import octavo_version
from octavo.formats.reader import DTYPES, CheckpointReader
from octavo.layout import Layout, Outliers, SideDtype
from octavo.math.pack import pack, unpack
from octavo.stored import index_dtype_to_int64
from octavo.weight import VQWeight

QUANT_METHOD = "vptq"
_FLOATS: dict[torch.dtype, SideDtype] = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
}
_BOOKS = ("centroids.weight", "res_centroids.weight", "outlier_centroids.weight")
#: All of them hold uint16 numbers.
_BITS_16 = (torch.int16, torch.uint16, torch.float16)
#: The package keeps a permutation beside unpacked indices in int64, GPTQModel has both of these in int32.
_INTEGERS = {"perm": (torch.int16, torch.int32, torch.int64), "outlier_indices": (*_BITS_16, torch.int32)}


@dataclass(frozen=True)
class VPTQMatrix(Stored):
    """A matrix as VPTQ stores it.

    Attributes:
        geometry: its entry in config.json.
        spec: the stored tensors.
    """

    geometry: Geometry
    spec: Spec

    def tensors(self) -> Spec:
        return self.spec

    def check_contents(self, read: Callable[[str], Tensor], where: str) -> None:
        g = self.geometry
        if g.permuted:
            _permutation(read("perm"), where)
        if g.outliers:
            _below(_unsigned(read("outlier_indices")), g.outlier_centroids, f"{where}.outlier_indices")

    def decode(self, tensors: Mapping[str, Tensor], where: str) -> VQWeight:
        g, layout = self.geometry, self.layout
        specs, found = layout.tensors(), {}
        found["indices"] = self._indices(tensors, where)
        books, v = layout.books, g.vector_length
        for stage, name in enumerate(_BOOKS[: len(layout.stages)]):
            found[f"codebook_{stage}"] = tensors[name].view(g.groups, -1, v)[:books]
        if layout.outliers is not None:
            codes = _unsigned(tensors["outlier_indices"]).view(-1, g.outliers)
            _below(codes, g.outlier_centroids, f"{where}.outlier_indices")
            found["outlier_indices"] = pack(codes, layout.outliers.bits)
            found["outlier_codebook"] = tensors["outlier_centroids.weight"].view(-1, g.outlier_length)
        if g.permuted:
            found["permutation"] = _permutation(tensors["perm"], where)
        if g.norm is not None:
            found["channel_scale"], found["channel_offset"] = tensors["weight_scale"], tensors["weight_bias"]
        if g.bias:
            found["bias"] = tensors["bias"]
        # Floats of several dtypes are widened, which is exact.
        return VQWeight(layout, {name: tensor.to(specs[name][0]).contiguous() for name, tensor in found.items()})

    def _indices(self, tensors: Mapping[str, Tensor], where: str) -> Tensor:
        """Words per group and row to words per row."""
        g, layout = self.geometry, self.layout
        stored, columns, width = tensors["indices"], layout.main_columns, layout.code_bits
        groups, rows = stored.shape[:2]
        if not g.packed:
            codes = _unsigned(stored)
            _below(codes, g.centroids, f"{where}.indices")
            if g.residual_centroids:
                residual = _unsigned(tensors["res_indices"])
                _below(residual, g.residual_centroids, f"{where}.res_indices")
                codes = codes | (residual << layout.stages[0])
        elif groups == 1 and columns == g.group_columns:
            return stored[0]
        elif g.group_columns * width % 32 == 0 and columns == groups * g.group_columns:
            return stored.transpose(0, 1).reshape(rows, -1)
        else:
            codes = unpack(stored.reshape(groups * rows, -1), width, g.group_columns).view(groups, rows, -1)
        return pack(codes.transpose(0, 1).reshape(rows, -1)[:, :columns], width)


@registry.register(QUANT_METHOD)
class VPTQFormat(Format):
    """VPTQ checkpoints: all of them are read; what is written stays within what the published package reads."""

    name: ClassVar[str] = QUANT_METHOD
    # The published loader fails without.
    writes_ties: ClassVar[bool] = True

    def check_config(self, raw: Mapping[str, Any], where: str) -> None:
        if raw.get("quant_method") != QUANT_METHOD:
            raise FormatError(f"{where}: quant_method is {raw.get('quant_method')!r}, wanted {QUANT_METHOD!r}.")
        entries(raw, where)

    def describe(
        self, raw: dict[str, Any], where: str, reader: CheckpointReader, shapes: Shapes | None = None
    ) -> Quantized:
        by_path, by_leaf = entries(raw, where)
        modules = [name.removesuffix(".indices") for name in reader.names() if name.endswith(".indices")]
        missing = sorted(set(by_path) - set(modules))
        if missing:
            raise FormatError(
                f"{reader.folder}: {where} lists {missing[0]} as quantized, but no tensor {missing[0]}.indices is there"
                f"{f' (and {len(missing) - 1} more like it)' if len(missing) > 1 else ''}. Fetch the checkpoint again."
            )
        if not modules:
            raise FormatError(f"{reader.folder}: {where} says VPTQ, but no quantized matrix (*.indices) is there.")
        matrices: dict[str, Stored] = {}
        for module in modules:
            if not MODULE_NAME.fullmatch(module):
                raise FormatError(f"{reader.folder}: {module!r}, which has a tensor indices, is no module path.")
            leaf = module.rpartition(".")[2]
            entry = by_path.get(module, by_leaf.get(leaf))
            if is_gptqmodel(raw):
                if shapes is None:
                    raise FormatError(
                        f"{where}: GPTQModel's files do not say the shapes of their matrices; the model's own "
                        "configuration (model_type and the sizes beside quantization_config) is needed."
                    )
                geometry = Geometry.of_gptqmodel(raw, shapes(module), f"{where}: {module}")
            elif entry is None:
                raise FormatError(
                    f"{where} has no entry for {module}, neither by its path in config_for_layers nor as {leaf!r} in "
                    f"shared_layer_config, but {module}.indices is there. Fetch the model's own config.json."
                )
            else:
                geometry = Geometry.of_entry(entry, f"{where}: {module}")
            geometry = replace(geometry, bias=geometry.bias or f"{module}.bias" in reader)
            matrices[module] = _matrix(geometry, module, reader, where)
        written = raw["octavo"] if isinstance(raw.get("octavo"), dict) else {}
        details = written["details"] if isinstance(written.get("details"), dict) else {}
        return Quantized(QUANT_METHOD, matrices, str(written.get("method", "vptq")), details, raw)

    def is_part(self, leaf: str) -> bool:
        return leaf in ("indices", "res_indices", "outlier_indices")

    def quantization_config(
        self,
        layouts: Mapping[str, Layout],
        method: str,
        details: Mapping[str, Any],
        dense: Sequence[str] = (),
        head: HeadLayout | None = None,
    ) -> dict[str, Any]:
        self.require(layouts)
        config = {
            "quant_method": QUANT_METHOD,
            "config_for_layers": {module: Geometry.of_layout(layout).entry() for module, layout in layouts.items()},
            "enable_proxy_error": False,
            # Loaders replace every linear layer that is not named here, and have no entry for these.
            "modules_to_not_convert": list(dense),
            # Nobody else looks at it.
            "octavo": {"octavo_version": octavo_version(), "method": method, "details": dict(details)},
        }
        return json_values(config)

    def encode(self, weight: VQWeight) -> dict[str, Tensor]:
        layout, tensors = weight.layout, weight.tensors
        g = Geometry.of_layout(layout)
        books, width = layout.books, layout.code_bits
        rows = layout.index_shape[0]
        words = tensors["indices"]
        if books > 1 and g.group_columns * width % 32:
            codes = unpack(words, width, layout.main_columns).view(rows, books, -1).transpose(0, 1)
            words = pack(codes.reshape(books * rows, -1), width).view(books, rows, -1)
        else:
            words = words.view(rows, books, -1).transpose(0, 1).contiguous()
        stored = {"indices": words}
        for stage, name in enumerate(_BOOKS[: len(layout.stages)]):
            stored[name] = tensors[f"codebook_{stage}"].reshape(books, -1)
        if layout.outliers is not None:
            codes = unpack(tensors["outlier_indices"], layout.outliers.bits, g.outliers)
            stored["outlier_indices"] = _to_int16(codes).unsqueeze(0)
            stored["outlier_centroids.weight"] = tensors["outlier_codebook"].reshape(1, -1)
        if layout.permuted:
            stored["perm"] = _to_int16(index_dtype_to_int64(tensors["permutation"]))
        stored["weight_scale"], stored["weight_bias"] = tensors["channel_scale"], tensors["channel_offset"]
        if layout.bias:
            stored["bias"] = tensors["bias"]
        return stored

    def bits(self, layout: Layout) -> int:
        # Floats are 16 bits wide in what is written.
        spec = Geometry.of_layout(layout).spec()
        return sum(8 * dtype.itemsize * math.prod(shape) for dtype, shape in spec.values())

    def adapt(self, layout: Layout, dtype: torch.dtype) -> Layout:
        name = _FLOATS[_file_dtype(dtype)]
        if layout.codebook_dtype == "grid" or layout.codebook_rank:
            return layout
        norm = "input" if layout.channel_norm == "none" else layout.channel_norm
        # One codebook for the whole matrix may be said in two ways.
        tile = None if layout.books == 1 else layout.tile
        return replace(layout, codebook_dtype=name, codebook="", side_dtype=name, channel_norm=norm, tile=tile)

    def fit(self, weight: VQWeight, layout: Layout, where: str) -> VQWeight:
        if layout == weight.layout:
            return weight
        free = weight.relaxed()
        tensors, norm = dict(free.tensors), free.layout.channel_norm
        if norm != layout.channel_norm:
            norm = layout.channel_norm
            tensors["channel_scale"] = torch.ones(layout.shape[1], device=weight.device)
            tensors["channel_offset"] = torch.zeros(layout.shape[1], device=weight.device)
        relaxed = VQWeight(replace(free.layout, channel_norm=norm, tile=layout.tile), tensors)
        return relaxed.rounded(layout, where)

    def refusals(self, layout: Layout) -> list[str]:
        return limits.refusals(layout)

    def options(self, options: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        name, changed = _FLOATS[_file_dtype(dtype)], dict(options)
        if changed.get("codebook_dtype") in ("auto", "float16", "bfloat16", "float32"):
            changed["codebook_dtype"] = name
        if "norm" in changed and changed["norm"] is None:
            # Its tensors are stored in any case.
            changed["norm"] = True
        return changed | {"side_dtype": name}

    def model_config(self, config: dict[str, Any]) -> dict[str, Any]:
        text = config["text_config"] if isinstance(config.get("text_config"), dict) else {}
        named = next((part[key] for part in (config, text) for key in ("dtype", "torch_dtype") if part.get(key)), None)
        name = _FLOATS[_file_dtype(getattr(torch, str(named), torch.float32))]
        # The older key is the one that the package's loader knows.
        return {**config, "dtype": name, "torch_dtype": name}


def _file_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a checkpoint for a model of ``dtype``: the kernels know float16 and bfloat16."""
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float16


def _matrix(g: Geometry, module: str, reader: CheckpointReader, where: str) -> VPTQMatrix:
    """Geometry and headers together; names and shapes follow from the one, float dtypes from the others."""
    spec = g.spec()
    for name, (dtype, shape) in spec.items():
        full = f"{module}.{name}"
        found = DTYPES[reader.info(full)[0]] if full in reader else None
        if found is None:
            continue
        integer = not dtype.is_floating_point
        allowed = _INTEGERS.get(name, (dtype,) if g.packed else _BITS_16)
        if found in (allowed if integer else _FLOATS):
            spec[name] = (found, shape)
    books = {spec[name][0] for name in _BOOKS if name in spec}
    sides = {spec[name][0] for name in ("weight_scale", "weight_bias", "bias") if name in spec} or books
    tile = (-(-g.out // g.vector_length) * g.vector_length, g.group_columns)
    try:
        layout = Layout(
            shape=(g.out, g.inp),
            vector_length=g.vector_length,
            stages=g.stages,
            direction="column",
            codebook_dtype=_FLOATS[books.pop()] if len(books) == 1 else "float32",
            side_dtype=_FLOATS[sides.pop()] if len(sides) == 1 else "float32",
            tile=tile if g.groups > 1 else None,
            channel_norm=g.norm or "none",
            permuted=g.permuted,
            outliers=Outliers(g.outliers, g.outlier_length, g.outlier_centroids.bit_length() - 1)
            if g.outliers
            else None,
            bias=g.bias,
        )
    except UsageError as error:
        raise FormatError(f"{where}: {module}: {error}") from error
    return VPTQMatrix(layout, g, spec)


def _unsigned(tensor: Tensor) -> Tensor:
    """uint16 numbers, also as the bits of int16 or float16, or wider ones, as int64."""
    if tensor.dtype == torch.float16:
        tensor = tensor.view(torch.int16)
    return index_dtype_to_int64(tensor)


def _to_int16(numbers: Tensor) -> Tensor:
    """The bits of uint16 as int16."""
    return numbers.to(torch.int32).to(torch.int16)


def _below(codes: Tensor, limit: int, where: str) -> None:
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or high >= limit:
        bad = low if low < 0 else high
        raise FormatError(f"{where} holds {bad}, but its codebook has {limit} centroids. The file is damaged.")


def _permutation(stored: Tensor, where: str) -> Tensor:
    """A permutation as a Layout stores it.

    Raises:
        FormatError: it is none.
    """
    order = index_dtype_to_int64(stored)
    if not torch.equal(order.sort().values, torch.arange(order.numel(), device=order.device)):
        raise FormatError(f"{where}.perm is no permutation of 0..{order.numel() - 1}. The file is damaged.")
    return _to_int16(order) if order.numel() <= 1 << 16 else order.to(torch.int32)
