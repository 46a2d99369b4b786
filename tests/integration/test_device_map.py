"""Quantized models spread over devices by accelerate: sizes are true, nothing is made twice, offloading works."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations import accelerate as placement

from formats.strategies import random_weight
from formats.tiny_models import MODELS, STYLES, VOCABULARY, quantize, write_tokenizer
from integration.test_transformers import rewrite
from integration.vptq_models import write_vptq
from octavo._core import clib
from octavo._core.errors import FormatError, UsageError
from octavo.integrations.transformers import load
from octavo.kernels import select
from octavo.nn import VQLinear
from octavo.weight import VQWeight

#: The second block lies on the disk.
PLACES: dict[str, str] = dict.fromkeys(
    ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
)
PLACES["model.layers.1"] = "disk"


@pytest.fixture(autouse=True)
def chosen_on_purpose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(select.ENVIRONMENT, "reference")


def saved(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    MODELS[name]().save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized Qwen2, with an embedding and a head of their own."""
    out = tmp_path_factory.mktemp("quantized") / "out"
    quantize(saved("qwen2", tmp_path_factory.mktemp("original")), out)
    return out


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(2, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids).logits


def layers_of(model: nn.Module) -> dict[str, VQLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, VQLinear)}


def test_sizes_are_those_of_the_stored_tensors_before_anything_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, Any]] = []
    infer = placement.infer_auto_device_map

    def spy(model: Any, **options: Any) -> Any:
        assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
        sizes, _ = placement.compute_module_sizes(model, options["hf_quantizer"])
        seen.append((dict(sizes), accelerate.utils.compute_module_sizes(model)))
        return infer(model, **options)

    monkeypatch.setattr(placement, "infer_auto_device_map", spy)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, device_map="auto")
    ours, theirs = seen[0]
    for name, layer in layers_of(model).items():
        assert ours[name] == theirs[name] == -(-layer.layout.bits() // 8)
    assert ours[""] == theirs[""] == model.get_memory_footprint()


def test_devices_get_whole_blocks_within_their_memory(folder: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    sizes, _ = placement.compute_module_sizes(model)
    block = sizes["model.layers.0"]
    memory: Any = {0: sizes["model.embed_tokens"] + 2 * block, 1: 10 * sizes[""], "cpu": 10 * sizes[""]}
    places = placement.infer_auto_device_map(
        model, max_memory=memory, no_split_module_classes=model._no_split_modules, offload_buffers=True
    )
    used = {device: sum(sizes[name] for name, where in places.items() if where == device) for device in memory}
    assert used[0] <= memory[0]
    assert sum(used.values()) == sizes[""]
    assert not [name for name in places if name.startswith("model.layers.") and name.count(".") > 2]


@pytest.mark.parametrize("places", [{"": "cpu"}, PLACES])
@pytest.mark.parametrize("offload_buffers", [False, True])
def test_a_model_that_is_partly_on_disk_computes_the_same(
    folder: Path, tmp_path: Path, places: dict[str, str], offload_buffers: bool
) -> None:
    wanted = logits(AutoModelForCausalLM.from_pretrained(folder))
    options: Any = {"device_map": places, "offload_folder": tmp_path, "offload_buffers": offload_buffers}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
    assert torch.equal(logits(model), wanted)
    where = {tensor.device.type for tensor in model.model.layers[1].buffers()}
    assert where == {"meta" if offload_buffers and "disk" in places.values() else "cpu"}
    assert torch.equal(logits(model), wanted)


def test_auto_spills_to_disk_what_does_not_fit(folder: Path, tmp_path: Path) -> None:
    plain: Any = AutoModelForCausalLM.from_pretrained(folder)
    options: Any = {
        "device_map": "auto",
        "max_memory": {"cpu": plain.get_memory_footprint() - 4000},
        "offload_folder": tmp_path,
    }
    model: Any = AutoModelForCausalLM.from_pretrained(folder, offload_buffers=True, **options)
    assert "disk" in model.hf_device_map.values()
    assert torch.equal(logits(model), logits(plain))


def test_load_offloads_quantized_matrices_and_keeps_them_packed(folder: Path) -> None:
    model, _ = load(folder, device_map=PLACES)
    assert model.octavo_decode == "packed"
    assert {tensor.device.type for tensor in model.model.layers[1].buffers()} == {"meta"}
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(folder)))


def test_offloaded_tensors_are_checked_as_others_are(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj"

    def damage(weights: dict[str, VQWeight]) -> None:
        weights[name] = random_weight(replace(STYLES[4], shape=weights[name].layout.shape))
        weights[name].tensors["codebook_0"].view(-1)[0] = float("nan")

    quantize(saved("qwen2", tmp_path / "original"), tmp_path / "out", change=damage)
    options: Any = {"device_map": PLACES, "offload_folder": tmp_path, "offload_buffers": True}
    with pytest.raises(FormatError, match=rf"{name}: codebook_0 holds NaN"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", **options)


def test_a_head_that_is_the_embedding_cannot_be_offloaded(tmp_path: Path) -> None:
    head = random_weight(replace(STYLES[1], shape=(VOCABULARY, 32)), scale=0.1)
    quantize(
        saved("llama", tmp_path / "original"), tmp_path / "out", change=lambda weights: weights.update(lm_head=head)
    )
    rewrite(tmp_path / "out", lambda tensors: tensors.pop("model.embed_tokens.weight"))
    options: Any = {"device_map": PLACES, "offload_folder": tmp_path, "offload_buffers": True}
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", **options)), logits(plain))
    options["device_map"] = PLACES | {"lm_head": "disk"}
    with pytest.raises(UsageError, match=r"model\.embed_tokens looks its rows up in the output head"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", **options)


def test_vptqs_format_cannot_be_offloaded_with_its_buffers(wide: Callable[..., Path], tmp_path: Path) -> None:
    write_vptq(wide(), tmp_path / "theirs")
    options: Any = {"device_map": PLACES, "offload_folder": tmp_path, "offload_buffers": True}
    with pytest.raises(UsageError, match="octavo convert FOLDER NEW_FOLDER --to octavo"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", **options)


@pytest.mark.skipif(clib.library() is None, reason="no C++ library")
def test_offloaded_layers_keep_no_packed_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(select.ENVIRONMENT, "gather")
    layer, x = VQLinear.from_weight(random_weight(replace(STYLES[0], shape=(48, 64)), scale=0.1)), torch.randn(3, 64)
    wanted = layer(x)
    assert layer.prepared() is layer.prepared()
    layer._prepared = None
    cpu_offload(layer, torch.device("cpu"), offload_buffers=True)
    assert torch.equal(layer(x), wanted)
    assert {tensor.device.type for tensor in layer.buffers()} == {"meta"}
    assert layer._prepared is None
