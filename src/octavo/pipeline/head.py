"""Output head and embedding as further quantized matrices: which layouts they get, and what their codes are chosen by.

The head is a linear layer like the others, with the second moment of what it reads; an embedding is looked up, so that
every element of a row counts the same. A matrix that is both at once gets a mixture of the two. Rows differ by far more
than columns: the tokens that matter most get more bits, the others fewer, at the same size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from octavo._core.config import from_dict, to_dict
from octavo._core.errors import NumericalError, UsageError
from octavo.algorithms import Algorithm
from octavo.algorithms.universal import Universal
from octavo.algorithms.vq_logits import Calibration, VQLogits
from octavo.calibration.data import Tokens
from octavo.formats.head import CLASSES, WHOLE, HeadLayout
from octavo.heads import pack_classes
from octavo.layout import Layout
from octavo.math.hessian import HessianAccumulator
from octavo.math.logits import LogitStatistics, logit_statistics
from octavo.models.adapter import CausalModel
from octavo.models.ending import Ending

#: For heads alone: finer than any matrix of a block would get.
_FINE = "gaussian-v4-k256-256-256"
#: What an embedding's own errors weigh in a matrix that is head and embedding, against those of the head.
TIED_SHARE = 0.1
#: Bits of all rows -> those of the rare and of the frequent tokens' rows. The share of the frequent ones follows. Bits
#: that miss here have nothing below or above them.
ROW_CLASSES = {1.5: (1.0, 3.5), 2.0: (1.5, 4.0), 2.5: (2.0, 4.0), 3.0: (2.5, 6.0), 3.5: (3.0, 6.0), 4.0: (3.0, 6.0)}
#: One calibration window of so many is held out, to say when codewords are fitted well enough.
_HELD_OUT = 8


@dataclass(frozen=True)
class HeadOptions:
    """What the output head becomes; see :func:`head_options`.

    Attributes:
        bits: of a code per weight of head and embedding, or None: the head has codewords alone.
        codes: codewords of the model's width, or None.
        classes: rows of frequent tokens get more bits, all others fewer.
    """

    bits: float | None
    codes: VQLogits | None
    classes: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {"bits": self.bits, "classes": self.classes, "codes": to_dict(self.codes) if self.codes else None}

    @property
    def ends(self) -> bool | str:
        """As :class:`CausalModel` takes ``with_ends``."""
        return "head" if self.bits is None else True


def head_options(
    head: str | None, bits: float | None, codes: int | None = None, options: Mapping[str, Any] | None = None
) -> HeadOptions | None:
    """What ``--head``, ``--head-bits``, ``--head-codes`` and ``--head-set`` ask for, or None.

    Raises:
        UsageError: options that contradict each other.
    """
    given = dict(options or {})
    if head not in (None, "vq", "vq-logits"):
        raise UsageError(f"--head wanted vq or vq-logits, got {head!r}.")
    if head is None and bits is None:
        if codes is not None or given:
            raise UsageError("--head-codes and --head-set want --head vq-logits, or --head vq with --head-bits.")
        return None
    if head == "vq-logits" and bits is not None:
        raise UsageError(
            "--head vq-logits has codewords and no rows, so --head-bits means nothing to it; use --head vq --head-bits "
            f"{bits:g} --head-codes {codes or 2048} for codewords that choose the rows to be looked at."
        )
    if head == "vq" and bits is None:
        raise UsageError("--head vq wants --head-bits, such as 4.")
    classes = given.pop("classes", False)
    if type(classes) is not bool:
        raise UsageError(f"--head-set classes wanted true or false, got {classes!r}.")
    if classes and bits not in ROW_CLASSES:
        known = ", ".join(f"{b:g}" for b in ROW_CLASSES)
        raise UsageError(f"--head-set classes=true wants --head-bits of {known}; others have none above or below them.")
    if codes is not None and "codes" in given:
        raise UsageError("--head-codes and --head-set codes are the same; give one of them.")
    if head == "vq-logits" or codes is not None:
        return HeadOptions(bits, from_dict(VQLogits, {**({"codes": codes} if codes else {}), **given}, "head"), classes)
    if given:
        raise UsageError(f"--head-set {next(iter(given))} is an option of codewords; ask for them with --head-codes.")
    return HeadOptions(bits, None, classes)


def head_algorithm(algorithm: Algorithm) -> Universal:
    """The method for head and embedding: universal codebooks, with the other options of ``algorithm`` if it has them.

    Rows stay apart, for they are looked up one by one.
    """
    base = algorithm if isinstance(algorithm, Universal) else Universal(side_dtype=algorithm.side_dtype)
    return replace(base, codebook=None, direction="row", transform="input", scale_block=0)


@dataclass(frozen=True)
class HeadPlan:
    """Layouts of the matrices at the ends of a model by module, and how the head is put together if it is not one."""

    layouts: dict[str, Layout]
    head: HeadLayout | None


def plan_head(model: CausalModel, algorithm: Algorithm, options: HeadOptions) -> HeadPlan:
    """The matrices at the ends of a model, with codes of ``options.bits`` bits per weight; scales come on top.

    Raises:
        UsageError: no codebook has so many bits, as many codewords as tokens, a bias where there may be none.
    """
    assert model.ends is not None
    ends, layouts, base = model.ends, {}, head_algorithm(algorithm)
    target = ends.target
    tokens, width = target.shape
    if options.codes is not None:
        if target.bias:
            raise UsageError(f"{model.source.name}: its head has a bias, which codewords have no place for.")
        if options.codes.codes >= tokens:
            raise UsageError(f"--head-codes wanted fewer than the {tokens:,} tokens, got {options.codes.codes:,}.")
    codes = options.codes.codes if options.codes else 0
    if options.bits is None:
        return HeadPlan({}, HeadLayout(ends.head, tokens, width, (), codes))
    for name, each in ends.targets.items():
        layouts[name] = row_layout(base, each.shape, each.bias, options.bits)
    parts: dict[str, Layout] = {}
    if options.classes and options.bits in ROW_CLASSES and not target.bias:
        low, high = ROW_CLASSES[options.bits]
        frequent = int(tokens * (options.bits - low) / (high - low))
        if frequent:
            sizes = zip(CLASSES, (frequent, tokens - frequent), (high, low), strict=True)
            parts = {name: row_layout(base, (rows, width), False, bits) for name, rows, bits in sizes}
    if codes and not parts:
        parts = {WHOLE[0]: layouts[ends.head]}
    if not parts:
        return HeadPlan(layouts, None)
    del layouts[ends.head]
    layouts = {f"{ends.head}.{name}": layout for name, layout in parts.items()} | layouts
    return HeadPlan(layouts, HeadLayout(ends.head, tokens, width, tuple(parts), codes))


def row_layout(base: Universal, shape: tuple[int, int], bias: bool, bits: float) -> Layout:
    """The layout of a matrix at the ends with codes of ``bits`` bits per weight.

    Raises:
        UsageError: no codebook has so many.
    """
    choices = [*base.candidates(shape, bias), *replace(base, codebook=_FINE).candidates(shape, bias)]
    found = {layout.nominal_bits: layout for layout in choices}
    if bits not in found:
        known = ", ".join(f"{b:g}" for b in sorted(found))
        raise UsageError(f"--head-bits wanted one of {known}, got {bits:g}.")
    return found[bits]


@dataclass(frozen=True)
class HeadStatistics:
    """What the head reads and puts out on the calibration text.

    Attributes:
        hessian: the second moment of what it reads.
        train: its states and distributions; with ``pull`` if codewords are wanted.
        held_out: the same of windows that are not among those, if codewords are wanted.
    """

    hessian: HessianAccumulator
    train: Calibration | None
    held_out: Calibration | None


def head_statistics(
    causal: CausalModel, tokens: Tokens, hidden: Sequence[Tensor], head: HeadLayout | None
) -> HeadStatistics:
    """Statistics of a head that is put together so, where ``hidden`` [sequences, tokens, width] left the last block.

    Raises:
        NumericalError: the original head puts out NaN or infinity.
    """
    accumulator, first, found = HessianAccumulator(hidden[0].shape[-1]), 0, []
    with causal.ending(tokens.ids[: len(hidden[0])], hidden[0]) as ending:
        for states in hidden:
            ids = tokens.ids[first : first + len(states)]
            # The model's code wants tensors with a version, which states of inference mode lack.
            found.append(ending.states(ids, states.clone()).detach())
            accumulator.add(found[-1].flatten(0, 1))
            first += len(states)
        if head is None:
            return HeadStatistics(accumulator, None, None)
        states = torch.cat(found)
        apart = max(len(states) // _HELD_OUT, 1) if head.codes and len(states) > 1 else 0
        train = _outputs(ending, states[: len(states) - apart].flatten(0, 1), head)
        held_out = _outputs(ending, states[-apart:].flatten(0, 1), head) if apart else train
    return HeadStatistics(accumulator, train, held_out)


def _outputs(ending: Ending, states: Tensor, head: HeadLayout) -> Calibration:
    with torch.no_grad():
        found = logit_statistics(states, lambda x: ending.logits(x).detach(), head.tokens, pull=bool(head.codes))
    if not bool(torch.isfinite(found.curvature).all()):
        raise NumericalError(f"{head.module}: the original head puts out NaN or infinity. Check its weights.")
    return Calibration(states, found)


def check_plain(ending: Ending, states: Tensor, weight: Tensor, name: str) -> None:
    """Refuse a model whose logits are not products with the rows of its head, to which codewords are fitted.

    Raises:
        UsageError: they are scaled, capped or else.
    """
    plain, found = states @ weight.T, ending.logits(states).detach().float()
    if not torch.allclose(found, plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max())):
        raise UsageError(f"{name}: its logits are scaled or capped after the head; codewords cannot be fitted to them.")


def frequent_tokens(statistics: LogitStatistics, weight: Tensor, ids: Tensor, count: int, tied: bool) -> Tensor:
    """A mask [tokens] of the ``count`` rows whose errors cost most.

    At equal bits the error of a row is proportional to its square, and costs lambda_k times that in the head. In an
    embedding it costs as often as the token is read; a matrix that is both gets a mixture as :func:`tied_hessian`.

    Args:
        weight: the head's rows [tokens, width].
        ids: token ids of the calibration text, of any shape.
    """
    costs = statistics.row_weights()
    if tied:
        read = torch.bincount(ids.flatten(), minlength=len(costs)).double()
        costs = (1 - TIED_SHARE) * costs / costs.mean() + TIED_SHARE * read / read.mean()
    costs = costs * weight.square().sum(dim=1, dtype=torch.float64)
    mask = torch.zeros(len(costs), dtype=torch.bool)
    mask[costs.argsort(descending=True, stable=True)[:count]] = True
    return mask


def split(
    head: HeadLayout, frequent: int, weight: Tensor, statistics: LogitStatistics, ids: Tensor, tied: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The matrices of a head's parts by module, from its rows ``weight``, and the tensors that say whose they are.

    Args:
        frequent: how many rows the first of two classes has.
    """
    if head.parts != CLASSES:
        return dict.fromkeys(head.matrices, weight), {}
    mask = frequent_tokens(statistics, weight, ids, frequent, tied)
    return dict(zip(head.matrices, (weight[mask], weight[~mask]), strict=True)), {"classes": pack_classes(mask)}


def tied_hessian(hessian: Tensor, share: float = TIED_SHARE) -> Tensor:
    """H for a matrix that is embedding as well: (1 - share) H / mean(diag H) + share I, [width, width]."""
    scale = (1 - share) / hessian.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    return hessian * scale + share * torch.eye(len(hessian), dtype=hessian.dtype)
