"""How fast a model runs on this machine: prompt and generation, against the memory's speed and against llama.cpp."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from octavo._core.errors import FormatError, UsageError
from octavo.math.threads import one_thread
from octavo.runtime.decoder import NativeDecoder

#: Bytes that are read to measure the memory: far beyond every cache.
_READ_BYTES = 1 << 29
#: Seconds between two runners.
_PAUSE = 0.2


@dataclass(frozen=True)
class Speed:
    """Medians over the rounds, and the spread (least, most) of them.

    Attributes:
        prompt_tokens_per_second, generate_tokens_per_second: of reading a prompt, of saying one token after the other.
        bytes_per_token: weights that one generated token reads; the cache of keys and values comes on top.
        gigabytes_per_second: these bytes times tokens per second.
        outside_matrices: share of the time of generated tokens that is not spent in linear layers, if that is known.
    """

    name: str
    prompt_tokens_per_second: float
    prompt_spread: tuple[float, float]
    generate_tokens_per_second: float
    generate_spread: tuple[float, float]
    bytes_per_token: int | None
    gigabytes_per_second: float | None
    outside_matrices: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


class Runner(Protocol):
    """Something that reads tokens."""

    name: str
    bytes_per_token: int | None

    def start(self) -> None:
        """Forget everything."""

    def read(self, tokens: Sequence[int]) -> int:
        """Read further tokens and return the likeliest next one."""
        ...


class Native:
    """A native decoder as a runner."""

    def __init__(self, decoder: NativeDecoder, name: str) -> None:
        self.decoder, self.name = decoder, name
        self.bytes_per_token: int | None = decoder.bytes_per_token

    def start(self) -> None:
        self.decoder.rewind(0)

    def read(self, tokens: Sequence[int]) -> int:
        with one_thread():
            return int(self.decoder.run(torch.tensor(tokens)).argmax())

    def outside(self) -> float | None:
        """Share of the time since this was asked last that tokens in C++ spent elsewhere than in linear layers."""
        whole, linear = self.decoder.times()
        return 1 - linear / whole if whole else None


class Transformers:
    """A transformers model as a runner, for those that do not run natively."""

    bytes_per_token: int | None = None

    def __init__(self, model: Any, name: str) -> None:
        self.model, self.name = model, name
        self.start()

    def start(self) -> None:
        self._cache: Any = None

    @torch.inference_mode()
    def read(self, tokens: Sequence[int]) -> int:
        ids = torch.tensor([tokens], device=self.model.device)
        output = self.model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = output.past_key_values
        return int(output.logits[0, -1].argmax())


class LlamaCpp:
    """A GGUF file in llama.cpp as a runner.

    Raises:
        UsageError: llama-cpp-python is not installed.
        FormatError: it cannot load the file.
    """

    def __init__(self, path: Path, context: int, threads: int) -> None:
        try:
            import llama_cpp  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise UsageError("--peer needs llama-cpp-python: pip install llama-cpp-python") from error
        self._api: Any = llama_cpp
        # A callback that Python has let go of would crash the library at its next message.
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        loading, running = llama_cpp.llama_model_default_params(), llama_cpp.llama_context_default_params()
        running.n_ctx = context
        running.n_batch = running.n_ubatch = 512
        running.n_threads = running.n_threads_batch = threads
        self._model: Any = llama_cpp.llama_model_load_from_file(str(path).encode(), loading)
        self._context = llama_cpp.llama_init_from_model(self._model, running) if self._model else None
        if not self._context:
            raise FormatError(f"llama.cpp cannot load {path}.")
        self.name = f"llama.cpp {path.name}"
        # All tensors: an embedding that is not the head as well counts, though a token reads one row of it.
        self.bytes_per_token: int | None = int(llama_cpp.llama_model_size(self._model))
        words: Any = llama_cpp.llama_model_get_vocab(self._model)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(words)

    def start(self) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)

    def read(self, tokens: Sequence[int]) -> int:
        for first in range(0, len(tokens), 512):
            part = tokens[first : first + 512]
            given = (ctypes.c_int32 * len(part))(*part)
            if code := self._api.llama_decode(self._context, self._api.llama_batch_get_one(given, len(part))):
                raise FormatError(f"{self.name}: error {code} while it runs.")
        logits = self._api.llama_get_logits_ith(self._context, -1)
        array = (ctypes.c_float * self._vocabulary).from_address(ctypes.addressof(logits.contents))
        return int(torch.frombuffer(array, dtype=torch.float32).argmax())


def read_bandwidth(threads: int) -> float:
    """GB/s that ``threads`` threads together read from memory, the best of some tries."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        numbers = torch.ones(_READ_BYTES // 4, dtype=torch.float32)
        best = min(_timed(numbers.sum) for _ in range(5))
    finally:
        torch.set_num_threads(before)
    return _READ_BYTES / best / 1e9


def measure(
    runners: Sequence[Runner],
    prompt: int,
    generate: int,
    rounds: int,
    vocabulary: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Speed]:
    """Measure all runners in turn, round by round, so that a machine that slows down slows all of them.

    Every round reads ``prompt`` random tokens below ``vocabulary`` from an empty cache, then takes
    ``generate`` likeliest tokens one after the other. A round before the first is not counted.
    """
    ids = torch.randint(0, vocabulary, (prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    seconds: list[tuple[list[float], list[float]]] = [([], []) for _ in runners]
    for turn in range(rounds + 1):
        for runner, (reading, saying) in zip(runners, seconds, strict=True):
            runner.start()
            # The threads of whoever ran before spin for a while before they sleep.
            time.sleep(_PAUSE)
            began = time.perf_counter()
            token = runner.read(ids)
            if isinstance(runner, Native):
                runner.outside()
            middle = time.perf_counter()
            for _ in range(generate):
                token = runner.read([token])
            if turn:
                reading.append(middle - began)
                saying.append(time.perf_counter() - middle)
        if progress is not None:
            progress(turn + 1, rounds + 1)
    found = []
    for runner, (reading, saying) in zip(runners, seconds, strict=True):
        said = generate / statistics.median(saying)
        size = runner.bytes_per_token
        found.append(
            Speed(
                runner.name,
                len(ids) / statistics.median(reading),
                (len(ids) / max(reading), len(ids) / min(reading)),
                said,
                (generate / max(saying), generate / min(saying)),
                size,
                None if size is None else size * said / 1e9,
                # Of the last round.
                runner.outside() if isinstance(runner, Native) else None,
            )
        )
    return found


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
