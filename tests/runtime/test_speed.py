"""Speeds are medians of interleaved rounds, and count the bytes that a token reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from octavo._core import clib
from octavo._core.errors import UsageError
from octavo.evaluation import speed
from octavo.runtime.decoder import NativeDecoder


class Counting:
    """A runner that only writes down what it is asked."""

    bytes_per_token: int | None = 1000

    def __init__(self, name: str, log: list[tuple[str, int]]) -> None:
        self.name, self.log = name, log

    def start(self) -> None:
        self.log.append((self.name, 0))

    def read(self, tokens: Sequence[int]) -> int:
        assert all(0 <= token < 50 for token in tokens)
        self.log.append((self.name, len(tokens)))
        return 7


def test_rounds_are_interleaved_and_the_first_is_not_counted() -> None:
    log: list[tuple[str, int]] = []
    progress: list[tuple[int, int]] = []
    found = speed.measure(
        [Counting("a", log), Counting("b", log)], 5, 2, 3, 50, lambda done, total: progress.append((done, total))
    )
    assert log == [*[("a", n) for n in (0, 5, 1, 1)], *[("b", n) for n in (0, 5, 1, 1)]] * 4
    assert progress == [(1, 4), (2, 4), (3, 4), (4, 4)]
    for row in found:
        assert row.prompt_spread[0] <= row.prompt_tokens_per_second <= row.prompt_spread[1]
        assert row.generate_spread[0] <= row.generate_tokens_per_second <= row.generate_spread[1]
        assert row.gigabytes_per_second == pytest.approx(1000 * row.generate_tokens_per_second / 1e9)


@pytest.mark.skipif(clib.library() is None, reason=f"no C++ library: {clib.why_missing()}")
def test_a_token_reads_all_matrices_but_one_row_of_the_embedding(tiny_model: Callable[[str], Path]) -> None:
    for name, head_is_embedding in (("qwen2", False), ("llama", True)):
        model = AutoModelForCausalLM.from_pretrained(tiny_model(name), dtype=torch.bfloat16).eval()
        matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and (head_is_embedding or "embed" not in n)]
        assert NativeDecoder(model, 8).bytes_per_token == sum(p.nbytes for p in matrices)


def test_transformers_and_the_native_decoder_say_the_same(tiny_model: Callable[[str], Path]) -> None:
    if missing := clib.why_missing():
        pytest.skip(missing)
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32).eval()
    said = []
    for runner in (speed.Native(NativeDecoder(model, 32), "native"), speed.Transformers(model, "transformers")):
        for _ in range(2):
            runner.start()
            tokens = [runner.read([5, 9, 30])]
            for _ in range(5):
                tokens.append(runner.read([tokens[-1]]))
            said.append(tokens)
    assert said[0] == said[1] == said[2] == said[3]


def test_the_memorys_speed_is_a_plausible_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_READ_BYTES", 1 << 24)
    assert 0.1 < speed.read_bandwidth(1) < 10_000


def test_a_peer_without_its_library_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llama_cpp", None)
    with pytest.raises(UsageError, match="pip install llama-cpp-python"):
        speed.LlamaCpp(tmp_path / "x.gguf", 16, 1)
