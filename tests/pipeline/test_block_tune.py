"""Tuning blocks: their output comes closer to the original's, nothing else changes, a resume gives the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from conftest import TINY_MODELS
from faults.jobs import RTN, digests, gptq, make_quick, run, stop_after, vptq
from octavo import algorithms
from octavo._core.errors import Interrupted, NumericalError, UsageError
from octavo.calibration.data import Tokens, read_text, windows
from octavo.cli import main
from octavo.formats.reader import CheckpointReader
from octavo.layout import Layout
from octavo.models.adapter import CausalModel
from octavo.models.source import resolve
from octavo.pipeline import Event, Report
from octavo.pipeline._tunable import part_of
from octavo.pipeline.block_tune import BlockTuneOptions, _Windows, split_windows

Tiny = Callable[[str], Path]
SAMPLES, CTX = 24, 32
TUNE: dict[str, Any] = {"batch_tokens": 128, "steps": 24, "lr": 1e-2, "held_out": 4, "target": "original"}

pytestmark = pytest.mark.filterwarnings("ignore::octavo._core.clib.SlowPathWarning")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)


def settings(method: str, text: Path) -> dict[str, Any]:
    """A job at about 2 bits."""
    given = {"rtn": RTN | {"calib": text}, "gptq": gptq(text), "vptq": vptq(text)}.get(method, vptq(text))
    own = {"gptvq": {}, "universal": {"sweeps": 0, "beam": 4}, "jlcm": {"learn": "none"}}
    options = own.get(method, given["options"])
    bits = 2 if method in ("rtn", "gptq") else 2.5
    return given | {"method": method, "bits": bits, "options": options, "samples": SAMPLES, "ctx": CTX}


@pytest.fixture(scope="module")
def plain(tiny_model: Tiny, tiny_text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """``plain(model, method)``: folder and report of a model quantized without tuning; made once."""

    @cache
    def get(method: str, name: str = "llama") -> tuple[Path, Report]:
        out = tmp_path_factory.mktemp("plain") / f"{name}-{method}"
        return out, run(tiny_model(name), out, settings(method, tiny_text_file))

    return get


def text_of(model: Path, text: Path) -> Tokens:
    """The windows that the jobs of this file calibrate on."""
    causal = CausalModel(resolve(model))
    tokenizer = causal.tokenizer()
    return windows(tokenizer, read_text(str(text)), CTX, SAMPLES, 0, limit=causal.max_positions, source=str(text))


def tensors(folder: Path) -> dict[str, Tensor]:
    reader = CheckpointReader(folder, strict=True)
    return {name: reader.read(name) for name in reader.names()}


def details(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]["details"]


def block_outputs(folder: Path, ids: Tensor) -> list[Tensor]:
    """What leaves each block of a model that transformers loads and runs as a whole; last, its logits."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    found: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    for block in blocks:
        block.register_forward_hook(keep)
    with torch.no_grad():
        logits = model(ids).logits
    return [*found, logits]


# -------------------------------------------------------------------------------------------------- what it is for


