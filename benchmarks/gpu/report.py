"""Registers, spills, shared memory and occupancy of every CUDA kernel, by NVRTC alone: no GPU is needed.

    python benchmarks/gpu/report.py [--targets sm_80 sm_90] [--all] [--out report.json]

Registers and spills are what ptxas says. Occupancy is worked out from the limits of each generation (CUDA C++
Programming Guide, "Technical Specifications per Compute Capability"): the warps that are resident at once, of those
that a multiprocessor can hold, with the most shared memory that a kernel is launched with.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from build_cubins import TARGETS, shapes

from octavo._core import cuda
from octavo._core.io import write_json
from octavo.kernels import _gpu

#: Of a multiprocessor: warps, blocks, bytes of shared memory.
LIMITS = {
    "sm_75": (32, 16, 64 << 10),
    "sm_80": (64, 32, 164 << 10),
    "sm_86": (48, 16, 100 << 10),
    "sm_89": (48, 24, 100 << 10),
    "sm_90": (64, 32, 228 << 10),
    "sm_100": (64, 32, 228 << 10),
    "sm_120": (48, 24, 100 << 10),
}
_REGISTERS = 65536
#: What a block takes of the shared memory besides its own, from sm_80 on.
_RESERVED = 1024


def usage(log: str) -> dict[str, tuple[int, int]]:
    """Registers and bytes spilled (stored and loaded) of every function, from what ptxas says."""
    pattern = r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    return {m[1]: (int(m[4]), int(m[2]) + int(m[3])) for m in re.finditer(pattern, log, re.DOTALL)}


def resident(target: str, registers: int, shared: int, threads: int = _gpu.THREADS) -> int:
    """Blocks that run at once on a multiprocessor."""
    warps, blocks, memory = LIMITS[target]
    # A warp's registers are given out by 256.
    by_registers = _REGISTERS // (-(-registers * 32 // 256) * 256 * (threads // 32))
    by_memory = memory // (shared + (0 if target == "sm_75" else _RESERVED)) if shared else blocks
    return min(warps // (threads // 32), blocks, by_registers, by_memory)


def rows(targets: Sequence[str], chosen: Sequence[_gpu.Shape]) -> Iterator[dict[str, Any]]:
    """A row for every target, program and function."""
    for target in targets:
        for shape in chosen:
            log = cuda.compile_program(_gpu.source(shape.source), shape.macros(), target, report=True)[1]
            for function, (registers, spilled) in usage(log).items():
                shared = shape.functions()[function]
                blocks = resident(target, registers, shared)
                yield {
                    "target": target,
                    "source": shape.source,
                    "macros": shape.macros(),
                    "function": function,
                    "registers": registers,
                    "spilled_bytes": spilled,
                    "shared_bytes": shared,
                    "blocks": blocks,
                    "occupancy": blocks * _gpu.THREADS / 32 / LIMITS[target][0],
                }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=sorted(LIMITS), default=[t for t in TARGETS if t in LIMITS])
    parser.add_argument("--all", action="store_true", help="every program that is shipped, not one in four")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found = []
    for row in rows(arguments.targets, shapes() if arguments.all else shapes()[::4]):
        found.append(row)
        macros = " ".join(f"{key}={value}" for key, value in row["macros"].items())
        print(
            f"{row['target']:7} {row['source']:7} {row['function']:18} {row['registers']:3} registers "
            f"{row['spilled_bytes']:3} spilled {row['shared_bytes']:6} shared {row['occupancy']:4.0%}  {macros}",
            flush=True,
        )
    if arguments.out:
        write_json(arguments.out, {"rows": found})


if __name__ == "__main__":
    main()
