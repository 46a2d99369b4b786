"""Quantized folders from one format to the other, bit for bit where that can be, and refused where it cannot."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import octavo
from faults.jobs import digests, gptq, make_quick, run
from formats.tiny_models import MODELS, write_tokenizer
from formats.tiny_models import quantize as quantize_at_random
from integration.vptq_models import MODULES, same_bits, tensors_of, write_vptq
from octavo import formats
from octavo._core.errors import FormatError, ResourceError, UsageError
from octavo.formats import ShardWriter
from octavo.layout import BlockScale, Layout
from octavo.models import quantized
from octavo.pipeline.convert import convert
from pipeline.vptq_jobs import OPTIONS, QUANTIZED, SKIP, config_of, job, kept_of, logits, weights_of

GOLDEN = Path(__file__).parents[1] / "golden" / "vptq"
Wide = Callable[..., Path]

pytestmark = pytest.mark.filterwarnings("ignore::octavo._core.clib.SlowPathWarning")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)


# ------------------------------------------------------------------------------------------------ there and back


def test_vptq_to_octavo_and_back_has_the_same_bytes(vptq_folder: Path, tmp_path: Path) -> None:
    folder, own, back = vptq_folder, tmp_path / "own", tmp_path / "back"
    first = convert(folder, own, "octavo")
    assert (first.format_before, first.format, first.matrices) == ("vptq", "octavo", len(MODULES))
    assert (first.rounded, first.rounding) == (0, 0.0)
    formats.verify(own)
    second = convert(own, back, "vptq")
    assert (second.rounded, second.rounding) == (0, 0.0)
    assert second.bits_per_weight == first.bits_before
    assert second.bits_before == first.bits_per_weight
    formats.verify(back)
    assert same_bits(tensors_of(back), tensors_of(folder))
    before, after = config_of(folder)["quantization_config"], config_of(back)["quantization_config"]
    assert after["config_for_layers"] == before["config_for_layers"]
    assert after["modules_to_not_convert"] == ["lm_head"]
    assert torch.equal(logits(back), logits(folder))
    assert torch.equal(logits(own), logits(folder))
    # Once more gives the same files.
    assert octavo.convert(own, tmp_path / "again").to_dict() == {**second.to_dict(), "output": str(tmp_path / "again")}
    assert digests(tmp_path / "again") == digests(back)


def test_a_tied_head_is_stored_in_vptq_and_left_out_in_octavo(vptq_folder: Path, tmp_path: Path) -> None:
    folder = vptq_folder
    convert(folder, tmp_path / "own", "octavo")
    assert "lm_head.weight" not in tensors_of(tmp_path / "own")
    convert(tmp_path / "own", tmp_path / "back")
    tensors = tensors_of(tmp_path / "back")
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    for name in ("own", "back"):
        model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_an_untied_head_is_stored_once_in_both(wide: Wide, tmp_path: Path) -> None:
    original, folder = wide("float16", False), tmp_path / "in"
    write_vptq(original, folder)
    convert(folder, tmp_path / "own", "octavo")
    convert(tmp_path / "own", tmp_path / "back")
    assert same_bits(tensors_of(tmp_path / "back"), tensors_of(folder))
    head = tensors_of(original)["lm_head.weight"]
    for name in ("own", "back"):
        tensors = tensors_of(tmp_path / name)
        assert torch.equal(tensors["lm_head.weight"], head)
        assert not torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])


@pytest.mark.parametrize("name", ["attention_bias", "flat", "partial", "plain", "residual", "shared"])
def test_files_of_the_published_package_become_octavos(tmp_path: Path, name: str) -> None:
    folder, expected = GOLDEN / name / "checkpoint", load_file(GOLDEN / name / "expected.safetensors")
    report = convert(folder, tmp_path / "own", "octavo")
    assert report.rounded == 0
    formats.verify(tmp_path / "own")
    for module, weight in formats.read_weights(tmp_path / "own"):
        matrix = expected.pop(f"{module}.weight")
        assert torch.equal(weight.dequantize(matrix.dtype), matrix)
    assert not [key for key in expected if key.endswith(".weight")]
    assert same_bits(kept_of(tmp_path / "own"), kept_of(folder))
    assert torch.equal(logits(tmp_path / "own"), logits(folder))
    # Their matrices are too narrow for the package's kernels.
    with pytest.raises(UsageError, match=r"inputs: its kernels know 257\.\.65536"):
        convert(tmp_path / "own", tmp_path / "back")


def test_small_files_go_along_and_the_record_is_kept(made: Callable[..., Any], tmp_path: Path) -> None:
    folder, _ = made("bfloat16", "vptq")
    convert(folder, tmp_path / "own", "octavo")
    convert(tmp_path / "own", tmp_path / "back")
    assert {p.name for p in (tmp_path / "own").iterdir()} == {p.name for p in folder.iterdir()}
    for path in folder.glob("*token*"):
        assert (tmp_path / "own" / path.name).read_bytes() == path.read_bytes()
    before, own = quantized.check(folder), quantized.check(tmp_path / "own")
    assert own.details == before.details
    assert own.method == before.method == "vptq"
    assert own.details["bits"] == 2.5
    assert digests(tmp_path / "back") == digests(folder)


def test_a_rounded_model_says_so_and_decodes_to_nearly_the_same(made: Callable[..., Any], tmp_path: Path) -> None:
    folder, _ = made("bfloat16", "octavo")
    assert {layout.codebook_dtype for layout in formats.check(folder).layouts.values()} == {"int8"}
    report = convert(folder, tmp_path / "out")
    assert report.rounded == report.matrices == len(QUANTIZED)
    before, after = weights_of(folder), weights_of(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = sum(float((after[module] - matrix).double().square().sum()) for module, matrix in before.items())
    total = sum(float(matrix.double().square().sum()) for matrix in before.values())
    assert report.rounding == pytest.approx((changed / total) ** 0.5, rel=1e-6)
    # bfloat16 has 8 bits: half a unit in the last place, relative, at most; about a third of it on average.
    assert 2**-11 < report.rounding < 2**-9
    for module, matrix in before.items():
        assert float((after[module] - matrix).norm() / matrix.norm()) < 2**-8
    for (module, weight), (_, new) in zip(
        sorted(formats.read_weights(folder)), sorted(formats.read_weights(tmp_path / "out")), strict=True
    ):
        assert torch.equal(weight.tensors["indices"], new.tensors["indices"]), module
        assert new.layout.codebook_dtype == new.layout.side_dtype == "bfloat16"
    assert same_bits(
        {n: t for n, t in kept_of(tmp_path / "out").items() if n != "lm_head.weight"},
        kept_of(folder),
    )


def test_a_float32_model_is_written_for_float16(made: Callable[..., Any], tmp_path: Path) -> None:
    folder, _ = made("float32", "octavo")
    report = convert(folder, tmp_path / "out")
    assert {layout.codebook_dtype for layout in formats.check(tmp_path / "out").layouts.values()} == {"float16"}
    config = config_of(tmp_path / "out")
    assert config["dtype"] == config["torch_dtype"] == "float16"
    assert 2**-14 < report.rounding < 2**-12


def test_conv1d_models_go_through(tmp_path: Path) -> None:
    """GPT-2's layers are transposed and have biases; one that is wide enough is written as VPTQ, too."""
    from transformers import GPT2Config, GPT2LMHeadModel

    original = tmp_path / "original"
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=256, n_embd=272, n_layer=1, n_head=4, n_positions=32)
    GPT2LMHeadModel(config).to(torch.float16).save_pretrained(original)  # type: ignore[arg-type]
    write_tokenizer(original)
    out, own, back = (tmp_path / name for name in ("out", "own", "back"))
    options = OPTIONS | {"vector_length": 4, "centroids": 16, "residual_centroids": 16}
    run(original, out, job(_text(tmp_path), format="octavo", options=options, skip=()))
    # Octavo's int8 codebooks and float16 biases to VPTQ's, from there on exactly.
    convert(out, back)
    assert {"transformer.h.0.attn.c_attn.bias", "transformer.h.0.mlp.c_fc.bias"} <= tensors_of(back).keys()
    report = convert(back, own, "octavo")
    assert report.rounded == 0
    assert torch.equal(logits(own), logits(back))
    convert(own, tmp_path / "again")
    assert same_bits(tensors_of(tmp_path / "again"), tensors_of(back))
    for module, matrix in weights_of(out).items():
        torch.testing.assert_close(weights_of(back)[module], matrix, rtol=2**-9, atol=1e-4)


