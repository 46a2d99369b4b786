"""CUDA without a compiler at the user's: NVRTC, which torch brings along, and the driver, both through ctypes.

Programs are compiled once per processor and set of macros and kept on disk by the hash of all that made them.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from octavo._core import io
from octavo._core.errors import ResourceError

#: Where compiled programs are kept; else in the user's cache.
CACHE = "OCTAVO_CACHE"
_REMEDY = "pip install nvidia-cuda-nvrtc (or nvidia-cuda-nvrtc-cu12 beside a driver of CUDA 12)"
_OPTIONS = ("--std=c++17",)
_MAX_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


# ---------------------------------------------------------------------------------------------------- NVRTC


@cache
def _nvrtc() -> ctypes.CDLL | None:
    folders: list[Path] = []
    spec = find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        folders += sorted(Path(root).glob("*/lib"), reverse=True) + sorted(Path(root).glob("*/bin"), reverse=True)
    if (torch := find_spec("torch")) is not None and torch.origin:
        folders.insert(0, Path(torch.origin).parent / "lib")
    pattern = "nvrtc64_*_0.dll" if sys.platform == "win32" else "libnvrtc.so*"
    for path in [*(found for folder in folders for found in sorted(folder.glob(pattern))), Path("libnvrtc.so")]:
        with contextlib.suppress(OSError):
            # NVRTC asks for it by its name alone, which is found if it is loaded already.
            for companion in sorted(path.parent.glob("libnvrtc-builtins.so*")) if path.is_absolute() else ():
                ctypes.CDLL(str(companion))
            return ctypes.CDLL(str(path))
    return None


def why_no_compiler(architecture: int = 0) -> str:
    """Why kernels cannot be compiled (for a processor such as 90), and what to do; or an empty string."""
    lib = _nvrtc()
    if lib is None:
        return f"NVRTC was not found; {_REMEDY}"
    count = ctypes.c_int()
    lib.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    known = (ctypes.c_int * count.value)()
    lib.nvrtcGetSupportedArchs(known)
    if architecture and architecture not in known:
        return f"this NVRTC does not know sm_{architecture}, only {', '.join(map(str, known))}; {_REMEDY}"
    return ""


def compile_program(source: str, macros: Mapping[str, str], architecture: str, *, report: bool = False) -> Any:
    """Compile CUDA C++ for a processor such as ``sm_90``; gives its binary, or (binary, log) with ``report``.

    For a family such as ``compute_75`` it gives PTX, which drivers compile for every processor that is not older.

    Raises:
        ResourceError: no NVRTC, one that does not know the processor, or a program that does not compile.
    """
    lib = _nvrtc()
    if lib is None:
        raise ResourceError(f"CUDA kernels cannot be compiled: {why_no_compiler()}.")
    options = [f"--gpu-architecture={architecture}", *_OPTIONS, *(f"-D{k}={v}" for k, v in macros.items())]
    if report:
        options.append("--ptxas-options=-v")
    program = ctypes.c_void_p()
    if lib.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"octavo.cu", 0, None, None):
        raise ResourceError("NVRTC could not take a kernel's source: it is out of memory.")
    try:
        words = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        failed = lib.nvrtcCompileProgram(program, len(options), words)
        log = _text(lib.nvrtcGetProgramLogSize, lib.nvrtcGetProgramLog, program).rstrip(b"\0").decode(errors="replace")
        if failed:
            raise ResourceError(f"NVRTC could not compile a kernel for {architecture}: {log.strip() or failed}")
        if architecture.startswith("compute_"):
            binary = _text(lib.nvrtcGetPTXSize, lib.nvrtcGetPTX, program)
        else:
            binary = _text(lib.nvrtcGetCUBINSize, lib.nvrtcGetCUBIN, program)
    finally:
        lib.nvrtcDestroyProgram(ctypes.byref(program))
    return (binary, log) if report else binary


def _text(size: Any, get: Any, program: ctypes.c_void_p) -> bytes:
    count = ctypes.c_size_t()
    size(program, ctypes.byref(count))
    buffer = ctypes.create_string_buffer(count.value)
    get(program, buffer)
    return buffer.raw


def program_key(source: str, macros: Mapping[str, str], architecture: str) -> str:
    """What tells a compiled program from all others: the hash of its source and options, not of the compiler."""
    return hashlib.sha256(repr((source, sorted(macros.items()), _OPTIONS, architecture)).encode()).hexdigest()


def cached_program(source: str, macros: Mapping[str, str], architecture: str) -> bytes:
    """:func:`compile_program`, from the cache on disk if it was compiled before.

    Raises:
        ResourceError: as :func:`compile_program`.
    """
    lib = _nvrtc()
    version = (ctypes.c_int(), ctypes.c_int())
    if lib is not None:
        lib.nvrtcVersion(ctypes.byref(version[0]), ctypes.byref(version[1]))
    key = program_key(source, macros, architecture)
    path = _cache_folder() / f"{key}-{version[0].value}.{version[1].value}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        binary = compile_program(source, macros, architecture)
        # A cache that cannot be written costs a third of a second the next time.
        with contextlib.suppress(OSError, ResourceError):
            path.parent.mkdir(parents=True, exist_ok=True)
            io.write_bytes(path, binary)
        return binary


def _cache_folder() -> Path:
    if chosen := os.environ.get(CACHE):
        return Path(chosen)
    base = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME")
    return Path(base or os.path.expanduser("~/.cache")) / "octavo" / "kernels"


# ---------------------------------------------------------------------------------------------------- driver


@cache
def _driver() -> ctypes.CDLL:
    lib = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    pointer, number, size = ctypes.c_void_p, ctypes.c_uint, ctypes.c_size_t
    lib.cuModuleLoadData.argtypes = (pointer, ctypes.c_char_p)
    lib.cuModuleGetFunction.argtypes = (pointer, pointer, ctypes.c_char_p)
    lib.cuFuncSetAttribute.argtypes = (pointer, ctypes.c_int, ctypes.c_int)
    lib.cuCtxPushCurrent_v2.argtypes = lib.cuCtxPopCurrent_v2.argtypes = (pointer,)
    lib.cuLaunchKernel.argtypes = (pointer, *[number] * 7, pointer, pointer, pointer)
    lib.cuOccupancyMaxActiveBlocksPerMultiprocessor.argtypes = (pointer, pointer, ctypes.c_int, size)
    _check(lib, lib.cuInit(0), "cuInit")
    return lib


def _check(lib: ctypes.CDLL, status: int, what: str) -> None:
    if status:
        text = ctypes.c_char_p()
        lib.cuGetErrorString(status, ctypes.byref(text))
        reason = (text.value or b"unknown error").decode()
        raise ResourceError(f"{what}: {reason} ({status}). OCTAVO_KERNEL=reference goes on without CUDA kernels.")


@cache
def _context(device: int) -> ctypes.c_void_p:
    """The context of a device that torch uses as well, kept for as long as the process runs."""
    lib, handle, context = _driver(), ctypes.c_int(), ctypes.c_void_p()
    _check(lib, lib.cuDeviceGet(ctypes.byref(handle), device), f"CUDA device {device}")
    _check(lib, lib.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), f"context of CUDA device {device}")
    return context


@contextlib.contextmanager
def _current(device: int) -> Iterator[ctypes.CDLL]:
    """The context of a device, current for as long as the block runs."""
    lib, context = _driver(), _context(device)
    _check(lib, lib.cuCtxPushCurrent_v2(context), f"context of CUDA device {device}")
    try:
        yield lib
    finally:
        lib.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))


class Program:
    """A compiled program on a device; its functions are launched on a stream of torch's.

    Everything that the driver does once is done here, so that launches can be captured in CUDA graphs.

    Args:
        binary: what :func:`compile_program` gave.
        device: number of the device.
        functions: by name, the most bytes of dynamic shared memory that each is launched with.
        threads: of a block.

    Raises:
        ResourceError: the driver does not take it.
    """

    def __init__(self, binary: bytes, device: int, functions: Mapping[str, int], threads: int) -> None:
        self._device, self._module = device, ctypes.c_void_p()
        self._functions: dict[str, ctypes.c_void_p] = {}
        self._resident: dict[str, int] = {}
        with _current(device) as lib:
            what = f"loading a kernel on CUDA device {device}"
            _check(lib, lib.cuModuleLoadData(ctypes.byref(self._module), binary), what)
            for name, shared in functions.items():
                function, blocks = ctypes.c_void_p(), ctypes.c_int()
                _check(lib, lib.cuModuleGetFunction(ctypes.byref(function), self._module, name.encode()), name)
                _check(lib, lib.cuFuncSetAttribute(function, _MAX_SHARED, shared), f"{name} with {shared} bytes shared")
                ask = lib.cuOccupancyMaxActiveBlocksPerMultiprocessor
                _check(lib, ask(ctypes.byref(blocks), function, threads, shared), name)
                self._functions[name], self._resident[name] = function, max(blocks.value, 1)

    def resident(self, name: str) -> int:
        """Blocks of a function that run at once on a multiprocessor."""
        return self._resident[name]

    def launch(self, name: str, grid: tuple[int, int], threads: int, shared: int, stream: int, *arguments: Any) -> None:
        """Launch a function with ctypes values as arguments, and ``shared`` bytes of dynamic shared memory.

        Raises:
            ResourceError: the driver refuses.
        """
        values = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(value) for value in arguments))
        with _current(self._device) as lib:
            size = (*grid, 1, threads, 1, 1, shared)
            status = lib.cuLaunchKernel(self._functions[name], *size, stream, values, None)
            _check(lib, status, f"launching {name} on a grid of {grid} with {shared} bytes shared")
