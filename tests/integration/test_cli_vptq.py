"""VPTQ folders on the command line: convert, inspect, verify, eval, plan; documents, words and exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from formats.checkpoints import edit_json, write_plain
from integration.vptq_models import MODULES, make_wide, same_bits, tensors_of, write_vptq
from octavo.cli import main
from octavo.models import quantized

GOLDEN = Path(__file__).parents[1] / "golden" / "vptq"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wide(tmp_path_factory.mktemp("cli") / "original")


@pytest.fixture(scope="module")
def folder(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VPTQ folder that somebody else made."""
    out = tmp_path_factory.mktemp("cli") / "theirs"
    write_vptq(original, out)
    return out


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 30)
    return path


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


def failure(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str]:
    """Exit code and message of a command that fails, which must be the same with and without --json."""
    code, out, err = call(capsys, *arguments)
    assert out == ""
    json_code, out, _ = call(capsys, *arguments, "--json")
    message = json.loads(out)["error"]["message"]
    assert json_code == code
    assert f"error: {message}" in err
    return code, message


# ------------------------------------------------------------------------------------------------ convert


def test_convert_says_what_it_did(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    report = document(capsys, "convert", folder, tmp_path / "own", "--to", "octavo")
    assert (report["format_before"], report["format"], report["matrices"]) == ("vptq", "octavo", len(MODULES))
    assert report["output"] == str(tmp_path / "own")
    assert report["rounded"] == 0
    # VPTQ is what is written unless told otherwise.
    code, out, _ = call(capsys, "convert", tmp_path / "own", tmp_path / "back")
    assert code == 0
    assert "all weights as before, bit for bit" in out
    assert f"vptq (before: octavo), {len(MODULES)} matrices" in out
    assert same_bits(tensors_of(tmp_path / "back"), tensors_of(folder))
    assert call(capsys, "verify", tmp_path / "back")[0] == 0


def test_convert_says_that_it_has_rounded(
    capsys: pytest.CaptureFixture[str], original: Path, text: Path, tmp_path: Path
) -> None:
    settings = ("vector_length=4", "centroids=256", "residual_centroids=0", "iterations=1", "sweeps=0")
    arguments = ["--method", "vptq", "--samples", "2", "--ctx", "16", "--calib", text, "--quiet", "--skip", "mlp"]
    arguments += [part for setting in settings for part in ("--set", setting)]
    assert call(capsys, "quantize", original, tmp_path / "own", *arguments)[0] == 0
    code, out, _ = call(capsys, "convert", tmp_path / "own", tmp_path / "out")
    assert code == 0
    assert "8 matrices are rounded to the format's dtype; their weights change by 1." in out
    assert "e-03 (root mean square, relative)" in out


def test_convert_has_exit_codes_and_leaves_nothing_behind(
    capsys: pytest.CaptureFixture[str], original: Path, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert failure(capsys, "convert", tmp_path / "nowhere", out)[0] == 2
    code, message = failure(capsys, "convert", original, out)
    assert (code, "holds no quantized model" in message) == (2, True)
    code, message = failure(capsys, "convert", folder, folder)
    assert (code, "is there already" in message) == (2, True)
    code, message = failure(capsys, "convert", folder, folder / "sub")
    assert (code, "lies inside of" in message) == (2, True)
    code, message = failure(capsys, "convert", folder, out, "--to", "gguf")
    assert (code, "gguf" in message) == (2, True)
    # The matrices of the golden files are too narrow for the kernels.
    code, message = failure(capsys, "convert", GOLDEN / "plain" / "checkpoint", out)
    assert code == 2
    assert "the vptq format cannot hold these matrices" in message
    assert "64 centroids" in message and "nearest 16 or 256" in message
    broken = broken_copy(folder, tmp_path / "broken")
    code, message = failure(capsys, "convert", broken, out, "--to", "octavo")
    assert (code, f"no tensor {MODULES[3]}.indices is there" in message) == (3, True)
    assert {path.name for path in tmp_path.iterdir()} == {"broken"}


# ------------------------------------------------------------------------------------------------ inspect


def test_inspect_counts_the_bytes_of_the_tensors(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    report, tensors = document(capsys, "inspect", folder), tensors_of(folder)
    assert (report["format"], report["method"]) == ("vptq", "vptq")
    assert report["octavo_version"] is None
    assert report["details"] == {}
    total, weights = 0, 0
    for module in MODULES:
        stored = sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith(f"{module}."))
        layer = report["modules"][module]
        size = quantized.check(folder).layouts[module].weights
        assert layer["bytes"] == stored
        assert layer["bits_per_weight"] == 8 * stored / size
        total, weights = total + stored, weights + size
    assert report["quantized_bytes"] == total
    assert report["bits_per_weight"] == pytest.approx(8 * total / weights)
    assert report["weights"] == weights
    assert sum(group["bytes"] for group in report["groups"]) == total
    assert sum(group["count"] for group in report["groups"]) == len(MODULES)
    assert report["file_bytes"] == (folder / "model.safetensors").stat().st_size


def test_inspect_says_it_in_words(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    code, out, err = call(capsys, "inspect", folder)
    assert (code, err) == (0, "")
    assert "vptq, not written by Octavo" in out
    for words in (
        "vectors of 4 outputs, 256 centroids (bfloat16), input channels normalised",
        "vectors of 8 outputs, 256 + 256 centroids (bfloat16), 2 codebooks",
        "8 outlier columns (vectors of 4, 64 centroids)",
        "columns permuted",
    ):
        assert words in " ".join(out.split()), words


def test_inspect_shows_one_matrix_with_its_stored_tensors(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    module = MODULES[1]
    report, tensors = document(capsys, "inspect", folder, "--module", module), tensors_of(folder)
    stored = {n.removeprefix(f"{module}."): t for n, t in tensors.items() if n.startswith(f"{module}.")}
    assert {"indices", "res_centroids.weight", "outlier_indices", "perm", "weight_scale"} <= stored.keys()
    assert report["tensors"] == {
        name: {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
        for name, tensor in stored.items()
    }
    assert report["bytes"] == sum(tensor.nbytes for tensor in stored.values())
    code, out, _ = call(capsys, "inspect", folder, "--module", module)
    assert code == 0
    assert "res_centroids.weight" in out and "2x2048" in out
    code, message = failure(capsys, "inspect", folder, "--module", "model.layers.0.self_attn.k_prj")
    assert code == 2
    assert "Did you mean" in message and module in message


@pytest.mark.parametrize("name", ["attention_bias", "flat", "partial", "plain", "residual", "shared"])
def test_inspect_and_verify_take_every_form_of_config(capsys: pytest.CaptureFixture[str], name: str) -> None:
    place = GOLDEN / name / "checkpoint"
    report, tensors = document(capsys, "inspect", place), tensors_of(place)
    assert report["matrices"] == (11 if name == "partial" else 14)
    names = [n for n in tensors if any(n.startswith(f"{module}.") for module in report["modules"])]
    assert report["quantized_bytes"] == sum(tensors[n].nbytes for n in names)
    verified = document(capsys, "verify", place)
    assert (verified["ok"], verified["problems"]) == (True, [])


# ------------------------------------------------------------------------------------------------ verify


def broken_copy(folder: Path, out: Path) -> Path:
    """Without the indices of one matrix."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors"))
    write_plain(out, {name: t for name, t in tensors_of(folder).items() if name != f"{MODULES[3]}.indices"})
    return out


def test_a_damaged_folder_has_one_line_and_exit_code_3(
    capsys: pytest.CaptureFixture[str], original: Path, folder: Path, text: Path, tmp_path: Path
) -> None:
    broken = broken_copy(folder, tmp_path / "broken")
    for arguments in (
        ("inspect", broken),
        ("eval", broken, "--text", text, "--ctx", "16"),
        ("tune", broken, tmp_path / "out", "--reference", original, "--calib", text, "--ctx", "16"),
    ):
        code, message = failure(capsys, *arguments)
        assert code == 3, arguments
        assert f"{MODULES[3]}.indices" in message
        assert "\n" not in message
    code, out, err = call(capsys, "verify", broken)
    assert code == 3
    assert len(out.splitlines()) == 1 and f"{MODULES[3]}.indices" in out
    assert "1 problems" in err
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_a_config_without_layers_is_explained(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(folder, tmp_path / "copy"))
    edit_json(place / "config.json", lambda config: config["quantization_config"].pop("config_for_layers"))
    for command in ("inspect", "verify"):
        code, out, _ = call(capsys, command, place, "--json")
        assert code == 3
        assert "has no layer in config_for_layers or shared_layer_config" in json.loads(out)["error"]["message"]


def test_a_truncated_file_is_noticed(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(folder, tmp_path / "copy"))
    data = (place / "model.safetensors").read_bytes()
    (place / "model.safetensors").write_bytes(data[:-64])
    code, message = failure(capsys, "inspect", place)
    assert (code, "truncated" in message) == (3, True)
    assert call(capsys, "verify", place)[0] == 3


# ------------------------------------------------------------------------------------------------ eval, plan, quantize


def test_eval_measures_a_vptq_folder_against_its_original(
    capsys: pytest.CaptureFixture[str], original: Path, folder: Path, text: Path
) -> None:
    arguments = ("eval", folder, "--text", text, "--ctx", "32", "--max-tokens", "128", "--device", "cpu")
    report = document(capsys, *arguments, "--reference", original)
    assert report["kl"] > 0
    assert report["decode"] == "dense"
    assert report["bits_per_weight"] == document(capsys, "inspect", folder)["bits_per_weight"]
    alone = document(capsys, *arguments)
    assert alone["perplexity"] == report["perplexity"]


def test_plan_and_quantize_take_the_format(
    capsys: pytest.CaptureFixture[str], original: Path, text: Path, tmp_path: Path
) -> None:
    arguments = ["--bits", "3", "--format", "vptq", "--samples", "2", "--ctx", "16", "--skip", "mlp"]
    arguments += [part for setting in ("iterations=1", "sweeps=0", "update_columns=0") for part in ("--set", setting)]
    plan = document(capsys, "plan", original, *arguments)
    assert plan["bits_per_weight"] <= 3
    assert plan["options"]["side_dtype"] == "bfloat16"
    out = tmp_path / "out"
    report = document(capsys, "quantize", original, out, "--calib", text, *arguments)
    assert report["bits_per_weight"] == plan["bits_per_weight"]
    found = document(capsys, "inspect", out)
    assert found["format"] == "vptq"
    assert found["octavo_version"]
    assert found["quantized_bytes"] == plan["quantized_bytes"]
    assert found["bits_per_weight"] == pytest.approx(plan["bits_per_weight"])
    assert {name: layer["bytes"] for name, layer in found["modules"].items()} == {
        matrix["module"]: matrix["bytes"] for matrix in plan["matrices"]
    }
    assert document(capsys, "verify", out)["ok"] is True
    assert "written by Octavo" in call(capsys, "inspect", out)[1]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--method", "gptq", "--bits", "3"), "uniform grids have no codebook"),
        (("--set", "vector_length=5"), "nearest 4 or 6"),
        (("--set", "norm=false"), "norm of the input channels"),
        (("--set", 'codebook_dtype="int8"'), "codebooks in int8"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_by_plan_and_quantize(
    capsys: pytest.CaptureFixture[str], original: Path, tmp_path: Path, arguments: tuple[str, ...], reason: str
) -> None:
    for command in (("plan", original), ("quantize", original, tmp_path / "out")):
        code, message = failure(capsys, *command, "--format", "vptq", *arguments)
        assert code == 2
        assert reason in message
    assert not list(tmp_path.iterdir())


def test_a_preset_of_the_community_goes_with_its_format(capsys: pytest.CaptureFixture[str], original: Path) -> None:
    plan = document(capsys, "plan", original, "--preset", "v8-k256-256", "--format", "vptq")
    assert {matrix["layout"]["vector_length"] for matrix in plan["matrices"]} == {8}
    assert {tuple(matrix["layout"]["stages"]) for matrix in plan["matrices"]} == {(8, 8)}
    assert plan["nominal_bits"] == 2.0
    assert plan["options"]["codebook_dtype"] == "bfloat16"
