"""What kernels in CUDA C++ have in common: programs, matrices that torch's operators know by number, the operator."""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from octavo._core import cuda
from octavo._core.errors import ResourceError, UsageError
from octavo.kernels import _shipped as shipped
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
#: Decoded numbers at a time: a product at full speed, and 32 MB in half precision, which second-level caches hold.
_DECODED = 1 << 24
#: Rows of a decoded block come in multiples of this and of the rows of a vector.
_ROWS = 64
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


class Shape(Protocol):
    """What a program is compiled for."""

    #: The name of its source.
    source: ClassVar[str]

    def macros(self) -> dict[str, str]:
        """As the source wants them."""
        ...

    def functions(self) -> dict[str, int]:
        """The functions of the program and the most shared memory of each in bytes."""
        ...


def source(name: str) -> str:
    """The CUDA source of a kernel, with what all share before it."""
    folder = files("octavo.kernels").joinpath("cuda")
    return folder.joinpath("numbers.cuh").read_text() + folder.joinpath(f"{name}.cu").read_text()


@cache
def _program(shape: Shape, device: int) -> Any:
    text, macros, architecture = source(shape.source), shape.macros(), _architecture(device)
    compiles = not cuda.why_no_compiler(architecture)
    if (binary := shipped.find(text, macros, architecture)) is not None:
        try:
            return cuda.Program(binary, device, shape.functions(), THREADS)
        except ResourceError:
            # A driver that is older than the compiler of the release; that of torch suits it, or the driver's own.
            if not compiles and shipped.find_ptx(text, macros) is None:
                raise
    binary = None if compiles else shipped.find_ptx(text, macros)
    if binary is None:
        binary = cuda.cached_program(text, macros, f"sm_{architecture}")
    return cuda.Program(binary, device, shape.functions(), THREADS)


def _why_no_program(shape: Shape, architecture: int) -> str:
    """Why a program is neither shipped for a processor nor can be compiled, or an empty string."""
    if not (reason := cuda.why_no_compiler(architecture)):
        return ""
    text = source(shape.source)
    found = shipped.find(text, shape.macros(), architecture) or shipped.find_ptx(text, shape.macros())
    return "" if found is not None else reason


def _has_device() -> bool:
    return torch.cuda.is_available() and torch.version.cuda is not None


def _architecture(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def program(shape: Shape, device: torch.device) -> Launcher:
    """The program of a shape on a CUDA device: one that came with the package, else compiled here.

    Raises:
        ResourceError: no compiler, or a driver that refuses.
    """
    return _program(shape, device.index or 0)


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
    def moved(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What :meth:`decoded` rows are multiplied by in place of ``x``, [n, columns] in its dtype; and what is added
        to all outputs of an input, [n], or None."""

    @abstractmethod
    def decoded(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Rows [first, last), [rows, columns]; ``first`` is a multiple of 64 and of :attr:`vector_rows`."""

    #: Rows of a vector.
    vector_rows: int = 1

    def multiply_many(self, x: Tensor) -> Tensor:
        """:meth:`multiply` for many inputs: blocks of rows are decoded in the dtype of ``x`` and multiplied densely.

        On tensor cores that is cuBLAS. For R x K weights and M inputs a product takes 2 M R K / F seconds at F FLOP/s;
        decoding writes 2 R K bytes, and the product reads them, 4 R K / B seconds at B bytes/s: 2 F / (M B) of the
        product's time. A100 (F = 250e12 reached, B = 2e12 of memory or about 4e12 of the second-level cache, where
        blocks of 2^24 numbers stay): 12 % of it at M = 2048 from memory, 6 % from the cache, and 4 times as much at
        M = 512. H100 (650e12, 3.3e12, 6e12): 19 % and 11 %, and 4 times as much. To decode into the tiles of a product
        instead costs a decoding per M / 256 tiles, and a product of one's own that reaches cuBLAS's F: worth it below
        M = 1024 or so, not at the length of a prompt.
        """
        moved, added = self.moved(x)
        y = torch.empty(x.shape[0], self.rows, dtype=x.dtype, device=x.device)
        unit = math.lcm(_ROWS, self.vector_rows)
        step = max(_DECODED // moved.shape[1] // unit, 1) * unit
        for first in range(0, self.rows, step):
            last = min(first + step, self.rows)
            part = functional.linear(moved, self.decoded(first, last, x.dtype))
            if self.bias is not None:
                part = part + self.bias[first:last].to(x.dtype)
            y[:, first:last] = part if added is None else part + added.to(x.dtype).unsqueeze(1)
        return y

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
    #: The programs that a layout needs.
    shapes: ClassVar[Callable[[Layout], Sequence[Shape]]]

    @staticmethod
    def missing() -> str:
        if not _has_device():
            return "no CUDA device"
        return "" if shipped.architectures() else cuda.why_no_compiler()

    @classmethod
    def why_not(cls, layout: Layout, device: torch.device) -> str:
        if device.type != "cuda":
            return f"it runs on CUDA, not on {device.type}"
        architecture = _architecture(device.index or 0)
        if architecture < _OLDEST:
            return f"it wants sm_{_OLDEST} or newer, not sm_{architecture}"
        return cls.refuses(layout) or cls._lacking(layout, architecture)

    @classmethod
    def remedy(cls, layout: Layout, device: torch.device) -> str:
        if device.type != "cuda" or not _has_device() or cls.refuses(layout):
            return ""
        architecture = _architecture(device.index or 0)
        return cls._lacking(layout, architecture) if architecture >= _OLDEST else ""

    @classmethod
    def _lacking(cls, layout: Layout, architecture: int) -> str:
        return next(filter(None, (_why_no_program(shape, architecture) for shape in cls.shapes(layout))), "")

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
