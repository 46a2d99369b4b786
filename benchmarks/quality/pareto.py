"""KL divergence against true size: Octavo's methods and their peers in one picture and one table.

    python benchmarks/quality/pareto.py RESULT.json.. [--table] [--out PLOT.svg] [--json MERGED.json] [--x bits|bytes]

A RESULT is what one of these wrote, measured on the same tokens against the same original:

- ``octavo compare A B .. --reference ORIGINAL --text FILE --json`` or ``octavo eval A .. --json``,
- ``table.py``, which keeps the rows of such a comparison,
- ``--json`` of this script, which holds all rows with their sizes and is the file for ``results/``.

A row whose model is a folder with a ``peer.json`` (see ``llamacpp.py``; the weights beside it may be deleted once they
are measured) takes its size and bits from there: the folder itself holds decoded float32. ``--x bits``, the default,
is the true bits per weight of the matrices inside the blocks; ``bytes`` is the whole weight file, embedding and head
included. The front is that of the mean KL divergences: nothing that is as small or smaller has less; a line joins
what would be the front if there were only that method. The method is what a name says before its first ``:`` or before
``_`` and a number (``vptq:2.25:norm=false``, ``vptq_2.25``), ``llama.cpp`` for peers.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from octavo._core.errors import FormatError, OctavoError, UsageError
from octavo._core.io import read_json, write_json

_MEASURED = ("perplexity", "perplexity_se", "kl", "kl_se", "top1", "top1_se", "tasks", "lm_eval")
_SHARED = ("metric", "text", "ctx", "windows", "tokens", "token_hash", "bos")
_AXES = {"bits": "bits_per_weight", "bytes": "file_bytes"}
_STEPS = {"bits_per_weight": 1e-3, "file_bytes": 1e5}
ORIGINAL = "original"


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the rows of a result file share, and the rows: setting, method, size, bits and what was measured.

    Raises:
        FormatError: a file of another kind, or a row without a KL divergence or without a true size.
    """
    document = read_json(path, "result file")
    if not isinstance(document, dict) or "token_hash" not in document:
        raise FormatError(f"{path} is no result of octavo compare, octavo eval or table.py: it has no token_hash.")
    rows = document.get("rows") or document.get("models") or _from_eval(document)
    if not all(isinstance(row, dict) and row.get("kl") is not None for row in rows):
        raise FormatError(f"{path}: a row has no KL divergence; measure with --reference ORIGINAL.")
    shared = {key: document.get(key) for key in _SHARED}
    return shared, [_row(row, document.get("reference"), path) for row in rows]


def _from_eval(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """``octavo eval`` puts one model's numbers beside what is shared, and the original's under ``reference_``."""
    original = {
        key.removeprefix("reference_"): value for key, value in document.items() if key.startswith("reference_")
    }
    exact = {"model": document.get("reference"), "kl": 0.0, "kl_se": 0.0, "top1": 1.0, "top1_se": 0.0}
    return [{**original, **exact}, dict(document)]


def _row(row: Mapping[str, Any], reference: str | None, path: Path) -> dict[str, Any]:
    size = {key: row.get(key) for key in ("bits_per_weight", "file_bytes")}
    result = {key: row[key] for key in _MEASURED if row.get(key) is not None}
    if "method" in row:
        return {"setting": row["setting"], "method": row["method"], **size, **result}
    folder = Path(row.get("model") or row["setting"])
    peer = folder / "peer.json"
    if row.get("setting") == ORIGINAL or ("model" in row and row["model"] == reference):
        names = {"setting": ORIGINAL, "method": ORIGINAL}
    elif peer.is_file():
        found = read_json(peer, "description of a peer")
        size = {key: found[key] for key in size}
        made = [found["type"], *(["pure"] if found["settings"]["pure"] else [])]
        made += [f"head {found['settings']['head']}"] if found["settings"]["head"] != "source" else []
        names = {"setting": f"llama.cpp {' '.join(made)}", "method": "llama.cpp"}
    else:
        setting = row.get("setting") or folder.name
        names = {"setting": setting, "method": re.split(r":|_(?=\d)", setting)[0]}
        if size["bits_per_weight"] is None:
            raise FormatError(
                f"{path}: {setting} is not quantized by Octavo, and there is no {peer} that says its size."
            )
    return {**names, **size, **result}


def merge(paths: Sequence[Path]) -> dict[str, Any]:
    """One document with the rows of all files, by size of the matrices.

    Raises:
        UsageError: other tokens, another original, or one setting with two results.
    """
    shared: dict[str, Any] = {}
    rows: dict[str, dict[str, Any]] = {}
    for path in paths:
        own, found = read(path)
        shared = shared or own
        for key in ("token_hash", "ctx"):
            if own[key] != shared[key]:
                raise UsageError(f"{path} has {key} {own[key]}, {paths[0]} has {shared[key]}: not comparable.")
        for row in found:
            known = rows.setdefault(row["setting"], row)
            # Not equal: threads and batches change the last digits.
            if not all(math.isclose(known[k], row[k], rel_tol=1e-3, abs_tol=1e-6) for k in ("perplexity", "kl")):
                values = [f"perplexity {r['perplexity']:.6g} and KL {r['kl']:.6g}" for r in (row, known)]
                raise UsageError(
                    f"{path}: {row['setting']} has {values[0]}, another file says {values[1]}. Either the originals "
                    "differ, or two models have one name."
                )
            known |= {key: value for key, value in row.items() if key not in known}
    return {**shared, "rows": sorted(rows.values(), key=lambda r: (r["bits_per_weight"] or 0.0, r["kl"]))}


def front(rows: Sequence[Mapping[str, Any]], axis: str) -> set[str]:
    """Settings whose KL divergence is below that of everything of the same ``axis`` value or less.

    Sizes count as the table shows them: a hundred-thousandth of a bit is no merit.
    """
    best, chosen, step = math.inf, set(), _STEPS[axis]
    for row in sorted(_drawn(rows, axis), key=lambda row: (round(row[axis] / step), row["kl"])):
        if row["kl"] < best:
            best = row["kl"]
            chosen.add(row["setting"])
    return chosen


def _drawn(rows: Sequence[Mapping[str, Any]], axis: str) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["method"] != ORIGINAL and row[axis] is not None]


