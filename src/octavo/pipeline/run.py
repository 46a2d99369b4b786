"""Quantize a model block by block: later blocks see the quantized earlier ones, every block is committed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import octavo
from octavo import formats
from octavo._core import io
from octavo._core.config import from_dict, to_dict
from octavo._core.errors import Interrupted, NumericalError, UsageError
from octavo._core.seeds import generator
from octavo.algorithms import Algorithm
from octavo.calibration import capture
from octavo.calibration.data import Tokens, read_text, window_length, windows
from octavo.layout import Layout, SideDtype
from octavo.math.hessian import proxy_loss
from octavo.models.adapter import CausalModel
from octavo.models.source import resolve
from octavo.pipeline.block_tune import BlockTuneOptions, BlockTuner, BlockTuneReport
from octavo.pipeline.events import Clock, Progress, Reporter, peak_memory
from octavo.pipeline.output import Contents, write_output
from octavo.pipeline.plan import Plan, build_algorithm, plan_model, suited
from octavo.pipeline.store import Store, already_there, no_litter, prepare_work
from octavo.pipeline.tune import TuneOptions, TuneReport, choose_windows, token_identity, tune_into
from octavo.weight import VQWeight

#: Sequences per forward pass are chosen so that a batch has about this many tokens.
_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class MatrixReport:
    """What one matrix got: true bits per weight, relative proxy error (None without statistics), seconds."""

    module: str
    shape: tuple[int, int]
    nominal_bits: float
    bits_per_weight: float
    error: float | None
    seconds: float


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
        method, bits, options, side_dtype: see :mod:`octavo.algorithms`; vptq at 2.25 bits unless told otherwise.
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
        tune_blocks: options of the tuning of every block right after its matrices are quantized, see
            :class:`octavo.pipeline.block_tune.BlockTuneOptions`; ``{}`` takes its defaults, None leaves it out.
        tune: options of a last stage that tunes the quantized model end to end, see
            :class:`octavo.pipeline.tune.TuneOptions`; ``{}`` takes its defaults on the text of ``calib``, None has no
            such stage.
        progress: called with an :class:`Event` for every step.
        stop: asked after every block; True raises Interrupted with everything committed.

    Raises:
        OctavoError: one of its kinds; see :mod:`octavo._core.errors`.
    """
    job = _Job(Path(out), progress, stop or (lambda: False), on_bad_hessian, seed)
    algorithm, form = build_algorithm(method, bits, side_dtype, options, preset), formats.get(format)
    tuning = None
    if tune is not None:
        tuning = from_dict(TuneOptions, {"calib": str(calib), "ctx": ctx, "seed": seed, **tune}, "tune")
        tuning.place()
    block_options = None if tune_blocks is None else from_dict(BlockTuneOptions, tune_blocks, "tune_blocks")
    if on_bad_hessian not in ("error", "rtn"):
        raise UsageError(f"on_bad_hessian wanted 'error' or 'rtn', got {on_bad_hessian!r}")
    work = prepare_work(job.out, resume, force_new, job.note)
    with io.disk_errors(work), io.FolderLock(work), no_litter(work), job.clock.phase("total"):
        job.emit("phase", f"reading {model}")
        with job.clock.phase("open"):
            source = resolve(model, revision=revision, trust_remote_code=trust_remote_code, work=work / "source")
            causal = CausalModel(source, skip=skip)
            if tuning is not None:
                choose_windows(causal, tuning)
            ctx = window_length(ctx, causal.max_positions)
            algorithm = suited(algorithm, form, source.dtype)
            the_plan = plan_model(causal, algorithm, samples, ctx, form=form)
            for warning in the_plan.warnings:
                job.note(warning)
            if os.environ.get("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"):
                job.note("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE is set: on a GPU it makes products inexact; unset it")
            needs_text = algorithm.needs_hessian or block_options is not None
            tokens = _calibration(causal, str(calib), samples, ctx, seed) if needs_text else None
            if block_options is not None and tokens is not None:
                block_options.check([m.layout for m in the_plan.matrices], tokens.ids)
            identity = {
                "octavo": octavo.__version__,
                "method": algorithm.name,
                "options": to_dict(algorithm),
                "model": causal.fingerprint(),
                "calibration": token_identity(tokens) if tokens else None,
                "seed": seed,
                "skip": list(skip),
                "format": form.name,
                "tune_blocks": block_options.to_dict() if block_options else None,
                # Not on_bad_hessian: what is committed did not need it, and its error advises to resume with the other.
            }
            store = Store(work, identity)
            if store.exists():
                store.resume()
                for note in [*store.notes, *(n for entry in store.state.blocks for n in entry["notes"])]:
                    job.note(note)
                if os.path.lexists(job.out) and len(store.state.blocks) < len(causal.blocks):
                    raise UsageError(already_there(job.out))
            else:
                size = the_plan.file_bytes + the_plan.work_bytes
                if block_options is not None and tokens is not None:
                    numbers = tokens.ids.numel() * causal.config.get_text_config().hidden_size
                    size += block_options.disk_bytes(numbers, counted=algorithm.needs_hessian)
                io.require_space(job.out.parent, size, "the job (output and work)")
                _preflight(causal, the_plan)
                store.create()
        job.run_blocks(causal, algorithm, the_plan, store, tokens, block_options)
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
            contents = Contents(written, layouts, algorithm.name, details, causal.dense_layers(), causal.ties())
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
    return job.report(source.name, algorithm, the_plan, store, tokens, file_bytes, tuned)


