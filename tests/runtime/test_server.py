"""``octavo serve`` as a client meets it: whole and streamed answers, several at once, and requests that cannot be."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo._core import clib
from octavo._core.errors import UsageError
from octavo.integrations.transformers import load
from octavo.runtime.generate import Sampling
from octavo.runtime.server import Completion, Native, Request, Server, Transformers, engine_for


@pytest.fixture(scope="module")
def loaded(tiny_llama: Path) -> tuple[Any, Any]:
    return load(tiny_llama, torch.float32)


@pytest.fixture(params=["native", "transformers"])
def server(request: pytest.FixtureRequest, loaded: tuple[Any, Any]) -> Iterator[Server]:
    model, tokenizer = loaded
    if request.param == "native" and clib.library() is None:
        pytest.skip(f"no C++ library: {clib.why_missing()}")
    engine = Native(model, 200) if request.param == "native" else Transformers(model, "asked for", 200)
    with Server(("127.0.0.1", 0), model, tokenizer, "tiny", engine, limit=6) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def ask(server: Server, path: str, body: Any = None, raw: bytes | None = None) -> tuple[int, Any]:
    """Status and JSON of one request, or the list of streamed objects."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=60)
    data = raw if raw is not None else None if body is None else json.dumps(body).encode()
    connection.request("GET" if data is None else "POST", path, data)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    if response.headers["Content-Type"].startswith("text/event-stream"):
        events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        assert events[-1] == "[DONE]"
        return response.status, [json.loads(event) for event in events[:-1]]
    return response.status, json.loads(text)


CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hello there"}], "temperature": 0, "max_tokens": 5}


def test_answers_are_those_of_generate(server: Server, loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    inputs = tokenizer.apply_chat_template(
        CHAT["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    wanted = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    status, answer = ask(server, "/v1/chat/completions", CHAT)
    assert status == 200, answer
    assert answer["object"] == "chat.completion" and answer["model"] == "tiny"
    choice = answer["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": tokenizer.decode(wanted, skip_special_tokens=True)}
    ended = wanted[-1] in server.eos
    assert choice["finish_reason"] == ("stop" if ended else "length")
    usage = {"prompt_tokens": inputs["input_ids"].shape[1], "completion_tokens": len(wanted)}
    assert answer["usage"] == usage | {"total_tokens": sum(usage.values())}


def test_streams_say_the_same_in_pieces(server: Server) -> None:
    whole = ask(server, "/v1/chat/completions", CHAT)[1]["choices"][0]
    status, events = ask(server, "/v1/chat/completions", CHAT | {"stream": True})
    assert status == 200
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    pieces = [event["choices"][0]["delta"].get("content", "") for event in events]
    assert "".join(pieces) == whole["message"]["content"]
    assert [event["choices"][0]["finish_reason"] for event in events][-1] == whole["finish_reason"]


def test_text_completions_continue_a_text(server: Server) -> None:
    body = {"prompt": "one two three", "temperature": 0}
    status, answer = ask(server, "/v1/completions", body)
    assert status == 200 and answer["object"] == "text_completion"
    assert answer["usage"]["completion_tokens"] <= 6
    events = ask(server, "/v1/completions", body | {"stream": True})[1]
    assert "".join(event["choices"][0]["text"] for event in events) == answer["choices"][0]["text"]


def test_a_seed_repeats_an_answer(server: Server) -> None:
    body = CHAT | {"temperature": 1.5, "seed": 7, "max_tokens": 12}
    first, second = (ask(server, "/v1/chat/completions", body)[1]["choices"] for _ in range(2))
    assert first == second


def test_requests_at_the_same_time_wait_for_each_other(server: Server) -> None:
    bodies = [CHAT | {"messages": [{"role": "user", "content": f"number {i}"}]} for i in range(6)]
    alone = [ask(server, "/v1/chat/completions", body)[1]["choices"] for body in bodies]
    with ThreadPoolExecutor(6) as clients:
        together = list(clients.map(lambda body: ask(server, "/v1/chat/completions", body)[1]["choices"], bodies))
    assert together == alone


def test_what_there_is(server: Server) -> None:
    status, health = ask(server, "/health")
    assert status == 200 and health["status"] == "ok" and health["engine"] == server.engine.name
    assert ask(server, "/v1/models")[1]["data"][0]["id"] == "tiny"
    assert ask(server, "/v2/nothing")[0] == 404
    assert ask(server, "/v1/nothing", {})[0] == 404


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"messages": []}, "messages wanted a list"),
        ({"messages": [{"role": "user"}]}, "a message wanted a role and a text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a message wanted"),
        ({"max_tokens": 0}, "max_tokens wanted a whole number from 1 on, got 0"),
        ({"temperature": "hot"}, "temperature wanted a number"),
        ({"top_p": 2}, "top_p in"),
        ({"stop": [1]}, "stop wanted"),
        ({"n": 2}, "n wanted 1"),
        ({"seed": "x"}, "seed wanted"),
        ({"seed": 1 << 70}, "below 2^63"),
        ({"stop": 5}, "stop wanted"),
        ({"temperature": 1e-40}, "temperature wanted 0 or at least 0.001"),
        ({"messages": [{"role": "user", "content": "word " * 300}]}, "the model's context 200"),
    ],
)
def test_what_cannot_be_is_said(server: Server, change: dict[str, Any], message: str) -> None:
    status, answer = ask(server, "/v1/chat/completions", CHAT | change)
    assert status == 400
    assert message in answer["error"]["message"] and answer["error"]["type"] == "invalid_request_error"
    assert ask(server, "/v1/chat/completions", CHAT)[0] == 200


