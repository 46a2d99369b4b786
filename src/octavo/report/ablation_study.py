"""VPTQ's ablations as a job; see :mod:`octavo.report.job`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import octavo
from octavo._core.config import from_dict
from octavo._core.errors import UsageError
from octavo.models.adapter import CausalModel
from octavo.models.source import resolve
from octavo.pipeline.events import Progress
from octavo.pipeline.tune import TuneOptions, choose_windows, token_identity
from octavo.report import ablation, ablation_tables, job, plots
from octavo.report.ablation import Lab, Options, Setting
from octavo.report.dimension import choose_blocks


def _valid(document: Mapping[str, Any]) -> bool:
    rows, parts = document.get("rows"), document.get("parts")
    return isinstance(rows, list) and isinstance(parts, dict) and all("name" in row for row in rows)


def _plot(document: Mapping[str, Any]) -> bytes:
    return plots.ablation(document)


STUDY = job.Study(name="vptq", stem="ablation", valid=_valid, markdown=ablation_tables.markdown, plot=_plot)
redraw = STUDY.redraw


def run(
    out: str | Path,
    source: str | Path,
    options: Options | None = None,
    *,
    resume: bool = False,
    facts: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda text: None,
    progress: Progress | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Measure all rows; write ablation.json, ablation.md and, with matplotlib, ablation.svg to the folder ``out``.

    ablation.json is written after every row; with ``resume`` its rows are taken over, also into a study with more
    parts or rows.

    Args:
        source: the model.
        facts: recorded in the document: ``command``, ``machine``.
        say: called with a line per row; progress, stop: as for :func:`octavo.quantize`.

    Returns:
        The document that ablation.json holds, and ``notes``.

    Raises:
        UsageError: options, model or texts that cannot be used, or a folder with something else in it.
        Interrupted: ``stop`` said so; all finished rows are saved.
    """
    options, out, began = options or Options(), Path(out), perf_counter()
    stored = STUDY.stored(out, resume)
    whole = CausalModel(resolve(source, trust_remote_code=options.trust_remote_code))
    blocks = list(range(len(whole.blocks)))
    chosen = blocks if options.blocks is None else choose_blocks(options.blocks, len(blocks), "blocks")
    skip = tuple(whole.blocks[i] for i in blocks if i not in chosen)
    causal = CausalModel(whole.source, skip=skip) if skip else whole
    settings = _settings(causal, options, chosen)
    STUDY.check_same(out, stored.get("settings", {}), settings)
    left_out = ablation.too_small(causal, options)
    document = STUDY.document(stored, settings, stored.get("rows", []), causal.source.name, facts)
    document["blocks_in_all"] = len(blocks)
    document["left_out"] = stored.get("left_out", {}) | left_out
    # A vector length is there for the comparison with its residual codebook.
    gone = left_out.keys() | {name.partition("-")[0] for name in left_out}
    parts = {
        part: [row for row in rows if part != "residual" or row.name not in gone]
        for part, rows in options.settings().items()
    }
    document["parts"] = _merged(stored.get("parts", {}), parts)
    lab = Lab(options, source, out / "models", skip, frozenset(causal.notes), progress, stop)
    unique = {row.name: row for rows in parts.values() for row in rows}
    tasks = [_task(lab, row, document) for row in unique.values()]
    spent = stored.get("seconds", 0.0) + perf_counter() - began
    return job.run(STUDY, out, document, tasks, spent=spent, keep=options.keep, say=say, stop=stop)


def _task(lab: Lab, setting: Setting, document: Mapping[str, Any]) -> job.Task:
    return job.Task(
        key={"name": setting.name},
        rows=document["rows"],
        label=f"row {setting.name} ({setting.what})",
        measure=lambda: lab.measure(setting),
        line=lambda row: ablation_tables.line(document, row),
        models=lab.folders(setting),
    )


def _merged(stored: Mapping[str, Any], parts: Mapping[str, list[Setting]]) -> dict[str, list[dict[str, str]]]:
    """The rows of every part by name, with their titles: those of earlier runs, then new ones."""
    merged: dict[str, list[dict[str, str]]] = {}
    for part in ablation.PARTS:
        rows = {row["name"]: row for row in stored.get(part, ())}
        for row in parts.get(part, ()):
            # An earlier run may have found no row that the base row equals.
            if row.name not in rows or row.what.endswith("(base)"):
                rows[row.name] = {"name": row.name, "what": row.what}
        if rows:
            merged[part] = list(rows.values())
    return merged


def _settings(causal: CausalModel, options: Options, blocks: list[int]) -> dict[str, Any]:
    """What the rows depend on besides their own options; refuses what would fail hours later."""
    settings: dict[str, Any] = {
        "rows": {
            "octavo": octavo.__version__,
            "seed": options.seed,
            "model": causal.fingerprint(),
            "bits": options.bits,
            "base": dict(options.base_setting().options),
            "blocks": blocks,
            **options.check(causal),
        }
    }
    if not any(causal.targets(i) for i in blocks):
        raise UsageError(f"{causal.source.name}: blocks {blocks} have no linear layers that could be quantized.")
    if "tuning" in options.parts:
        tune = options.tune_options()
        tokens = choose_windows(causal, from_dict(TuneOptions, tune, "tune"))
        # The text is told by the hash of its tokens.
        tune = {name: value for name, value in tune.items() if name not in ("calib", "samples", "ctx")}
        settings["tuning"] = {"end": {**tune, **token_identity(tokens)}, "blocks": dict(options.tune_blocks)}
    # As it will be read again.
    return json.loads(json.dumps(settings))
