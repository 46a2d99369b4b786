"""VPTQ's ablations for people: a line per row, tables, Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.report.tables import Table, head, note, number, sections

#: Part -> title and what it shows.
_TITLES = {
    "vector": ("Vector length", "One codebook per matrix, as large as the bits allow."),
    "residual": ("Residual codebook", "One codebook against two stages."),
    "outliers": ("Outlier columns", "Columns with the largest Hessian entries get a codebook of their own."),
    "groups": ("Groups", "Column groups with a codebook each."),
    "update": (
        "Channel-independent update",
        "Columns that are quantized from the same values before their errors are fed back.",
    ),
    "tuning": ("Fine-tuning", "Codebooks, scales, biases and norms trained; indices stay."),
}
_COLUMNS = (
    *(("true bits", "bits_per_weight", 3), ("KL", "kl", 4), ("KL change %", "change", 1)),
    *(("perplexity", "perplexity", 2), ("top-1", "top1", 3), ("proxy error", "proxy_error", 5)),
    ("quantization s", "quantize_seconds", 0),
)


def tables(document: Mapping[str, Any]) -> list[Table]:
    """(title, what it shows, column titles, rows of texts) of every part that has rows, the base row first."""
    measured = {row["name"]: row for row in document["rows"]}
    found = []
    for part, rows in in_order(document):
        own = [row for row in rows if row["name"] in measured]
        if not own:
            continue
        title, about = _TITLES[part]
        columns = _columns(part)
        texts = [[row["what"], *_cells(document, measured[row["name"]], columns)] for row in own]
        found.append((title, about, ["what", *(column[0] for column in columns), "note"], texts))
    return found


def in_order(document: Mapping[str, Any]) -> list[tuple[str, list[dict[str, str]]]]:
    """The parts with their rows' names and titles; a file has them by the alphabet."""
    return [(part, document["parts"][part]) for part in _TITLES if part in document["parts"]]


def line(document: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """A row in one line, for progress."""
    columns = _columns("tuning" if row["tuned"] != "none" else "")
    named = zip([*(column[0] for column in columns), "note"], _cells(document, row, columns), strict=True)
    return f"{row['name']}: " + ", ".join(f"{name} {text}" for name, text in named if text not in ("-", ""))


def about(document: Mapping[str, Any]) -> str:
    """What holds for all tables."""
    settings = document["settings"]["rows"]
    blocks, every = settings["blocks"], document["blocks_in_all"]
    text = f"{document['model']} with vptq at {settings['bits']:g} true bits per weight of the quantized matrices, "
    if len(blocks) == every:
        text += "all decoder blocks quantized. "
    else:
        text += (
            f"only {len(blocks)} of {every} decoder blocks quantized ({', '.join(map(str, blocks))}; the first is 0). "
        )
    measured = next((row for row in document["rows"] if row["kl"] is not None), None)
    if measured is None:
        return text + "No row could be measured."
    shown = (
        "KL(original || quantized) in nats per token and its change against the base row, perplexity (original: "
        "{reference_perplexity:.2f}) and share of equal top tokens on {tokens:,} tokens in {windows} windows of {ctx}; "
        "+- is the standard error over windows. The proxy error is the mean over matrices."
    )
    return text + shown.format(**measured)


def left_out(document: Mapping[str, Any]) -> list[str]:
    """A line for every row that this model cannot have."""
    return [f"{name} is left out: {reason.rstrip('.')}." for name, reason in document["left_out"].items()]


def markdown(document: Mapping[str, Any]) -> str:
    """The whole study as Markdown."""
    lines = [*head(document, "What the parts of VPTQ bring"), about(document).replace("+- ", "± "), ""]
    lines += [line for text in left_out(document) for line in (text, "")]
    return "\n".join(lines + sections(tables(document)))


def _columns(part: str) -> tuple[tuple[str, str, int], ...]:
    return (*_COLUMNS, ("tuning s", "tune_seconds", 0)) if part == "tuning" else _COLUMNS


def change(document: Mapping[str, Any], row: Mapping[str, Any]) -> float | None:
    """By how many percent a row's KL is above the base row's."""
    base = next((other for other in document["rows"] if other["name"] == "base"), {})
    if row["name"] == "base" or row["kl"] is None or not base.get("kl"):
        return None
    return 100 * (row["kl"] / base["kl"] - 1)


def _cells(document: Mapping[str, Any], row: Mapping[str, Any], columns: tuple[tuple[str, str, int], ...]) -> list[str]:
    cells = []
    for _, key, digits in columns:
        if key == "change":
            value = change(document, row)
            cells.append("-" if value is None else f"{value:+.{digits}f}")
        else:
            cells.append(number(row, key, digits))
    return [*cells, note(row)]
