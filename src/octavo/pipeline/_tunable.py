"""A linear layer whose quantized matrix can be trained: in everything but its indices, and in those where asked to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from octavo._core.errors import UsageError
from octavo.formats.reader import listing
from octavo.layout import Layout
from octavo.math import moves
from octavo.math.pack import pack, unpack
from octavo.stored import decode_codebooks, pack_codes
from octavo.weight import VQWeight

#: What can be trained.
PARTS = ("books", "scales", "biases", "norms")
#: The part that is no number: where blocks are tuned it can be trained as well.
CODES = "codes"
#: Largest codebook, in bits, whose codes are trained: moves look at the distances between all pairs of codewords.
_MAX_CODE_BITS = 12
#: Logarithms of scales are trained as codes that need not be whole; the grid that the codes count in stays.
_CODE = "block_scale_code"


def check_parts(train: Sequence[str], known: Sequence[str] = PARTS) -> tuple[str, ...]:
    """The parts in their usual order.

    Raises:
        UsageError: an unknown one, or none.
    """
    unknown = [part for part in train if part not in known]
    if unknown or not train:
        raise UsageError(f"train wanted some of {', '.join(known)}, got {listing(unknown) if unknown else 'nothing'}.")
    return tuple(part for part in known if part in train)


def has_codes(layout: Layout) -> bool:
    """Whether the codes of a layout can be trained: one stage without signs, of at most 4096 codewords."""
    return len(layout.stages) == 1 and not layout.sign_bits and layout.code_bits <= _MAX_CODE_BITS


def part_of(tensor: str) -> str | None:
    """Which of :data:`PARTS` a tensor of a layout belongs to; None for indices and other integers, which never move."""
    if tensor.startswith("codebook_") or tensor == "outlier_codebook":
        return "books"
    if tensor in ("block_scale", _CODE, "channel_scale", "channel_offset"):
        return "scales"
    return "biases" if tensor == "bias" else None


def norms_of(module: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """(parameter name, module, attribute) of all weights and biases of modules that have only vectors: the norms."""
    found = []
    for prefix, part in module.named_modules():
        own = dict(part.named_parameters(recurse=False))
        if own and own.keys() <= {"weight", "bias"} and all(p.dim() == 1 for p in own.values()):
            found += [(f"{prefix}.{leaf}", part, leaf) for leaf in own if not isinstance(part, TunableLinear)]
    return found


def straight_through(value: Tensor, stored: Tensor) -> Tensor:
    """``stored``, what the file will hold of ``value``, with the gradient of ``value``."""
    return stored + (value - value.detach())


def train_norm(module: nn.Module, leaf: str, dtype: torch.dtype) -> tuple[nn.Parameter, float]:
    """Let a norm be seen as ``dtype`` stores it; its float32 parameter to be trained, and the natural step size."""
    parametrize.register_parametrization(module, leaf, RoundTo(dtype))
    parameter: Any = module.parametrizations[leaf].original  # type: ignore[index,union-attr]
    return parameter.requires_grad_(True), root_mean_square(parameter) or 1.0


class RoundTo(nn.Module):
    """A parametrization: float32 inside, seen as the stored dtype can hold it."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def forward(self, value: Tensor) -> Tensor:
        """``value`` rounded to the stored dtype, in float32."""
        return straight_through(value, value.detach().to(self._dtype).float())


