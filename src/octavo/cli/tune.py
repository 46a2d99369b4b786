"""``octavo tune QUANTIZED OUT --reference ORIGINAL``: everything but the indices, trained end to end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from octavo.cli import _options as options
from octavo.cli._output import (
    JsonOption,
    Output,
    QuietOption,
    RemoteCodeOption,
    ThreadsOption,
    quiet_libraries,
    resumable,
    size,
    use_threads,
)
from octavo.cli.quantize import costs, tuning_facts

if TYPE_CHECKING:
    from octavo.pipeline.tune import TuneReport


def command(
    context: typer.Context,
    quantized: Annotated[
        str, typer.Argument(metavar="QUANTIZED", help="Folder of a quantized model, Octavo's or VPTQ's.")
    ],
    out: options.NewFolder,
    reference: Annotated[
        str, typer.Option("--reference", metavar="MODEL", help="The original model: folder, hub id, or .gguf file.")
    ],
    format: Annotated[
        options.FileFormat | None,
        typer.Option("--format", help="Of the result's files.", show_default="the one of QUANTIZED"),
    ] = None,
    calib: options.Calibration = "bundled",
    samples: Annotated[
        int | None, typer.Option("--samples", min=2, help="Windows of text.", show_default="what there is, at most 128")
    ] = None,
    ctx: options.Context = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Optimizer steps.", show_default="one pass over the text")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option("--minutes", help="Limit for the whole job; steps are chosen to fit.")
    ] = None,
    batch_tokens: Annotated[int, typer.Option("--batch-tokens", min=1, help="Tokens per step.")] = 1024,
    lr: Annotated[float, typer.Option("--lr", help="Learning rate relative to the size of each tensor.")] = 6e-3,
    train: Annotated[
        str, typer.Option("--train", metavar="PARTS", help="What moves: books, scales, biases, norms.")
    ] = "books,scales,biases,norms",
    weight_decay: Annotated[float, typer.Option("--weight-decay", help="Of AdamW.")] = 0.0,
    held_out: Annotated[
        int | None,
        typer.Option("--held-out", min=1, help="Windows to measure on.", show_default="an eighth, at most 8"),
    ] = None,
    eval_every: Annotated[
        int | None,
        typer.Option("--eval-every", min=1, help="Steps between measurements.", show_default="an eighth of all"),
    ] = None,
    patience: Annotated[
        int, typer.Option("--patience", min=1, help="Measurements without improvement before it stops.")
    ] = 3,
    seed: options.Seed = 0,
    device: Annotated[
        str, typer.Option("--device", help="cpu, cuda, cuda:1, ..; auto is a GPU if there is one.")
    ] = "auto",
    checkpoint_every: Annotated[
        int | None,
        typer.Option("--checkpoint-every", min=1, help="Steps between saved states.", show_default="2 minutes"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the unfinished job of OUT.")] = False,
    force_new: Annotated[
        bool, typer.Option("--force-new", help="Set an unfinished job of OUT aside and start again.")
    ] = False,
    keep_work: Annotated[bool, typer.Option("--keep-work", help="Keep the work folder OUT.work.")] = False,
    threads: ThreadsOption = None,
    trust_remote_code: RemoteCodeOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train codebooks, scales, biases and norms of QUANTIZED towards the original's logits; the size stays the same.

    What measures best on held-out text is written to the folder OUT, so it is never worse there than QUANTIZED. A job
    that was interrupted or killed continues with --resume and gives the same bytes.
    """
    with Output(as_json, quiet) as output:
        from octavo.pipeline.tune import tune

        use_threads(threads)
        quiet_libraries()
        with resumable(output, context, "this step") as stop:
            report = tune(
                quantized,
                out,
                reference=reference,
                format=format.value if format else None,
                resume=resume,
                force_new=force_new,
                keep_work=keep_work,
                trust_remote_code=trust_remote_code,
                progress=output.event,
                stop=stop,
                calib=calib,
                samples=samples,
                ctx=ctx,
                steps=steps,
                minutes=minutes,
                batch_tokens=batch_tokens,
                lr=lr,
                train=train,
                weight_decay=weight_decay,
                held_out=held_out,
                eval_every=eval_every,
                patience=patience,
                seed=seed,
                device=device,
                checkpoint_every=checkpoint_every,
            )
        output.document(report.to_dict())
        show(output, report)


def show(output: Output, report: TuneReport) -> None:
    """The summary of a finished job for people."""
    facts = {
        "written": report.output,
        **tuning_facts(report.to_dict()),
        "bits per weight": f"{report.bits_per_weight:.3f} counting everything, as before",
        "weight files": size(report.file_bytes),
    }
    output.facts(facts | costs(report))
