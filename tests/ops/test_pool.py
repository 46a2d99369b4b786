"""The threads of the C++ library: kept between calls, shared by callers, not inherited by forks."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from formats.strategies import random_weight
from octavo._core import clib
from octavo._core.errors import UsageError
from octavo.kernels._packed import PackedMatrix
from octavo.kernels.lookup import pack
from octavo.layout import BlockScale, Layout

pytestmark = pytest.mark.skipif(clib.library() is None, reason=f"no C++ library: {clib.why_missing()}")


@pytest.fixture(scope="module")
def matrix() -> PackedMatrix:
    layout = Layout((2048, 512), 8, (8, 8), direction="row", codebook_dtype="int8", block_scale=BlockScale(512, 0, 8))
    return pack(random_weight(layout, scale=0.1))


def test_callers_at_the_same_time_do_not_disturb_each_other(matrix: PackedMatrix) -> None:
    """One has the pool, the others threads of their own."""
    inputs = [torch.randn(2, 512, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    wanted = [matrix.multiply(x, 3) for x in inputs]
    with ThreadPoolExecutor(4) as callers:
        for _ in range(20):
            for found, alone in zip(callers.map(lambda x: matrix.multiply(x, 3), inputs), wanted, strict=True):
                assert torch.equal(found, alone)


def test_more_and_fewer_threads_in_turn(matrix: PackedMatrix) -> None:
    x = torch.randn(1, 512)
    wanted = {threads: matrix.multiply(x, threads) for threads in (1, 2, 7, 4096)}
    for _ in range(5):
        for threads, y in wanted.items():
            assert torch.equal(matrix.multiply(x, threads), y)


@pytest.mark.skipif(not hasattr(os, "fork"), reason=f"{sys.platform} has no fork")
def test_a_forked_process_has_threads_of_its_own(matrix: PackedMatrix) -> None:
    x = torch.randn(1, 512)
    wanted = matrix.multiply(x, 4)
    child = os.fork()
    if child == 0:
        # Nothing of pytest may run here: a failure is an exit status.
        os._exit(0 if torch.equal(matrix.multiply(x, 4), wanted) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(matrix.multiply(x, 4), wanted)


def test_the_environment_decides_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(clib.THREADS, raising=False)
    assert clib.threads() == torch.get_num_threads()
    monkeypatch.setenv(clib.THREADS, "5")
    assert clib.threads() == 5
    for bad in ("0", "-1", "two", "1.5"):
        monkeypatch.setenv(clib.THREADS, bad)
        with pytest.raises(UsageError, match=f"OCTAVO_THREADS wanted a number of threads from 1 on, got '{bad}'"):
            clib.threads()
