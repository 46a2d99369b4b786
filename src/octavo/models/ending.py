"""What a model does after its last decoder block, in two differentiable parts: up to its head, and its head."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from octavo._core.errors import UsageError
from octavo.models import skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Ending:
    """The model's own code after its blocks; see :meth:`octavo.models.adapter.CausalModel.ending`.

    Args:
        model: the model; its blocks are never run.
        body: the part of ``model`` that holds the blocks and whatever follows them up to the head.
        run: a forward pass of ``model`` with autograd over token ids [sequences, tokens], in which hidden states
            [sequences, tokens, width] are what left the last block; None if :class:`skeleton.Finished` ended it.
        name: the model's name, for messages.

    Attributes:
        vocabulary: number of logits per position; known after :meth:`probe`.
    """

    def __init__(
        self, model: PreTrainedModel, body: nn.Module, run: Callable[[Tensor, Tensor], Any], name: str
    ) -> None:
        self._model, self._body, self._run, self._name = model, body, run, name
        self._answer: Any = None
        self.vocabulary = 0

    def states(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """What the head reads [sequences, tokens, width] when ``hidden`` of that shape left the last block."""
        answers: list[Any] = []

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            answers.append(output)
            # The head would be the most expensive part, and is not wanted.
            raise skeleton.Finished

        handle = self._body.register_forward_hook(keep)
        try:
            self._run(ids, hidden)
        finally:
            handle.remove()
        if not answers or not hasattr(answers[0], "last_hidden_state"):
            raise self._cannot()
        # The model's own code wants its own kind of answer from the stand-in in `logits`.
        self._answer = type(answers[0])
        return answers[0].last_hidden_state

    def logits(self, states: Tensor) -> Tensor:
        """Logits [n, vocabulary] of rows [n, width] of what :meth:`states` gave, with the model's scales and caps."""
        blank = torch.zeros(1, len(states), dtype=torch.int64, device=states.device)
        self._body.forward = lambda *_, **__: self._answer(last_hidden_state=states.unsqueeze(0))
        try:
            return self._model(input_ids=blank, use_cache=False).logits.squeeze(0)
        finally:
            del self._body.forward

    def probe(self, ids: Tensor, hidden: Tensor) -> None:
        """Compare both parts with the whole on a few tokens.

        Raises:
            UsageError: they differ.
        """
        whole = self._run(ids, hidden).logits.detach().flatten(0, 1)
        parts = self.logits(self.states(ids, hidden).detach().flatten(0, 1)).detach()
        if whole.shape != parts.shape or not torch.allclose(whole, parts, rtol=1e-4, atol=1e-5, equal_nan=True):
            raise self._cannot()
        self.vocabulary = whole.shape[-1]

    def _cannot(self) -> UsageError:
        return UsageError(
            f"{self._name}: {type(self._model).__name__} does more between its blocks and its logits than can be run "
            "apart. Octavo can neither compute gradients for this architecture (--guided none) nor quantize its head "
            "(no --head-bits)."
        )
