"""One matrix times one vector on a GPU: Octavo's codebooks, bfloat16 by cuBLAS, and a copy as the roof.

    python benchmarks/gpu/gemv.py --out benchmarks/results/gpu_gemv.json [--names gaussian-v8-k256-256 ..]

The layers of Llama-2-7B and 70B. Every round runs through so many different matrices that none stays in a cache,
captured in a CUDA graph so that launches cost nothing; medians of the rounds. ``GB/s`` counts what is stored.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1] / "quality"))
sys.path.insert(0, str(Path(__file__).parents[1] / "speed"))
from synthetic import layout_of, random_tensors
from table import machine

from octavo._core.io import write_json
from octavo.kernels.cuda_lookup import LookUpMatrix
from octavo.weight import VQWeight

SHAPES = ("4096x4096", "11008x4096", "4096x11008", "8192x8192", "28672x8192", "8192x28672")
NAMES = ("gaussian-v8-k256", "gaussian-v8-k256-256", "gaussian-v8-k256-256-256", "gaussian-v4-k256-256")
DEVICE = torch.device("cuda")


def seconds(run: Callable[[], Any], rounds: int) -> list[float]:
    """Of a replayed graph of ``run``, round by round."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(rounds + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return times[2:]


def row(name: str, shape: tuple[int, int], n: int, bits: float, count: int, times: list[float]) -> dict[str, Any]:
    """The figures of one row; ``bits`` per weight are those that are stored."""
    median = statistics.median(times) / count
    return {
        "name": name,
        "shape": "x".join(map(str, shape)),
        "vectors": n,
        "microseconds": 1e6 * median,
        "spread": [1e6 * min(times) / count, 1e6 * max(times) / count],
        "gigabytes_per_second": bits * shape[0] * shape[1] / 8e9 / median,
    }


def copy_roof(rounds: int) -> float:
    """GB/s of a copy, which reads and writes every byte."""
    block = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    copied = torch.empty_like(block)
    times = seconds(lambda: copied.copy_(block), rounds)
    return 2 * block.numel() / 1e9 / statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shape", nargs="+", default=SHAPES)
    parser.add_argument("--names", nargs="+", default=NAMES)
    parser.add_argument("--vectors", type=int, nargs="+", default=[1, 4, 2048])
    parser.add_argument("--megabytes", type=int, default=512, help="of different matrices in a round")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    roof = copy_roof(arguments.rounds)
    print(f"copy: {roof:.0f} GB/s", flush=True)
    rows: list[dict[str, Any]] = []

    def report(found: dict[str, Any]) -> None:
        rows.append(found)
        share = found["gigabytes_per_second"] / roof
        print(
            f"{found['name']:26} {found['shape']:>11} {found['vectors']:5} vectors {found['microseconds']:9.1f} us "
            f"{found['gigabytes_per_second']:7.0f} GB/s {share:5.0%} of a copy",
            flush=True,
        )

    for text in arguments.shape:
        shape = (int(text.split("x")[0]), int(text.split("x")[1]))
        for n in arguments.vectors:
            x = torch.randn(n, shape[1], device=DEVICE, dtype=torch.bfloat16)
            count = max(int(arguments.megabytes * 1e6 / (2 * shape[0] * shape[1])), 2)
            dense: list[Tensor] = [torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(count)]
            times = seconds(lambda d=dense, x=x: [functional.linear(x, w) for w in d], arguments.rounds)
            report(row("bfloat16", shape, n, 16, count, times))
            dense.clear()
            for name in arguments.names:
                layout = layout_of(name, shape)
                count = max(int(arguments.megabytes * 8e6 / (layout.bits_per_weight * shape[0] * shape[1])), 2)
                count = min(count, 64)
                generator = torch.Generator().manual_seed(0)
                made = [
                    LookUpMatrix(VQWeight(layout, random_tensors(layout, generator)).to(DEVICE)) for _ in range(count)
                ]

                def run(made: list[LookUpMatrix] = made, x: Tensor = x) -> None:
                    for matrix in made:
                        matrix.multiply_many(x) if x.shape[0] > 8 else matrix.multiply(x)

                report(row(name, shape, n, layout.bits_per_weight, count, seconds(run, arguments.rounds)))
    if arguments.out:
        details = {"gpu": torch.cuda.get_device_name(), "copy_gigabytes_per_second": roof}
        write_json(arguments.out, {"machine": machine() | details, "rows": rows})


if __name__ == "__main__":
    main()
