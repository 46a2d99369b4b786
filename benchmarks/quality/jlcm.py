"""What each part of JLCM contributes, on blocks of the original model: nothing is quantized but one block at a time.

    python benchmarks/quality/jlcm.py MODEL --calib FILE --out RESULT.json [--blocks 2]

The first table is that of grouping: proxy errors of 2-bit codes before any learning. ``stored`` reorders the rows of
all matrices and counts 16 bits a row for the order where it cannot be folded. The second is that of learning: the error
of the block's output on held-out windows, relative to its variance, before and after.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from table import machine, portable, save  # pyright: ignore[reportMissingImports]
from torch import Tensor

from octavo import algorithms
from octavo._core.seeds import generator
from octavo.calibration import capture
from octavo.calibration.data import read_text, windows
from octavo.math.hessian import proxy_loss
from octavo.models import resolve
from octavo.models.adapter import CausalModel
from octavo.pipeline.block_tune import BlockTuneOptions, BlockTuner
from octavo.pipeline.reorder import load_reordered
from octavo.weight import VQWeight

GROUPS = (1, 4, 16, 64, 1 << 16)
#: label -> options of jlcm beside ``bits``; every variant starts from the same codes.
LEARNING: dict[str, dict[str, Any]] = {
    "books": {"learn": "books"},
    "joint, proximal": {},
    "joint, ste": {"rule": "ste"},
    "joint, ste, code_lr=.006": {"rule": "ste", "code_lr": 0.006},
    "joint, ste, code_lr=.002": {"rule": "ste", "code_lr": 0.002},
}


@dataclass
class Block:
    """A block of the original model with what enters it, and the statistics of its matrices."""

    causal: CausalModel
    index: int
    tokens: Tensor
    hidden: list[Tensor]
    kwargs: list[dict[str, Any]]
    hessians: dict[str, Tensor]

    def load(self, algorithm: Any) -> torch.nn.Module:
        """The block with its neurons in the order that the method wants."""
        return load_reordered(self.causal, self.index, algorithm, self.hidden[:1], self.kwargs[:1], print)

    def quantized(self, algorithm: Any) -> dict[str, VQWeight]:
        """Every matrix, without learning; the block is loaded."""
        shapes = [(target.shape, False) for target in self.causal.targets(self.index).values()]
        layouts = zip(self.hessians, algorithm.layouts(shapes), strict=True)
        return {
            name: algorithm.quantize(
                self.causal.weight(name), layout=layout, hessian=self._hessian(name), generator=generator(0, name)
            )
            for name, layout in layouts
        }

    def _hessian(self, name: str) -> Tensor:
        """H of the inputs as the loaded block has them."""
        order = self.causal._orders.get(name, (None, None))[1]
        hessian = self.hessians[name]
        return hessian if order is None else hessian[order][:, order]


def collect(model: str, calib: str, samples: int, ctx: int, blocks: list[int]) -> list[Block]:
    """Some blocks of the original model."""
    causal, found = CausalModel(resolve(model)), []
    tokens = windows(causal.tokenizer(), read_text(calib), ctx, samples, 0, limit=causal.max_positions, source=calib)
    inputs = causal.capture_inputs([(ids, None) for ids in tokens.ids.split(max(4096 // ctx, 1))])
    hidden = inputs.hidden
    for index in range(max(blocks) + 1):
        block, kwargs = causal.load_block(index), [k[index] for k in inputs.kwargs]
        if index in blocks:
            prefix = causal.blocks[index] + "."
            names = [name.removeprefix(prefix) for name in causal.targets(index)]
            seen = capture.collect(block, names, hidden, kwargs, inputs.mask, where=causal.blocks[index])
            hessians = {prefix + name: accumulator.matrix() for name, accumulator in seen.hessians.items()}
            found.append(Block(causal, index, tokens.ids, hidden, kwargs, hessians))
        hidden = capture.forward(block, hidden, kwargs, causal.blocks[index])
        causal.release_block(index)
    return found


def grouping(block: Block) -> list[dict[str, Any]]:
    """Proxy errors of 2-bit codes by the number of groups and by which rows are reordered."""
    rows = []
    for groups in GROUPS:
        for reorder in ("none", "folded", "stored") if 1 < groups < 1 << 16 else ("none",):
            algorithm = algorithms.get("jlcm")(bits=2, groups=groups, reorder=reorder != "none")
            block.load(algorithm)
            extra, weights, total, error = 0, 0, 0, 0.0
            for name in block.hessians:
                shape = block.causal.targets(block.index)[name].shape
                layout = next(x for x in algorithm.candidates(shape, False) if x.stages == (2,))
                weight = block.causal.weight(name)
                if reorder == "stored" and block.causal._orders.get(name, (None,))[0] is None:
                    order = algorithm.row_order([weight])
                    weight, extra = weight[order], extra + 16 * shape[0]
                hessian = block._hessian(name)
                made = algorithm.quantize(weight, layout=layout, hessian=hessian, generator=generator(0, name))
                error += proxy_loss(weight, made.dequantize(), hessian) * weight.numel()
                weights, total = weights + weight.numel(), total + made.bits()
            block.causal.release_block(block.index)
            label = "a row each" if groups == GROUPS[-1] else groups
            rows.append(
                {
                    "block": block.index,
                    "groups": label,
                    "reordered": reorder,
                    "bits_per_weight": (total + extra) / weights,
                }
                | {"error": error / weights}
            )
            print(rows[-1], file=sys.stderr)
    return rows


def learning(block: Block, bits: float, steps: int) -> list[dict[str, Any]]:
    """Errors of the block's output before and after learning in several ways from the same codes."""
    base = algorithms.get("jlcm")(bits=bits)
    block.load(base)
    weights = block.quantized(base)
    block.causal.release_block(block.index)
    rows = []
    for label, options in LEARNING.items():
        algorithm = algorithms.get("jlcm")(bits=bits, steps=steps, **options)
        tuner = BlockTuner(block.causal, block.tokens, BlockTuneOptions(**(algorithm.block_tuning or {})), 0)
        loaded = block.load(algorithm)
        tuner.begin(block.hidden)
        tuner.aim(loaded, block.hidden, block.kwargs, block.causal.blocks[block.index])
        for name, weight in weights.items():
            block.causal.set_weight(loaded, name, weight.dequantize())
        start = time.process_time()
        tuned = tuner.tune(block.index, loaded, weights, block.hidden)
        assert tuned is not None
        report = vars(tuned.report) | {"cpu_seconds": time.process_time() - start}
        rows.append({"learning": label, **report})
        block.causal.release_block(block.index)
        print(rows[-1], file=sys.stderr)
    return rows


