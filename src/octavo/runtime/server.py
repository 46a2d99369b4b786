"""Chat completions over HTTP, as OpenAI's clients ask for them: one model, one answer at a time.

``POST /v1/chat/completions`` and ``/v1/completions`` (streamed as server-sent events if asked to), ``GET /v1/models``
and ``/health``. Requests wait for each other; what a conversation has in common with the one before is not computed
again.
"""

from __future__ import annotations

import json
import select
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, Protocol

import torch

from octavo._core.errors import OctavoError, UsageError
from octavo.runtime.decoder import DEFAULT_KV_CACHE, NativeDecoder, why_not
from octavo.runtime.generate import Conversation, Sampling

#: Longest request body in bytes.
MAX_BODY = 16 << 20
#: Lower temperatures leave the range of float32; 0 takes the likeliest token.
_COLDEST = 1e-3
#: Decoded text that ends so may end in half a character.
_INCOMPLETE = "\ufffd"


class Engine(Protocol):
    """What runs a model: tokens that follow ``ids``.

    Attributes:
        name: in words.
        capacity: tokens of a prompt and its answer together.
    """

    name: str
    capacity: int

    def answer(
        self, ids: Sequence[int], limit: int, stop: Sequence[int], sampling: Sampling, seed: int
    ) -> Iterator[int]:
        """At most ``limit`` tokens; the last may be one of ``stop``."""
        ...


class Native:
    """The native decoder, whose cache survives from one request to the next."""

    name = "native decoder"

    def __init__(self, model: Any, capacity: int | None = None, kv_cache: str = DEFAULT_KV_CACHE) -> None:
        self._talk = Conversation(NativeDecoder(model, capacity, kv_cache=kv_cache), Sampling())
        self.capacity = self._talk.decoder.capacity

    def answer(
        self, ids: Sequence[int], limit: int, stop: Sequence[int], sampling: Sampling, seed: int
    ) -> Iterator[int]:
        self._talk.begin(sampling, seed)
        return self._talk.answer(ids, limit, stop)


