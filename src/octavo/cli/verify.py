"""``octavo verify OUT``: read everything and hold it against the manifest and the format."""

from __future__ import annotations

from pathlib import Path

import typer

from octavo._core.errors import FormatError
from octavo.cli import _options as options
from octavo.cli._output import JsonOption, Output, size


def command(out: options.Quantized, as_json: JsonOption = False) -> None:
    """Check all hashes and sizes, and that every matrix decodes to finite numbers. Exit code 3 if anything is wrong."""
    with Output(as_json) as output:
        if not Path(out).is_dir():
            raise FormatError(f"{out} is no folder.")
        from octavo import formats
        from octavo.models import quantized

        problems = formats.problems(out, quantized.shapes(out))
        files = [path for path in Path(out).rglob("*") if path.is_file()]
        total = sum(path.stat().st_size for path in files)
        document = {"path": str(out), "ok": not problems, "files": len(files), "bytes": total, "problems": problems}
        if not problems:
            output.document(document)
            output.say(f"{out}: {len(files)} files, {size(total)}, all well.")
            return
        message = f"{out} has {len(problems)} problems, the first: {problems[0]}"
        output.document({**document, "error": {"kind": FormatError.__name__, "message": message}})
        for problem in problems:
            output.say(problem)
        output.progress(f"error: {out} is damaged or was changed ({len(problems)} problems).")
        raise typer.Exit(FormatError.exit_code)
