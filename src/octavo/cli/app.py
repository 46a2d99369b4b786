"""Assembles the commands and turns every outcome into an exit code and, where wanted, a JSON document.

Exit codes: 0 done, 1 a bug or an operating-system error, 2 usage, 3 data or format, 4 numerical, 5 resources,
130 interrupted.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

import typer
from typer.main import get_command

import octavo
from octavo._core.errors import OctavoError
from octavo.cli import (
    bench,
    chat,
    compare,
    convert,
    demo,
    doctor,
    evaluate,
    inspect,
    plan,
    quantize,
    serve,
    study,
    tune,
    verify,
)
from octavo.cli._output import print_json

INTERRUPTED = 130
RESOURCES = 5
USAGE = 2

app = typer.Typer(
    name="octavo",
    help="Shrink causal language models to 1.5-4 bits per weight with vector quantization, measure them, talk to them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Boxes are for terminals; a pipe gets plain lines.
    rich_markup_mode="rich" if sys.stdout.isatty() else None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for name, module in {
    "quantize": quantize,
    "tune": tune,
    "convert": convert,
    "plan": plan,
    "eval": evaluate,
    "compare": compare,
    "chat": chat,
    "serve": serve,
    "bench": bench,
    "inspect": inspect,
    "verify": verify,
    "doctor": doctor,
    "demo": demo,
}.items():
    app.command(name)(module.command)
app.add_typer(study.app, name="study")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"octavo {octavo.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    del version


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; prints errors, never raises them.

    Args:
        arguments: what follows the program's name; None takes ``sys.argv``.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in arguments
    # torch asks at its first allocation: with huge pages for large tensors a job spends an eighth less time.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # torch's idle threads would keep processors busy for milliseconds that ours, or another job's, could use.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    # Warnings are for people: one line, without the source line that raised them.
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            code = get_command(app).main(args=arguments, prog_name="octavo", standalone_mode=False, obj=arguments)
            sys.stdout.flush()
            return code if isinstance(code, int) else 0
        except OctavoError as error:
            return _fail(as_json, type(error).__name__, str(error), error.exit_code)
        except KeyboardInterrupt:
            return _fail(as_json, "Interrupted", "stopped.", INTERRUPTED)
        except BrokenPipeError:
            return _reader_has_gone()
        except MemoryError as error:
            return _fail(as_json, "ResourceError", _out_of_memory(error), RESOURCES)
        except Exception as error:
            return _other(as_json, error)


def _other(as_json: bool, error: Exception) -> int:
    """Usage errors of the parser, errors of the operating system, and bugs."""
    if hasattr(error, "format_message"):
        context = getattr(error, "ctx", None)
        if context is not None and not as_json:
            print(context.get_usage(), file=sys.stderr)
        message = error.format_message()  # type: ignore[attr-defined]
        return _fail(as_json, "UsageError", message, getattr(error, "exit_code", USAGE)) if message else USAGE
    if type(error).__name__ == "Abort":
        return _fail(as_json, "Interrupted", "stopped.", INTERRUPTED)
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM)
        return _fail(as_json, "ResourceError" if full else type(error).__name__, str(error), RESOURCES if full else 1)
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
        return _fail(as_json, "ResourceError", _out_of_memory(error), RESOURCES)
    traceback.print_exc()
    message = (
        f"{type(error).__name__}: {error}. This is a bug in Octavo or in a library; please report it as it stands."
    )
    return _fail(as_json, type(error).__name__, message, 1)


def _out_of_memory(error: BaseException) -> str:
    return f"out of memory ({error}). Try fewer --samples, a shorter --ctx or a smaller --batch-tokens."


def _fail(as_json: bool, kind: str, message: str, code: int) -> int:
    try:
        print(f"error: {message}", file=sys.stderr)
        if as_json:
            print_json({"error": {"kind": kind, "message": message}})
            sys.stdout.flush()
    except BrokenPipeError:
        _reader_has_gone()
    return code


def _reader_has_gone() -> int:
    """`octavo inspect OUT | head` is no error; keep the interpreter from complaining about it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + 13


def _show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    if issubclass(category, UserWarning):
        print(f"warning: {message}", file=sys.stderr)
