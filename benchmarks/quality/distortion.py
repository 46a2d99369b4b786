"""Mean squared error of the universal codebooks on a Gaussian source, beside the rate-distortion bound.

    python benchmarks/quality/distortion.py --out benchmarks/results/codebook_distortion.json [--only NAME ..]

Fresh N(0, 1) vectors, the same for all codebooks of one vector length. One stage and two stages are searched exactly,
three with a beam of 512; the columns "beam" show what narrower searches of additive codebooks cost. The bound at rate R
is 2^(-2R); the gap is 10 log10(MSE / bound).
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from table import machine, portable, save  # pyright: ignore[reportMissingImports]
from torch import Tensor

from octavo import codebooks
from octavo._core.seeds import generator
from octavo.codebooks import Codebook
from octavo.math.additive import nearest_additive
from octavo.math.assign import nearest

BEST_BEAM = 512
BEAMS = (8, 32, 128)
#: Published or earlier figures for the same kind of codebook.
LITERATURE = {
    "gaussian-v2-k16": ".1080",
    "gaussian-v4-k256": ".0965-.0972",
    "gaussian-v8-k256-256": ".0940 (joint, beam 8), .103-.106 (greedy)",
    "gaussian-v8-k256-signs": ".0958",
    "gaussian-v8-k65536": "~.085",
    "gaussian-v2-k64": ".0302",
    "gaussian-v4-k256-signs": ".0267",
    "gaussian-v8-k256-256-256": ".0274 (beam 8)",
    "gaussian-v2-k256": ".0085",
}
#: Other quantizers of the same source, by stored bits per weight.
OTHERS = (
    (2, "Lloyd-Max, scalar", ".1175"),
    (2, "E8P", ".089-.091"),
    (2, "trellis, L = 16", ".069"),
)
#: Weights that prototypes of AVX-512 decoders looked up, per cycle of one core.
DECODE = {
    "gaussian-v4-k256": "15.9",
    "gaussian-v8-k256-signs": "12.2",
    "gaussian-v8-k256-256": "24-43",
    "gaussian-v2-k16": "32",
    "gaussian-v2-k64": "26",
    "gaussian-v2-k256": "10.6",
    "gaussian-v4-k256-signs": "11.6",
    "gaussian-v8-k256-256-256": "21",
    "gaussian-v8-k65536": "5",
}


def errors(points: Tensor, book: Codebook, beam: int) -> Tensor:
    """[n]: squared error per weight of every vector."""
    points = points.abs() if book.sign_bits else points
    stages = [book.centroids(t) for t in range(len(book.stages))]
    found = []
    for part in points.split(1 << 16):
        if len(stages) == 1:
            codes = nearest(part, stages[0]).unsqueeze(1)
        else:
            codes = nearest_additive(part, stages, None, beam)
        decoded = sum((stage[codes[:, t]] for t, stage in enumerate(stages)), torch.zeros_like(part))
        found.append((part - decoded).double().square().mean(dim=1))
    return torch.cat(found)


def measure(name: str, weights: int, seed: int) -> dict[str, Any]:
    """One row of the table."""
    book, began = codebooks.get(name), time.process_time()
    stream = generator(seed, f"vectors of {book.vector_length}")
    points = torch.randn(-(-weights // book.vector_length), book.vector_length, generator=stream)
    best = errors(points, book, BEST_BEAM)
    mse = float(best.mean())
    row = {
        "codebook": name,
        "bits": book.bits,
        "table_bytes": sum(table.numel() for table in book.tables),
        "mse": mse,
        "standard_error": float(best.std()) / math.sqrt(best.numel()),
        "stated": book.distortion,
        "effective_bits": -0.5 * math.log2(mse),
        "gap_db": 10 * math.log10(mse) + 20 * book.bits * math.log10(2),
        "seconds_per_million": (time.process_time() - began) / points.numel() * 1e6,
        "literature": LITERATURE.get(name),
        "decode": DECODE.get(name),
    }
    if len(book.stages) > 1:
        row["beams"] = {str(beam): float(errors(points, book, beam).mean()) for beam in BEAMS}
    return row


def markdown(rows: list[dict[str, Any]]) -> str:
    """All codebooks, by bits and then by error."""
    beams = [f"beam {beam}" for beam in BEAMS]
    head = ("codebook", "bits", "MSE", "effective bits", "gap dB", *beams, "literature", "decode")
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in sorted(rows, key=lambda row: (row["bits"], -row["mse"])):
        narrow = row.get("beams", {})
        cells = (
            row["codebook"],
            f"{row['bits']:g}",
            f"{row['mse']:.5f} ± {row['standard_error']:.5f}",
            f"{row['effective_bits']:.3f}",
            f"{row['gap_db']:.2f}",
            *(f"{narrow[str(beam)]:.5f}" if narrow else "" for beam in BEAMS),
            row["literature"] or "",
            row["decode"] or "",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="+", choices=codebooks.names(), metavar="NAME")
    parser.add_argument("--weights", type=int, default=1 << 21)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    rows = [measure(name, arguments.weights, arguments.seed) for name in arguments.only or codebooks.names()]
    print(markdown(rows))
    if arguments.out is None:
        return
    document = {
        "command": " ".join(["python", "benchmarks/quality/distortion.py", *map(portable, sys.argv[1:])]),
        "weights": arguments.weights,
        "seed": arguments.seed,
        "threads": torch.get_num_threads(),
        "rows": rows,
        "others": [{"bits": bits, "quantizer": what, "mse": mse} for bits, what, mse in OTHERS],
        "machine": machine(),
    }
    save(arguments.out, document, markdown(rows))


if __name__ == "__main__":
    main()
