"""``octavo study vptq MODEL --out DIR``: VPTQ's ablations on a model, with tables and a plot."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from octavo._core.errors import UsageError
from octavo.cli import _options as options
from octavo.cli._output import (
    JsonOption,
    Output,
    QuietOption,
    RemoteCodeOption,
    ThreadsOption,
    parse_settings,
    use_threads,
)
from octavo.cli._study import Keep, Resume, index_list, numbers, perform, show


def command(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="Local folder, hub id, or .gguf file.")] = None,
    out: Annotated[
        str | None, typer.Option("--out", metavar="DIR", help="Folder for ablation.json, .md and .svg.")
    ] = None,
    redraw: Annotated[
        str | None,
        typer.Option("--redraw", metavar="JSON", help="Only write tables and plot of an ablation.json again."),
    ] = None,
    bits: Annotated[float, typer.Option("--bits", "-b", help="True bits per weight of every row.")] = 2.25,
    parts: Annotated[
        str, typer.Option("--parts", help="Comparisons to make.")
    ] = "vector,residual,outliers,groups,update,tuning",
    vector_lengths: Annotated[str, typer.Option("--vector-lengths", help="Weights per vector.")] = "2,4,6,8",
    outlier_percents: Annotated[
        str, typer.Option("--outlier-percents", help="Columns with a codebook of their own, in percent.")
    ] = "0,1,2,5",
    groups: Annotated[str, typer.Option("--groups", help="Column groups with a codebook each.")] = "1,2,4,8",
    base: Annotated[
        list[str] | None,
        typer.Option("--base", metavar="KEY=VALUE", help="An option of vptq for all rows, value as JSON; repeatable."),
    ] = None,
    tune_settings: Annotated[
        list[str] | None,
        typer.Option("--tune-set", metavar="KEY=VALUE", help="An option of the end-to-end tuning; repeatable."),
    ] = None,
    tune_blocks_settings: Annotated[
        list[str] | None,
        typer.Option("--tune-blocks-set", metavar="KEY=VALUE", help="An option of the block-wise tuning; repeatable."),
    ] = None,
    blocks: Annotated[
        str | None,
        typer.Option(
            "--blocks",
            help="Quantize only so many blocks, spread evenly, or these: 0,15,29 (one: '7,').",
            show_default="all",
        ),
    ] = None,
    text: options.EvaluationText = None,
    calib: options.Calibration = "bundled",
    samples: options.Samples = 32,
    ctx: options.Context = None,
    max_tokens: options.MaxTokens = None,
    seed: options.Seed = 0,
    keep: Keep = False,
    resume: Resume = False,
    threads: ThreadsOption = None,
    trust_remote_code: RemoteCodeOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure what the parts of VPTQ bring: MODEL quantized at the same true bits with one thing changed at a time.

    Vector length, residual codebook, outlier columns, groups, channel-independent update and fine-tuning, each against
    a base row. Every row is saved; a study that was stopped or killed continues with --resume.
    """
    with Output(as_json, quiet) as output:
        if redraw is None and (model is None or out is None):
            missing = "MODEL is missing: what to quantize." if out is not None else "--out is missing: the folder."
            raise UsageError(f"{missing} (--redraw alone wants neither.)")
        values: dict[str, Any] = {
            "parts": tuple(dict.fromkeys(part.strip() for part in parts.split(",") if part.strip())),
            "vector_lengths": numbers("--vector-lengths", vector_lengths, whole=True),
            "outlier_percents": numbers("--outlier-percents", outlier_percents),
            "groups": numbers("--groups", groups, whole=True),
            "base": parse_settings(base or [], "--base"),
            "tune": parse_settings(tune_settings or [], "--tune-set"),
            "tune_blocks": parse_settings(tune_blocks_settings or [], "--tune-blocks-set"),
            "blocks": None if blocks is None else index_list("--blocks", blocks),
        }
        from octavo.report import ablation_study

        use_threads(threads)
        if redraw is not None:
            _show(output, ablation_study.redraw(redraw, out))
            return
        assert model is not None and out is not None
        chosen = ablation_study.Options(
            **values,
            bits=bits,
            text=text,
            calib=calib,
            samples=samples,
            ctx=ctx,
            max_tokens=max_tokens,
            seed=seed,
            keep=keep,
            trust_remote_code=trust_remote_code,
        )
        document = perform(
            output, context, ablation_study.run, out, model, chosen, resume=resume, unit="this row, block or step"
        )
        _show(output, document)


def _show(output: Output, document: dict[str, Any]) -> None:
    from octavo.report import ablation_tables as tables

    show(output, document, tables.tables(document), tables.left_out(document), tables.about(document))
