"""``octavo bench OUT``: how fast a model runs here, and how far that is from what the memory allows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from octavo.cli import _options as options
from octavo.cli._output import (
    JsonOption,
    Output,
    QuietOption,
    RemoteCodeOption,
    ThreadsOption,
    quiet_libraries,
    size,
    use_threads,
)


def command(
    model: options.Model,
    prompt: Annotated[int, typer.Option("--prompt", min=1, help="Tokens of the prompt.")] = 128,
    generate: Annotated[int, typer.Option("--generate", min=1, help="Tokens that are generated.")] = 32,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Rounds that count; one comes before.")] = 3,
    peer: Annotated[
        list[Path] | None,
        typer.Option("--peer", metavar="FILE.gguf", help="A file for llama.cpp, measured in turn; repeatable."),
    ] = None,
    decode: options.DecodeOption = options.Decode.auto,
    kv_cache: options.KvCacheOption = options.KvCache.int8,
    threads: ThreadsOption = None,
    trust_remote_code: RemoteCodeOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure prompt and generation speed on the CPU: medians of rounds, the share of the memory's speed, peers.

    Models of the Llama family run in the native decoder, others through transformers; the table says which.
    """
    with Output(as_json, quiet) as output:
        import torch

        from octavo._core import clib
        from octavo.calibration.products import fast_bfloat16
        from octavo.evaluation import speed
        from octavo.integrations.transformers import load
        from octavo.runtime.decoder import NativeDecoder, why_not

        use_threads(threads)
        quiet_libraries()
        count = clib.threads()
        roof = speed.read_bandwidth(count)
        dtype = torch.bfloat16 if fast_bfloat16() else torch.float32
        loaded = load(model, dtype, decode=decode.value, trust_remote_code=trust_remote_code)[0]
        reason, context = why_not(loaded), prompt + generate
        if reason:
            engine: speed.Runner = speed.Transformers(loaded, f"transformers ({reason})")
        else:
            engine = speed.Native(NativeDecoder(loaded, context, count, kv_cache.value), "native decoder")
        runners = [engine, *(speed.LlamaCpp(path, context, count) for path in peer or ())]
        vocabulary = loaded.config.get_text_config().vocab_size
        found = speed.measure(runners, prompt, generate, rounds, vocabulary, output.counter("rounds"))
        own, *others = [row.to_dict() for row in found]
        output.document(
            {
                "model": model,
                "engine": engine.name,
                "prompt": prompt,
                "generate": generate,
                "rounds": rounds,
                "threads": count,
                "kv_cache": None if reason else kv_cache.value,
                "dtype": str(dtype).removeprefix("torch."),
                "read_gigabytes_per_second": roof,
                **own,
                "peers": others,
            }
        )
        rows = [
            [
                row.name,
                _with_spread(row.prompt_tokens_per_second, row.prompt_spread),
                _with_spread(row.generate_tokens_per_second, row.generate_spread),
                "" if row.bytes_per_token is None else size(row.bytes_per_token),
                "" if row.gigabytes_per_second is None else f"{row.gigabytes_per_second:.1f}",
                "" if row.gigabytes_per_second is None else f"{100 * row.gigabytes_per_second / roof:.0f} %",
            ]
            for row in found
        ]
        columns = (
            "engine",
            "prompt tokens/s",
            "generation tokens/s",
            "read per token",
            "GB/s",
            "of the memory's speed",
        )
        output.table(columns, rows, title=f"{model}: {prompt} + {generate} tokens, {count} threads")
        output.say()
        facts = {"memory": f"{roof:.1f} GB/s read by {count} threads"}
        if (outside := found[0].outside_matrices) is not None:
            facts["outside matrices"] = f"{100 * outside:.1f} % of a generated token's time"
        output.facts(facts)


def _with_spread(median: float, spread: tuple[float, float]) -> str:
    return f"{median:.1f} ({spread[0]:.1f}-{spread[1]:.1f})"
