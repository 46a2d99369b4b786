"""``octavo compare A B ..``: several models on the same tokens, in one pass."""

from __future__ import annotations

from typing import Annotated, Any

import typer

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
from octavo.cli.evaluate import show_tasks, task_names

COLUMNS = ("model", "bits/weight", "weight files", "perplexity", "KL per token", "same top token %")


def command(
    models: Annotated[list[str], typer.Argument(metavar="MODEL..", help="Quantized folders or any models.")],
    text: options.EvaluationText = None,
    ctx: options.Context = None,
    reference: options.Reference = None,
    qa: options.Tasks = None,
    qa_limit: options.TaskLimit = None,
    lm_eval: options.Harness = None,
    max_tokens: options.MaxTokens = None,
    batch_tokens: options.BatchTokens = 4096,
    dtype: DtypeOption = None,
    decode: options.DecodeOption = options.Decode.auto,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    trust_remote_code: RemoteCodeOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Put several models into one table. Models whose tokenizers disagree about the text are refused."""
    with Output(as_json, quiet) as output:
        from octavo.integrations import api

        quiet_libraries()
        result = api.compare(
            models,
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
            trust_remote_code=trust_remote_code,
            progress=task_counters(output),
        )
        for row in result["models"]:
            if row["warning"]:
                output.warn(f"{row['model']}: {row['warning']}")
        output.document(result)
        show(output, result)
        output.say(f"{duration(result['seconds'])}")


def show(output: Output, result: dict[str, Any]) -> None:
    """The table of a comparison, and what its numbers mean."""
    rows = result["models"]
    output.table(COLUMNS, [_cells(row) for row in rows])
    output.say(
        f"{result['metric']}: {result['tokens']:,} tokens in {result['windows']} windows of {result['text']}, BOS "
        f"{result['bos']}, token hash {result['token_hash'][:12]}. +- is the standard error over windows."
    )
    show_tasks(output, rows)


def _cells(row: dict[str, Any]) -> list[str]:
    top1_se = row["top1_se"]
    return [
        row["model"],
        "-" if row["bits_per_weight"] is None else f"{row['bits_per_weight']:.3f}",
        size(row["file_bytes"]),
        with_error(row["perplexity"], row["perplexity_se"], 2),
        with_error(row["kl"], row["kl_se"], 4),
        "-" if row["top1"] is None else with_error(100 * row["top1"], None if top1_se is None else 100 * top1_se, 1),
    ]
