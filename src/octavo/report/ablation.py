"""What the parts of VPTQ bring (arXiv 2409.17066, Table 10): a model quantized with one thing changed at a time.

All rows have the same limit of true bits. A base row - vectors of 4, one codebook per matrix that fills the bits -
belongs to every comparison and is measured once. :mod:`octavo.report.ablation_study` makes a resumable job of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from octavo._core.config import from_dict
from octavo._core.errors import UsageError, did_you_mean
from octavo.algorithms.vptq import VPTQ
from octavo.models.adapter import CausalModel
from octavo.pipeline import tune as tuning
from octavo.pipeline.block_tune import BlockTuneOptions
from octavo.pipeline.events import Progress
from octavo.pipeline.run import Report
from octavo.report.measure import Made, Row, Texts, begun, measure, quantize

PARTS = ("vector", "residual", "outliers", "groups", "update", "tuning")
TUNINGS = ("none", "blocks", "end", "both")
#: What every row starts from.
_BASE: dict[str, Any] = {"vector_length": 4, "residual_centroids": 0}
#: Vector lengths that are compared without and with a residual codebook, and the size of that.
_RESIDUALS = {8: 256, 12: 4096}


@dataclass(frozen=True)
class Setting:
    """How one model is made.

    Attributes:
        name: of the row and of the model's folder.
        what: the row's title.
        options: of the method. tuned: one of :data:`TUNINGS`.
    """

    name: str
    what: str
    options: Mapping[str, Any]
    tuned: str = "none"


@dataclass(frozen=True, kw_only=True)
class Options(Texts):
    """What to measure, and how.

    Attributes:
        bits: true bits per weight of every row, an upper limit.
        parts: some of :data:`PARTS`.
        vector_lengths, outlier_percents, groups: of the rows of these parts.
        base: options of the method for all rows; rows of other vector lengths choose their codebooks by themselves.
        blocks: only these decoder blocks are quantized, or so many, spread evenly; None takes all.
        tune, tune_blocks: options of the end-to-end and of the block-wise tuning.
        others: as for :class:`~octavo.report.measure.Texts`.

    Raises:
        UsageError: values that no row could be made with.
    """

    bits: float = 2.25
    parts: tuple[str, ...] = PARTS
    vector_lengths: tuple[int, ...] = (2, 4, 6, 8)
    outlier_percents: tuple[float, ...] = (0, 1, 2, 5)
    groups: tuple[int, ...] = (1, 2, 4, 8)
    base: Mapping[str, Any] = field(default_factory=dict)
    blocks: int | tuple[int, ...] | None = None
    tune: Mapping[str, Any] = field(default_factory=dict)
    tune_blocks: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for part in self.parts:
            if part not in PARTS:
                raise UsageError(f"study: unknown part {part!r}.{did_you_mean(part, PARTS)} Known: {', '.join(PARTS)}.")
        if not self.parts:
            raise UsageError(f"study: some of the parts {', '.join(PARTS)} wanted, got none")
        if "bits" in self.base:
            raise UsageError("study: bits are the same for all rows and have a parameter of their own, not base")
        # What suits no matrix is refused now; what does not fit this model will be a row's reason.
        for settings in self.settings().values():
            for setting in settings:
                self.method(setting.options)
        if "tuning" in self.parts:
            from_dict(tuning.TuneOptions, self.tune_options(), "tune").place()
            from_dict(BlockTuneOptions, self.tune_blocks, "tune_blocks")

    def method(self, options: Mapping[str, Any]) -> VPTQ:
        """The method with these options, at the study's bits."""
        return from_dict(VPTQ, {"bits": self.bits, **options}, "vptq")

    def tune_options(self) -> dict[str, Any]:
        """Options of the end-to-end tuning: the calibration's text unless told otherwise."""
        own = {"calib": self.calib, "samples": self.samples, "ctx": self.ctx, "seed": self.seed}
        return {**own, **self.tune}

    def base_setting(self) -> Setting:
        """The row that every other one is compared with."""
        options = {**_BASE, **self.base}
        residual = options["residual_centroids"]
        books = "one codebook" if residual == 0 else f"residual codebook of {residual or 'open size'}"
        changed = [f"{key} {value}" for key, value in self.base.items() if key not in _BASE]
        return Setting(
            "base",
            ", ".join([f"base: vectors of {options['vector_length'] or 'open length'}", books, *changed]),
            options,
        )

    def settings(self) -> dict[str, list[Setting]]:
        """The rows of every part to be measured, the base row first; a row that equals it is left to it."""
        base = self.base_setting()
        given = {key: value for key, value in base.options.items() if key != "centroids"}
        length = base.options["vector_length"] or 4

        def vectors(v: int, residual: int = 0) -> Setting:
            name, second = f"v{v}", f"residual codebook of {residual}"
            return Setting(
                f"{name}-r{residual}" if residual else name,
                f"vectors of {v}, {second if residual else 'one codebook'}",
                {**given, "vector_length": v, "residual_centroids": residual},
            )

        def change(name: str, what: str, option: str, value: Any) -> Setting:
            return Setting(name, what, {**base.options, option: value})

        def tuned(kind: str, what: str) -> Setting:
            return Setting(f"tuned-{kind}", what, base.options, kind)

        rows = {
            "vector": [vectors(v) for v in self.vector_lengths],
            "residual": [vectors(v, residual) for v, size in _RESIDUALS.items() for residual in (0, size)],
            "outliers": [
                change(f"outliers-{p:g}", f"{p:g} % outlier columns", "outlier_percent", p)
                for p in self.outlier_percents
            ],
            "groups": [change(f"groups-{n}", f"{n} column group{'s' * (n > 1)}", "groups", n) for n in self.groups],
            "update": [
                change("update-1", "channel-independent update", "update_columns", 1),
                change(f"update-{length}", f"update of {length} columns at once", "update_columns", length),
                change("update-0", "no error feedback", "update_columns", 0),
            ],
            "tuning": [
                tuned("blocks", "tuned block by block"),
                tuned("end", "tuned end to end"),
                tuned("both", "tuned block by block, then end to end"),
            ],
        }
        return {part: self._with_base(base, rows[part]) for part in PARTS if part in self.parts}

    def _with_base(self, base: Setting, rows: list[Setting]) -> list[Setting]:
        """The rows with the base row, under the title of the one that it equals, in first place."""
        method = self.method(base.options)
        others: dict[str, Setting] = {}
        for row in rows:
            if row.tuned == "none" and self.method(row.options) == method:
                base = Setting(base.name, f"{row.what} (base)", base.options)
            else:
                others.setdefault(row.name, row)
        return [base, *others.values()]


