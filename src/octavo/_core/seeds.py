"""Random generators that depend on a name, not on the order of work, the device count or retries."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, name: str) -> torch.Generator:
    """CPU generator whose stream is a function of the run seed and of the work item's name alone."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
