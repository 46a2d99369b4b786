"""``octavo plan MODEL``: what a quantization would give and cost, without doing it."""

from __future__ import annotations

from typing import Annotated

import typer

from octavo.cli import _options as options
from octavo.cli._layouts import COLUMNS, groups, options_in_words, rows, totals
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
    size,
    use_threads,
)


def command(
    model: options.Model,
    method: options.Method = None,
    bits: options.Bits = None,
    target: options.Size = None,
    bits_of: options.BitsOf = None,
    head: options.HeadOption = None,
    head_bits: options.HeadBits = None,
    head_codes: options.HeadCodes = None,
    head_settings: options.HeadSettings = None,
    guided: options.GuidedOption = None,
    sensitivity: options.SensitivityOption = options.Sensitivity.gradients,
    guide: options.GuideFile = None,
    calib: options.Calibration = "bundled",
    seed: options.Seed = 0,
    preset: options.Preset = None,
    samples: options.Samples = 32,
    ctx: options.Context = None,
    skip: options.Skip = None,
    side_dtype: options.Side = options.SideDtype.float16,
    format: options.Format = options.FileFormat.octavo,
    settings: options.Settings = None,
    tensor_parallel: Annotated[
        int, typer.Option("--tensor-parallel", min=1, help="Check that N ranks can split every matrix.")
    ] = 1,
    threads: ThreadsOption = None,
    revision: RevisionOption = None,
    trust_remote_code: RemoteCodeOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show what `octavo quantize` with the same options would do: layouts, true bits, bytes, memory, disk, time.

    Reads configuration and tensor headers only, unless --guided bits asks for the pass of gradients, which predicts the
    KL as well.
    """
    with Output(as_json, quiet) as output:
        algorithm_options = parse_settings(settings or [])
        from octavo.pipeline.plan import plan as make_plan

        use_threads(threads)
        quiet_libraries()
        plan = make_plan(
            model,
            method=method,
            bits=bits,
            size=parse_size(target),
            overrides=parse_bits_of(bits_of),
            head=head.value if head else None,
            head_bits=head_bits,
            head_codes=head_codes,
            head_settings=parse_settings(head_settings or [], "--head-set"),
            guided=guided.value if guided else "none",
            sensitivity=sensitivity.value,
            guide=guide,
            calib=calib,
            seed=seed,
            progress=output.counter("what errors cost"),
            preset=preset,
            options=algorithm_options,
            skip=tuple(skip or ()),
            samples=samples,
            ctx=ctx,
            side_dtype=side_dtype.value,
            format=format.value,
            tensor_parallel=tensor_parallel,
            trust_remote_code=trust_remote_code,
            revision=revision,
        )
        layouts = {matrix.module: matrix.layout for matrix in plan.matrices}
        sizes = {matrix.module: matrix.bits for matrix in plan.matrices}
        for warning in plan.warnings:
            output.warn(warning)
        output.document(
            {**plan.to_dict(), "groups": groups(layouts, sizes), "nominal_bits": totals(layouts)["nominal_bits"]}
        )
        output.table(
            COLUMNS, rows(layouts, sizes), title=f"{plan.model}: {plan.method}, {options_in_words(plan.options)}"
        )
        output.say()
        kl = {} if plan.predicted_kl is None else {"predicted KL": f"{plan.predicted_kl:.4f} per token"}
        output.facts(
            {
                "bits per weight": f"{plan.bits_per_weight:.3f} counting everything "
                f"({totals(layouts)['nominal_bits']:.3f} of indices), {len(layouts)} matrices",
                **kl,
                "weight files": f"{size(plan.file_bytes)} ({size(plan.quantized_bytes)} quantized, "
                f"{size(plan.kept_bytes)} of {len(plan.kept)} tensors kept); original {size(plan.source_bytes)}",
                "memory": f"about {size(plan.memory_bytes)}",
                "work disk": f"about {size(plan.work_bytes)} on top of the output",
                "time": f"about {duration(plan.seconds)} on this machine",
            }
        )
