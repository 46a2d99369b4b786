"""The main job on every tiny model: what is written computes what it says, and depends on nothing it should not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import octavo  # registers the quantizer with transformers
from conftest import TINY_MODELS
from faults.jobs import RTN, digests, gptq, make_quick, run, stop_after, vptq
from octavo import formats
from octavo._core.errors import Interrupted
from octavo.calibration.data import read_text, windows
from octavo.formats.reader import CheckpointReader
from octavo.math.hessian import HessianAccumulator, proxy_loss
from octavo.models.adapter import CausalModel
from octavo.models.source import resolve
from octavo.pipeline import Event, plan
from octavo.weight import VQWeight

Tiny = Callable[[str], Path]
IDS = torch.arange(3, 43).reshape(2, 20)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)


def load_dense(model: Path, weights: dict[str, VQWeight]) -> nn.Module:
    """The original model in float32, with the given matrices in place of its own."""
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for module, weight in weights.items():
        layer, decoded = dense.get_submodule(module), weight.dequantize()
        layer.weight.data = decoded.T if isinstance(layer, Conv1D) else decoded
        if weight.bias is not None:
            layer.bias.data = weight.bias.float()
    return dense


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()


# Packed layers decode at every call here; their speed is nobody's claim.
@pytest.mark.filterwarnings("ignore::octavo._core.clib.SlowPathWarning")
@pytest.mark.parametrize("method", ["rtn", "gptq", "vptq"])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_what_is_written_loads_and_computes_what_its_matrices_say(
    tiny_model: Tiny, tiny_text_file: Path, tmp_path: Path, name: str, method: str
) -> None:
    """Faults 20, 24, 25: biases, ties, Conv1D, norms and shapes of every family survive."""
    model, out = tiny_model(name), tmp_path / "out"
    settings = {"rtn": RTN, "gptq": gptq(tiny_text_file), "vptq": vptq(tiny_text_file)}[method]
    report = run(model, out, settings)

    weights = dict(formats.read_weights(out))
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert torch.allclose(logits(loaded), logits(load_dense(model, weights)), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(loaded), logits(load_dense(model, {})), rtol=1e-2, atol=1e-2)

    source = CausalModel(resolve(model))
    assert set(weights) == {target for i in range(len(source.blocks)) for target in source.targets(i)}
    written = CheckpointReader(out, strict=True)
    assert source.kept(), "embeddings and norms stay as they are"
    for tensor in source.kept():
        assert torch.equal(written.read(tensor), source.reader.read(tensor)), tensor

    keys = {"method", "bits", "options", "samples", "ctx"} & settings.keys()
    foreseen = plan(model, **{key: settings[key] for key in keys})
    headers = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in written.files)
    assert report.file_bytes == foreseen.file_bytes + headers
    assert report.bits_per_weight == foreseen.bits_per_weight
    total = sum(w.bits() for w in weights.values()) / sum(w.layout.weights for w in weights.values())
    assert report.bits_per_weight == pytest.approx(total)
    if method == "vptq":
        assert total <= settings["bits"]
    assert [row.module for row in report.matrices] == [matrix.module for matrix in foreseen.matrices]
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize(("name", "tied"), [("llama", True), ("qwen2", False)])
def test_tied_heads_stay_tied_and_untied_ones_untied(tiny_model: Tiny, tmp_path: Path, name: str, tied: bool) -> None:
    """Fault 24."""
    run(tiny_model(name), tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    embedding: Any = loaded.get_input_embeddings()
    head: Any = loaded.get_output_embeddings()
    assert (embedding.weight.data_ptr() == head.weight.data_ptr()) is tied
    assert loaded.config.tie_word_embeddings is tied
    assert ("lm_head.weight" in CheckpointReader(tmp_path / "out").names()) is not tied


def inputs_of(model: nn.Module, module: str, ids: Tensor) -> Tensor:
    """The second moment of what a layer reads when the whole model runs."""
    accumulator = HessianAccumulator(model.get_submodule(module).in_features)  # type: ignore[arg-type]
    hook = model.get_submodule(module).register_forward_pre_hook(lambda _, x: accumulator.add(x[0].flatten(0, 1)))
    with torch.no_grad():
        model(ids)
    hook.remove()
    return accumulator.matrix()


def test_later_blocks_are_calibrated_on_what_the_quantized_earlier_ones_put_out(
    tiny_gemma3: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    """Faults 17, 26 and 27: the reported proxy error is that of the real quantized model, not of the original."""
    settings = gptq(tiny_text_file, bits=2, samples=4)
    report = run(tiny_gemma3, tmp_path / "out", settings)
    weights = dict(formats.read_weights(tmp_path / "out"))
    source = CausalModel(resolve(tiny_gemma3))
    text = read_text(str(tiny_text_file))
    ids = windows(source.tokenizer(), text, 16, 4, 0, limit=source.max_positions).ids
    for row in report.matrices:
        if not row.module.endswith("q_proj"):
            continue
        block = int(row.module.split(".")[2])
        before = {m: w for m, w in weights.items() if int(m.split(".")[2]) < block}
        original = source.weight(row.module)
        losses = [
            proxy_loss(original, weights[row.module].dequantize(), inputs_of(model, row.module, ids))
            for model in (load_dense(tiny_gemma3, before), load_dense(tiny_gemma3, {}))
        ]
        assert row.error == pytest.approx(losses[0], rel=1e-3)
        if block > 0:
            assert row.error != pytest.approx(losses[1], rel=1e-2), "the test must tell the two apart"


# -------------------------------------------------------------------------------------------------- determinism


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(
    tiny_llama: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    """Fault 19."""
    settings = vptq(tiny_text_file)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(tiny_llama, tmp_path / name, settings, seed=seed)
    first, second, other = (digests(tmp_path / name) for name in "abc")
    assert first == second
    assert first["model.safetensors"] != other["model.safetensors"]


def test_the_result_does_not_depend_on_the_order_of_the_matrices(
    tiny_llama: Path, tiny_text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 19: every matrix has a random stream of its own."""
    # Given sizes: an automatic choice hands the last spare bits out in order.
    options = {"vector_length": 2, "centroids": 16, "residual_centroids": 0, "iterations": 2, "sweeps": 0}
    settings = vptq(tiny_text_file, options=options)
    run(tiny_llama, tmp_path / "forward", settings)
    real = CausalModel.targets
    monkeypatch.setattr(CausalModel, "targets", lambda self, i: dict(reversed(real(self, i).items())))
    events: list[Event] = []
    run(tiny_llama, tmp_path / "backward", settings, progress=events.append)
    assert next(e.module for e in events if e.kind == "matrix") == "model.layers.0.mlp.down_proj"
    expected = dict(formats.read_weights(tmp_path / "forward"))
    for module, weight in formats.read_weights(tmp_path / "backward"):
        assert all(torch.equal(t, expected[module].tensors[k]) for k, t in weight.tensors.items()), module


