"""A causal language model that is never in memory as a whole: one decoder block at a time is read, used and let go."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from octavo._core.errors import FormatError, NumericalError, UsageError
from octavo._core.io import sha256_file
from octavo.formats.reader import CheckpointReader
from octavo.models import skeleton
from octavo.models.ending import Ending
from octavo.models.names import match_names
from octavo.models.skeleton import BlockInputs, Target
from octavo.models.source import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Batch = tuple[Tensor, Tensor | None]


class CausalModel:
    """An original model, open for streaming.

    Args:
        source: from :func:`octavo.models.resolve`.
        skip: globs over whole dotted segments of module names (``mlp.down_proj``, ``layers.0``) that stay unquantized.
        with_ends: output head and embedding are to be quantized as well, or with ``"head"`` the head alone.

    Attributes:
        source, config: as given.
        reader: the checkpoint.
        blocks: full names of the decoder blocks, in order.
        ends: output head and embedding, if they are to be quantized; else None.
        notes: what the user should know: skipped layers, linear layers outside the blocks.
        max_positions: longest context that the configuration allows, or None.

    Raises:
        UsageError: an architecture that cannot be streamed, weights that Octavo cannot see, a pattern without match.
        FormatError: checkpoint and configuration do not fit.
    """

    def __init__(self, source: ModelSource, *, skip: Sequence[str] = (), with_ends: bool | str = False) -> None:
        if quantization := getattr(source.config, "quantization_config", None):
            method = quantization.get("quant_method") if isinstance(quantization, dict) else None
            raise UsageError(
                f"{source.name} is quantized already ({method or 'quantization_config in config.json'}). "
                "Pass the original model in float32, bfloat16 or float16."
            )
        self.source = source
        self.config = source.config
        self.reader = CheckpointReader(source.folder)
        self._model = skeleton.build(source)
        self._blocks_name, blocks = skeleton.find_blocks(self._model)
        self._blocks = list(blocks)
        self.blocks = [f"{self._blocks_name}.{i}" for i in range(len(blocks))]
        self._targets = skeleton.find_targets(dict(zip(self.blocks, blocks, strict=True)), skip, source.name)
        alone = with_ends == "head"
        self.ends = skeleton.find_ends(self._model, source.name, head_only=alone) if with_ends else None
        self._sources = match_names(self._model, self.reader)
        #: By module: the order of its outputs and that of its inputs, where these are not those of the checkpoint.
        self._orders: dict[str, tuple[Tensor | None, Tensor | None]] = {}
        self._loaded: dict[int, nn.Module] = {}
        self._fingerprint: str | None = None
        self.max_positions: int | None = getattr(source.config.get_text_config(), "max_position_embeddings", None)
        self.notes = self._write_notes(skip)

    # ---------------------------------------------------------------- what there is

    @property
    def steps(self) -> int:
        """How many parts are quantized one after the other: the blocks, and the ends if they are."""
        return len(self.blocks) + (self.ends is not None)

    def targets(self, index: int) -> dict[str, Target]:
        """The linear layers of block ``index`` that will be quantized, by full module name."""
        return self._targets[index]

    def dense_layers(self) -> list[str]:
        """The linear layers that stay as they are, by full module name."""
        taken = self._taken()
        return [name for name in skeleton.linear_layers(self._model) if name not in taken]

    def _taken(self) -> set[str]:
        """Modules whose tensors the output does not have as they are."""
        return {name for block in self._targets for name in block} | (self.ends.taken if self.ends else set())

    def ties(self) -> dict[str, str]:
        """Name of a tensor that checkpoints may leave out -> the one that it is tied to."""
        return skeleton.ties(self._model)

    def kept(self) -> list[str]:
        """Names of the checkpoint's tensors that are copied unchanged: all but weights and biases to be quantized."""
        taken = {f"{name}.{leaf}" for name in self._taken() for leaf in ("weight", "bias")}
        stored = {self._sources[name] for name in taken & self._sources.keys()}
        shared = {source for name, source in self._sources.items() if name not in taken}
        # A checkpoint may hold both of two tied tensors; then one of them is nobody's source.
        gone = stored | taken
        return [name for name in self.reader.names() if name not in gone or name in shared]

    def model_name(self, stored: str) -> str:
        """The model's name of a checkpoint tensor, under which a new checkpoint has to store it.

        Checkpoints may leave the base model's prefix out or use names of an older transformers; one that mixes these
        with the module paths of quantized matrices would not load. Of tied tensors the stored name is kept, unless it
        is that of a matrix that is quantized without the other.
        """
        taken = self._taken()
        names = [n for n, source in self._sources.items() if source == stored and n.rpartition(".")[0] not in taken]
        return stored if stored in names or not names else names[0]

    @property
    def embedding_bytes(self) -> int:
        """Size in float32 of the input embedding, which is in memory while the blocks' inputs are captured."""
        return 4 * self._model.get_input_embeddings().weight.numel()  # type: ignore[union-attr]

    def auxiliary_files(self) -> list[Path]:
        """Tokenizer and other small files that belong to the model; see :meth:`ModelSource.auxiliary_files`."""
        return self.source.auxiliary_files()

    def fingerprint(self) -> str:
        """SHA-256 over configuration, tensor names, shapes, dtypes and the shards' bytes; independent of paths."""
        if self._fingerprint is None:
            raw = json.loads((self.source.folder / "config.json").read_text("utf-8"))
            raw.pop("_name_or_path", None)
            tensors = [[name, *self.reader.info(name)] for name in self.reader.names()]
            shards = sorted(sha256_file(file) for file in self.reader.files)
            content = json.dumps([raw, tensors, shards], sort_keys=True)
            self._fingerprint = hashlib.sha256(content.encode()).hexdigest()
        return self._fingerprint

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own tokenizer.

        Raises:
            FormatError: there is none, or it is broken.
        """
        from transformers import AutoTokenizer

        folder = self.source.folder
        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=self.source.trust_remote_code)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            present = sorted(path.name for path in folder.glob("*token*"))
            raise FormatError(
                f"{folder} has no tokenizer that transformers can load (tokenizer files there: "
                f"{', '.join(present) or 'none'}): {str(error)[:300]}"
            ) from error

    def weight(self, name: str) -> Tensor:
        """The weight [out, in] of a target, float32, straight from the checkpoint.

        Raises:
            NumericalError: it holds NaN or infinity.
        """
        tensor = self._read(f"{name}.weight", torch.float32)
        return tensor.T.contiguous() if self._target(name).transposed else tensor

    def bias(self, name: str) -> Tensor | None:
        """The bias [out] of a target, float32, or None.

        Raises:
            NumericalError: it holds NaN or infinity.
        """
        return self._read(f"{name}.bias", torch.float32) if self._target(name).bias else None

    # ---------------------------------------------------------------- blocks

    def reorder(self, name: str, outputs: Tensor | None = None, inputs: Tensor | None = None) -> None:
        """Give weight and bias of target ``name`` with outputs and inputs in these orders until its block is released.

        None is the order of the checkpoint. The caller sees to it that the block computes the same: see
        :mod:`octavo.models.neurons`.
        """
        assert name in self._taken(), "octavo bug: only what is quantized is written anew"
        self._orders[name] = outputs, inputs

    def load_block(self, index: int, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Block ``index`` with its weights, in eval mode; it is the caller's to change.

        Raises:
            NumericalError: a weight holds NaN or infinity, or does not fit ``dtype``.
        """
        self._check_dtype(dtype)
        # The configuration is shared with the skeleton; everything else is the copy's own.
        config = self._model.config
        memo = {id(part): part for part in (config, config.get_text_config())}
        block = deepcopy(self._blocks[index], memo)
        for name, module in block.named_modules(prefix=self.blocks[index]):
            self._fill(name, module, dtype, {})
        self.reader.close()
        self._loaded[index] = block
        return block

    def release_block(self, index: int) -> None:
        """Free the weights of a block that :meth:`load_block` gave, whoever still holds it, and forget their orders."""
        for name in self._targets[index]:
            self._orders.pop(name, None)
        block = self._loaded.pop(index, None)
        if block is not None:
            block.to("meta")

    def set_weight(self, block: nn.Module, name: str, weight: Tensor, bias: Tensor | None = None) -> None:
        """Replace the weight [out, in], and the bias if given, of target ``name`` in a loaded ``block``."""
        target = self._target(name)
        index = next(i for i, targets in enumerate(self._targets) if name in targets)
        layer = block.get_submodule(name.removeprefix(self.blocks[index] + "."))
        if tuple(weight.shape) != target.shape:
            raise UsageError(f"{name}: weight {list(target.shape)} wanted, got {list(weight.shape)}")
        with torch.no_grad():
            layer.weight.copy_(weight.T if target.transposed else weight)  # type: ignore[operator]
            if bias is not None:
                layer.bias.copy_(bias)  # type: ignore[operator]

    # ---------------------------------------------------------------- forward passes of the rest

    def capture_inputs(self, batches: Sequence[Batch], dtype: torch.dtype = torch.float32) -> BlockInputs:
        """Run everything before the blocks and record what each block is called with.

        Args:
            batches: (token ids [sequences, tokens], attention mask of that shape or None) each.
            dtype: of weights and hidden states.

        Raises:
            UsageError: windows longer than the model allows, or a model whose blocks cannot be run one by one.
            NumericalError: non-finite weights or embeddings.
        """
        inputs = BlockInputs([], [], [])
        shared = skeleton.SharedArguments()
        with self._rest_on_demand(dtype):
            as_returned = self._return_type(batches, dtype)
            for ids, mask in batches:
                calls: list[dict[str, Any]] = []

                def record(index: int, hidden: Tensor, others: dict[str, Any], calls: list[Any] = calls) -> Any:
                    if index == 0:
                        inputs.hidden.append(hidden)
                    calls.append(shared.share(others, self.blocks[index]))
                    if index + 1 == len(self.blocks):
                        raise skeleton.Finished
                    return as_returned(hidden)

                self._run(ids, mask, record)
                inputs.kwargs.append(calls)
                inputs.mask.append(mask)
        for number, hidden in enumerate(inputs.hidden):
            if not bool(torch.isfinite(hidden).all()):
                raise NumericalError(f"{self.source.name}: the embeddings of batch {number} hold NaN or infinity.")
        return inputs

    def logits(
        self, batches: Sequence[Batch], hidden: Sequence[Tensor], dtype: torch.dtype = torch.float32
    ) -> list[Tensor]:
        """Logits [sequences, tokens, vocabulary] per batch from the hidden states that left the last block."""
        results: list[Tensor] = []
        with self._rest_on_demand(dtype):
            as_returned = self._return_type(batches, dtype)
            for (ids, mask), final in zip(batches, hidden, strict=True):

                def replay(index: int, state: Tensor, others: dict[str, Any], final: Tensor = final) -> Any:
                    # Inference tensors lack the version counter by which changes between blocks are noticed.
                    return as_returned(state if index + 1 < len(self.blocks) else final.clone())

                results.append(self._run(ids, mask, replay).logits)
        return results

    @contextmanager
    def ending(self, ids: Tensor, hidden: Tensor, dtype: torch.dtype = torch.float32) -> Iterator[Ending]:
        """What follows the last block, while inside; it is tried on ``ids`` and ``hidden`` of one batch.

        Raises:
            UsageError: it cannot be run apart from the rest.
        """
        with self._rest_on_demand(dtype):
            as_returned, last = self._return_type([(ids, None)], dtype), len(self.blocks) - 1

            def run(ids: Tensor, final: Tensor) -> Any:
                return self._run(ids, None, lambda i, h, _: as_returned(final if i == last else h), grad=True)

            # get_decoder() is the whole model for some families.
            body = self._model.get_submodule(self._blocks_name.rpartition(".")[0])
            ending = Ending(self._model, body, run, self.source.name)
            # Inference tensors cannot take part in autograd.
            ending.probe(ids[:1, :8], hidden[:1, :8].clone())
            yield ending

    def _run(self, ids: Tensor, mask: Tensor | None, replace: skeleton.StandIn, grad: bool = False) -> Any:
        if self.max_positions is not None and ids.shape[1] > self.max_positions:
            raise UsageError(
                f"windows of {ids.shape[1]} tokens are longer than the {self.max_positions} positions of "
                f"{self.source.name}; use a smaller --ctx."
            )
        with torch.set_grad_enabled(grad), skeleton.stand_ins(self._blocks, self._blocks_name, replace):
            try:
                # A cache would make later passes attend to this one's keys.
                return self._model(input_ids=ids, attention_mask=mask, use_cache=False)
            except skeleton.Finished:
                return None

    def _return_type(self, batches: Sequence[Batch], dtype: torch.dtype) -> Any:
        """How the blocks of this model wrap their hidden states; block 0 is asked with a few tokens."""
        if not batches:
            raise UsageError("no calibration batches were given")
        first = self.load_block(0, dtype)
        answers: list[Any] = []

        def probe(index: int, hidden: Tensor, others: dict[str, Any]) -> Any:
            answers.append(first(hidden, **others))
            raise skeleton.Finished

        self._run(batches[0][0][:1, :8], None, probe)
        self.release_block(0)
        answer = answers[0]
        if isinstance(answer, Tensor):
            return lambda hidden: hidden
        if isinstance(answer, tuple) and isinstance(answer[0], Tensor):
            # Attention weights and the like, which the model may collect but must not pass on.
            others = [None if part is None else skeleton.Unused() for part in answer[1:]]
            return lambda hidden: (hidden, *others)
        raise UsageError(
            f"{self.blocks[0]} returns a {type(answer).__name__} instead of hidden states; Octavo cannot run "
            f"{self.source.name} block by block."
        )

    @contextmanager
    def _rest_on_demand(self, dtype: torch.dtype) -> Iterator[None]:
        """While inside, a module outside the blocks gets its weights when it is first called, and only then.

        What never runs (vision towers, or the output head while inputs are captured) is never read.
        """
        self._check_dtype(dtype)
        inside = {id(m) for block in self._blocks for m in block.modules()}
        cache: dict[str, Tensor] = {}
        filled: dict[str, nn.Module] = {}

        def fill(name: str, module: nn.Module, *_: Any) -> None:
            if name not in filled:
                filled[name] = module
                self._fill(name, module, dtype, cache)

        handles = [
            module.register_forward_pre_hook(partial(fill, name))
            for name, module in self._model.named_modules()
            if id(module) not in inside
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module in filled.values():
                for leaf, parameter in module._parameters.items():
                    if parameter is not None:
                        module._parameters[leaf] = nn.Parameter(parameter.to("meta"), requires_grad=False)
            self.reader.close()

    # ---------------------------------------------------------------- tensors

    def _fill(self, name: str, module: nn.Module, dtype: torch.dtype, cache: dict[str, Tensor]) -> None:
        """Give ``module`` its own (not its children's) parameters and persistent buffers; ``cache`` keeps ties tied."""
        prefix = f"{name}." if name else ""
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                source = self._sources[prefix + leaf]
                if source not in cache:
                    cache[source] = self._read(prefix + leaf, dtype)
                module._parameters[leaf] = nn.Parameter(cache[source], requires_grad=False)
        for leaf, buffer in module._buffers.items():
            if buffer is not None and leaf not in module._non_persistent_buffers_set:
                module._buffers[leaf] = self._read(prefix + leaf, buffer.dtype)

    def _check_dtype(self, dtype: torch.dtype) -> None:
        stored = {self.reader.info(self._sources[f"{name}.weight"])[0] for block in self._targets[:1] for name in block}
        if dtype == torch.float16 and stored - {"F16"}:
            raise UsageError(
                f"{self.source.name} is stored as {'/'.join(sorted(stored))}, whose activations can overflow float16. "
                "Calibrate in float32 or bfloat16."
            )

    def _read(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor of the model as a copy of its own in ``dtype``, known to be finite."""
        source = self._sources[name]
        stored = self.reader.read(source)
        tensor = stored.to(dtype, copy=True)
        # A finite sum proves finite entries; a sum that overflows is settled by the exact test.
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.sum())) and not bool(tensor.isfinite().all()):
            where, bad = f"{self.source.name}: {source}", int((~tensor.isfinite()).sum())
            if not bool(stored.isfinite().all()):
                raise NumericalError(
                    f"{where} holds NaN or infinity ({bad} of {tensor.numel()} values). The checkpoint is damaged; "
                    "fetch it again."
                )
            raise NumericalError(f"{where}: {bad} values overflow when converted from {stored.dtype} to {dtype}.")
        module, _, leaf = name.rpartition(".")
        orders = self._orders.get(module, ())
        if orders and leaf == "weight" and self._target(module).transposed:
            orders = orders[::-1]
        for axis, order in enumerate(orders[: tensor.dim()]):
            tensor = tensor if order is None else tensor.index_select(axis, order)
        return tensor

    def _target(self, name: str) -> Target:
        for part in (*self._targets, self.ends.targets if self.ends else {}):
            if name in part:
                return part[name]
        raise UsageError(f"{name} is no layer to be quantized of {self.source.name}")

    def _write_notes(self, skip: Sequence[str]) -> list[str]:
        notes: list[str] = []
        inside = {id(m) for block in self._blocks for m in block.modules()}
        head = self._model.get_output_embeddings()
        outside = [
            name
            for name, module in self._model.named_modules()
            if skeleton.is_linear(module) and id(module) not in inside and module is not head
        ]
        if outside:
            more = f" and {len(outside) - 4} more" if len(outside) > 4 else ""
            notes.append(f"kept as they are, outside the decoder blocks: {', '.join(outside[:4])}{more}")
        if skip:
            every = sum(skeleton.is_linear(m) for block in self._blocks for m in block.modules())
            notes.append(f"skipped on request: {every - sum(map(len, self._targets))} of {every} linear layers")
        if self.source.trust_remote_code:
            notes.append(f"{self.source.name} may run Python code of its own (trust_remote_code)")
        return notes