@pytest.mark.parametrize("method", algorithms.names())
def test_the_error_of_blocks_and_model_falls_and_neither_indices_nor_sizes_change(
    plain: Callable[..., Any], tiny_llama: Path, tiny_text_file: Path, tmp_path: Path, method: str
) -> None:
    without, before = plain(method)
    out = tmp_path / "out"
    after = run(tiny_llama, out, settings(method, tiny_text_file), tune_blocks=TUNE)
    assert before.block_tuned is None
    assert after.block_tuned is not None
    assert [row.block for row in after.block_tuned] == ["model.layers.0", "model.layers.1"]
    for row in after.block_tuned:
        assert row.loss_after < 0.97 * row.loss_before
        assert 0 < row.best_step <= row.steps == 24
    ids = text_of(tiny_llama, tiny_text_file).ids
    original, untuned, tuned = (block_outputs(folder, ids) for folder in (tiny_llama, without, out))
    for theirs, old, new in zip(original, untuned, tuned, strict=True):
        assert (new - theirs).square().mean() < 0.97 * (old - theirs).square().mean()

    old, new = tensors(without), tensors(out)
    assert list(old) == list(new)
    first = [name for name in old if ".layers.0." in name]
    assert any(name.endswith(".indices") for name in first)
    for name in first:
        is_norm, part = "layernorm" in name, part_of(name.rpartition(".")[2])
        changed = not torch.equal(old[name], new[name])
        # Codebooks of integers may round to what they were; no other trained tensor stays exactly the same.
        assert not changed or is_norm or part in ("books", "scales"), name
        assert changed or not (is_norm or name.endswith(".block_scale")), name
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(old[name], new[name])
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (without, out)]
    assert sizes[0] == sizes[1] == after.file_bytes
    assert after.bits_per_weight == before.bits_per_weight

    recorded = details(out)
    assert recorded.pop("tuned_blocks") == {
        **{"batch_tokens": 128, "steps": 24, "lr": 1e-2, "held_out": 4, "blocks": 2, "target": "original"},
        "train": ["books", "scales", "norms"],
        "loss_before": pytest.approx(sum(row.loss_before for row in after.block_tuned) / 2),
        "loss_after": pytest.approx(sum(row.loss_after for row in after.block_tuned) / 2),
    }
    if method != "rtn":
        assert recorded == details(without)
    json.dumps(after.to_dict(), allow_nan=False)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_what_is_reported_is_what_the_written_model_measures(
    tiny_model: Tiny, tiny_text_file: Path, tmp_path: Path, name: str
) -> None:
    """Against the original model's own hidden states, block after block; Conv1D, biases, bfloat16 norms, windows."""
    model, out = tiny_model(name), tmp_path / "out"
    report = run(model, out, settings("rtn", tiny_text_file), tune_blocks=TUNE | {"steps": 6})
    ids = text_of(model, tiny_text_file).ids
    theirs, ours = (block_outputs(folder, ids)[:-1] for folder in (model, out))
    assert report.block_tuned is not None
    assert len(report.block_tuned) == len(theirs)
    for row, target, output in zip(report.block_tuned, theirs, ours, strict=True):
        error = (output - target)[:4].square().mean() / target.var(correction=0)
        assert row.loss_after == pytest.approx(float(error), rel=2e-3)
        assert row.loss_after < row.loss_before


