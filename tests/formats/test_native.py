"""The native format: what is written comes back bit for bit, what does not fit is refused, old files stay readable."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from formats.checkpoints import edit_header, edit_json, write_native
from formats.strategies import layouts, random_weight, raw
from octavo import formats
from octavo._core.errors import FormatError, UsageError
from octavo.formats import native
from octavo.formats.reader import CheckpointReader
from octavo.formats.writer import ShardWriter
from octavo.layout import BlockScale, Layout
from octavo.weight import VQWeight
from oracle.decode import decode

GOLDEN = [Path(__file__).parents[1] / "golden" / name for name in ("native_v1", "native_v1_scales")]
PERMUTED = Layout(shape=(6, 8), vector_length=3, stages=(2, 3), permuted=True, channel_norm="input", bias=True)
PLAIN = Layout(shape=(8, 6), vector_length=2, stages=(4,), direction="row")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two quantized matrices and one plain tensor in two shards."""
    weights = {"block.0.q": random_weight(PERMUTED, 1), "block.0.o": random_weight(PLAIN, 2)}
    write_native(tmp_path / "out", weights, {"norm.weight": torch.ones(6)}, {"model_type": "x"}, max_shard_bytes=200)
    assert len(CheckpointReader(tmp_path / "out").files) > 1
    return tmp_path / "out"


@pytest.fixture(params=GOLDEN, ids=lambda path: path.name)
def golden(request: pytest.FixtureRequest) -> Path:
    """A golden folder: the checkpoint and what it decodes to."""
    return request.param


def shard_of(folder: Path, name: str) -> Path:
    return CheckpointReader(folder).file_of(name)


# ------------------------------------------------------------------------------------------------ round trips


@settings(max_examples=60, deadline=None)
@given(drawn=st.lists(layouts(24), min_size=1, max_size=3), seed=st.integers(0, 2**31), limit=st.integers(64, 4096))
def test_random_weights_come_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[Layout], seed: int, limit: int
) -> None:
    folder = tmp_path_factory.mktemp("round")
    weights = {f"m.{i}.proj": random_weight(layout, seed + i) for i, layout in enumerate(drawn)}
    write_native(folder, weights, max_shard_bytes=limit)
    formats.verify(folder)
    back = dict(formats.read_weights(folder))
    assert list(back) == list(weights)
    for module, weight in weights.items():
        assert back[module].layout == weight.layout
        assert raw(back[module]) == raw(weight)
        assert torch.equal(back[module].dequantize(), weight.dequantize())
    shutil.rmtree(folder)


@settings(max_examples=100, deadline=None)
@given(drawn=st.lists(layouts(), max_size=6))
def test_config_survives_json_and_stores_each_layout_once(drawn: list[Layout]) -> None:
    wanted = {f"m.{i}": layout for i, layout in enumerate([*drawn, *drawn])}
    config = native.quantization_config(wanted, "vptq", {"bits": 2.25})
    assert len(config["layouts"]) == len(set(drawn))
    assert json.loads(json.dumps(config)) == config
    parsed = native.parse_config(json.loads(json.dumps(config)), "config.json")
    assert parsed.layouts == wanted
    assert (parsed.method, parsed.details, parsed.raw) == ("vptq", {"bits": 2.25}, config)


@pytest.mark.parametrize("details", [{"x": float("nan")}, {"x": object()}, {"x": b"y"}])
def test_details_must_be_json(details: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="details"):
        native.quantization_config({}, "rtn", details)


# ------------------------------------------------------------------------------------------------ golden files


def test_golden_checkpoint_decodes_to_the_stored_numbers(golden: Path) -> None:
    formats.verify(golden / "checkpoint")
    wanted = load_file(golden / "decoded.safetensors")
    hashes = json.loads((golden / "decoded.json").read_text())
    weights = dict(formats.read_weights(golden / "checkpoint"))
    assert weights.keys() == wanted.keys() == hashes.keys()
    for module, weight in weights.items():
        matrix = weight.dequantize()
        assert torch.equal(matrix, wanted[module])
        assert hashlib.sha256(matrix.numpy().tobytes()).hexdigest() == hashes[module]


