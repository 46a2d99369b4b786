"""A second decoder of layers in the VPTQ checkpoint format: one element at a time, numpy and Python integers, no torch.

It is written from the description of the format alone and shares no code with the package's reader.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from oracle.decode import BitRows, Raw, numbers

_INTEGERS = {"int16": "<u2", "uint16": "<u2", "float16": "<u2", "int32": "<i4", "int64": "<i8"}


def rounded(value: Any, dtype: str) -> np.ndarray:
    """float64 numbers rounded to the nearest of a dtype, ties to even, as float64 again."""
    value = np.asarray(value, dtype=np.float64)
    if dtype == "bfloat16":
        bits = value.astype(np.float32).view(np.uint32).astype(np.uint64)
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16
        return bits.astype(np.uint32).view(np.float32).astype(np.float64)
    return value.astype({"float16": np.float16, "float32": np.float32}[dtype]).astype(np.float64)


def decode(layer: Mapping[str, Any], raw: Raw, dtype: str) -> np.ndarray:
    """The matrix [out_features, in_features] of one layer as float64, every step rounded to ``dtype``.

    The exact sum or product of two numbers of at most 24 bits, first rounded to float64 (and then to float32), rounds
    to a dtype of float32 or less as it does at once.

    Args:
        layer: an entry of ``config_for_layers``, with every key of it; ``norm_dim`` may be absent.
        raw: the tensors of the layer by their names in the file.
    """
    out, inp, outliers, columns = (layer[key] for key in ("out_features", "in_features", "outlier_size", "group_size"))
    (v0, v), (_, kr) = layer["vector_lens"], layer["num_res_centroids"]
    width, residual_width = layer["num_centroids"][1].bit_length() - 1, kr.bit_length() - 1 if kr > 0 else 0

    def floats(name: str) -> np.ndarray:
        return rounded(numbers(*raw[name]), dtype)

    def integers(name: str) -> np.ndarray:
        kind, shape, data = raw[name]
        return np.frombuffer(data, _INTEGERS[kind]).astype(np.int64).reshape(shape)

    book = floats("centroids.weight").reshape(layer["group_num"], -1, v)
    residual_book = floats("res_centroids.weight").reshape(layer["group_num"], -1, v) if kr > 0 else None
    if layer["is_indice_packed"]:
        _, (groups, rows, words), data = raw["indices"]
        stream = BitRows((groups * rows, words), data)
    else:
        main = integers("indices")
        residual = integers("res_indices") if kr > 0 else main

    def element(group: int, row: int, column: int) -> tuple[int, int]:
        if not layer["is_indice_packed"]:
            return int(main[group, row, column]), int(residual[group, row, column])
        bits = stream.get(group * rows + row, column, width + residual_width)
        return bits & ((1 << width) - 1), bits >> width

    dense = np.zeros((out, inp))
    for column in range(outliers, inp):
        group, place = divmod(column - outliers, columns)
        for row in range(-(-out // v)):
            first, second = element(group, row, place)
            vector = book[group, first]
            if residual_book is not None:
                vector = rounded(vector + residual_book[group, second], dtype)
            dense[row * v : (row + 1) * v, column] = vector[: out - row * v]
    if outliers:
        codes, book = integers("outlier_indices")[0], floats("outlier_centroids.weight").reshape(-1, v0)
        for row in range(out):
            dense[row, :outliers] = book[codes[row // v0], row % v0]
    if layer["enable_perm"]:
        stored, dense = dense, np.zeros((out, inp))
        dense[:, integers("perm")] = stored
    if layer["enable_norm"]:
        shape = (out, 1) if layer.get("norm_dim", 0) else (1, inp)
        dense = rounded(dense * floats("weight_scale").reshape(shape), dtype)
        dense = rounded(dense + floats("weight_bias").reshape(shape), dtype)
    return dense
