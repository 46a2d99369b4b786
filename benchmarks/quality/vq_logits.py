"""Output heads of several kinds on one model whose blocks and embedding stay as they are.

    python benchmarks/quality/vq_logits.py MODEL --calib FILES --text FILE [--codes 512 2048 8192] [--bits 2 3 4]
        [--cache FOLDER] [--out RESULT.json]

Published VQ-Logits, the same codewords as a choice of candidates that low-bit rows (or with ``--bits`` left empty the
original's) score, ``--head vq`` with equal bits and with classes of rows, and adaptive softmax. What the head reads is
worked out once for the calibration and the test text; all heads are then measured on the same states, every
``--stride``-th of them. Rows are coded one by one, so a head of two classes is put together from whole heads of either
rate. Bytes are those of the stored tensors; logits of one state are timed in turns, the fastest of ``--rounds``.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from octavo._core.io import write_json
from octavo._core.seeds import generator
from octavo.algorithms.universal import Universal
from octavo.algorithms.vq_logits import Calibration, VQLogits, descend, fit
from octavo.calibration.data import read_text, windows
from octavo.formats.head import CLASSES, WHOLE, HeadLayout
from octavo.heads import VQHead, pack_classes, pack_map
from octavo.integrations.transformers import load
from octavo.layout import Layout
from octavo.math.hessian import HessianAccumulator
from octavo.math.logits import logit_statistics
from octavo.pipeline.head import ROW_CLASSES, head_algorithm, row_layout

Logits = Callable[[Tensor], Tensor]
_CHUNK = 256


@dataclass
class Row:
    """One kind of head: what it stores, how it is run here, and a module that is timed, if there is one."""

    name: str
    bytes: float
    logits: Logits
    timed: Callable[[Tensor], Any] | None = None
    facts: dict[str, Any] | None = None


@torch.inference_mode()
def read_states(arguments: argparse.Namespace) -> dict[str, Tensor]:
    """The head, and for calibration and test windows token ids and what the head reads, bfloat16."""
    file = arguments.cache / "states.safetensors" if arguments.cache else None
    if file is not None and file.is_file():
        return load_file(file)
    model, tokenizer = load(arguments.model, getattr(torch, arguments.dtype))
    texts = {"cal": (arguments.calib, arguments.samples, 0), "test": (arguments.text, arguments.windows, None)}
    found = {"head": model.get_output_embeddings().weight.to(torch.bfloat16).clone()}
    for name, (text, count, seed) in texts.items():
        ids = windows(tokenizer, read_text(text), arguments.ctx, count, seed, source=text).ids
        run = model.get_decoder()
        states = [run(w.unsqueeze(0), use_cache=False).last_hidden_state[0].to(torch.bfloat16) for w in ids]
        found |= {f"{name}_ids": ids, name: torch.stack(states)}
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: tensor.contiguous() for key, tensor in found.items()}, file)
    return found


def coded_heads(head: Tensor, states: Tensor, rates: set[float], cache: Path | None) -> dict[float, Tensor]:
    """The head as codes of each rate decode to it, bfloat16."""
    file = cache / "coded.safetensors" if cache else None
    stored = load_file(file) if file is not None and file.is_file() else {}
    accumulator, base, shape = HessianAccumulator(head.shape[1]), head_algorithm(Universal()), (*head.shape,)
    for window in states:
        accumulator.add(window)
    for rate in sorted(rates):
        if f"{rate:g}" in stored:
            continue
        weight = base.quantize(
            head.float(),
            layout=row_layout(base, shape, False, rate),
            hessian=accumulator.matrix(base.shrink),
            generator=generator(0, base.stream("head", shape)),
            name="head",
        )
        stored[f"{rate:g}"] = weight.dequantize().to(torch.bfloat16)
        print(f"coded at {rate:g} bits", flush=True)
    if file is not None:
        save_file(stored, file)
    return {rate: stored[f"{rate:g}"] for rate in rates}


def bare(layout: HeadLayout, parts: dict[str, Layout], **buffers: Tensor) -> VQHead:
    """A head with the given buffers and codes that stand for nothing: they take as long as any others."""
    head = VQHead(layout, parts)
    for part in head.parts:
        for tensor in part.buffers():
            if tensor.dtype == torch.int32:
                tensor.copy_(torch.randint(-(1 << 31), 1 << 31, tensor.shape).int())
            else:
                tensor.fill_(0.01)
    for name, tensor in buffers.items():
        head.get_buffer(name).copy_(tensor)
    return head


def quantized(head: Tensor, coded: dict[float, Tensor], order: Tensor, bits: float) -> list[Row]:
    """``--head-bits`` with equal bits and with classes."""
    base, (tokens, width) = head_algorithm(Universal()), head.shape
    layout = row_layout(base, (tokens, width), False, bits)
    plain = bare(HeadLayout("head", tokens, width, WHOLE), {"all": layout})
    equal = coded[bits]
    low, high = ROW_CLASSES[bits]
    count = int(tokens * (bits - low) / (high - low))
    mask = torch.zeros(tokens, dtype=torch.bool)
    mask[order[:count]] = True
    mixed = torch.where(mask.unsqueeze(1), coded[high], coded[low])
    shapes = zip(CLASSES, (count, tokens - count), (high, low), strict=True)
    parts = {name: row_layout(base, (rows, width), False, rate) for name, rows, rate in shapes}
    two = HeadLayout("head", tokens, width, CLASSES)
    size = (sum(part.bits() for part in parts.values()) + two.bits()) / 8
    module = bare(two, parts, classes=pack_classes(mask))
    return [
        Row(f"vq {bits:g} bits, equal", layout.bits() / 8, lambda x: x @ equal.T, plain),
        Row(f"vq {bits:g} bits, classes", size, lambda x: x @ mixed.T, module, {"frequent": count}),
    ]


def codewords(
    head: Tensor, train: Calibration, held_out: Calibration, options: VQLogits, rows: Row | None, wanted: list[int]
) -> list[Row]:
    """Published VQ-Logits, and with its codewords the candidates that ``rows`` score."""
    tokens, width = head.shape
    began = time.perf_counter()
    found = fit(head, train, held_out, options, generator(0, "codewords"))
    layout = HeadLayout("head", tokens, width, (), options.codes)
    codes, table = found.codes.to(torch.bfloat16), found.map
    stored = {"codes": codes, "map": pack_map(table, layout)}
    sizes = torch.bincount(table, minlength=options.codes)
    facts = {
        "parameters": codes.numel(),
        "seconds": time.perf_counter() - began,
        "largest_class": int(sizes.max()),
        "kl_before": found.kl_before,
    }
    name = f"vq-logits K={options.codes} {options.start}{'' if options.steps else ', means'}"
    made = [Row(name, layout.bits() / 8, lambda x: (x @ codes.T)[:, table], bare(layout, {}, **stored), facts)]
    if rows is None:
        return made
    distances = (head.float() - found.codes[table]).norm(dim=1)
    radii = torch.zeros(options.codes).scatter_reduce_(0, table, distances, "amax")
    for count in wanted:
        seen: dict[str, list[float]] = {"recall": [], "certified": [], "scored": []}

        def logits(x: Tensor, count: int = count, seen: dict[str, list[float]] = seen) -> Tensor:
            scores = (x @ codes.T).float()
            order = scores.argsort(dim=1, descending=True)
            ahead = sizes[order].cumsum(1) - sizes[order]
            chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, ahead < count)
            exact, inside = rows.logits(x).float(), chosen[:, table]
            best = exact.where(inside, -torch.inf).amax(dim=1)
            # No token of a codeword that was left out can be above its codeword's logit by more than |h| r.
            bound = (scores + x.float().norm(dim=1, keepdim=True) * radii).where(~chosen, -torch.inf).amax(dim=1)
            seen["recall"] += (exact.amax(dim=1) == best).tolist()
            seen["certified"] += (bound <= best).tolist()
            seen["scored"] += inside.sum(dim=1).tolist()
            return torch.where(inside, exact, scores[:, table])

        module = None
        if isinstance(rows.timed, VQHead):
            parts = rows.timed.layouts
            both = HeadLayout("head", tokens, width, rows.timed.layout.parts, options.codes)
            kept = {key: rows.timed.get_buffer(key) for key in rows.timed.layout.tensors()}
            module = bare(both, parts, **stored, **kept)
            module.candidates = count
        name = f"{rows.name}, {count} candidates of K={options.codes}"
        made.append(Row(name, rows.bytes + layout.bits() / 8, logits, module, seen))
    return made


def adaptive(head: Tensor, train: Calibration, held_out: Calibration, cutoffs: list[int], steps: int) -> Row:
    """Adaptive softmax (arXiv 1609.04309) fitted to the head: frequent tokens whole, clusters of others projected.

    Projections are the leading directions of a cluster's rows in the metric of their logits, by a factor of 4 fewer
    from cluster to cluster; the shortlist and the clusters' vectors are then fitted to the original's probabilities.
    """
    width, order = head.shape[1], train.statistics.mass.argsort(descending=True)
    edges = [*cutoffs, len(head)]
    assignment = torch.empty(len(head), dtype=torch.int64)
    assignment[order[: edges[0]]] = torch.arange(edges[0])
    values, vectors = torch.linalg.eigh((train.states.float().T @ train.states.float()) / len(train.states))
    root, inverse = (vectors * (values.clamp(min=1e-6 * float(values.max())) ** power) for power in (0.5, -0.5))
    clusters: list[tuple[Tensor, Tensor, Tensor]] = []
    numbers = 0
    for i, (first, last) in enumerate(pairwise(edges)):
        members = order[first:last]
        assignment[members] = edges[0] + i
        rows = head[members].float()
        image = rows @ root
        leading = torch.linalg.eigh(image.T @ image)[1][:, -max(width // 4 ** (i + 1), 8) :]
        clusters.append((members, inverse @ leading, image @ leading))
        numbers += leading.numel() + image.shape[0] * leading.shape[1]
    total = edges[0] + len(clusters)
    start = torch.zeros(total, width).index_add_(0, assignment, head.float())
    start /= torch.bincount(assignment, minlength=total).unsqueeze(1)
    codes = descend(start, assignment, train, held_out, steps).codes
    log_counts = torch.bincount(assignment, minlength=total).float().log()
    numbers += codes.numel()

    def logits(x: Tensor) -> Tensor:
        first = torch.log_softmax(x.float() @ codes.T + log_counts, dim=1)
        out = torch.empty(len(x), len(head))
        out[:, order[: edges[0]]] = first[:, : edges[0]]
        for i, (members, down, up) in enumerate(clusters):
            inner = torch.log_softmax((x.float() @ down) @ up.T, dim=1)
            out[:, members] = first[:, edges[0] + i, None] + inner
        return out

    narrow = [tensor.to(torch.bfloat16) for tensor in (codes, *(t for _, down, up in clusters for t in (down.T, up)))]

    def timed(x: Tensor) -> None:
        x = x.to(torch.bfloat16)
        functional.linear(x, narrow[0])
        for down, up in zip(narrow[1::2], narrow[2::2], strict=True):
            functional.linear(functional.linear(x, down.contiguous()), up)

    return Row(f"adaptive softmax, cutoffs {cutoffs}", 2.0 * numbers, logits, timed, {"parameters": numbers})


@torch.inference_mode()
def score(head: Tensor, rows: list[Row], states: Tensor, targets: Tensor) -> list[dict[str, Any]]:
    """Perplexity, KL to the original and the probability to draw its top token from each head's top tokens."""
    sums = {row.name: torch.zeros(3, dtype=torch.float64) for row in rows}
    original = 0.0
    for x, y in zip(states.split(_CHUNK), targets.split(_CHUNK), strict=True):
        log_p = torch.log_softmax((x @ head.T).float(), dim=1)
        top, p = log_p.argmax(dim=1, keepdim=True), log_p.exp()
        original -= float(log_p.gather(1, y.unsqueeze(1)).sum(dtype=torch.float64))
        for row in rows:
            raw = row.logits(x).float()
            log_q = torch.log_softmax(raw, dim=1)
            best = raw.amax(dim=1, keepdim=True)
            fair = (raw.gather(1, top) == best).squeeze(1) / (raw == best).sum(dim=1)
            nll = -log_q.gather(1, y.unsqueeze(1)).sum()
            sums[row.name] += torch.stack([nll, (p * (log_p - log_q)).sum(), fair.sum()]).double()
    count, base = len(states), math.exp(original / len(states))
    found = [{"row": "original, bfloat16", "bytes": 2 * head.numel(), "perplexity": base, "kl": 0.0, "top1": 1.0}]
    for row in rows:
        nll, kl, fair = (sums[row.name] / count).tolist()
        facts = {k: sum(v) / len(v) if isinstance(v, list) else v for k, v in (row.facts or {}).items()}
        perplexity = math.exp(nll)
        shared = {"perplexity": perplexity, "more": perplexity / base - 1, "kl": kl, "top1": fair}
        found.append({"row": row.name, "bytes": row.bytes, **shared, **facts})
    return found


