"""``octavo inspect OUT``: what is in a quantized folder, from its headers."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from octavo._core.errors import UsageError, did_you_mean
from octavo.cli import _options as options
from octavo.cli._layouts import COLUMNS, groups, in_words, options_in_words, rows, totals
from octavo.cli._output import JsonOption, Output, quiet_libraries, size

if TYPE_CHECKING:
    from octavo.formats import HeadLayout, Quantized


def command(
    out: options.Quantized,
    module: Annotated[
        str | None, typer.Option("--module", help="Show the tensors of one matrix, by its full module name.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show layouts in words, index bits and true bits per weight, and bytes. Reads headers only."""
    with Output(as_json) as output:
        from octavo.formats import CheckpointReader
        from octavo.models import quantized

        quiet_libraries()
        config = quantized.check(out)
        if module is not None:
            _one(output, out, config, module)
            return
        with CheckpointReader(Path(out)) as reader:
            file_bytes = sum(path.stat().st_size for path in reader.files)
            files = len(reader.files)
        sizes = {name: matrix.bits() for name, matrix in config.matrices.items()}
        sums = totals(config.layouts, sizes)
        output.document(
            {
                "path": str(out),
                "format": config.format,
                "method": config.method,
                "format_version": config.raw.get("format_version"),
                "octavo_version": _version(config),
                "details": config.details,
                "head": config.head.to_dict() if config.head else None,
                **sums,
                "quantized_bytes": sums["bytes"],
                "file_bytes": file_bytes,
                "groups": groups(config.layouts, sizes),
                "modules": {
                    name: {
                        "layout": in_words(layout),
                        "nominal_bits": layout.nominal_bits,
                        "bits_per_weight": sizes[name] / layout.weights,
                        "bytes": -(-sizes[name] // 8),
                    }
                    for name, layout in config.layouts.items()
                },
            }
        )
        output.table(COLUMNS, rows(config.layouts, sizes), title=f"{out}: {config.method}")
        output.say()
        output.facts(
            {
                "format": _format(config),
                "bits per weight": f"{sums['bits_per_weight']:.3f} counting everything ({sums['nominal_bits']:.3f} of "
                f"indices), {sums['matrices']} matrices, {sums['weights']:,} weights",
                "weight files": f"{size(file_bytes)} in {files} ({size(sums['bytes'])} quantized, "
                f"{size(file_bytes - sums['bytes'])} kept and headers)",
                **({"head": _head(config.head)} if config.head else {}),
                **{
                    key: options_in_words(value) if isinstance(value, dict) else str(value)
                    for key, value in config.details.items()
                },
            }
        )


def _head(head: HeadLayout) -> str:
    """The head in words; its matrices stand among the others."""
    parts = f"rows of {' and '.join(head.parts)} tokens" if head.parts else ""
    codes = f"{head.codes:,} codewords" if head.codes else ""
    own = f"{size(head.bits() // 8)} beside the matrices"
    return f"{head.module}: {' and '.join(x for x in (parts, codes) if x)}, {own}"


def _version(config: Quantized) -> str | None:
    """The version of Octavo that wrote the folder, if it did."""
    record = config.raw if config.format == "octavo" else config.raw.get("octavo")
    return record.get("octavo_version") if isinstance(record, dict) else None


def _format(config: Quantized) -> str:
    version = _version(config)
    by = f"written by Octavo {version}" if version else "not written by Octavo"
    if config.format == "octavo":
        return f"octavo {config.raw['format_version']}, {by}"
    return f"{config.format}, {by}"


def _one(output: Output, out: str, config: Quantized, module: str) -> None:
    if module not in config.matrices:
        raise UsageError(
            f"{out} has no quantized matrix {module!r}.{did_you_mean(module, config.layouts)} "
            "`octavo inspect` without --module lists them."
        )
    matrix = config.matrices[module]
    layout, bits, tensors = matrix.layout, matrix.bits(), matrix.tensors()
    output.document(
        {
            "module": module,
            "words": in_words(layout),
            "layout": layout.to_dict(),
            "nominal_bits": layout.nominal_bits,
            "bits_per_weight": bits / layout.weights,
            "bytes": -(-bits // 8),
            "tensors": {
                name: {"dtype": str(dtype).removeprefix("torch."), "shape": list(shape)}
                for name, (dtype, shape) in tensors.items()
            },
        }
    )
    output.say(f"{module}: {in_words(layout)}")
    output.say(
        f"{bits / layout.weights:.3f} bits per weight counting everything ({layout.nominal_bits:.3f} of indices)"
    )
    lines = []
    for name, (dtype, shape) in tensors.items():
        count = dtype.itemsize * prod(shape)
        share = 8 * count / layout.weights
        lines.append([name, str(dtype).removeprefix("torch."), "x".join(map(str, shape)), size(count), f"{share:.4f}"])
    output.table(("tensor", "dtype", "shape", "bytes", "bits/weight"), lines)
