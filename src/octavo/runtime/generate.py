"""Token after token from a native decoder: sampling, and conversations whose cache survives between turns."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo._core.errors import UsageError
from octavo.math.threads import one_thread
from octavo.runtime.decoder import NativeDecoder

#: Likeliest tokens that are looked at first; a nucleus that needs more is rare and sorts the whole vocabulary.
_FIRST_LOOK = 1024


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn, in the terms of transformers' ``generate``.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: tokens are drawn from the fewest likeliest ones that have this probability together.
        repetition_penalty: logits of tokens that were there are divided by it, negative ones multiplied.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0 or not 0 < self.top_p <= 1 or not self.repetition_penalty > 0:
            raise UsageError(
                "sampling wanted temperature >= 0, top_p in (0, 1] and repetition_penalty > 0, got "
                f"{self.temperature}, {self.top_p} and {self.repetition_penalty}."
            )

    def draw(self, logits: Tensor, seen: Tensor, generator: torch.Generator | None = None) -> int:
        """The next token for logits [vocabulary], float32, after the tokens ``seen`` [n], int64."""
        if self.repetition_penalty != 1.0:
            there = logits[seen]
            logits = logits.clone()
            logits[seen] = torch.where(there > 0, there / self.repetition_penalty, there * self.repetition_penalty)
        if self.temperature == 0:
            return int(logits.argmax())
        probabilities = torch.softmax(logits / self.temperature, dim=0)
        if self.top_p >= 1:
            return int(torch.multinomial(probabilities, 1, generator=generator))
        likeliest, tokens = probabilities.topk(min(_FIRST_LOOK, len(probabilities)))
        if float(likeliest.sum()) < self.top_p:
            likeliest, tokens = probabilities.sort(descending=True)
        # A token belongs to the nucleus if those before it have less than top_p together.
        before = likeliest.cumsum(0) - likeliest
        inside = likeliest.where(before < self.top_p, 0.0)
        return int(tokens[torch.multinomial(inside, 1, generator=generator)])


class Conversation:
    """Tokens in and out of a decoder; what was said before is not computed again.

    Args:
        decoder: starts from an empty cache.
        sampling: of every token.
        seed: of the sampling.
    """

    def __init__(self, decoder: NativeDecoder, sampling: Sampling, seed: int = 0) -> None:
        self.decoder = decoder
        self._tokens: list[int] = []
        self.begin(sampling, seed)

    def begin(self, sampling: Sampling, seed: int = 0) -> None:
        """Draw the tokens from now on so; the cache stays."""
        self.sampling = sampling
        self._generator = torch.Generator().manual_seed(seed)

    def answer(self, ids: Sequence[int], limit: int, stop: Collection[int]) -> Iterator[int]:
        """Tokens that follow the whole conversation ``ids``; at most ``limit``, the last may be one of ``stop``.

        Whatever ``ids`` has in common with the conversation so far is taken from the cache.

        Raises:
            UsageError: ``ids`` is empty, or longer than the cache.
        """
        if not ids:
            raise UsageError("the prompt is empty.")
        common = 0
        for mine, theirs in zip(self._tokens, ids, strict=False):
            if mine != theirs:
                break
            common += 1
        # The last token is run again where all were there: its logits are what is wanted.
        common = self.decoder.rewind(min(common, len(ids) - 1, self.decoder.length))
        self._tokens = list(ids[:common])
        logits = self._run(ids[common:])
        for _ in range(limit):
            # A second thread of torch's would go on spinning where the decoder's threads want to run.
            with one_thread():
                token = self.sampling.draw(logits, torch.tensor(self._tokens), self._generator)
            yield token
            if token in stop or self.decoder.length == self.decoder.capacity:
                return
            logits = self._run([token])

    def _run(self, tokens: Sequence[int]) -> Tensor:
        logits = self.decoder.run(torch.tensor(tokens))
        self._tokens += tokens
        return logits
