"""What each part of GPTVQ contributes: proxy errors of real matrices on the same Hessians, one option at a time.

    python benchmarks/quality/parts.py MODEL --calib FILE --out RESULT.json [--blocks 0,7,15,22,29]

Hessians come from the original model's own activations, so that no variant sees inputs that another one made. The last
rows are the recipe of the released code (``released.py``).
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from released import GPTVQReleased  # registers the baseline  # pyright: ignore[reportMissingImports]
from table import machine, portable, save  # pyright: ignore[reportMissingImports]
from torch import Tensor

from octavo import algorithms
from octavo._core.seeds import generator
from octavo.calibration import capture
from octavo.calibration.data import read_text, windows
from octavo.math.hessian import proxy_loss
from octavo.models import resolve
from octavo.models.adapter import CausalModel

#: label -> options of gptvq at 2.25 bits; the first row of each group is what the others differ from.
VARIANTS: dict[str, dict[str, Any]] = {
    "4D as it is": {"vector_length": 4},
    "4D init=mahalanobis": {"vector_length": 4, "init": "mahalanobis"},
    "4D metric=diagonal (1/U_jj^2)": {"vector_length": 4, "metric": "diagonal"},
    "4D metric=none": {"vector_length": 4, "metric": "none"},
    "4D exact_feedback=false": {"vector_length": 4, "exact_feedback": False},
    "4D update=none": {"vector_length": 4, "update": "none"},
    "4D update=none rounds=0": {"vector_length": 4, "update": "none", "rounds": 0},
    "4D update=adam": {"vector_length": 4, "update": "adam"},
    "4D rounds=0": {"vector_length": 4, "rounds": 0},
    "4D rounds=3": {"vector_length": 4, "rounds": 3},
    "4D iterations=100": {"vector_length": 4, "iterations": 100},
    "4D scale_block=0": {"vector_length": 4, "scale_block": 0},
    "4D scale_block=64": {"vector_length": 4, "scale_block": 64},
    "4D scale_block=64 refresh=false": {"vector_length": 4, "scale_block": 64, "refresh": False},
    "4D scale_block=16": {"vector_length": 4, "scale_block": 16},
    "4D scale_norm=max": {"vector_length": 4, "scale_norm": "max"},
    "4D permute=true": {"vector_length": 4, "permute": True},
    "4D codebook_dtype=float16": {"vector_length": 4, "codebook_dtype": "float16"},
    "4D codebook_dtype=int4": {"vector_length": 4, "codebook_dtype": "int4"},
    "4D rows x 256 groups": {"vector_length": 4, "group_columns": 256, "scale_block": 0},
    "2D as it is": {"vector_length": 2},
    "2D init=mahalanobis": {"vector_length": 2, "init": "mahalanobis"},
    "2D scale_block=64": {"vector_length": 2, "scale_block": 64},
    "2D scale_block=64 refresh=false": {"vector_length": 2, "scale_block": 64, "refresh": False},
    "2D codebook_dtype=float16": {"vector_length": 2, "codebook_dtype": "float16"},
    "2D codebook_dtype=int4": {"vector_length": 2, "codebook_dtype": "int4"},
    "1D as it is": {"vector_length": 1},
    "1D init=mahalanobis": {"vector_length": 1, "init": "mahalanobis"},
    "1D codebook_dtype=float16": {"vector_length": 1, "codebook_dtype": "float16"},
    "1D codebook_dtype=int4": {"vector_length": 1, "codebook_dtype": "int4"},
    "1D svd_rank=0.75": {"vector_length": 1, "svd_rank": 0.75},
    "1D svd_rank=0.5": {"vector_length": 1, "svd_rank": 0.5},
    "8D as it is": {"vector_length": 8},
    "released 4D": {"method": "gptvq_released", "vector_length": 4},
    "released 2D": {"method": "gptvq_released", "vector_length": 2},
    "released 1D": {"method": "gptvq_released", "vector_length": 1},
    "vptq": {"method": "vptq"},
}


def collect(model: str, calib: str, samples: int, ctx: int, blocks: list[int]) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight and Hessian of every target of some blocks of the original model."""
    causal = CausalModel(resolve(model))
    tokens = windows(causal.tokenizer(), read_text(calib), ctx, samples, 0, limit=causal.max_positions, source=calib)
    inputs = causal.capture_inputs([(ids, None) for ids in tokens.ids.split(4)])
    hidden, found = inputs.hidden, {}
    for index in range(max(blocks) + 1):
        block = causal.load_block(index)
        kwargs = [k[index] for k in inputs.kwargs]
        if index in blocks:
            prefix = causal.blocks[index] + "."
            names = [name.removeprefix(prefix) for name in causal.targets(index)]
            seen = capture.collect(block, names, hidden, kwargs, inputs.mask, where=causal.blocks[index])
            for name in names:
                found[prefix + name] = (causal.weight(prefix + name), seen.hessians[name].matrix())
        hidden = capture.forward(block, hidden, kwargs, causal.blocks[index])
        causal.release_block(index)
    return found


