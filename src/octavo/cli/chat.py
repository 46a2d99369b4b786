"""``octavo chat OUT``: talk to a model."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from octavo._core.errors import Interrupted, UsageError
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

if TYPE_CHECKING:
    from torch import Tensor

    from octavo.runtime.generate import Conversation as Native


def command(
    model: options.Model,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Answer this one prompt and end.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="System message of the conversation.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 always takes the likeliest.")] = 0.7,
    top_p: Annotated[float, typer.Option("--top-p", min=0.01, max=1.0, help="Nucleus of the sampling.")] = 0.95,
    repetition_penalty: Annotated[
        float, typer.Option("--repetition-penalty", min=1.0, help="Above 1, tokens that were said become less likely.")
    ] = 1.05,
    seed: Annotated[int, typer.Option("--seed", help="Of the sampling.")] = 0,
    head_candidates: options.HeadCandidates = None,
    dtype: DtypeOption = None,
    decode: options.DecodeOption = options.Decode.auto,
    kv_cache: options.KvCacheOption = options.KvCache.int8,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    trust_remote_code: RemoteCodeOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Talk to a model. Lines come from the keyboard or a pipe; Ctrl-C ends an answer, Ctrl-D the conversation.

    Models without a chat template continue the text that they are given.
    """
    with Output(as_json, quiet) as output:
        from octavo.heads import set_candidates
        from octavo.integrations.api import placement
        from octavo.integrations.transformers import load

        use_threads(threads)
        quiet_libraries()
        loaded, tokenizer = load(model, *placement(device, dtype), decode.value, trust_remote_code=trust_remote_code)
        set_candidates(loaded, head_candidates or 0)
        sampling = (temperature, top_p, repetition_penalty, seed)
        talk = Conversation(loaded, tokenizer, system, max_new_tokens, *sampling, kv_cache.value)
        if prompt is None:
            output.say(talk.engine)
        turns: list[dict[str, Any]] = []
        for line in [prompt] if prompt is not None else _lines(output):
            turns.append(talk.answer(line, stream=not quiet or not as_json))
        output.document(
            {"model": model, "seed": seed, "temperature": temperature, "engine": talk.engine, "turns": turns}
        )
        if prompt is not None and turns[0]["stopped"]:
            raise typer.Exit(Interrupted.exit_code)


def _lines(output: Output) -> Iterator[str]:
    """Non-empty lines of stdin; on a terminal with a prompt and line editing."""
    if sys.stdin.isatty() and not output.as_json:
        with suppress(ImportError):
            import readline  # noqa: F401

        lines = _typed()
    else:
        lines = iter(sys.stdin.readline, "")
    yield from (line.strip() for line in lines if line.strip())


def _typed() -> Iterator[str]:
    with suppress(EOFError):
        while True:
            yield input("> ")


class Conversation:
    """A model, the turns so far, and how to sample the next one.

    Attributes:
        engine: what runs the model, in words.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        system: str | None,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        repetition_penalty: float,
        seed: int,
        kv_cache: str = options.KvCache.int8,
    ) -> None:
        import torch

        from octavo.runtime import decoder, generate

        self._model, self._tokenizer = model, tokenizer
        self._has_template = bool(tokenizer.chat_template)
        if system is not None and not self._has_template:
            raise UsageError("--system: this model has no chat template, so it knows no system message.")
        self._messages = [{"role": "system", "content": system}] if system is not None else []
        self._first = len(self._messages)
        self._max_new_tokens = max_new_tokens
        self._sampling: dict[str, Any] = {"do_sample": False, "repetition_penalty": repetition_penalty}
        if temperature > 0:
            self._sampling |= {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        torch.manual_seed(seed)
        self._native: generate.Conversation | None = None
        reason = decoder.why_not(model)
        self.engine = f"transformers ({reason})" if reason else "native decoder"
        if not reason:
            sampling = generate.Sampling(temperature=temperature, top_p=top_p, repetition_penalty=repetition_penalty)
            native = decoder.NativeDecoder(model, kv_cache=kv_cache)
            self._native = generate.Conversation(native, sampling, seed)

    def answer(self, text: str, stream: bool = True) -> dict[str, Any]:
        """Answer ``text``, printing tokens as they come if ``stream``.

        Returns:
            prompt, response, number of new tokens, seconds, and whether Ctrl-C ended it.

        Raises:
            UsageError: the prompt alone is longer than the model's context.
        """
        from transformers import TextStreamer

        inputs = self._inputs(text)
        began = time.perf_counter()
        streamer = _Keeping(
            TextStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
        )
        stopped = False
        try:
            if self._native is not None:
                self._answer_natively(self._native, inputs["input_ids"], streamer)
            else:
                self._model.generate(
                    **inputs,
                    max_new_tokens=self._max_new_tokens,
                    pad_token_id=self._pad(),
                    streamer=streamer,
                    **self._sampling,
                )
        except KeyboardInterrupt:
            stopped = True
            streamer.end()
        response = self._tokenizer.decode(streamer.tokens, skip_special_tokens=True)
        if self._has_template:
            self._messages.append({"role": "assistant", "content": response})
        return {
            "prompt": text,
            "response": response,
            "new_tokens": len(streamer.tokens),
            "seconds": time.perf_counter() - began,
            "stopped": stopped,
        }

    def _answer_natively(self, native: Native, ids: Tensor, streamer: _Keeping) -> None:
        import torch

        streamer.put(ids)
        stop = self._model.generation_config.eos_token_id
        for token in native.answer(ids[0].tolist(), self._max_new_tokens, stop if isinstance(stop, list) else [stop]):
            streamer.put(torch.tensor([token]))
        streamer.end()

    def _inputs(self, text: str) -> dict[str, Tensor]:
        room = getattr(self._model.config, "max_position_embeddings", None) or 1 << 30
        if self._native is not None:
            room = self._native.decoder.capacity
        room -= self._max_new_tokens
        if not self._has_template:
            return self._fitting(self._tokenizer(text, return_tensors="pt"), room)
        self._messages.append({"role": "user", "content": text})
        while True:
            inputs = self._tokenizer.apply_chat_template(
                self._messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            if inputs["input_ids"].shape[1] <= room or len(self._messages) - self._first < 3:
                return self._fitting(inputs, room)
            # The oldest question and its answer make room for the new one.
            del self._messages[self._first : self._first + 2]

    def _fitting(self, inputs: Any, room: int) -> dict[str, Tensor]:
        length = inputs["input_ids"].shape[1]
        if length > room:
            raise UsageError(
                f"the prompt has {length} tokens; the model's context leaves room for {room} beside the "
                f"{self._max_new_tokens} of --max-new-tokens. Shorten one of them."
            )
        if length == 0:
            raise UsageError("the prompt is empty.")
        device = self._model.device
        return {key: inputs[key].to(device) for key in ("input_ids", "attention_mask")}

    def _pad(self) -> int | None:
        pad = self._tokenizer.pad_token_id
        return pad if pad is not None else self._tokenizer.eos_token_id


class _Keeping:
    """Hands tokens on to a printing streamer, and keeps the new ones, also when the generation is cut short."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._seen_prompt = False
        self.tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        """Called by ``generate``: first with the prompt, then with every new token."""
        if self._seen_prompt:
            self.tokens += value.flatten().tolist()
        self._seen_prompt = True
        if self._inner is not None:
            self._inner.put(value)

    def end(self) -> None:
        """Called by ``generate`` after the last token."""
        if self._inner is not None:
            self._inner.end()
