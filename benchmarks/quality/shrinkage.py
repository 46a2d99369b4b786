"""How much of the calibration text's second moments is chance, and what shrinking them is worth on other text.

    python benchmarks/quality/shrinkage.py MODEL --calib FILE --out RESULT.json [--windows 3 9 32] [--blocks 4 15 25]

Layers read the original model's activations; codes are chosen by the first windows of a text, with H drawn towards its
diagonal by multiples of its share of chance, and judged by the same windows and by ``--held-out`` later ones.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from table import machine, portable  # pyright: ignore[reportMissingImports]
from torch import Tensor

from octavo import algorithms
from octavo._core.io import write_json
from octavo._core.seeds import generator
from octavo.calibration.data import read_text, windows
from octavo.calibration.gradients import backpropagate, token_weights
from octavo.math.hessian import HessianAccumulator, proxy_loss
from octavo.models import resolve
from octavo.models.adapter import CausalModel

#: No token weighs more than so many times the mean, as when a model is quantized.
_CAP = 10.0
_LAYERS = ("q_proj", "o_proj", "gate_proj", "down_proj")


def collect(causal: CausalModel, tokens: Tensor, blocks: list[int]) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs [tokens, in] bfloat16 and token weights [tokens] of some layers."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)

    def visit(block: int, name: str, x: Tensor, g: Tensor) -> None:
        if block in blocks and name.endswith(_LAYERS):
            found[name].append((x.bfloat16().clone(), token_weights(g)))

    backpropagate(causal, tokens, visit, generator=generator(0, "labels"))
    return {name: (torch.cat([x for x, _ in v]), torch.cat([s for _, s in v])) for name, v in found.items()}


def moments(x: Tensor, weights: Tensor) -> HessianAccumulator:
    """The statistics of some tokens."""
    accumulator = HessianAccumulator(x.shape[1])
    for rows, part in zip(x.split(4096), weights.split(4096), strict=True):
        accumulator.add(rows, part)
    return accumulator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--windows", type=int, nargs="+", default=[3, 9, 32])
    parser.add_argument("--held-out", type=int, default=16)
    parser.add_argument("--ctx", type=int, default=1024)
    parser.add_argument("--blocks", type=int, nargs="+", default=[15])
    parser.add_argument("--factors", type=float, nargs="+", default=[0, 0.5, 1, 2, 4, 8])
    arguments = parser.parse_args()
    causal = CausalModel(resolve(arguments.model))
    count = max(arguments.windows) + arguments.held_out
    text = read_text(arguments.calib)
    tokens = windows(causal.tokenizer(), text, arguments.ctx, count, 0, source=arguments.calib)
    method = algorithms.get("universal")(codebook="gaussian-v8-k256-256", beam=8, sweeps=1)
    rows: list[dict[str, Any]] = []
    for name, (x, weights) in collect(causal, tokens.ids, arguments.blocks).items():
        weight = causal.weight(name)
        for guided in (False, True):
            s = weights.clamp(max=_CAP * float(weights.mean())) if guided else torch.ones_like(weights)
            first = len(x) - arguments.held_out * arguments.ctx
            truth = moments(x[first:], s[first:]).matrix()
            for number in arguments.windows:
                part = slice(0, number * arguments.ctx)
                seen = moments(x[part], s[part])
                share, plain = seen.shrinkage(), seen.matrix()
                for factor in arguments.factors:
                    codes = method.quantize(weight, hessian=seen.matrix(factor), name=name).dequantize()
                    row = {"layer": name, "token_weights": guided, "windows": number, "share": share, "factor": factor}
                    row |= {"seen": proxy_loss(weight, codes, plain), "held_out": proxy_loss(weight, codes, truth)}
                    rows.append(row)
                    print(*(f"{v:.4f}" if isinstance(v, float) else v for v in row.values()), flush=True)
                    if factor * share >= 1:
                        break
    if arguments.out:
        words = (portable(arguments.model), "--calib", portable(arguments.calib))
        command = " ".join(["python", "benchmarks/quality/shrinkage.py", *words])
        document = {"command": command, "settings": {"ctx": arguments.ctx, "held_out": arguments.held_out}}
        write_json(arguments.out, document | {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
