"""Quantized models under transformers' tensor parallelism: two ranks compute what one does, or say why not."""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.multiprocessing.spawn import spawn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from formats.strategies import random_weight
from formats.tiny_models import COMMON, STYLES, VOCABULARY, quantize, write_tokenizer
from integration.ranks import compute
from octavo._core.errors import UsageError
from octavo.formats.native import NativeMatrix
from octavo.integrations.transformers import _split_by_plan
from octavo.kernels import select
from octavo.layout import Layout
from octavo.nn import TiedEmbedding, VQLinear
from octavo.weight import VQWeight

#: Row vectors with log2 scales, columns in a stored order with outliers, tiles, and low-rank books.
SPLITTABLE = [STYLES[1], STYLES[0], STYLES[4], STYLES[6]]


@pytest.fixture(autouse=True)
def chosen_on_purpose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(select.ENVIRONMENT, "reference")


def tiny(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config: dict[str, Any] = COMMON | {"intermediate_size": 64} | options
    return LlamaForCausalLM(LlamaConfig(**config))


def test_two_ranks_compute_what_one_does(tmp_path: Path) -> None:
    model = tiny(attention_bias=True, tie_word_embeddings=False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # Biases are zero so far: nobody would see one that is added twice.
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "original")
    write_tokenizer(tmp_path / "original")

    def change(weights: dict[str, VQWeight]) -> None:
        for i, (name, weight) in enumerate(weights.items()):
            style = replace(SPLITTABLE[i % 4], shape=weight.layout.shape, bias=weight.layout.bias)
            weights[name] = random_weight(style, i, scale=0.1)
        weights["lm_head"] = random_weight(replace(STYLES[1], shape=(VOCABULARY, 32)), 99, scale=0.1)

    quantize(tmp_path / "original", tmp_path / "out", change=change)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(compute, args=(2, port, tmp_path / "out", tmp_path), nprocs=2)
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        wanted, tokens = plain(ids).logits, plain.generate(ids, max_new_tokens=5, do_sample=False)
    for rank in range(2):
        found, facts = load_file(tmp_path / f"{rank}.safetensors"), json.loads((tmp_path / f"{rank}.json").read_text())
        torch.testing.assert_close(found["logits"], wanted, rtol=1e-4, atol=1e-4)
        assert torch.equal(found["tokens"], tokens)
        assert not facts["serializable"]
        for name, (out, inp) in facts["shapes"].items():
            whole = plain.get_submodule(name).layout.shape
            halved = (whole[0], whole[1] // 2) if name.endswith(("o_proj", "down_proj")) else (whole[0] // 2, whole[1])
            assert (out, inp) == halved, name


def on_two_ranks(model: Any, layout: Layout, name: str = "model.layers.0.mlp.down_proj") -> dict[str, int]:
    """As when a model with one quantized matrix is about to be loaded on two ranks."""
    model.set_submodule(name, VQLinear(layout, device="meta"))
    model.config.distributed_config = SimpleNamespace(tp_size=2)
    return _split_by_plan(model, {name: NativeMatrix(layout)})


def test_matrices_are_split_as_the_plan_says() -> None:
    layout = replace(STYLES[1], shape=(32, 64))
    model = tiny()
    assert on_two_ranks(model, layout) == {"model.layers.0.mlp.down_proj": 1}
    assert on_two_ranks(tiny(), replace(layout, shape=(64, 32)), "model.layers.1.mlp.up_proj") == {
        "model.layers.1.mlp.up_proj": 0
    }
    model.config.distributed_config = SimpleNamespace(tp_size=1)  # type: ignore[attr-defined]
    assert _split_by_plan(model, {"model.layers.0.mlp.down_proj": NativeMatrix(layout)}) == {}


def test_a_matrix_that_cannot_be_split_is_an_error_before_loading() -> None:
    layout = Layout((32, 64), 8, (8,), "row", permuted=True)
    with pytest.raises(
        UsageError, match=r"down_proj cannot be split over 2 ranks: vectors of 8 hold inputs in a stored"
    ):
        on_two_ranks(tiny(), layout)
    model = tiny()
    model.tp_plan["model.layers.*.mlp.down_proj"] = "packed_rowwise"  # type: ignore[index]
    with pytest.raises(UsageError, match="the plan says 'packed_rowwise', which is not known"):
        on_two_ranks(model, replace(STYLES[1], shape=(32, 64)))


def test_a_head_that_is_the_embedding_stays_whole() -> None:
    model: Any = tiny()
    layout = replace(STYLES[1], shape=(VOCABULARY, 32))
    model.lm_head = VQLinear(layout, device="meta")
    model.model.embed_tokens = TiedEmbedding(model.lm_head)
    model.config.distributed_config = SimpleNamespace(tp_size=2)
    assert {"lm_head", "model.embed_tokens"} <= model.tp_plan.keys()
    assert _split_by_plan(model, {"lm_head": NativeMatrix(layout)}) == {}
    assert not {"lm_head", "model.embed_tokens"} & model.tp_plan.keys()


def test_a_part_of_a_matrix_keeps_the_widths_of_the_whole() -> None:
    layer = VQLinear.from_weight(random_weight(replace(STYLES[1], shape=(16, 8))))
    assert isinstance(layer, nn.Module)
    layer.hold(random_weight(replace(STYLES[0], shape=(16, 4)), scale=0.1))
    assert (layer.out_features, layer.in_features) == (16, 8)
    assert torch.equal(layer(torch.eye(4)), layer.vq_weight().dequantize().T)
    assert layer.state_dict().keys() == layer.layout.tensors().keys()
