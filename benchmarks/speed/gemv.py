"""One matrix times one vector from memory: Octavo's codebooks against llama.cpp's types through ggml, in turn.

    python benchmarks/speed/gemv.py --out benchmarks/results/gemv.json [--threads 1 2] [--shape 4096x4096 11008x4096]
    python benchmarks/speed/gemv.py --parts 4096

Every round runs through so many different matrices that none is in a cache when it comes (``--megabytes``). Medians of
the rounds; the peers' rounds lie between ours. ``GB/s`` counts what is stored of a matrix, ``roof`` is what as many
threads read at best. Needs llama-cpp-python for the peers. ``--parts`` times what a
product of so many inputs begins with, and the ways of prompts.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType as Ggml
from synthetic import BLOCKS, layout_of, random_tensors
from torch.nn import functional
from vptq_package import Published

sys.path.insert(0, str(Path(__file__).parents[1] / "quality"))
from table import machine

from octavo._core import clib
from octavo._core.io import write_json
from octavo.evaluation.speed import read_bandwidth
from octavo.kernels import gather, lookup
from octavo.kernels._packed import decoded
from octavo.layout import BlockScale, Layout
from octavo.weight import VQWeight

OURS = (
    "gaussian-v8-k256",
    "gaussian-v8-k256-16",
    "gaussian-v8-k256-256",
    "gaussian-v4-k256",
    "gaussian-v2-k16",
    "gaussian-v8-k256-256-16",
    "gaussian-v8-k256-256-256",
    "gaussian-v2-k64",
    "gaussian-v4-k256-64",
    "gaussian-v4-k256-256",
    "gaussian-v2-k256",
)
#: Formats with a codebook per matrix and scales per 128 inputs, as GPTVQ has them, and four-bit integers on the same
#: code path: (vector length, bits of the code).
GROUPED = {"int4-g128": (1, 4), "vq1d-k8-g128": (1, 3), "vq2d-k64-g128": (2, 6), "vq2d-k16-g128": (2, 4)}
GROUPED |= {"vq4d-k256-g128": (4, 8)}
#: What the published VPTQ files have: (bits of the code, bits of the residual's).
VPTQ = {"vptq-v8-k65536": (16,), "vptq-v8-k65536-256": (16, 8)}
PEERS = ("TQ2_0", "IQ2_XXS", "IQ2_XS", "Q2_K", "IQ3_XXS", "Q4_0", "Q4_K")


def own_layout(name: str, shape: tuple[int, int]) -> Layout:
    """The layout of one of OURS, GROUPED or VPTQ."""
    if name in VPTQ:
        return Layout(shape, 8, VPTQ[name], "column", channel_norm="input", permuted=True)
    if name not in GROUPED:
        return layout_of(name, shape)
    v, bits = GROUPED[name]
    return Layout(shape, v, (bits,), "row", codebook_dtype="int8", block_scale=BlockScale(128, 0, 8))


class Ours:
    """Packed matrices of one codebook."""

    def __init__(self, vectors: int, isa: int, name: str, shape: tuple[int, int], count: int) -> None:
        self.vectors, self.isa = vectors, isa
        layout = own_layout(name, shape)
        generator = torch.Generator().manual_seed(0)
        self.name, self.bits, self.count = name, layout.bits_per_weight, count
        pack = gather.pack if name in VPTQ else lookup.pack
        self.matrices = [pack(VQWeight(layout, random_tensors(layout, generator))) for _ in range(count)]
        self.x = torch.randn(vectors, shape[1], generator=generator)

    def round(self, threads: int) -> None:
        """Multiply by every matrix once."""
        for matrix in self.matrices:
            if self.vectors > 1:
                matrix.many(self.x, threads)
            else:
                matrix.multiply(self.x, threads, self.isa)

    def close(self) -> None:
        """Give the memory back."""
        self.matrices.clear()


class Peer:
    """Matrices of one of ggml's types."""

    def __init__(self, library: Any, kind: str, shape: tuple[int, int], count: int) -> None:
        size, weights, scales = BLOCKS[kind]
        self.lib, self.name, self.bits, self.count = library, kind, 8 * size / weights, count
        out, inp = shape
        stored = out * inp // weights * size
        parameters = _InitParams(count * (stored + 4 * out + (1 << 12)) + (1 << 27), None, False)
        self.context = ctypes.c_void_p(library.ggml_init(parameters))
        x = ctypes.c_void_p(library.ggml_new_tensor_1d(self.context, 0, ctypes.c_int64(inp)))
        _view(library.ggml_get_data(x), inp * 4, np.float32)[:] = np.random.default_rng(0).standard_normal(inp)
        self.graph = ctypes.c_void_p(library.ggml_new_graph(self.context))
        random = np.random.default_rng(1)
        for _ in range(count):
            new = library.ggml_new_tensor_2d
            matrix = ctypes.c_void_p(new(self.context, int(Ggml[kind]), ctypes.c_int64(inp), ctypes.c_int64(out)))
            data = _view(library.ggml_get_data(matrix), stored, np.uint8).reshape(-1, size)
            data[:] = random.integers(0, 256, data.shape, dtype=np.uint8)
            for at in scales:
                data[:, at : at + 2] = np.frombuffer(np.float16(1e-3).tobytes(), np.uint8)
            product = ctypes.c_void_p(library.ggml_mul_mat(self.context, matrix, x))
            library.ggml_build_forward_expand(self.graph, product)

    def round(self, threads: int) -> None:
        """Multiply by every matrix once."""
        self.lib.compute(self.context, self.graph, threads)

    def close(self) -> None:
        """Give the memory back."""
        self.lib.ggml_free(self.context)


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def _view(address: int, size: int, dtype: type) -> np.ndarray:
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=dtype)


