"""The C++ library ``octavo_c``: found, checked and loaded once; everything works without it, only slower.

Callers ask :func:`library`; on None they take their torch path and say so through :func:`warn_slow_once`.
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

from torch import Tensor, get_num_threads
from torch.compiler import is_compiling
from torch.nn import Parameter

from octavo._core.errors import UsageError

#: Environment: no library, another build of it (for sanitizers), threads of a call.
DISABLE, LIBRARY, THREADS = "OCTAVO_NO_CLIB", "OCTAVO_LIBRARY", "OCTAVO_THREADS"
OK, BAD_ARGUMENT, NO_MEMORY, OUT_OF_RANGE = range(4)

_ABI = 6
_ISA = {1: "baseline", 2: "AVX2 + FMA", 3: "AVX-512", 4: "AVX-512 VBMI + VNNI"}
_NAMES = {"win32": "octavo_c.dll", "darwin": "liboctavo_c.dylib"}
_REMEDY = (
    "Install a C++17 compiler (g++ or clang++) and run `pip install --force-reinstall .` in Octavo's source folder."
)
_PLAIN = (Tensor, Parameter)
_POINTER, _INT64, _INT32, _DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_double
_SIGNATURES = {
    "octavo_nearest": (_POINTER, _POINTER, _INT64, _POINTER, _INT64, _INT32, _POINTER, _INT32, _INT32),
    "octavo_nearest_tiles": (
        *(_POINTER, _INT64, _INT64, _POINTER, _INT64, _INT32),
        *(_POINTER, _POINTER, _INT32, _INT32),
    ),
    "octavo_nearest_additive": (
        *(_POINTER, _INT64, _INT32, _POINTER, _POINTER, _INT32),
        *(_POINTER, _INT32, _POINTER, _INT32, _INT32),
    ),
    "octavo_fit_tiles": (
        *(_POINTER, _POINTER, _POINTER, _INT64, _INT64, _INT32, _INT64, _INT64),
        *(_POINTER, _POINTER, _INT32, _DOUBLE, _POINTER, _INT32, _INT32),
    ),
    "octavo_lookup_create": (
        *(_INT64, _INT64, _INT32, _INT32, _POINTER, _POINTER, _POINTER, _INT64, _POINTER),
        *(_INT64, _POINTER, _POINTER, _INT32, _POINTER),
    ),
    "octavo_gather_create": (
        *(_INT64, _INT64, _INT32, _POINTER, _INT32, _POINTER, _POINTER, _POINTER, _POINTER),
        *(_INT64, _POINTER, _POINTER, _INT32, _POINTER),
    ),
    "octavo_matrix_destroy": (_POINTER,),
    "octavo_matrix_multiply": (_POINTER, _POINTER, _INT64, _POINTER, _INT32, _INT32),
    "octavo_matrix_has_many": (_POINTER,),
    "octavo_matrix_many": (_POINTER, _POINTER, _INT64, _POINTER, _INT32),
    "octavo_matrix_rows": (_POINTER, _POINTER, _POINTER, _INT64, _POINTER, _POINTER, _INT32),
    "octavo_matrix_decode": (_POINTER, _INT64, _INT64, _INT32, _POINTER, _INT32),
    "octavo_matrix_transform": (_POINTER, _POINTER, _INT64, _POINTER, _INT32),
    "octavo_session_create": (_POINTER, _INT64, _INT32, _POINTER),
    "octavo_session_destroy": (_POINTER,),
    "octavo_session_run": (_POINTER, _POINTER, _INT64, _INT64, _POINTER, _INT32, _INT32),
    "octavo_session_times": (_POINTER, _POINTER, _POINTER),
    "octavo_session_write": (_POINTER, _INT64, _INT64, _INT64, _POINTER, _POINTER),
    "octavo_pack": (_POINTER, _INT64, _INT64, _INT32, _POINTER, _INT32),
    "octavo_unpack": (_POINTER, _INT64, _INT64, _INT32, _POINTER, _INT32),
}


class SlowPathWarning(UserWarning):
    """Work is done correctly but by a much slower path than this machine could take."""


def _folders() -> list[Path]:
    """Where the package's files are; an editable install has two places, sources and build products."""
    return [Path(folder) for folder in sys.modules["octavo"].__path__]


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    name = _NAMES.get(sys.platform, "liboctavo_c.so")
    places = [Path(os.environ[LIBRARY])] if os.environ.get(LIBRARY) else [folder / name for folder in _folders()]
    found = [place for place in places if place.is_file()]
    if not found and os.environ.get(LIBRARY):
        return None, f"{LIBRARY} names {places[0]}, which is no file."
    if not found:
        return None, f"{name} was not built when Octavo was installed (no working C++ compiler?). {_REMEDY}"
    try:
        lib = ctypes.CDLL(str(found[0]))
        abi = lib.octavo_abi()
        if abi != _ABI:
            return (
                None,
                f"{found[0]} has interface {abi}, wanted {_ABI}: it is from another build. {_REMEDY}",
            )
        lib.octavo_version.restype = ctypes.c_char_p
        for function, arguments in _SIGNATURES.items():
            getattr(lib, function).argtypes = arguments
    except (OSError, AttributeError) as error:
        return None, f"{found[0]} cannot be loaded: {error}. {_REMEDY}"
    return lib, ""


def library() -> ctypes.CDLL | None:
    """The loaded library, or None; :func:`why_missing` then says why."""
    return None if os.environ.get(DISABLE) == "1" else _load()[0]


def why_missing() -> str:
    """What is wrong and what to do about it, or an empty string if the library is loaded."""
    return f"it is switched off by {DISABLE}=1." if os.environ.get(DISABLE) == "1" else _load()[1]


def version() -> str | None:
    """The version of the library's build, or None without a library."""
    lib = library()
    return None if lib is None else lib.octavo_version().decode()


def cpu_features() -> str:
    """The instruction set that the library uses on this processor, or ``"none"`` without a library."""
    lib = library()
    return "none" if lib is None else _ISA[lib.octavo_isa()]


def takes(*tensors: Tensor) -> bool:
    """Whether the library can be given these tensors: real, on the CPU, and nothing is being traced."""
    for tensor in tensors:
        # Subclasses (fake, functional, distributed tensors) have no memory of their own to point at.
        if not tensor.is_cpu or type(tensor) not in _PLAIN:
            return False
    return not is_compiling()


def call(function: Callable[..., int], *arguments: float | None) -> int:
    """Call a function of the library and return its status, :data:`OK` or :data:`OUT_OF_RANGE`.

    Raises:
        MemoryError: the library could not allocate its scratch space.
    """
    status = function(*arguments)
    if status == NO_MEMORY:
        raise MemoryError("octavo_c: out of memory")
    assert status != BAD_ARGUMENT, f"octavo bug: {function} refused {arguments}"
    return status


def threads() -> int:
    """Threads that a call may use: those of ``OCTAVO_THREADS``, or as many as torch uses.

    Raises:
        UsageError: ``OCTAVO_THREADS`` is no number from 1 on.
    """
    wanted = os.environ.get(THREADS)
    if not wanted:
        return get_num_threads()
    if not wanted.isascii() or not wanted.isdecimal() or int(wanted) < 1:
        raise UsageError(f"{THREADS} wanted a number of threads from 1 on, got {wanted!r}. Unset it to use torch's.")
    return int(wanted)


@cache
def warn_slow_once(what: str) -> None:
    """Warn, once per process and ``what``, that ``what`` runs without the C++ library, why, and what to install."""
    warnings.warn(f"{what} runs in plain torch, many times slower: {why_missing()}", SlowPathWarning, stacklevel=3)
