"""Tuning: the divergence falls, nothing else changes, and a job that was interrupted gives the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import octavo
from conftest import TINY_MODELS
from faults.jobs import RTN, digests, gptq, make_quick, run, stop_after, with_config, with_tensors
from formats.strategies import random_weight
from octavo import algorithms, formats
from octavo._core.errors import FormatError, Interrupted, NumericalError, UsageError
from octavo.evaluation.metrics import evaluate
from octavo.formats.reader import CheckpointReader
from octavo.layout import BlockScale, Layout, Outliers, Transform
from octavo.models.source import resolve
from octavo.pipeline import Event
from octavo.pipeline._original import Original
from octavo.pipeline._student import Student
from octavo.pipeline._tunable import PARTS, TunableLinear, part_of
from octavo.pipeline._tuning import TuneOptions, TuningState, learning_rate, plan_steps
from octavo.pipeline.tune import TuneReport, choose_windows, tune
from octavo.weight import VQWeight

Tiny = Callable[[str], Path]
CPU = torch.device("cpu")
SETTINGS: dict[str, Any] = {"ctx": 32, "samples": 24, "batch_tokens": 160, "steps": 12, "lr": 1e-2, "device": "cpu"}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)


@pytest.fixture(scope="module")
def quantized(tiny_model: Tiny, tiny_text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``quantized(model, method)``: a tiny model quantized badly; made once. Do not write into it."""

    @cache
    def get(name: str = "llama", method: str = "rtn") -> Path:
        out = tmp_path_factory.mktemp("quantized") / f"{name}-{method}"
        settings = RTN | {"bits": 2}
        if method != "rtn":
            settings = gptq(tiny_text_file, samples=8, ctx=64) | {"method": method, "bits": 2.5}
            settings["options"] = {"group_size": 32} if method == "gptq" else {}
        if method == "gptq":
            settings["bits"] = 2
        run(tiny_model(name), out, settings)
        return out

    return get


def tuned(quantized: Path, out: Path, reference: Path, text: Path, **changes: Any) -> TuneReport:
    return tune(quantized, out, reference=reference, calib=str(text), **{**SETTINGS, **changes})


def weights(folder: Path) -> dict[str, VQWeight]:
    return dict(formats.read_weights(folder))


# -------------------------------------------------------------------------------------------------- what it is for


@pytest.mark.parametrize("method", algorithms.names())
def test_the_divergence_falls_and_neither_indices_nor_sizes_change(
    quantized: Callable[..., Path], tiny_llama: Path, tiny_text_file: Path, tmp_path: Path, method: str
) -> None:
    before, out = quantized("llama", method), tmp_path / "out"
    report = tuned(before, out, tiny_llama, tiny_text_file, steps=30)
    assert report.kl_after < 0.9 * report.kl_before
    assert report.best_step > 0
    old, new = weights(before), weights(out)
    assert {name: w.layout for name, w in old.items()} == {name: w.layout for name, w in new.items()}
    changed = 0
    for name, weight in old.items():
        for key, tensor in weight.tensors.items():
            same = torch.equal(tensor, new[name].tensors[key])
            assert same or part_of(key) is not None, f"{name}.{key} may not change"
            changed += not same
    assert changed > len(old) / 2
    assert sum(w.bits() for w in old.values()) == sum(w.bits() for w in new.values())
    sizes = [sum(path.stat().st_size for path in folder.glob("*.safetensors")) for folder in (before, out)]
    assert sizes[0] == sizes[1] == report.file_bytes
    details = formats.check(out).details
    assert details.pop("tuned")["kl_after"] == report.kl_after
    assert details == formats.check(before).details
    assert octavo.__dict__.get("tune", tune) is tune
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_what_is_reported_is_what_the_written_model_measures(
    quantized: Callable[..., Path], tiny_model: Tiny, tiny_text_file: Path, tmp_path: Path, name: str
) -> None:
    """Soft caps, biases, Conv1D, tied heads, bfloat16 norms: loaded by transformers, measured by octavo's metrics."""
    before, out, model = quantized(name), tmp_path / "out", tiny_model(name)
    report = tuned(before, out, model, tiny_text_file, steps=6, held_out=2)
    assert report.kl_after < report.kl_before
    options = TuneOptions(calib=str(tiny_text_file), samples=24, ctx=32)
    held_out = choose_windows(Original(resolve(model)), options).ids[:2]
    models: dict[str, Any] = {
        str(i): AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for i, folder in enumerate((model, before, out))
    }
    for key in ("1", "2"):
        # Without decoding at every call.
        models[key] = models[key].dequantize()
    measured = evaluate(models, held_out, "0")
    assert measured["1"].kl == pytest.approx(report.kl_before, rel=1e-3)
    assert measured["2"].kl == pytest.approx(report.kl_after, rel=1e-3)
    kept, written = CheckpointReader(before), CheckpointReader(out, strict=True)
    assert kept.names() == written.names()
    differing = [n for n in kept.names() if not torch.equal(kept.read(n), written.read(n))]
    assert all(kept.info(n) == written.info(n) for n in differing)
    ends = ("embed_tokens.weight", "lm_head.weight", "wte.weight", "wpe.weight")
    assert not [n for n in differing if n.endswith(ends)]
    assert any("norm" in n or "ln_" in n for n in differing)
    assert models["2"].config.tie_word_embeddings == models["0"].config.tie_word_embeddings


