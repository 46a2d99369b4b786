"""``octavo quantize MODEL OUT``: the main job."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from octavo._core.errors import Interrupted
from octavo.cli import _options as options
from octavo.cli._output import (
    JsonOption,
    Output,
    QuietOption,
    RemoteCodeOption,
    RevisionOption,
    ThreadsOption,
    duration,
    graceful_stop,
    parse_settings,
    quiet_libraries,
    size,
    use_threads,
)

if TYPE_CHECKING:
    from octavo.pipeline.run import Report


def command(
    context: typer.Context,
    model: options.Model,
    out: options.NewFolder,
    method: options.Method = "vptq",
    bits: options.Bits = 2.25,
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
    settings: options.Settings = None,
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
        from octavo.pipeline import run

        use_threads(threads)
        quiet_libraries()
        with graceful_stop(output, "this block") as stop:
            try:
                report = run.quantize(
                    model,
                    out,
                    method=method,
                    bits=bits,
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
                    trust_remote_code=trust_remote_code,
                    revision=revision,
                    progress=output.event,
                    stop=stop,
                )
            except Interrupted as error:
                raise Interrupted(f"{error}\nContinue with: {resume_command(context.obj)}") from error
            except KeyboardInterrupt as error:
                raise Interrupted(
                    f"stopped at once; blocks that were done are kept.\nContinue with: {resume_command(context.obj)}"
                ) from error
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
    facts["time"] = duration(report.seconds) + phases(report.phases)
    facts["peak memory"] = size(report.peak_bytes)
    if report.notes:
        facts["warnings"] = f"{len(report.notes)}, shown above"
    output.facts(facts)


def phases(seconds: dict[str, float]) -> str:
    """``(quantize 1 min 02 s, capture 3.0 s, ..)``, longest first."""
    parts = [f"{name} {duration(took)}" for name, took in sorted(seconds.items(), key=lambda item: -item[1])]
    return f" ({', '.join(parts)})" if parts else ""


def resume_command(arguments: Sequence[str] | None) -> str:
    """The command that continues the one with these ``arguments``."""
    kept = [part for part in arguments or ["quantize", ".."] if part not in ("--resume", "--force-new")]
    return shlex.join(["octavo", *kept, "--resume"])
