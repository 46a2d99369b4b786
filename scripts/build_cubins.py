"""Compile the CUDA kernels for every processor, into the package: what a release does before it builds its wheel.

    python scripts/build_cubins.py [--out src/octavo/kernels/cubins]

Needs neither a GPU nor nvcc, only NVRTC (``pip install nvidia-cuda-nvrtc``). It makes ``sm_90.zip`` and so on with
programs for one generation each, and ``compute_75.zip`` with PTX for processors that come later. Programs are known by
the hash of their source and options: after a change of the sources this has to be run again, and what is missing is
compiled where it runs.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from octavo._core import cuda
from octavo.kernels import _gpu, _shipped, cuda_gather, cuda_lookup, cuda_tables

TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", _shipped.PTX)


def shapes() -> list[_gpu.Shape]:
    """Every program that is shipped, once."""
    return [*dict.fromkeys(cuda_lookup.shapes().values()), *cuda_tables.shapes(), *cuda_gather.shapes()]


def build(folder: Path, targets: Sequence[str], chosen: Sequence[_gpu.Shape], workers: int) -> list[Path]:
    """Archives of the chosen programs, one per target.

    Raises:
        ResourceError: no NVRTC, one that does not know a target, or a program that does not compile.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for target in targets:

        def compiled(shape: _gpu.Shape, target: str = target) -> tuple[str, bytes]:
            source, macros = _gpu.source(shape.source), shape.macros()
            key = cuda.program_key(source, macros, target)
            return key, cuda.compile_program(source, macros, target)

        with ThreadPoolExecutor(workers) as pool:
            programs = dict(pool.map(compiled, chosen))
        paths.append(_shipped.write(folder, target, programs))
        whole = sum(map(len, programs.values()))
        print(
            f"{paths[-1].name}: {len(programs)} programs, {whole} bytes, {paths[-1].stat().st_size} packed", flush=True
        )
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=_shipped.FOLDER)
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    build(arguments.out, arguments.targets, shapes(), arguments.workers)


if __name__ == "__main__":
    main()