def test_only_the_parts_that_were_asked_for_change(
    quantized: Callable[..., Path], tiny_qwen2: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    before = quantized("qwen2", "vptq")
    reader = CheckpointReader(before)
    modules = formats.check(before).layouts
    for parts in ("norms", "books", "scales,biases"):
        out = tmp_path / parts
        tuned(before, out, tiny_qwen2, tiny_text_file, steps=6, train=parts, lr=1e-2)
        written = CheckpointReader(out)
        changed = {n for n in reader.names() if not torch.equal(reader.read(n), written.read(n))}
        found = {part_of(n.rpartition(".")[2]) if n.rpartition(".")[0] in modules else "norms" for n in changed}
        assert found and found <= set(parts.split(","))


def test_a_tuned_model_can_be_tuned_again(
    quantized: Callable[..., Path], tiny_llama: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    first = tuned(quantized(), tmp_path / "a", tiny_llama, tiny_text_file, steps=4)
    second = tuned(tmp_path / "a", tmp_path / "b", tiny_llama, tiny_text_file, steps=4)
    assert second.kl_before == first.kl_after
    assert formats.check(tmp_path / "b").details["tuned"]["before"]["kl_after"] == first.kl_after


def test_whatever_happens_the_result_is_no_worse(
    quantized: Callable[..., Path], tiny_llama: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    """A learning rate that only destroys: it stops early and writes the start, bit for bit."""
    before = quantized("llama", "vptq")
    report = tuned(before, tmp_path / "out", tiny_llama, tiny_text_file, steps=50, lr=2.0, eval_every=2, patience=2)
    assert (report.steps, report.best_step, report.kl_after) == (4, 0, report.kl_before)
    assert [step for step, _ in report.history] == [0, 2, 4]
    assert any("lower --lr" in note for note in report.notes)
    assert digests(before)["model.safetensors"] == digests(tmp_path / "out")["model.safetensors"]


def test_the_best_state_is_written_not_the_last(
    quantized: Callable[..., Path], tiny_llama: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    report = tuned(quantized(), tmp_path / "out", tiny_llama, tiny_text_file, steps=24, lr=0.3, eval_every=1)
    best = min(report.history, key=lambda entry: entry[1])
    assert (report.best_step, report.kl_after) == best
    assert report.kl_after < report.history[-1][1]
    again = tuned(tmp_path / "out", tmp_path / "again", tiny_llama, tiny_text_file, steps=1)
    assert again.kl_before == report.kl_after


# -------------------------------------------------------------------------------------------------- gradients

LAYOUTS = {
    "everything": Layout(
        shape=(12, 16),
        vector_length=4,
        stages=(3, 2),
        permuted=True,
        channel_norm="input",
        outliers=Outliers(2, 4, 3),
        bias=True,
    ),
    "int8": Layout((8, 16), 2, (3,), direction="row", codebook_dtype="int8", tile=(4, 8), block_scale=BlockScale(4)),
    "int4": Layout((8, 16), 2, (3,), direction="row", codebook_dtype="int4", block_scale=BlockScale(4, 0, 3)),
    "grid": Layout((8, 16), 1, (3,), codebook_dtype="grid", block_scale=BlockScale(4, 3)),
    "signs": Layout((9, 16), 3, (3,), codebook_dtype="bfloat16", side_dtype="bfloat16", sign_bits=True),
    "universal": Layout(
        (8, 16),
        8,
        (8, 8),
        direction="row",
        codebook_dtype="universal",
        codebook="gaussian-v8-k256-256",
        block_scale=BlockScale(16, 0, 8),
        bias=True,
        transform=Transform(16),
    ),
    "rank": Layout((8, 16), 2, (3,), direction="row", codebook_dtype="float16", tile=(2, 8), codebook_rank=2),
    "rank int8": Layout((8, 16), 2, (3,), direction="row", codebook_dtype="int8", tile=(2, 8), codebook_rank=2),
}


def weight_of(name: str) -> VQWeight:
    return random_weight(LAYOUTS[name], scale=0.1)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_forward_pass_sees_exactly_what_will_be_stored(name: str) -> None:
    layer = TunableLinear(weight_of(name), PARTS, name)
    layer.at_start = True
    assert torch.equal(layer.current().dequantize(), weight_of(name).dequantize())
    layer.at_start = False
    with torch.no_grad():
        for key, parameter in layer.named_parameters():
            parameter.add_(0.3 * layer.unit(key) * torch.randn_like(parameter))
    seen, stored = layer.current(), layer.rounded()
    assert stored.layout == LAYOUTS[name]
    assert torch.equal(seen.dequantize(), stored.dequantize())
    assert not torch.equal(seen.dequantize(), weight_of(name).dequantize())
    if seen.bias is not None and stored.bias is not None:
        assert torch.equal(seen.bias, stored.bias.float())
    for key, tensor in weight_of(name).tensors.items():
        assert part_of(key) is not None or torch.equal(tensor, stored.tensors[key])


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_matrix_that_is_decoded_once_gives_the_same_outputs_and_gradients(name: str) -> None:
    layers = [TunableLinear(weight_of(name), PARTS, name) for _ in range(2)]
    layers[1].decode_once = True
    x, found = torch.randn(5, LAYOUTS[name].shape[1]), []
    for layer in layers:
        for at_start in (True, False):
            layer.at_start = at_start
            with torch.no_grad():
                for index, (key, parameter) in enumerate(layer.named_parameters()):
                    noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
                    parameter.add_(0.1 * layer.unit(key) * noise)
            found.append(layer(x))
        found[-1].square().sum().backward()
    torch.testing.assert_close(found[0], found[2], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[1], found[3], rtol=1e-4, atol=1e-6)
    for (_, one), (key, other) in zip(layers[0].named_parameters(), layers[1].named_parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5 * float(one.grad.abs().max()), msg=key)
    assert (layers[1]._decoded is not None) == (name == "universal")


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_gradient_is_that_of_finite_differences(name: str) -> None:
    """KL of a little softmax model on top of a relaxed matrix, in float64, for entries of every kind of tensor."""
    generator = torch.Generator().manual_seed(0)
    layer = TunableLinear(weight_of(name), PARTS, name)
    out, inp = LAYOUTS[name].shape
    x = torch.randn(5, inp, generator=generator, dtype=torch.float64)
    log_p = torch.randn(5, out, generator=generator, dtype=torch.float64).log_softmax(-1)

    def loss() -> Tensor:
        weight = layer.relaxed()
        y = x @ weight.dequantize(torch.float64).T + (weight.bias.double() if weight.bias is not None else 0)
        return (log_p.exp() * (log_p - y.log_softmax(-1))).sum(-1).mean()

    loss().backward()
    checked = 0
    for key, parameter in layer.named_parameters():
        assert parameter.grad is not None, key
        entries = parameter.grad.abs().flatten().topk(min(3, parameter.numel())).indices.tolist()
        # Codes of scales' logarithms have large steps, and scales are rounded to float32.
        width = 2.0**-9 * max(layer.unit(key), 1.0)
        for entry in entries:
            flat = parameter.data.view(-1)
            old, values = float(flat[entry]), []
            for sign in (1, -1):
                flat[entry] = old + sign * width
                values.append((float(flat[entry]), float(loss().detach())))
            flat[entry] = old
            slope = (values[0][1] - values[1][1]) / (values[0][0] - values[1][0])
            assert float(parameter.grad.view(-1)[entry]) == pytest.approx(slope, rel=1e-3, abs=1e-8), (key, entry)
            checked += 1
    assert checked >= 3
    straight = TunableLinear(weight_of(name), PARTS, name)
    weight = straight.current()
    assert all(p.requires_grad for p in straight.parameters())
    weight.dequantize().square().sum().backward()
    assert all(p.grad is not None for k, p in straight.named_parameters() if k != "bias"), (
        "rounding lets gradients through"
    )


def student_of(folder: Path, parts: tuple[str, ...] = PARTS) -> Student:
    return Student(resolve(folder), parts, CPU)


def answers(model: Path, ids: Tensor) -> Tensor:
    return torch.cat(Original(resolve(model)).final_states(ids, CPU, lambda done, total: None))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_a_step_adds_up_the_gradient_of_the_measured_divergence(
    quantized: Callable[..., Path], tiny_model: Tiny, name: str
) -> None:
    """The whole way: chunks of the head, soft caps, recomputed blocks, shared inputs."""
    student, ids = student_of(quantized(name)), torch.arange(3, 67).reshape(2, 32)
    theirs = answers(tiny_model(name), ids)
    for layer in student.layers.values():
        # Rounding has no slope.
        layer.current = layer.relaxed
    loss = student.step(ids, theirs)
    assert loss == pytest.approx(student.measure(ids, lambda i: theirs[i], 1), rel=1e-5)
    generator = torch.Generator().manual_seed(1)
    worst = 0.0
    for key in sorted(student.tuned)[::9]:
        parameter = student.tuned[key]
        direction = torch.randn(parameter.shape, generator=generator) * student.units[key]
        assert parameter.grad is not None
        expected, values = float((parameter.grad * direction).sum()), []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * 3e-3 * direction)
            values.append(student.measure(ids, lambda i: theirs[i], 2))
            with torch.no_grad():
                parameter.sub_(sign * 3e-3 * direction)
        slope = (values[0] - values[1]) / 6e-3
        worst = max(worst, abs(slope - expected) / (abs(expected) + 1e-3))
    assert worst < 0.05


def test_less_memory_gives_the_same_gradient(quantized: Callable[..., Path], tiny_llama: Path) -> None:
    ids, gradients = torch.arange(3, 67).reshape(2, 32), []
    theirs = answers(tiny_llama, ids)
    for share in (0.0, 1.0):
        student = student_of(quantized("llama", "vptq"))
        student.memory_share = share
        student.step(ids, theirs)
        gradients.append({name: p.grad for name, p in student.tuned.items()})
    for name, gradient in gradients[0].items():
        assert gradient is not None and bool(gradient.any())
        assert torch.equal(gradient, gradients[1][name]), name


def test_the_original_answers_as_it_does_in_one_piece(tiny_model: Tiny) -> None:
    ids = torch.arange(3, 67).reshape(2, 32)
    for name in TINY_MODELS:
        model = AutoModelForCausalLM.from_pretrained(tiny_model(name), dtype=torch.float32).eval()
        with torch.no_grad():
            whole = model.get_decoder()(input_ids=ids).last_hidden_state
        assert torch.allclose(answers(tiny_model(name), ids), whole, rtol=1e-4, atol=1e-4), name


# -------------------------------------------------------------------------------------------------- schedule


def test_the_learning_rate_warms_up_and_ends_at_a_tenth() -> None:
    rates = [learning_rate(step, 40, 5) for step in range(40)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[-1] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert learning_rate(3, 5, 5) == learning_rate(3, 4000, 5), "not known yet in the warm-up"
    assert learning_rate(0, 1, 1) == 1.0


def test_steps_are_planned_from_the_time_that_is_left() -> None:
    def plan(step: float, measure: float, spent: float, **options: Any) -> int:
        return plan_steps(TuneOptions(minutes=10, **options), 5, step, measure, spent)

    # 600 s, 60 spent, 20 for the last measurement, 8 others of 20 s: 360 s for steps of 10 s.
    assert plan(10, 20, 60) == 5 + 36
    assert plan(10, 20, 60, eval_every=2) == 5 + 26
    assert plan(10, 20, 60, steps=20) == 20
    assert plan(10, 20, 900) == 5


def test_a_job_is_finished_by_its_last_step_or_for_want_of_improvement() -> None:
    history = [[0, 3.0], [2, 2.0], [4, 2.0], [6, 2.5]]
    state = TuningState(step=6, steps=8, history=history)
    assert state.best == [2, 2.0], "the first of equal ones"
    assert state.finished(2) and not state.finished(3)
    assert TuningState(step=8, steps=8, history=history[:2]).finished(3)
    assert not TuningState(step=8, history=history).finished(1), "there is no plan yet"


def test_a_time_limit_is_kept_and_a_resume_follows_the_plan(
    quantized: Callable[..., Path], tiny_llama: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"steps": None, "minutes": 0.05}
    done: list[int] = []

    def stop_at(step: int) -> Callable[[Event], None]:
        def progress(event: Event) -> None:
            if event.kind == "step" and event.step:
                done.append(event.step)
                if event.step == step:
                    raise KeyboardInterrupt

        return progress

    with pytest.raises(KeyboardInterrupt):
        tuned(quantized(), tmp_path / "out", tiny_llama, tiny_text_file, progress=stop_at(7), **settings)
    work = tmp_path / "out.work"
    planned = json.loads((work / "objects" / (work / "CURRENT").read_text().strip()).read_text())["tuning"]
    assert planned["step"] == 5, "committed as soon as it was decided"
    report = tuned(quantized(), tmp_path / "out", tiny_llama, tiny_text_file, resume=True, patience=3, **settings)
    assert report.steps <= planned["steps"]
    assert report.steps == planned["steps"] or report.history[-1][0] == report.steps
    assert done == list(range(1, 8))


# -------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("method", ["rtn", "vptq"])
def test_stopping_after_any_step_changes_no_byte(
    quantized: Callable[..., Path], tiny_llama: Path, tiny_text_file: Path, tmp_path: Path, method: str
) -> None:
    settings: dict[str, Any] = {"steps": 7, "eval_every": 2, "samples": 11, "batch_tokens": 100}
    before = quantized("llama", method)
    tuned(before, tmp_path / "whole", tiny_llama, tiny_text_file, **settings)
    expected = digests(tmp_path / "whole")
    for step in (1, 2, 3, 6):
        out = tmp_path / f"out{step}"
        with pytest.raises(Interrupted, match=f"stopped after step {step} of 7, which is committed.*--resume"):
            tuned(before, out, tiny_llama, tiny_text_file, stop=stop_after(step), **settings)
        assert not out.exists()
        events: list[Event] = []
        tuned(before, out, tiny_llama, tiny_text_file, resume=True, progress=events.append, **settings)
        assert [e.step for e in events if e.kind == "step"] == list(range(step + 1, 8))
        assert digests(out) == expected
        assert not out.with_name(out.name + ".work").exists()


def test_a_kill_at_any_event_changes_no_byte(
    quantized: Callable[..., Path], tiny_llama: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"steps": 5, "eval_every": 2, "checkpoint_every": 2}
    count: list[Event] = []
    tuned(quantized(), tmp_path / "whole", tiny_llama, tiny_text_file, progress=count.append, **settings)
    expected, resumed_at = digests(tmp_path / "whole"), []
    for number in range(len(count)):
        seen: list[Event] = []

        def press(event: Event, seen: list[Event] = seen, number: int = number) -> None:
            seen.append(event)
            if len(seen) > number:
                raise KeyboardInterrupt

        out = tmp_path / f"out{number}"
        with pytest.raises(KeyboardInterrupt):
            tuned(quantized(), out, tiny_llama, tiny_text_file, progress=press, **settings)
        events: list[Event] = []
        tuned(quantized(), out, tiny_llama, tiny_text_file, resume=True, progress=events.append, **settings)
        resumed_at.append(min((e.step for e in events if e.kind == "step" and e.step is not None), default=None))
        assert digests(out) == expected, number
    assert set(resumed_at) == {0, 3, 5, None}


def test_a_damaged_state_goes_back_to_the_one_before(
    quantized: Callable[..., Path], tiny_llama: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"steps": 6, "eval_every": 3, "checkpoint_every": 1}
    tuned(quantized(), tmp_path / "whole", tiny_llama, tiny_text_file, **settings)
    with pytest.raises(Interrupted):
        tuned(quantized(), tmp_path / "out", tiny_llama, tiny_text_file, stop=stop_after(4), **settings)
    work = tmp_path / "out.work"
    state = json.loads((work / "objects" / (work / "CURRENT").read_text().strip()).read_text())["tuning"]
    (work / "objects" / state["objects"]["current"]).write_bytes(b"")
    events: list[Event] = []
    report = tuned(
        quantized(), tmp_path / "out", tiny_llama, tiny_text_file, resume=True, progress=events.append, **settings
    )
    assert any("going back from tuning step 4 to the state before" in note for note in report.notes)
    assert [e.step for e in events if e.kind == "step"] == [4, 5, 6]
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_resuming_with_other_settings_names_each_of_them(
    quantized: Callable[..., Path], tiny_llama: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        tuned(quantized(), out, tiny_llama, tiny_text_file, stop=stop_after(1))
    with pytest.raises(UsageError, match=r"unfinished job.*--resume.*--force-new"):
        tuned(quantized(), out, tiny_llama, tiny_text_file)
    with pytest.raises(UsageError, match=r"tune.lr: was 0.01, now 0.5; tune.train: was \[.*\], now \['norms'\]\."):
        tuned(quantized(), out, tiny_llama, tiny_text_file, resume=True, lr=0.5, train=("norms",))
    with pytest.raises(UsageError, match=r"quantized: was '\w+', now '\w+'"):
        tuned(quantized("llama", "gptq"), out, tiny_llama, tiny_text_file, resume=True)
    with pytest.raises(UsageError, match=r"calibration.samples: was 24, now 20; calibration.tokens"):
        tuned(quantized(), out, tiny_llama, tiny_text_file, resume=True, samples=20)
    report = tuned(quantized(), out, tiny_llama, tiny_text_file, force_new=True)
    assert report.notes[0] == "set the unfinished job aside as out.work.1"


# -------------------------------------------------------------------------------------------------- as a last stage


def test_quantize_and_tune_in_one_job(tiny_llama: Path, tiny_text_file: Path, tmp_path: Path) -> None:
    """The same weights as in two jobs, whenever it is interrupted, and nothing else is left."""
    options = {**SETTINGS, "steps": 3, "calib": str(tiny_text_file)}
    settings = RTN | {"bits": 2}
    run(tiny_llama, tmp_path / "q", settings)
    tune(tmp_path / "q", tmp_path / "two", reference=tiny_llama, **options)
    report = run(tiny_llama, tmp_path / "one", settings, tune=options)
    assert report.tuned is not None and report.tuned["kl_after"] < report.tuned["kl_before"]
    expected = digests(tmp_path / "one")
    assert expected == digests(tmp_path / "two")
    assert report.file_bytes == sum(path.stat().st_size for path in (tmp_path / "one").glob("*.safetensors"))
    for steps in (1, 2, 3):
        out = tmp_path / f"out{steps}"
        with pytest.raises(Interrupted, match="--resume"):
            run(tiny_llama, out, settings, tune=options, stop=stop_after(steps))
        assert not out.exists()
        run(tiny_llama, out, settings, tune=options, resume=True)
        assert digests(out) == expected
    assert not list(tmp_path.glob("*.work"))


def test_a_tuning_that_cannot_work_is_refused_before_the_quantization(
    tiny_llama: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    for options, message in (
        ({"sample": 3}, "unknown option 'sample'. Did you mean 'samples'?"),
        ({"samples": 2, "held_out": 2}, "none is left to train on"),
        ({"device": "quantum:0"}, "device 'quantum:0' cannot be used"),
        ({"calib": "nowhere.txt"}, "nowhere.txt does not exist"),
    ):
        with pytest.raises(UsageError, match=message):
            run(tiny_llama, tmp_path / "out", tune={"calib": str(tiny_text_file), "ctx": 32} | options)
        assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------------- bad input


def test_bad_input_is_refused_before_anything_is_written(
    quantized: Callable[..., Path], tiny_model: Tiny, tiny_llama: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    out, good = tmp_path / "work" / "out", quantized()
    out.parent.mkdir()

    def refused(error: type[Exception], message: str, *folders: Path, **changes: Any) -> None:
        given, reference = folders
        with pytest.raises(error, match=message):
            tuned(given, changes.pop("out", out), reference, tiny_text_file, **changes)
        assert list(out.parent.iterdir()) == []

    def other_values(tensors: dict[str, Tensor]) -> None:
        tensors["model.embed_tokens.weight"][0, 0] += 1

    refused(UsageError, "is no folder; tuning wants one", tmp_path / "nowhere", tiny_llama)
    refused(UsageError, "holds no quantized model", tiny_llama, tiny_llama)
    refused(UsageError, r"is quantized already \(octavo\)\. Pass the original", good, good)
    refused(UsageError, "is not the original of llama-rtn: it is a mistral", good, tiny_model("mistral"))
    wide = with_config(tiny_llama, tmp_path / "wide", intermediate_size=256)
    refused(FormatError, "has shape|do not fit", good, wide)
    other = with_tensors(tiny_llama, tmp_path / "other", other_values)
    refused(UsageError, "is not the original of llama-rtn: its .*embed_tokens.weight has other values", good, other)
    refused(UsageError, "samples above 24", good, tiny_llama, held_out=24)
    refused(UsageError, r"too little text.*--samples at most \d+", good, tiny_llama, samples=5000)
    refused(UsageError, "unknown option 'learning_rate'", good, tiny_llama, learning_rate=1)
    refused(
        UsageError, "train wanted some of books, scales, biases, norms, got indices", good, tiny_llama, train="indices"
    )
    refused(UsageError, "has nothing of books to train", good, tiny_llama, train="books")
    for name, value in (("lr", 0.0), ("lr", float("nan")), ("steps", 0), ("minutes", -1.0), ("patience", 1.5)):
        refused(UsageError, f"{name} wanted", good, tiny_llama, **{name: value})
    refused(UsageError, "lies inside of", good, tiny_llama, out=good / "tuned")
    refused(UsageError, "does not exist; create it first", good, tiny_llama, out=tmp_path / "no" / "out")
    (tmp_path / "there").mkdir()
    refused(UsageError, "exists already. Octavo never overwrites", good, tiny_llama, out=tmp_path / "there")


def test_a_damaged_folder_is_refused(
    quantized: Callable[..., Path], tiny_llama: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    import shutil

    broken = Path(shutil.copytree(quantized(), tmp_path / "broken"))
    data = bytearray((broken / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (broken / "model.safetensors").write_bytes(data)
    with pytest.raises(FormatError, match="was changed or damaged"):
        tuned(broken, tmp_path / "out", tiny_llama, tiny_text_file)


def test_numbers_that_blow_up_end_the_job_and_say_what_to_do(
    quantized: Callable[..., Path], tiny_llama: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(NumericalError, match=r"step \d+: .*lower --lr"):
        tuned(quantized(), tmp_path / "out", tiny_llama, tiny_text_file, lr=1e20, eval_every=12)
    assert not (tmp_path / "out").exists()
