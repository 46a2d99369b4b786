"""``octavo.evaluate`` and its sibling ``compare``: from paths to numbers, in one pass over the text for all models."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from octavo import formats
from octavo._core.errors import FormatError, UsageError
from octavo.calibration.data import EVALUATION, Tokens, read_text, window_length, windows
from octavo.evaluation import harness, zeroshot
from octavo.evaluation.metrics import Metrics
from octavo.evaluation.metrics import evaluate as evaluate_models
from octavo.formats import CheckpointReader
from octavo.heads import set_candidates
from octavo.integrations.transformers import Decode, load
from octavo.models import quantized
from octavo.models.source import resolve

#: What is being done -> (done, total).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class _Source:
    """A model before its weights are loaded."""

    name: str
    folder: Path
    tokenizer: Any
    positions: int | None
    bits_per_weight: float | None


def evaluate(
    path: str | Path,
    text: str | Path | None = None,
    ctx: int | None = None,
    reference: str | Path | None = None,
    *,
    max_tokens: int | None = None,
    qa: Sequence[str | Path] = (),
    qa_limit: int | None = None,
    lm_eval: Sequence[str] = (),
    dtype: str | torch.dtype | None = None,
    decode: Decode = "auto",
    device: str | None = None,
    threads: int | None = None,
    batch_tokens: int = 4096,
    head_candidates: int = 0,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure one model: perplexity, and with a ``reference`` KL divergence, top-1 agreement and the reference's own.

    Args:
        path: a quantized folder, or any model that ``octavo quantize`` takes.
        text: a text or jsonl file, or None for the bundled evaluation text.
        ctx: tokens per window, None for 1024 or as many as the models allow; the text is cut into windows that are
            scored independently, the tail is dropped.
        reference: the original model.
        max_tokens: use only the first windows of the text that fit.
        qa: jsonl files of multiple-choice items, of each the first ``qa_limit``.
        lm_eval: tasks of lm-evaluation-harness (extra ``eval``).
        dtype: of the computation; None is float32 on a CPU and the checkpoint's own on a GPU.
        decode: see :func:`octavo.load`.
        device: ``cpu``, ``cuda``, ``cuda:1``, ..; None takes a GPU if there is one.
        threads: CPU threads of torch and of the C++ library; None leaves them as they are.
        batch_tokens: tokens per forward pass.
        head_candidates: see :func:`octavo.heads.set_candidates`.

    Returns:
        A JSON-able dictionary: the fields of :class:`~octavo.evaluation.metrics.Metrics`; ``bits_per_weight`` of the
        quantized matrices with all side data (None for a model without); ``file_bytes`` of the weight files and
        ``folder_bytes`` of everything; ``token_hash``, ``bos`` and ``first_tokens`` of the text; ``reference_*`` for
        the reference's own numbers; ``tasks`` and ``lm_eval`` if they were asked for.

    Raises:
        OctavoError: unusable text, model or option; tokenizers that differ; non-finite logits.
    """
    results = compare(
        [path],
        text=text,
        ctx=ctx,
        reference=reference,
        max_tokens=max_tokens,
        qa=qa,
        qa_limit=qa_limit,
        lm_eval=lm_eval,
        dtype=dtype,
        decode=decode,
        device=device,
        threads=threads,
        batch_tokens=batch_tokens,
        head_candidates=head_candidates,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    *originals, own = results.pop("models")
    for original in originals:
        for key in ("perplexity", "perplexity_se", "file_bytes", "tasks", "lm_eval"):
            if key in original:
                results[f"reference_{key}"] = original[key]
    return {**own, **results}


def compare(
    paths: Sequence[str | Path],
    text: str | Path | None = None,
    ctx: int | None = None,
    reference: str | Path | None = None,
    *,
    max_tokens: int | None = None,
    qa: Sequence[str | Path] = (),
    qa_limit: int | None = None,
    lm_eval: Sequence[str] = (),
    dtype: str | torch.dtype | None = None,
    decode: Decode = "auto",
    device: str | None = None,
    threads: int | None = None,
    batch_tokens: int = 4096,
    head_candidates: int = 0,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure several models on the same tokens; arguments as for :func:`evaluate`.

    Returns:
        What they share (``token_hash``, ``ctx``, ``bos``, ..) and ``models``: one dictionary each, the reference first.

    Raises:
        FormatError: tokenizers turn the text into different tokens; perplexities would not be comparable.
        OctavoError: as for :func:`evaluate`.
    """
    if not paths:
        raise UsageError("nothing to evaluate: no model is given.")
    if threads is not None:
        torch.set_num_threads(threads)
    began = time.perf_counter()
    tasks = [zeroshot.read_task(file, qa_limit) for file in qa]
    if lm_eval:
        harness.require()
    wanted = ([str(reference)] if reference is not None else []) + [str(path) for path in paths]
    sources = [_open(name, trust_remote_code) for name in dict.fromkeys(wanted)]
    positions = min((source.positions for source in sources if source.positions), default=None)
    ctx = window_length(ctx, positions)
    if max_tokens is not None and max_tokens < ctx:
        raise UsageError(f"max_tokens wanted at least one window of ctx = {ctx} tokens, got {max_tokens}.")
    tokens = _tokens(sources, text, ctx, max_tokens, positions)
    where = placement(device, dtype)
    models = {
        source.name: load(source.folder, *where, decode, trust_remote_code=trust_remote_code)[0] for source in sources
    }
    for path in map(str, paths):
        set_candidates(models[path], head_candidates)
    metrics = evaluate_models(
        models,
        tokens.ids,
        str(reference) if reference is not None else None,
        batch_tokens,
        _part(progress, "windows"),
    )
    rows = [
        _describe(source, models[source.name], metrics[source.name])
        | _tasks(source, models[source.name], tasks, batch_tokens, progress)
        | ({"lm_eval": harness.run(models[source.name], source.tokenizer, lm_eval, limit=qa_limit)} if lm_eval else {})
        for source in sources
    ]
    return {
        "reference": str(reference) if reference is not None else None,
        "metric": f"perplexity at ctx {ctx}, {metrics[sources[0].name].convention}",
        "text": tokens.source,
        "ctx": ctx,
        "windows": tokens.ids.shape[0],
        "tokens": metrics[sources[0].name].tokens,
        "token_hash": tokens.sha256,
        "bos": tokens.bos,
        "first_tokens": _first_tokens(sources[0].tokenizer, tokens),
        "dropped_tail": tokens.dropped_tail,
        "threads": torch.get_num_threads(),
        "seconds": time.perf_counter() - began,
        "models": rows,
    }


def positions(path: str | Path, trust_remote_code: bool = False) -> int | None:
    """The longest context that the model was made for (max_position_embeddings), or None if it has no limit."""
    return _open(str(path), trust_remote_code).positions


def _open(name: str, trust_remote_code: bool) -> _Source:
    from transformers import AutoConfig, AutoTokenizer

    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = resolve(name, trust_remote_code=trust_remote_code).folder
    bits = None
    if formats.is_quantized(folder):
        bits = quantized.check(folder, trust_remote_code=trust_remote_code).bits_per_weight
    local = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(folder, **local)
        tokenizer = AutoTokenizer.from_pretrained(folder, **local)
    except (OSError, ValueError, KeyError) as error:
        raise FormatError(f"{folder}: transformers cannot load config or tokenizer: {error}") from error
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return _Source(name, folder, tokenizer, limit, bits)


def _tokens(
    sources: Sequence[_Source], text: str | Path | None, ctx: int, max_tokens: int | None, limit: int | None
) -> Tokens:
    """The text in tokens, the same for all models."""
    spec = str(text) if text is not None else EVALUATION
    content = read_text(spec)
    samples = None if max_tokens is None else max_tokens // ctx
    first, *others = sources
    tokens = windows(first.tokenizer, content, ctx, samples, None, limit=limit, source=spec)
    for other in others:
        found = windows(other.tokenizer, content, ctx, samples, None, limit=limit, source=spec)
        if found.sha256 != tokens.sha256:
            raise FormatError(
                f"{first.name} and {other.name} turn the text into different tokens (hash {tokens.sha256[:12]}, BOS "
                f"{tokens.bos}, against {found.sha256[:12]}, BOS {found.bos}). Their perplexities cannot stand in one "
                "table; compare models that share a tokenizer."
            )
    return tokens


def placement(device: str | None, dtype: str | torch.dtype | None) -> tuple[str | torch.dtype | None, str]:
    """(dtype, device) to load with: a GPU if there is one, float32 on a CPU, else what the checkpoint is stored in.

    Raises:
        UsageError: the device is not there.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    return dtype or (torch.float32 if device == "cpu" else None), device


def _describe(source: _Source, model: nn.Module, metrics: Metrics) -> dict[str, Any]:
    folder = source.folder
    parameter = next(model.parameters())
    measured = metrics.to_dict()
    return {
        "model": source.name,
        **{key: measured.pop(key) for key in ("perplexity", "perplexity_se", "kl", "kl_se", "top1", "top1_se")},
        "bits_per_weight": source.bits_per_weight,
        "file_bytes": sum(path.stat().st_size for path in CheckpointReader(folder).files),
        "folder_bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        **{key: measured[key] for key in ("nll", "nll_se", "nll_gap", "nll_gap_se", "kl_median", "warning")},
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": str(parameter.device),
        "decode": getattr(model, "octavo_decode", None),
    }


def _tasks(
    source: _Source,
    model: nn.Module,
    tasks: Sequence[zeroshot.Task],
    batch_tokens: int,
    progress: Progress | None,
) -> dict[str, Any]:
    if not tasks:
        return {}
    results = {}
    for task in tasks:
        show = _part(progress, f"{task.name} ({source.name})")
        result = zeroshot.evaluate_task(
            model, source.tokenizer, task, batch_tokens=batch_tokens, progress=show, name=source.name
        )
        results[task.name] = result.to_dict()
    return {"tasks": results}


def _part(progress: Progress | None, what: str) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(what, done, total)


def _first_tokens(tokenizer: Any, tokens: Tokens) -> list[list[Any]]:
    """[id, text] of the first five tokens, the place to see a missing or doubled BOS."""
    return [[int(i), tokenizer.convert_ids_to_tokens(int(i))] for i in tokens.ids[0, :5]]