def test_golden_numbers_are_those_of_the_independent_decoder(golden: Path) -> None:
    stored = load_file(golden / "decoded.safetensors")
    for module, weight in formats.read_weights(golden / "checkpoint"):
        wanted = decode(weight.layout.to_dict(), raw(weight))
        np.testing.assert_allclose(stored[module].numpy(), wanted, rtol=0, atol=1e-6)


def test_golden_checkpoint_is_written_to_the_same_bytes_today(golden: Path, tmp_path: Path) -> None:
    source = CheckpointReader(golden / "checkpoint")
    assert len(source.files) == 2
    writer = ShardWriter(tmp_path, max_shard_bytes=3000)
    order = json.loads((golden / "order.json").read_text())
    for name in order:
        writer.add(name, source.read(name))
    writer.finish()
    for file in source.files:
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_golden_config_is_what_quantization_config_writes(golden: Path) -> None:
    config = formats.check(golden / "checkpoint")
    again = native.quantization_config(config.layouts, config.method, config.details)
    assert {**again, "octavo_version": config.raw["octavo_version"]} == config.raw


# ------------------------------------------------------------------------------------------------ config


@pytest.mark.parametrize("version", [2, 0, "1", None, 1.0, True])
def test_other_format_versions_are_refused_naming_both(folder: Path, version: Any) -> None:
    change: dict[str, Any] = {"format_version": version, "octavo_version": "9.9"}
    edit_json(folder / "config.json", lambda c: c["quantization_config"].update(change))
    with pytest.raises(FormatError, match=rf"format version {version!r} .*Octavo 9\.9.*reads format version 1"):
        formats.check(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(quant_method="gptq"), "no quantized checkpoint .*'gptq'"),
        (lambda q: q.pop("quant_method"), "no quantized checkpoint .*None"),
        (lambda q: q.update(layout=[]), "unknown key 'layout'.*Did you mean 'layouts'"),
        (lambda q: q.update(layouts={}), "layouts of type list"),
        (lambda q: q.pop("modules"), "modules of type dict"),
        (lambda q: q.update(method=3), "method of type str"),
        (lambda q: q.pop("details"), "details of type dict"),
        (lambda q: q.update(layouts=[3]), "layout 0 is no object"),
        (lambda q: q["layouts"][0].update(vector_lenght=3), "unknown layout key 'vector_lenght'"),
        (lambda q: q["layouts"][0].update(vector_length=17), "vector length wanted 1..16, got 17"),
        (lambda q: q["layouts"][0].update(shape=[0, 8]), "features wanted"),
        (lambda q: q["layouts"][0].update(shape=[-6, 8]), "features wanted"),
        (lambda q: q["layouts"][0].update(shape=[2**40, 8]), "features wanted"),
        (lambda q: q["layouts"][0].update(shape=8), "layout 0"),
        (lambda q: q["layouts"][0].update(stages=[]), "at least one codebook stage"),
        (lambda q: q["layouts"][0].update(codebook_rank=2), "codebook rank needs one stage"),
        (lambda q: q["layouts"][0].update(codebook_rank=-1), "codebook rank wanted 0..65536, got -1"),
        (
            lambda q: q["layouts"][1].update(codebook_rank=1, codebook_dtype="int4"),
            "a codebook that is stored, and not as int4",
        ),
        (lambda q: q["layouts"][0].update(codebook_dtype="int2"), "unknown codebook dtype 'int2'"),
        (lambda q: q["layouts"][0].update(block_scale={"columns": 4, "log2_bits": 9}), "log2 scale bits wanted 0..8"),
        (lambda q: q["layouts"][0].pop("stages"), "layout 0"),
        (lambda q: q["modules"].update({"block.0.q": 2}), "module block.0.q wanted a layout number below 2, got 2"),
        (lambda q: q["modules"].update({"block.0.q": -1}), "got -1"),
        (lambda q: q["modules"].update({"block.0.q": True}), "got True"),
        (lambda q: q["modules"].update({"../q": 0}), "is no module path"),
        (lambda q: q["modules"].update({"": 0}), "is no module path"),
    ],
)
def test_illegal_configs_are_refused(folder: Path, change: Callable[[Any], Any], message: str) -> None:
    edit_json(folder / "config.json", lambda c: change(c["quantization_config"]))
    with pytest.raises(FormatError, match=message):
        formats.check(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"model_type": "llama"}', '{"quantization_config": []}'])
