"""JLCM on models: neurons change places without a trace, codes learn, a resume gives the same bytes, 2 GB hold a 7B."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from conftest import TINY_MODELS
from faults.jobs import digests, make_quick, run, stop_after
from octavo import algorithms
from octavo._core.errors import Interrupted, UsageError
from octavo.calibration import capture
from octavo.calibration.data import read_text, windows
from octavo.cli import main
from octavo.formats.reader import CheckpointReader
from octavo.models.adapter import CausalModel
from octavo.models.neurons import Neurons, find_neurons
from octavo.models.source import resolve
from octavo.pipeline import plan, reorder
from octavo.pipeline.reorder import load_reordered

Tiny = Callable[[str], Path]
TUNE = {"steps": 24, "code_lr": 0.05}

pytestmark = pytest.mark.filterwarnings("ignore::octavo._core.clib.SlowPathWarning")


def settings(text: Path, **options: Any) -> dict[str, Any]:
    """A job on 24 windows of 32 tokens, tuned in steps of 128 tokens."""
    given = {"method": "jlcm", "bits": 2.3, "calib": text, "samples": 24, "ctx": 32, "options": {**TUNE, **options}}
    learns = options.get("learn", "joint") != "none"
    return given | ({"tune_blocks": {"batch_tokens": 128, "held_out": 4}} if learns else {})


def inputs_of(causal: CausalModel) -> tuple[list[Tensor], list[Any]]:
    """What the first block of a model is called with, for two windows of 16 tokens."""
    inputs = causal.capture_inputs([(torch.arange(32).view(2, 16), None)])
    return inputs.hidden, [arguments[0] for arguments in inputs.kwargs]


def closeness(got: Tensor, wanted: Tensor, start: Tensor) -> float:
    """Distance of two outputs of a block, relative to what it adds to its inputs."""
    return float((got - wanted).norm() / (wanted - start).norm())


# ---------------------------------------------------------------- neurons in another order


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_block_computes_the_same_with_its_neurons_in_another_order(tiny_model: Tiny, name: str) -> None:
    """Gated MLPs, GPT-2's with Conv1D and biases, value heads that two query heads share."""
    causal, notes = CausalModel(resolve(tiny_model(name))), []
    hidden, kwargs = inputs_of(causal)
    (wanted,) = capture.forward(causal.load_block(0), hidden, kwargs)
    causal.release_block(0)
    before = {module: causal.weight(module) for module in causal.targets(0)}
    block = load_reordered(causal, 0, algorithms.get("jlcm")(), hidden, kwargs, notes.append)
    (got,) = capture.forward(block, hidden, kwargs)
    assert closeness(got, wanted, hidden[0]) < 1e-5
    assert notes == []
    found = find_neurons(causal.targets(0), causal.config.get_text_config())
    # Phi-3 stores gate and up, and q, k and v, as one matrix each; GPT-2 the latter.
    assert len(found) == {"phi3": 0, "gpt2": 1}.get(name, 2)
    for neurons in found:
        for maker in neurons.makers:
            moved = causal.weight(maker)
            assert not torch.equal(moved, before[maker])
            torch.testing.assert_close(moved.sort(dim=0).values, before[maker].sort(dim=0).values, rtol=0, atol=0)
        assert not torch.equal(causal.weight(neurons.reader), before[neurons.reader])
    causal.release_block(0)
    assert all(torch.equal(causal.weight(module), matrix) for module, matrix in before.items())


def test_quantized_neurons_may_go_back_to_their_places(tiny_llama: Path) -> None:
    """What the reordered matrices decode to is, in the old order, a block with the same output."""
    causal = CausalModel(resolve(tiny_llama))
    hidden, kwargs = inputs_of(causal)
    method = algorithms.get("jlcm")(bits=2.3, groups=4)
    orders = {name: [torch.arange(n) for n in target.shape] for name, target in causal.targets(0).items()}
    for neurons in find_neurons(causal.targets(0), causal.config):
        order = reorder._order(causal, method, neurons)
        assert order is not None
        for name in neurons.makers:
            orders[name][0] = order
        orders[neurons.reader][1] = neurons.inputs(order)
    block = load_reordered(causal, 0, method, hidden, kwargs, pytest.fail)
    decoded = {name: method.quantize(causal.weight(name)).dequantize() for name in orders}
    for name, matrix in decoded.items():
        causal.set_weight(block, name, matrix)
    (folded,) = capture.forward(block, hidden, kwargs)
    causal.release_block(0)
    plain = causal.load_block(0)
    for name, matrix in decoded.items():
        rows, columns = (order.argsort() for order in orders[name])
        causal.set_weight(plain, name, matrix[rows][:, columns])
        torch.testing.assert_close(matrix[rows][:, columns], causal.weight(name), atol=0.3, rtol=0)
    (unfolded,) = capture.forward(plain, hidden, kwargs)
    assert closeness(folded, unfolded, hidden[0]) < 1e-5


