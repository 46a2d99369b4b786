"""Studies as pictures; matplotlib (extra ``report``) is imported when one is drawn."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from octavo.report import ablation_tables


def dimension(document: Mapping[str, Any]) -> bytes:
    """SVG with three panels: gaps to the rate-distortion limit against d, and KL divergence against true bits.

    Drawn from the study's document alone; the same document gives the same bytes.

    Raises:
        ImportError: matplotlib is missing.
    """
    with _picture((13, 4.2)) as (figure, data):
        first, second, third = figure.subplots(1, 3)
        rows = document["rows"]
        _gaps(first, rows["gaussian"], {"gap_db": "-"}, "Gaussian vectors\nk-means")
        title = "Matrices\nsolid: k-means without its codebook, dashed: true bits"
        _gaps(second, rows["layers"], {"plain_gap_db": "-", "equal_gap_db": "--"}, title)
        _divergence(third, rows["model"])
    return data.getvalue()


def ablation(document: Mapping[str, Any]) -> bytes:
    """SVG with a bar per row of VPTQ's ablations, its height the KL divergence; a panel per part, the base row first.

    Raises:
        ImportError: matplotlib is missing.
    """
    rows = {row["name"]: row for row in document["rows"]}
    parts = {
        part: [(row["what"], rows.get(row["name"], {"kl": None})) for row in own]
        for part, own in ablation_tables.in_order(document)
    }
    counts = [len(own) for own in parts.values()] or [1]
    with _picture((1.5 + 0.75 * sum(counts) + 0.6 * len(counts), 5.0)) as (figure, data):
        panels = figure.subplots(1, len(counts), sharey=True, squeeze=False, width_ratios=counts)[0]
        for axes, (part, own) in zip(panels, parts.items(), strict=False):
            _bars(axes, part, own)
        panels[0].set_ylabel("KL per token [nats]")
    return data.getvalue()


def _bars(axes: Any, part: str, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """A bar per (title, row), the base row's in another colour and continued as a line."""
    for place, (_, row) in enumerate(rows):
        if row["kl"] is None:
            axes.text(place, 0, "not measured", rotation=90, ha="center", va="bottom")
        else:
            color = "C7" if row["name"] == "base" else "C0"
            axes.bar(place, row["kl"], yerr=row["kl_se"] or 0.0, capsize=3, color=color)
        if row["kl"] is not None and row["name"] == "base":
            axes.axhline(row["kl"], color="C7", linestyle=":", linewidth=1)
    axes.set_xticks(range(len(rows)), [title for title, _ in rows], rotation=40, ha="right", rotation_mode="anchor")
    axes.set(title=part, xlim=(-0.6, len(rows) - 0.4))
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


@contextmanager
def _picture(size: tuple[float, float]) -> Iterator[tuple[Any, io.BytesIO]]:
    """A figure to be filled, and its SVG afterwards: text stays text; nothing depends on time or chance."""
    import matplotlib
    from matplotlib.figure import Figure

    data = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "octavo"}):
        figure = Figure(figsize=size, layout="constrained")
        yield figure, data
        figure.savefig(data, format="svg", metadata={"Date": None})


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
