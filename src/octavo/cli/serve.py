"""``octavo serve OUT``: a model for programs, over HTTP."""

from __future__ import annotations

import signal
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from octavo._core.errors import ResourceError
from octavo.cli import _options as options
from octavo.cli._output import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    Output,
    QuietOption,
    RemoteCodeOption,
    ThreadsOption,
    quiet_libraries,
    use_threads,
)


def command(
    model: options.Model,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; 0.0.0.0 lets other machines in.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8000,
    context: Annotated[
        int | None,
        typer.Option(
            "--context", min=2, help="Tokens of a prompt and its answer.", show_default="the model's, at most 4096"
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Longest answer where a request does not say.")
    ] = 512,
    dtype: DtypeOption = None,
    decode: options.DecodeOption = options.Decode.auto,
    kv_cache: options.KvCacheOption = options.KvCache.int8,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    trust_remote_code: RemoteCodeOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Answer OpenAI's chat and text completions over HTTP until Ctrl-C or SIGTERM; requests wait for each other.

    There is no password: whoever reaches the address can ask.
    """
    with Output(as_json, quiet) as output:
        from octavo.integrations.api import placement
        from octavo.integrations.transformers import load
        from octavo.runtime.server import Server, engine_for

        use_threads(threads)
        quiet_libraries()
        loaded, tokenizer = load(model, *placement(device, dtype), decode.value, trust_remote_code=trust_remote_code)
        engine, name = engine_for(loaded, context, kv_cache.value), Path(model).name
        try:
            server = Server((host, port), loaded, tokenizer, name, engine, max_new_tokens)
        except OSError as error:
            raise ResourceError(f"cannot listen on {host}:{port}: {error}. Choose another --port.") from error
        url = f"http://{host}:{server.server_address[1]}/v1"
        output.document({"model": name, "engine": engine.name, "url": url, "context": engine.capacity})
        output.say(f"{name} listens on {url} ({engine.name}, {engine.capacity} tokens of context); Ctrl-C ends it")
        # What service managers send; an interrupt is ignored where the shell had it so.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with server, suppress(KeyboardInterrupt):
            server.serve_forever()
