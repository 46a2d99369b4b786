"""What quantized heads and embeddings cost: the blocks of one quantized model under heads of several sizes.

    python benchmarks/quality/head.py QUANTIZED ORIGINAL --bits 2 3 4 6 --calib FILES --text FILE [--out RESULT.json]

QUANTIZED has head and embedding as they came. They are replaced, in memory, by what ``octavo quantize --head-bits B``
makes of them, from the states that the quantized blocks put out for the calibration windows; every row is measured on
the same tokens against the original. ``--separately`` has rows for head alone and embedding alone as well.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from octavo._core.io import write_json
from octavo._core.seeds import generator
from octavo.algorithms.universal import Universal
from octavo.calibration.data import EVALUATION, read_text, windows
from octavo.evaluation.metrics import evaluate
from octavo.integrations.transformers import load
from octavo.math.hessian import HessianAccumulator
from octavo.models import resolve
from octavo.models.adapter import CausalModel
from octavo.pipeline.head import HeadOptions, head_algorithm, plan_head, tied_hessian


@torch.inference_mode()
def second_moment(model: Any, ids: Tensor) -> Tensor:
    """Of what the head reads, over token windows [windows, tokens]."""
    accumulator = HessianAccumulator(model.get_output_embeddings().in_features)
    for window in ids:
        accumulator.add(model.get_decoder()(window.unsqueeze(0), use_cache=False).last_hidden_state[0])
    return accumulator.matrix()


def put(model: Any, head: Tensor, embedding: Tensor) -> None:
    """Give a dense model another head and another embedding."""
    for module, matrix in ((model.get_output_embeddings(), head), (model.get_input_embeddings(), embedding)):
        module.weight = nn.Parameter(matrix, requires_grad=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quantized")
    parser.add_argument("original")
    parser.add_argument("--bits", type=float, nargs="+", default=[2, 3, 4, 6])
    parser.add_argument("--calib", default="bundled")
    parser.add_argument("--text", default=EVALUATION)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--ctx", type=int, default=1024)
    parser.add_argument("--max-tokens", type=int, default=12288)
    parser.add_argument("--separately", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    original, tokenizer = load(arguments.original, torch.float32)
    model = load(arguments.quantized, torch.float32, decode="dense")[0]
    causal = CausalModel(resolve(arguments.original), with_ends=True)
    assert causal.ends is not None
    samples = (arguments.ctx, arguments.samples, 0)
    hessian = second_moment(model, windows(tokenizer, read_text(arguments.calib), *samples, source="calib").ids)
    if causal.ends.tied:
        hessian = tied_hessian(hessian)
    text = read_text(arguments.text)
    tokens = windows(tokenizer, text, arguments.ctx, arguments.max_tokens // arguments.ctx, None, source=arguments.text)
    head, embedding = (end.weight.detach() for end in (model.get_output_embeddings(), model.get_input_embeddings()))
    rows: list[dict[str, Any]] = []

    def measure(name: str, size: float, new_head: Tensor, new_embedding: Tensor) -> None:
        put(model, new_head, new_embedding)
        found = evaluate({"original": original, name: model}, tokens.ids, reference="original")[name]
        rows.append({"row": name, "bytes": size, **found.to_dict()})
        print(f"{name:24} {size / 1e6:7.2f} MB KL {found.kl:.4f} +- {found.kl_se:.4f} ppl {found.perplexity:.2f}")

    unique = {t.data_ptr(): t.numel() for t in (head, embedding)}
    measure("as it is, 16 bits", 2 * sum(unique.values()), head, embedding)
    algorithm = Universal()
    for bits in arguments.bits:
        layouts = plan_head(causal, algorithm, HeadOptions(bits, None)).layouts
        decoded = {}
        for name, layout in layouts.items():
            stream = generator(0, head_algorithm(algorithm).stream(name, layout.shape))
            weight = head_algorithm(algorithm).quantize(
                causal.weight(name),
                layout=layout,
                hessian=hessian if name == causal.ends.head else None,
                generator=stream,
                name=name,
            )
            decoded[name] = weight.dequantize()
        new_head = decoded[causal.ends.head]
        new_embedding = decoded.get(causal.ends.embedding, new_head)
        size = sum(layout.bits() for layout in layouts.values()) / 8
        measure(f"{bits:g} bits", size, new_head, new_embedding)
        if arguments.separately:
            measure(f"{bits:g} bits, head alone", size, new_head, embedding)
            measure(f"{bits:g} bits, embedding alone", size, head, new_embedding)
    if arguments.out:
        write_json(arguments.out, {"text": arguments.text, "tokens": int(tokens.ids.numel()), "rows": rows})


if __name__ == "__main__":
    main()
