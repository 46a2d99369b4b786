"""``octavo study dimension [MODEL] --out DIR``: what vectors of more weights bring, with tables and a plot."""

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
    use_threads,
)
from octavo.cli._study import Keep, Resume, index_list, numbers, perform, show


def command(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="Local folder, hub id, or .gguf file.")] = None,
    out: Annotated[
        str | None, typer.Option("--out", metavar="DIR", help="Folder for dimension.json, .md and .svg.")
    ] = None,
    redraw: Annotated[
        str | None,
        typer.Option("--redraw", metavar="JSON", help="Only write tables and plot of a dimension.json again."),
    ] = None,
    dimensions: Annotated[str, typer.Option("--dimensions", help="Weights per vector.")] = "1,2,4,8",
    bits: Annotated[str, typer.Option("--bits", help="Rates R in bits per weight.")] = "2,3,4",
    overhead: Annotated[
        float, typer.Option("--overhead", help="Bits per weight on top of R for codebooks and scales at equal bits.")
    ] = 0.25,
    layers: Annotated[
        str, typer.Option("--layers", help="How many blocks, spread evenly, or their indices: 0,15,29 (one: '7,').")
    ] = "3",
    no_gaussian: Annotated[bool, typer.Option("--no-gaussian", help="Leave out the Gaussian vectors.")] = False,
    no_layers: Annotated[bool, typer.Option("--no-layers", help="Leave out the model's matrices.")] = False,
    no_model: Annotated[bool, typer.Option("--no-model", help="Leave out the quantized models.")] = False,
    method: Annotated[str, typer.Option("--method", "-m", help="Any method with vector_length.")] = "gptvq",
    max_centroids: Annotated[
        int, typer.Option("--max-centroids", help="Larger codebooks are not fitted; their rows say so.")
    ] = 65536,
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
    """Measure how the vectors' dimension lowers the error: on Gaussian vectors, on MODEL's matrices, on MODEL itself.

    Gaussian vectors and matrices are compared with the rate-distortion limit; models of equal true bits by their KL
    divergence from the original. Every row is saved; a study that was stopped or killed continues with --resume.
    """
    with Output(as_json, quiet) as output:
        if redraw is None and out is None:
            raise UsageError("--out is missing: the folder for the results.")
        dropped = {"gaussian": no_gaussian, "layers": no_layers, "model": no_model}
        values: dict[str, Any] = {
            "dimensions": numbers("--dimensions", dimensions, whole=True),
            "bits": numbers("--bits", bits),
            "parts": tuple(part for part, left_out in dropped.items() if not left_out),
            "blocks": index_list("--layers", layers),
        }
        from octavo.report import study

        use_threads(threads)
        if redraw is not None:
            _show(output, study.redraw(redraw, out))
            return
        assert out is not None
        chosen = study.Options(
            **values,
            overhead=overhead,
            method=method,
            max_centroids=max_centroids,
            text=text,
            calib=calib,
            samples=samples,
            ctx=ctx,
            max_tokens=max_tokens,
            seed=seed,
            keep=keep,
            trust_remote_code=trust_remote_code,
        )
        document = perform(output, context, study.run, out, model, chosen, resume=resume, unit="this row or block")
        _show(output, document)


def _show(output: Output, document: dict[str, Any]) -> None:
    from octavo.report.tables import tables

    show(output, document, tables(document))