def test_nulls_are_as_good_as_nothing(server: Server) -> None:
    nulls = dict.fromkeys(("n", "max_completion_tokens", "stop", "seed", "top_p", "stream"))
    wanted = ask(server, "/v1/chat/completions", CHAT)[1]["choices"]
    assert ask(server, "/v1/chat/completions", CHAT | nulls)[1]["choices"] == wanted


def test_bodies_that_are_none(server: Server) -> None:
    assert "no JSON" in ask(server, "/v1/completions", raw=b"[" * 200_000)[1]["error"]["message"]
    assert "no JSON" in ask(server, "/v1/completions", raw=b"{")[1]["error"]["message"]
    assert "JSON object" in ask(server, "/v1/completions", raw=b"[]")[1]["error"]["message"]
    assert "prompt wanted a text" in ask(server, "/v1/completions", {"prompt": 5})[1]["error"]["message"]


def test_a_client_that_leaves_ends_its_answer(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=60)
    body = CHAT | {"stream": True, "max_tokens": 100, "temperature": 1.0}
    connection.request("POST", "/v1/chat/completions", json.dumps(body).encode())
    connection.getresponse().read(10)
    connection.close()
    assert ask(server, "/v1/chat/completions", CHAT)[0] == 200


class _Scripted:
    """An engine that says given tokens."""

    name, capacity = "scripted", 100

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def answer(self, ids: Any, limit: int, stop: Any, sampling: Sampling, seed: int) -> Iterator[int]:
        yield from self.tokens[:limit]


class _Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return bytes(ids).decode("utf-8", "replace")


def complete(text: str, stop: tuple[str, ...] = (), limit: int = 1000) -> tuple[list[str], Completion]:
    request = Request(ids=[1], limit=limit, sampling=Sampling(), seed=0, stop=stop)
    completion = Completion(_Scripted(list(text.encode())), _Bytes(), [0], request)
    return list(completion.pieces()), completion


def test_no_piece_ends_inside_a_character() -> None:
    pieces, completion = complete("a€ü𝄞z")
    assert pieces == ["a", "€", "ü", "𝄞", "z"]
    assert (completion.finish, completion.tokens) == ("length", len("a€ü𝄞z".encode()))


def test_stop_texts_end_an_answer_and_are_not_part_of_it() -> None:
    pieces, completion = complete("one##two###three", stop=("###", "never"))
    assert "".join(pieces) == completion.text == "one##two"
    assert completion.finish == "stop"
    assert "".join(complete("答用户x", stop=("用户",))[0]) == "答"
    # What might have been the start of a stop text comes once it is none, or at the end.
    assert "".join(complete("ends with ##", stop=("###",))[0]) == "ends with ##"


def test_the_end_token_ends_an_answer() -> None:
    pieces, completion = complete("all\x00no more")
    assert ("".join(pieces), completion.finish, completion.tokens) == ("all", "stop", 4)


def test_the_engine_is_the_fastest_that_runs(loaded: tuple[Any, Any], tiny_gpt2: Path) -> None:
    if clib.library() is not None:
        assert isinstance(engine_for(loaded[0]), Native)
    other = engine_for(load(tiny_gpt2, torch.float32)[0])
    assert isinstance(other, Transformers) and "gpt2 is none of" in other.name


def test_texts_are_refused_where_there_is_no_chat_template(loaded: tuple[Any, Any]) -> None:
    class Plain:
        chat_template = None

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": list(text.encode())}

    engine = Transformers(loaded[0], "asked for", 50)
    with Server(("127.0.0.1", 0), loaded[0], Plain(), "plain", engine) as server:
        with pytest.raises(UsageError, match=r"plain has no chat template; use /v1/completions"):
            server.request(CHAT, chat=True)
        assert server.request({"prompt": "ab"}, chat=False).ids == [97, 98]
        assert server.request({"prompt": "ab"}, chat=False).limit == 48