def too_small(causal: CausalModel, options: Options) -> dict[str, str]:
    """Rows that the model's matrices are too small for, with the reason: residual codebooks that exceed the bits alone.

    Vectors of 8 stay in any case.
    """
    shapes = [(t.shape, t.bias) for i in range(len(causal.blocks)) for t in causal.targets(i).values()]
    left_out: dict[str, str] = {}
    for row in options.settings().get("residual", ()):
        v = row.options["vector_length"]
        if row.name != f"v{v}-r{_RESIDUALS.get(v)}" or v == min(_RESIDUALS):
            continue
        try:
            layouts = options.method(row.options).layouts(shapes)
        except UsageError as error:
            left_out[row.name] = str(error)
            continue
        bits = sum(layout.bits() for layout in layouts) / sum(layout.weights for layout in layouts)
        if bits > options.bits:
            left_out[row.name] = f"its codebooks alone would bring the matrices to {bits:.2f} bits"
    return left_out


# ------------------------------------------------------------------------------------------------ a row


@dataclass(frozen=True)
class Lab:
    """What all rows are made from.

    Attributes:
        source: the model. skip: patterns of the blocks that stay as they are. known: notes that concern all rows.
        models: the folder of the models.
    """

    options: Options
    source: str | Path
    models: Path
    skip: tuple[str, ...] = ()
    known: frozenset[str] = frozenset()
    progress: Progress | None = None
    stop: Callable[[], bool] | None = None

    def folders(self, setting: Setting) -> tuple[Path, ...]:
        """The models that a row writes or starts from."""
        start = {"end": "base", "both": "tuned-blocks"}.get(setting.tuned)
        return (self.models / setting.name, *([self.models / start] if start else []))

    def measure(self, setting: Setting) -> Row:
        """The row: KL divergence, perplexity, top-1 agreement, true bits, proxy error, seconds.

        Raises:
            Interrupted: a model that was begun continues at the next call.
            ResourceError: disk or memory is short.
        """
        out, *start = self.folders(setting)

        def make() -> Made:
            return self._tuned(setting, start[0], out) if start else self._quantized(setting, out)

        row: Row = {"options": dict(setting.options), "tuned": setting.tuned, "proxy_error": None, "tune_seconds": None}
        row |= measure(make, out, self.source, self.options, self.options.bits)
        found = row["bits_per_weight"]
        if found is not None and found < 0.97 * self.options.bits:
            row["notes"].append(
                f"only {found:.3f} bits: the codebooks that fit these matrices, or that are chosen without asking, end "
                "there"
            )
        return row

    def _quantized(self, setting: Setting, out: Path) -> Made:
        tune_blocks = self.options.tune_blocks if setting.tuned in ("blocks", "both") else None
        report, notes = quantize(
            self.source,
            out,
            self.options,
            method="vptq",
            bits=self.options.bits,
            options=setting.options,
            skip=self.skip,
            tune_blocks=tune_blocks,
            progress=self.progress,
            stop=self.stop,
        )
        return _costs(report), [note for note in notes if note not in self.known]

    def _tuned(self, setting: Setting, start: Path, out: Path) -> Made:
        """End-to-end tuning of the model in ``start``, which is made again if it is gone."""
        row, notes = {}, ["tuned by an earlier run"]
        resumed = begun(out)
        if resumed or not out.exists():
            if begun(start) or not start.exists():
                row, _ = self._quantized(setting, start)
            report = tuning.tune(
                start,
                out,
                reference=self.source,
                resume=resumed,
                trust_remote_code=self.options.trust_remote_code,
                progress=self.progress,
                stop=self.stop,
                **self.options.tune_options(),
            )
            kept = ("kl_before", "kl_after", "steps", "best_step", "held_out_tokens", "parameters")
            row |= {"tune_seconds": report.seconds, "peak_bytes": report.peak_bytes}
            row["tune"] = {name: getattr(report, name) for name in kept} | {"tokens": report.tokens}
            notes = ["tuned in several runs; the seconds are the last one's"] if resumed else []
            notes += report.notes
        # Tuning changes no layout, and no matrix is measured by itself.
        row["proxy_error"] = None
        return row, [note for note in notes if note not in self.known]


def _costs(report: Report | None) -> Row:
    if report is None:
        return {}
    errors = [matrix.error for matrix in report.matrices if matrix.error is not None]
    return {
        "quantize_seconds": report.seconds,
        "peak_bytes": report.peak_bytes,
        "proxy_error": sum(errors) / len(errors) if errors else None,
    }