def markdown(document: dict[str, Any]) -> str:
    """Both tables."""
    lines = ["| groups | reordered | bits per weight | proxy error |", "|---|---|---|---|"]
    for row in document["grouping"]:
        cells = (row["groups"], row["reordered"], f"{row['bits_per_weight']:.4f}", f"{row['error']:.5f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += [
        "",
        "| learning | error before | after | codes moved % | best step | CPU s |",
        "|---|---|---|---|---|---|",
    ]
    for row in document["learning"]:
        cells = [row["learning"], f"{row['loss_before']:.5f}", f"{row['loss_after']:.5f}", f"{100 * row['moved']:.1f}"]
        cells += [f"{row['best_step']} of {row['steps']}", f"{row['cpu_seconds']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--blocks", default="2")
    parser.add_argument("--bits", type=float, default=2.3)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--ctx", type=int, default=256)
    arguments = parser.parse_args()
    indices = [int(number) for number in arguments.blocks.split(",")]
    blocks = collect(arguments.model, arguments.calib, arguments.samples, arguments.ctx, indices)
    document: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/quality/jlcm.py", *map(portable, sys.argv[1:])]),
        "model": Path(arguments.model).name,
        "bits": arguments.bits,
        "learning": [row for block in blocks for row in learning(block, arguments.bits, arguments.steps)],
        "grouping": [row for block in blocks for row in grouping(block)],
        "machine": machine(),
    }
    save(arguments.out, document, markdown(document))


if __name__ == "__main__":
    main()
