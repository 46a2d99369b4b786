"""VPTQ's format as the output of quantizing and tuning, and as the input of tuning."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import octavo
from faults.jobs import RTN, digests, make_quick, run, stop_after
from integration.vptq_models import ENTRY_KEYS, MODULES, same_bits, tensors_of
from octavo import formats
from octavo._core.errors import FormatError, Interrupted, UsageError
from octavo.pipeline import plan
from octavo.pipeline.convert import convert
from octavo.pipeline.tune import tune
from pipeline.vptq_jobs import OPTIONS, QUANTIZED, SKIP, TUNE, config_of, job, kept_of, logits

Wide = Callable[..., Path]

pytestmark = pytest.mark.filterwarnings("ignore::octavo._core.clib.SlowPathWarning")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)


# ------------------------------------------------------------------------------------------------ quantizing


@pytest.mark.parametrize(("dtype", "stored"), [("bfloat16",) * 2, ("float16",) * 2, ("float32", "float16")])
def test_quantize_writes_what_other_loaders_want(made: Callable[..., Any], wide: Wide, dtype: str, stored: str) -> None:
    out, report = made(dtype)
    config = config_of(out)
    assert config["dtype"] == config["torch_dtype"] == stored
    quantization = config["quantization_config"]
    assert quantization["quant_method"] == "vptq"
    assert set(quantization["modules_to_not_convert"]) == {"lm_head", *MODULES} - {*QUANTIZED}
    assert set(quantization["config_for_layers"]) == set(QUANTIZED)
    for entry in quantization["config_for_layers"].values():
        assert entry.keys() == ENTRY_KEYS
        assert entry["enable_norm"] is True
        assert entry["is_indice_packed"] is True
        assert entry["indices_as_float"] is False
    tensors = tensors_of(out)
    floats = {t.dtype for n, t in tensors.items() if n.rpartition(".")[2] in ("weight_scale", "weight_bias")}
    books = {t.dtype for n, t in tensors.items() if "centroids.weight" in n}
    assert floats == books == {getattr(torch, stored)}
    assert {t.dtype for n, t in tensors.items() if n.endswith(".indices")} == {torch.int32}
    original = tensors_of(wide(dtype))
    assert same_bits(
        {n: t for n, t in kept_of(out).items() if n != "lm_head.weight"},
        {n: t for n, t in original.items() if n.rpartition(".")[0] not in QUANTIZED},
    )
    assert torch.equal(tensors["lm_head.weight"], original["model.embed_tokens.weight"])
    assert report.bits_per_weight <= 2.5
    formats.verify(out)
    model, _ = octavo.load(out)
    assert model.dtype == getattr(torch, stored)


@pytest.mark.parametrize(
    "options",
    [{}, {"outlier_percent": 2, "groups": 2, "vector_length": 4}, {"residual_centroids": 16, "centroids": 16}],
)
def test_the_plan_predicts_every_byte(
    wide: Wide, tiny_text_file: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    skip = SKIP if options else ()
    run(wide(), tmp_path / "out", job(tiny_text_file, options=OPTIONS | options, skip=skip))
    the_plan = plan(wide(), bits=2.5, options=OPTIONS | options, format="vptq", samples=4, ctx=16, skip=skip)
    tensors, config = tensors_of(tmp_path / "out"), formats.check(tmp_path / "out")
    stored = sum(tensors[name].nbytes for name in config.tensors())
    assert the_plan.quantized_bytes == stored
    assert (
        the_plan.bits_per_weight
        == config.bits_per_weight
        == 8 * stored / sum(layout.weights for layout in config.layouts.values())
    )
    assert {m.module: m.layout for m in the_plan.matrices} == config.layouts


@pytest.mark.parametrize("bits", [2.5, 3])
def test_the_limit_counts_what_this_format_stores(wide: Wide, bits: float) -> None:
    """Its indices of outliers have 16 bits, however few are needed."""
    options = OPTIONS | {"outlier_percent": 4, "outlier_centroids": 16, "groups": 2, "vector_length": 4}
    arguments: dict[str, Any] = {"bits": bits, "options": options, "format": "vptq", "samples": 4, "ctx": 16}
    the_plan = plan(wide(), **arguments)
    assert the_plan.bits_per_weight <= bits
    assert sum(matrix["bytes"] for matrix in the_plan.to_dict()["matrices"]) == the_plan.quantized_bytes


def test_an_interrupted_job_continues_with_the_same_bytes_and_no_other_format(
    made: Callable[..., Any], wide: Wide, tiny_text_file: Path, tmp_path: Path
) -> None:
    whole, _ = made()
    settings, out = job(tiny_text_file), tmp_path / "out"
    with pytest.raises(Interrupted):
        run(wide(), out, settings, stop=stop_after(1))
    with pytest.raises(UsageError, match="format"):
        run(wide(), out, settings | {"format": "octavo"}, resume=True)
    run(wide(), out, settings, resume=True)
    assert digests(out) == digests(whole)
    assert not (tmp_path / "out.work").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"method": "gptq", "bits": 3, "options": {}}, "uniform grids have no codebook"),
        ({"method": "rtn", "bits": 3, "options": {}}, "uniform grids have no codebook"),
        ({"method": "gptvq", "options": {}}, "vectors of outputs, not of inputs"),
        ({"options": {"vector_length": 5}}, r"vectors of 5: .* nearest 4 or 6"),
        ({"options": {"norm": False}}, "norm of the input channels: leave the option norm out"),
        ({"options": {"codebook_dtype": "int8"}}, "codebooks in int8"),
        ({"options": {"centroids": 32, "residual_centroids": 0}}, "32 centroids: .* nearest 16 or 256"),
        ({"options": {"groups": 2, "centroids": 256, "residual_centroids": 16}}, "make them equal"),
        ({"options": {"outlier_percent": 1, "outlier_vector_length": 8}}, "outlier_vector_length=4"),
    ],
)
def test_what_the_package_cannot_read_is_refused_before_work(
    wide: Wide,
    tiny_text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    reason: str,
) -> None:
    monkeypatch.setattr(
        import_module("octavo.pipeline._blocks").BlockWalk, "run_blocks", lambda *_: pytest.fail("work was begun")
    )
    with pytest.raises(UsageError, match=f"the vptq format cannot hold these matrices:(.|\n)*{reason}"):
        run(wide(), tmp_path / "out", job(tiny_text_file, **changes))
    assert not list(tmp_path.iterdir())
    arguments: dict[str, Any] = {"bits": 2.5, "format": "vptq", "samples": 4, "ctx": 16}
    with pytest.raises(UsageError, match=reason):
        plan(wide(), **arguments | changes)


def test_tuning_blocks_keeps_the_format(wide: Wide, tiny_text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = {"batch_tokens": 32, "steps": 2, "held_out": 1}
    report = run(wide(), out, job(tiny_text_file), tune_blocks=given)
    assert report.block_tuned is not None
    assert len(report.block_tuned) == 2
    formats.verify(out)
    config = formats.check(out)
    assert config.format == "vptq"
    assert config.details["tuned_blocks"]["blocks"] == 2
    assert {layout.codebook_dtype for layout in config.layouts.values()} == {"bfloat16"}
    assert bool(logits(out).isfinite().all())


# ------------------------------------------------------------------------------------------------ tuning


@pytest.fixture(scope="module")
def tuned(made: Callable[..., Any], wide: Wide, tiny_text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A quantized VPTQ folder after tuning: folder and report."""
    out = tmp_path_factory.mktemp("tuned") / "out"
    return out, tune(made()[0], out, reference=wide(), calib=tiny_text_file, **TUNE)