def ggml() -> Any:
    """ggml's C functions, from the package llama-cpp-python."""
    import llama_cpp  # pyright: ignore[reportMissingImports]

    folder = Path(llama_cpp.__file__).parent / "lib"
    base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
    cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
    base.ggml_init.argtypes = (_InitParams,)
    for name in ("init", "new_tensor_1d", "new_tensor_2d", "get_data", "mul_mat", "new_graph"):
        getattr(base, f"ggml_{name}").restype = ctypes.c_void_p
    base.compute = cpu.ggml_graph_compute_with_ctx
    cpu.ggml_cpu_init()
    return base


def interleaved(runners: list[Any], threads: int, rounds: int) -> list[list[float]]:
    """Seconds per matrix of every runner in every round; one comes before those that count, and one before each."""
    taken: list[list[float]] = [[] for _ in runners]
    for turn in range(rounds + 1):
        for runner, times in zip(runners, taken, strict=True):
            # The threads of whoever ran before spin for a while before they sleep; then ours have to wake up.
            time.sleep(0.2)
            runner.round(threads)
            began = time.perf_counter()
            runner.round(threads)
            if turn:
                times.append((time.perf_counter() - began) / runner.count)
    return taken


def parts(inp: int, name: str, rounds: int, threads: int) -> list[str]:
    """What a product of ``inp`` inputs begins with, on one thread, and the ways of a prompt of 512 vectors on all.

    The tables come with the look-ups of a single tile of 64 rows, a hundredth of them, and with the call from Python.
    """
    (matrix,), (whole,) = (Ours(512, 0, name, (rows, inp), 1).matrices for rows in (64, inp))
    x, weight = (torch.randn(rows, inp, generator=torch.Generator().manual_seed(0)) for rows in (512, inp))
    halves = x.bfloat16(), weight.bfloat16()
    moved, lib = torch.empty_like(x), clib.library()
    assert lib is not None
    works: dict[str, Callable[[], object]] = {
        "transform": lambda: lib.octavo_matrix_transform(matrix.handle, x.data_ptr(), len(x), moved.data_ptr(), 1),
        "transform and tables": lambda: [matrix.multiply(x[i : i + 1], 1) for i in range(len(x))],
        "torch in bfloat16": lambda: functional.linear(*halves),
        "torch in float32": lambda: functional.linear(x, weight),
        "decoded to float32": lambda: decoded(x, whole),
    }
    if whole.has_many:
        works["in bytes"] = lambda: whole.many(x, threads)
    torch.set_num_threads(threads)
    taken: dict[str, list[float]] = {part: [] for part in works}
    for turn in range(rounds + 1):
        for part, work in works.items():
            began = time.perf_counter()
            work()
            if turn:
                taken[part].append(1e6 * (time.perf_counter() - began) / len(x))
    found = []
    for part, times in taken.items():
        median = statistics.median(times)
        of_prompts = f"{inp * inp / 1e3 / median:6.1f} G multiplications/s"
        found.append(f"{part:20} {f'{median:6.1f} us' if part.startswith('transform') else of_prompts}")
    return found


