"""The dimension study as a picture; matplotlib (extra ``report``) is imported when one is drawn."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any


def dimension(document: Mapping[str, Any]) -> bytes:
    """SVG with three panels: gaps to the rate-distortion limit against d, and KL divergence against true bits.

    Drawn from the study's document alone; the same document gives the same bytes.

    Raises:
        ImportError: matplotlib is missing.
    """
    import matplotlib
    from matplotlib.figure import Figure

    # Text stays text; ids and metadata do not depend on time or chance.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "octavo"}):
        figure = Figure(figsize=(13, 4.2), layout="constrained")
        first, second, third = figure.subplots(1, 3)
        rows = document["rows"]
        _gaps(first, rows["gaussian"], {"gap_db": "-"}, "Gaussian vectors\nk-means")
        title = "Matrices\nsolid: k-means without its codebook, dashed: true bits"
        _gaps(second, rows["layers"], {"plain_gap_db": "-", "equal_gap_db": "--"}, title)
        _divergence(third, rows["model"])
        data = io.BytesIO()
        figure.savefig(data, format="svg", metadata={"Date": None})
    return data.getvalue()


def _gaps(axes: Any, rows: Sequence[Mapping[str, Any]], styles: Mapping[str, str], title: str) -> None:
    """A line per rate and key: the gap in dB over the dimension."""
    dimensions = sorted({row["dimension"] for row in rows})
    if dimensions:
        axes.set_xscale("log", base=2)
        axes.set_xticks(dimensions, [str(d) for d in dimensions])
        axes.minorticks_off()
    for color, rate in enumerate(sorted({row["bits"] for row in rows})):
        for key, style in styles.items():
            points = [(r["dimension"], r[key]) for r in rows if r["bits"] == rate and r[key] is not None]
            label = f"{rate:g} bits" if key == next(iter(styles)) else None
            axes.plot(
                [d for d, _ in points], [gap for _, gap in points], style, marker="o", color=f"C{color}", label=label
            )
    axes.set(title=title, xlabel="dimension d", ylabel="gap to the rate-distortion limit [dB]")
    _finish(axes, any(row[key] is not None for row in rows for key in styles))


def _divergence(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """A line per dimension: KL over true bits, with its standard error."""
    measured = sorted((row for row in rows if (row["kl"] or 0) > 0), key=lambda row: row["bits_per_weight"])
    for color, d in enumerate(sorted({row["dimension"] for row in measured})):
        own = [row for row in measured if row["dimension"] == d]
        x, y, errors = ([row[key] or 0.0 for row in own] for key in ("bits_per_weight", "kl", "kl_se"))
        axes.errorbar(x, y, errors, marker="o", color=f"C{color}", label=f"d = {d}")
    axes.set(title="Quantized model\nall bits counted", xlabel="true bits per weight", ylabel="KL per token [nats]")
    if measured:
        axes.set_yscale("log")
    _finish(axes, bool(measured))


def _finish(axes: Any, drawn: bool) -> None:
    axes.grid(alpha=0.3)
    if drawn:
        axes.legend()
    else:
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes)