def markdown(rows: Sequence[Mapping[str, Any]], axis: str) -> str:
    """A line per model; a star for those on the front. Columns of tasks only where some model has them."""
    tasks = list(dict.fromkeys(task for row in rows for task in _accuracies(row)))
    columns = ["setting", "front", "bits per weight", "weight files MB", "KL", "top-1 %", "perplexity"]
    lines = [[*columns, *(f"{task} %" for task in tasks)]]
    lines += [["---"] * len(lines[0])]
    best = front(rows, axis)
    for row in rows:
        accuracies, bits = _accuracies(row), row["bits_per_weight"]
        cells = [
            row["setting"],
            "*" if row["setting"] in best else "",
            f"{bits:.3f}" if bits else "",
            f"{row['file_bytes'] / 1e6:.1f}",
            _number(row["kl"], row.get("kl_se"), 4),
            _number(100 * row["top1"], 100 * row.get("top1_se", math.nan), 1),
            _number(row["perplexity"], row.get("perplexity_se"), 2),
        ]
        lines.append([*cells, *(_number(*accuracies[t], 1) if t in accuracies else "" for t in tasks)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _accuracies(row: Mapping[str, Any]) -> dict[str, tuple[float, float | None]]:
    """Task -> accuracy in per cent and its standard error, of the zero-shot and of lm-eval's tasks."""
    found = {task: (values.get("acc"), values.get("acc_se")) for task, values in row.get("tasks", {}).items()}
    found |= {task: (values.get("acc"), values.get("acc_stderr")) for task, values in row.get("lm_eval", {}).items()}
    return {
        task: (100 * acc, 100 * se if isinstance(se, float) else None)
        for task, (acc, se) in found.items()
        if acc is not None
    }


def _number(value: float, error: float | None, digits: int) -> str:
    shown = f"{value:.{digits}f}"
    return shown if error is None or math.isnan(error) else f"{shown} ± {error:.{digits}f}"


def draw(rows: Sequence[Mapping[str, Any]], axis: str, path: Path) -> None:
    """The picture, in the format of the file's ending; the same rows give the same SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    best, drawn = front(rows, axis), sorted(_drawn(rows, axis), key=lambda row: row[axis])
    unit = 1e6 if axis == "file_bytes" else 1.0
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "octavo"}):
        figure = Figure(figsize=(8, 5.5), layout="constrained")
        axes: Any = figure.subplots()
        for color, method in enumerate(dict.fromkeys(row["method"] for row in drawn)):
            own = [row for row in drawn if row["method"] == method]
            x, y = [row[axis] / unit for row in own], [row["kl"] for row in own]
            errors, marker = [row.get("kl_se") or 0.0 for row in own], "s" if method == "llama.cpp" else "o"
            axes.errorbar(x, y, errors, fmt=marker, color=f"C{color}", capsize=2, label=method)
            line = [row for row in own if row["setting"] in front(own, axis)]
            axes.plot([row[axis] / unit for row in line], [row["kl"] for row in line], color=f"C{color}", linewidth=0.8)
            for row in own:
                name = row["setting"].removeprefix(method).strip(":_ ")
                place = {"xytext": (5, 4), "textcoords": "offset points", "fontsize": 6, "color": f"C{color}"}
                axes.annotate(name, (row[axis] / unit, row["kl"]), **place)
        edge = [row for row in drawn if row["setting"] in best]
        steps = {"where": "post", "color": "0.5", "linewidth": 4, "alpha": 0.3, "label": "Pareto front"}
        axes.step([row[axis] / unit for row in edge], [row["kl"] for row in edge], **steps)
        axes.set_yscale("log")
        axes.margins(x=0.1)
        label = "weight files [MB]" if axis == "file_bytes" else "true bits per weight of the blocks' matrices"
        axes.set(xlabel=label, ylabel="KL(original || quantized) per token [nats]")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT.json")
    parser.add_argument("--table", action="store_true", help="print a Markdown table")
    parser.add_argument("--out", type=Path, help="picture: .svg or .png")
    parser.add_argument("--json", type=Path, help="write all rows with their sizes")
    parser.add_argument("--x", choices=_AXES, default="bits")
    arguments = parser.parse_args()
    try:
        document = merge(arguments.results)
    except OctavoError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    rows, axis = document["rows"], _AXES[arguments.x]
    if arguments.json:
        document["text"] = Path(document["text"]).name
        write_json(arguments.json, document)
    if arguments.out:
        draw(rows, axis, arguments.out)
    if arguments.table:
        print(markdown(rows, axis))
    return 0


if __name__ == "__main__":
    sys.exit(main())
