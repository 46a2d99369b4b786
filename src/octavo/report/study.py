"""The dimension study as a job; see :mod:`octavo.report.job`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import octavo
from octavo._core.errors import UsageError
from octavo.models.adapter import CausalModel
from octavo.models.source import resolve
from octavo.pipeline.events import Progress
from octavo.report import dimension, job, plots, tables
from octavo.report.dimension import DB_PER_BIT, PARTS, Options, Row


def _valid(document: Mapping[str, Any]) -> bool:
    rows = document.get("rows")
    return isinstance(rows, dict) and all(isinstance(rows.get(part), list) for part in PARTS)


def _plot(document: Mapping[str, Any]) -> bytes:
    return plots.dimension(document)


STUDY = job.Study(
    name="dimension",
    stem="dimension",
    valid=_valid,
    markdown=tables.markdown,
    plot=_plot,
)
JSON, MARKDOWN, SVG = "dimension.json", "dimension.md", "dimension.svg"
redraw, write = STUDY.redraw, STUDY.write


def run(
    out: str | Path,
    source: str | Path | None = None,
    options: Options | None = None,
    *,
    resume: bool = False,
    facts: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda text: None,
    progress: Progress | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Measure all rows; write dimension.json, dimension.md and, with matplotlib, dimension.svg to the folder ``out``.

    dimension.json is written after every row; with ``resume`` its rows are taken over, also into a study with more
    dimensions, bits or parts.

    Args:
        source: the model, for the parts ``layers`` and ``model``.
        facts: recorded in the document: ``command``, ``machine``.
        say: called with a line per row; progress, stop: as for :func:`octavo.quantize`.

    Returns:
        The document that dimension.json holds, and ``notes``.

    Raises:
        UsageError: options, model or texts that cannot be used, or a folder with something else in it.
        Interrupted: ``stop`` said so; all finished rows are saved.
    """
    options, out, began = options or Options(), Path(out), perf_counter()
    stored = STUDY.stored(out, resume)
    settings, causal = _prepare(source, options)
    STUDY.check_same(out, stored.get("settings", {}), settings)
    rows: dict[str, list[Row]] = stored.get("rows") or {part: [] for part in PARTS}
    # Rows that were not measured cost nothing to make again, maybe under a larger limit.
    rows["gaussian"] = [row for row in rows["gaussian"] if row["reason"] is None]
    document = STUDY.document(stored, settings, rows, causal.source.name if causal else None, facts)

    def task(part: str, rate: float, d: int) -> job.Task:
        folder = out / "models" / f"{options.method}-d{d}-{rate:g}bit"

        def measure() -> Row:
            limit = {"limit_db": rate * DB_PER_BIT}
            if part == "gaussian":
                return limit | dimension.gaussian(d, rate, options)
            # Both are there: _prepare has seen to it.
            assert causal is not None and source is not None
            if part == "layers":
                return limit | dimension.layers(d, rate, options, causal)
            return limit | dimension.model(d, rate, options, source, folder, progress, stop)

        return job.Task(
            key={"bits": rate, "dimension": d},
            rows=rows[part],
            label=f"R = {rate:g}, d = {d}",
            measure=measure,
            line=lambda row: tables.line(part, row),
            models=(folder,) if part == "model" else (),
        )

    return job.run(
        STUDY,
        out,
        document,
        # Rate by rate, so that a study cut short has whole comparisons.
        [task(*what) for what in product(options.parts, options.bits, options.dimensions)],
        spent=stored.get("seconds", 0.0) + perf_counter() - began,
        order=lambda row: (row["bits"], row["dimension"]),
        keep=options.keep,
        say=say,
        stop=stop,
    )


def _prepare(source: str | Path | None, options: Options) -> tuple[dict[str, Any], CausalModel | None]:
    """What the rows of each part depend on besides d and R; refuses what would fail hours later."""
    settings: dict[str, Any] = {part: {"octavo": octavo.__version__, "seed": options.seed} for part in options.parts}
    if options.parts == ("gaussian",):
        return settings, None
    if source is None:
        raise UsageError("MODEL is missing; without one only the Gaussian part can run (--no-layers --no-model).")
    causal = CausalModel(resolve(source, trust_remote_code=options.trust_remote_code))
    shared = {"model": causal.fingerprint(), "method": options.method, "overhead": options.overhead}
    if "layers" in options.parts:
        blocks = dimension.choose_blocks(options.blocks, len(causal.blocks))
        settings["layers"] |= shared | {"blocks": blocks, "max_centroids": options.max_centroids}
    if "model" in options.parts:
        settings["model"] |= shared | options.check(causal)
    return settings, causal
