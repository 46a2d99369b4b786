"""Quantize a model with several settings and compare all results with the original on one text.

Each setting runs as a process of its own through the command line, so that its seconds and its peak memory are its own.

    python benchmarks/quality/table.py MODEL --calib FILE --text FILE --out RESULT.json [--rows rtn:4 vptq:2.25 ..]

A row is METHOD:BITS, then options of the method (``norm=false``) or of ``octavo quantize`` (``--seed=1``), each after a
colon. The method ``gptvq_released`` is the baseline of ``released.py``.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROWS = ("rtn:4", "gptq:4", "vptq:4", "gptq:3", "vptq:3.3", "vptq:3", "gptq:2", "vptq:2.28", "vptq:2.25", "vptq:2")
RELEASED = Path(__file__).with_name("released.py")


def octavo(*arguments: str, program: tuple[str, ...] = ("-m", "octavo.cli")) -> dict[str, Any]:
    """Run one command with --json; its progress goes to our stderr."""
    command = [sys.executable, *program, *arguments, "--json"]
    result = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        raise SystemExit(f"octavo {' '.join(arguments)} failed with exit code {result.returncode}")
    return json.loads(result.stdout)


def machine() -> dict[str, Any]:
    """What the timings belong to."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(git, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    info = octavo("doctor")
    info.pop("executable")
    return {"commit": commit, "platform": platform.platform(), "processor": _cpu(), "doctor": info}


def portable(argument: str) -> str:
    """An argument without this machine's folders: ``benchmarks/fetch.py data ..`` puts everything below ``data``."""
    parts = argument.split(",")
    return ",".join("/".join(["data", *Path(p).parts[-2:]]) if p.startswith("/") else p for p in parts)


def save(out: Path, document: dict[str, Any], table: str) -> None:
    """A result file, its table beside it and on the screen."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n")
    out.with_suffix(".md").write_text(table + "\n")
    print(table)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def quantize(model: str, row: str, calib: str, samples: int, ctx: int, work: Path) -> tuple[str, dict[str, Any]]:
    """One row such as ``vptq:2.25`` or ``vptq:2.25:norm=false``; a folder that exists is taken as it is."""
    method, bits, *settings = row.split(":")
    program = (str(RELEASED),) if method == "gptvq_released" else ("-m", "octavo.cli")
    out = work / row.replace(":", "_").replace("=", "-")
    record = work / f"{out.name}.json"
    if not out.exists():
        extra = [a for s in settings for a in ((s,) if s.startswith("--") else ("--set", s))]
        report = octavo(
            *("quantize", model, str(out), "--method", method, "--bits", bits, "--calib", calib),
            *("--samples", str(samples), "--ctx", str(ctx), "--resume", *extra),
            program=program,
        )
        record.write_text(json.dumps(report))
    return str(out), json.loads(record.read_text())


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table that goes into the documentation."""
    head = "| setting | bits per weight | weight files MB | perplexity | KL | top-1 % | quantization s | peak MB |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        cells = [
            row["setting"],
            f"{row['bits_per_weight']:.3f}" if row["bits_per_weight"] else "",
            f"{row['file_bytes'] / 1e6:.1f}",
            f"{row['perplexity']:.2f} ± {row['perplexity_se']:.2f}",
            f"{row['kl']:.4f} ± {row['kl_se']:.4f}" if row["kl"] is not None else "",
            f"{100 * row['top1']:.1f}" if row["top1"] is not None else "",
            f"{row['seconds']:.0f}" if row["seconds"] else "",
            f"{row['peak_bytes'] / 1e6:.0f}" if row["peak_bytes"] else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", default=ROWS)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--ctx", type=int, default=1024)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--work", type=Path, help="keep the quantized models here (and take those that are there)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        reports: dict[str, dict[str, Any]] = {}
        settings: dict[str, str] = {}
        for row in arguments.rows:
            folder, report = quantize(arguments.model, row, arguments.calib, arguments.samples, arguments.ctx, work)
            reports[folder], settings[folder] = report, row
        limit = ["--max-tokens", str(arguments.max_tokens)] if arguments.max_tokens else []
        result = octavo(
            *("compare", *reports, "--reference", arguments.model, "--text", arguments.text),
            *("--ctx", str(arguments.ctx), *limit),
        )
    rows = []
    for measured in result.pop("models"):
        report = reports.get(measured["model"], {})
        rows.append(
            {
                "setting": settings.get(measured["model"], "original"),
                **{k: measured[k] for k in ("bits_per_weight", "file_bytes", "perplexity", "perplexity_se")},
                **{k: measured[k] for k in ("kl", "kl_se", "top1", "top1_se")},
                **{k: report.get(k) for k in ("seconds", "peak_bytes", "phases", "tokens", "notes")},
            }
        )
    for key in ("text", "reference"):
        result[key] = Path(result[key]).name
    table = markdown(rows)
    document = {
        "command": " ".join(["python", "benchmarks/quality/table.py", *map(portable, sys.argv[1:])]),
        "model": Path(arguments.model).name,
        "calibration": {"samples": arguments.samples, "ctx": arguments.ctx},
        **result,
        "rows": rows,
        "machine": machine(),
    }
    save(arguments.out, document, table)


if __name__ == "__main__":
    main()