def _text(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text("A short text, said again and again. " * 40)
    return path


# ------------------------------------------------------------------------------------------------ refusals


def nothing_new(folder: Path, before: set[Path]) -> bool:
    return set(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing", "is no folder"),
        ("no parent", "new for the output does not exist"),
        ("file", "is no folder"),
        ("original", "holds no quantized model that Octavo reads"),
        ("exists", "is there already"),
        ("inside", "lies inside of"),
        ("format", "unknown format 'gguf'"),
    ],
)
def test_wrong_folders_are_refused_before_anything_is_written(
    made: Callable[..., Any], wide: Wide, tmp_path: Path, case: str, message: str
) -> None:
    folder = Path(shutil.copytree(made()[0], tmp_path / "in"))
    out, to = tmp_path / "out", "octavo"
    if case == "no parent":
        out = tmp_path / "new" / "out"
    elif case == "missing":
        folder = tmp_path / "nowhere"
    elif case == "file":
        folder = folder / "config.json"
    elif case == "original":
        folder = wide()
    elif case == "exists":
        out = tmp_path / "there"
        out.mkdir()
    elif case == "inside":
        out = folder / "out"
    else:
        to = "gguf"
    before = set(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=message):
        convert(folder, out, to)
    assert nothing_new(tmp_path, before)


