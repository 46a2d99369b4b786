"""A second, textbook decoder of VQ matrices: one element at a time, Python integers and float64, no torch.

It is written from the description of the layout alone and shares no code with the package.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

#: name -> (dtype name, shape, little-endian bytes)
Raw = Mapping[str, tuple[str, tuple[int, ...], bytes]]
_NUMPY = {"float16": "<f2", "float32": "<f4", "int8": "<i1", "int16": "<i2", "int32": "<i4", "float64": "<f8"}
_SAFETENSORS = {"I8": "int8", "F32": "float32", "F64": "float64"}


def numbers(dtype: str, shape: tuple[int, ...], data: bytes) -> np.ndarray:
    """Raw bytes as an array of float64 or int64."""
    if dtype == "bfloat16":
        halves = np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16
        return halves.view(np.float32).astype(np.float64).reshape(shape)
    array = np.frombuffer(data, dtype=_NUMPY[dtype]).reshape(shape)
    return array.astype(np.float64 if dtype.startswith("float") else np.int64)


class BitRows:
    """Rows of a packed tensor of unsigned integers: one long little-endian number per row."""

    def __init__(self, shape: tuple[int, ...], data: bytes) -> None:
        width = shape[1] * 4
        self._rows = [data[r * width : (r + 1) * width] for r in range(shape[0])]

    def get(self, row: int, column: int, bits: int) -> int:
        start = column * bits
        touched = self._rows[row][start // 8 : (start + bits + 7) // 8]
        return (int.from_bytes(touched, "little") >> start % 8) & ((1 << bits) - 1)


@cache
def universal(name: str) -> list[np.ndarray]:
    """Centroids [k, v] of every stage of a universal codebook, from the file that the package ships."""
    spec = find_spec("octavo")
    assert spec is not None
    assert spec.origin is not None
    data = (Path(spec.origin).parent / "codebooks" / f"{name}.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    value = {}
    for key, entry in json.loads(data[8:start]).items():
        if key != "__metadata__":
            first, last = (start + offset for offset in entry["data_offsets"])
            value[key] = numbers(_SAFETENSORS[entry["dtype"]], tuple(entry["shape"]), data[first:last])
    return [value[f"table{stage}"] * scale for stage, scale in enumerate(value["scales"])]


def hadamard(block: int) -> np.ndarray:
    """The orthonormal Hadamard matrix: entry (i, j) is negative where i & j has an odd number of ones."""
    rows = [[(-1) ** (i & j).bit_count() for j in range(block)] for i in range(block)]
    return np.array(rows) / block**0.5


def turned(rows: np.ndarray, block: int, signs: BitRows) -> np.ndarray:
    """Every row y of a matrix as diag(s) H y, for a block-diagonal H and signs s that are minus where bits are set."""
    channels = rows.shape[1]
    dense = np.kron(np.eye(channels // block), hadamard(block))
    minus = [signs.get(0, channel, 1) for channel in range(channels)]
    return rows @ dense.T * (1 - 2 * np.array(minus))


def decode(layout: Mapping[str, Any], raw: Raw) -> np.ndarray:
    """The dense matrix [out_features, in_features] in float64.

    Args:
        layout: the JSON form of a layout; absent keys have their default.
        raw: every stored tensor.
    """
    out, inp = layout["shape"]
    v, stages = layout["vector_length"], layout["stages"]
    by_column = layout.get("direction", "column") == "column"
    signs, tile = layout.get("sign_bits", False), layout.get("tile")
    block, outliers = layout.get("block_scale") or {}, layout.get("outliers") or {}
    kind, rank = layout.get("codebook_dtype", "float16"), layout.get("codebook_rank", 0)
    leading = outliers.get("columns", 0)
    width = sum(stages) + (v if signs else 0)
    value = {name: numbers(*entry) for name, entry in raw.items() if entry[0] != "int32"}
    stream = {
        name: BitRows(entry[1], entry[2]) for name, entry in raw.items() if entry[0] == "int32" and len(entry[1]) == 2
    }

    def centroid(stage: int, book: int, index: int, inside: int) -> float:
        if kind == "grid":
            return index
        if kind == "universal":
            return universal(layout["codebook"])[stage][index, inside]
        if rank:
            coefficients, basis = value["codebook_coefficient_0"][book], value["codebook_basis_0"]
            return sum(coefficients[r] * basis[r, index, inside] for r in range(rank))
        if kind == "int4":
            # One stream of 4-bit numbers over all books, centroids and elements; 8 stands for zero.
            place = (book * (1 << stages[stage]) + index) * v + inside
            number = stream[f"codebook_{stage}"].get(0, place, 4) - 8
        else:
            number = value[f"codebook_{stage}"][book, index, inside]
        return number * value[f"codebook_scale_{stage}"][book] if kind in ("int8", "int4") else number

    def block_scale(row: int, number: int) -> float:
        if not block.get("log2_bits", 0):
            return value["block_scale"][row, number]
        code = stream["block_scale_code"].get(number, row, block["log2_bits"])
        return 2.0 ** (value["block_scale_low"][number] + value["block_scale_step"][number] * code)

    def main_element(row: int, column: int) -> float:
        place = (row // v, column) if by_column else (row, column // v)
        inside = row % v if by_column else column % v
        code = stream["indices"].get(*place, width)
        book = 0
        if tile:
            across = -(-(inp - leading) // tile[1])
            book = (row // tile[0]) * across + column // tile[1]
        total = 0.0
        for stage, bits in enumerate(stages):
            index = code & ((1 << bits) - 1)
            code >>= bits
            total += centroid(stage, book, index, inside)
        if signs and code >> inside & 1:
            total = -total
        if block:
            number = column // block["columns"]
            zero_bits = block.get("zero_bits", 0)
            if zero_bits:
                total -= stream["block_zero"].get(row, number, zero_bits)
            total *= block_scale(row, number)
        return total

    def outlier_element(row: int, column: int) -> float:
        length = outliers["vector_length"]
        index = stream["outlier_indices"].get(row // length, column, outliers["bits"])
        return value["outlier_codebook"][index, row % length]

    order = list(range(inp))
    if layout.get("permuted", False):
        dtype, _, data = raw["permutation"]
        order = list(struct.unpack(f"<{inp}{'H' if dtype == 'int16' else 'i'}", data))
    norm = layout.get("channel_norm", "none")
    dense = np.zeros((out, inp))
    for row in range(out):
        for place in range(inp):
            element = outlier_element(row, place) if place < leading else main_element(row, place - leading)
            column = order[place]
            if norm != "none":
                channel = column if norm == "input" else row
                element = element * value["channel_scale"][channel] + value["channel_offset"][channel]
            dense[row, column] = element
    transform = layout.get("transform") or {}
    if transform.get("input", 0):
        dense = turned(dense, transform["input"], stream["input_signs"])
    if transform.get("output", 0):
        dense = turned(dense.T, transform["output"], stream["output_signs"]).T
    return dense
