"""How many threads torch's CPU operations take: waking a second one costs more than a small operation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread(when: bool = True) -> Iterator[None]:
    """Run torch's CPU operations on the calling thread inside the block; ``when=False`` changes nothing."""
    before = torch.get_num_threads()
    if when:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
