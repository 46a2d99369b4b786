"""The dry run: which matrix gets which layout, and what that will cost in bits, bytes, memory, disk and time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from octavo import algorithms, formats, parallel
from octavo._core.config import to_dict
from octavo._core.errors import UsageError
from octavo.algorithms import Algorithm
from octavo.algorithms._base import MAX_BITS, MIN_BITS
from octavo.algorithms._choose import predicted_distortion
from octavo.calibration.data import Tokens, read_text, window_length, windows
from octavo.formats import Format, HeadLayout
from octavo.layout import Layout, SideDtype
from octavo.models import skeleton
from octavo.models.adapter import CausalModel
from octavo.models.source import resolve
from octavo.pipeline.guide import Sensitivity, check_guided, find
from octavo.pipeline.head import HeadOptions, head_options, plan_head
from octavo.pipeline.output import Contents

#: With fewer, the widest layers lose a tenth and more against plenty of text (docs/quality.md).
_TOKENS_PER_INPUT = 4
AUTO, DEFAULT_BITS = "auto", 2.25
#: How often bits are lowered until the headers fit as well.
_ATTEMPTS = 4
#: A layer that reads what a column-split layer wrote is split along its inputs under tensor parallelism.
_ROW_PARALLEL = ("o_proj", "down_proj", "c_proj", "out_proj", "dense", "wo", "fc2")


@dataclass(frozen=True)
class Matrix:
    """One matrix of the plan; ``bits`` is its size in the files. Head and embedding have the block after the last."""

    module: str
    block: int
    layout: Layout
    bits: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "module": self.module,
            "block": self.block,
            "layout": self.layout.to_dict(),
            "nominal_bits": self.layout.nominal_bits,
            "bits_per_weight": self.bits / self.layout.weights,
            "bytes": -(-self.bits // 8),
        }


@dataclass(frozen=True)
class Plan:
    """The result of :func:`plan`.

    Attributes:
        matrices: every matrix that will be quantized.
        kept: names of the checkpoint tensors that are copied unchanged.
        bits_per_weight: true bits over true weights of all quantized matrices together.
        quantized_bytes, kept_bytes: payload of the output's shards.
        source_bytes: payload of the original.
        memory_bytes: estimated peak of the job; work_bytes: disk that the resumable store takes on top of the output.
        seconds: estimated from a short measurement of this machine.
        head: the output head, if it is no single matrix.
        predicted_kl: KL per token to the original that the measured importances predict; None without them.
        warnings: what a careful person would want to know before starting.
    """

    model: str
    method: str
    options: dict[str, Any]
    matrices: tuple[Matrix, ...]
    kept: tuple[str, ...]
    bits_per_weight: float
    quantized_bytes: int
    kept_bytes: int
    source_bytes: int
    memory_bytes: int
    work_bytes: int
    seconds: float
    head: HeadLayout | None = None
    predicted_kl: float | None = None
    warnings: tuple[str, ...] = field(default=())

    @property
    def file_bytes(self) -> int:
        """Payload of the output: quantized matrices and everything kept."""
        return self.quantized_bytes + self.kept_bytes

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        plain = {k: v for k, v in vars(self).items() if k not in ("matrices", "kept", "warnings", "head")}
        return plain | {
            "file_bytes": self.file_bytes,
            "matrices": [m.to_dict() for m in self.matrices],
            "head": self.head.to_dict() if self.head else None,
            "kept": list(self.kept),
            "warnings": list(self.warnings),
        }


def plan(
    model: str | Path,
    *,
    method: str | None = None,
    bits: float | None = None,
    size: int | None = None,
    preset: str | None = None,
    options: Mapping[str, Any] | None = None,
    skip: Sequence[str] = (),
    samples: int = 32,
    ctx: int | None = None,
    side_dtype: SideDtype = "float16",
    format: str = "octavo",
    overrides: Mapping[str, float] | None = None,
    head: str | None = None,
    head_bits: float | None = None,
    head_codes: int | None = None,
    head_settings: Mapping[str, Any] | None = None,
    guided: str = "none",
    sensitivity: Sensitivity = "gradients",
    guide: str | Path | None = None,
    calib: str | Path = "bundled",
    seed: int = 0,
    tensor_parallel: int = 1,
    trust_remote_code: bool = False,
    revision: str | None = None,
    work: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """Work out a quantization without doing it; reads only configuration and tensor headers, unless guided.

    Args:
        head, head_bits, head_codes, head_settings: as :func:`octavo.quantize` takes them.
        guided: ``bits`` or ``both`` runs the pass of gradients that :func:`octavo.quantize` would run, on the same text
            (``calib``, ``samples``, ``ctx``, ``seed``); bits are shared out as there, and a KL is predicted.
        sensitivity: what bits are shared out by, as :func:`octavo.quantize` takes it.
        guide: a file for what that pass found out, which :func:`octavo.quantize` takes too.
        progress: called with (steps done, steps) of that pass, and then of the noise.

    Raises:
        UsageError: options that do not fit, patterns that match nothing, shapes that ``tensor_parallel`` cannot split.
        FormatError: a checkpoint that is broken or unknown.
    """
    algorithm, form = build_algorithm(method, bits, side_dtype, options, preset, format), formats.get(format)
    check_guided(guided, sensitivity)
    wanted = head_options(head, head_bits, head_codes, head_settings)
    source = resolve(model, revision=revision, trust_remote_code=trust_remote_code, work=work)
    causal = CausalModel(source, skip=skip, with_ends=wanted.ends if wanted else False)
    algorithm = suited(algorithm, form, source.dtype)
    if size is not None:
        check_size(bits, preset)
        algorithm = sized(causal, algorithm, form, size, wanted)
    ctx = window_length(ctx, causal.max_positions)
    importance = None
    if guided in ("bits", "both"):
        tokens = calibration(causal, str(calib), samples, ctx, seed)
        file = None if guide is None else Path(guide)
        found = find(causal, algorithm, tokens, seed, sensitivity=sensitivity, file=file, progress=progress)
        importance = found.importance
    return plan_model(causal, algorithm, samples, ctx, tensor_parallel, form, importance, overrides, wanted)


def calibration(causal: CausalModel, calib: str, samples: int, ctx: int, seed: int) -> Tokens:
    """The calibration windows of a job."""
    text = read_text(calib)
    return windows(causal.tokenizer(), text, ctx, samples, seed, limit=causal.max_positions, source=calib)


def build_algorithm(
    method: str | None,
    bits: float | None,
    side_dtype: SideDtype,
    options: Mapping[str, Any] | None = None,
    preset: str | None = None,
    format: str = "octavo",
) -> Algorithm:
    """The configured method; options repeat neither ``bits`` nor ``side_dtype``, and change those of a preset.

    Method ``auto``, or none, takes the best one that ``format`` can hold: at equal size universal codebooks lose least
    from 1 to 4 bits on every model measured (docs/quality.md), and decode fastest.

    Raises:
        UsageError: unknown names, values out of range, or a preset beside another method or bits.
    """
    given = dict(options or {})
    for name in ("bits", "side_dtype"):
        if name in given:
            raise UsageError(f"option {name!r} has a parameter of its own; do not repeat it among the method's options")
    if preset is not None:
        name, published = algorithms.preset(preset)
        if bits is not None or method not in (None, AUTO, name):
            raise UsageError(f"preset {preset} is method {name} with bits of its own; leave --method and --bits out")
        method, bits, given = name, published.pop("bits"), {**published, **given}
    if method in (None, AUTO):
        method = "vptq" if format == "vptq" else "universal"
    bits = DEFAULT_BITS if bits is None else bits
    return algorithms.get(method)(bits=bits, side_dtype=side_dtype, **given)


def suited(algorithm: Algorithm, form: Format, dtype: torch.dtype) -> Algorithm:
    """The algorithm with the options that a format needs wherever they were left open."""
    return replace(algorithm, **form.options(to_dict(algorithm), dtype))


def plan_model(
    model: CausalModel,
    algorithm: Algorithm,
    samples: int,
    ctx: int,
    tensor_parallel: int = 1,
    form: Format | None = None,
    importance: Mapping[str, float] | None = None,
    overrides: Mapping[str, float] | None = None,
    head: HeadOptions | None = None,
) -> Plan:
    """:func:`plan` for a model that is already open.

    Args:
        importance: what errors of each matrix cost, from :mod:`octavo.pipeline.guide`; bits are then shared out for the
            least predicted KL.
        overrides: glob patterns of modules (as ``skip`` takes them) -> bits per weight that they get whatever the
            others get; of several that match, the last.
    """
    form = form or formats.get("octavo")
    if samples < 1 or ctx < 2:
        raise UsageError(f"samples wanted >= 1 and ctx >= 2, got {samples} and {ctx}")
    if head is not None and not form.holds_embeddings:
        raise UsageError(f"format {form.name} has no place for a quantized head or embedding; leave --head-bits out")
    targets = [(name, i, target) for i in range(len(model.blocks)) for name, target in model.targets(i).items()]
    shapes = [(target.shape, target.bias) for _, _, target in targets]
    costs = None if importance is None else [importance[name] for name, _, _ in targets]
    layouts = _share_out(algorithm, form, [name for name, _, _ in targets], shapes, costs, overrides or {})
    form.require({name: layout for (name, _, _), layout in zip(targets, layouts, strict=True)})
    matrices = [
        Matrix(name, index, layout, form.bits(layout))
        for (name, index, _), layout in zip(targets, layouts, strict=True)
    ]
    if not matrices:
        raise UsageError(f"{model.source.name}: every linear layer is skipped; there is nothing to quantize")
    warnings = _warnings(model, matrices, algorithm, samples * ctx)
    ends = plan_head(model, algorithm, head) if head is not None else None
    if ends is not None:
        matrices += [
            Matrix(name, len(model.blocks), layout, form.bits(layout)) for name, layout in ends.layouts.items()
        ]
    if tensor_parallel != 1:
        # Each rank has embeddings, heads that are embeddings as well, and heads of parts whole.
        whole = set(ends.head.matrices) if ends is not None and ends.head is not None else set[str]()
        if model.ends is not None:
            whole |= {name for name in model.ends.targets if name != model.ends.head or model.ends.tied}
        _check_tensor_parallel([m for m in matrices if m.module not in whole], tensor_parallel)
    weights = sum(m.layout.weights for m in matrices)
    sizes = [m.bits for m in matrices]
    if ends is not None and ends.head is not None:
        weights += ends.head.weights
        sizes.append(ends.head.bits())
    bits = sum(sizes)
    kept = model.kept()
    predicted = None
    if costs is not None:
        predicted = sum(cost * predicted_distortion(layout) for cost, layout in zip(costs, layouts, strict=True))
    flops = _flops(matrices, samples * ctx, algorithm.needs_hessian)
    return Plan(
        model=model.source.name,
        method=algorithm.name,
        options=vars(algorithm).copy(),
        matrices=tuple(matrices),
        kept=tuple(kept),
        bits_per_weight=bits / weights,
        quantized_bytes=sum(-(-size // 8) for size in sizes),
        kept_bytes=_kept_bytes(model, form),
        source_bytes=model.reader.total_bytes,
        memory_bytes=_memory(model, matrices, samples * ctx, algorithm.needs_hessian),
        work_bytes=bits // 8
        + (_hidden_bytes(model, samples * ctx) * 3 if algorithm.needs_hessian or head is not None else 0),
        seconds=flops / _measured_flops(),
        head=ends.head if ends else None,
        predicted_kl=predicted,
        warnings=tuple(warnings),
    )


def _share_out(
    algorithm: Algorithm,
    form: Format,
    names: Sequence[str],
    shapes: Sequence[tuple[tuple[int, int], bool]],
    costs: Sequence[float] | None,
    overrides: Mapping[str, float],
) -> list[Layout]:
    """The layouts of all matrices: those with bits of their own first, the others within what is left of the budget."""

    def allowed(layout: Layout) -> bool:
        return not form.refusals(layout)

    fixed: dict[int, float] = {}
    for pattern, bits in overrides.items():
        found = [i for i, name in enumerate(names) if skeleton.matches(name, pattern)]
        if not found:
            raise UsageError(f"--bits-of {pattern}={bits:g}: no quantized matrix is called so; {names[0]} is one.")
        fixed |= dict.fromkeys(found, bits)
    layouts: dict[int, Layout] = {}
    for i, bits in fixed.items():
        layouts[i] = replace(algorithm, bits=bits).layouts([shapes[i]], allowed, form.bits)[0]
    rest = [i for i in range(len(names)) if i not in fixed]
    budget = math.floor(algorithm.bits * sum(out * inp for (out, inp), _ in shapes))
    budget -= sum(form.bits(layout) for layout in layouts.values())
    shared = algorithm.layouts(
        [shapes[i] for i in rest],
        allowed,
        form.bits,
        None if costs is None else [costs[i] for i in rest],
        budget,
    )
    layouts |= dict(zip(rest, shared, strict=True))
    return [layouts[i] for i in range(len(names))]


def check_size(bits: float | None, preset: str | None) -> None:
    """Refuse a size beside what would contradict it.

    Raises:
        UsageError: bits or a preset are given as well.
    """
    if bits is not None or preset is not None:
        raise UsageError("--size decides the bits per weight; leave --bits and --preset out")


def sized(
    model: CausalModel, algorithm: Algorithm, form: Format, target_bytes: int, head: HeadOptions | None = None
) -> Algorithm:
    """The algorithm with the bits per weight that make weight files of at most ``target_bytes``, ends included.

    Raises:
        UsageError: a method of whole bits, or a size that cannot be met.
    """
    if not algorithm.counts_all_bits:
        raise UsageError(
            f"--size wants a method that can share bits out; {algorithm.name} has the same whole number for all. Use "
            "--method auto, universal, vptq, gptvq or jlcm."
        )
    targets = {name: target for i in range(len(model.blocks)) for name, target in model.targets(i).items()}
    if not targets:
        raise UsageError(f"{model.source.name}: every linear layer is skipped; there is nothing to quantize")
    shapes = [(target.shape, target.bias) for target in targets.values()]
    weights = sum(out * inp for (out, inp), _ in shapes)
    kept, ends = _kept_bytes(model, form), {}
    if head is not None:
        planned = plan_head(model, algorithm, head)
        ends = planned.layouts
        kept += sum(-(-form.bits(layout) // 8) for layout in ends.values())
        if planned.head is not None:
            # Its three tensors have headers as well.
            kept += planned.head.bits() // 8 + 3 * (len(planned.head.module) + 96)
    # Matrices are padded to whole bytes each; headers depend on the layouts, and those on the bits.
    overhead = kept + len(targets) + _header_bytes(model, dict.fromkeys(targets) | ends)
    for _ in range(_ATTEMPTS):
        bits = 8 * (target_bytes - overhead) / weights
        if not MIN_BITS <= bits <= MAX_BITS:
            break
        algorithm = replace(algorithm, bits=bits)
        layouts = algorithm.layouts(shapes, lambda layout: not form.refusals(layout), form.bits)
        headers = _header_bytes(model, dict(zip(targets, layouts, strict=True)) | ends)
        total = kept + headers + sum(-(-form.bits(layout) // 8) for layout in layouts)
        if total <= target_bytes:
            return algorithm
        overhead += total - target_bytes
    stay = "" if head else ", which stay as they are without --head-bits"
    raise UsageError(
        f"--size {target_bytes:,} bytes cannot be met by {algorithm.name}: {kept:,} bytes are embeddings, head and "
        f"norms{stay}, and {weights:,} weights take {MIN_BITS:g} to {MAX_BITS:g} bits each. Try "
        f"{int(kept + 1.5 * weights / 8):,} to {int(kept + 4.5 * weights / 8):,}, or another method."
    )


def _kept_bytes(model: CausalModel, form: Format) -> int:
    """Payload of the tensors that are not quantized."""
    stored = {model.model_name(name): model.reader.bytes(name) for name in model.kept()}
    return sum(stored.values()) + Contents(form, {}, "", ties=model.ties()).twin_bytes(stored)


def _header_bytes(model: CausalModel, layouts: Mapping[str, Layout | None]) -> int:
    """At most so many bytes of safetensors headers: names, and 88 characters for dtype, shape and offsets each.

    Of a matrix without layout there is only the tensor of its indices.
    """
    tensors = {name: layout.tensors() if layout else ("indices",) for name, layout in layouts.items()}
    names = [f"{name}.{key}" for name, keys in tensors.items() for key in keys]
    names += [model.model_name(name) for name in model.kept()]
    return sum(len(name.encode()) + 88 for name in names) + 64


def _check_tensor_parallel(matrices: Sequence[Matrix], ways: int) -> None:
    if ways < 1:
        raise UsageError(f"--tensor-parallel wanted >= 1, got {ways}")
    bad = []
    for matrix in matrices:
        by_inputs = matrix.module.rsplit(".", 1)[-1] in _ROW_PARALLEL
        if reason := parallel.why_not(matrix.layout, parallel.COLUMNS if by_inputs else parallel.ROWS, ways):
            bad.append(f"{matrix.module} ({reason})")
    if bad:
        raise UsageError(
            f"--tensor-parallel {ways} cannot split {len(bad)} matrices: {', '.join(bad[:4])}"
            f"{', ..' if len(bad) > 4 else ''}. Choose a number of ranks that divides them, or smaller units, such as "
            "--set block=64 for Hadamard blocks."
        )


def _warnings(model: CausalModel, matrices: Sequence[Matrix], algorithm: Algorithm, tokens: int) -> list[str]:
    notes = list(model.notes)
    bits = sum(m.bits for m in matrices) / sum(m.layout.weights for m in matrices)
    if algorithm.counts_all_bits and bits > algorithm.bits:
        worst = max(matrices, key=lambda m: m.bits / m.layout.weights)
        notes.append(
            f"the matrices are too small for {algorithm.bits} bits per weight with these options: {bits:.3f} in all, "
            f"up to {worst.bits / worst.layout.weights:.2f} ({worst.module} {worst.layout.shape})"
        )
    widest = max(m.layout.shape[1] for m in matrices)
    if algorithm.needs_hessian and tokens < widest:
        notes.append(
            f"{tokens} calibration tokens are fewer than the widest layer's {widest} inputs: its Hessian is rank "
            "deficient and leans on damping; raise --samples or --ctx"
        )
    elif algorithm.needs_hessian and tokens < _TOKENS_PER_INPUT * widest:
        notes.append(
            f"{tokens} calibration tokens are fewer than {_TOKENS_PER_INPUT} for each of the widest layer's {widest} "
            "inputs: codes would partly fit what is chance in them; raise --samples or --ctx"
        )
    return notes


def _hidden_bytes(model: CausalModel, tokens: int) -> int:
    return tokens * model.config.get_text_config().hidden_size * 4


def _memory(model: CausalModel, matrices: Sequence[Matrix], tokens: int, hessians: bool) -> int:
    """Interpreter and libraries, one block in float32 twice, hidden states twice, Hessians and their factors."""
    per_block: dict[int, int] = {}
    for m in matrices:
        per_block[m.block] = per_block.get(m.block, 0) + 4 * m.layout.weights
    total = 500_000_000 + 2 * max(per_block.values())
    if hessians:
        widths = {m.layout.shape[1] for m in matrices}
        total += 2 * _hidden_bytes(model, tokens)
        total += sum(4 * w * w for w in widths) + 5 * 4 * max(widths) ** 2
        total += model.embedding_bytes
    return total


def _flops(matrices: Sequence[Matrix], tokens: int, hessians: bool) -> float:
    total = 0.0
    for m in matrices:
        out, inp = m.layout.shape
        total += sum(out * inp * (2 << b) for b in m.layout.stages) * (22 if m.layout.codebook_dtype != "grid" else 0)
        if hessians:
            total += 2 * 2.0 * out * inp * tokens + out * inp * inp + inp**3
    if hessians:
        # Layers that read the same input share a Hessian; about 4 of 7 matrices own one.
        total += sum(2.0 * m.layout.shape[1] ** 2 * tokens for m in matrices) * 4 / 7
    return total


def _measured_flops() -> float:
    """Float32 matrix-product speed of this machine in operations per second, from about 0.1 s of work."""
    a = torch.rand(512, 512)
    torch.mm(a, a)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < 0.1:
        torch.mm(a, a)
        count += 1
    # A job reaches about half of the peak: small products, memory-bound passes, Python.
    return 0.5 * count * 2 * 512**3 / (time.perf_counter() - start)