class Transformers:
    """Any model, through its own forward pass."""

    def __init__(self, model: Any, reason: str, capacity: int | None = None) -> None:
        self.name = f"transformers ({reason})"
        config = model.config.get_text_config()
        self.capacity = capacity or min(getattr(config, "max_position_embeddings", None) or 4096, 4096)
        self._model = model

    @torch.inference_mode()
    def answer(
        self, ids: Sequence[int], limit: int, stop: Sequence[int], sampling: Sampling, seed: int
    ) -> Iterator[int]:
        generator, seen, cache = torch.Generator().manual_seed(seed), list(ids), None
        news = torch.tensor([seen], device=self._model.device)
        for _ in range(limit):
            output = self._model(input_ids=news, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            token = sampling.draw(output.logits[0, -1].float().cpu(), torch.tensor(seen), generator)
            yield token
            if token in stop:
                return
            seen.append(token)
            news = torch.tensor([[token]], device=self._model.device)


def engine_for(model: Any, capacity: int | None = None, kv_cache: str = DEFAULT_KV_CACHE) -> Engine:
    """The fastest engine that runs a loaded model; ``kv_cache`` is of the native decoder."""
    reason = why_not(model)
    return Transformers(model, reason, capacity) if reason else Native(model, capacity, kv_cache)


@dataclass(frozen=True, kw_only=True)
class Request:
    """A completion that was asked for.

    Attributes:
        ids: of the prompt.
        limit: most new tokens.
        stop: texts that end the answer and do not belong to it.
    """

    ids: list[int]
    limit: int
    sampling: Sampling
    seed: int
    stop: tuple[str, ...]


class Completion:
    """One answer while it comes.

    Attributes:
        text: what has come so far.
        tokens: how many there are.
        finish: ``stop`` or ``length`` once it is complete.
    """

    def __init__(self, engine: Engine, tokenizer: Any, eos: Sequence[int], request: Request) -> None:
        self._engine, self._tokenizer, self._eos, self._request = engine, tokenizer, eos, request
        self.text, self.tokens, self.finish = "", 0, ""

    def pieces(self) -> Iterator[str]:
        """The text, as soon as it is certain: neither half a character nor the start of a stop text.

        Raises:
            OctavoError: the engine cannot go on.
        """
        request, ids, sent = self._request, [], 0
        self.finish = "length"
        for token in self._engine.answer(request.ids, request.limit, self._eos, request.sampling, request.seed):
            self.tokens += 1
            if token in self._eos:
                self.finish = "stop"
                break
            ids.append(token)
            whole = self._tokenizer.decode(ids, skip_special_tokens=True)
            found = [at for text in request.stop if (at := whole.find(text)) >= 0]
            self.text = whole[: min(found)] if found else whole
            if found:
                self.finish = "stop"
                break
            certain = len(whole) - self._uncertain(whole)
            if certain > sent:
                yield whole[sent:certain]
                sent = certain
        if len(self.text) > sent:
            yield self.text[sent:]

    def _uncertain(self, text: str) -> int:
        whole = text.rstrip(_INCOMPLETE)
        starts = (n for stop in self._request.stop for n in range(len(stop) - 1, 0, -1) if whole.endswith(stop[:n]))
        return len(text) - len(whole) + max(starts, default=0)


class Server(ThreadingHTTPServer):
    """The HTTP server of one loaded model; ``serve_forever()`` runs it, ``shutdown()`` from another thread ends it.

    Args:
        address: (host, port); port 0 takes a free one, see ``server_address``.
        model, tokenizer: as :func:`octavo.load` gives them.
        name: of the model, for clients.
        engine: what runs it.
        limit: new tokens of a request that does not say how many.

    Raises:
        OSError: the address cannot be had.
    """

    daemon_threads = True

    def __init__(
        self, address: tuple[str, int], model: Any, tokenizer: Any, name: str, engine: Engine, limit: int = 512
    ) -> None:
        self.tokenizer, self.name, self.engine, self.limit = tokenizer, name, engine, limit
        eos = model.generation_config.eos_token_id
        self.eos: list[int] = eos if isinstance(eos, list) else [] if eos is None else [eos]
        #: Held while an answer is made.
        self.turn = threading.Lock()
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is nobody's error; anything else is printed."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def request(self, body: dict[str, Any], chat: bool) -> Request:
        """What a JSON body asks for.

        Raises:
            UsageError: values that are missing, wrong or not supported, or a prompt that leaves no room.
        """
        if body.get("n") not in (None, 1):
            raise UsageError("n wanted 1: there is one answer to a request.")
        ids = self._chat(body) if chat else self._prompt(body)
        if not ids:
            raise UsageError("the prompt is empty.")
        room = self.engine.capacity - len(ids)
        if room < 1:
            raise UsageError(f"the prompt has {len(ids)} tokens, the model's context {self.engine.capacity}.")
        asked = (body.get("max_completion_tokens"), body.get("max_tokens"), self.limit)
        limit = next(number for number in asked if number is not None)
        if type(limit) is not int or limit < 1:
            raise UsageError(f"max_tokens wanted a whole number from 1 on, got {limit!r}.")
        stop = body.get("stop") or ()
        stop = (stop,) if isinstance(stop, str) else stop
        if not isinstance(stop, list | tuple) or not all(isinstance(text, str) and text for text in stop):
            raise UsageError(f"stop wanted a text or a list of texts, got {stop!r}.")
        numbers = {key: body.get(key) for key in ("temperature", "top_p", "repetition_penalty")}
        given = {key: value for key, value in numbers.items() if value is not None}
        for key, value in given.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise UsageError(f"{key} wanted a number, got {value!r}.")
        seed = body.get("seed")
        if seed is None:
            seed = time.time_ns() & 0x7FFFFFFF
        if type(seed) is not int or not 0 <= seed < 1 << 63:
            raise UsageError(f"seed wanted a whole number from 0 on, below 2^63, got {seed!r}.")
        if 0 < given.get("temperature", 1.0) < _COLDEST:
            raise UsageError(f"temperature wanted 0 or at least {_COLDEST}, got {given['temperature']!r}.")
        sampling = Sampling(**{"temperature": 1.0, **given})
        return Request(ids=ids, limit=min(limit, room), sampling=sampling, seed=seed, stop=tuple(stop))

    def _prompt(self, body: dict[str, Any]) -> list[int]:
        prompt = body.get("prompt")
        if not isinstance(prompt, str) or not prompt:
            raise UsageError(f"prompt wanted a text, got {prompt!r}.")
        return self.tokenizer(prompt)["input_ids"]

    def _chat(self, body: dict[str, Any]) -> list[int]:
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise UsageError(f"messages wanted a list of {{role, content}}, got {messages!r}.")
        plain = []
        for message in messages:
            content = message.get("content") if isinstance(message, dict) else None
            if isinstance(content, list):
                parts = [part.get("text") if isinstance(part, dict) else None for part in content]
                content = "".join(parts) if all(isinstance(part, str) for part in parts) else None  # type: ignore[arg-type]
            if not isinstance(content, str) or not isinstance(message.get("role"), str):
                raise UsageError(f"a message wanted a role and a text as content, got {message!r}.")
            plain.append({"role": message["role"], "content": content})
        if not self.tokenizer.chat_template:
            raise UsageError(f"{self.name} has no chat template; use /v1/completions.")
        from jinja2 import TemplateError

        try:
            found = self.tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_dict=True)
        except (TemplateError, TypeError) as error:
            raise UsageError(f"the model's chat template refuses these messages: {error}") from error
        return list(found["input_ids"])


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    #: Seconds that a client may neither send nor read: it must not keep the others waiting.
    timeout = 60
    # Pieces are to be seen as they come.
    disable_nagle_algorithm = True
    #: Path -> the kind of object in an answer, and whether its prompt is a conversation.
    _COMPLETIONS: ClassVar[dict[str, tuple[str, bool]]] = {
        "/v1/chat/completions": ("chat.completion", True),
        "/v1/completions": ("text_completion", False),
    }

    def do_GET(self) -> None:
        if self.headers.get("Content-Length", "0") != "0":
            # A body that nobody reads would be taken for the next request.
            self.close_connection = True
        path = self.path.split("?")[0].rstrip("/")
        if path == "/health":
            return self._json(200, {"status": "ok", "engine": self.server.engine.name})
        if path == "/v1/models":
            model = {"id": self.server.name, "object": "model", "owned_by": "octavo"}
            return self._json(200, {"object": "list", "data": [model]})
        return self._error(
            404, f"no such path: {self.path}; there are /v1/chat/completions, /v1/completions, /v1/models"
        )

    def do_POST(self) -> None:
        kind, chat = self._COMPLETIONS.get(self.path.split("?")[0].rstrip("/"), ("", False))
        if not kind:
            # Its body is not read, so nothing else can come on this connection.
            self.close_connection = True
            return self._error(404, f"no such path: {self.path}; there are {', '.join(self._COMPLETIONS)}")
        try:
            body = self._body()
            request = self.server.request(body, chat)
        except UsageError as error:
            return self._error(400, str(error))
        with self.server.turn:
            if self._gone():
                self.close_connection = True
                return None
            completion = Completion(self.server.engine, self.server.tokenizer, self.server.eos, request)
            identity = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.server.name}
            try:
                if body.get("stream"):
                    return self._stream(completion, identity, kind, chat)
                text = "".join(completion.pieces())
            except OctavoError as error:
                return self._error(500, str(error))
        part = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        choice = {"index": 0, **part, "finish_reason": completion.finish, "logprobs": None}
        usage = {"prompt_tokens": len(request.ids), "completion_tokens": completion.tokens}
        usage["total_tokens"] = sum(usage.values())
        return self._json(200, {**identity, "object": kind, "choices": [choice], "usage": usage})

    def _stream(self, completion: Completion, identity: dict[str, Any], kind: str, chat: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Cache-Control", "no-cache")
        # The end of the answer is the end of the connection.
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        kind = f"{kind}.chunk" if chat else kind

        def send(piece: str, finish: str | None = None) -> None:
            part = {"delta": {"content": piece} if finish is None else {}} if chat else {"text": piece}
            choice = {"index": 0, **part, "finish_reason": finish}
            data = json.dumps({**identity, "object": kind, "choices": [choice]}, ensure_ascii=False)
            self.wfile.write(f"data: {data}\n\n".encode())
            self.wfile.flush()

        try:
            for piece in completion.pieces():
                send(piece)
            send("", completion.finish)
        except OctavoError as error:
            # It is too late for another status.
            data = json.dumps({"error": {"message": str(error), "type": "server_error"}}, ensure_ascii=False)
            self.wfile.write(f"data: {data}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def _gone(self) -> bool:
        """Whether the client has closed the connection while it waited."""
        readable = select.select([self.connection], [], [], 0)[0]
        return bool(readable) and self.connection.recv(1, socket.MSG_PEEK) == b""

    def _body(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdecimal() or len(length) > 9 or int(length) > MAX_BODY:
            self.close_connection = True
            raise UsageError(f"Content-Length wanted 0..{MAX_BODY}, got {length[:20]!r}.")
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise UsageError(f"the body is no JSON: {error}.") from error
        if not isinstance(body, dict):
            raise UsageError(f"the body wanted a JSON object, got {type(body).__name__}.")
        return body

    def _json(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content, ensure_ascii=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def _error(self, status: int, message: str) -> None:
        kind = "invalid_request_error" if status < 500 else "server_error"
        self._json(status, {"error": {"message": message, "type": kind, "code": status}})

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: standard error belongs to the command."""