@pytest.mark.parametrize(
    ("style", "reason"),
    [
        (Layout((1, 8), 1, (3,), codebook_dtype="grid", block_scale=BlockScale(16, 3)), "uniform grids"),
        (Layout((1, 8), 2, (4,), "row"), "vectors of outputs, not of inputs"),
        (Layout((1, 8), 4, (5,)), "32 centroids: .* nearest 16 or 256"),
        (Layout((1, 8), 5, (4,)), "vectors of 5: .* nearest 4 or 6"),
        (Layout((1, 8), 4, (4, 2), tile=(400, 10)), "make them equal"),
        (Layout((1, 8), 4, (4,), block_scale=BlockScale(8)), "VPTQ has no block scales"),
        (Layout((1, 8), 4, (4,), channel_norm="output"), "norm of the input channels"),
        (Layout((1, 8), 4, (4,)), "48 inputs: its kernels know 257..65536"),
    ],
)
def test_what_the_package_cannot_read_is_refused_before_anything_is_written(
    tmp_path: Path, style: Layout, reason: str
) -> None:
    from dataclasses import replace

    from formats.strategies import random_weight

    original, folder = tmp_path / "original", tmp_path / "in"
    torch.manual_seed(0)
    MODELS["llama"]().save_pretrained(original)
    write_tokenizer(original)

    def restyle(weights: dict[str, Any]) -> None:
        for seed, (module, weight) in enumerate(list(weights.items())):
            weights[module] = random_weight(replace(style, shape=weight.layout.shape), seed, 0.1)

    quantize_at_random(original, folder, change=restyle)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=f"the vptq format cannot hold these matrices:(.|\n)*{reason}"):
        convert(folder, tmp_path / "out")
    assert nothing_new(tmp_path, before)


@pytest.mark.parametrize("method", ["gptq", "gptvq"])
def test_other_methods_are_refused_as_vptq(tiny_llama: Path, tiny_text_file: Path, tmp_path: Path, method: str) -> None:
    folder = tmp_path / "in"
    options = {"group_size": 32} if method == "gptq" else {}
    run(tiny_llama, folder, gptq(tiny_text_file, method=method, options=options, skip=SKIP))
    before = set(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match="cannot hold these matrices(.|\n)*--method vptq"):
        convert(folder, tmp_path / "out")
    assert nothing_new(tmp_path, before)
    # To its own format everything goes.
    convert(folder, tmp_path / "copy", "octavo")
    assert same_bits(tensors_of(tmp_path / "copy"), tensors_of(folder))
    assert formats.check(tmp_path / "copy").layouts == formats.check(folder).layouts


