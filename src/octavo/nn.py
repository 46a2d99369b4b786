"""VQLinear: a linear layer whose weight is a VQWeight; and embeddings that look rows of one up."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from octavo import compiled
from octavo._core.clib import SlowPathWarning
from octavo._core.errors import UsageError
from octavo.kernels import reference, select
from octavo.layout import Layout
from octavo.weight import VQWeight


@cache
def _warn_once(text: str) -> None:
    warnings.warn(text, SlowPathWarning, stacklevel=3)


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps the buffers of a module elsewhere and brings them for each call of its ``forward``."""
    hook: Any = getattr(module, "_hf_hook", None)
    return any(getattr(each, "offload", False) and each.offload_buffers for each in getattr(hook, "hooks", (hook,)))


class VQLinear(nn.Module):
    """``y = x W^T + bias`` with W stored as the tensors of a :class:`Layout`; for inference only.

    The buffers are called exactly as ``layout.tensors()`` says and keep those dtypes whatever happens to the module:
    ``.to(torch.bfloat16)`` moves them and casts nothing, since a cast codebook is another codebook. The result has the
    dtype of the input.

    Args:
        layout: how the matrix is stored.
        device: where the (uninitialised) buffers are made.
    """

    def __init__(self, layout: Layout, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.layout = layout
        self.in_features = layout.shape[1]
        self.out_features = layout.shape[0]
        self._prepared: tuple[Any, Any] | None = None
        self._chosen: tuple[Any, str] = None, ""
        # What a dense layer in this place would have; code such as T5's `wo.weight.dtype` asks for it.
        self._dense_dtype = torch.get_default_dtype()
        for name, (dtype, shape) in layout.tensors().items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device))
        if not layout.bias:
            self.register_buffer("bias", None)

    @classmethod
    def from_weight(cls, weight: VQWeight) -> VQLinear:
        """A layer that shares the tensors of ``weight``."""
        layer = cls(weight.layout, device="meta")
        layer.hold(weight)
        return layer

    def hold(self, weight: VQWeight) -> None:
        """Take the tensors of ``weight`` in place of the present ones.

        It may be a part of the matrix: ``in_features`` and ``out_features`` stay what the model around the layer sees.
        """
        self.layout = weight.layout
        self._buffers = {"bias": None, **weight.tensors}
        self._prepared, self._chosen = None, (None, "")

    def vq_weight(self) -> VQWeight:
        """The weight, sharing this layer's tensors.

        Raises:
            FormatError: somebody put a tensor of another dtype or shape into a buffer.
        """
        return VQWeight(self.layout, {name: self._buffers[name] for name in self.layout.tensors()})  # type: ignore[misc]

    @property
    def weight(self) -> Tensor:
        """The dense [out_features, in_features] matrix, decoded only if it is used and not for its dtype or device.

        A fresh tensor at every access: changing it does not change the layer.
        """
        return LazyMatrix(self)

    def dequantize(self) -> Tensor:
        """The dense matrix [out_features, in_features], float32."""
        return self.vq_weight().dequantize()

    def forward(self, x: Tensor) -> Tensor:
        """Multiply [.., in_features] floats; gives [.., out_features] in the same dtype.

        Raises:
            UsageError: ``x`` holds no floats, has another width, or ``OCTAVO_KERNEL`` cannot be honoured.
        """
        if not x.is_floating_point() or x.shape[-1] != self.layout.shape[1]:
            raise UsageError(
                f"VQLinear: input wanted floats [.., {self.layout.shape[1]}], got {x.dtype} {tuple(x.shape)}."
            )
        home = self._buffers["indices"].device  # type: ignore[union-attr]
        if x.device != home:
            raise UsageError(f"VQLinear: its tensors are on {home}, the input is on {x.device}. Move both together.")
        if torch.compiler.is_exporting():
            return self.multiply_decoded(x)  # A program on its own: it takes the tensors, not the layer.
        if torch.compiler.is_compiling():
            wants_gradient = x.requires_grad and torch.is_grad_enabled()
            number = compiled.number_of(self, packed=not wants_gradient)
            return compiled.linear(x, number, self.layout.shape[0], wants_gradient)
        return self.multiply(x)

    def multiply(self, x: Tensor) -> Tensor:
        """:meth:`forward` of an input that was checked, by the kernel that runs here."""
        name = self._kernel(x.device)
        kernel = select.registry.get(name)
        if not kernel.takes(x):
            return self.multiply_decoded(x)
        if kernel.slow and not os.environ.get(select.ENVIRONMENT):
            lacking = [f" The kernel {k}: {why}" for k, why in select.remedies(name, self.layout, x.device).items()]
            _warn_once(kernel.slow + "".join(lacking))
        return kernel.linear(x, self.prepared())

    def multiply_decoded(self, x: Tensor) -> Tensor:
        """:meth:`multiply` in plain torch, through which gradients pass."""
        return reference.linear(x, self.vq_weight())

    def _kernel(self, device: torch.device) -> str:
        """The name of the kernel that runs here; asked again only if the device or the user's choice changes."""
        key = device, os.environ.get(select.ENVIRONMENT)
        if self._chosen[0] != key:
            self._chosen = key, select.choose(self.layout, device)[0]
        return self._chosen[1]

    def why_not_packed(self) -> str:
        """Why this layer does not run from a packed matrix where it is, or an empty string; packs nothing."""
        name, reason = select.choose(self.layout, self._buffers["indices"].device)  # type: ignore[union-attr]
        return "" if select.registry.get(name).prepares else f"the kernel {name} runs it ({reason})"

    def prepared(self) -> Any:
        """What the kernel that runs here made of the tensors; made anew if any of them was replaced or written to.

        Not kept where the tensors themselves are not: offloaded ones come for a call and go after it.
        """
        kernel = self._kernel(self._buffers["indices"].device)  # type: ignore[union-attr]
        if not select.registry.get(kernel).prepares or is_offloaded(self):
            return select.registry.get(kernel).prepare(self.vq_weight())
        buffers = [self._buffers[name] for name in self.layout.tensors()]
        state = (
            kernel,
            *((id(t), t.data_ptr(), t._version) for t in buffers if t is not None and not t.is_inference()),
        )
        if self._prepared is None or self._prepared[0] != state:
            self._prepared = state, select.registry.get(kernel).prepare(self.vq_weight())
        return self._prepared[1]

    def __getstate__(self) -> dict[str, Any]:
        """Copies prepare for themselves."""
        return {**self.__dict__, "_prepared": None}

    def rows(self, index: Tensor) -> Tensor:
        """Rows of the matrix by number, int64 [..]; gives [.., in_features] in the dtype of a dense layer here.

        Raises:
            UsageError: a layout whose rows depend on each other.
        """
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            return compiled.rows(index, compiled.number_of(self, packed=False), self.in_features, self._dense_dtype)
        return self.decoded_rows(index, self._dense_dtype)

    def decoded_rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """:meth:`rows` in a dtype of the caller's choice."""
        if index.numel() == 0:
            return torch.empty(*index.shape, self.in_features, dtype=dtype, device=index.device)
        home = self._buffers["indices"].device  # type: ignore[union-attr]
        rows = self.vq_weight().rows(index.reshape(-1).to(home)).dequantize()
        return rows.to(index.device, dtype).view(*index.shape, self.in_features)

    def rows_times(self, index: Tensor, x: Tensor) -> Tensor:
        """Products [n] float32 of rows, int64 [n], with one input [in_features]; the bias is left out.

        Raises:
            UsageError: a layout whose rows depend on each other.
        """
        kernel = select.registry.get(self._kernel(x.device))
        if kernel.has_rows(self.layout) and kernel.takes(x):
            return kernel.rows_times(index, x, self.prepared())
        return self.vq_weight().rows(index).dequantize() @ x.float()

    @torch.no_grad()
    def densify(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """An ordinary linear layer: the matrix decoded in float32, rounded once to ``dtype`` (default float32)."""
        weight = self.vq_weight()
        dense = nn.Linear(self.in_features, self.out_features, bias=self.layout.bias, device="meta")
        dense.weight = nn.Parameter(weight.dequantize().to(dtype or torch.float32), requires_grad=False)
        if weight.bias is not None:
            # A copy, so that the dense layer does not write into this one.
            dense.bias = nn.Parameter(weight.bias.to(dtype or torch.float32, copy=True), requires_grad=False)
        return dense.train(self.training)

    def extra_repr(self) -> str:
        """The numbers that tell layers apart, true bits beside nominal ones."""
        layout = self.layout
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={layout.bias}, "
            f"bits_per_weight={layout.bits_per_weight:.3f} (indices {layout.nominal_bits:.3f})"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VQLinear:
        """Let ``.to()``, ``.half()``, ``.cuda()`` and the like change the device, never the dtype, of the buffers."""
        self._dense_dtype = fn(torch.empty(0, dtype=self._dense_dtype, device=self._buffers["indices"].device)).dtype  # type: ignore[union-attr]

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


class VQEmbedding(VQLinear):
    """A table of embeddings [tokens, width] stored as a VQWeight: ``forward`` looks rows up by number."""

    def forward(self, x: Tensor) -> Tensor:
        """Rows of the token ids ``x`` [..]: [.., width]."""
        return self.rows(x)

    @torch.no_grad()
    def densify(self, dtype: torch.dtype | None = None) -> nn.Embedding:  # type: ignore[override]
        """An ordinary embedding: the matrix decoded in float32, rounded once to ``dtype`` (default float32)."""
        return _dense_embedding(self.dequantize().to(dtype or torch.float32)).train(self.training)


class TiedEmbedding(nn.Module):
    """The embedding of a model whose output head has the same matrix: looks rows of the head up, stores nothing.

    Args:
        head: the layer that owns the matrix, or another module with its ``rows`` and ``weight``.
    """

    def __init__(self, head: VQLinear) -> None:
        super().__init__()
        # No submodule: its tensors have one name, and one owner who moves them.
        self._head = (head,)

    @property
    def head(self) -> VQLinear:
        """The layer that owns the matrix."""
        return self._head[0]

    @property
    def weight(self) -> Tensor:
        """As :attr:`VQLinear.weight`."""
        return self.head.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of the token ids [..]: [.., width]."""
        return self.head.rows(ids)

    def densify(self, head: nn.Linear) -> nn.Embedding:
        """An ordinary embedding that shares the matrix of the dense ``head``."""
        embedding = _dense_embedding(head.weight).train(self.training)
        embedding.weight = head.weight  # type: ignore[assignment]
        return embedding


def _dense_embedding(matrix: Tensor) -> nn.Embedding:
    embedding = nn.Embedding(matrix.shape[0], matrix.shape[1], device="meta")
    embedding.weight = nn.Parameter(matrix.detach(), requires_grad=False)
    return embedding


class LazyMatrix(Tensor):
    """Knows shape, dtype and device of a VQLinear's matrix for free, and decodes it at the first real operation."""

    _layer: VQLinear
    # transformers' initialisers leave tensors with this mark alone; there is nothing to initialise here.
    _is_hf_initialized = True

    @staticmethod
    def __new__(cls, layer: VQLinear) -> LazyMatrix:
        shape, device = (layer.out_features, layer.in_features), next(layer.buffers()).device
        matrix = Tensor._make_wrapper_subclass(cls, shape, dtype=layer._dense_dtype, device=device)  # type: ignore[attr-defined]
        matrix._layer = layer
        return matrix

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"<matrix {tuple(self.shape)} {self.dtype} of a VQLinear, not decoded>"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def decode(value: Any) -> Any:
            return value._layer.dequantize().to(value.dtype) if isinstance(value, cls) else value

        return func(*tree_map(decode, args), **tree_map(decode, kwargs or {}))
