"""The published package ``vptq`` (PyPI, read and called, not copied) as a peer: its own layer on this processor.

It has kernels for CUDA alone; elsewhere it decodes the matrix with torch and multiplies. ``pip install --no-deps vptq``
is enough: only the module with the layer is loaded, not the package's servers and applications.
"""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

#: How many matrices are in a round: each takes about a second.
_COUNT = 2


@cache
def _layer() -> Any:
    spec = importlib.util.find_spec("vptq")
    if spec is None or spec.origin is None:
        raise SystemExit("the published package is not here: pip install --no-deps vptq, or leave --package out")
    for name in ("vptq", "vptq.layers"):
        # Packages without their __init__, which loads what only its applications need.
        package = ModuleType(name)
        package.__path__ = [str(Path(spec.origin).parent.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    if importlib.util.find_spec("sentence_transformers") is None:
        # Imported for a class of models that is not asked for here.
        stand_in = ModuleType("sentence_transformers.SentenceTransformer")
        stand_in.SentenceTransformer = None  # pyright: ignore[reportAttributeAccessIssue]
        sys.modules |= {"sentence_transformers": ModuleType("sentence_transformers"), stand_in.__name__: stand_in}
    from vptq.layers.vqlinear import VQuantLinear  # pyright: ignore[reportMissingImports]

    return VQuantLinear


class Published:
    """Layers of the published package with random codes, vectors of eight along the outputs."""

    def __init__(self, name: str, stages: tuple[int, ...], shape: tuple[int, int]) -> None:
        out, inp = shape
        residual = 2 ** stages[1] if len(stages) > 1 else -1
        self.name, self.bits, self.count = f"package {name}", sum(stages) / 8, _COUNT
        generator = torch.Generator().manual_seed(0)
        layer = _layer()
        self.layers = []
        for _ in range(_COUNT):
            made = layer(
                in_features=inp,
                out_features=out,
                vector_lens=(-1, 8),
                num_centroids=(-1, 2 ** stages[0]),
                num_res_centroids=(-1, residual),
                group_num=1,
                group_size=inp,
                outlier_size=0,
                indices_as_float=False,
                enable_norm=True,
                enable_perm=True,
                is_indice_packed=True,
                dtype=torch.bfloat16,
                enable_proxy_error=False,
            )
            for parameter in (*made.parameters(), *made.buffers()):
                if parameter.dtype == torch.int32:
                    codes = torch.randint(-(2**31), 2**31, parameter.shape, generator=generator)
                    parameter.data = codes.to(torch.int32)
                elif parameter.dtype == torch.bfloat16:
                    parameter.data.fill_(0.01)
            made.perm.data = torch.randperm(inp, generator=generator).to(torch.uint16).view(torch.int16)
            self.layers.append(made)
        self.x = torch.randn(1, 1, inp, generator=generator).bfloat16()

    def round(self, threads: int) -> None:
        """Multiply by every matrix once."""
        torch.set_num_threads(threads)
        with torch.inference_mode():
            for layer in self.layers:
                layer(self.x)

    def close(self) -> None:
        """Give the memory back."""
        self.layers.clear()
