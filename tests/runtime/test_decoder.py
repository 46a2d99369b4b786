"""The native decoder is the transformers model, token by token, for every family that it runs."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from octavo._core import clib
from octavo._core.errors import UsageError
from octavo.integrations.transformers import load
from octavo.kernels import select
from octavo.pipeline.run import quantize
from octavo.runtime import decoder as native
from octavo.runtime.decoder import why_not
from octavo.runtime.generate import Conversation, Sampling

pytestmark = pytest.mark.skipif(clib.library() is None, reason=f"no C++ library: {clib.why_missing()}")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2")
Tiny = Callable[[str], Path]
#: Keys and values in bytes are held to float64 in test_attention.py.
NativeDecoder = partial(native.NativeDecoder, kv_cache="float16")


@pytest.fixture(autouse=True)
def _fast_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(select.ENVIRONMENT, raising=False)


@cache
def original(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def packed(tiny_model: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    @cache
    def get(name: str) -> Any:
        out = tmp_path_factory.mktemp("packed") / name
        options = {"beam": 4, "sweeps": 0}
        quantize(tiny_model(name), out, bits=3.3, samples=2, ctx=32, guided="none", options=options)
        model = load(out, dtype=torch.float32)[0]
        assert model.octavo_decode == "packed"
        return model

    return get


def ids(count: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 300, (count,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Any, tokens: Tensor) -> Tensor:
    return model(tokens.unsqueeze(0)).logits[0].float()


def close(mine: Tensor, theirs: Tensor, limit: float = 3e-3) -> None:
    """Keys and values are kept in half precision."""
    assert float((mine - theirs).abs().max()) < limit * float(theirs.abs().max())


@pytest.mark.parametrize("name", FAMILIES)
def test_dense_models_run_as_in_transformers(tiny_model: Tiny, name: str) -> None:
    """Sliding windows, biases, norms of queries and keys, soft caps, tied heads; 40 tokens in windows of 16."""
    model, tokens = original(tiny_model(name)), ids(40)
    wanted, decoder = logits(model, tokens), NativeDecoder(model, 64, threads=2)
    for i in range(40):
        close(decoder.run(tokens[i : i + 1]), wanted[i])
    assert decoder.length == 40


@pytest.mark.parametrize("name", FAMILIES)
def test_quantized_models_run_as_in_transformers(packed: Callable[[str], Any], name: str) -> None:
    model, tokens = packed(name), ids(30)
    wanted, decoder = logits(model, tokens), NativeDecoder(model, 64, threads=3)
    close(decoder.run(tokens[:11]), wanted[10], 1e-2)
    for i in range(11, 30):
        close(decoder.run(tokens[i : i + 1]), wanted[i], 1e-2)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_long_prompts_are_read_by_transformers_and_go_on_natively(tiny_model: Tiny, name: str) -> None:
    """A sliding window of 16 hands over no more than its last keys."""
    model, tokens = original(tiny_model(name)), ids(60, 1)
    wanted, decoder = logits(model, tokens), NativeDecoder(model, 64)
    assert native._LONG_PROMPT <= 40
    close(decoder.run(tokens[:40]), wanted[39])
    close(decoder.run(tokens[40:53]), wanted[52])
    close(decoder.run(tokens[53:54]), wanted[53])


def test_every_instruction_set_runs_the_same_model(packed: Callable[[str], Any]) -> None:
    lib = clib.library()
    assert lib is not None
    model, tokens = packed("qwen3"), ids(9)
    wanted = logits(model, tokens)[-1]
    for isa in range(1, lib.octavo_isa() + 1):
        decoder, found = NativeDecoder(model, 16), torch.full_like(wanted, torch.nan)
        arguments = (decoder._session, tokens.data_ptr(), 9, 0, found.data_ptr(), 2, isa)
        assert clib.call(lib.octavo_session_run, *arguments) == clib.OK
        close(found, wanted, 1e-2)


def test_a_window_that_lost_keys_is_read_again(tiny_model: Tiny) -> None:
    """Of a long prompt a sliding window keeps the last keys; who goes back behind its end starts over."""
    model, tokens = original(tiny_model("mistral")), ids(60, 3)
    decoder = NativeDecoder(model, 96)
    decoder.run(tokens)
    decoder.run(ids(4, 5))
    assert decoder.rewind(62) == 62
    assert decoder.rewind(59) == 0
    conversation = Conversation(NativeDecoder(model, 96), Sampling())
    first, second = (list(conversation.answer(tokens.tolist(), 5, ())) for _ in range(2))
    assert first == second
    decoder = NativeDecoder(original(tiny_model("llama")), 96)
    decoder.run(tokens)
    assert decoder.rewind(59) == 59


def test_rewinding_forgets(tiny_model: Tiny) -> None:
    model, tokens = original(tiny_model("llama")), ids(20)
    decoder = NativeDecoder(model, 32)
    decoder.run(tokens)
    decoder.rewind(8)
    other = torch.cat([tokens[:8], ids(6, 7)])
    close(decoder.run(other[8:]), logits(model, other)[-1])
    with pytest.raises(UsageError, match=r"wanted 0\.\.14, got 15"):
        decoder.rewind(15)


def test_what_does_not_fit_is_refused_and_changes_nothing(tiny_model: Tiny) -> None:
    model = original(tiny_model("llama"))
    decoder = NativeDecoder(model, 8)
    decoder.run(ids(5))
    for tokens, message in ((ids(4), "room for 8"), (torch.tensor([320]), r"not in 0\.\.319"), (ids(0), "n >= 1")):
        with pytest.raises(UsageError, match=message):
            decoder.run(tokens)
    assert decoder.length == 5
    decoder.run(ids(3))


def test_the_decoder_keeps_what_it_reads(tiny_model: Tiny) -> None:
    decoder = NativeDecoder(AutoModelForCausalLM.from_pretrained(tiny_model("qwen2"), dtype=torch.bfloat16).eval(), 16)
    before = decoder.run(ids(6))
    gc.collect()
    decoder.rewind(0)
    assert torch.equal(decoder.run(ids(6)), before)


@pytest.mark.parametrize(("name", "reason"), [("gpt2", "none of the architectures"), ("gemma3", "none of the")])
def test_other_architectures_are_refused_with_the_reason(tiny_model: Tiny, name: str, reason: str) -> None:
    model = original(tiny_model(name))
    assert reason in why_not(model)
    with pytest.raises(UsageError, match=reason):
        NativeDecoder(model)


def test_asking_packs_nothing_and_a_forced_slow_kernel_is_the_reason(
    packed: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from octavo.nn import VQLinear

    model = packed("qwen2")
    with monkeypatch.context() as patch:
        patch.setattr(VQLinear, "prepared", None)
        assert why_not(model) == ""
    monkeypatch.setenv(select.ENVIRONMENT, "reference")
    assert "is not packed: the kernel reference runs it (OCTAVO_KERNEL is set)" in why_not(model)


# ------------------------------------------------------------------------------------------------ generation


def test_greedy_answers_are_those_of_generate(tiny_model: Tiny) -> None:
    model, prompt = original(tiny_model("llama")), ids(9)
    wanted = model.generate(prompt.unsqueeze(0), max_new_tokens=12, do_sample=False, repetition_penalty=1.3)[0, 9:]
    talk = Conversation(NativeDecoder(model, 64), Sampling(repetition_penalty=1.3))
    stop = model.generation_config.eos_token_id
    assert list(talk.answer(prompt.tolist(), 12, [stop])) == wanted.tolist()


def test_the_next_turn_computes_only_what_is_new(tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = original(tiny_model("llama"))
    decoder = NativeDecoder(model, 128)
    runs: list[int] = []
    run = decoder.run
    monkeypatch.setattr(decoder, "run", lambda tokens: (runs.append(len(tokens)), run(tokens))[1])
    talk = Conversation(decoder, Sampling())
    first = ids(10).tolist()
    said = list(talk.answer(first, 5, []))
    second = first + said + ids(4, 3).tolist()
    runs.clear()
    answer = list(talk.answer(second, 5, []))
    # What was said last is in the conversation, but was not run yet only if nothing followed it.
    assert runs[0] == 4
    fresh = Conversation(NativeDecoder(model, 128), Sampling())
    assert list(fresh.answer(second, 5, [])) == answer


def test_an_answer_ends_at_a_stop_token_and_at_the_end_of_the_cache(tiny_model: Tiny) -> None:
    model = original(tiny_model("llama"))
    everything = list(Conversation(NativeDecoder(model, 64), Sampling()).answer(ids(5).tolist(), 8, []))
    stop = everything[3]
    stopped = list(Conversation(NativeDecoder(model, 64), Sampling()).answer(ids(5).tolist(), 8, [stop]))
    assert stopped == everything[: everything.index(stop) + 1]
    full = list(Conversation(NativeDecoder(model, 7), Sampling()).answer(ids(5).tolist(), 8, []))
    assert full == everything[:3]


def test_a_nucleus_holds_just_the_likeliest_tokens() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)
    sampling = Sampling(temperature=1.0, top_p=0.75)
    drawn = torch.tensor([sampling.draw(logits, torch.tensor([0]), generator) for _ in range(4000)])
    counts = drawn.bincount(minlength=4) / 4000
    torch.testing.assert_close(counts, torch.tensor([0.625, 0.375, 0, 0]), rtol=0, atol=0.03)
    cold = Sampling(temperature=0.25, top_p=1.0)
    drawn = torch.tensor([cold.draw(logits, torch.tensor([0]), generator) for _ in range(4000)])
    wanted = torch.tensor([0.5, 0.3, 0.15, 0.05]) ** 4
    torch.testing.assert_close(drawn.bincount(minlength=4) / 4000, wanted / wanted.sum(), rtol=0, atol=0.03)


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"repetition_penalty": 0.0}])
def test_impossible_sampling_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="sampling wanted"):
        Sampling(**wrong)