class TunableLinear(nn.Module):
    """``y = x W^T + bias`` with W decoded at every call from float32 parameters, differentiable in all of them.

    The forward pass sees every trained tensor as it will be stored (int8 codebooks, float16 scales), so what is
    measured is what is written; gradients go straight through the rounding.

    Args:
        weight: the quantized matrix; its integers are kept as they are.
        train: the :data:`PARTS` that become parameters; with :data:`CODES`, :meth:`move_codes` moves codes as well,
            where the layout allows it.
        name: the module's name, for messages.
    """

    indices: Tensor
    block_scale_code: Tensor
    block_scale_low: Tensor
    block_scale_step: Tensor

    def __init__(self, weight: VQWeight, train: Sequence[str], name: str) -> None:
        super().__init__()
        self.start = weight
        self.name = name
        #: Decode the matrix as it was before tuning.
        self.at_start = False
        #: Keep only the input for the backward pass, and decode the matrix again in it.
        self.decode_again = False
        #: Keep the matrix decoded where nothing but the scales of its rows changes.
        self.decode_once = False
        self._decoded: Tensor | None = None
        free = weight.relaxed()
        self._free, tensors = free.layout, dict(free.tensors)
        block = self._free.block_scale
        #: Bits of a scale's code, if scales are trained as codes.
        self._code_bits = block.log2_bits if block is not None and "scales" in train else 0
        if block is not None and self._code_bits:
            self._free = replace(self._free, block_scale=replace(block, log2_bits=0))
            tensors[_CODE] = unpack(tensors[_CODE], self._code_bits, self._free.shape[0]).float()
        for key, tensor in tensors.items():
            if part_of(key) in train:
                # A copy: relaxed tensors may be those of the weight, which must stay as they are.
                self.register_parameter(key, nn.Parameter(tensor.clone()))
            else:
                self.register_buffer(key, tensor)
        self.codes = None
        if CODES in train and has_codes(weight.layout):
            self.codes = moves.Displacement(weight.codebook(0), weight.book_ids().expand(weight.layout.index_shape))

    def relaxed(self) -> VQWeight:
        """The weight in float32 before it is rounded to what is stored."""
        tensors = {key: getattr(self, key) for key in self._free.tensors() if hasattr(self, key)}
        if self._code_bits:
            low, step = self.block_scale_low.unsqueeze(1), self.block_scale_step.unsqueeze(1)
            tensors["block_scale"] = torch.exp2(low + step * self.block_scale_code).T
        return VQWeight(self._free, tensors)

    def current(self) -> VQWeight:
        """The weight to compute with, in float32."""
        if self.at_start:
            return self.start.relaxed()
        free, tensors, stored = self._free, self.relaxed().tensors, self.rounded().relaxed()
        trained = {key for key, _ in self.named_parameters(recurse=False)}
        if "codebook_coefficient_0" in trained:
            # Rounding moves scale between coefficients and basis; only their products have stored counterparts.
            free = replace(free, codebook_rank=0)
            tensors = _without_rank(tensors, decode_codebooks(self._free, 0, tensors))
            stored = VQWeight(free, _without_rank(stored.tensors, stored.codebook(0)))
            trained.add("codebook_0")
        if self._code_bits:
            rounded = {"block_scale": straight_through(tensors["block_scale"], stored.block_scales())}
            trained.remove(_CODE)
        else:
            rounded = {}
        rounded |= {key: straight_through(tensors[key], stored.tensors[key]) for key in tensors.keys() & trained}
        return VQWeight(free, {**tensors, **rounded})

    @torch.no_grad()
    def rounded(self) -> VQWeight:
        """The weight in its original layout; what was not trained is what it was, bit for bit.

        Raises:
            NumericalError: values that the stored dtypes cannot hold.
        """
        layout = self.start.layout
        parts = {part_of(key) for key, _ in self.named_parameters(recurse=False)}
        detached = {key: tensor.detach() for key, tensor in self.relaxed().tensors.items()}
        free = self._free
        if self._code_bits:
            free = replace(free, block_scale=layout.block_scale)
            codes = self.block_scale_code.detach().round().clamp(0, (1 << self._code_bits) - 1)
            del detached["block_scale"]
            detached |= {"block_scale_low": self.block_scale_low, "block_scale_step": self.block_scale_step}
            detached[_CODE] = pack(codes.long(), self._code_bits)
        tensors = VQWeight(free, detached).rounded(layout, self.name)
        kept = {key: tensor for key, tensor in self.start.tensors.items() if part_of(key) not in parts}
        if self.codes is not None:
            kept["indices"] = self.indices
        return VQWeight(layout, {**tensors.tensors, **kept})

    def unit(self, key: str) -> float:
        """What a learning rate of 1 means for parameter ``key``: its root mean square, or a factor of 2 for scales'
        logarithms.

        Tensors of zeros (biases, offsets) take the root mean square of the matrix.
        """
        value = getattr(self, key)
        if key == _CODE:
            # Where all scales are equal, nothing depends on the codes.
            return 1.0 / (float(self.block_scale_step.mean()) or 1.0)
        return root_mean_square(value) or root_mean_square(self.start.dequantize()) or 1.0

    def forward(self, x: Tensor) -> Tensor:
        """Multiply [.., in_features] floats."""
        once = self.decode_once and self._only_rows_scale()
        if self.decode_again and torch.is_grad_enabled() and not once:
            # There is no dropout whose random numbers would have to come again.
            again: Any = checkpoint(self._multiply, x, use_reentrant=False, preserve_rng_state=False)
            return again
        return self._multiply_rows(x) if once else self._multiply(x)

    def _multiply(self, x: Tensor) -> Tensor:
        weight = self.current()
        if self.codes is None or self.at_start:
            return functional.linear(x, weight.dequantize(), weight.bias)
        return functional.linear(x, weight.assembled(self.codes.attach(weight.vectors())), weight.bias)

    @torch.no_grad()
    def move_codes(self, rate: float, rule: moves.Rule, neighbours: int) -> None:
        """Move codes by the gradient of the last backward pass, at a learning rate in mean gaps of a codebook."""
        if self.codes is not None:
            weight = self.rounded()
            before = weight.codes()[0]
            after = self.codes.step(before, weight.codebook(0), rate, rule, neighbours)
            if not torch.equal(before, after):
                self.indices = pack_codes(self.start.layout, [after])

    def moved_codes(self) -> int:
        """How many codes are not what they were before tuning."""
        return int((self.rounded().codes()[0] != self.start.codes()[0]).sum())

    def _multiply_rows(self, x: Tensor) -> Tensor:
        weight = self.current()
        if self._decoded is None:
            start = self.start.relaxed()
            scales = start.block_scales()
            # No power of two is zero.
            self._decoded = start.dequantize() / scales
        y = functional.linear(x, self._decoded) * weight.block_scales()[:, 0]
        return y if weight.bias is None else y + weight.bias

    def _only_rows_scale(self) -> bool:
        """Whether scales of whole rows, and biases, are all that changes: a transform of the inputs does not mind."""
        layout = self.start.layout
        block, transform = layout.block_scale, layout.transform
        trained = {key for key, _ in self.named_parameters(recurse=False)}
        return (
            trained <= {_CODE, "bias"}
            and block is not None
            and block.log2_bits > 0
            and block.zero_bits == 0
            and block.columns >= layout.main_columns
            and layout.outliers is None
            and layout.channel_norm == "none"
            and (transform is None or transform.output == 0)
        )


def _without_rank(tensors: Mapping[str, Tensor], codebook: Tensor) -> dict[str, Tensor]:
    low_rank = ("codebook_coefficient_0", "codebook_basis_0")
    return {key: tensor for key, tensor in tensors.items() if key not in low_rank} | {"codebook_0": codebook}


def root_mean_square(value: Tensor) -> float:
    """The square root of the mean square of all numbers."""
    return float(value.detach().square().mean().sqrt())
