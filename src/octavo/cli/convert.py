"""``octavo convert IN OUT --to vptq``: a quantized folder in another format."""

from __future__ import annotations

from typing import Annotated

import typer

from octavo.cli import _options as options
from octavo.cli._output import JsonOption, Output, RemoteCodeOption, quiet_libraries, size


def command(
    source: Annotated[str, typer.Argument(metavar="IN", help="Folder of a quantized model, Octavo's or VPTQ's.")],
    out: options.NewFolder,
    to: Annotated[options.FileFormat, typer.Option("--to", help="The format to write.")] = options.FileFormat.vptq,
    trust_remote_code: RemoteCodeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a quantized model in another format; indices stay, and what has to be rounded is said.

    What the vptq package could not read is refused with the reason and the nearest settings that it can.
    """
    with Output(as_json) as output:
        from octavo.pipeline import convert

        quiet_libraries()
        report = convert.convert(source, out, to.value, trust_remote_code=trust_remote_code)
        output.document(report.to_dict())
        if report.rounded:
            weights = (
                f"{report.rounded} matrices are rounded to the format's dtype; their weights change by "
                f"{report.rounding:.1e} (root mean square, relative)"
            )
        else:
            weights = "all weights as before, bit for bit"
        output.facts(
            {
                "written": report.output,
                "format": f"{report.format} (before: {report.format_before}), {report.matrices} matrices",
                "weights": weights,
                "bits per weight": f"{report.bits_per_weight:.3f} counting everything (before: "
                f"{report.bits_before:.3f})",
                "weight files": size(report.file_bytes),
            }
        )
