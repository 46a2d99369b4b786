"""``octavo quantize MODEL OUT``: the main job."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import typer

from octavo.cli import _options as options
from octavo.cli._output import (
    JsonOption,
    Output,
    QuietOption,
    RemoteCodeOption,
    RevisionOption,
    ThreadsOption,
    duration,
    parse_bits_of,
    parse_settings,
    parse_size,
    quiet_libraries,
    resumable,
    size,
    use_threads,
)

if TYPE_CHECKING:
    from octavo.pipeline.run import Report
    from octavo.pipeline.tune import TuneReport


def command(
    context: typer.Context,
    model: options.Model,
    out: options.NewFolder,
    method: options.Method = None,
    bits: options.Bits = None,
    target: options.Size = None,
    bits_of: options.BitsOf = None,
    head: options.HeadOption = None,
    head_bits: options.HeadBits = None,
    head_codes: options.HeadCodes = None,
    head_settings: options.HeadSettings = None,
    preset: options.Preset = None,
    calib: options.Calibration = "bundled",
    samples: options.Samples = 32,
    ctx: options.Context = None,
    seed: options.Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the unfinished job of OUT.")] = False,
    force_new: Annotated[
        bool, typer.Option("--force-new", help="Set an unfinished job of OUT aside and start again.")
    ] = False,
    keep_work: Annotated[bool, typer.Option("--keep-work", help="Keep the work folder OUT.work.")] = False,
    skip: options.Skip = None,
    side_dtype: options.Side = options.SideDtype.float16,
    on_bad_hessian: Annotated[
        options.BadHessian,
        typer.Option("--on-bad-hessian", help="Matrix with unusable statistics: stop, or quantize it without them."),
    ] = options.BadHessian.error,
    format: options.Format = options.FileFormat.octavo,
    settings: options.Settings = None,
    guided: options.GuidedOption = None,
    sensitivity: options.SensitivityOption = options.Sensitivity.gradients,
    guide: options.GuideFile = None,
    catch_up: Annotated[
        float | None,
        typer.Option(
            "--catch-up",
            min=0.0,
            max=1.0,
            help="How far matrices make up for what earlier blocks lost.",
            show_default="what the method does best with",
        ),
    ] = None,
    tune_blocks: Annotated[
        bool,
        typer.Option("--tune-blocks", help="Tune every block towards its original's output once it is quantized."),
    ] = False,
    tune_blocks_settings: Annotated[
        list[str] | None,
        typer.Option(
            "--tune-blocks-set",
            metavar="KEY=VALUE",
            help="An option of that: steps, batch_tokens, lr, train, held_out, target, rule, neighbours, code_lr; "
            "repeatable.",
        ),
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Tune the result end to end before it is written, as `octavo tune` does.")
    ] = False,
    tune_settings: Annotated[
        list[str] | None,
        typer.Option(
            "--tune-set", metavar="KEY=VALUE", help="An option of the tuning, such as minutes=20; repeatable."
        ),
    ] = None,
    threads: ThreadsOption = None,
    revision: RevisionOption = None,
    trust_remote_code: RemoteCodeOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Quantize MODEL block by block into the folder OUT, which transformers loads.

    A job that was interrupted or killed continues with --resume and gives the same bytes.
    """
    with Output(as_json, quiet) as output:
        algorithm_options = parse_settings(settings or [])
        block_options = parse_settings(tune_blocks_settings or [], "--tune-blocks-set")
        tune_options = parse_settings(tune_settings or [], "--tune-set")
        from octavo.pipeline import run

        use_threads(threads)
        quiet_libraries()
        with resumable(output, context, "this block or step" if tune else "this block") as stop:
            report = run.quantize(
                model,
                out,
                method=method,
                bits=bits,
                size=parse_size(target),
                overrides=parse_bits_of(bits_of),
                head=head.value if head else None,
                head_bits=head_bits,
                head_codes=head_codes,
                head_settings=parse_settings(head_settings or [], "--head-set"),
                preset=preset,
                calib=calib,
                samples=samples,
                ctx=ctx,
                seed=seed,
                resume=resume,
                force_new=force_new,
                keep_work=keep_work,
                options=algorithm_options,
                skip=tuple(skip or ()),
                on_bad_hessian=on_bad_hessian.value,
                side_dtype=side_dtype.value,
                format=format.value,
                guided=guided.value if guided else None,
                sensitivity=sensitivity.value,
                guide=guide,
                catch_up=catch_up,
                tune_blocks=block_options if tune_blocks or block_options else None,
                tune=tune_options if tune or tune_options else None,
                trust_remote_code=trust_remote_code,
                revision=revision,
                progress=output.event,
                stop=stop,
            )
        output.document(report.to_dict())
        show(output, report)


def show(output: Output, report: Report) -> None:
    """The summary of a finished job for people."""
    weights = sum(m.shape[0] * m.shape[1] for m in report.matrices)
    nominal = sum(m.nominal_bits * m.shape[0] * m.shape[1] for m in report.matrices) / weights
    errors = [m.error for m in report.matrices if m.error is not None]
    facts = {
        "written": report.output,
        "method": report.method,
        "bits per weight": f"{report.bits_per_weight:.3f} counting everything ({nominal:.3f} of indices)",
        "weight files": size(report.file_bytes),
    }
    if errors:
        facts["proxy error"] = f"mean {sum(errors) / len(errors):.5f}, worst {max(errors):.5f}"
    if report.block_tuned is not None:
        before, after = (
            fmean(getattr(row, key) for row in report.block_tuned) for key in ("loss_before", "loss_after")
        )
        facts["blocks tuned"] = (
            f"error of a block's output {before:.5f} before, {after:.5f} after, mean of held-out text"
        )
    if report.tuned is not None:
        facts |= tuning_facts(report.tuned)
    output.facts(facts | costs(report))


def tuning_facts(tuned: Mapping[str, Any]) -> dict[str, str]:
    """What tuning has changed, for people."""
    change = 100 * (tuned["kl_after"] / tuned["kl_before"] - 1) if tuned["kl_before"] else 0.0
    return {
        "KL per token": f"{tuned['kl_before']:.5f} before tuning, {tuned['kl_after']:.5f} after ({change:+.1f} %), on "
        f"{tuned['held_out_tokens']:,} held-out tokens",
        "tuned": f"{tuned['parameters']:,} numbers on {tuned['tokens']:,} tokens in {tuned['steps']} steps; step "
        f"{tuned['best_step']} was best",
    }


def costs(report: Report | TuneReport) -> dict[str, str]:
    """Time by phase, longest first, memory, and the number of warnings, for people."""
    phases = sorted(report.phases.items(), key=lambda item: -item[1])
    facts = {
        "time": f"{duration(report.seconds)} ({', '.join(f'{name} {duration(took)}' for name, took in phases)})",
        "peak memory": size(report.peak_bytes),
    }
    return facts | ({"warnings": f"{len(report.notes)}, shown above"} if report.notes else {})