def test_config_files_that_are_none_are_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(FormatError, match="not valid JSON|a JSON object is wanted|no quantized checkpoint"):
        formats.check(folder)


def test_missing_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(FormatError, match=r"config.json does not exist"):
        formats.check(folder)
    assert not formats.is_quantized(folder)


# ------------------------------------------------------------------------------------------------ tensors


def rename(folder: Path, old: str, new: str) -> None:
    """Rename a tensor in its shard and in the index."""
    edit_header(shard_of(folder, old), lambda header: header.update({new: header.pop(old)}))
    edit_json(
        folder / "model.safetensors.index.json", lambda i: i["weight_map"].update({new: i["weight_map"].pop(old)})
    )
    (folder / formats.MANIFEST_FILE).unlink()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("block.0.q.permutation", "block.0.x", "tensor block.0.q.permutation is missing"),
        ("block.0.q.indices", "block.1.q.indices", "tensor block.0.q.indices is missing"),
        ("norm.weight", "block.0.q.weight", "block.0.q.weight is unknown: the layout of block.0.q .* has no weight"),
        ("norm.weight", "block.0.q.codebook_2", "block.0.q.codebook_2 is unknown"),
        ("norm.weight", "block.9.q.codebook_0", "block.9.q.codebook_0 belongs to a quantized matrix"),
    ],
)
def test_missing_and_unknown_tensors_are_refused(folder: Path, old: str, new: str, message: str) -> None:
    rename(folder, old, new)
    with pytest.raises(FormatError, match=message):
        formats.check(folder)


def test_matrix_that_the_config_forgets_is_refused(folder: Path) -> None:
    edit_json(folder / "config.json", lambda c: c["quantization_config"]["modules"].pop("block.0.o"))
    with pytest.raises(FormatError, match="block.0.o.* belongs to a quantized matrix that config.json does not list"):
        formats.check(folder)


@pytest.mark.parametrize("dtype", ["BF16", "I16"])
def test_tensor_of_another_dtype_is_refused(folder: Path, dtype: str) -> None:
    name = "block.0.q.codebook_0"
    edit_header(shard_of(folder, name), lambda header: header[name].update(dtype=dtype))
    with pytest.raises(FormatError, match=rf"{name} wanted torch.float16 \(1, 4, 3\) .* got torch\.\w+ \(1, 4, 3\)"):
        formats.check(folder)


def test_tensor_of_another_shape_is_refused(folder: Path) -> None:
    name = "block.0.q.codebook_0"
    edit_header(shard_of(folder, name), lambda header: header[name].update(shape=[1, 3, 4]))
    with pytest.raises(FormatError, match=rf"{name} wanted torch.float16 \(1, 4, 3\) .* got torch.float16 \(1, 3, 4\)"):
        formats.check(folder)


def test_shard_of_another_size_than_the_manifest_says_is_refused(folder: Path) -> None:
    shard = shard_of(folder, "block.0.q.indices")
    edit_json(folder / formats.MANIFEST_FILE, lambda m: m["files"][shard.name].update(bytes=1))
    with pytest.raises(FormatError, match=rf"{shard.name} has \d+ bytes, octavo_manifest.json says 1"):
        formats.check(folder)


def replace_tensor(folder: Path, name: str, value: torch.Tensor) -> None:
    """Store another value of the same dtype and shape, and make the manifest agree."""
    shard = shard_of(folder, name)
    tensors = load_file(shard)
    assert tensors[name].dtype == value.dtype and tensors[name].shape == value.shape
    save_file({**tensors, name: value}, shard)
    formats.write_manifest(folder)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["codebook_1", "channel_scale", "channel_offset", "bias"])
