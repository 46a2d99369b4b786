"""``octavo demo MODEL OUT``: quantize, compare with the original, talk - the whole product in one command."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from octavo._core.errors import Interrupted
from octavo.cli import _options as options
from octavo.cli._output import (
    JsonOption,
    Output,
    QuietOption,
    RemoteCodeOption,
    ThreadsOption,
    duration,
    graceful_stop,
    quiet_libraries,
    task_counters,
    use_threads,
)
from octavo.cli.chat import Conversation
from octavo.cli.compare import show as show_comparison
from octavo.cli.quantize import show as show_job

#: Tokens per window of the evaluation: short, so that the small bundled text has windows enough for a standard error.
CTX = 256
PROMPT = "Explain in one paragraph why the sky is blue."
STORY = "Once upon a time, there was a"


def command(
    model: options.Model,
    out: options.NewFolder,
    bits: options.Bits = 2.25,
    prompt: Annotated[str | None, typer.Option("--prompt", help="What the quantized model is asked.")] = None,
    threads: ThreadsOption = None,
    trust_remote_code: RemoteCodeOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Quantize MODEL to about --bits with the bundled text, compare it with the original, and let it write a paragraph.

    An unfinished demo continues where it stopped; a finished OUT is measured again.
    """
    with Output(as_json, quiet) as output:
        from octavo.integrations import api
        from octavo.integrations.transformers import load
        from octavo.pipeline import run

        use_threads(threads)
        quiet_libraries()
        seconds: dict[str, float] = {}
        report: dict[str, Any] | None = None
        if Path(out).exists():
            output.progress(f"{out} exists; it is measured as it is.")
        else:
            resume = (Path(out + ".work") / "CURRENT").exists()
            with graceful_stop(output, "this block") as stop:
                try:
                    job = run.quantize(
                        model,
                        out,
                        bits=bits,
                        resume=resume,
                        trust_remote_code=trust_remote_code,
                        progress=output.event,
                        stop=stop,
                    )
                except Interrupted as error:
                    raise Interrupted(f"stopped; run the same command again to continue. ({error})") from error
            report = job.to_dict()
            seconds["quantize"] = job.seconds
            show_job(output, job)
            output.say()
        began = time.perf_counter()
        output.progress("comparing with the original on the bundled evaluation text")
        comparison = api.compare(
            [out],
            ctx=min(CTX, api.positions(out, trust_remote_code) or CTX),
            reference=model,
            trust_remote_code=trust_remote_code,
            progress=task_counters(output),
        )
        seconds["compare"] = time.perf_counter() - began
        show_comparison(output, comparison)
        output.say()
        began = time.perf_counter()
        loaded, tokenizer = load(out, *api.placement(None, None), trust_remote_code=trust_remote_code)
        asked = prompt or (PROMPT if tokenizer.chat_template else STORY)
        output.say(f"> {asked}")
        turn = Conversation(loaded, tokenizer, None, 160, 0.0, 1.0, 1.1, 0).answer(asked, stream=not as_json)
        seconds["generate"] = time.perf_counter() - began
        output.say()
        parts = ", ".join(f"{name} {duration(took)}" for name, took in seconds.items())
        output.say(f"{duration(sum(seconds.values()))}: {parts}")
        output.document({"report": report, "comparison": comparison, "turn": turn, "seconds": seconds})
