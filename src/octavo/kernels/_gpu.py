"""What kernels in CUDA C++ have in common: programs, matrices that torch's operators know by number, the operator."""

from __future__ import annotations

import ctypes
import itertools
import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from octavo._core import cuda
from octavo._core.errors import UsageError
from octavo.kernels.select import Kernel
from octavo.layout import Layout
from octavo.weight import VQWeight

#: Inputs stay in float32 instead of being rounded to bytes.
EXACT = "OCTAVO_EXACT"
#: As in the sources.
THREADS = 256
COUNTS = (4, 2, 1)
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
#: From so many inputs on rows are decoded and multiplied as a dense matrix.
_MANY = 9
#: The oldest processors with the memory that the kernels need.
_OLDEST = 75


class Launcher(Protocol):
    """What runs the functions of a compiled program."""

    def resident(self, name: str) -> int:
        """Blocks of a function that run at once on a multiprocessor."""
        ...

    def launch(self, name: str, grid: tuple[int, int], threads: int, shared: int, stream: int, *arguments: Any) -> None:
        """Launch a function; see :meth:`octavo._core.cuda.Program.launch`."""
        ...


def source(name: str) -> str:
    """The CUDA source of a kernel, with what all share before it."""
    folder = files("octavo.kernels").joinpath("cuda")
    return folder.joinpath("numbers.cuh").read_text() + folder.joinpath(f"{name}.cu").read_text()


@cache
def _program(
    name: str, macros: tuple[tuple[str, str], ...], functions: tuple[tuple[str, int], ...], device: int
) -> Any:
    binary = cuda.cached_program(source(name), dict(macros), f"sm_{_architecture(device)}")
    return cuda.Program(binary, device, dict(functions), THREADS)


def _has_device() -> bool:
    return torch.cuda.is_available() and torch.version.cuda is not None


def _architecture(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def program(name: str, macros: Mapping[str, str], functions: Mapping[str, int], device: torch.device) -> Launcher:
    """The compiled program of a source on a CUDA device, with the shared memory of each function in bytes.

    Raises:
        ResourceError: no compiler, or a driver that refuses.
    """
    return _program(name, tuple(sorted(macros.items())), tuple(functions.items()), device.index or 0)


def macros_of(vector: int, bits: Sequence[int], copies: int) -> dict[str, str]:
    """What every source is compiled with: vector length, bits of the codes of all stages, copies of a centroid."""
    listed = f"{{{','.join(map(str, bits))}}}"
    return {"VECTOR": str(vector), "STAGES": str(len(bits)), "BITS": listed, "COPIES": str(copies)}


def product_of(count: int) -> str:
    """The function of every source for so many inputs."""
    return f"octavo_multiply_{count}"


def portions(inputs: int) -> Iterator[tuple[int, int]]:
    """(first, count) of the products that so many inputs take."""
    first = 0
    for count in COUNTS:
        while inputs - first >= count:
            yield first, count
            first += count


class GpuMatrix(ABC):
    """A weight in a kernel's order, on the device of its tensors.

    Args:
        weight: of a layout that the kernel has nothing against.
    """

    def __init__(self, weight: VQWeight) -> None:
        self.device = weight.tensors["indices"].device
        self.rows, self.inputs = weight.layout.shape
        self.processors = 1
        if self.device.type == "cuda":
            self.processors = torch.cuda.get_device_properties(self.device).multi_processor_count
        self.bias = None if weight.bias is None else weight.bias.float().contiguous()
        #: What the operator knows it by.
        self.handle = next(_numbers)
        _live[self.handle] = self

    @abstractmethod
    def multiply(self, x: Tensor, exact: bool = False) -> Tensor:
        """W x + bias for ``x`` [n, in] on the device, contiguous; gives [n, out] in its dtype."""

    @abstractmethod
    def multiply_many(self, x: Tensor) -> Tensor:
        """:meth:`multiply` for many inputs."""

    @property
    def stream(self) -> int:
        """The stream that torch runs on."""
        return torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0

    def blocks(self, launcher: Launcher, name: str, warps: int) -> int:
        """Blocks for so many warps, but not more than run at once: each loads the books first."""
        return min(-(-warps // (THREADS // 32)), self.processors * launcher.resident(name))

    def floats(self, *shape: int) -> Tensor:
        """Room for float32, whatever torch's default is."""
        return torch.empty(*shape, dtype=torch.float32, device=self.device)


#: Matrices by number, for as long as somebody holds them: operators take tensors and numbers alone.
_live: weakref.WeakValueDictionary[int, GpuMatrix] = weakref.WeakValueDictionary()
_numbers = itertools.count()


@torch.library.custom_op("octavo::cuda_linear", mutates_args=())
def cuda_linear(x: Tensor, handle: int, rows: int, exact: bool) -> Tensor:
    """W x + bias for ``x`` [n, in]: [n, rows] in its dtype; ``handle`` is that of a :class:`GpuMatrix`."""
    matrix, x = _live.get(handle), x.contiguous()
    if matrix is None or matrix.device != x.device:
        where = "was freed" if matrix is None else f"is on {matrix.device}"
        raise UsageError(f"octavo::cuda_linear: the matrix {where}, the inputs are on {x.device}. Move both together.")
    if x.shape[0] == 0:
        return x.new_empty(0, rows)
    return matrix.multiply_many(x) if x.shape[0] >= _MANY else matrix.multiply(x, exact)


@cuda_linear.register_fake
def _(x: Tensor, handle: int, rows: int, exact: bool) -> Tensor:
    return x.new_empty(x.shape[0], rows)


class GpuKernel(Kernel):
    """What kernels over :class:`GpuMatrix` have in common.

    They have been compiled and emulated, but not run on a GPU yet: until then they run where ``OCTAVO_KERNEL`` asks for
    them, and rank behind the reference.
    """

    prepares = True
    #: Why a layout cannot be run, or an empty string.
    refuses: ClassVar[Callable[[Layout], str]]

    @staticmethod
    def missing() -> str:
        return cuda.why_no_compiler() if _has_device() else "no CUDA device"

    @classmethod
    def why_not(cls, layout: Layout, device: torch.device) -> str:
        if device.type != "cuda":
            return f"it runs on CUDA, not on {device.type}"
        architecture = _architecture(device.index or 0)
        if architecture < _OLDEST:
            return f"it wants sm_{_OLDEST} or newer, not sm_{architecture}"
        return cuda.why_no_compiler(architecture) or cls.refuses(layout)

    @classmethod
    def remedy(cls, layout: Layout, device: torch.device) -> str:
        if device.type != "cuda" or not _has_device() or cls.refuses(layout):
            return ""
        architecture = _architecture(device.index or 0)
        return cuda.why_no_compiler(architecture) if architecture >= _OLDEST else ""

    @staticmethod
    def takes(x: Tensor) -> bool:
        return x.dtype in TYPES and not (x.requires_grad and torch.is_grad_enabled())

    @staticmethod
    def linear(x: Tensor, prepared: GpuMatrix) -> Tensor:
        exact = os.environ.get(EXACT) == "1"
        y = cuda_linear(x.reshape(-1, x.shape[-1]), prepared.handle, prepared.rows, exact)
        return y.view(*x.shape[:-1], prepared.rows)


def address(tensor: Tensor | None) -> ctypes.c_void_p:
    """A tensor's memory as an argument of a kernel."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
