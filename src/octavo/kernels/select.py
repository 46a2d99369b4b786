"""Which kernel runs: the fastest that can, or the one that ``OCTAVO_KERNEL`` names."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from octavo._core.errors import ResourceError, UsageError
from octavo._core.registry import Registry
from octavo.layout import Layout
from octavo.weight import VQWeight

ENVIRONMENT = "OCTAVO_KERNEL"
#: With "1" a GPU decodes where a kernel could not be built, instead of an error.
ALLOW_SLOW = "OCTAVO_ALLOW_SLOW"


class Kernel(ABC):
    """One way to multiply by a VQWeight. Subclasses are filed by ``@registry.register(name)`` and never instantiated.

    Attributes:
        rank: of the kernels that can run, the one with the highest rank does.
        slow: for a kernel that nobody would choose: why it is slow and what to do, shown once as a warning. Else empty.
        prepares: whether :meth:`prepare` makes something that is worth keeping.
    """

    rank: ClassVar[int]
    slow: ClassVar[str] = ""
    prepares: ClassVar[bool] = False

    @staticmethod
    @abstractmethod
    def missing() -> str:
        """What this machine lacks (and how to get it), or an empty string."""

    @staticmethod
    @abstractmethod
    def why_not(layout: Layout, device: torch.device) -> str:
        """Why this kernel cannot run ``layout`` on ``device``, or an empty string."""

    @classmethod
    def remedy(cls, layout: Layout, device: torch.device) -> str:
        """What has to be installed so that this kernel runs ``layout`` on ``device``; empty if nothing, or no use."""
        return "" if cls.why_not(layout, device) else cls.missing()

    @staticmethod
    def takes(x: Tensor) -> bool:
        """Whether these inputs can be multiplied; the reference kernel takes those that cannot."""
        return True

    @staticmethod
    def prepare(weight: VQWeight) -> Any:
        """What :meth:`linear` wants of a weight, made once and kept as long as its tensors stay what they are."""
        return weight

    @staticmethod
    @abstractmethod
    def linear(x: Tensor, prepared: Any) -> Tensor:
        """``x @ W.T + bias``: [.., in_features] to [.., out_features], in the dtype of ``x``."""

    @staticmethod
    def has_rows(layout: Layout) -> bool:
        """Whether :meth:`rows_times` runs a layout that :meth:`why_not` has nothing against."""
        return False

    @staticmethod
    def rows_times(index: Tensor, x: Tensor, prepared: Any) -> Tensor:
        """Products [n] float32 of the rows ``index``, int64 [n], with one input [in_features], without bias."""
        raise NotImplementedError


registry: Registry[type[Kernel]] = Registry("kernel", "octavo.kernels")


@dataclass(frozen=True)
class Row:
    """One line of the kernel table of ``octavo doctor``."""

    name: str
    about: str
    rank: int
    usable: bool
    note: str


def choose(layout: Layout, device: torch.device) -> tuple[str, str]:
    """Name of the kernel that runs ``layout`` on ``device``, and why that one.

    Raises:
        UsageError: ``OCTAVO_KERNEL`` names an unknown kernel, or one that cannot run this layout here.
        ResourceError: a GPU has a kernel for the layout, which lacks something that can be installed;
            ``OCTAVO_ALLOW_SLOW=1`` takes the slow kernel instead.
    """
    forced = os.environ.get(ENVIRONMENT, "")
    if forced:
        if forced not in registry.names():
            raise UsageError(f"{ENVIRONMENT}={forced}: no such kernel; known: {', '.join(registry.names())}.")
        reason = _obstacle(forced, layout, device)
        if reason:
            raise UsageError(f"{ENVIRONMENT}={forced} cannot run here: {reason}. Unset it to let Octavo choose.")
        return forced, f"{ENVIRONMENT} is set"
    obstacles = {name: _obstacle(name, layout, device) for name in registry}
    usable = [name for name, obstacle in obstacles.items() if not obstacle]
    best = max(usable, key=lambda name: registry.get(name).rank)
    if device.type != "cpu" and registry.get(best).slow and os.environ.get(ALLOW_SLOW) != "1":
        for name, why in remedies(best, layout, device).items():
            raise ResourceError(
                f"the kernel {name} would run this matrix on {device}, but {why}. {ALLOW_SLOW}=1 goes on without it: "
                "the matrix is then decoded at every call, many times slower."
            )
    faster = [f"{n}: {why}" for n, why in obstacles.items() if why and registry.get(n).rank > registry.get(best).rank]
    return best, f"no faster kernel can run ({'; '.join(faster)})" if faster else "the fastest kernel there is"


def remedies(name: str, layout: Layout, device: torch.device) -> dict[str, str]:
    """Kernels above the kernel ``name`` that would run ``layout`` on ``device``, and what each lacks; fastest first."""
    above = [other for other in registry if registry.get(other).rank > registry.get(name).rank]
    above.sort(key=lambda other: -registry.get(other).rank)
    found = {other: registry.get(other).remedy(layout, device) for other in above}
    return {other: remedy for other, remedy in found.items() if remedy}


def in_words(reasons: dict[str, bool]) -> str:
    """Why a kernel cannot run a layout, from reasons and whether they hold; empty if none does."""
    found = [reason for reason, holds in reasons.items() if holds]
    return f"it does not know {', '.join(found)}" if found else ""


def table() -> list[Row]:
    """All kernels, fastest first, and whether this machine can run them."""
    rows = []
    for name in registry:
        kernel = registry.get(name)
        missing = kernel.missing()
        about = (kernel.__doc__ or "").strip().split("\n")[0]
        rows.append(Row(name, about, kernel.rank, not missing, missing or "ready"))
    return sorted(rows, key=lambda row: -row.rank)


def _obstacle(name: str, layout: Layout, device: torch.device) -> str:
    kernel = registry.get(name)
    return kernel.missing() or kernel.why_not(layout, device)
