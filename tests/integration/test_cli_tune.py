"""``octavo tune`` and ``octavo quantize --tune`` as a user or a script meets them."""

from __future__ import annotations

import json
import os
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest

from octavo import formats
from octavo.cli import main
from octavo.cli._output import Output
from octavo.pipeline.events import Event

QUANTIZE = ("--method", "rtn", "--bits", "2", "--set", "group_size=32")
QUICK = ("--ctx", "32", "--samples", "16", "--batch-tokens", "128", "--lr", "1e-2", "--steps", "6", "--device", "cpu")
SETTINGS = ("ctx=32", "samples=16", "batch_tokens=128", "lr=1e-2", "steps=6", "device=cpu")


def call(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command run in this process."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def quantized(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "small"
    assert main(["quantize", str(tiny_llama), str(out), *QUANTIZE, "--quiet"]) == 0
    return out


def arguments_of(quantized: Path, out: Path, model: Path, text: Path) -> tuple[Any, ...]:
    return ("tune", quantized, out, "--reference", model, "--calib", text, *QUICK)


def test_tune_prints_one_document_with_what_it_did(
    capsys: pytest.CaptureFixture[str], quantized: Path, tiny_llama: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, stdout, stderr = call(capsys, *arguments_of(quantized, out, tiny_llama, tiny_text_file), "--json")
    assert code == 0, stderr
    report = json.loads(stdout)
    assert report["kl_after"] < report["kl_before"]
    assert (report["steps"], report["output"], report["tokens"]) == (6, str(out), 6 * 128)
    assert report["history"][0] == [0, report["kl_before"]]
    assert "step 3/6  KL 0." in stderr and "held out 0." in stderr
    formats.verify(out)


def test_tune_for_people_says_what_has_changed_and_what_has_not(
    capsys: pytest.CaptureFixture[str], quantized: Path, tiny_llama: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    arguments = arguments_of(quantized, tmp_path / "out", tiny_llama, tiny_text_file)
    code, stdout, stderr = call(capsys, *arguments, "--quiet")
    assert (code, stderr) == (0, "")
    assert "before tuning" in stdout and "held-out tokens" in stdout
    assert "counting everything, as before" in stdout
    code, _, stderr = call(capsys, *arguments)
    assert code == 2 and "exists already" in stderr


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        (["--train", "books,norm"], 2, "train wanted some of books, scales, biases, norms, got norm"),
        (["--lr", "0"], 2, "lr wanted a number > 0, got 0.0"),
        (["--device", "quantum:0"], 2, "device 'quantum:0' cannot be used"),
        (["--calib", "nowhere.txt"], 2, "nowhere.txt does not exist"),
        (["--lr", "1e30"], 4, "Use a lower --lr"),
    ],
)
def test_what_cannot_work_has_its_exit_code_and_says_why(
    capsys: pytest.CaptureFixture[str],
    quantized: Path,
    tiny_llama: Path,
    tiny_text_file: Path,
    tmp_path: Path,
    changes: list[str],
    code: int,
    message: str,
) -> None:
    arguments = arguments_of(quantized, tmp_path / "out", tiny_llama, tiny_text_file)
    found, stdout, _ = call(capsys, *arguments, *changes, "--json")
    assert found == code
    assert message in json.loads(stdout)["error"]["message"]
    assert not (tmp_path / "out").exists()


def press_ctrl_c_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    real = Output.event

    def event(self: Output, event: Event) -> None:
        real(self, event)
        if event.kind == "step" and event.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Output, "event", event)


def test_one_ctrl_c_finishes_the_step_and_the_advice_continues_it(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    quantized: Path,
    tiny_llama: Path,
    tiny_text_file: Path,
    tmp_path: Path,
) -> None:
    whole = arguments_of(quantized, tmp_path / "whole", tiny_llama, tiny_text_file)
    assert call(capsys, *whole, "--quiet")[0] == 0
    with monkeypatch.context() as patch:
        press_ctrl_c_at(patch, 2)
        code, stdout, err = call(capsys, *arguments_of(quantized, tmp_path / "out", tiny_llama, tiny_text_file))
    assert (code, stdout) == (130, "")
    assert "stopping after this step" in err and "stopped after step 3 of 6" in err
    advice = next(line for line in err.splitlines() if line.startswith("Continue with: octavo "))
    code, _, err = call(capsys, *shlex.split(advice.removeprefix("Continue with: octavo ")))
    assert code == 0, err
    assert "step 3/6" not in err and "step 4/6" in err
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_quantize_can_end_with_tuning(
    capsys: pytest.CaptureFixture[str], quantized: Path, tiny_llama: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    two = tmp_path / "two"
    assert call(capsys, *arguments_of(quantized, two, tiny_llama, tiny_text_file), "--quiet")[0] == 0
    settings = [part for setting in SETTINGS for part in ("--tune-set", setting)]
    arguments = ("quantize", tiny_llama, tmp_path / "one", *QUANTIZE, "--calib", tiny_text_file, "--tune", *settings)
    code, stdout, stderr = call(capsys, *arguments)
    assert code == 0, stderr
    assert "before tuning" in stdout
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    code, stdout, _ = call(capsys, *arguments[:2], tmp_path / "other", *arguments[3:], "--tune-set", "step=3", "--json")
    assert code == 2
    assert "unknown option 'step'. Did you mean 'steps'?" in json.loads(stdout)["error"]["message"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