def row(runner: Any, shape: tuple[int, int], threads: int, times: list[float]) -> dict[str, Any]:
    """The figures of one runner."""
    median, weights = statistics.median(times), shape[0] * shape[1]
    return {
        "name": runner.name,
        "shape": "x".join(map(str, shape)),
        "threads": threads,
        "bits_per_weight": runner.bits,
        "microseconds": 1e6 * median,
        "spread": [1e6 * min(times), 1e6 * max(times)],
        "gigabytes_per_second": runner.bits * weights / 8e9 / median,
        "gigaweights_per_second": weights / 1e9 / median,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shape", nargs="+", default=["4096x4096", "11008x4096"])
    parser.add_argument("--ours", nargs="*", default=[*OURS, *GROUPED, *VPTQ])
    parser.add_argument("--peers", nargs="*", default=list(PEERS))
    parser.add_argument("--package", action="store_true", help="the published package beside the formats of VPTQ")
    parser.add_argument("--megabytes", type=int, default=384, help="of different matrices in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vectors", type=int, default=1, help="prompts: so many at once, in bytes; without --peers")
    parser.add_argument("--isa", type=int, default=0, help="of ours: 1 baseline, 2 AVX2, 3 AVX-512, 4 VBMI, 0 the best")
    parser.add_argument("--parts", type=int, metavar="INPUTS", help="only this: see above")
    arguments = parser.parse_args()
    if arguments.parts:
        print("\n".join(parts(arguments.parts, "gaussian-v8-k256-256", arguments.rounds, arguments.threads[-1])))
        return
    if arguments.vectors > 1 and arguments.peers:
        parser.error("--vectors is for ours alone: give --peers without names")
    library = ggml() if arguments.peers else None
    roofs = {threads: read_bandwidth(threads) for threads in arguments.threads}
    rows: list[dict[str, Any]] = []
    for text in arguments.shape:
        shape = (int(text.split("x")[0]), int(text.split("x")[1]))
        # One of ours and one of the peers at a time, so that both see the same state of the machine.
        for names in zip_longest(arguments.ours, arguments.peers):
            runners: list[Any] = []
            for make, name in (
                (partial(Ours, arguments.vectors, arguments.isa), names[0]),
                (partial(Peer, library), names[1]),
            ):
                if name:
                    count = int(arguments.megabytes * 8e6 / (_bits(name) * shape[0] * shape[1]))
                    runners.append(make(name, shape, max(count, 2)))
                    if arguments.package and name in VPTQ:
                        runners.append(Published(name, VPTQ[name], shape))
            for threads in arguments.threads:
                taken = interleaved(runners, threads, arguments.rounds)
                for runner, times in zip(runners, taken, strict=True):
                    rows.append(found := row(runner, shape, threads, times))
                    print(
                        f"{found['name']:26} {text:>11} {threads} thread(s) {found['bits_per_weight']:6.3f} bits "
                        f"{found['microseconds']:8.0f} us {found['gigabytes_per_second']:5.1f} GB/s "
                        f"{found['gigaweights_per_second']:6.1f} Gw/s",
                        flush=True,
                    )
            for runner in runners:
                runner.close()
    print(f"read at best: {', '.join(f'{roof:.1f} GB/s ({threads})' for threads, roof in roofs.items())}")
    if arguments.out:
        write_json(arguments.out, {"machine": machine(), "roofs": {str(t): r for t, r in roofs.items()}, "rows": rows})


def _bits(name: str) -> float:
    if name in BLOCKS:
        size, weights, _ = BLOCKS[name]
        return 8 * size / weights
    return own_layout(name, (4096, 4096)).bits_per_weight


if __name__ == "__main__":
    main()
