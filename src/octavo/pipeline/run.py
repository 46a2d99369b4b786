"""Quantize a model block by block: later blocks see the quantized earlier ones, every block is committed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import octavo
from octavo import formats
from octavo._core import io
from octavo._core.config import from_dict, to_dict
from octavo._core.errors import NumericalError, UsageError
from octavo.algorithms import Algorithm
from octavo.algorithms._base import identity_options
from octavo.calibration.data import Tokens, window_length
from octavo.layout import SideDtype
from octavo.models.adapter import CausalModel
from octavo.models.source import resolve
from octavo.pipeline._blocks import BlockWalk, MatrixReport
from octavo.pipeline.block_tune import BlockTuneOptions, BlockTuneReport
from octavo.pipeline.events import Progress, peak_memory
from octavo.pipeline.guide import Guide, Guided, Sensitivity, check_guided
from octavo.pipeline.head import check_plain, head_options
from octavo.pipeline.output import Contents, write_output
from octavo.pipeline.plan import Plan, build_algorithm, calibration, check_size, plan_model, sized, suited
from octavo.pipeline.store import Store, already_there, no_litter, prepare_work
from octavo.pipeline.tune import TuneOptions, TuneReport, choose_windows, token_identity, tune_into


@dataclass(frozen=True)
class Report:
    """The outcome of :func:`quantize`.

    Attributes:
        bits_per_weight: true bits over weights of all quantized matrices.
        file_bytes: size of the output's weight files.
        seconds: wall clock of this run; phases: where it went.
        peak_bytes: largest resident memory of the process.
        notes: warnings that were raised on the way.
        block_tuned: what tuning did to each block, if blocks were tuned.
        tuned: what :class:`octavo.pipeline.tune.TuneReport` says, if the model was tuned.
    """

    model: str
    output: str
    method: str
    bits_per_weight: float
    file_bytes: int
    seconds: float
    phases: dict[str, float]
    peak_bytes: int
    tokens: int
    token_hash: str | None
    matrices: tuple[MatrixReport, ...]
    notes: tuple[str, ...]
    block_tuned: tuple[BlockTuneReport, ...] | None = None
    tuned: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    method: str | None = None,
    bits: float | None = None,
    size: int | None = None,
    preset: str | None = None,
    calib: str | Path = "bundled",
    samples: int = 32,
    ctx: int | None = None,
    seed: int = 0,
    resume: bool = False,
    force_new: bool = False,
    keep_work: bool = False,
    options: Mapping[str, Any] | None = None,
    skip: Sequence[str] = (),
    on_bad_hessian: Literal["error", "rtn"] = "error",
    side_dtype: SideDtype = "float16",
    format: str = "octavo",
    overrides: Mapping[str, float] | None = None,
    head: str | None = None,
    head_bits: float | None = None,
    head_codes: int | None = None,
    head_settings: Mapping[str, Any] | None = None,
    guided: Guided | None = None,
    sensitivity: Sensitivity = "gradients",
    guide: str | Path | None = None,
    catch_up: float | None = None,
    tune_blocks: Mapping[str, Any] | None = None,
    tune: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
) -> Report:
    """Quantize the model to the folder ``out``, which must not exist.

    The job's state lives in ``OUT.work`` until the output has been written, read back and verified; a killed job
    continues with ``resume=True`` and gives the same bytes as an uninterrupted one.

    Args:
        model: local folder, hub id, or .gguf file.
        out: new folder in Hugging Face format.
        method, bits, options, side_dtype: see :mod:`octavo.algorithms`; ``auto`` takes the best that the format can
            hold, 2.25 bits unless told otherwise.
        size: bytes that the weight files may take, in place of bits; the bits per weight follow from it.
        preset: a published setting in place of method and bits; ``options`` change it.
        calib: ``bundled``, a text or jsonl file (or several, comma-separated), or ``datasets:NAME``.
        samples, ctx: calibration windows and tokens per window (1024, or as many as the model allows).
        seed: of all randomness.
        force_new: set an unfinished job aside and start again.
        keep_work: keep the work folder.
        skip: glob patterns of linear layers to leave as they are.
        on_bad_hessian: what to do with a matrix whose statistics are unusable: stop, or quantize it without them.
        format: of the output: ``octavo``, or ``vptq`` for other people's loaders; layouts are chosen within what those
            can read, and whatever they cannot is refused.
        overrides: glob patterns of modules -> bits per weight that they get whatever the others get.
        head: ``vq``: output head and embedding are quantized as well, which ``head_bits`` alone means, too;
            ``vq-logits``: the head becomes ``head_codes`` codewords (2,048) that tokens share, and the embedding stays.
        head_bits: bits of a code per weight of output head and embedding: 1, 1.5, 2, 2.5, 3, 3.5, 4 or 6. Whatever the
            method, they get universal codebooks. A matrix that is both stays one.
        head_codes: with ``head_bits``, codewords beside the rows that choose candidates; see
            :func:`octavo.heads.set_candidates`.
        head_settings: options of the codewords, see :class:`octavo.algorithms.vq_logits.VQLogits`, and ``classes``:
            True gives the head's rows of frequent tokens more bits and the others fewer, at the same size.
        guided: what is decided by what errors cost in the end, found out by one pass of gradients through the original
            (:mod:`octavo.pipeline.guide`): the ``weights`` of the calibration tokens, how ``bits`` are shared out
            between the matrices, ``both`` or ``none``. None: the method decides.
        sensitivity: what bits are shared out by if they are: ``gradients`` of that pass, or the KL measured with
            ``noise`` in one matrix after the other on top of it (:mod:`octavo.pipeline.noise`).
        guide: a file for what that pass found out: read if it is there, written otherwise. Jobs that differ in bits or
            size alone can share one.
        catch_up: how far, 0 to 1, a matrix aims at the original's outputs on the original's inputs, although it reads
            what the quantized blocks before it pass on. None: the method decides.
        tune_blocks: options of the tuning of every block right after its matrices are quantized, see
            :class:`octavo.pipeline.block_tune.BlockTuneOptions`; ``{}`` takes its defaults, None leaves it to the
            method, most of which do without.
        tune: options of a last stage that tunes the quantized model end to end, see
            :class:`octavo.pipeline.tune.TuneOptions`; ``{}`` takes its defaults on the text of ``calib``, None has no
            such stage.
        progress: called with an :class:`Event` for every step.
        stop: asked after every block; True raises Interrupted with everything committed.

    Raises:
        OctavoError: one of its kinds; see :mod:`octavo._core.errors`.
    """
    job = BlockWalk(Path(out), progress, stop or (lambda: False), on_bad_hessian, seed)
    algorithm, form = build_algorithm(method, bits, side_dtype, options, preset, format), formats.get(format)
    tuning = None
    if tune is not None:
        tuning = from_dict(TuneOptions, {"calib": str(calib), "ctx": ctx, "seed": seed, **tune}, "tune")
        tuning.place()
    if tune_blocks is not None or algorithm.block_tuning is not None:
        tune_blocks = {**(algorithm.block_tuning or {}), **(tune_blocks or {})}
    block_options = None if tune_blocks is None else from_dict(BlockTuneOptions, tune_blocks, "tune_blocks")
    wanted = head_options(head, head_bits, head_codes, head_settings)
    guided = algorithm.guided if guided is None else guided
    check_guided(guided, sensitivity)
    if catch_up is not None and not 0 <= catch_up <= 1:
        raise UsageError(f"catch_up wanted 0..1, got {catch_up!r}")
    if on_bad_hessian not in ("error", "rtn"):
        raise UsageError(f"on_bad_hessian wanted 'error' or 'rtn', got {on_bad_hessian!r}")
    if size is not None:
        check_size(bits, preset)
    work = prepare_work(job.out, resume, force_new, job.note)
    with io.disk_errors(work), io.FolderLock(work), no_litter(work), job.clock.phase("total"):
        job.emit("phase", f"reading {model}")
        with job.clock.phase("open"):
            source = resolve(model, revision=revision, trust_remote_code=trust_remote_code, work=work / "source")
            causal = CausalModel(source, skip=skip, with_ends=wanted.ends if wanted else False)
            if tuning is not None:
                choose_windows(causal, tuning)
            ctx = window_length(ctx, causal.max_positions)
            algorithm = suited(algorithm, form, source.dtype)
            if size is not None:
                algorithm = sized(causal, algorithm, form, size, wanted)
            choices: dict[str, Any] = {"form": form, "overrides": overrides, "head": wanted}
            the_plan = plan_model(causal, algorithm, samples, ctx, **choices)
            for warning in the_plan.warnings:
                job.note(warning)
            if os.environ.get("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"):
                job.note("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE is set: on a GPU it makes products inexact; unset it")
            job.catch_up = algorithm.catch_up if catch_up is None else catch_up
            needs_text = algorithm.needs_hessian or guided != "none" or block_options is not None or wanted is not None
            tokens = calibration(causal, str(calib), samples, ctx, seed) if needs_text else None
            if block_options is not None and tokens is not None:
                blocks = len(causal.blocks)
                block_options.check([m.layout for m in the_plan.matrices if m.block < blocks], tokens.ids)
            identity = {
                "octavo": octavo.__version__,
                "method": algorithm.name,
                "options": identity_options(algorithm),
                "model": causal.fingerprint(),
                "calibration": token_identity(tokens) if tokens else None,
                "seed": seed,
                "skip": list(skip),
                "format": form.name,
                "overrides": dict(overrides or {}),
                "guided": guided,
                "sensitivity": sensitivity,
                "catch_up": job.catch_up,
                "tune_blocks": block_options.to_dict() if block_options else None,
                # Not on_bad_hessian: what is committed did not need it, and its error advises to resume with the other.
                **({} if wanted is None else {"head_bits": head_bits, "head": wanted.to_dict()}),
            }
            store = Store(work, identity)
            if store.exists():
                store.resume()
                for note in [*store.notes, *(n for entry in store.state.blocks for n in entry["notes"])]:
                    job.note(note)
                if os.path.lexists(job.out) and len(store.state.blocks) < causal.steps:
                    raise UsageError(already_there(job.out))
            else:
                size = the_plan.file_bytes + the_plan.work_bytes
                if block_options is not None and tokens is not None:
                    numbers = tokens.ids.numel() * causal.config.get_text_config().hidden_size
                    size += block_options.disk_bytes(numbers, counted=algorithm.needs_hessian)
                io.require_space(job.out.parent, size, "the job (output and work)")
                _preflight(causal, the_plan, tokens)
                store.create()
        found = Guide()
        if guided != "none" and tokens is not None:
            file = None if guide is None else Path(guide)
            found = job.guide(causal, algorithm, store, tokens, work, file, sensitivity)
            if guided in ("bits", "both"):
                the_plan = plan_model(causal, algorithm, samples, ctx, importance=found.importance, **choices)
                kl = f"{the_plan.predicted_kl:.4f}"
                job.emit("phase", f"predicted KL per token at {the_plan.bits_per_weight:.3f} bits per weight: {kl}")
            if guided == "bits":
                found.weights.clear()
        job.run_blocks(causal, algorithm, the_plan, store, tokens, found, block_options, wanted)
        finished = job.out if tuning is None else work / "quantized"
        job.emit("phase", f"writing and verifying {finished}")
        with job.clock.phase("write"):
            details = {
                "bits": algorithm.bits,
                "options": to_dict(algorithm),
                "seed": seed,
                "calibration": {"tokens": int(tokens.ids.numel()), "sha256": tokens.sha256} if tokens else None,
                "source": source.name,
                **(block_options.details(store.state.blocks) if block_options else {}),
            }
            layouts = {m.module: m.layout for m in the_plan.matrices}
            # Tuning reads Octavo's own format.
            written = form if tuning is None else formats.get("octavo")
            dense, ties = causal.dense_layers(), causal.ties()
            contents = Contents(written, layouts, algorithm.name, details, dense, ties, the_plan.head)
            file_bytes = write_output(finished, work, source, _tensors(causal, store), contents)
        tuned = None
        if tuning is not None:
            with job.clock.phase("tune"):
                # Its state goes when the work folder goes.
                folder = work / "tuning"
                folder.mkdir(exist_ok=True)
                tuned = tune_into(job.out, finished, source, tuning, folder, job, job.stop, form=form, keep_work=True)
        if not keep_work:
            store.remove()
    return _report(job, source.name, algorithm, the_plan, store, tokens, file_bytes, tuned)


def _tensors(causal: CausalModel, store: Store) -> Iterator[tuple[str, Tensor]]:
    """Everything that the output holds: first what no matrix has, unchanged but for the norms of tuned blocks."""
    norms: dict[str, Tensor] = {}
    for entry in store.state.blocks:
        if names := entry.get("norms"):
            stored = store.get_tensors(entry["object"])
            norms |= {name: stored[name].clone() for name in names}
    for name in causal.kept():
        written = causal.model_name(name)
        yield written, norms[written] if written in norms else causal.reader.read(name)
    for entry in store.state.blocks:
        yield from ((name, tensor) for name, tensor in store.get_tensors(entry["object"]).items() if name not in norms)


def _preflight(causal: CausalModel, the_plan: Plan, tokens: Tokens | None) -> None:
    """What could fail after hours of work: weights not finite or out of the stored dtypes' range, an unusual ending."""
    if causal.ends is not None and tokens is not None:
        few = tokens.ids[:1, :8]
        states = causal.capture_inputs([(few, None)]).hidden[0]
        with causal.ending(few, states) as ending:
            if the_plan.head is not None and the_plan.head.codes:
                check_plain(ending, states.flatten(0, 1), causal.weight(causal.ends.head), causal.source.name)
    parts = {part: the_plan.head.module for part in the_plan.head.matrices} if the_plan.head else {}
    for matrix in the_plan.matrices:
        largest = float(causal.weight(parts.get(matrix.module, matrix.module)).abs().max())
        if matrix.layout.side_dtype == "float16" and largest > torch.finfo(torch.float16).max:
            raise NumericalError(
                f"{matrix.module}: weights up to {largest:.3g} do not fit float16 codebooks and scales; "
                "use --side-dtype bfloat16."
            )


def _report(
    job: BlockWalk,
    model: str,
    algorithm: Algorithm,
    the_plan: Plan,
    store: Store,
    tokens: Tokens | None,
    file_bytes: int,
    tuned: TuneReport | None,
) -> Report:
    """Everything that is known at the end, including blocks of earlier, interrupted runs."""
    stored = [row for entry in store.state.blocks for row in entry["matrices"]]
    rows = [MatrixReport(**row | {"shape": tuple(row["shape"])}) for row in stored]
    block_tuned = [BlockTuneReport(**entry["tuned"]) for entry in store.state.blocks if entry.get("tuned")]
    phases = dict(job.clock.seconds)
    return Report(
        model=model,
        output=str(job.out),
        method=algorithm.name,
        bits_per_weight=the_plan.bits_per_weight,
        file_bytes=tuned.file_bytes if tuned else file_bytes,
        seconds=phases.pop("total"),
        phases=phases,
        peak_bytes=peak_memory(),
        tokens=int(tokens.ids.numel()) if tokens else 0,
        token_hash=tokens.sha256 if tokens else None,
        matrices=tuple(rows),
        notes=tuple(job.notes),
        block_tuned=tuple(block_tuned) or None,
        tuned=tuned.to_dict() if tuned else None,
    )
