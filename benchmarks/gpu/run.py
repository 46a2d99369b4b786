"""All that is measured on a GPU, in one command and under nine minutes.

    python benchmarks/gpu/run.py --out benchmarks/results/gpu.json [--minutes 8] [--names ..] [--shape 4096x4096 ..]

A copy as the roof; one vector, four and 2,048 times the matrices of Llama-2-7B and 70B, bfloat16 by cuBLAS, Octavo and,
where it is installed and loads, the published package vptq (products.py); tokens per second of a model of the shape of
Llama-2-7B in a CUDA graph and its prompts (model.py). Nothing is started after so many minutes; the file, which is
written after every row, says whether it is complete. Needs 16 GB on the GPU.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "quality"))

import model
import products
from table import machine

from octavo._core.io import write_json

PROMPT, CONTEXT = 2048, 512
MODELS = ("bfloat16", "gaussian-v8-k256-256", "gptvq-4d-2.125", "vptq-v8-k65536")


def models(rounds: int) -> Iterator[dict[str, Any]]:
    """The rows of the model, layers apart as transformers has them and then fused."""
    for name, fused in [*((name, False) for name in MODELS), *((name, True) for name in MODELS[:2])]:
        yield model.row(name, fused, PROMPT, CONTEXT, rounds)
        torch.cuda.empty_cache()


def where() -> dict[str, Any]:
    """What the timings belong to; a copy of the files without git has no commit to tell."""
    try:
        return machine()
    except (OSError, subprocess.CalledProcessError):
        return {"platform": platform.platform()}


def show(row: dict[str, Any], roof: float) -> str:
    """A line for the terminal."""
    if "missing" in row:
        return f"{row['name']:26} {row['shape']:>11} not measured: {row['missing']}"
    if "tokens_per_second" in row:
        kind = "fused" if row["fused"] else "apart"
        speeds = f"{row['tokens_per_second']:7.1f} tokens/s {row['prompt_tokens_per_second']:9.0f} tokens/s of prompt"
        return f"{row['name']:26} {kind:>11} {speeds}"
    share = row["gigabytes_per_second"] / roof
    return (
        f"{row['name']:26} {row['shape']:>11} {row['vectors']:5} vectors {row['microseconds']:9.1f} us "
        f"{row['gigabytes_per_second']:7.0f} GB/s {share:5.0%} of a copy"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", nargs="+", default=[f"{out}x{inp}" for out, inp in products.SHAPES])
    parser.add_argument("--names", nargs="+", default=products.NAMES)
    parser.add_argument("--vectors", type=int, nargs="+", default=[1, 4, PROMPT])
    parser.add_argument("--megabytes", type=int, default=256, help="of different matrices in a round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--minutes", type=float, default=8.0)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("run.py needs a CUDA device; report.py tells of kernels without one")
    start, rows = time.monotonic(), []
    roof = products.copy_roof(arguments.rounds)
    print(f"copy: {roof:.0f} GB/s", flush=True)
    about: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "copy_gigabytes_per_second": roof}
    about |= {"machine": where(), "minutes": arguments.minutes}
    shapes = [(int(text.split("x")[0]), int(text.split("x")[1])) for text in arguments.shape]
    sizes = (arguments.vectors, arguments.megabytes, arguments.rounds)
    # The models first: they are few, and nothing else says what tokens cost.
    for row in itertools.chain(models(arguments.rounds), products.rows(shapes, arguments.names, *sizes)):
        rows.append(row)
        print(show(row, roof), flush=True)
        late = time.monotonic() - start > 60 * arguments.minutes
        about |= {"complete": not late, "seconds": time.monotonic() - start}
        write_json(arguments.out, about | {"rows": rows})
        if late:
            raise SystemExit(f"{arguments.minutes} minutes are over: {arguments.out} has the rows until here")


if __name__ == "__main__":
    main()
