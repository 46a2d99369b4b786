"""``octavo bench`` as a user or a script meets it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from octavo.cli import main
from octavo.evaluation import speed
from octavo.kernels import select


def call(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command run in this process."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_READ_BYTES", 1 << 22)
    monkeypatch.delenv(select.ENVIRONMENT, raising=False)


@pytest.fixture(scope="module")
def quantized(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "small"
    options = ("--bits", "3.3", "--samples", "2", "--ctx", "32", "--guided", "none", "--set", "beam=4", "--quiet")
    assert main(["quantize", str(tiny_llama), str(out), *options]) == 0
    return out


@pytest.mark.parametrize("kv_cache", ["int8", "float16"])
def test_bench_prints_one_document(capsys: pytest.CaptureFixture[str], quantized: Path, kv_cache: str) -> None:
    options = ("--prompt", "30", "--generate", "4", "--rounds", "2", "--threads", "1", "--json")
    options += () if kv_cache == "int8" else ("--kv-cache", kv_cache)
    code, stdout, stderr = call(capsys, "bench", quantized, *options)
    assert code == 0, stderr
    report = json.loads(stdout)
    assert (report["engine"], report["kv_cache"]) == ("native decoder", kv_cache)
    for key in ("prompt_tokens_per_second", "generate_tokens_per_second", "bytes_per_token", "gigabytes_per_second"):
        assert report[key] > 0
    assert 0 < report["outside_matrices"] < 1
    assert (report["prompt"], report["generate"], report["threads"], report["peers"]) == (30, 4, 1, [])


def test_bench_for_people_names_the_engine_and_the_share_of_the_memorys_speed(
    capsys: pytest.CaptureFixture[str], quantized: Path, tiny_gpt2: Path
) -> None:
    options = ("--prompt", "8", "--generate", "2", "--rounds", "1")
    code, stdout, _ = call(capsys, "bench", quantized, *options)
    assert code == 0
    assert "native decoder" in stdout and "of the memory's speed" in stdout and "GB/s read by" in stdout
    assert "outside matrices" in stdout
    code, stdout, _ = call(capsys, "bench", tiny_gpt2, *options)
    assert code == 0
    assert "transformers (gpt2 is none of the architectures" in stdout


def test_bench_refuses_what_it_cannot_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, stderr = call(capsys, "bench", tmp_path)
    assert code == 3 and "error:" in stderr
