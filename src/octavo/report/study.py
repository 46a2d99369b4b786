"""The dimension study as a job: checked before it starts, saved after every row, continued where it stopped."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import version
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import octavo
from octavo._core import io
from octavo._core.errors import FormatError, Interrupted, UsageError
from octavo.calibration.data import EVALUATION, read_text, window_length, windows
from octavo.models.adapter import CausalModel
from octavo.models.source import resolve
from octavo.pipeline.events import Progress
from octavo.report import dimension, plots, tables
from octavo.report.dimension import DB_PER_BIT, PARTS, Options, Row

JSON, MARKDOWN, SVG = "dimension.json", "dimension.md", "dimension.svg"
_OWN = {JSON, MARKDOWN, SVG, "models", "LOCK"}


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
    stored = _stored(out, resume)
    settings, causal = _prepare(source, options)
    _check_same(out, stored.get("settings", {}), settings)
    rows: dict[str, list[Row]] = stored.get("rows") or {part: [] for part in PARTS}
    # Rows that were not measured cost nothing to make again, maybe under a larger limit.
    rows["gaussian"] = [row for row in rows["gaussian"] if row["reason"] is None]
    document: dict[str, Any] = {
        "study": "dimension",
        "octavo": octavo.__version__,
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
        **{"command": [], "machine": {}, **(facts or {})},
        "model": causal.source.name if causal else stored.get("model"),
        "settings": stored.get("settings", {}) | settings,
        "rows": rows,
    }

    def save(complete: bool = False) -> None:
        document["complete"] = complete
        document["seconds"] = stored.get("seconds", 0.0) + perf_counter() - began
        io.write_json(out / JSON, document)

    def measure(part: str, d: int, rate: float, folder: Path) -> Row:
        if part == "gaussian":
            return dimension.gaussian(d, rate, options)
        # Both are there: _prepare has seen to it.
        assert causal is not None and source is not None
        if part == "layers":
            return dimension.layers(d, rate, options, causal)
        return dimension.model(d, rate, options, source, folder, progress, stop)

    out.mkdir(parents=True, exist_ok=True)
    with io.disk_errors(out), io.FolderLock(out):
        save()
        # Rate by rate, so that a study cut short has whole comparisons.
        for part, rate, d in product(options.parts, options.bits, options.dimensions):
            if any((row["bits"], row["dimension"]) == (rate, d) for row in rows[part]):
                continue
            if stop():
                raise Interrupted(f"stopped before R = {rate:g}, d = {d}; the rows before are done.")
            start, folder = perf_counter(), out / "models" / f"{options.method}-d{d}-{rate:g}bit"
            row = {"bits": rate, "dimension": d, "limit_db": rate * DB_PER_BIT, **measure(part, d, rate, folder)}
            rows[part].append(row | {"seconds": perf_counter() - start})
            say(tables.line(part, rows[part][-1]))
            rows[part].sort(key=lambda row: (row["bits"], row["dimension"]))
            save()
            # Only now: a row that is not saved needs its model again.
            if part == "model" and not options.keep:
                for path in (folder, folder.with_name(folder.name + ".work")):
                    shutil.rmtree(path, ignore_errors=True)
        save(complete=True)
        notes = write(document, out)
        if (out / "models").is_dir() and not any((out / "models").iterdir()):
            (out / "models").rmdir()
        (out / "LOCK").unlink()
    return document | {"notes": notes}


def redraw(path: str | Path, out: str | Path | None = None) -> dict[str, Any]:
    """Write tables and plot of a dimension.json again, next to it or to the folder ``out``; returns its document.

    Raises:
        FormatError: it is no such file.
    """
    document, folder = _read(Path(path)), Path(out if out is not None else Path(path).parent)
    folder.mkdir(parents=True, exist_ok=True)
    return document | {"notes": write(document, folder)}


def write(document: Mapping[str, Any], folder: Path) -> list[str]:
    """Write dimension.md and dimension.svg; returns what a person should know: that there is no plot, and why."""
    io.write_bytes(folder / MARKDOWN, tables.markdown(document).encode())
    try:
        picture = plots.dimension(document)
    except ImportError as error:
        return [f'no plot, because matplotlib is missing ({error}); install it with: pip install "octavo[report]"']
    io.write_bytes(folder / SVG, picture)
    return []


# ------------------------------------------------------------------------------------------------ before the work


def _stored(out: Path, resume: bool) -> dict[str, Any]:
    """The document of an earlier run in ``out`` that is to be continued; empty without one."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is no folder; choose another --out.")
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    if JSON in names and not resume:
        raise UsageError(f"{out} holds a study already. Continue it with --resume, or choose another --out.")
    if JSON not in names and names - _OWN:
        raise UsageError(f"{out} holds other files ({', '.join(sorted(names - _OWN)[:3])}); choose a new --out.")
    return _read(out / JSON) if JSON in names else {}


def _read(path: Path) -> dict[str, Any]:
    document = io.read_json(path, "study")
    rows = document.get("rows") if isinstance(document, dict) and document.get("study") == "dimension" else None
    if not isinstance(rows, dict) or not all(isinstance(rows.get(part), list) for part in PARTS):
        raise FormatError(f"{path} is no result of `octavo study dimension`.")
    return document


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
        settings["model"] |= shared | _texts(causal, options)
    return settings, causal


def _texts(causal: CausalModel, options: Options) -> dict[str, Any]:
    """Hashes of the tokens that calibration and evaluation will use."""
    limit, tokenizer = causal.max_positions, causal.tokenizer()
    ctx = window_length(options.ctx, limit)
    if options.max_tokens is not None and options.max_tokens < ctx:
        raise UsageError(f"max_tokens wanted at least one window of ctx = {ctx} tokens, got {options.max_tokens}.")
    hashes = {}
    for name, spec, samples, seed in (
        ("text", options.text or EVALUATION, options.max_tokens and options.max_tokens // ctx, None),
        ("calib", options.calib, options.samples, options.seed),
    ):
        tokens = windows(tokenizer, read_text(spec), ctx, samples, seed, limit=limit, source=spec)
        hashes[f"{name}_tokens"] = tokens.sha256
    return {"ctx": ctx, "samples": options.samples, **hashes}


def _check_same(out: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """All rows of a part are measured in one way."""
    different = [
        f"{part} {name}: {stored[part].get(name)!r}, now {value!r}"
        for part in sorted(wanted.keys() & stored.keys())
        for name, value in wanted[part].items()
        if stored[part].get(name) != value
    ]
    if different:
        raise UsageError(
            f"{out / JSON} was made with other settings ({'; '.join(different)}). Resume with the same ones, or choose "
            "another --out."
        )
