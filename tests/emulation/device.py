"""The CUDA sources compiled for this processor, and launched as the driver would launch them."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from octavo.kernels._gpu import Shape

HERE = Path(__file__).parent
COMPILER = shutil.which("c++") or shutil.which("g++")


class Emulator:
    """A :class:`octavo.kernels._gpu.Launcher` whose device is the CPU, one multiprocessor with so many blocks."""

    def __init__(self, run: Any, blocks: int = 2) -> None:
        self.run, self.blocks = run, blocks

    def resident(self, name: str) -> int:
        return self.blocks

    def launch(self, name: str, grid: tuple[int, int], threads: int, shared: int, stream: int, *arguments: Any) -> None:
        assert threads % 32 == 0
        values = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(value) for value in arguments))
        assert self.run(name.encode(), *grid, threads, shared, values) == 0, name


@cache
def emulator(shape: Shape) -> Emulator:
    """The kernels of a shape; compiled once per process."""
    assert COMPILER is not None
    folder = Path(tempfile.mkdtemp(prefix="octavo-emulated-"))
    library = folder / "kernel.so"
    macros = [f"-D{name}={value}" for name, value in shape.macros().items()]
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wno-unknown-pragmas", "-DOCTAVO_EMULATOR", f"-I{HERE}"]
    command = [COMPILER, *flags, *macros, str(HERE / f"{shape.source}.cpp"), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = Emulator(ctypes.CDLL(str(library)).octavo_emulate)
    shutil.rmtree(folder)
    return loaded
