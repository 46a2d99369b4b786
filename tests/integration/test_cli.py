"""The command line as a user or a script meets it: documents, exit codes, messages, interruption."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import octavo
from octavo._core.errors import Interrupted, UsageError
from octavo.cli import main
from octavo.cli._layouts import in_words, totals
from octavo.cli._output import Output, duration, parse_settings, print_json, size, with_error
from octavo.evaluation import harness
from octavo.layout import BlockScale, Layout, Outliers
from octavo.pipeline import run
from octavo.pipeline.events import Event

COMMANDS = (
    *("quantize", "tune", "plan", "eval", "compare", "chat", "inspect", "verify", "doctor", "demo", "study dimension"),
)


def call(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command run in this process."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def document(capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    """The one JSON document of a command that succeeds."""
    code, out, err = call(capsys, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def failure(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, dict[str, str]]:
    """Exit code and error of a command that fails, which must be the same with and without --json."""
    code, out, err = call(capsys, *arguments)
    assert out == ""
    json_code, out, _ = call(capsys, *arguments, "--json")
    error = json.loads(out)["error"]
    assert json_code == code
    assert f"error: {error['message']}" in err
    return code, error


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 30)
    return path


@pytest.fixture(scope="module")
def quantized(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "small"
    assert main(["quantize", str(tiny_llama), str(out), "--bits", "3", "--samples", "4", "--ctx", "64", "--quiet"]) == 0
    return out


# ------------------------------------------------------------------------------------------------ the program itself


def test_help_lists_every_command_and_imports_nothing_heavy() -> None:
    program = (
        "import sys; from octavo.cli import main; code = main(['--help']);"
        "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules);"
        "sys.exit(f'{code} {heavy}' if code or heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(command.split()[0] in done.stdout for command in COMMANDS)
    assert done.stdout.isascii(), "boxes do not belong into a pipe"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_json(capsys: pytest.CaptureFixture[str], command: str) -> None:
    code, out, _ = call(capsys, *command.split(), "--help")
    assert code == 0
    assert "--json" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "--version")[:2] == (0, f"octavo {octavo.__version__}\n")


def test_usage_errors_exit_with_2_and_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    code, error = failure(capsys, "doctor", "--nonsense")
    assert (code, error["kind"]) == (2, "UsageError")
    assert "--nonsense" in error["message"]
    assert failure(capsys, "quantize", "only-a-model")[0] == 2
    assert failure(capsys, "quantize", "a", "b", "--bits", "many")[0] == 2


def test_a_bug_is_reported_as_one(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise KeyError("surprise")

    monkeypatch.setattr("octavo.cli.doctor.examine", broken)
    code, error = failure(capsys, "doctor")
    assert code == 1
    assert "please report" in error["message"]


@pytest.mark.parametrize(
    ("raised", "code", "kind"),
    [
        (MemoryError("block"), 5, "ResourceError"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 5, "ResourceError"),
        (OSError(28, "No space left on device"), 5, "ResourceError"),
        (PermissionError(13, "Permission denied"), 1, "PermissionError"),
        (KeyboardInterrupt(), 130, "Interrupted"),
    ],
)
def test_system_errors_have_exit_codes_and_no_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int, kind: str
) -> None:
    def broken() -> None:
        raise raised

    monkeypatch.setattr("octavo.cli.doctor.examine", broken)
    got, error = failure(capsys, "doctor")
    assert (got, error["kind"]) == (code, kind)
    assert "Traceback" not in call(capsys, "doctor")[2]


def test_json_output_is_one_document_even_if_a_library_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from octavo.cli import doctor

    real = doctor.examine

    def chatty() -> dict[str, Any]:
        print("noise of a library")
        return real()

    monkeypatch.setattr(doctor, "examine", chatty)
    code, out, err = call(capsys, "doctor", "--json")
    assert code == 0
    assert json.loads(out)["octavo"] == octavo.__version__
    assert "noise of a library" in err


def test_a_reader_that_goes_away_is_no_error() -> None:
    script = f'"{sys.executable}" -m octavo.cli doctor | head -c 1'
    done = subprocess.run(["bash", "-c", script], check=False, capture_output=True, text=True, timeout=60)
    assert done.stdout == "o"
    assert done.stderr == ""


# ------------------------------------------------------------------------------------------------ doctor


def test_doctor_names_what_is_there_and_the_command_that_mends_what_is_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from octavo.cli import doctor

    monkeypatch.setattr(doctor, "EXTRAS", {"eval": ("no-such-package-at-all", "octavo eval --lm-eval TASKS")})
    report = document(capsys, "doctor")
    assert report["packages"]["torch"] is not None
    assert {"rtn", "gptq", "vptq"} <= set(report["methods"])
    assert any(kernel["usable"] for kernel in report["kernels"])
    assert report["extras"][0]["version"] is None
    assert 'pip install "octavo[eval]"' in call(capsys, "doctor")[1]


def test_doctor_says_why_the_c_library_is_not_in_use(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OCTAVO_NO_CLIB", "1")
    report = document(capsys, "doctor")
    assert report["clib"]["loaded"] is False
    assert any("OCTAVO_NO_CLIB" in problem for problem in report["problems"])
    assert "OCTAVO_NO_CLIB" in call(capsys, "doctor")[2]


# ------------------------------------------------------------------------------------------------ pieces


def test_settings_are_typed_from_json() -> None:
    got = parse_settings(["group=64", "act-order=true", "name=abc", "sizes=[1, 2]", "path=a=b"])
    assert got == {"group": 64, "act_order": True, "name": "abc", "sizes": [1, 2], "path": "a=b"}


@pytest.mark.parametrize("pairs", [["group"], ["=3"], ["a=1", "a=2"]])
def test_settings_that_mean_nothing_are_refused(pairs: list[str]) -> None:
    with pytest.raises(UsageError, match="--set"):
        parse_settings(pairs)


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": None}})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "c": {"d": None}}


def test_units_are_readable() -> None:
    assert [size(n) for n in (12, 34_500, 1.5e6, 2.25e9)] == ["12 bytes", "34.50 kB", "1.50 MB", "2.25 GB"]
    assert [duration(s) for s in (0.25, 59.94, 61, 3725)] == ["0.2 s", "59.9 s", "1 min 01 s", "1 h 02 min"]
    assert with_error(1.5, None) == "1.500"
    assert with_error(1.5, 0.25, 2) == "1.50 +- 0.25"
    assert with_error(None, None) == "-"


def test_progress_shows_bits_error_seconds_and_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(as_json=False)
    output.event(Event("matrix", "l.0.q", block=0, module="l.0.q", bits=2.25, error=0.0125, seconds=1.5))
    output.event(Event("block", "l.0", block=0, blocks=30, seconds=12.0, eta_seconds=348.0))
    output.event(Event("note", "odd"))
    err = capsys.readouterr().err
    assert "l.0.q   2.250 bits  error 0.01250  1.5 s" in err
    assert "block 1/30 (l.0) done in 12.0 s, about 5 min 48 s left" in err
    assert "warning: odd" in err


def test_quiet_hides_progress_but_no_warning(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(as_json=False, quiet=True)
    output.event(Event("matrix", "l.0.q", bits=2.25))
    output.event(Event("note", "odd"))
    assert capsys.readouterr().err == "warning: odd\n"


def test_layouts_are_said_in_full() -> None:
    vector = Layout((64, 96), 6, (12, 8), outliers=Outliers(4, 2, 5), permuted=True, channel_norm="input", bias=True)
    assert in_words(vector) == (
        "vectors of 6 outputs, 4096 + 256 centroids (float16), 4 outlier columns (vectors of 2, 32 centroids), "
        "input channels normalised, columns permuted, bias"
    )
    grid = Layout((64, 96), 1, (4,), direction="row", codebook_dtype="grid", block_scale=BlockScale(32, 4))
    assert in_words(grid) == "uniform grid of 16 levels, scale and 4-bit zero per 32 columns"
    sums = totals({"a": grid, "b": grid})
    assert sums["nominal_bits"] == 4
    assert sums["bits_per_weight"] == grid.bits_per_weight


# ------------------------------------------------------------------------------------------------ eval and compare


def test_eval_prints_the_promised_keys(capsys: pytest.CaptureFixture[str], tiny_llama: Path, text: Path) -> None:
    got = document(capsys, "eval", tiny_llama, "--text", text, "--ctx", 64, "--reference", tiny_llama)
    promised = (
        "perplexity perplexity_se kl kl_se top1 tokens bits_per_weight file_bytes token_hash bos first_tokens ctx"
    )
    assert set(promised.split()) <= got.keys()
    assert (got["kl"], got["top1"], got["bits_per_weight"]) == (0.0, 1.0, None)
    assert got["tokens"] == got["windows"] * 63
    assert got["file_bytes"] == (tiny_llama / "model.safetensors").stat().st_size
    assert got["folder_bytes"] > got["file_bytes"]
    assert got["metric"] == "perplexity at ctx 64, every token of every window after its first"
    assert len(got["first_tokens"]) == 5
    assert len(got["token_hash"]) == 64


def test_eval_for_people_names_the_context_and_the_tokens(
    capsys: pytest.CaptureFixture[str], tiny_llama: Path, text: Path
) -> None:
    code, out, err = call(capsys, "eval", tiny_llama, "--text", text, "--ctx", 64)
    assert code == 0
    assert "perplexity at ctx 64" in out
    assert "BOS" in out
    assert "windows: " in err


def test_max_tokens_cuts_the_text_and_changes_the_hash(
    capsys: pytest.CaptureFixture[str], tiny_llama: Path, text: Path
) -> None:
    whole = document(capsys, "eval", tiny_llama, "--text", text, "--ctx", 32)
    part = document(capsys, "eval", tiny_llama, "--text", text, "--ctx", 32, "--max-tokens", 100)
    assert part["windows"] == 3
    assert part["token_hash"] != whole["token_hash"]
    assert failure(capsys, "eval", tiny_llama, "--text", text, "--ctx", 32, "--max-tokens", 10)[0] == 2


def test_a_context_longer_than_the_model_has_is_refused(
    capsys: pytest.CaptureFixture[str], tiny_llama: Path, text: Path
) -> None:
    code, error = failure(capsys, "eval", tiny_llama, "--text", text, "--ctx", 1_000_000)
    assert code == 2
    assert "max_position_embeddings" in error["message"]


@pytest.mark.parametrize("option", [("--device", "nonsense"), ("--dtype", "float12"), ("--decode", "twice")])
def test_unknown_devices_and_dtypes_are_usage_errors(
    capsys: pytest.CaptureFixture[str], tiny_llama: Path, text: Path, option: tuple[str, str]
) -> None:
    code, error = failure(capsys, "eval", tiny_llama, "--text", text, "--ctx", 64, *option)
    assert code == 2
    assert option[1] in error["message"]


def test_too_little_text_and_missing_text_are_usage_errors(
    capsys: pytest.CaptureFixture[str], tiny_llama: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Hello.")
    assert failure(capsys, "eval", tiny_llama, "--text", short, "--ctx", 64)[0] == 2
    assert failure(capsys, "eval", tiny_llama, "--text", tmp_path / "none.txt")[0] == 2


def test_eval_scores_multiple_choice_files(
    capsys: pytest.CaptureFixture[str], tiny_llama: Path, text: Path, tmp_path: Path
) -> None:
    file = tmp_path / "toy.jsonl"
    lines = [{"query": "Is it?\nAnswer:", "choices": [" yes", " no", " maybe"], "gold": n % 3} for n in range(6)]
    file.write_text("\n".join(map(json.dumps, lines)))
    arguments = ("eval", tiny_llama, "--text", text, "--ctx", 64, "--qa", file)
    task = document(capsys, *arguments)["tasks"]["toy"]
    assert (task["items"], task["acc"]) == (6, pytest.approx(1 / 3))
    assert document(capsys, *arguments, "--qa-limit", 2)["tasks"]["toy"]["items"] == 2
    assert "acc_norm" in call(capsys, *arguments)[1]
    file.write_text(file.read_text() + "\n{broken\n")
    code, error = failure(capsys, *arguments)
    assert code == 3
    assert "line 7" in error["message"]


def test_lm_eval_that_is_not_installed_is_said_before_any_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny_llama: Path
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, error = failure(capsys, "eval", tiny_llama, "--ctx", 64, "--lm-eval", "arc_easy")
    assert code == 2
    assert harness.MISSING in error["message"]


def test_compare_refuses_models_with_different_tokenizers(
    capsys: pytest.CaptureFixture[str], tiny_llama: Path, text: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_llama, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["e"], vocabulary["o"] = vocabulary["o"], vocabulary["e"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    code, error = failure(capsys, "compare", tiny_llama, other, "--text", text, "--ctx", 32)
    assert (code, error["kind"]) == (3, "FormatError")
    assert "different tokens" in error["message"]
    assert failure(capsys, "eval", other, "--reference", tiny_llama, "--text", text, "--ctx", 32)[0] == 3


# ------------------------------------------------------------------------------------------------ the main job


def test_a_quantized_folder_is_inspected_verified_measured_and_talked_to(
    capsys: pytest.CaptureFixture[str], tiny_llama: Path, quantized: Path, text: Path
) -> None:
    seen = document(capsys, "inspect", quantized)
    assert document(capsys, "verify", quantized)["ok"] is True
    measured = document(capsys, "eval", quantized, "--text", text, "--ctx", 64, "--reference", tiny_llama)
    assert measured["bits_per_weight"] == pytest.approx(seen["bits_per_weight"])
    assert measured["kl"] > 0
    assert measured["reference_perplexity"] > 0
    table = document(capsys, "compare", quantized, "--reference", tiny_llama, "--text", text, "--ctx", 64)
    assert [row["model"] for row in table["models"]] == [str(tiny_llama), str(quantized)]
    assert table["models"][1]["kl"] == pytest.approx(measured["kl"], rel=1e-4)
    out = call(capsys, "compare", quantized, "--reference", tiny_llama, "--text", text, "--ctx", 64)[1]
    assert "perplexity at ctx 64" in out
    answer = document(capsys, "chat", quantized, "--prompt", "Hello", "--max-new-tokens", 5)["turns"][0]
    assert 1 <= answer["new_tokens"] <= 5


def test_plan_foretells_what_inspect_finds(
    capsys: pytest.CaptureFixture[str], tiny_llama: Path, quantized: Path
) -> None:
    plan = document(capsys, "plan", tiny_llama, "--bits", 3, "--samples", 4, "--ctx", 64)
    seen = document(capsys, "inspect", quantized)
    assert plan["bits_per_weight"] == pytest.approx(seen["bits_per_weight"])
    assert plan["quantized_bytes"] == seen["quantized_bytes"]
    assert sum(group["count"] for group in plan["groups"]) == seen["matrices"]
    code, out, _ = call(capsys, "plan", tiny_llama, "--bits", 3, "--samples", 4, "--ctx", 64)
    assert code == 0
    assert "index bits" in out
    assert "true bits" in out


def test_both_commands_say_what_noise_needs_to_decide(
    capsys: pytest.CaptureFixture[str], tiny_llama: Path, tmp_path: Path
) -> None:
    for words in (("plan", tiny_llama), ("quantize", tiny_llama, tmp_path / "out", "--guided", "weights")):
        code, error = failure(capsys, *words, "--sensitivity", "noise")
        assert code == 2
        assert "Give --guided bits or both" in error["message"]
    assert not list(tmp_path.iterdir())


def test_inspect_shows_one_matrix_and_guesses_what_was_meant(
    capsys: pytest.CaptureFixture[str], quantized: Path
) -> None:
    module = next(iter(document(capsys, "inspect", quantized)["modules"]))
    one = document(capsys, "inspect", quantized, "--module", module)
    assert one["tensors"]["indices"]["dtype"] == "int32"
    assert module in call(capsys, "inspect", quantized, "--module", module)[1]
    code, error = failure(capsys, "inspect", quantized, "--module", module + "x")
    assert code == 2
    assert f"Did you mean '{module}'?" in error["message"]


def test_inspect_of_an_original_model_is_a_format_error(capsys: pytest.CaptureFixture[str], tiny_llama: Path) -> None:
    code, error = failure(capsys, "inspect", tiny_llama)
    assert (code, error["kind"]) == (3, "FormatError")


def test_verify_finds_a_flipped_bit(capsys: pytest.CaptureFixture[str], quantized: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(quantized, damaged)
    shard = next(damaged.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.write_bytes(data)
    code, out, _ = call(capsys, "verify", damaged, "--json")
    report = json.loads(out)
    assert code == 3
    assert report["ok"] is False
    assert "SHA-256" in report["problems"][0]
    assert report["error"]["kind"] == "FormatError"
    code, out, err = call(capsys, "verify", damaged)
    assert code == 3
    assert "SHA-256" in out
    assert "error:" in err
    assert failure(capsys, "verify", tmp_path / "nowhere")[0] == 3


def test_quantize_refuses_what_it_cannot_do_before_it_starts(
    capsys: pytest.CaptureFixture[str], tiny_llama: Path, quantized: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert failure(capsys, "quantize", tiny_llama, quantized)[0] == 2
    code, error = failure(capsys, "quantize", tiny_llama, out, "--method", "vptk")
    assert code == 2
    assert "Did you mean 'vptq'?" in error["message"]
    assert failure(capsys, "quantize", tmp_path / "nowhere", out)[0] == 2
    assert failure(capsys, "quantize", tiny_llama, out, "--set", "nonsense=1")[0] == 2
    assert not out.exists()


def test_quantize_reports_every_matrix_on_stderr_and_a_summary_on_stdout(
    capsys: pytest.CaptureFixture[str], tiny_llama: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, stdout, stderr = call(
        capsys, "quantize", tiny_llama, out, "--method", "rtn", "--bits", 4, "--set", "group_size=32"
    )
    assert code == 0, stderr
    assert "bits per weight" in stdout
    assert "q_proj" in stderr
    assert "block 1/" in stderr
    report = document(capsys, "quantize", tiny_llama, tmp_path / "out2", "--method", "rtn", "--bits", 4)
    assert report["bits_per_weight"] > 4
    assert len(report["matrices"]) == stderr.count("_proj ")


# ------------------------------------------------------------------------------------------------ interruption


def press_ctrl_c_at_first_matrix(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    real = Output.event
    left = [times]

    def event(self: Output, event: Event) -> None:
        real(self, event)
        if event.kind == "matrix" and left[0]:
            left[0] -= 1
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Output, "event", event)


def test_one_ctrl_c_finishes_the_block_and_resuming_gives_the_same_bytes(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tiny_llama: Path,
    quantized: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "small"
    arguments = ("quantize", tiny_llama, out, "--bits", 3, "--samples", 4, "--ctx", 64)
    press_ctrl_c_at_first_matrix(monkeypatch, 1)
    code, stdout, err = call(capsys, *arguments)
    assert code == 130
    assert stdout == ""
    assert "press Ctrl-C again" in err
    assert "block 1/" in err
    assert f"Continue with: octavo quantize {tiny_llama} {out} --bits 3 --samples 4 --ctx 64 --resume" in err
    assert not out.exists()
    assert call(capsys, *arguments)[0] == 2, "an unfinished job is not started over without a word"
    code, _, err = call(capsys, *arguments, "--resume")
    assert code == 0, err
    assert "block 1/" not in err
    for name in ("model.safetensors", "config.json"):
        assert (out / name).read_bytes() == (quantized / name).read_bytes()


def test_two_ctrl_c_stop_at_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny_llama: Path, tmp_path: Path
) -> None:
    press_ctrl_c_at_first_matrix(monkeypatch, 2)
    handler = signal.getsignal(signal.SIGINT)
    code, out, err = call(capsys, "quantize", tiny_llama, tmp_path / "o", "--samples", 4, "--ctx", 64, "--json")
    assert code == 130
    assert json.loads(out)["error"]["kind"] == "Interrupted"
    assert "--resume" in err
    assert "block 1/" not in err
    assert signal.getsignal(signal.SIGINT) is handler


def test_an_interrupted_job_tells_how_to_resume(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise Interrupted("stopped after block 3 of 30.")

    monkeypatch.setattr(run, "quantize", stopped)
    code, _, err = call(capsys, "quantize", "a model", "out", "--force-new")
    assert code == 130
    assert "error: stopped after block 3 of 30.\nContinue with: octavo quantize 'a model' out --resume" in err


# ------------------------------------------------------------------------------------------------ chat


def test_chat_reads_a_pipe_line_by_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny_llama: Path
) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("First question\n\nSecond question\n"))
    got = document(capsys, "chat", tiny_llama, "--max-new-tokens", 4, "--temperature", 0)
    assert [turn["prompt"] for turn in got["turns"]] == ["First question", "Second question"]


def test_chat_streams_the_answer_and_a_seed_repeats_it(capsys: pytest.CaptureFixture[str], tiny_llama: Path) -> None:
    arguments = ("chat", tiny_llama, "--prompt", "Hello", "--max-new-tokens", 12, "--seed", 7)
    answers = [document(capsys, *arguments)["turns"][0]["response"] for _ in range(2)]
    assert answers[0] == answers[1]
    assert document(capsys, *arguments[:-1], 8)["turns"][0]["response"] != answers[0]
    code, out, _ = call(capsys, *arguments)
    assert code == 0
    assert out.strip() == answers[0].strip()


def test_chat_refuses_a_prompt_that_does_not_fit(capsys: pytest.CaptureFixture[str], tiny_llama: Path) -> None:
    code, error = failure(capsys, "chat", tiny_llama, "--prompt", "word " * 5000, "--max-new-tokens", 4)
    assert code == 2
    assert "context" in error["message"]


def test_chat_without_a_template_knows_no_system_message(
    capsys: pytest.CaptureFixture[str], tiny_llama: Path, tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(tiny_llama, plain)
    for name in plain.glob("chat_template*"):
        name.unlink()
    config = json.loads((plain / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (plain / "tokenizer_config.json").write_text(json.dumps(config))
    assert failure(capsys, "chat", plain, "--prompt", "Hi", "--system", "Be kind.")[0] == 2


def test_demo_runs_from_model_to_paragraph(
    capsys: pytest.CaptureFixture[str], tiny_llama: Path, quantized: Path
) -> None:
    """On a folder that is quantized already: the job itself is tested above."""
    got = document(capsys, "demo", tiny_llama, quantized)
    assert got["report"] is None
    assert [row["model"] for row in got["comparison"]["models"]] == [str(tiny_llama), str(quantized)]
    assert got["turn"]["new_tokens"] > 0
    assert set(got["seconds"]) == {"compare", "generate"}
