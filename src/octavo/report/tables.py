"""Studies for people: a line per row, tables, Markdown; here for the dimension study."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

#: Part -> title, what it shows, and columns as (title, keys, digits); keys with ``_se`` beside them show it, too.
_TABLES: dict[str, tuple[str, str, tuple[tuple[str, str, int], ...]]] = {
    "gaussian": (
        "Gaussian vectors: k-means with 2^(R d) centroids",
        "SQNR on the vectors of the fit, on fresh ones, and of the mean of both errors; gap to the rate-distortion "
        "limit of 6.02 R dB; effective bits are those that the limit would need.",
        (
            *(("centroids", "centroids", 0), ("vectors", "vectors", 0), ("steps", "steps", 0)),
            *(("train dB", "sqnr_train_db", 2), ("fresh dB", "sqnr_fresh_db", 2), ("mean dB", "sqnr_db", 2)),
            *(("gap dB", "gap_db", 2), ("Lloyd-Max dB", "lloyd_max_db", 2), ("effective bits", "effective_bits", 3)),
        ),
    ),
    "layers": (
        "Matrices, without calibration",
        "{model}, blocks {blocks}, mean error over all weights. Left: k-means with one codebook per matrix at R index "
        "bits, and the bits with that codebook in float16. Right: {method} without a Hessian, all bits counted. Gaps "
        "are to the limit of a Gaussian source.",
        (
            *(("k-means dB", "plain_sqnr_db", 2), ("gap dB", "plain_gap_db", 2), ("with codebook", "plain_bits", 3)),
            *(("bits asked", "target_bits", 2), ("true bits", "equal_bits", 3)),
            *(("dB at true bits", "equal_sqnr_db", 2), ("gap dB", "equal_gap_db", 2)),
        ),
    ),
    "model": (
        "The quantized model",
        "{model} with {method}, all bits counted: KL(original || quantized) in nats per token, perplexity (original: "
        "{reference_perplexity:.2f}) and share of equal top tokens on {tokens:,} tokens in {windows} windows of {ctx}; "
        "+- is the standard error over windows.",
        (
            *(("bits asked", "target_bits", 2), ("true bits", "bits_per_weight", 3), ("KL", "kl", 4)),
            *(("perplexity", "perplexity", 2), ("top-1", "top1", 3), ("quantization s", "quantize_seconds", 0)),
        ),
    ),
}

Table = tuple[str, str, list[str], list[list[str]]]


def tables(document: Mapping[str, Any]) -> list[Table]:
    """(title, what it shows, column titles, rows of texts) of every part that has rows."""
    found = []
    for part, (title, about, columns) in _TABLES.items():
        rows, settings = document["rows"][part], document["settings"].get(part, {})
        if not rows:
            continue
        measured = next((row for row in rows if row.get("kl") is not None), {})
        blocks = ", ".join(map(str, settings.get("blocks", ())))
        values = {**measured, **settings, "model": document["model"], "blocks": blocks}
        shown = about.format(**values) if measured or part != "model" else "No row could be measured."
        names = ["R", "d", *(column[0] for column in columns), "s", "note"]
        found.append((title, shown, names, [_cells(part, row) for row in rows]))
    return found


def line(part: str, row: Mapping[str, Any]) -> str:
    """A row in one line, for progress."""
    names = ("R", "d", *(column[0] for column in _TABLES[part][2]), "s", "note")
    named = zip(names, _cells(part, row), strict=True)
    return f"{part}: " + ", ".join(f"{name} {text}" for name, text in named if text not in ("-", ""))


def markdown(document: Mapping[str, Any]) -> str:
    """The whole study as Markdown."""
    return "\n".join(head(document, "What the dimension of the vectors brings") + sections(tables(document)))


def _cells(part: str, row: Mapping[str, Any]) -> list[str]:
    middle = [number(row, key, digits) for _, key, digits in _TABLES[part][2]]
    return [f"{row['bits']:g}", str(row["dimension"]), *middle, number(row, "seconds", 1), note(row)]


# ------------------------------------------------------------------------------------------------ shared by studies


def head(document: Mapping[str, Any], title: str) -> list[str]:
    """First lines of a study's Markdown: title, command, versions and machine."""
    machine, lines = document["machine"], [f"# {title}", ""]
    if document["command"]:
        lines += ["```", shlex.join(document["command"]), "```", ""]
    facts = [
        f"octavo {document['octavo']}",
        *(f"{name} {found}" for name, found in sorted(document["versions"].items())),
    ]
    if machine:
        facts.append(f"{machine['platform']}, {machine['threads']['torch']} threads")
    lines += [f"{', '.join(facts)}; {document['seconds']:.0f} s.", ""]
    if not document["complete"]:
        lines += ["**This study is not finished.**", ""]
    return lines


def sections(found: Sequence[Table]) -> list[str]:
    """Lines of tables as Markdown."""
    lines = []
    for title, about, columns, rows in found:
        cells = [columns, ["---"] * len(columns), *rows]
        lines += [f"## {title}", "", about.replace("+- ", "± "), ""]
        lines += [*(f"| {' | '.join(map(_escape, row))} |" for row in cells), ""]
    return lines


def number(row: Mapping[str, Any], key: str, digits: int) -> str:
    """A row's number, with its standard error if there is one; a dash for none."""
    value, error = row.get(key), row.get(f"{key}_se")
    if value is None:
        return "-"
    shown = f"{value:,d}" if isinstance(value, int) else f"{value:.{digits}f}"
    return shown if error is None else f"{shown} +- {error:.{digits}f}"


def note(row: Mapping[str, Any]) -> str:
    """Why a row has no numbers, and what else is to be said about it."""
    return "; ".join(str(part) for part in (row["reason"], row.get("warning"), *row.get("notes", ())) if part)


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("+- ", "± ")
