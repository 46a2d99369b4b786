"""Layers in graphs that torch compiles: operators that a graph does not look into, and layers that they know by number.

Which kernel runs, whether the tensors are still those that were packed, and warnings are no matter for a graph: the
operators do at every call what the layer does without a graph. A tensor that was replaced is therefore noticed, unless
nobody calls, as where a CUDA graph is replayed.
"""

from __future__ import annotations

import itertools
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor

from octavo._core.errors import UsageError


class Layer(Protocol):
    """What the operators want of a :class:`octavo.nn.VQLinear` or a :class:`octavo.heads.VQHead`."""

    def multiply(self, x: Tensor) -> Tensor: ...
    def multiply_decoded(self, x: Tensor) -> Tensor: ...
    def decoded_rows(self, index: Tensor, dtype: torch.dtype) -> Tensor: ...
    def prepared(self) -> Any: ...
    def dequantize(self) -> Tensor: ...


#: Both for as long as somebody holds the layer: operators take tensors and numbers alone.
_live: WeakValueDictionary[int, Layer] = WeakValueDictionary()
_number: WeakKeyDictionary[Layer, int] = WeakKeyDictionary()
_numbers = itertools.count()


@torch.compiler.assume_constant_result
def number_of(layer: Layer, packed: bool) -> int:
    """What the operators know a layer by; called while a graph is made, not when it runs.

    With ``packed`` the layer packs its matrix here: a graph that is being captured may not allocate what outlives it.
    """
    if packed:
        layer.prepared()
    number = _number.setdefault(layer, next(_numbers))
    _live[number] = layer
    return number


def _layer(number: int) -> Layer:
    if (found := _live.get(number)) is None:
        raise UsageError(f"octavo: layer {number} of this graph was freed. Compile the model that is in use.")
    return found


@torch.library.custom_op("octavo::linear", mutates_args=())
def linear(x: Tensor, layer: int, rows: int, differentiable: bool) -> Tensor:
    """W x + bias for ``x`` [.., in_features]: [.., rows] in its dtype, in plain torch if it is ``differentiable``."""
    found = _layer(layer)
    y = found.multiply_decoded(x) if differentiable else found.multiply(x)
    return y.contiguous()


@linear.register_fake
def _(x: Tensor, layer: int, rows: int, differentiable: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


@torch.library.custom_op("octavo::linear_backward", mutates_args=())
def linear_backward(gradient: Tensor, layer: int, columns: int) -> Tensor:
    """``gradient @ W`` for the gradient [.., out_features] of what :func:`linear` gave: [.., columns]."""
    return (gradient @ _layer(layer).dequantize().to(gradient.dtype)).contiguous()


@linear_backward.register_fake
def _(gradient: Tensor, layer: int, columns: int) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], columns)


def _keep(ctx: Any, inputs: tuple[Tensor, int, int, bool], output: Tensor) -> None:
    ctx.layer, ctx.columns = inputs[1], inputs[0].shape[-1]


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    return linear_backward(gradient, ctx.layer, ctx.columns), None, None, None


linear.register_autograd(_gradients, setup_context=_keep)


@torch.library.custom_op("octavo::rows", mutates_args=())
def rows(index: Tensor, layer: int, width: int, dtype: torch.dtype) -> Tensor:
    """Rows of a layer's matrix by number, int64 [..]: [.., width] in ``dtype``."""
    return _layer(layer).decoded_rows(index, dtype)


@rows.register_fake
def _(index: Tensor, layer: int, width: int, dtype: torch.dtype) -> Tensor:
    return index.new_empty(*index.shape, width, dtype=dtype)
