"""The Triton kernel for universal codebooks: AMD and Intel GPUs, and NVIDIA's where CUDA kernels cannot be had.

Codes stay packed; weights are decoded tile by tile, with centroids from the first-level cache, and multiplied: one
input in float32, several as matrices in the dtype of the inputs. Portable rather than at the limit: Triton says neither
where a table stands nor multiplies bytes four at a time, as ``cuda_lookup`` does.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from octavo.codebooks import get as get_codebook
from octavo.kernels.select import Kernel, in_words, registry
from octavo.layout import Layout
from octavo.math import hadamard
from octavo.math.hessian import exact_float32
from octavo.weight import VQWeight

_VECTORS = (2, 4, 8)
_MOST_STAGES, _MOST_BITS, _MOST_TRANSFORM = 4, 8, 256
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Rows and vectors of eight of a tile for one input, rows and inputs of one for several.
_ONE_ROWS, _ONE_INPUTS, _ROWS, _INPUTS = 16, 256, 64, 64


@dataclass(frozen=True)
class TritonMatrix:
    """A weight in the kernel's order.

    Attributes:
        codes: [rows, bytes], the planes of all stages and of the signs one after the other, uint8.
        books: [stages, 256, v] float16, in units of the first stage's; exact.
        scales: [rows] float32, times the first stage's unit.
        bias: [rows] float32, or None.
        signs: of the transform, [in] float32, or None.
        hadamard: the matrix of one block of the transform, [block, block] float32, or None.
        signed: whether the last plane is one of signs.
        nibbles: bit s says that the codes of plane s have four bits.
    """

    codes: Tensor
    books: Tensor
    scales: Tensor
    bias: Tensor | None
    signs: Tensor | None
    hadamard: Tensor | None
    signed: bool
    nibbles: int


def pack(weight: VQWeight) -> TritonMatrix:
    """Regroup a weight whose layout :func:`why_not` has nothing against, on its device."""
    layout, book, device = weight.layout, get_codebook(weight.layout.codebook), weight.device
    planes, nibbles = [], 0
    widths = (*layout.stages, *((layout.vector_length,) if layout.sign_bits else ()))
    for number, (plane, bits) in enumerate(zip(weight.codes(), widths, strict=True)):
        even = functional.pad(plane, (0, plane.shape[1] % 2)).to(torch.uint8)
        nibbles |= int(bits <= 4) << number
        planes.append(even[:, ::2] | even[:, 1::2] << 4 if bits <= 4 else even)
    books = torch.zeros(len(layout.stages), 256, layout.vector_length, dtype=torch.float16)
    for stage, table in enumerate(book.tables):
        # Units differ by powers of two.
        books[stage, : table.shape[0]] = (table.float() * (book.scales[stage] / book.scales[0])).half()
    scales = torch.ones(layout.shape[0], dtype=torch.float32, device=device)
    if layout.block_scale is not None:
        scales = weight.block_scales()[:, 0]
    signs = matrix = None
    if layout.transform is not None:
        signs = hadamard.unpack_signs(weight.tensors["input_signs"], layout.shape[1], torch.float32).contiguous()
        matrix = hadamard.hadamard(torch.eye(layout.transform.input, dtype=torch.float32), layout.transform.input)
        matrix = matrix.to(device)
    return TritonMatrix(
        torch.cat(planes, dim=1).contiguous(),
        books.to(device),
        (scales * book.scales[0]).contiguous(),
        None if weight.bias is None else weight.bias.float().contiguous(),
        signs,
        matrix,
        layout.sign_bits,
        nibbles,
    )


@torch.library.custom_op("octavo::triton_linear", mutates_args=())
def triton_linear(
    x: Tensor,
    codes: Tensor,
    books: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    signs: Tensor | None,
    hadamard: Tensor | None,
    signed: bool,
    nibbles: int,
) -> Tensor:
    """W x + bias for ``x`` [n, in]: [n, rows] in its dtype; the others are the fields of a :class:`TritonMatrix`."""
    from octavo.kernels import _triton_kernels

    kernels: Any = _triton_kernels  # Triton's types want constants as constexpr, which it makes of them itself
    (n, inputs), rows, v = x.shape, scales.shape[0], books.shape[2]
    y = torch.empty(n, rows, dtype=x.dtype, device=x.device)
    if n == 0:
        return y
    moved = x
    if signs is not None and hadamard is not None:
        with exact_float32():
            moved = (x.float() * signs).view(-1, hadamard.shape[0]) @ hadamard
        moved = moved.view(n, inputs) if n == 1 else moved.view(n, inputs).to(x.dtype)
    moved, vectors = moved.contiguous(), -(-inputs // v)
    sizes = (rows, inputs, vectors, vectors + vectors % 2, codes.shape[1])
    added = scales if bias is None else bias
    options = {"V": v, "STAGES": books.shape[0], "NIBBLES": nibbles, "SIGNS": signed, "BIAS": bias is not None}
    # Triton launches on the current device, whatever that of the tensors is.
    with nullcontext() if x.is_cpu else torch.accelerator.device_index(x.device.index):
        if n == 1:
            tile = {"ROWS": _ONE_ROWS, "VECTORS": _ONE_INPUTS // v}
            grid = (-(-rows // _ONE_ROWS),)
            kernels.one[grid](moved, codes, books, scales, added, y, *sizes, **options, **tile)
        else:
            tokens = 16 if n <= 16 else 64
            tile = {"TOKENS": tokens, "ROWS": _ROWS, "VECTORS": _INPUTS // v}
            grid = (-(-rows // _ROWS), -(-n // tokens))
            kernels.many[grid](moved, codes, books, scales, added, y, n, *sizes, **options, **tile)
    return y


@triton_linear.register_fake
def _(x: Tensor, codes: Tensor, books: Tensor, scales: Tensor, *others: Any) -> Tensor:
    return x.new_empty(x.shape[0], scales.shape[0])


def why_not(layout: Layout) -> str:
    """Why the kernel cannot run a layout, or an empty string."""
    block, transform = layout.block_scale, layout.transform
    return in_words(
        {
            "column vectors": layout.direction == "column",
            "codebooks that are not universal": not layout.codebook,
            f"vectors of {layout.vector_length}": layout.vector_length not in _VECTORS,
            f"{len(layout.stages)} stages": len(layout.stages) > _MOST_STAGES,
            "codebooks above 256 entries": max(layout.stages) > _MOST_BITS,
            "several scales per row": block is not None and block.columns < layout.shape[1],
            "zero points": block is not None and block.zero_bits > 0,
            "channel norms": layout.channel_norm != "none",
            "a stored order": layout.permuted,
            "outlier columns": layout.outliers is not None,
            f"transforms of more than {_MOST_TRANSFORM} inputs": transform is not None
            and transform.input > _MOST_TRANSFORM,
            "a transform of the outputs": transform is not None and transform.output > 0,
        }
    )


@registry.register("triton_lookup")
class TritonLookUp(Kernel):
    """Triton: AMD, Intel and NVIDIA GPUs, for universal codebooks; weights are decoded tile by tile."""

    rank = -3
    prepares = True
    prepare = staticmethod(pack)

    @staticmethod
    def missing() -> str:
        if not torch.cuda.is_available() and not torch.xpu.is_available():
            return "no GPU that torch knows"
        return "" if find_spec("triton") else "Triton was not found; pip install triton (on Windows triton-windows)"

    @staticmethod
    def why_not(layout: Layout, device: torch.device) -> str:
        if device.type not in ("cuda", "xpu"):
            return f"it runs on GPUs, not on {device.type}"
        return why_not(layout)

    @staticmethod
    def takes(x: Tensor) -> bool:
        return x.dtype in _DTYPES and not (x.requires_grad and torch.is_grad_enabled())

    @staticmethod
    def linear(x: Tensor, prepared: TritonMatrix) -> Tensor:
        m = prepared
        rows = x.reshape(-1, x.shape[-1])
        y = triton_linear(rows, m.codes, m.books, m.scales, m.bias, m.signs, m.hadamard, m.signed, m.nibbles)
        return y.view(*x.shape[:-1], m.scales.shape[0])