# -------------------------------------------------------------------------------------------------- progress, report


def test_every_matrix_and_block_is_reported_with_bits_error_and_time_left(
    tiny_gpt2: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    """Fault 5 as well: the warning about too few tokens is an event and stands in the report."""
    events: list[Event] = []
    report = run(tiny_gpt2, tmp_path / "out", gptq(tiny_text_file), progress=events.append)
    matrices = [e for e in events if e.kind == "matrix"]
    assert [e.module for e in matrices] == [row.module for row in report.matrices]
    assert all(e.bits and e.bits > 3 and e.error is not None and 0 < e.error < 1 and e.seconds for e in matrices)
    blocks = [e for e in events if e.kind == "block"]
    assert [(e.block, e.blocks) for e in blocks] == [(0, 2), (1, 2)]
    assert blocks[0].eta_seconds is not None and blocks[0].eta_seconds > 0
    assert blocks[1].eta_seconds == 0
    assert [e.message for e in events if e.kind == "note"] == list(report.notes)
    assert any("32 calibration tokens are fewer than the widest layer's 256 inputs" in note for note in report.notes)
    assert report.tokens == 32
    assert sum(report.phases.values()) <= report.seconds
    assert not (tmp_path / "out.work").exists()


def test_a_skipped_layer_keeps_its_weights_and_is_said_to(tiny_llama: Path, tmp_path: Path) -> None:
    """Fault 31 in small: what is left out is copied unchanged and stands in the report."""
    report = run(tiny_llama, tmp_path / "out", skip=["layers.1.mlp", "o_proj"])
    assert any("skipped on request: 5 of 14 linear layers" in note for note in report.notes)
    written, source = CheckpointReader(tmp_path / "out"), CheckpointReader(tiny_llama)
    for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.o_proj.weight"):
        assert torch.equal(written.read(name), source.read(name))
    assert len(formats.check(tmp_path / "out").layouts) == 9
    assert isinstance(octavo.load(tmp_path / "out")[0], nn.Module)


def test_the_report_of_a_resumed_job_covers_the_blocks_before(
    tiny_llama: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    settings = gptq(tiny_text_file)
    whole = run(tiny_llama, tmp_path / "whole", settings)
    with pytest.raises(Interrupted, match="after block 1 of 2"):
        run(tiny_llama, tmp_path / "out", settings, stop=stop_after(1))
    resumed = run(tiny_llama, tmp_path / "out", settings, resume=True)

    def facts(row: Any) -> dict[str, Any]:
        return dataclasses.asdict(row) | {"seconds": 0}

    assert [facts(row) for row in resumed.matrices] == [facts(row) for row in whole.matrices]
    assert resumed.file_bytes == whole.file_bytes