def test_non_finite_books_and_scales_are_refused(folder: Path, name: str, bad: float) -> None:
    value = CheckpointReader(folder).read(f"block.0.q.{name}").clone()
    value.view(-1)[-1] = bad
    replace_tensor(folder, f"block.0.q.{name}", value)
    formats.check(folder)
    with pytest.raises(FormatError, match=f"block.0.q: {name} holds NaN or infinity"):
        dict(formats.read_weights(folder))


SCALED = Layout(
    shape=(6, 8),
    vector_length=2,
    stages=(3,),
    direction="row",
    tile=(3, 4),
    block_scale=BlockScale(4, 0, 4),
    codebook_rank=2,
)
INT4 = Layout(shape=(6, 8), vector_length=3, stages=(2,), codebook_dtype="int4", tile=(3, 4))


@pytest.fixture
def scaled(tmp_path: Path) -> Path:
    """Two matrices with low-rank codebooks and log2 scales (k) and with int4 codebooks (v)."""
    write_native(tmp_path / "scaled", {"block.0.k": random_weight(SCALED, 1), "block.0.v": random_weight(INT4, 2)})
    formats.verify(tmp_path / "scaled")
    return tmp_path / "scaled"


@pytest.mark.parametrize(
    "name",
    ["k.codebook_coefficient_0", "k.codebook_basis_0", "k.block_scale_low", "k.block_scale_step", "v.codebook_scale_0"],
)
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_non_finite_parts_of_books_and_scales_are_refused(scaled: Path, name: str, bad: float) -> None:
    value = CheckpointReader(scaled).read(f"block.0.{name}").clone()
    value.view(-1)[-1] = bad
    replace_tensor(scaled, f"block.0.{name}", value)
    module, _, leaf = name.partition(".")
    with pytest.raises(FormatError, match=f"block.0.{module}: {leaf} holds NaN or infinity"):
        formats.verify(scaled)


def test_scales_that_overflow_once_decoded_are_refused(scaled: Path) -> None:
    replace_tensor(scaled, "block.0.k.block_scale_step", torch.tensor([0, 10], dtype=torch.float16))
    with pytest.raises(FormatError, match=r"block.0.k: block_scale_low and block_scale_step reach the scale 2\^1\d\d"):
        formats.verify(scaled)


@pytest.mark.parametrize(
    ("name", "shape", "wrong"),
    [
        ("k.codebook_coefficient_0", [4, 2], [2, 4]),
        ("k.codebook_basis_0", [2, 8, 2], [2, 2, 8]),
        ("k.block_scale_code", [2, 1], [1, 2]),
        ("k.block_scale_low", [2], [1, 2]),
        ("k.block_scale_step", [2], [2, 1]),
        ("v.codebook_0", [1, 6], [6, 1]),
        ("v.codebook_scale_0", [4], [4, 1]),
    ],
)
def test_parts_of_books_and_scales_of_another_shape_are_refused(
    scaled: Path, name: str, shape: list[int], wrong: list[int]
) -> None:
    path = scaled / "model.safetensors"
    edit_header(path, lambda header: header[f"block.0.{name}"].update(shape=wrong))
    message = f"block.0.{name} wanted torch.* {tuple(shape)} by its layout .* got torch.* {tuple(wrong)}"
    with pytest.raises(FormatError, match=message.replace("(", r"\(").replace(")", r"\)")):
        formats.check(scaled)


@pytest.mark.parametrize("name", ["k.block_scale_code", "v.codebook_0"])
def test_every_bit_pattern_of_packed_books_and_scales_is_legal(scaled: Path, name: str) -> None:
    for fill in (0, -1, 0x55555555):
        words = torch.full_like(CheckpointReader(scaled).read(f"block.0.{name}"), fill)
        replace_tensor(scaled, f"block.0.{name}", words)
        assert all(bool(torch.isfinite(weight.dequantize()).all()) for _, weight in formats.read_weights(scaled))


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5, 6, 6], [0, 1, 2, 3, 4, 5, 6, 8], [-1, 1, 2, 3, 4, 5, 6, 7]])
def test_permutations_that_are_none_are_refused(folder: Path, order: list[int]) -> None:
    replace_tensor(folder, "block.0.q.permutation", torch.tensor(order, dtype=torch.int16))
    with pytest.raises(FormatError, match="block.0.q: permutation is no permutation"):
        formats.verify(folder)