def test_a_damaged_folder_is_refused_and_nothing_is_left_behind(made: Callable[..., Any], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made()[0], tmp_path / "in"))
    shard = next(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10])
    before = set(tmp_path.rglob("*"))
    with pytest.raises(FormatError, match="truncated"):
        convert(folder, tmp_path / "out", "octavo")
    assert nothing_new(tmp_path, before)


def test_a_failing_disk_leaves_nothing_behind(
    made: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = made()
    real, calls = ShardWriter.add, []

    def add(self: ShardWriter, name: str, tensor: Tensor) -> None:
        calls.append(name)
        if len(calls) == 20:
            raise ResourceError("the disk is full")
        real(self, name, tensor)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "add", add)
        with pytest.raises(ResourceError, match="the disk is full"):
            convert(folder, tmp_path / "out", "octavo")
    assert len(calls) == 20
    assert not list(tmp_path.iterdir())
    # An error of the operating system is one of ours in the end.
    with monkeypatch.context() as patch:

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(ShardWriter, "finish", full)
        with pytest.raises(ResourceError):
            convert(folder, tmp_path / "out", "octavo")
    assert not list(tmp_path.iterdir())
    convert(folder, tmp_path / "out", "octavo")


def test_too_little_space_is_noticed_before_anything_is_written(
    made: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ResourceError, match="the octavo checkpoint"):
        convert(made()[0], tmp_path / "out", "octavo")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", ["quantize", "convert"])
def test_a_tied_model_that_stores_only_its_head_keeps_it(
    how: str, wide: Callable[..., Path], tiny_text_file: Path, tmp_path: Path
) -> None:
    source = tmp_path / "head-only"
    shutil.copytree(wide(), source)
    tensors = load_file(source / "model.safetensors")
    head = tensors.pop("model.embed_tokens.weight")
    save_file({**tensors, "lm_head.weight": head}, source / "model.safetensors", {"format": "pt"})
    widths = {"vector_length": 4, "centroids": 256, "residual_centroids": 0}
    settings = job(tiny_text_file, options=OPTIONS | widths)
    if how == "quantize":
        run(source, tmp_path / "out", settings)
    else:
        run(source, tmp_path / "own", settings | {"format": "octavo"})
        convert(tmp_path / "own", tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    assert torch.equal(found["lm_head.weight"], head)
    assert torch.equal(found["model.embed_tokens.weight"], head)
    octavo.load(tmp_path / "out")


def test_rounded_scales_are_reported_and_not_called_equal(
    wide: Callable[..., Path], tiny_text_file: Path, tmp_path: Path
) -> None:
    options = {"vector_length": 4, "centroids": 256, "residual_centroids": 0, "norm": True}
    changes = {"options": OPTIONS | options | {"codebook_dtype": "bfloat16"}, "side_dtype": "float32"}
    run(wide(), tmp_path / "own", job(tiny_text_file, format="octavo", **changes))
    report = convert(tmp_path / "own", tmp_path / "out")
    before, after = weights_of(tmp_path / "own"), weights_of(tmp_path / "out")
    assert report.rounded == sum(not torch.equal(before[name], after[name]) for name in before) == report.matrices
    assert 0 < report.rounding < 2**-7


def test_damaged_bytes_get_no_new_manifest(made: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(made()[0], folder)
    file = next(folder.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(FormatError, match="changed or damaged"):
        convert(folder, tmp_path / "out", "octavo")
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_a_parent_that_cannot_be_written_to_is_refused(
    made: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("octavo.pipeline.convert.tempfile.mkdtemp", refuse)
    with pytest.raises(UsageError, match=r"cannot write to .*Permission denied"):
        convert(made()[0], tmp_path / "out", "octavo")
