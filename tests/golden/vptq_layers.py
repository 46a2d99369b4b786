"""Random layers of the VPTQ checkpoint format, the same numbers on every machine; numpy and torch only.

``make_vptq.py`` decodes them with the published package and records what came out; the tests of our reader make them
again from the same entries. Therefore the numbers are raw output of PCG64, whose stream is fixed, followed by exact
arithmetic: no distribution function, whose algorithm may change between versions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def random_layer(entry: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of one layer as a checkpoint stores them.

    Args:
        entry: ``seed``; ``dtype``, float16 or bfloat16; ``exponent``, the codebooks are within +-2^exponent; ``layer``,
            the layer's entry in ``config_for_layers``.

    Returns:
        Name after the module's path -> tensor: ``indices`` int32 [groups, vector rows, words], ``centroids.weight``
        [groups, centroids * vector length], and where the layer has them ``res_centroids.weight``,
        ``outlier_indices`` int16 [1, vector rows, outliers], ``outlier_centroids.weight``, ``perm`` int16 [in],
        ``weight_scale`` and ``weight_bias`` [in], ``bias`` [out].
    """
    layer, bits = entry["layer"], np.random.PCG64(entry["seed"])
    dtype, unit = DTYPES[entry["dtype"]], 2.0 ** entry["exponent"]
    out, inp, groups, columns = (layer[key] for key in ("out_features", "in_features", "group_num", "group_size"))
    (v0, v), (k0, k), (_, kr) = (layer[key] for key in ("vector_lens", "num_centroids", "num_res_centroids"))

    def integers(size: int, *shape: int) -> np.ndarray:
        """uint64 below ``size``; one in sixteen is the highest, which chance alone would rarely reach."""
        raw = bits.random_raw(shape)
        return np.where(raw >> np.uint64(60) == 0, np.uint64(size - 1), raw % np.uint64(size))

    def floats(scale: float, *shape: int, offset: float = 0.0) -> Tensor:
        """Multiples of 2^-23 in [-1, 1), exact in float32, times a power of two; the cast is the only rounding."""
        raw = (bits.random_raw(shape) >> np.uint64(40)).astype(np.float64) / 2.0**23 - 1.0
        return torch.from_numpy(((raw + offset) * scale).astype(np.float32)).to(dtype)

    rows, index_bits = -(-out // v), k.bit_length() - 1
    elements, total = integers(k, groups, rows, columns), index_bits
    if kr > 0:
        elements |= integers(kr, groups, rows, columns) << np.uint64(index_bits)
        total += kr.bit_length() - 1
    tensors = {"indices": pack(elements, total), "centroids.weight": floats(unit, groups, k * v)}
    if kr > 0:
        tensors["res_centroids.weight"] = floats(unit / 4, groups, kr * v)
    if k0 > 0:
        tensors["outlier_indices"] = _int16(integers(k0, 1, -(-out // v0), layer["outlier_size"]))
        tensors["outlier_centroids.weight"] = floats(unit * 2, 1, k0 * v0)
    if layer["enable_perm"]:
        tensors["perm"] = _int16(np.argsort(bits.random_raw(inp), kind="stable"))
    if layer["enable_norm"]:
        tensors["weight_scale"] = floats(1.0, inp, offset=1.0)
        tensors["weight_bias"] = floats(unit / 8, inp)
    if layer["bias"]:
        tensors["bias"] = floats(unit, out)
    return tensors


def pack(elements: np.ndarray, width: int) -> Tensor:
    """uint64 elements [..., columns] below 2^width -> int32 words [..., ceil(columns * width / 32)].

    Every row is one stream of bits from the lowest bit of its first word on, its last word filled with zeros.
    """
    stream = (elements[..., None] >> np.arange(width, dtype=np.uint64)) & np.uint64(1)
    stream = stream.astype(np.uint8).reshape(*elements.shape[:-1], -1)
    stream = np.pad(stream, [(0, 0)] * (stream.ndim - 1) + [(0, -stream.shape[-1] % 32)])
    return torch.from_numpy(np.packbits(stream, axis=-1, bitorder="little").view("<i4").astype(np.int32))


def unpack(words: Tensor, width: int, columns: int) -> np.ndarray:
    """What ``pack`` packed, uint64 [..., columns]."""
    octets = words.numpy().astype("<i4").view(np.uint8)
    stream = np.unpackbits(octets, axis=-1, bitorder="little", count=columns * width)
    stream = stream.reshape(*words.shape[:-1], columns, width).astype(np.uint64)
    return (stream << np.arange(width, dtype=np.uint64)).sum(axis=-1, dtype=np.uint64)


def _int16(values: np.ndarray) -> Tensor:
    """The bits of uint16."""
    return torch.from_numpy(values.astype(np.uint16).view(np.int16))


def sha256(*tensors: Tensor) -> str:
    """Hash of the tensors' bytes one after the other, little endian and row-major."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def inputs_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hash of a layer's tensors in the order of their names."""
    return sha256(*(tensors[name] for name in sorted(tensors)))