def measure(matrices: dict[str, tuple[Tensor, Tensor]], bits: float, options: dict[str, Any]) -> dict[str, Any]:
    """Quantize all matrices with one variant."""
    options = dict(options)
    algorithm = algorithms.get(options.pop("method", "gptvq"))(bits=bits, **options)
    layouts = algorithm.layouts([((w.shape[0], w.shape[1]), False) for w, _ in matrices.values()])
    start, errors, size, weights = time.process_time(), {}, 0, 0
    for (name, (weight, hessian)), layout in zip(matrices.items(), layouts, strict=True):
        result = algorithm.quantize(weight, hessian=hessian, layout=layout, generator=generator(0, name), name=name)
        errors[name] = proxy_loss(weight, result.dequantize(), hessian)
        size, weights = size + result.bits(), weights + weight.numel()
    by_size = sum(errors[name] * w.numel() for name, (w, _) in matrices.items()) / weights
    return {
        "bits_per_weight": size / weights,
        "error": by_size,
        "error_geometric_mean": math.exp(sum(math.log(e) for e in errors.values()) / len(errors)),
        "cpu_seconds": time.process_time() - start,
        "errors": errors,
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table for the documentation; errors relative to the first row of the same vector length."""
    lines = ["| variant | bits per weight | proxy error | relative | CPU s |", "|---|---|---|---|---|"]
    base: dict[str, float] = {}
    for row in rows:
        kind = row["variant"].replace("released ", "").split()[0]
        relative = row["error"] / base.setdefault(kind, row["error"])
        cells = (f"{row['bits_per_weight']:.3f}", f"{row['error']:.5f}", f"{relative:.3f}", f"{row['cpu_seconds']:.0f}")
        lines.append(f"| {row['variant']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    assert GPTVQReleased.name in algorithms.names()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--blocks", default="0,7,15,22,29")
    parser.add_argument("--bits", type=float, default=2.25)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--ctx", type=int, default=1024)
    parser.add_argument("--only", nargs="*", help="labels of the variants to run")
    arguments = parser.parse_args()
    blocks = [int(number) for number in arguments.blocks.split(",")]
    matrices = collect(arguments.model, arguments.calib, arguments.samples, arguments.ctx, blocks)
    rows = []
    for label, options in VARIANTS.items():
        if arguments.only is None or label in arguments.only:
            rows.append({"variant": label, **measure(matrices, arguments.bits, options)})
            print(markdown(rows[-1:]).splitlines()[-1], file=sys.stderr)
    document = {
        "command": " ".join(["python", "benchmarks/quality/parts.py", *map(portable, sys.argv[1:])]),
        "model": Path(arguments.model).name,
        "bits": arguments.bits,
        "threads": torch.get_num_threads(),
        "rows": rows,
        "machine": machine(),
    }
    save(arguments.out, document, markdown(rows))


if __name__ == "__main__":
    main()
