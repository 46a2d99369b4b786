"""The original model while its quantized version is tuned: only what it answers is kept, not the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from octavo._core.errors import UsageError
from octavo.calibration import capture
from octavo.calibration.products import calibration_products
from octavo.formats import Quantized
from octavo.formats.reader import CheckpointReader
from octavo.models import skeleton
from octavo.models.adapter import CausalModel
from octavo.models.source import ModelSource

#: Tokens per forward pass.
_BATCH_TOKENS = 4096


class Original(CausalModel):
    """The original model, streamed: what its head reads, for all tokens, one block in memory at a time."""

    def __init__(self, source: ModelSource) -> None:
        # Nothing will be quantized, so no layer has to be one that could be.
        super().__init__(source, skip=("*",))
        self.notes = []

    def check(self, student: ModelSource, config: Quantized) -> None:
        """Refuse a model that the quantized one was not made from.

        Raises:
            UsageError: another architecture, other shapes, another output head.
        """
        if problem := self._difference(student, config):
            raise UsageError(
                f"{self.source.name} is not the original of {student.name}: {problem}. Pass the model that it was "
                "quantized from as --reference."
            )

    def _difference(self, student: ModelSource, config: Quantized) -> str:
        mine, theirs = self.config.model_type, student.config.model_type
        if mine != theirs:
            return f"it is a {mine}, {student.name} a {theirs}"
        head = config.head
        shapes = {n: x.shape for n, x in config.layouts.items() if head is None or n not in head.matrices}
        if head is not None:
            shapes[head.module] = head.tokens, head.width
        for name, wanted in shapes.items():
            try:
                module = self._model.get_submodule(name)
                is_table = isinstance(module, nn.Embedding)
                shape = tuple(module.weight.shape) if is_table else skeleton.target_of(module).shape
            except AttributeError:
                return f"it has no linear layer {name}"
            if shape != wanted:
                return f"its {name} is {list(shape)}, in {student.name} {list(wanted)}"
        # Embeddings and heads that were not quantized were copied, and are not tuned: they must be equal.
        reader = CheckpointReader(student.folder)
        taken = {self._sources.get(f"{name}.weight") for name in shapes}
        ends = (self._model.get_input_embeddings(), self._model.get_output_embeddings())
        for name, module in self._model.named_modules():
            stored = self._sources.get(f"{name}.weight")
            if stored is None or stored in taken or not any(module is end for end in ends):
                continue
            kept = self.model_name(stored)
            if kept not in reader or reader.info(kept) != self.reader.info(stored):
                return f"its {stored} is not there in the same dtype and shape"
            if not torch.equal(reader.read(kept), self.reader.read(stored)):
                return f"its {stored} has other values"
        return ""

    def final_states(self, tokens: Tensor, device: torch.device, progress: Callable[[int, int], None]) -> list[Tensor]:
        """What the head reads [windows, tokens, width] per batch, float32 on the CPU, for token windows.

        Raises:
            NumericalError: non-finite weights or activations.
        """

        def move(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor) else value

        batches = [(ids, None) for ids in tokens.split(max(_BATCH_TOKENS // tokens.shape[1], 1))]
        inputs = self.capture_inputs(batches)
        hidden = [move(states) for states in inputs.hidden]
        inputs.hidden.clear()
        for index, name in enumerate(self.blocks):
            block = self.load_block(index).to(device)
            # Arguments that batches share are moved once.
            moved = {id(k[index]): tree_map(move, k[index]) for k in inputs.kwargs}
            with calibration_products(self.source.dtype, device):
                hidden = capture.forward(block, hidden, [moved[id(k[index])] for k in inputs.kwargs], name)
            self.release_block(index)
            progress(index + 1, len(self.blocks))
        return self._heads_input(batches, [states.cpu() for states in hidden])

    def _heads_input(self, batches: Sequence[Any], hidden: Sequence[Tensor]) -> list[Tensor]:
        results: list[Tensor] = []

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            results.append(output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0])
            # The head would be the most expensive part, and is not wanted.
            raise skeleton.Finished

        with self._rest_on_demand(torch.float32):
            as_returned = self._return_type(batches, torch.float32)
            handle = self._model.get_decoder().register_forward_hook(keep)
            try:
                for (ids, mask), final in zip(batches, hidden, strict=True):

                    def replay(index: int, state: Tensor, _: dict[str, Any], final: Tensor = final) -> Any:
                        return as_returned(state if index + 1 < len(self.blocks) else final.clone())

                    self._run(ids, mask, replay)
            finally:
                handle.remove()
        return results
