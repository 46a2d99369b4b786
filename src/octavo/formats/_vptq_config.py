"""``quantization_config`` of VPTQ checkpoints: all its forms to one geometry per matrix, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from octavo._core.errors import FormatError
from octavo.formats._base import Spec
from octavo.formats.head import MODULE_NAME
from octavo.layout import MAX_FEATURES, MAX_VECTOR_LENGTH, Layout
from octavo.math.pack import packed_words

_MAX_CENTROIDS = 1 << 16
#: What a layer's entry must have; the rest has defaults.
_REQUIRED = ("in_features", "out_features", "vector_lens", "num_centroids", "group_num", "group_size")
Entries = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Geometry:
    """How one matrix is stored; sizes of codebooks are 0 where there is none.

    Attributes:
        out, inp: shape of the matrix.
        groups: column groups with a codebook each; group_columns: columns of each, the last one may be padded.
        outliers: leading columns with a codebook of their own.
        norm: scale and offset per ``input`` or ``output`` channel, or None.
        packed: indices are bit streams in 32-bit words; else each has 16 bits.
    """

    out: int
    inp: int
    vector_length: int
    centroids: int
    residual_centroids: int
    groups: int
    group_columns: int
    outliers: int
    outlier_length: int
    outlier_centroids: int
    norm: Literal["input", "output"] | None
    permuted: bool
    bias: bool
    packed: bool = True

    @property
    def stages(self) -> tuple[int, ...]:
        """log2 of the codebook sizes."""
        sizes = (self.centroids, self.residual_centroids)
        return tuple(size.bit_length() - 1 for size in sizes if size)

    def spec(self) -> Spec:
        """Names, shapes and usual dtypes of the stored tensors."""
        v, floats, integers = self.vector_length, torch.float16, torch.int16
        rows = -(-self.out // v)
        last = packed_words(self.group_columns, sum(self.stages)) if self.packed else self.group_columns
        index = (torch.int32 if self.packed else integers, (self.groups, rows, last))
        spec: Spec = {"indices": index, "centroids.weight": (floats, (self.groups, self.centroids * v))}
        if self.residual_centroids:
            spec["res_centroids.weight"] = (floats, (self.groups, self.residual_centroids * v))
            if not self.packed:
                spec["res_indices"] = index
        if self.outliers:
            rows = -(-self.out // self.outlier_length)
            spec["outlier_indices"] = (integers, (1, rows, self.outliers))
            spec["outlier_centroids.weight"] = (floats, (1, self.outlier_centroids * self.outlier_length))
        if self.permuted:
            spec["perm"] = (integers, (self.inp,))
        if self.norm is not None:
            length = self.inp if self.norm == "input" else self.out
            spec["weight_scale"] = spec["weight_bias"] = (floats, (length,))
        if self.bias:
            spec["bias"] = (floats, (self.out,))
        return spec

    def entry(self) -> dict[str, Any]:
        """The entry of ``config_for_layers``; the published package refuses keys beyond these."""
        return {
            "in_features": self.inp,
            "out_features": self.out,
            "vector_lens": [self.outlier_length or -1, self.vector_length],
            "num_centroids": [self.outlier_centroids or -1, self.centroids],
            "num_res_centroids": [-1, self.residual_centroids or -1],
            "group_num": self.groups,
            "group_size": self.group_columns,
            "outlier_size": self.outliers,
            "enable_norm": self.norm is not None,
            "enable_perm": self.permuted,
            "is_indice_packed": True,
            "indices_as_float": False,
            "bias": self.bias,
        }

    @classmethod
    def of_layout(cls, layout: Layout) -> Geometry:
        """The geometry of a layout that the format can hold."""
        o = layout.outliers
        return cls(
            out=layout.shape[0],
            inp=layout.shape[1],
            vector_length=layout.vector_length,
            centroids=1 << layout.stages[0],
            residual_centroids=1 << layout.stages[1] if len(layout.stages) > 1 else 0,
            groups=layout.books,
            group_columns=layout.tile[1] if layout.tile else layout.main_columns,
            outliers=o.columns if o else 0,
            outlier_length=o.vector_length if o else 0,
            outlier_centroids=1 << o.bits if o else 0,
            norm=None if layout.channel_norm == "none" else layout.channel_norm,
            permuted=layout.permuted,
            bias=layout.bias,
        )

    @classmethod
    def of_entry(cls, entry: Mapping[str, Any], where: str) -> Geometry:
        """The geometry that an entry of ``config_for_layers`` describes.

        Raises:
            FormatError: missing or impossible values.
        """
        missing = [key for key in _REQUIRED if key not in entry]
        if missing:
            raise FormatError(f"{where} has no {', '.join(missing)} in its entry. Fetch the model's own config.json.")
        fields = _Fields(entry, where)
        out, inp = fields.whole("out_features", 1, MAX_FEATURES), fields.whole("in_features", 1, MAX_FEATURES)
        groups, columns = fields.whole("group_num", 1, inp), fields.whole("group_size", 1, inp)
        if entry.get("vector_quant_dim", "out") != "out":
            raise FormatError(
                f"{where}: vector_quant_dim is {_short(entry['vector_quant_dim'])}; only 'out' is defined."
            )
        outliers = fields.outliers(fields.whole("outlier_size", 0, inp, default=0))
        if outliers[0] + groups * columns != inp:
            raise FormatError(
                f"{where}: outlier_size {outliers[0]} + group_num {groups} x group_size {columns} wanted in_features "
                f"{inp}."
            )
        return fields.geometry(out, inp, groups, columns, outliers)

    @classmethod
    def of_gptqmodel(cls, raw: Mapping[str, Any], shape: tuple[int, int], where: str) -> Geometry:
        """The geometry that GPTQModel's one setting gives a matrix of ``shape`` (out, in).

        Raises:
            FormatError: impossible values.
        """
        fields, (out, inp) = _Fields(raw, where), shape
        wanted = fields.number("npercent", 0.0) / 100
        enabled = wanted > 0 and fields.pair("vector_lens")[0] > 0 and fields.pair("num_centroids")[0] > 1
        columns, groups = fields.whole("group_size", -1, MAX_FEATURES, -1), fields.whole("group_num", -1, inp, -1)
        outliers = min(math.ceil(wanted * inp), inp) if enabled else 0
        left = inp - outliers
        if columns > 0 and groups > 0:
            raise FormatError(f"{where}: group_size {columns} and group_num {groups} cannot both be set.")
        if groups > 0 and enabled:
            # The remainder of the division into groups goes to the outliers, or else into a last, shorter group.
            outliers += left % groups
            columns = (inp - outliers) // groups
        elif groups > 0:
            columns = -(-left // groups)
        elif columns > 0:
            groups = -(-left // columns)
        else:
            groups, columns = 1, left
        if columns < 1 or outliers >= inp:
            raise FormatError(f"{where}: no column is left for {groups} groups beside {outliers} outliers of {inp}.")
        return fields.geometry(out, inp, groups, columns, fields.outliers(outliers, shortest=1))


@dataclass(frozen=True)
class _Fields:
    """Checked look-ups in an entry."""

    values: Mapping[str, Any]
    where: str

    def whole(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value = self.values.get(key, default)
        if type(value) is not int or not low <= value <= high:
            raise FormatError(f"{self.where}: {key} wanted a whole number {low}..{high}, got {_short(value)}.")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
            raise FormatError(f"{self.where}: {key} wanted a number 0..100, got {_short(value)}.")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if value is None:
            return default
        if type(value) is not bool:
            raise FormatError(f"{self.where}: {key} wanted true or false, got {_short(value)}.")
        return value

    def pair(self, key: str, default: tuple[int, int] | None = None) -> tuple[int, int]:
        value = self.values.get(key, default)
        if not isinstance(value, list | tuple) or len(value) != 2 or not all(type(n) is int for n in value):
            raise FormatError(f"{self.where}: {key} wanted two integers [outliers, main], got {_short(value)}.")
        return value[0], value[1]

    def book(self, key: str, size: int) -> int:
        if not 2 <= size <= _MAX_CENTROIDS or size & (size - 1):
            raise FormatError(f"{self.where}: {key} wanted a power of two, 2..{_MAX_CENTROIDS}, got {size}.")
        return size

    def length(self, size: int) -> int:
        if not 1 <= size <= MAX_VECTOR_LENGTH:
            raise FormatError(f"{self.where}: vector_lens wanted 1..{MAX_VECTOR_LENGTH}, got {size}.")
        return size

    def outliers(self, columns: int, shortest: int = 2) -> tuple[int, int, int]:
        """(columns, vector length, centroids), zeros without; a length below ``shortest`` says that there are none."""
        length, size = self.pair("vector_lens")[0], self.pair("num_centroids")[0]
        if length < shortest or size <= 0:
            if columns:
                raise FormatError(
                    f"{self.where}: {columns} outlier columns have no codebook (vector_lens[0] {length}, "
                    f"num_centroids[0] {size})."
                )
            return 0, 0, 0
        if columns == 0:
            return 0, 0, 0
        return columns, self.length(length), self.book("num_centroids[0]", size)

    def geometry(self, out: int, inp: int, groups: int, columns: int, outliers: tuple[int, int, int]) -> Geometry:
        first, residual = self.pair("num_res_centroids", (-1, -1))
        if first > 0 and outliers[0]:
            raise FormatError(f"{self.where}: num_res_centroids[0] is {first}; outliers have no residual codebook.")
        norm: Literal["input", "output"] = "output" if self.whole("norm_dim", 0, 1, default=0) else "input"
        return Geometry(
            out=out,
            inp=inp,
            vector_length=self.length(self.pair("vector_lens")[1]),
            centroids=self.book("num_centroids[1]", self.pair("num_centroids")[1]),
            residual_centroids=self.book("num_res_centroids[1]", residual) if residual > 0 else 0,
            groups=groups,
            group_columns=columns,
            outliers=outliers[0],
            outlier_length=outliers[1],
            outlier_centroids=outliers[2],
            norm=norm if self.flag("enable_norm", False) else None,
            permuted=self.flag("enable_perm", False),
            bias=self.flag("bias", False),
            packed=self.flag("is_indice_packed", True),
        )


def _short(value: object) -> str:
    """A value of a stranger's file for an error's one line."""
    return repr(value)[:80]


def is_gptqmodel(raw: Mapping[str, Any]) -> bool:
    """Whether a config has one setting for all matrices, as GPTQModel writes it."""
    return "vector_lens" in raw


def entries(raw: Mapping[str, Any], where: str) -> tuple[Entries, Entries]:
    """The entries by module path, and those by the last part of it.

    Raises:
        FormatError: there are none, or things that are no entries.
    """
    if is_gptqmodel(raw):
        return {}, {}
    by_path, by_leaf = (raw.get(key) or {} for key in ("config_for_layers", "shared_layer_config"))
    if not by_path and not by_leaf:
        # As it was before November 2024.
        by_path = {key: value for key, value in raw.items() if isinstance(value, dict) and "vector_lens" in value}
    for name, table in (("config_for_layers", by_path), ("shared_layer_config", by_leaf)):
        if not isinstance(table, dict) or not all(isinstance(entry, dict) for entry in table.values()):
            raise FormatError(f"{where}: {name} wanted an object of objects, got {str(table)[:80]}.")
        for module in table:
            if not MODULE_NAME.fullmatch(module):
                raise FormatError(f"{where}: {module!r} in {name} is no module path.")
    if not by_path and not by_leaf:
        raise FormatError(
            f"{where}: quantization_config says VPTQ, but has no layer in config_for_layers or shared_layer_config and "
            "no vector_lens. Fetch the model's own config.json."
        )
    return by_path, by_leaf
