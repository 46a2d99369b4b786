"""``octavo eval OUT``: perplexity, divergence from the original, agreement, tasks."""

from __future__ import annotations

from typing import Any

from octavo.cli import _options as options
from octavo.cli._output import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    Output,
    QuietOption,
    RemoteCodeOption,
    ThreadsOption,
    duration,
    quiet_libraries,
    size,
    task_counters,
    with_error,
)


def command(
    model: options.Model,
    text: options.EvaluationText = None,
    ctx: options.Context = None,
    reference: options.Reference = None,
    qa: options.Tasks = None,
    qa_limit: options.TaskLimit = None,
    lm_eval: options.Harness = None,
    max_tokens: options.MaxTokens = None,
    batch_tokens: options.BatchTokens = 4096,
    head_candidates: options.HeadCandidates = None,
    dtype: DtypeOption = None,
    decode: options.DecodeOption = options.Decode.auto,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    trust_remote_code: RemoteCodeOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure a quantized (or any) model: perplexity, and with --reference the distance from the original.

    Standard errors are those over windows: they say how much another text of the same kind may differ.
    """
    with Output(as_json, quiet) as output:
        from octavo.integrations import api

        quiet_libraries()
        result = api.evaluate(
            model,
            text=text,
            ctx=ctx,
            reference=reference,
            max_tokens=max_tokens,
            qa=tuple(qa or ()),
            qa_limit=qa_limit,
            lm_eval=task_names(lm_eval),
            dtype=dtype,
            decode=decode.value,
            device=device,
            threads=threads,
            batch_tokens=batch_tokens,
            head_candidates=head_candidates or 0,
            trust_remote_code=trust_remote_code,
            progress=task_counters(output),
        )
        if result["warning"]:
            output.warn(result["warning"])
        output.document(result)
        output.facts(_facts(result))
        show_tasks(output, [result])


def task_names(text: str | None) -> tuple[str, ...]:
    """Comma-separated names."""
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


def _facts(result: dict[str, Any]) -> dict[str, str]:
    facts = {"model": result["model"]}
    if result["reference"] is not None:
        facts["reference"] = result["reference"]
    facts["text"] = f"{result['text']}, {result['tokens']:,} tokens counted in {result['windows']} windows"
    facts["tokens"] = f"BOS {result['bos']}, first {result['first_tokens']}, hash {result['token_hash'][:12]}"
    facts[f"perplexity at ctx {result['ctx']}"] = with_error(result["perplexity"], result["perplexity_se"])
    if result["kl"] is not None:
        if "reference_perplexity" in result:
            facts["of the reference"] = with_error(result["reference_perplexity"], result["reference_perplexity_se"])
        facts["KL per token"] = (
            f"{with_error(result['kl'], result['kl_se'], 5)} nats (median {result['kl_median']:.5f})"
        )
        facts["same top token"] = with_error(100 * result["top1"], _times(result["top1_se"], 100), 2) + " %"
    if result["bits_per_weight"] is not None:
        facts["bits per weight"] = f"{result['bits_per_weight']:.3f} counting everything"
    original = f" (reference {size(result['reference_file_bytes'])})" if "reference_file_bytes" in result else ""
    facts["weight files"] = size(result["file_bytes"]) + original
    facts["time"] = duration(result["seconds"])
    return facts


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def show_tasks(output: Output, rows: list[dict[str, Any]]) -> None:
    """Tables of the multiple-choice and of the harness results, one line per model and task."""
    lines = [
        [
            f"{row['model']}: {name}",
            str(task["items"]),
            with_error(task["acc"], task["acc_se"]),
            with_error(task["acc_norm"], task["acc_norm_se"]),
            with_error(task["chance"], None),
        ]
        for row in rows
        for name, task in row.get("tasks", {}).items()
    ]
    if lines:
        output.say()
        output.table(("task", "items", "acc", "acc_norm", "chance"), lines)
    lines = [
        [f"{row['model']}: {name}", metric, f"{value:.4f}" if isinstance(value, float) else str(value)]
        for row in rows
        for name, values in row.get("lm_eval", {}).items()
        for metric, value in values.items()
    ]
    if lines:
        output.say()
        output.table(("lm-eval task", "metric", "value"), lines)
