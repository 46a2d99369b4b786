"""The native decoder: a loaded model of the Llama family, one call of the C++ library per token.

It shares the weights of the transformers model that it is made from - packed matrices, embedding, norms - and keeps a
cache of keys and values that survives between turns.
"""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from octavo._core import clib
from octavo._core.errors import ResourceError, UsageError
from octavo.heads import VQHead
from octavo.kernels import lookup
from octavo.kernels._packed import PackedMatrix
from octavo.nn import TiedEmbedding, VQLinear
from octavo.runtime import _structs as structs

_BEST_ISA = 0
#: Architectures whose blocks are those of ``octavo_block``; tests hold each of them to transformers.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2")
_ACTIVATIONS = {"silu": 0, "gelu_pytorch_tanh": 1}
#: Rotary positions whose frequencies do not depend on the length.
_ROPES = ("default", "linear", "llama3")
#: How keys and values are kept, in the order of ``OCTAVO_CACHE_*``.
KV_CACHES = ("float16", "int8")
#: A token reads half as much of them, and the KL of a model of 2 bits changes by less than .1 % (docs/speed.md).
DEFAULT_KV_CACHE = "int8"
#: Prompts from this length on are read by transformers, whose products of decoded matrices are faster then.
_LONG_PROMPT = 32
_NORMS = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "query_norm": "self_attn.q_norm",
    "key_norm": "self_attn.k_norm",
}
#: Gemma 2 norms what a block adds, too, and calls the norms by other names.
_FOUR_NORMS = {
    "attention_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}
_LAYERS = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def why_not(model: Any) -> str:
    """Why a loaded model cannot run natively, or an empty string."""
    if missing := clib.why_missing():
        return missing
    config = model.config.get_text_config()
    if config.model_type not in FAMILIES:
        return f"{config.model_type} is none of the architectures that run natively ({', '.join(FAMILIES)})"
    if {tensor.device.type for tensor in model.parameters()} != {"cpu"}:
        return "the native decoder runs on the CPU"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in _ROPES:
        return f"rotary positions of type {rope} change with the length of the text"
    if _activation(config) not in _ACTIVATIONS:
        return f"activation {_activation(config)} is none of {', '.join(_ACTIVATIONS)}"
    if any(kind not in ("full_attention", "sliding_attention") for kind in getattr(config, "layer_types", None) or ()):
        return "it has layers that are neither full nor sliding attention"
    for name, layer in model.named_modules():
        if isinstance(layer, VQLinear) and (reason := layer.why_not_packed()):
            return f"{name} is not packed: {reason}"
        if not isinstance(layer, VQLinear | nn.Linear) and name.endswith("_proj"):
            return f"{name} is a {type(layer).__name__}"
    embedding = model.get_input_embeddings()
    table = embedding.head if isinstance(embedding, TiedEmbedding) else embedding
    for part in table.parts if isinstance(table, VQHead) else [table]:
        if isinstance(part, VQLinear) and (reason := lookup.why_not(part.layout)):
            return f"rows of the embedding cannot be looked up in its matrix: {reason}"
    return ""


def _activation(config: Any) -> str:
    return getattr(config, "hidden_activation", None) or config.hidden_act


class NativeDecoder:
    """Runs a model's tokens one after the other, with a cache for ``capacity`` of them.

    Args:
        model: a transformers model on the CPU that :func:`why_not` has nothing against.
        capacity: tokens that a conversation may have; None takes what the model was made for, at most 4096.
        threads: of the C++ library; None takes as many as torch uses.
        kv_cache: how keys and values are kept, one of :data:`KV_CACHES`: int8 has a factor per token and head.

    Attributes:
        length: tokens that the cache holds.
        capacity: tokens that it can hold.
        bytes_per_token: weights that a token reads; keys and values come on top.

    Raises:
        UsageError: the model cannot run natively.
        ResourceError: the cache does not fit into memory.
    """

    def __init__(
        self, model: Any, capacity: int | None = None, threads: int | None = None, kv_cache: str = DEFAULT_KV_CACHE
    ) -> None:
        if kv_cache not in KV_CACHES:
            raise UsageError(f"kv_cache wanted one of {', '.join(KV_CACHES)}, got {kv_cache!r}.")
        if reason := why_not(model):
            raise UsageError(f"{type(model).__name__} cannot run natively: {reason}.")
        # Asked now: whoever runs the decoder may confine torch to one thread meanwhile.
        self.model, self.threads = model, threads or clib.threads()
        config = model.config.get_text_config()
        self.capacity = capacity or min(getattr(config, "max_position_embeddings", None) or 4096, 4096)
        self.length = 0
        self.bytes_per_token = 0
        # Length of a prompt of which some layer has the last keys only.
        self._windowed = 0
        self._kept: list[Any] = []
        self._vocabulary = model.get_output_embeddings().weight.shape[0]
        self._logit_cap = getattr(config, "final_logit_softcapping", None) or 0.0
        decoder = self._decoder(config)
        handle = ctypes.c_void_p()
        lib = clib.library()
        assert lib is not None
        try:
            arguments = (ctypes.addressof(decoder), self.capacity, KV_CACHES.index(kv_cache), ctypes.addressof(handle))
            clib.call(lib.octavo_session_create, *arguments)
        except MemoryError as error:
            raise ResourceError(
                f"the cache of keys and values for {self.capacity} tokens does not fit into memory; use fewer."
            ) from error
        self._session = handle.value
        # Not at exit: a thread of a server may be in the library then.
        weakref.finalize(self, lib.octavo_session_destroy, self._session).atexit = False

    # ---------------------------------------------------------------- running

    def run(self, tokens: Tensor) -> Tensor:
        """Add tokens [n] to the conversation; logits [vocabulary], float32, after the last one.

        Raises:
            UsageError: no token, one that the vocabulary lacks, or more than the cache has room for.
        """
        tokens = tokens.to(torch.int64).contiguous()
        if tokens.ndim != 1 or tokens.numel() == 0:
            raise UsageError(f"run: tokens wanted [n >= 1], got shape {list(tokens.shape)}.")
        if self.length + tokens.numel() > self.capacity:
            raise UsageError(
                f"the conversation has {self.length} tokens and {tokens.numel()} more, but its cache has room for "
                f"{self.capacity}; make a decoder with a larger capacity."
            )
        if self.length == 0 and tokens.numel() >= _LONG_PROMPT:
            return self._read_prompt(tokens)
        lib = clib.library()
        assert lib is not None
        head = self.model.get_output_embeddings()
        size = head.in_features if isinstance(head, VQHead) else self._vocabulary
        found = torch.empty(size, dtype=torch.float32, device="cpu")
        status = clib.call(
            lib.octavo_session_run,
            *(self._session, tokens.data_ptr(), tokens.numel(), self.length, found.data_ptr()),
            *(self.threads, _BEST_ISA),
        )
        if status == clib.OUT_OF_RANGE:
            raise UsageError(f"run: a token is not in 0..{self._vocabulary - 1}.")
        self.length += tokens.numel()
        return self._logits(head, found) if isinstance(head, VQHead) else found

    @torch.inference_mode()
    def _logits(self, head: VQHead, state: Tensor) -> Tensor:
        """A head of several parts is no single product; the library leaves it to its module."""
        logits = head(state.unsqueeze(0))[0]
        return self._logit_cap * torch.tanh(logits / self._logit_cap) if self._logit_cap else logits

    def times(self) -> tuple[float, float]:
        """Seconds that tokens took in C++ since this was asked last, and those of them in linear layers."""
        lib = clib.library()
        assert lib is not None
        whole, linear = ctypes.c_double(), ctypes.c_double()
        lib.octavo_session_times(self._session, ctypes.addressof(whole), ctypes.addressof(linear))
        return whole.value, linear.value

    def rewind(self, length: int) -> int:
        """Forget all but the first ``length`` tokens, or all: a sliding window may have lost keys that they would see.

        Returns:
            How many are left.
        """
        if not 0 <= length <= self.length:
            raise UsageError(f"rewind: length wanted 0..{self.length}, got {length}.")
        self.length = length if length >= self._windowed else 0
        return self.length

    @torch.inference_mode()
    def _read_prompt(self, tokens: Tensor) -> Tensor:
        """Let transformers run the first tokens, and take over its keys and values."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            output = self.model(input_ids=tokens.unsqueeze(0), use_cache=True, logits_to_keep=1)
        finally:
            torch.set_num_threads(before)
        lib = clib.library()
        assert lib is not None
        self._windowed = 0
        for index, layer in enumerate(output.past_key_values.layers):
            keys, values = (x[0].float().contiguous() for x in (layer.keys, layer.values))
            # A sliding window keeps only the last ones; none older is ever looked at.
            first, count = tokens.numel() - keys.shape[1], keys.shape[1]
            self._windowed = tokens.numel() if first > 0 else self._windowed
            arguments = (index, first, count, keys.data_ptr(), values.data_ptr())
            clib.call(lib.octavo_session_write, self._session, *arguments)
        self.length = tokens.numel()
        return output.logits[0, -1].float()

    # ---------------------------------------------------------------- what C++ is told

    def _decoder(self, config: Any) -> structs.Decoder:
        body = self.model.get_decoder()
        blocks = (structs.Block * len(body.layers))()
        for index, layer in enumerate(body.layers):
            blocks[index] = self._block(config, index, layer, body.rotary_emb)
        attention = body.layers[0].self_attn
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        decoder = structs.Decoder(
            blocks=len(blocks),
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            key_heads=config.num_key_value_heads,
            head_width=attention.head_dim,
            intermediate=config.intermediate_size,
            vocabulary=self._vocabulary,
            block=blocks,
            final_norm=self._norm(body.norm),
            # A token reads one row of it.
            **self._embedding(embedding),
            # Without one, what it would read is put out.
            head=self._head(head),
            epsilon=config.rms_norm_eps,
            attention_scale=attention.scaling,
            attention_cap=getattr(config, "attn_logit_softcapping", None) or 0.0,
            logit_cap=self._logit_cap,
            embedding_factor=_embedding_factor(embedding, config),
            activation=_ACTIVATIONS[_activation(config)],
        )
        self._kept.append(blocks)
        return decoder

    def _block(self, config: Any, index: int, layer: nn.Module, rotary: Any) -> structs.Block:
        norms = _FOUR_NORMS if hasattr(layer, "pre_feedforward_layernorm") else _NORMS
        block = structs.Block(rotary_factor=rotary.attention_scaling, window=_window(config, index))
        for name, path in norms.items():
            if (norm := _find(layer, path)) is not None:
                setattr(block, name, self._norm(norm))
        for name, path in _LAYERS.items():
            setattr(block, name, self._layer(layer.get_submodule(path)))
        block.frequencies = self._numbers(rotary.inv_freq)
        return block

    def _embedding(self, embedding: Any) -> dict[str, Any]:
        table = embedding.head if isinstance(embedding, TiedEmbedding) else embedding
        if not isinstance(table, VQHead):
            return {"embedding": self._layer(embedding, counted=False)}
        first, *others = (self._layer(part, counted=False) for part in table.parts)
        if not others:
            return {"embedding": first}
        places = table.places.contiguous()
        self._kept.append(places)
        return {"embedding": first, "others": others[0], "places": places.data_ptr()}

    def _head(self, head: Any) -> structs.Linear:
        if not isinstance(head, VQHead):
            return self._layer(head)
        self.bytes_per_token += head.bytes_per_state
        return structs.Linear()

    def _layer(self, layer: Any, *, counted: bool = True) -> structs.Linear:
        """A linear layer or an embedding; ``counted`` if a token reads all of it."""
        layer = layer.head if isinstance(layer, TiedEmbedding) else layer
        if not isinstance(layer, VQLinear):
            return self._linear(layer.weight, getattr(layer, "bias", None), counted=counted)
        prepared = layer.prepared()
        assert isinstance(prepared, PackedMatrix)
        self._kept.append(prepared)
        self.bytes_per_token += prepared.weight.bits() // 8 if counted else 0
        return structs.Linear(matrix=prepared.handle, out=layer.out_features, in_=layer.in_features)

    def _linear(self, weight: Tensor, bias: Tensor | None = None, *, counted: bool = True) -> structs.Linear:
        """A dense matrix; bfloat16 is used where it lies, everything else as float32."""
        kind = "bfloat16" if weight.dtype == torch.bfloat16 else "float32"
        matrix = weight.detach().contiguous()
        matrix = matrix if kind == "bfloat16" else matrix.float()
        self._kept.append(matrix)
        self.bytes_per_token += matrix.nbytes if counted else 0
        out, inp = matrix.shape
        layer = structs.Linear(out=out, in_=inp)
        setattr(layer, kind, matrix.data_ptr())
        if bias is not None:
            layer.bias = self._numbers(bias)
        return layer

    def _norm(self, module: Any) -> int:
        # Gemma's norms multiply by 1 + weight.
        return self._numbers(module.weight.float() + (1.0 if "Gemma" in type(module).__name__ else 0.0))

    def _numbers(self, tensor: Tensor) -> int:
        kept = tensor.detach().float().contiguous()
        self._kept.append(kept)
        return kept.data_ptr()


def _find(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _window(config: Any, index: int) -> int:
    kinds = getattr(config, "layer_types", None)
    if kinds and kinds[index] == "full_attention":
        return 0
    return getattr(config, "sliding_window", None) or 0


def _embedding_factor(embedding: Any, config: Any) -> float:
    scale = getattr(embedding, "embed_scale", None)
    if scale is not None:
        return float(torch.as_tensor(scale).to(embedding.weight.dtype))
    # Gemma multiplies in the model's forward.
    return (
        float(torch.tensor(config.hidden_size**0.5, dtype=embedding.weight.dtype))
        if config.model_type == "gemma"
        else 1.0
    )
