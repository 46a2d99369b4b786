"""What the published package (vptq 0.0.5.post1) can read: a writer of its format stays within."""

from __future__ import annotations

from collections.abc import Sequence

from octavo.layout import Layout

#: Widths that its CUDA kernels are compiled for.
MAIN_BITS = (4, 8, 10, 12, 13, 14, 15, 16)
RESIDUAL_BITS = (*range(2, 13), 15, 16)
VECTOR_LENGTHS = (2, 4, 6, 8, 10, 12, 16)
OUTLIER_LENGTH = 4
MIN_INPUTS = 257
MAX_INPUTS = 1 << 16
#: Below, the package's own unpacking of a row of indices takes the padding for indices.
_MIN_ROW_BITS = 17


def nearest(value: int, allowed: Sequence[int]) -> str:
    """The next allowed values below and above, in words."""
    below, above = [a for a in allowed if a < value], [a for a in allowed if a > value]
    return " or ".join(map(str, below[-1:] + above[:1]))


def refusals(layout: Layout) -> list[str]:
    """Why the package could not read a layout, one sentence each; empty if it can."""
    kind = _kind(layout)
    return [kind] if kind else _widths(layout) + _columns(layout)


def _kind(layout: Layout) -> str:
    """What VPTQ does not have at all."""
    if layout.codebook_dtype == "grid":
        return "uniform grids have no codebook; VPTQ stores column vectors of one (--method vptq)"
    if layout.direction != "column":
        return "VPTQ stores vectors of outputs, not of inputs (--method vptq)"
    extras = {
        "universal codebooks": layout.codebook,
        "transforms": layout.transform,
        "signs apart": layout.sign_bits,
        "block scales": layout.block_scale is not None,
        "low-rank codebooks": layout.codebook_rank,
        "more than two codebook stages": len(layout.stages) > 2,
        "codebooks per rows": layout.books_shape[0] > 1,
    }
    if found := [name for name, there in extras.items() if there]:
        return f"VPTQ has no {' and no '.join(found)}"
    if layout.channel_norm != "input":
        return "its kernels want a norm of the input channels: leave the option norm out, or set norm=true"
    if layout.codebook_dtype not in ("float16", "bfloat16") or layout.side_dtype != layout.codebook_dtype:
        return (
            f"codebooks in {layout.codebook_dtype} and scales in {layout.side_dtype}: its kernels want both in the "
            "model's own float16 or bfloat16; leave codebook_dtype and --side-dtype out"
        )
    return ""


def _widths(layout: Layout) -> list[str]:
    found, v = [], layout.vector_length
    if v not in VECTOR_LENGTHS:
        found.append(
            f"vectors of {v}: its CUDA kernels know {_listed(VECTOR_LENGTHS)}; nearest {nearest(v, VECTOR_LENGTHS)}"
        )
    main, *rest = layout.stages
    if main not in MAIN_BITS:
        sizes = [1 << bits for bits in MAIN_BITS]
        found.append(
            f"{1 << main} centroids: its CUDA kernels know {_listed(sizes)}; nearest {nearest(1 << main, sizes)}"
        )
    for residual in rest:
        if residual not in RESIDUAL_BITS:
            sizes = [1 << bits for bits in RESIDUAL_BITS]
            found.append(
                f"{1 << residual} residual centroids: its CUDA kernels know {_listed(sizes)}; nearest "
                f"{nearest(1 << residual, sizes)}"
            )
        if residual > main:
            found.append(
                f"{1 << residual} residual centroids beside {1 << main}: it masks residual indices with the width of "
                "the main ones; swap the two, or make them equal"
            )
        if layout.books > 1 and residual != main:
            found.append(
                f"{layout.books} groups with {1 << main} + {1 << residual} centroids: its CUDA kernels step through "
                f"both codebooks alike; make them equal (residual_centroids={1 << main}), or take groups=1"
            )
    return found


def _columns(layout: Layout) -> list[str]:
    found = []
    inputs, columns = layout.shape[1], layout.main_columns
    if not MIN_INPUTS <= inputs <= MAX_INPUTS:
        found.append(f"{inputs} inputs: its kernels know {MIN_INPUTS}..{MAX_INPUTS}; leave the layer out with --skip")
    group = layout.tile[1] if layout.tile else columns
    if columns % group:
        fits = [n for n in range(1, layout.books + 8) if columns % n == 0]
        found.append(
            f"{columns} columns in groups of {group}: all groups must be equal; nearest groups="
            f"{nearest(layout.books, fits)}"
        )
    if group * layout.code_bits < _MIN_ROW_BITS:
        found.append(
            f"groups of {group} columns of {layout.code_bits} bits: it misreads rows below {_MIN_ROW_BITS} bits"
        )
    if layout.outliers is not None:
        length = layout.outliers.vector_length
        if length != OUTLIER_LENGTH:
            found.append(f"outlier vectors of {length}: its kernel knows {OUTLIER_LENGTH} (outlier_vector_length=4)")
        elif layout.vector_length % length:
            fits = [v for v in VECTOR_LENGTHS if v % length == 0]
            found.append(
                f"outlier vectors of {length} beside vectors of {layout.vector_length}: the one must divide the other; "
                f"nearest {nearest(layout.vector_length, fits)}"
            )
    return found


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))