def test_heads_keep_their_channels_and_readers_follow() -> None:
    neurons = Neurons(("v",), "o", heads=2, repeats=2)
    outputs = torch.tensor([2, 0, 1, 3, 5, 4])
    assert neurons.inputs(outputs).tolist() == [2, 0, 1, 5, 3, 4, 6, 8, 7, 9, 11, 10]
    values, mixing = torch.randn(6, 5), torch.randn(3, 12)

    def attention(v: Tensor, o: Tensor) -> Tensor:
        return o @ v.view(2, 3, 5).repeat_interleave(2, dim=0).reshape(12, 5)

    moved = attention(values[outputs], mixing[:, neurons.inputs(outputs)])
    torch.testing.assert_close(moved, attention(values, mixing))


def test_where_the_output_would_change_the_order_stays(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of q are bound by rotary embeddings to those of k."""
    causal = CausalModel(resolve(tiny_llama))
    q, o = (f"{causal.blocks[0]}.self_attn.{name}_proj" for name in "qo")
    monkeypatch.setattr(reorder, "find_neurons", lambda *_: [Neurons((q,), o)])
    hidden, kwargs = inputs_of(causal)
    before, notes = causal.weight(q), []
    block = load_reordered(causal, 0, algorithms.get("jlcm")(), hidden, kwargs, notes.append)
    assert notes == [
        "model.layers.0: its neurons keep their order, since the block would compute something else in another"
    ]
    assert torch.equal(causal.weight(q), before)
    assert torch.equal(block.get_parameter("self_attn.q_proj.weight"), before)


def test_matrices_that_stay_as_they_are_keep_the_order_of_their_neighbours(tiny_llama: Path) -> None:
    causal = CausalModel(resolve(tiny_llama), skip=("down_proj", "o_proj"))
    assert find_neurons(causal.targets(0), causal.config) == []


# ---------------------------------------------------------------- the whole method


def test_codes_learn_and_every_part_can_be_switched_off(tiny_llama: Path, tiny_text_file: Path, tmp_path: Path) -> None:
    variants = {
        "none": {"learn": "none"},
        "books": {"learn": "books"},
        "joint": {},
        "ste": {"rule": "ste"},
        "ungrouped": {"learn": "none", "groups": 1, "reorder": False},
    }
    reports = {name: run(tiny_llama, tmp_path / name, settings(tiny_text_file, **v)) for name, v in variants.items()}
    assert reports["none"].block_tuned is None
    for report in reports.values():
        assert report.bits_per_weight <= 2.3
    first = {name: report.block_tuned[0] for name, report in reports.items() if report.block_tuned}
    assert len({row.loss_before for row in first.values()}) == 1
    assert first["books"].moved == 0 < first["joint"].moved < 0.5
    assert first["joint"].loss_after < first["books"].loss_after < first["books"].loss_before
    assert first["joint"].loss_after < first["ste"].loss_after
    old, new, books = (CheckpointReader(tmp_path / name, strict=True) for name in ("none", "joint", "books"))
    name = "model.layers.0.mlp.up_proj.indices"
    assert torch.equal(old.read(name), books.read(name))
    assert not torch.equal(old.read(name), new.read(name))
    details = json.loads((tmp_path / "joint" / "config.json").read_text())["quantization_config"]["details"]
    tuned = details["tuned_blocks"]
    assert (tuned["rule"], tuned["code_lr"], tuned["train"]) == (
        "proximal",
        0.05,
        ["books", "scales", "norms", "codes"],
    )


def test_the_reported_losses_are_those_of_the_written_model(
    tiny_llama: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    """With vectors of two, so that codewords are no scalars; neurons are in their new order in the file alone."""
    report = run(tiny_llama, tmp_path / "out", settings(tiny_text_file, vector_length=2))
    causal, text = CausalModel(resolve(tiny_llama)), read_text(str(tiny_text_file))
    tokens = windows(causal.tokenizer(), text, 32, 24, 0, limit=causal.max_positions, source="text").ids
    seen: list[Tensor] = []
    for folder in (tiny_llama, tmp_path / "out"):
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        model.model.layers[0].register_forward_hook(lambda module, args, output: seen.append(output))
        with torch.no_grad():
            model(tokens)
    target, output = seen
    loss = (output - target)[:4].square().mean() / target.var(correction=0)
    assert report.block_tuned is not None
    assert report.block_tuned[0].moved > 0
    assert report.block_tuned[0].loss_after == pytest.approx(float(loss), rel=2e-3)


@pytest.mark.parametrize("method", ["gptq", "gptvq"])
def test_codes_of_other_methods_learn_on_request(
    tiny_llama: Path, tiny_text_file: Path, tmp_path: Path, method: str
) -> None:
    given = settings(tiny_text_file) | {"method": method, "bits": 3, "options": {}}
    given["tune_blocks"] |= {"steps": 24, "train": "codes,scales,books", "code_lr": 0.05}
    report = run(tiny_llama, tmp_path / "out", given)
    assert report.block_tuned is not None
    assert all(row.loss_after < row.loss_before and row.moved > 0 for row in report.block_tuned)


def test_stopping_after_any_block_changes_no_byte(tiny_gemma3: Path, tiny_text_file: Path, tmp_path: Path) -> None:
    make = settings(tiny_text_file, steps=6)
    whole = run(tiny_gemma3, tmp_path / "whole", make)
    for blocks in (1, 2):
        out = tmp_path / f"out{blocks}"
        with pytest.raises(Interrupted):
            run(tiny_gemma3, out, make, stop=stop_after(blocks))
        report = run(tiny_gemma3, out, make, resume=True)
        assert digests(out) == digests(tmp_path / "whole")
        assert report.block_tuned == whole.block_tuned


def test_a_resume_with_another_rule_is_refused(
    tiny_llama: Path, tiny_text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_quick(monkeypatch)
    with pytest.raises(Interrupted):
        run(tiny_llama, tmp_path / "out", settings(tiny_text_file, steps=1), stop=stop_after(1))
    with pytest.raises(UsageError, match=r"tune_blocks\.rule: was 'proximal', now 'ste'"):
        run(tiny_llama, tmp_path / "out", settings(tiny_text_file, steps=1, rule="ste"), resume=True)


def test_codes_of_several_stages_are_refused_before_work_starts(
    tiny_llama: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    given = settings(tiny_text_file) | {
        "method": "universal",
        "bits": 2,
        "options": {"codebook": "gaussian-v4-k256-signs"},
    }
    given["tune_blocks"] |= {"train": "codes,scales"}
    with pytest.raises(UsageError, match="one stage without signs"):
        run(tiny_llama, tmp_path / "out", given)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- sizes


def make_llama_7b(folder: Path) -> Path:
    """A checkpoint in the shapes of Llama-2-7B whose 13.5 GB are a hole in the file: only the header is there."""
    LlamaConfig().save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig())
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in model.state_dict().items():
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [end, end + 2 * tensor.numel()]}
        end += 2 * tensor.numel()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return folder


def test_two_gigabytes_hold_a_llama_of_seven_billion_weights(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_quick(monkeypatch)
    folder = make_llama_7b(tmp_path / "llama-2-7b-shaped")
    made = plan(folder, method="jlcm", size=2_000_000_000, head_bits=4)
    assert made.source_bytes == 2 * 6_738_415_616
    assert made.file_bytes < 2_000_000_000
    blocks = [m for m in made.matrices if m.block < 32]
    bits = sum(m.bits for m in blocks) / sum(m.layout.weights for m in blocks)
    assert 2.25 < bits < 2.35
    assert {m.layout.stages for m in blocks} == {(2,), (3,)}
    assert main(["plan", str(folder), "--method", "jlcm", "--size", "2GB", "--head-bits", "4"]) == 0
    assert "jlcm" in capsys.readouterr().out