def test_tuning_keeps_format_indices_and_size(made: Callable[..., Any], tuned: Any) -> None:
    (folder, _), (out, report) = made(), tuned
    assert report.kl_after < report.kl_before
    formats.verify(out)
    before, after = formats.check(folder), formats.check(out)
    assert after.format == "vptq"
    assert after.layouts == before.layouts
    assert after.details["tuned"]["steps"] == 4
    old, new = tensors_of(folder), tensors_of(out)
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old if name.endswith(".indices"))
    assert any(not torch.equal(old[name], new[name]) for name in old if name.endswith(".centroids.weight"))
    quantization = config_of(out)["quantization_config"]
    assert quantization["config_for_layers"] == config_of(folder)["quantization_config"]["config_for_layers"]
    assert quantization["modules_to_not_convert"] == config_of(folder)["quantization_config"]["modules_to_not_convert"]
    assert torch.equal(new["lm_head.weight"], new["model.embed_tokens.weight"])
    assert not out.with_name("out.work").exists()


def test_tuning_into_octavos_format_gives_the_same_weights(
    made: Callable[..., Any], wide: Wide, tuned: Any, tiny_text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "own"
    report = tune(made()[0], out, reference=wide(), format="octavo", calib=tiny_text_file, **TUNE)
    assert formats.check(out).format == "octavo"
    formats.verify(out)
    assert report.history == tuned[1].history
    convert(out, tmp_path / "vptq")
    assert same_bits(tensors_of(tmp_path / "vptq"), tensors_of(tuned[0]))


def test_an_interrupted_tuning_of_a_vptq_folder_continues(
    made: Callable[..., Any], wide: Wide, tuned: Any, tiny_text_file: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"reference": wide(), "calib": tiny_text_file, **TUNE}
    with pytest.raises(Interrupted):
        tune(made()[0], tmp_path / "out", stop=stop_after(2), **settings)
    tune(made()[0], tmp_path / "out", resume=True, **settings)
    assert digests(tmp_path / "out") == digests(tuned[0])


def test_what_a_failed_tuning_read_is_not_used_again(
    made: Callable[..., Any], vptq_folder: Path, wide: Wide, tiny_llama: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    out, settings = tmp_path / "out", {"calib": tiny_text_file, **TUNE, "steps": 2}
    with pytest.raises((UsageError, FormatError)):
        tune(vptq_folder, out, reference=tiny_llama, **settings)
    assert not list(tmp_path.iterdir())
    # Even if it is still there: the next job may be for another folder.
    convert(vptq_folder, tmp_path / "own", "octavo")
    out.with_name("out.work").mkdir()
    (tmp_path / "own").rename(tmp_path / "out.work" / "read")
    tune(made()[0], out, reference=wide(), **settings)
    assert formats.check(out).layouts == formats.check(made()[0]).layouts


def test_tuning_into_a_format_that_cannot_hold_the_model_is_refused_before_work(
    wide: Wide, tiny_text_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    run(wide(), folder, RTN)
    with pytest.raises(UsageError, match="the vptq format cannot hold these matrices"):
        tune(folder, tmp_path / "out", reference=wide(), format="vptq", calib=tiny_text_file, **TUNE)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_quantizing_with_a_tuning_stage_writes_vptq(wide: Wide, tiny_text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = run(wide(), out, job(tiny_text_file), tune={**TUNE, "steps": 2})
    assert report.tuned is not None
    assert report.tuned["kl_after"] <= report.tuned["kl_before"]
    formats.verify(out)
    config = formats.check(out)
    assert config.format == "vptq"
    assert config.details["tuned"]["steps"] == 2
    assert not (tmp_path / "out.work").exists()


def test_other_peoples_folders_can_be_tuned(
    vptq_folder: Path, wide: Wide, tiny_text_file: Path, tmp_path: Path
) -> None:
    """With groups, outliers, permutations and every kind of codebook."""
    folder, out = vptq_folder, tmp_path / "out"
    report = tune(folder, out, reference=wide(), calib=tiny_text_file, **{**TUNE, "steps": 2, "lr": 1e-2})
    assert report.model == folder.name
    old, new = tensors_of(folder), tensors_of(out)
    fixed = [name for name in old if name.endswith((".indices", ".outlier_indices", ".perm"))]
    assert all(torch.equal(old[name], new[name]) for name in fixed)
    assert old.keys() == new.keys()
    assert report.kl_after < report.kl_before
    formats.verify(out)