def _calibration(causal: CausalModel, calib: str, samples: int, ctx: int, seed: int) -> Tokens:
    text = read_text(calib)
    return windows(causal.tokenizer(), text, ctx, samples, seed, limit=causal.max_positions, source=calib)


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


def _preflight(causal: CausalModel, the_plan: Plan) -> None:
    """Read every weight once before hours of work: finite, and inside the range of the stored dtypes."""
    for matrix in the_plan.matrices:
        largest = float(causal.weight(matrix.module).abs().max())
        if matrix.layout.side_dtype == "float16" and largest > torch.finfo(torch.float16).max:
            raise NumericalError(
                f"{matrix.module}: weights up to {largest:.3g} do not fit float16 codebooks and scales; "
                "use --side-dtype bfloat16."
            )


class _Job(Reporter):
    """State of one call of :func:`quantize` that is not in the store."""

    def __init__(
        self, out: Path, progress: Progress | None, stop: Callable[[], bool], on_bad_hessian: str, seed: int
    ) -> None:
        super().__init__(progress)
        self.out, self.stop = out, stop
        self.on_bad_hessian, self.seed = on_bad_hessian, seed
        self.clock = Clock()

    # ---------------------------------------------------------------- blocks

    def run_blocks(
        self,
        causal: CausalModel,
        algorithm: Algorithm,
        the_plan: Plan,
        store: Store,
        tokens: Tokens | None,
        block_options: BlockTuneOptions | None = None,
    ) -> None:
        """Quantize all blocks that the store does not have yet."""
        blocks = len(causal.blocks)
        done = len(store.state.blocks)
        if done == blocks:
            return
        hidden, inputs, tuner = [], None, None
        if tokens is not None:
            self.emit("phase", f"calibrating on {tokens.ids.numel()} tokens")
            with self.clock.phase("capture"):
                batches = [(ids, None) for ids in tokens.ids.split(max(_BATCH_TOKENS // tokens.ids.shape[1], 1))]
                inputs = causal.capture_inputs(batches)
                hidden = inputs.hidden
                if block_options is not None:
                    tuner = BlockTuner(causal, tokens.ids, block_options, self.seed)
                    tuner.begin(hidden)
            if store.state.hidden:
                stored = store.get_tensors(store.state.hidden)
                # Copies of their own: matrix products of mapped, unaligned memory may round differently.
                hidden = [stored[f"batch_{i}"].clone() for i in range(len(hidden))]
                if tuner is not None:
                    tuner.restore(stored, len(hidden))
        began, first = time.perf_counter(), done
        for index in range(done, blocks):
            start, noted = time.perf_counter(), len(self.notes)
            layouts = {m.module: m.layout for m in the_plan.matrices if m.block == index}
            with self.clock.phase("load"):
                block = causal.load_block(index)
            kwargs = [k[index] for k in inputs.kwargs] if inputs else []
            mask = inputs.mask if inputs else []
            if tuner is not None:
                with self.clock.phase("forward"):
                    tuner.aim(block, hidden, kwargs, causal.blocks[index])
            weights, rows, norms, tuned = self._quantize_block(
                causal, algorithm, index, block, layouts, hidden, kwargs, mask, tuner
            )
            if tokens is not None and index + 1 < blocks:
                with self.clock.phase("forward"):
                    hidden = capture.forward(block, hidden, kwargs, causal.blocks[index])
            causal.release_block(index)
            with self.clock.phase("commit"):
                tensors = {f"{name}.{key}": t for name, w in weights.items() for key, t in w.tensors.items()}
                rows = [asdict(row) for row in rows]
                entry = {"object": store.put_tensors(tensors | norms), "matrices": rows, "notes": self.notes[noted:]}
                if tuned is not None:
                    entry |= {"tuned": asdict(tuned), "norms": list(norms)}
                last = tokens is None or index + 1 == blocks
                streams = {f"batch_{i}": h for i, h in enumerate(hidden)} | (tuner.states() if tuner else {})
                states = None if last else store.put_tensors(streams)
                store.commit_block(entry, states)
            seconds = time.perf_counter() - start
            eta = (time.perf_counter() - began) / (index + 1 - first) * (blocks - index - 1)
            losses = {"loss_before": tuned.loss_before, "loss_after": tuned.loss_after} if tuned else {}
            self.emit(
                "block", causal.blocks[index], block=index, blocks=blocks, seconds=seconds, eta_seconds=eta, **losses
            )
            if index + 1 < blocks and self.stop():
                raise Interrupted(
                    f"stopped after block {index + 1} of {blocks}, which is committed. Repeat the command with "
                    "--resume to continue; the result will be the same as without the stop."
                )

    def _quantize_block(
        self,
        causal: CausalModel,
        algorithm: Algorithm,
        index: int,
        block: nn.Module,
        layouts: Mapping[str, Layout],
        hidden: list[Tensor],
        kwargs: list[Any],
        mask: list[Tensor | None],
        tuner: BlockTuner | None,
    ) -> tuple[dict[str, VQWeight], list[MatrixReport], dict[str, Tensor], BlockTuneReport | None]:
        """Quantize the matrices of a block, tune it if asked to, and put the decoded values into it.

        Returns:
            The matrices, their reports, the norms that changed by their name in the output, and what tuning did.
        """
        prefix = causal.blocks[index] + "."
        captured = None
        if hidden and algorithm.needs_hessian:
            with self.clock.phase("statistics"):
                names = [name.removeprefix(prefix) for name in layouts]
                captured = capture.collect(
                    block,
                    names,
                    hidden,
                    kwargs,
                    mask,
                    where=causal.blocks[index],
                    allow_unused=self.on_bad_hessian == "rtn",
                )
        weights: dict[str, VQWeight] = {}
        rows: list[MatrixReport] = []
        hessians: dict[int, Tensor | None] = {}
        for name in layouts:
            start = time.perf_counter()
            hessian = None
            if captured is not None:
                accumulator = captured.hessians[name.removeprefix(prefix)]
                # q/k/v (and gate/up) share an accumulator: one matrix for all of them, one check.
                if id(accumulator) not in hessians:
                    hessians = {id(accumulator): self._usable(accumulator, name)}
                hessian = hessians[id(accumulator)]
            original, bias = causal.weight(name), causal.bias(name)
            with self.clock.phase("quantize"):
                weight = algorithm.quantize(
                    original,
                    layout=layouts[name],
                    hessian=hessian,
                    generator=generator(self.seed, name),
                    bias=bias,
                    name=name,
                )
            with self.clock.phase("decode"):
                decoded = weight.dequantize()
                if not bool(torch.isfinite(decoded).all()):
                    raise NumericalError(
                        f"{name}: the quantized weight decodes to NaN or infinity. This is a bug; please report it."
                    )
                error = proxy_loss(original, decoded, hessian) if hessian is not None else None
                causal.set_weight(block, name, decoded, weight.bias)
            seconds = time.perf_counter() - start
            rows.append(
                MatrixReport(
                    name, weight.layout.shape, weight.layout.nominal_bits, weight.bits_per_weight, error, seconds
                )
            )
            weights[name] = weight
            self.emit(
                "matrix", name, block=index, module=name, bits=weight.bits_per_weight, error=error, seconds=seconds
            )
        if tuner is None:
            return weights, rows, {}, None
        with self.clock.phase("tune blocks"):
            tuned = tuner.tune(index, block, weights, hidden)
        if tuned is None:
            return weights, rows, {}, None
        report = tuned.report
        self.emit(
            "phase",
            f"  tuned in {report.steps} steps: error of the block's output on held-out text {report.loss_before:.5f} "
            f"before, {report.loss_after:.5f} after",
        )
        with self.clock.phase("decode"):
            for position, (name, weight) in enumerate(tuned.weights.items()):
                decoded = weight.dequantize()
                causal.set_weight(block, name, decoded, weight.bias)
                if rows[position].error is not None and captured is not None:
                    hessian = captured.hessians[name.removeprefix(prefix)].matrix()
                    error = proxy_loss(causal.weight(name), decoded, hessian)
                    rows[position] = replace(rows[position], error=error)
        return tuned.weights, rows, tuned.norms, report

    def _usable(self, accumulator: Any, name: str) -> Tensor | None:
        """The Hessian, or None where ``on_bad_hessian`` allows to go on without."""
        if accumulator.bad_tokens:
            self.note(f"{name}: left out {accumulator.bad_tokens} non-finite calibration rows")
        try:
            accumulator.check(name)
        except NumericalError as error:
            if self.on_bad_hessian == "error":
                raise
            self.note(f"{name}: quantized without statistics ({error})")
            return None
        if accumulator.tokens == 0:
            self.note(f"{name}: no calibration token reached it; quantized without statistics")
            return None
        return accumulator.matrix()

    # ---------------------------------------------------------------- report

    def report(
        self,
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
        phases = dict(self.clock.seconds)
        return Report(
            model=model,
            output=str(self.out),
            method=algorithm.name,
            bits_per_weight=the_plan.bits_per_weight,
            file_bytes=tuned.file_bytes if tuned else file_bytes,
            seconds=phases.pop("total"),
            phases=phases,
            peak_bytes=peak_memory(),
            tokens=int(tokens.ids.numel()) if tokens else 0,
            token_hash=tokens.sha256 if tokens else None,
            matrices=tuple(rows),
            notes=tuple(self.notes),
            block_tuned=tuple(block_tuned) or None,
            tuned=tuned.to_dict() if tuned else None,
        )
