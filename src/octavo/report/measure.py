"""A row about a quantized model: made with the row's options, measured against the original."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo._core.errors import Interrupted, OctavoError, ResourceError, UsageError
from octavo.calibration.data import EVALUATION, read_text, window_length, windows
from octavo.integrations import api
from octavo.models.adapter import CausalModel
from octavo.pipeline import run as pipeline
from octavo.pipeline.events import Progress

Row = dict[str, Any]
#: What was found out while a model was made, for its row, and notes.
Made = tuple[Row, list[str]]

#: What a row takes over from :func:`octavo.evaluate`.
MEASURED = (
    *("bits_per_weight", "kl", "kl_se", "kl_median", "perplexity", "perplexity_se", "top1", "top1_se", "nll_gap"),
    *("nll_gap_se", "file_bytes", "warning", "reference_perplexity", "reference_perplexity_se", "text", "tokens"),
    *("windows", "ctx", "token_hash", "bos", "metric", "dtype", "device"),
)


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What all studies of whole models are told.

    Attributes:
        text, max_tokens: of the evaluation. calib, samples: of the calibration. ctx: of both.
        keep: keep the quantized models.
    """

    text: str | None = None
    calib: str = "bundled"
    samples: int = 32
    ctx: int | None = None
    max_tokens: int | None = None
    seed: int = 0
    keep: bool = False
    trust_remote_code: bool = False

    def check(self, causal: CausalModel) -> dict[str, Any]:
        """Context, samples and hashes of the tokens that calibration and evaluation will use.

        Raises:
            UsageError: too little text, or windows that the model does not allow.
            FormatError: a text or tokenizer that cannot be read.
        """
        limit, tokenizer = causal.max_positions, causal.tokenizer()
        ctx = window_length(self.ctx, limit)
        if self.max_tokens is not None and self.max_tokens < ctx:
            raise UsageError(f"max_tokens wanted at least one window of ctx = {ctx} tokens, got {self.max_tokens}.")
        hashes = {}
        for name, spec, samples, seed in (
            ("text", self.text or EVALUATION, self.max_tokens and self.max_tokens // ctx, None),
            ("calib", self.calib, self.samples, self.seed),
        ):
            tokens = windows(tokenizer, read_text(spec), ctx, samples, seed, limit=limit, source=spec)
            hashes[f"{name}_tokens"] = tokens.sha256
        return {"ctx": ctx, "samples": self.samples, **hashes}


def begun(out: Path) -> bool:
    """Whether the job that writes ``out`` was stopped and can be resumed."""
    return (out.with_name(out.name + ".work") / "CURRENT").exists()


def quantize(
    source: str | Path,
    out: Path,
    texts: Texts,
    *,
    method: str,
    bits: float,
    options: Mapping[str, Any],
    skip: Sequence[str] = (),
    tune_blocks: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
) -> tuple[pipeline.Report | None, list[str]]:
    """The model quantized to the folder ``out``, and notes; one that is there already, or unfinished, is taken up.

    Raises:
        Interrupted: ``stop`` said so; the next call continues.
        OctavoError: as for :func:`octavo.quantize`.
    """
    resumed = begun(out)
    if out.exists() and not resumed:
        return None, ["quantized by an earlier run"]
    out.parent.mkdir(parents=True, exist_ok=True)
    report = pipeline.quantize(
        source,
        out,
        method=method,
        bits=bits,
        calib=texts.calib,
        samples=texts.samples,
        ctx=texts.ctx,
        seed=texts.seed,
        resume=resumed,
        options=options,
        skip=skip,
        trust_remote_code=texts.trust_remote_code,
        progress=progress,
        stop=stop,
        tune_blocks=tune_blocks,
    )
    notes = ["quantized in several runs; the seconds are the last one's"] if resumed else []
    return report, [*notes, *report.notes]


def measure(make: Callable[[], Made], out: Path, source: str | Path, texts: Texts, target_bits: float) -> Row:
    """KL divergence, perplexity and top-1 agreement of the model that ``make`` writes to ``out``.

    ``bits_per_weight`` is what it really takes, which is more than ``target_bits`` where no layout keeps the limit; a
    refusal or failure is the row's ``reason``.

    Raises:
        Interrupted, ResourceError: from ``make``; they concern the whole study.
    """
    row: Row = {"target_bits": target_bits, "quantize_seconds": None, "peak_bytes": None, "reason": None}
    notes: list[str] = []
    try:
        made, notes = make()
        row |= made
        result = api.evaluate(
            out,
            texts.text,
            texts.ctx,
            source,
            max_tokens=texts.max_tokens,
            trust_remote_code=texts.trust_remote_code,
        )
        row |= {key: result[key] for key in MEASURED}
        if row["bits_per_weight"] > target_bits:
            notes.append(f"{row['bits_per_weight']:.3f} bits are more than {target_bits:g}")
    except (Interrupted, ResourceError):
        raise
    except OctavoError as error:
        row |= dict.fromkeys(MEASURED) | {"reason": str(error)}
    return row | {"notes": notes}
