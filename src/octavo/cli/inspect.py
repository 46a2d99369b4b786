"""``octavo inspect OUT``: what is in a quantized folder, from its headers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from octavo._core.errors import UsageError, did_you_mean
from octavo.cli import _options as options
from octavo.cli._layouts import COLUMNS, groups, in_words, options_in_words, rows, totals
from octavo.cli._output import JsonOption, Output, size

if TYPE_CHECKING:
    from octavo.formats.native import NativeConfig


def command(
    out: options.Quantized,
    module: Annotated[
        str | None, typer.Option("--module", help="Show the tensors of one matrix, by its full module name.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show layouts in words, index bits and true bits per weight, and bytes. Reads headers only."""
    with Output(as_json) as output:
        from octavo.formats import native
        from octavo.formats.reader import CheckpointReader

        config = native.check(out)
        if module is not None:
            _one(output, out, config, module)
            return
        with CheckpointReader(Path(out), strict=True) as reader:
            file_bytes = sum(path.stat().st_size for path in reader.files)
            files = len(reader.files)
        sums = totals(config.layouts)
        output.document(
            {
                "path": str(out),
                "method": config.method,
                "format_version": config.raw["format_version"],
                "octavo_version": config.raw.get("octavo_version"),
                "details": config.details,
                **sums,
                "quantized_bytes": sums["bytes"],
                "file_bytes": file_bytes,
                "groups": groups(config.layouts),
                "modules": {
                    name: {
                        "layout": in_words(layout),
                        "nominal_bits": layout.nominal_bits,
                        "bits_per_weight": layout.bits_per_weight,
                        "bytes": -(-layout.bits() // 8),
                    }
                    for name, layout in config.layouts.items()
                },
            }
        )
        output.table(COLUMNS, rows(config.layouts), title=f"{out}: {config.method}")
        output.say()
        output.facts(
            {
                "written by": f"Octavo {config.raw.get('octavo_version')}, format {config.raw['format_version']}",
                "bits per weight": f"{sums['bits_per_weight']:.3f} counting everything ({sums['nominal_bits']:.3f} of "
                f"indices), {sums['matrices']} matrices, {sums['weights']:,} weights",
                "weight files": f"{size(file_bytes)} in {files} ({size(sums['bytes'])} quantized, "
                f"{size(file_bytes - sums['bytes'])} kept and headers)",
                **{
                    key: options_in_words(value) if isinstance(value, dict) else str(value)
                    for key, value in config.details.items()
                },
            }
        )


def _one(output: Output, out: str, config: NativeConfig, module: str) -> None:
    if module not in config.layouts:
        raise UsageError(
            f"{out} has no quantized matrix {module!r}.{did_you_mean(module, config.layouts)} "
            "`octavo inspect` without --module lists them."
        )
    layout = config.layouts[module]
    output.document(
        {
            "module": module,
            "words": in_words(layout),
            "layout": layout.to_dict(),
            "nominal_bits": layout.nominal_bits,
            "bits_per_weight": layout.bits_per_weight,
            "bytes": -(-layout.bits() // 8),
            "tensors": {
                name: {"dtype": str(dtype).removeprefix("torch."), "shape": list(shape)}
                for name, (dtype, shape) in layout.tensors().items()
            },
        }
    )
    output.say(f"{module}: {in_words(layout)}")
    output.say(
        f"{layout.bits_per_weight:.3f} bits per weight counting everything ({layout.nominal_bits:.3f} of indices)"
    )
    lines = []
    for name, (dtype, shape) in layout.tensors().items():
        count = dtype.itemsize
        for n in shape:
            count *= n
        share = 8 * count / layout.weights
        lines.append([name, str(dtype).removeprefix("torch."), "x".join(map(str, shape)), size(count), f"{share:.4f}"])
    output.table(("tensor", "dtype", "shape", "bytes", "bits/weight"), lines)
