"""In which precision a block's matrix products run while it is calibrated."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch


def calibration_products(stored: torch.dtype, device: torch.device | str = "cpu") -> AbstractContextManager[object]:
    """A context in which linear layers and attention multiply in bfloat16, or one that changes nothing.

    Only for models that are stored in 16 bits, and thus run so by everybody, and on processors that multiply bfloat16
    faster than float32. Weights, residual stream, norms and all statistics stay in float32 either way.
    """
    fast = torch.device(device).type == "cpu" and fast_bfloat16()
    return torch.autocast("cpu", torch.bfloat16, enabled=fast and stored in (torch.bfloat16, torch.float16))


def fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 matrices faster than float32 ones."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
