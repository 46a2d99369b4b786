"""Tune a quantized model end to end: its continuous parameters move until its logits are closer to the original's.

One implementation for every method: whatever a layout has besides indices - codebooks, scales, offsets, biases - and
the norms of the model are trained on KL(original || quantized). Size and format stay what they are.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import octavo
from octavo import formats
from octavo._core import io
from octavo._core.config import from_dict
from octavo._core.errors import UsageError
from octavo.calibration.data import Tokens, read_text, window_length, windows
from octavo.formats import Format
from octavo.models.adapter import CausalModel
from octavo.models.quantized import check
from octavo.models.source import ModelSource, resolve
from octavo.pipeline._original import Original
from octavo.pipeline._student import Student
from octavo.pipeline._tuning import TuneOptions, Tuning
from octavo.pipeline.convert import rewrite
from octavo.pipeline.events import Progress, Reporter, peak_memory
from octavo.pipeline.output import Contents, check_folders, write_output
from octavo.pipeline.store import Store, already_there, no_litter, prepare_work

#: Most windows that are used unless more are asked for.
_SAMPLES = 128


@dataclass(frozen=True)
class TuneReport:
    """The outcome of :func:`tune`.

    Attributes:
        kl_before, kl_after: mean KL(original || quantized) in nats per token on the held-out windows.
        steps: steps that were done; best_step: the one whose result was written, 0 for the start.
        tokens: tokens that were trained on, repetitions counted; held_out_tokens: those that were measured on.
        parameters: numbers that were trained.
        history: (step, KL on the held-out windows) of every measurement.
        bits_per_weight: true bits over weights of all quantized matrices, as before.
        seconds: wall clock of this run; phases: where it went. peak_bytes: largest resident memory of the process.
        notes: warnings that were raised on the way.
    """

    model: str
    reference: str
    output: str
    kl_before: float
    kl_after: float
    steps: int
    best_step: int
    tokens: int
    held_out_tokens: int
    token_hash: str
    parameters: int
    history: tuple[tuple[int, float], ...]
    bits_per_weight: float
    file_bytes: int
    seconds: float
    phases: dict[str, float]
    peak_bytes: int
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


def tune(
    quantized: str | Path,
    out: str | Path,
    *,
    reference: str | Path,
    format: str | None = None,
    resume: bool = False,
    force_new: bool = False,
    keep_work: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
    **options: Any,
) -> TuneReport:
    """Tune the quantized folder to the new folder ``out``, which must not exist and gets the same layouts and size.

    Indices and permutations never change; the output embedding stays as it is. Whatever measures best on held-out text
    is written, the start included, so the result is never worse there. The job's state lives in ``OUT.work``; a killed
    job continues with ``resume=True`` and gives the same bytes as an uninterrupted one.

    Args:
        quantized: a folder with a quantized model.
        reference: the original model: local folder, hub id, or .gguf file.
        format: of the result; None is the one that it has.
        force_new: set an unfinished job aside and start again. keep_work: keep the work folder.
        progress: called with an :class:`Event` for every step. stop: asked after every step; True raises Interrupted
            with everything committed.
        options: the fields of :class:`TuneOptions`.

    Raises:
        OctavoError: one of its kinds; see :mod:`octavo._core.errors`.
    """
    settings = from_dict(TuneOptions, options, "tune")
    reporter = Reporter(progress)
    out, folder = Path(out), Path(quantized).expanduser()
    check_folders(folder, out, "tuning")
    read = formats.format_of(formats.raw_config(folder), str(folder))
    form = formats.get(format) if format else read
    if form.name != "octavo":
        try:
            form.require(check(folder, trust_remote_code=trust_remote_code).layouts)
        except UsageError as error:
            raise UsageError(f"{error}\nTune it with --format octavo, which holds all that Octavo reads.") from error
    work = prepare_work(out, resume, force_new, reporter.note)
    with io.disk_errors(work), io.FolderLock(work), no_litter(work):
        source = resolve(reference, trust_remote_code=trust_remote_code, work=work / "source")
        stop = stop or (lambda: False)
        if read.name != "octavo":
            reporter.emit("phase", f"reading {folder.name} ({read.name})")
            own = work / "read" / folder.resolve().name
            # Always anew: a failed job may have left another folder's, and a resume must see if this one has changed.
            shutil.rmtree(own.parent, ignore_errors=True)
            own.parent.mkdir()
            rewrite(resolve(folder, trust_remote_code=trust_remote_code), own, work, formats.get("octavo"))
            folder = own
        return tune_into(out, folder, source, settings, work, reporter, stop, form=form, keep_work=keep_work)


def tune_into(
    out: Path,
    quantized: Path,
    reference: ModelSource,
    options: TuneOptions,
    work: Path,
    reporter: Reporter,
    stop: Callable[[], bool],
    *,
    form: Format,
    keep_work: bool,
) -> TuneReport:
    """:func:`tune` with its state in the folder ``work``, which the caller holds the lock of; resumes what is there.

    ``quantized`` is of Octavo's format, ``out`` will be of ``form``. The notes of ``reporter``, earlier ones included,
    stand in the report.
    """
    began = time.perf_counter()
    reporter.emit("phase", f"reading {quantized.name} and {reference.name}")
    formats.verify(quantized)
    source = resolve(quantized, trust_remote_code=reference.trust_remote_code)
    original = Original(reference)
    config = formats.check(quantized)
    form.require(config.layouts)
    original.check(source, config)
    tokens = choose_windows(original, options)
    student = Student(source, options.train, options.place())
    parameters = sum(p.numel() for p in student.tuned.values())
    store = Store(work, _identity(quantized, original, tokens, options))
    begun = store.exists()
    if begun:
        store.resume()
        for text in store.notes:
            reporter.note(text)
    tuning = Tuning(options, student, store, tokens, reporter.emit, stop, began)
    state, clock = tuning.state, tuning.clock
    if os.path.lexists(out) and not state.finished(options.patience):
        raise UsageError(already_there(out))
    if not begun:
        states = tokens.ids.numel() * original.config.get_text_config().hidden_size * 4
        size = sum(path.stat().st_size for path in quantized.iterdir())
        # Parameters with two moments, in the state before and in this one.
        io.require_space(out.parent, states + 6 * 4 * parameters + size, "the job (output and work)")
        store.create()
    clock.seconds["open"] = time.perf_counter() - began
    tuning.run(original)
    best_step, kl_after = state.best
    outcome: dict[str, Any] = {
        "steps": state.step,
        "best_step": best_step,
        "tokens": state.step * tuning.size * tokens.ids.shape[1],
        "kl_before": state.history[0][1],
        "kl_after": kl_after,
    }
    reporter.emit("phase", f"writing and verifying {out}")
    with clock.phase("write"):
        tuned = {
            **outcome,
            "train": list(options.train),
            "lr": options.lr,
            "seed": options.seed,
            "calibration": {"tokens": int(tokens.ids.numel()), "sha256": tokens.sha256},
            "reference": reference.name,
        }
        if "tuned" in config.details:
            tuned["before"] = config.details["tuned"]
        heads = [config.head.module] if config.head else []
        dense = [name for name in original.dense_layers() if name not in (*config.layouts, *heads)]
        details = config.details | {"tuned": tuned}
        contents = Contents(form, config.layouts, config.method, details, dense, original.ties(), config.head)
        if best_step > 0:
            student.set_values(store.get_tensors(state.objects["best"]))
        file_bytes = write_output(out, work, source, student.stored(at_start=best_step == 0), contents)
    if not keep_work:
        store.remove()
    layouts = config.layouts.values()
    return TuneReport(
        model=source.name,
        reference=reference.name,
        output=str(out),
        **outcome,
        held_out_tokens=tuning.held_out * tokens.ids.shape[1],
        token_hash=tokens.sha256,
        parameters=parameters,
        history=tuple((step, kl) for step, kl in state.history),
        bits_per_weight=sum(x.bits() for x in layouts) / sum(x.weights for x in layouts),
        file_bytes=file_bytes,
        seconds=time.perf_counter() - began,
        phases=dict(clock.seconds),
        peak_bytes=peak_memory(),
        notes=tuple(reporter.notes),
    )


def choose_windows(original: CausalModel, options: TuneOptions) -> Tokens:
    """The windows of text to tune on, the held-out ones first.

    Raises:
        UsageError: too little text, or windows that the model does not allow.
        FormatError: a text or a tokenizer that cannot be read.
    """
    ctx = window_length(options.ctx, original.max_positions)
    text, tokenizer = read_text(options.calib), original.tokenizer()
    where: dict[str, Any] = {"limit": original.max_positions, "source": options.calib}
    samples = options.samples or min(len(windows(tokenizer, text, ctx, **where).ids), _SAMPLES)
    tokens = windows(tokenizer, text, ctx, samples, options.seed, **where)
    held_out = options.held_out or 1
    if samples <= held_out:
        raise UsageError(
            f"{held_out} of {samples} window(s) would be held out, and none is left to train on: use more text, "
            f"--samples above {held_out}, or a --ctx below {ctx}."
        )
    return tokens


def token_identity(tokens: Tokens) -> dict[str, Any]:
    """What a resume must have in common with the job that it continues: of its text."""
    count, ctx = tokens.ids.shape
    return {"samples": count, "ctx": ctx, "tokens": tokens.sha256}


def _identity(quantized: Path, original: Original, tokens: Tokens, options: TuneOptions) -> dict[str, Any]:
    """What a resume must have in common with the job that it continues."""
    settings = {**asdict(options), "train": list(options.train)}
    # Neither changes the numbers by intention; where the bytes come from is said by the hashes.
    for name in ("calib", "samples", "ctx", "device", "checkpoint_every"):
        del settings[name]
    return {
        "octavo": octavo.__version__,
        "quantized": io.sha256_file(quantized / formats.MANIFEST_FILE),
        "reference": original.fingerprint(),
        "calibration": token_identity(tokens),
        "tune": settings,
    }
