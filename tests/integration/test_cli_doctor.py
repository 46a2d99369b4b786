"""``octavo doctor MODEL``: which kernel runs each matrix on each device, why, and what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from formats.tiny_models import MODELS, STYLES, quantize, write_tokenizer
from integration.test_cli import call, document, failure
from octavo._core import clib
from octavo.kernels import select
from octavo.kernels.select import Kernel
from octavo.layout import Layout
from octavo.weight import VQWeight


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, VQWeight]]:
    """A tiny Llama, the same with random codes, and its weights: every style of layout at least once."""
    original, out = tmp_path_factory.mktemp("original"), tmp_path_factory.mktemp("quantized") / "out"
    torch.manual_seed(0)
    MODELS["llama"]().save_pretrained(original)
    write_tokenizer(original)
    return original, out, quantize(original, out)


class Winged(Kernel):
    """A GPU kernel for layouts without tiles, on machines with wings."""

    rank = 50

    @staticmethod
    def missing() -> str:
        return "no wings; pip install wings"

    @staticmethod
    def why_not(layout: Layout, device: torch.device) -> str:
        return "it runs on CUDA" if device.type != "cuda" else "it does not know tiles" if layout.tile else ""

    @staticmethod
    def linear(x: Tensor, prepared: Any) -> Tensor:
        raise NotImplementedError


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were a GPU, with a kernel that lacks something."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "a GPU with a name")
    select.registry.names()
    monkeypatch.setitem(select.registry._table, "winged", Winged)


@pytest.mark.skipif(clib.library() is None, reason="no C++ library")
def test_each_matrix_is_in_one_row_with_the_kernel_that_runs_it(
    folders: tuple[Path, Path, dict[str, VQWeight]], capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, weights = folders
    rows = document(capsys, "doctor", out)["layers"]
    assert sorted(module for row in rows for module in row["matrices"]) == sorted(weights)
    assert len(rows) < len(weights)
    for row in rows:
        assert row["device"] == "cpu"
        assert row["count"] == len(row["matrices"])
        for module in row["matrices"]:
            assert (row["kernel"], row["why"]) == select.choose(weights[module].layout, torch.device("cpu"))
    assert {row["kernel"] for row in rows} >= {"gather", "reference"}
    shown = call(capsys, "doctor", out)[1]
    assert "what runs it" in shown
    assert "codebooks per tile" in shown


def test_what_a_gpu_lacks_is_told_with_the_command_that_mends_it(
    folders: tuple[Path, Path, dict[str, VQWeight]],
    gpu: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, out, weights = folders
    report = document(capsys, "doctor", out)
    on_gpu = [row for row in report["layers"] if row["device"] == "cuda:0"]
    assert sum(row["count"] for row in on_gpu) == len(weights)
    for row in on_gpu:
        tiled = weights[row["matrices"][0]].layout.tile is not None
        assert row["kernel"] == ("reference" if tiled else "")
        assert ("no faster kernel can run" if tiled else "pip install wings. OCTAVO_ALLOW_SLOW=1") in row["why"]
    assert sum("pip install wings" in problem for problem in report["problems"]) == 1
    monkeypatch.setenv(select.ALLOW_SLOW, "1")
    report = document(capsys, "doctor", out)
    assert {row["kernel"] for row in report["layers"] if row["device"] == "cuda:0"} == {"reference"}
    assert "winged on cuda:0: no wings; pip install wings" in report["problems"]


def test_an_override_that_cannot_be_honoured_is_said(
    folders: tuple[Path, Path, dict[str, VQWeight]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(select.ENVIRONMENT, "lookup")
    code, shown, warnings = call(capsys, "doctor", folders[1])
    assert code == 0
    assert "none" in shown
    assert "OCTAVO_KERNEL=lookup cannot run here: it does not know" in warnings.replace("\n", " ")
    monkeypatch.setenv(select.ENVIRONMENT, "reference")
    rows = document(capsys, "doctor", folders[1])["layers"]
    assert {(row["kernel"], row["why"]) for row in rows} == {("reference", "OCTAVO_KERNEL is set")}
    assert len(rows) == len(STYLES)  # Reason and layout are all that rows differ in.


def test_a_folder_that_is_not_quantized_is_an_error(
    folders: tuple[Path, Path, dict[str, VQWeight]], capsys: pytest.CaptureFixture[str]
) -> None:
    code, error = failure(capsys, "doctor", folders[0])
    assert code == 3
    assert "quantiz" in error["message"]