def test_every_bit_pattern_of_the_indices_is_legal(folder: Path) -> None:
    for fill in (0, -1, 0x55555555):
        words = torch.full_like(CheckpointReader(folder).read("block.0.q.indices"), fill)
        replace_tensor(folder, "block.0.q.indices", words)
        assert bool(torch.isfinite(dict(formats.read_weights(folder))["block.0.q"].dequantize()).all())


# ------------------------------------------------------------------------------------------------ manifest


def test_manifest_lists_every_file_with_size_and_hash(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "tokenizer.json").write_text("{}")
    (folder / ".hidden").write_text("x")
    manifest = formats.write_manifest(folder)
    shards = {f.name for f in CheckpointReader(folder).files}
    assert manifest["files"].keys() == {"config.json", "model.safetensors.index.json", "sub/tokenizer.json"} | shards
    entry = manifest["files"]["sub/tokenizer.json"]
    assert entry == {"bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}
    assert json.loads((folder / formats.MANIFEST_FILE).read_text()) == manifest
    assert str(folder) not in (folder / formats.MANIFEST_FILE).read_text()
    assert formats.problems(folder) == []


def test_one_flipped_bit_anywhere_is_found(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        if path.name == formats.MANIFEST_FILE:
            continue
        good = path.read_bytes()
        path.write_bytes(good[:-5] + bytes([good[-5] ^ 1]) + good[-4:])
        assert any(path.name in problem and "SHA-256" in problem for problem in formats.problems(folder)), path
        path.write_bytes(good)
    formats.verify(folder)


def test_all_problems_are_reported_together(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "extra.json").write_text("{}")
    (folder / "README.md").write_text("not our business")
    shard = shard_of(folder, "norm.weight")
    with open(shard, "ab") as file:
        file.write(b"x")
    (folder / "model.safetensors.index.json").unlink()
    found = "\n".join(formats.problems(folder))
    for message in (
        "no quantized checkpoint",
        "index.json is missing",
        f"{shard.name} has",
        "extra.json is not listed",
    ):
        assert message in found
    assert "README" not in found
    with pytest.raises(FormatError, match="no quantized checkpoint"):
        formats.verify(folder)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (None, "does not exist"),
        ({}, "format version None is unknown; this Octavo reads version 1"),
        ({"format_version": 2, "files": {}}, "format version 2 is unknown; this Octavo reads version 1"),
        ({"format_version": 1}, "'files' is wanted"),
        ({"format_version": 1, "files": {"../../etc/passwd": {"bytes": 1, "sha256": ""}}}, "no file name inside"),
        ({"format_version": 1, "files": {"/etc/passwd": {"bytes": 1, "sha256": ""}}}, "no file name inside"),
        ({"format_version": 1, "files": {"a": {"bytes": "1", "sha256": ""}}}, "wanted 'bytes' and 'sha256'"),
        ({"format_version": 1, "files": {"a": 7}}, "wanted 'bytes' and 'sha256'"),
    ],
)
def test_illegal_manifests_are_refused(folder: Path, manifest: Any, message: str) -> None:
    path = folder / formats.MANIFEST_FILE
    path.unlink() if manifest is None else path.write_text(json.dumps(manifest))
    with pytest.raises(FormatError, match=message):
        formats.verify(folder)


def test_a_checkpoint_without_a_manifest_still_loads(folder: Path) -> None:
    (folder / formats.MANIFEST_FILE).unlink()
    formats.check(folder)
    assert all(isinstance(weight, VQWeight) for _, weight in formats.read_weights(folder))