def test_the_target_may_be_the_original_block_on_the_same_inputs(
    plain: Callable[..., Any], tiny_llama: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    """The first block has the same task under both targets, the second an easier one."""
    reports = {}
    for target in ("input", "original"):
        given = TUNE | {"target": target}
        reports[target] = run(tiny_llama, tmp_path / target, settings("vptq", tiny_text_file), tune_blocks=given)
    rows = {target: list(report.block_tuned or ()) for target, report in reports.items()}
    assert rows["input"][0] == rows["original"][0]
    assert rows["input"][1].loss_before < 0.9 * rows["original"][1].loss_before
    assert rows["input"][1].loss_after < rows["input"][1].loss_before
    old, new = (details(tmp_path / target)["tuned_blocks"]["target"] for target in ("input", "original"))
    assert (old, new) == ("input", "original")


def test_the_reported_proxy_error_is_that_of_the_tuned_matrix(
    plain: Callable[..., Any], tiny_llama: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    """The plain error of the first block's matrices is a minimum that tuning for the block's output leaves."""
    before = plain("vptq")[1]
    after = run(tiny_llama, tmp_path / "out", settings("vptq", tiny_text_file), tune_blocks=TUNE)
    alone = run(tiny_llama, tmp_path / "alone", settings("vptq", tiny_text_file), tune_blocks=TUNE | {"train": "norms"})
    assert all(row.error is not None for row in after.matrices)
    assert [row.error for row in alone.matrices[:7]] == [row.error for row in before.matrices[:7]]
    assert all(new.error != old.error for new, old in zip(after.matrices[:7], before.matrices[:7], strict=True))


def test_the_defaults_need_no_options(tiny_llama: Path, tiny_text_file: Path, tmp_path: Path) -> None:
    report = run(tiny_llama, tmp_path / "out", settings("rtn", tiny_text_file), tune_blocks={})
    assert all(row.loss_after < 0.9 * row.loss_before for row in report.block_tuned or ())
    # 21 windows to train on make one batch, so that four passes would be four steps.
    assert [row.steps for row in report.block_tuned or ()] == [48, 48]
    assert details(tmp_path / "out")["tuned_blocks"]["target"] == BlockTuneOptions().target == "input"


def test_norms_alone_can_be_tuned(
    plain: Callable[..., Any], tiny_llama: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report = run(tiny_llama, out, settings("vptq", tiny_text_file), tune_blocks=TUNE | {"train": ("norms",)})
    assert all(row.loss_after < row.loss_before for row in report.block_tuned or ())
    old, new = tensors(plain("vptq")[0]), tensors(out)
    changed = [name for name in old if ".layers.0." in name and not torch.equal(old[name], new[name])]
    assert changed == [f"model.layers.0.{name}_layernorm.weight" for name in ("input", "post_attention")]


def test_biases_are_trained_on_request_and_norms_keep_their_dtype(
    plain: Callable[..., Any], tiny_qwen2: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    """The norms of this model are stored in bfloat16, its biases with the matrices."""
    out = tmp_path / "out"
    run(tiny_qwen2, out, settings("rtn", tiny_text_file), tune_blocks=TUNE | {"train": ["biases", "norms"]})
    old, new = tensors(plain("rtn", "qwen2")[0]), tensors(out)
    assert {name: t.dtype for name, t in old.items()} == {name: t.dtype for name, t in new.items()}
    changed = {name.rpartition("layers.0.")[2] for name in old if not torch.equal(old[name], new[name])}
    assert {"self_attn.q_proj.bias", "self_attn.v_proj.bias", "input_layernorm.weight"} <= changed
    assert not any(name.endswith("scale") for name in changed)


def test_a_method_without_statistics_reads_the_text_and_stays_without(
    plain: Callable[..., Any], tiny_llama: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    before = plain("rtn")[1]
    after = run(tiny_llama, tmp_path / "out", settings("rtn", tiny_text_file), tune_blocks=TUNE | {"steps": 2})
    assert (before.tokens, after.tokens) == (0, SAMPLES * CTX)
    assert {row.error for row in after.matrices} == {None}


def test_where_no_step_helps_the_file_is_that_without_tuning(
    plain: Callable[..., Any], tiny_llama: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report = run(tiny_llama, out, settings("vptq", tiny_text_file), tune_blocks=TUNE | {"steps": 3, "lr": 3.0})
    assert [(row.best_step, row.loss_after) for row in report.block_tuned or ()] == [
        (0, row.loss_before) for row in report.block_tuned or ()
    ]
    assert (out / "model.safetensors").read_bytes() == (plain("vptq")[0] / "model.safetensors").read_bytes()
    assert [row.error for row in report.matrices] == [row.error for row in plain("vptq")[1].matrices]


def test_the_caller_may_have_switched_gradients_off(tiny_llama: Path, tiny_text_file: Path, tmp_path: Path) -> None:
    with torch.no_grad():
        run(tiny_llama, tmp_path / "off", settings("rtn", tiny_text_file), tune_blocks=TUNE | {"steps": 3})
    run(tiny_llama, tmp_path / "on", settings("rtn", tiny_text_file), tune_blocks=TUNE | {"steps": 3})
    assert digests(tmp_path / "on") == digests(tmp_path / "off")


# -------------------------------------------------------------------------------------------------- interruption


@pytest.mark.parametrize("target", ["original", "input"])
@pytest.mark.parametrize("method", ["vptq", "rtn"])
def test_stopping_after_any_block_changes_no_byte(
    tiny_gemma3: Path, tiny_text_file: Path, tmp_path: Path, method: str, target: str
) -> None:
    given = settings(method, tiny_text_file) | {"tune_blocks": TUNE | {"steps": 4, "target": target}}
    whole = run(tiny_gemma3, tmp_path / "whole", given)
    for blocks in (1, 2):
        out = tmp_path / f"out{blocks}"
        with pytest.raises(Interrupted, match=f"stopped after block {blocks} of 3"):
            run(tiny_gemma3, out, given, stop=stop_after(blocks))
        events: list[Event] = []
        report = run(tiny_gemma3, out, given, resume=True, progress=events.append)
        assert digests(out) == digests(tmp_path / "whole")
        assert report.block_tuned == whole.block_tuned
        assert [row.error for row in report.matrices] == [row.error for row in whole.matrices]
        done = [event for event in events if event.kind == "block"]
        assert [event.block for event in done] == list(range(blocks, 3))
        rows = (whole.block_tuned or ())[blocks:]
        assert [(e.loss_before, e.loss_after) for e in done] == [(row.loss_before, row.loss_after) for row in rows]


def test_a_resume_with_other_options_is_refused(tiny_llama: Path, tiny_text_file: Path, tmp_path: Path) -> None:
    given = settings("rtn", tiny_text_file)
    with pytest.raises(Interrupted):
        run(tiny_llama, tmp_path / "out", given, tune_blocks=TUNE | {"steps": 2}, stop=stop_after(1))
    with pytest.raises(UsageError, match=r"tune_blocks\.lr: was 0\.01, now 0\.02; tune_blocks\.steps: was 2, now 3"):
        run(tiny_llama, tmp_path / "out", given, tune_blocks=TUNE | {"steps": 3, "lr": 0.02}, resume=True)
    with pytest.raises(UsageError, match=r"tune_blocks\.lr: was 0\.01, now None"):
        run(tiny_llama, tmp_path / "out", given, resume=True)


# -------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"step": 3}, "unknown option 'step'. Did you mean 'steps'?"),
        ({"steps": 0}, "steps wanted a whole number >= 1, got 0"),
        ({"batch_tokens": None}, "batch_tokens wanted a whole number >= 1, got None"),
        ({"held_out": 1.5}, "held_out wanted a whole number >= 1, got 1.5"),
        ({"lr": 0}, "lr wanted a number > 0, got 0"),
        ({"lr": float("nan")}, "lr wanted a number > 0, got nan"),
        ({"target": "output"}, "target wanted 'original' or 'input', got 'output'"),
        ({"train": "indices"}, "train wanted some of books, scales, biases, norms, codes, got indices"),
        ({"train": "books"}, "store no books; they and the blocks have norms, scales"),
        ({"train": "codes"}, "codes are trained beside numbers; add books, scales or norms to train"),
        ({"code_lr": 0}, "code_lr wanted a number > 0, got 0"),
        ({"rule": "adam"}, "rule wanted one of proximal, ste, got 'adam'"),
        ({"neighbours": 0}, "neighbours wanted a whole number >= 1, got 0"),
        ({"held_out": SAMPLES}, "24 of 24 calibration window(s) would be held out"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused_before_anything_is_made(
    tiny_llama: Path, tiny_text_file: Path, tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        run(tiny_llama, tmp_path / "out", settings("gptq", tiny_text_file), tune_blocks=given)
    assert message in str(caught.value)
    assert "tune_blocks" in str(caught.value) or "train" in given
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_leave_their_range_stop_the_job_at_the_block(
    tiny_llama: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    given = settings("rtn", tiny_text_file)
    with pytest.raises(NumericalError, match=r"^model\.layers\.0: tuning step \d+: .*Use a lower lr"):
        run(tiny_llama, tmp_path / "out", given, tune_blocks=TUNE | {"lr": 1e30})


def test_a_gradient_that_is_no_number_is_named(
    tiny_llama: Path, tiny_text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = _Windows.error

    def poisoned(self: _Windows, block: Any, group: int) -> tuple[Tensor, int]:
        error, count = real(self, block, group)
        if error.requires_grad:
            error.register_hook(lambda gradient: gradient * float("nan"))
        return error, count

    monkeypatch.setattr(_Windows, "error", poisoned)
    wanted = r"model\.layers\.0: tuning step 1: the gradient of model\.layers\.0\..* holds NaN"
    with pytest.raises(NumericalError, match=wanted):
        run(tiny_llama, tmp_path / "out", settings("rtn", tiny_text_file), tune_blocks=TUNE)


# -------------------------------------------------------------------------------------------------- parts


def test_windows_are_split_as_the_options_say() -> None:
    tokens = torch.zeros(17, 100, dtype=torch.int64)
    held_out, rest, at_once = split_windows(tokens, BlockTuneOptions())
    assert (held_out.tolist(), rest.tolist(), at_once) == ([0, 1], list(range(2, 17)), 10)
    held_out, rest, at_once = split_windows(tokens, BlockTuneOptions(held_out=16, batch_tokens=50))
    assert (len(held_out), rest.tolist(), at_once) == (16, [16], 1)


def test_padding_counts_neither_in_the_error_nor_in_the_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, targets = torch.rand(3, 5, 4, generator=generator), torch.rand(3, 5, 4, generator=generator)
    mask = torch.tensor([[0, 1, 1, 1, 1], [0, 0, 0, 1, 1]])
    targets[0, 0] = targets[2, :3] = float("nan")
    group = torch.tensor([0, 2])
    data = _Windows([hidden[:2], hidden[2:]], [targets], [group], [{}], [mask])
    keep = mask.bool()

    def same(states: Tensor, arguments: dict[str, Any]) -> Tensor:
        return states

    block: Any = same
    error, count = data.error(block, 0)
    assert count == 6
    assert float(error) == pytest.approx(float((hidden - targets)[group][keep].square().mean(-1).sum()))
    assert data.variance() == pytest.approx(float(targets[group][keep].var(correction=0)))


def test_a_layout_without_the_parts_is_known_beforehand() -> None:
    grid = Layout((8, 8), 1, (4,), codebook_dtype="grid")
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    with pytest.raises(UsageError, match="no books and no biases"):
        BlockTuneOptions(train=("books", "biases")).check([grid], tokens)
    BlockTuneOptions(train=("norms",)).check([grid], tokens)


# -------------------------------------------------------------------------------------------------- the command


def test_the_command_says_what_tuning_has_changed(
    capsys: pytest.CaptureFixture[str], tiny_llama: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    job = ("--method", "rtn", "--bits", "2", "--set", "group_size=32", "--calib", str(tiny_text_file))
    size = ("--samples", str(SAMPLES), "--ctx", str(CTX))
    tune = ("--tune-blocks", "--tune-blocks-set", "steps=3", "--tune-blocks-set", "train=norms,scales")
    assert main(["quantize", str(tiny_llama), str(tmp_path / "out"), *job, *size, *tune]) == 0
    stdout, stderr = capsys.readouterr()
    assert "blocks tuned" in stdout
    assert "tuned in 3 steps: error of the block's output on held-out text" in stderr
    assert details(tmp_path / "out")["tuned_blocks"]["train"] == ["scales", "norms"]
    code = main(
        ["quantize", str(tiny_llama), str(tmp_path / "b"), *job, *size, "--tune-blocks-set", "step=3", "--json"]
    )
    assert code == 2
    message = json.loads(capsys.readouterr().out)["error"]["message"]
    assert "tune_blocks: unknown option 'step'. Did you mean 'steps'?" in message
