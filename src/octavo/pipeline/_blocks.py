"""The walk over the blocks of a model: statistics, quantization, what the next block sees; every block is committed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from octavo._core.errors import Interrupted, NumericalError
from octavo._core.seeds import generator
from octavo.algorithms import Algorithm
from octavo.algorithms.vq_logits import fit
from octavo.calibration import capture
from octavo.calibration.data import Tokens
from octavo.calibration.products import calibration_products
from octavo.formats.head import CLASSES
from octavo.heads import pack_map
from octavo.layout import Layout
from octavo.math.hessian import caught_up, proxy_loss
from octavo.models.adapter import CausalModel
from octavo.pipeline.block_tune import BlockTuneOptions, BlockTuner, BlockTuneReport
from octavo.pipeline.events import Clock, Progress, Reporter
from octavo.pipeline.guide import Guide, Sensitivity, find
from octavo.pipeline.head import HeadOptions, head_algorithm, head_statistics, split, tied_hessian
from octavo.pipeline.plan import Plan
from octavo.pipeline.reorder import load_reordered
from octavo.pipeline.store import Store
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


class BlockWalk(Reporter):
    """State of one call of :func:`quantize` that is not in the store."""

    def __init__(
        self, out: Path, progress: Progress | None, stop: Callable[[], bool], on_bad_hessian: str, seed: int
    ) -> None:
        super().__init__(progress)
        self.out, self.stop = out, stop
        self.on_bad_hessian, self.seed = on_bad_hessian, seed
        self.clock = Clock()
        #: How far targets make up for what earlier blocks lost, and what enters the next block in the original model.
        self.catch_up = 0.0
        self.originals: list[Tensor] = []

    def guide(
        self,
        causal: CausalModel,
        algorithm: Algorithm,
        store: Store,
        tokens: Tokens,
        work: Path,
        file: Path | None,
        sensitivity: Sensitivity = "gradients",
    ) -> Guide:
        """What errors cost, found out now, by the run that is resumed, or by the job that wrote ``file``."""
        if store.state.guide is None:
            if file is None or not file.exists():
                self.emit("phase", f"finding out what errors cost, on {tokens.ids.numel()} tokens")
            with self.clock.phase("gradients"):
                began = last = time.perf_counter()

                def report(done: int, steps: int) -> None:
                    nonlocal last
                    now = time.perf_counter()
                    left = (now - began) / done * (steps - done)
                    self.emit("step", "", step=done, steps=steps, seconds=now - last, eta_seconds=left)
                    last = now

                where: dict[str, Any] = {"sensitivity": sensitivity, "file": file, "folder": work / "gradients"}
                found = find(causal, algorithm, tokens, self.seed, **where, progress=report)
                store.commit_guide(found.put(store))
        assert store.state.guide is not None
        return Guide.get(store, store.state.guide)

    # ---------------------------------------------------------------- blocks

    def run_blocks(
        self,
        causal: CausalModel,
        algorithm: Algorithm,
        the_plan: Plan,
        store: Store,
        tokens: Tokens | None,
        guide: Guide,
        block_options: BlockTuneOptions | None = None,
        head: HeadOptions | None = None,
    ) -> None:
        """Quantize all blocks, and after them head and embedding if asked to, that the store does not have yet."""
        blocks = len(causal.blocks)
        done = len(store.state.blocks)
        if done == causal.steps:
            return
        hidden, inputs, tuner = [], None, None
        if tokens is not None:
            self.emit("phase", f"calibrating on {tokens.ids.numel()} tokens")
            with self.clock.phase("capture"):
                batches = [(ids, None) for ids in tokens.ids.split(max(_BATCH_TOKENS // tokens.ids.shape[1], 1))]
                inputs = causal.capture_inputs(batches)
                hidden = inputs.hidden
                if self.catch_up:
                    self.originals = list(hidden)
                if block_options is not None:
                    tuner = BlockTuner(causal, tokens.ids, block_options, self.seed)
                    tuner.begin(hidden)
            if store.state.hidden:
                stored = store.get_tensors(store.state.hidden)
                # Copies of their own: matrix products of mapped, unaligned memory may round differently.
                hidden = [stored[f"batch_{i}"].clone() for i in range(len(hidden))]
                self.originals = [stored[f"original_{i}"].clone() for i in range(len(self.originals))]
                if tuner is not None:
                    tuner.restore(stored, len(hidden))
        began, first = time.perf_counter(), done
        for index in range(done, blocks):
            start, noted = time.perf_counter(), len(self.notes)
            layouts = {m.module: m.layout for m in the_plan.matrices if m.block == index}
            kwargs = [k[index] for k in inputs.kwargs] if inputs else []
            with self.clock.phase("load"):
                block = load_reordered(causal, index, algorithm, hidden[:1], kwargs[:1], self.note)
            mask = inputs.mask if inputs else []
            if tuner is not None:
                with self.clock.phase("forward"):
                    tuner.aim(block, hidden, kwargs, causal.blocks[index])
            weights, rows, norms, tuned = self._quantize_block(
                causal, algorithm, index, block, layouts, hidden, kwargs, mask, guide, tuner
            )
            if tokens is not None and index + 1 < causal.steps:
                with self.clock.phase("forward"), calibration_products(causal.source.dtype):
                    hidden = capture.forward(block, hidden, kwargs, causal.blocks[index])
            causal.release_block(index)
            with self.clock.phase("commit"):
                tensors = {f"{name}.{key}": t for name, w in weights.items() for key, t in w.tensors.items()}
                rows = [asdict(row) for row in rows]
                entry = {"object": store.put_tensors(tensors | norms), "matrices": rows, "notes": self.notes[noted:]}
                if tuned is not None:
                    entry |= {"tuned": asdict(tuned), "norms": list(norms)}
                last = tokens is None or index + 1 == causal.steps
                streams = {f"batch_{i}": h for i, h in enumerate(hidden)} | (tuner.states() if tuner else {})
                streams |= {f"original_{i}": h for i, h in enumerate(self.originals)}
                states = None if last else store.put_tensors(streams)
                store.commit_block(entry, states)
            seconds = time.perf_counter() - start
            eta = (time.perf_counter() - began) / (index + 1 - first) * (blocks - index - 1)
            losses = {"loss_before": tuned.loss_before, "loss_after": tuned.loss_after} if tuned else {}
            self.emit(
                "block", causal.blocks[index], block=index, blocks=blocks, seconds=seconds, eta_seconds=eta, **losses
            )
            if index + 1 < causal.steps and self.stop():
                raise Interrupted(
                    f"stopped after block {index + 1} of {blocks}, which is committed. Repeat the command with "
                    "--resume to continue; the result will be the same as without the stop."
                )
        if head is not None and tokens is not None:
            self._quantize_ends(causal, algorithm, the_plan, store, tokens, hidden, head)

    def _quantize_ends(
        self,
        causal: CausalModel,
        algorithm: Algorithm,
        the_plan: Plan,
        store: Store,
        tokens: Tokens,
        hidden: list[Tensor],
        options: HeadOptions,
    ) -> None:
        """Quantize and commit head and embedding, where ``hidden`` left the last block."""
        ends, head, coder = causal.ends, the_plan.head, head_algorithm(algorithm)
        assert ends is not None
        self.emit("phase", "quantizing head and embedding")
        noted, matrix = len(self.notes), causal.weight(ends.head)
        with self.clock.phase("statistics"):
            found = head_statistics(causal, tokens, hidden, head)
            hessian = self._usable(found.hessian, ends.head, coder.shrink)
        if hessian is not None and ends.tied:
            hessian = tied_hessian(hessian)
        tensors: dict[str, Tensor] = {}
        rows: list[MatrixReport] = []
        originals = {name: (causal.weight(name), causal.bias(name)) for name in ends.targets if name != ends.head}
        originals[ends.head] = matrix, causal.bias(ends.head)
        if head is not None:
            assert found.train is not None and found.held_out is not None
            frequent = sum(m.layout.shape[0] for m in the_plan.matrices if m.module == f"{head.module}.{CLASSES[0]}")
            parts, stored = split(head, frequent, matrix, found.train.statistics, tokens.ids, ends.tied)
            originals |= {name: (part, None) for name, part in parts.items()}
            if options.codes is not None:
                with self.clock.phase("fit codewords"):
                    stream = generator(self.seed, f"codewords of {ends.head}")
                    fitted = fit(matrix, found.train, found.held_out, options.codes, stream)
                stored |= {"codes": fitted.codes.bfloat16(), "map": pack_map(fitted.map, head)}
                self.emit(
                    "phase",
                    f"  {head.codes:,} codewords: KL on held-out text {fitted.kl_before:.4f} before their fit, "
                    f"{fitted.kl_after:.4f} after",
                )
            tensors |= {f"{head.module}.{key}": tensor for key, tensor in stored.items()}
        for planned in the_plan.matrices:
            if planned.block < len(causal.blocks):
                continue
            name, start = planned.module, time.perf_counter()
            mine = None if name == ends.embedding else hessian
            original, bias = originals[name]
            with self.clock.phase("quantize"):
                weight = self._quantized(coder, name, planned.layout, original, bias, mine)
            with self.clock.phase("decode"):
                error = proxy_loss(original, self._decoded(weight, name), mine) if mine is not None else None
            rows.append(self._row(name, weight, error, time.perf_counter() - start, planned.block))
            tensors |= {f"{name}.{key}": t for key, t in weight.tensors.items()}
        with self.clock.phase("commit"):
            entry = {"object": store.put_tensors(tensors), "matrices": [asdict(row) for row in rows]}
            store.commit_block(entry | {"notes": self.notes[noted:]}, None)

    def _quantized(
        self,
        algorithm: Algorithm,
        name: str,
        layout: Layout,
        target: Tensor,
        bias: Tensor | None,
        hessian: Tensor | None,
    ) -> VQWeight:
        """Matrix ``name``, or what it is aimed at, in a layout."""
        return algorithm.quantize(
            target,
            layout=layout,
            hessian=hessian,
            generator=generator(self.seed, algorithm.stream(name, layout.shape)),
            bias=bias,
            name=name,
        )

    @staticmethod
    def _decoded(weight: VQWeight, name: str) -> Tensor:
        decoded = weight.dequantize()
        if not bool(torch.isfinite(decoded).all()):
            raise NumericalError(
                f"{name}: the quantized weight decodes to NaN or infinity. This is a bug; please report it."
            )
        return decoded

    def _row(self, name: str, weight: VQWeight, error: float | None, seconds: float, block: int) -> MatrixReport:
        """The report of a finished matrix, which is announced as well."""
        layout, bits = weight.layout, weight.bits_per_weight
        self.emit("matrix", name, block=block, module=name, bits=bits, error=error, seconds=seconds)
        return MatrixReport(name, layout.shape, layout.nominal_bits, bits, error, seconds)

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
        guide: Guide,
        tuner: BlockTuner | None,
    ) -> tuple[dict[str, VQWeight], list[MatrixReport], dict[str, Tensor], BlockTuneReport | None]:
        """Quantize the matrices of a block, tune it if asked to, and put the decoded values into it.

        Returns:
            The matrices, their reports, the norms that changed by their name in the output, and what tuning did.
        """
        prefix = causal.blocks[index] + "."
        captured = None
        if hidden and algorithm.needs_hessian:
            with self.clock.phase("statistics"), calibration_products(causal.source.dtype):
                names = [name.removeprefix(prefix) for name in layouts]
                captured = capture.collect(
                    block,
                    names,
                    hidden,
                    kwargs,
                    mask,
                    where=causal.blocks[index],
                    allow_unused=self.on_bad_hessian == "rtn",
                    weights={n.removeprefix(prefix): guide.weights[n] for n in layouts if n in guide.weights},
                    originals=self.originals,
                )
                self.originals = captured.originals
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
                    hessians = {id(accumulator): self._usable(accumulator, name, algorithm.shrink)}
                hessian = hessians[id(accumulator)]
            original = target = causal.weight(name)
            if hessian is not None and captured is not None and captured.drifts:
                target = caught_up(original, hessian, captured.drifts[name.removeprefix(prefix)], self.catch_up)
            with self.clock.phase("quantize"):
                weight = self._quantized(algorithm, name, layouts[name], target, causal.bias(name), hessian)
            with self.clock.phase("decode"):
                decoded = self._decoded(weight, name)
                error = proxy_loss(original, decoded, hessian) if hessian is not None else None
                causal.set_weight(block, name, decoded, weight.bias)
            rows.append(self._row(name, weight, error, time.perf_counter() - start, index))
            weights[name] = weight
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
                    hessian = captured.hessians[name.removeprefix(prefix)].matrix(algorithm.shrink)
                    error = proxy_loss(causal.weight(name), decoded, hessian)
                    rows[position] = replace(rows[position], error=error)
        return tuned.weights, rows, tuned.norms, report

    def _usable(self, accumulator: Any, name: str, shrink: float) -> Tensor | None:
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
        return accumulator.matrix(shrink)
