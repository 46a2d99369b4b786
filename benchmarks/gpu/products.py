"""One matrix times few vectors and many on a GPU: Octavo's codebooks, bfloat16 by cuBLAS, and a copy as the roof.

The layers of Llama-2-7B and 70B. Every round runs through so many different matrices that none stays in a cache,
captured in a CUDA graph so that launches cost nothing; medians of the rounds. ``gigabytes_per_second`` counts what is
stored of a matrix. ``run.py`` is the command.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1] / "speed"))
from synthetic import layout_of, random_tensors
from vptq_package import Published

from octavo.algorithms.gptvq import GPTVQ
from octavo.kernels._gpu import GpuMatrix
from octavo.kernels.cuda_gather import GatherMatrix
from octavo.kernels.cuda_lookup import LookUpMatrix
from octavo.kernels.cuda_tables import TableMatrix
from octavo.layout import Layout
from octavo.weight import VQWeight

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (8192, 8192), (28672, 8192), (8192, 28672))
#: All of 2 to 2.25 bits, then others.
NAMES = ("gaussian-v8-k256-256", "gaussian-v8-k256-signs", "gaussian-v4-k256", "gptvq-2d-2.125", "gptvq-4d-2.125")
NAMES += ("vptq-v8-k65536", "vptq-v8-k65536-256", "gaussian-v8-k256", "gaussian-v4-k256-256")
#: What the published VPTQ files have.
VPTQ = {"vptq-v8-k65536": (16,), "vptq-v8-k65536-256": (16, 8)}
DEVICE = torch.device("cuda")
_MOST_MATRICES, _MANY = 64, 8


def layout(name: str, shape: tuple[int, int]) -> Layout:
    """What a name of NAMES stands for: a universal codebook, a setting of GPTVQ's authors, or books as VPTQ's."""
    if name in VPTQ:
        return Layout(shape, 8, VPTQ[name], "column", channel_norm="input", permuted=True)
    if name.startswith("gptvq-"):
        return next(GPTVQ(**GPTVQ.presets[name.removeprefix("gptvq-")]).candidates(shape, False))
    return layout_of(name, shape)


def matrices(name: str, shape: tuple[int, int], count: int) -> list[GpuMatrix]:
    """Matrices with random codes on the GPU."""
    kind = GatherMatrix if name in VPTQ else TableMatrix if name.startswith("gptvq-") else LookUpMatrix
    found, generator = layout(name, shape), torch.Generator().manual_seed(0)
    return [kind(VQWeight(found, random_tensors(found, generator)).to(DEVICE)) for _ in range(count)]


def seconds(run: Callable[[], Any], rounds: int, *, graph: bool = True) -> list[float]:
    """Of ``run``, replayed as a graph unless told otherwise, round by round."""
    run()
    torch.cuda.synchronize()
    replay = run
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            run()
        replay = captured.replay
    times = []
    for _ in range(rounds + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return times[2:]


def copy_roof(rounds: int) -> float:
    """GB/s of a copy, which reads and writes every byte."""
    block = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    copied = torch.empty_like(block)
    times = seconds(lambda: copied.copy_(block), rounds)
    return 2 * block.numel() / 1e9 / statistics.median(times)


def rows(
    shapes: Sequence[tuple[int, int]], names: Sequence[str], vectors: Sequence[int], megabytes: int, rounds: int
) -> Iterator[dict[str, Any]]:
    """A row for each shape, number of vectors and name, bfloat16 before the names and the published package behind."""
    for shape in shapes:
        inputs = {n: torch.randn(n, shape[1], device=DEVICE, dtype=torch.bfloat16) for n in vectors}
        count = max(int(megabytes * 1e6 / (2 * shape[0] * shape[1])), 2)
        dense = [torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(count)]
        for n, x in inputs.items():
            used = dense[:2] if n > _MANY else dense
            times = seconds(lambda x=x, used=used: [functional.linear(x, w) for w in used], rounds)
            yield _row("bfloat16", shape, n, 16, [t / len(used) for t in times])
        del dense
        for name in names:
            bits = layout(name, shape).bits_per_weight
            count = min(max(int(megabytes * 8e6 / (bits * shape[0] * shape[1])), 2), _MOST_MATRICES)
            made = matrices(name, shape, count)
            for n, x in inputs.items():
                used = made[:2] if n > _MANY else made
                times = seconds(lambda x=x, used=used: [_multiply(m, x) for m in used], rounds)
                yield _row(name, shape, n, bits, [t / len(used) for t in times])
            del made
        for name in [name for name in names if name in VPTQ]:
            yield _published(name, shape, rounds)


def _multiply(matrix: GpuMatrix, x: Tensor) -> Tensor:
    return matrix.multiply_many(x) if x.shape[0] > _MANY else matrix.multiply(x)


def _published(name: str, shape: tuple[int, int], rounds: int) -> dict[str, Any]:
    """The published package's layers with one vector, or why there is no figure."""
    try:
        peer = Published(name, VPTQ[name], shape)
        layers, x = [layer.to(DEVICE) for layer in peer.layers], peer.x.to(DEVICE)
        with torch.inference_mode():
            times = seconds(lambda: [layer(x) for layer in layers], rounds)
    except (Exception, SystemExit) as error:  # of whatever kind: it is another program's
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        return {"name": f"package {name}", "shape": f"{shape[0]}x{shape[1]}", "vectors": 1, "missing": reason}
    return _row(peer.name, shape, 1, peer.bits, [t / len(layers) for t in times])


def _row(name: str, shape: tuple[int, int], n: int, bits: float, times: list[float]) -> dict[str, Any]:
    """The figures of one row; ``bits`` per weight are those that are stored."""
    median = statistics.median(times)
    return {
        "name": name,
        "shape": f"{shape[0]}x{shape[1]}",
        "vectors": n,
        "bits": bits,
        "microseconds": 1e6 * median,
        "spread": [1e6 * min(times), 1e6 * max(times)],
        "gigabytes_per_second": bits * shape[0] * shape[1] / 8e9 / median,
    }
