"""Checks of what every method is given, and the parts of a VQWeight that do not depend on the method."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo._core.errors import NumericalError, UsageError
from octavo.layout import Layout
from octavo.math.hessian import check_finite
from octavo.stored import to_stored


def checked(weight: Tensor, hessian: Tensor | None, name: str) -> tuple[Tensor, Tensor | None]:
    """The weight and the Hessian in float32 after all checks.

    Raises:
        UsageError: shapes that do not belong together.
        NumericalError: NaN or infinity.
    """
    if weight.ndim != 2 or 0 in weight.shape:
        raise UsageError(f"{name}: a weight wanted [out, in] with at least one element, got {tuple(weight.shape)}")
    weight = weight.detach().float()
    if not bool(torch.isfinite(weight).all()):
        bad = int((~torch.isfinite(weight)).sum())
        raise NumericalError(f"{name}: {bad} of {weight.numel()} weights are NaN or infinite; check the checkpoint.")
    if hessian is not None:
        wanted = (weight.shape[1], weight.shape[1])
        if tuple(hessian.shape) != wanted:
            raise UsageError(f"{name}: the Hessian wanted {wanted}, got {tuple(hessian.shape)}")
        hessian = hessian.detach().float()
        check_finite(hessian, name)
        if not bool((torch.diagonal(hessian) > 0).any()):
            # A layer that no token reached (an unrouted expert): all inputs count the same.
            hessian = None
    return weight, hessian


def bias_tensors(layout: Layout, bias: Tensor | None, name: str) -> dict[str, Tensor]:
    """The ``bias`` entry of a VQWeight, if its layout has one."""
    if layout.bias != (bias is not None):
        raise UsageError(
            f"{name}: layout.bias is {layout.bias} but a bias was {'' if bias is not None else 'not '}given"
        )
    if bias is None:
        return {}
    return {"bias": to_stored(bias.detach().float(), layout.tensors()["bias"][0], f"{name}: bias")}
