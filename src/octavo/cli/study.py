"""``octavo study ...``: measurements that answer a question, with tables and a plot."""

from __future__ import annotations

import sys

import typer

from octavo.cli import study_dimension, study_vptq

app = typer.Typer(
    help="Studies: measurements that answer a question, with tables and a plot.",
    no_args_is_help=True,
    rich_markup_mode="rich" if sys.stdout.isatty() else None,
)
app.command("dimension")(study_dimension.command)
app.command("vptq")(study_vptq.command)