@torch.inference_mode()
def times(head: Tensor, rows: list[Row], states: Tensor, rounds: int) -> dict[str, float]:
    """Fewest seconds per state, all heads in turns; quantized heads read float32, as the native decoder gives it."""
    best: dict[str, float] = {}
    runs: dict[str, Callable[[Tensor], Any]] = {row.name: row.timed for row in rows if row.timed is not None}
    runs["original, bfloat16"] = lambda x: functional.linear(x.to(torch.bfloat16), head)
    for x in states[:rounds].float():
        for name, run in runs.items():
            began = time.perf_counter()
            run(x.unsqueeze(0))
            best[name] = min(best.get(name, math.inf), time.perf_counter() - began)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calib", default="bundled")
    parser.add_argument("--text", required=True)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--ctx", type=int, default=1024)
    parser.add_argument("--dtype", default="float32", help="of the model's blocks")
    parser.add_argument("--codes", type=int, nargs="*", default=[512, 2048, 8192])
    parser.add_argument("--bits", type=float, nargs="*", default=[2, 3, 4])
    parser.add_argument("--candidates", type=int, nargs="*", default=[512, 2048])
    parser.add_argument("--cutoffs", type=int, nargs="*", default=[2000, 10000])
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--cache", type=Path, help="folder that keeps states and coded heads")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    data = read_states(arguments)
    head, stride = data["head"], arguments.stride
    targets = data["test_ids"][:, 1::stride].flatten()
    states = data["test"][:, :-1][:, ::stride].flatten(0, 1)
    apart = max(len(data["cal"]) // 8, 1)
    train, held_out = (
        Calibration(x, logit_statistics(x, lambda s: s @ head.T, len(head), pull=True))
        for x in (part[:, ::stride].flatten(0, 1) for part in (data["cal"][:-apart], data["cal"][-apart:]))
    )
    print(
        f"{len(train.states)} states for the fit, {len(held_out.states)} held out, {len(states)} for the test",
        flush=True,
    )
    costs = train.statistics.row_weights() * head.float().square().sum(dim=1).double()
    order = costs.argsort(descending=True, stable=True)
    rates = {rate for bits in arguments.bits for rate in (bits, *ROW_CLASSES[bits])}
    coded = coded_heads(head, data["cal"], rates, arguments.cache) if rates else {}
    rows = [row for bits in arguments.bits for row in quantized(head, coded, order, bits)]
    scorer = rows[-1] if rows else Row("bfloat16 rows", 2.0 * head.numel(), lambda x: x @ head.T)
    middle = sorted(arguments.codes)[len(arguments.codes) // 2] if arguments.codes else 0
    for count in arguments.codes:
        options = VQLogits(codes=count, steps=arguments.steps)
        rows += codewords(head, train, held_out, options, scorer, arguments.candidates if count == middle else [])
        print(f"fitted {count} codewords", flush=True)
    if middle:
        for start, steps in (("kmeans", 0), ("frequency", arguments.steps), ("random", arguments.steps)):
            options = VQLogits(codes=middle, start=start, steps=steps)  # type: ignore[arg-type]
            rows += codewords(head, train, held_out, options, None, [])
    rows.append(adaptive(head, train, held_out, arguments.cutoffs, arguments.steps))
    found = score(head, rows, states, targets)
    seconds = times(head, rows, states, arguments.rounds)
    for row in found:
        row["ms"] = 1e3 * seconds[row["row"]] if row["row"] in seconds else None
        ms = f"{row['ms']:8.2f} ms" if row["ms"] else " " * 11
        more = f"{100 * row.get('more', 0):+7.2f} %"
        print(f"{row['row']:52} {row['bytes'] / 1e6:8.2f} MB {ms} {more} KL {row['kl']:.4f} top1 {row['top1']:.4f}")
    if arguments.out:
        settings = {k: v for k, v in vars(arguments).items() if k not in ("cache", "out", "model", "calib", "text")}
        shared = {"positions": len(states), "fitted_on": len(train.states), "threads": torch.get_num_threads()}
        write_json(arguments.out, {"model": Path(arguments.model).name, **shared, "settings": settings, "rows": found})


if __name__ == "__main__":
    main()
