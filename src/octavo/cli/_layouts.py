"""Layouts in words, and the table of matrix groups that ``plan`` and ``inspect`` share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from octavo.cli._output import size

if TYPE_CHECKING:
    from octavo.layout import Layout

COLUMNS = ("matrices", "count", "shape", "index bits", "true bits", "bytes", "layout")


def in_words(layout: Layout) -> str:
    """One line that says everything a layout says."""
    if layout.codebook_dtype == "grid":
        parts = [f"uniform grid of {1 << layout.stages[0]} levels"]
    else:
        unit = "outputs" if layout.direction == "column" else "inputs"
        books = " + ".join(str(1 << bits) for bits in layout.stages)
        kind: str = layout.codebook or layout.codebook_dtype
        if layout.codebook_rank:
            kind = f"rank {layout.codebook_rank} with {kind} coefficients and {layout.side_dtype} basis"
        parts = [f"vectors of {layout.vector_length} {unit}, {books} centroids ({kind})"]
        if layout.tile is not None:
            rows, columns = layout.books_shape
            parts.append(f"{rows * columns} codebooks, one per {layout.tile[0]} x {layout.tile[1]} tile")
    if layout.sign_bits:
        parts.append("signs apart")
    if layout.block_scale is not None:
        block = layout.block_scale
        scale = f"{block.log2_bits}-bit log2 scale" if block.log2_bits else "scale"
        zero = f" and {block.zero_bits}-bit zero" if block.zero_bits else ""
        parts.append(f"{scale}{zero} per {block.columns} columns")
    if layout.outliers is not None:
        o = layout.outliers
        parts.append(f"{o.columns} outlier columns (vectors of {o.vector_length}, {1 << o.bits} centroids)")
    if layout.channel_norm != "none":
        parts.append(f"{layout.channel_norm} channels normalised")
    if layout.permuted:
        parts.append("columns permuted")
    if layout.transform is not None:
        sides = (("inputs", layout.transform.input), ("outputs", layout.transform.output))
        parts.append("Hadamard of " + " and ".join(f"{side} in blocks of {n}" for side, n in sides if n))
    if layout.bias:
        parts.append("bias")
    return ", ".join(parts)


def groups(layouts: Mapping[str, Layout], sizes: Mapping[str, int] | None = None) -> list[dict[str, Any]]:
    """Modules that differ in numbers alone (the block, the expert) and have the same layout, in order of appearance.

    ``sizes`` are the stored bits of the modules where a file's format stores them otherwise than the layout says.
    """
    table: dict[tuple[str, Layout], list[str]] = {}
    for module, layout in layouts.items():
        table.setdefault((re.sub(r"\.\d+(?=\.|$)", ".*", module), layout), []).append(module)
    return [
        {
            "matrices": pattern,
            "count": len(modules),
            "shape": list(layout.shape),
            "nominal_bits": layout.nominal_bits,
            "bits_per_weight": _bits(modules[0], layout, sizes) / layout.weights,
            "bytes": -(-_bits(modules[0], layout, sizes) // 8) * len(modules),
            "layout": in_words(layout),
        }
        for (pattern, layout), modules in table.items()
    ]


def _bits(module: str, layout: Layout, sizes: Mapping[str, int] | None) -> int:
    return layout.bits() if sizes is None else sizes[module]


def rows(layouts: Mapping[str, Layout], sizes: Mapping[str, int] | None = None) -> list[list[str]]:
    """:func:`groups` as cells under :data:`COLUMNS`."""
    return [
        [
            group["matrices"],
            str(group["count"]),
            "x".join(map(str, group["shape"])),
            f"{group['nominal_bits']:.3f}",
            f"{group['bits_per_weight']:.3f}",
            size(group["bytes"]),
            group["layout"],
        ]
        for group in groups(layouts, sizes)
    ]


def totals(layouts: Mapping[str, Layout], sizes: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Index bits and true bits per weight, weights and bytes of all matrices together; ``sizes`` as for groups."""
    weights = sum(layout.weights for layout in layouts.values())
    nominal = sum(layout.nominal_bits * layout.weights for layout in layouts.values())
    each = [_bits(module, layout, sizes) for module, layout in layouts.items()]
    bits = sum(each)
    return {
        "matrices": len(layouts),
        "weights": weights,
        "nominal_bits": nominal / weights if weights else None,
        "bits_per_weight": bits / weights if weights else None,
        "bytes": sum(-(-bits // 8) for bits in each),
    }


def options_in_words(values: Mapping[str, Any]) -> str:
    """Options that are set, ``key=value``, comma-separated."""
    return ", ".join(f"{key}={value}" for key, value in values.items() if value is not None)
