"""VPTQ's format: what the published package decodes, we decode to the same bits, and what we write is what it reads."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from formats.strategies import random_weight
from formats.vptq_folders import (
    Entry,
    Floats,
    Form,
    make_entry,
    make_tensors,
    quantization,
    random_entry,
    raw,
    write_folder,
)
from golden.vptq_layers import DTYPES, inputs_sha256, random_layer, sha256
from octavo import formats
from octavo._core.errors import FormatError, NumericalError, UsageError
from octavo.formats._vptq_config import Geometry
from octavo.formats.reader import CheckpointReader
from octavo.formats.vptq import VPTQFormat
from octavo.layout import BlockScale, Layout, Outliers
from octavo.weight import VQWeight
from oracle.vptq_file import decode

GOLDEN = Path(__file__).parents[1] / "golden" / "vptq"
LAYERS: list[dict[str, Any]] = json.loads((GOLDEN / "layers.json").read_text())["layers"]
CHECKPOINTS = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
CHUNKS = 4
VPTQ = VPTQFormat()


def same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    """The same names, dtypes and bytes."""
    return raw(found) == raw(wanted)


# ------------------------------------------------------------------------------------------------ the published package


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_layers_decode_to_the_bits_of_the_published_package_and_are_written_as_they_were(
    tmp_path: Path, chunk: int
) -> None:
    entries = {f"m.{i}.proj": LAYERS[i] for i in range(chunk, len(LAYERS), CHUNKS)}
    stored = {module: random_layer(entry) for module, entry in entries.items()}
    config = quantization({module: entry["layer"] for module, entry in entries.items()})
    seen = 0
    for module, weight in formats.read_weights(write_folder(tmp_path / "x", stored, config)):
        entry, tensors = entries[module], stored[module]
        assert inputs_sha256(tensors) == entry["inputs"], module
        dtype = DTYPES[entry["dtype"]]
        decoded = weight.dequantize(dtype)
        assert sha256(decoded) == entry["weight"], (module, entry["layer"])
        fitted = VPTQ.fit(weight, VPTQ.adapt(weight.layout, dtype), module)
        wanted, geometry = dict(tensors), entry["layer"] | {"bias": bool(entry["layer"]["bias"])}
        if not geometry["enable_norm"]:
            # A norm is always written: this one changes nothing.
            inputs = geometry["in_features"]
            wanted |= {"weight_scale": torch.ones(inputs, dtype=dtype), "weight_bias": torch.zeros(inputs, dtype=dtype)}
            geometry["enable_norm"] = True
            assert torch.equal(fitted.dequantize(dtype), decoded), module
        encoded = VPTQ.encode(fitted)
        assert same(encoded, wanted), module
        assert Geometry.of_layout(fitted.layout).entry() == geometry
        assert VPTQ.bits(fitted.layout) == sum(8 * t.nbytes for t in encoded.values()), module
        seen += 1
    assert seen == len(entries)


def test_there_are_two_hundred_golden_layers_over_all_geometries() -> None:
    layers = [entry["layer"] for entry in LAYERS]
    assert len(layers) >= 200
    assert {layer["num_centroids"][1].bit_length() - 1 for layer in layers} == set(range(1, 17))
    assert {max(layer["num_res_centroids"][1], 1).bit_length() - 1 for layer in layers} == set(range(17))
    assert {layer["vector_lens"][1] for layer in layers} == set(range(1, 17))
    assert {layer["group_num"] for layer in layers} >= {1, 2, 3, 4}
    assert {entry["dtype"] for entry in LAYERS} == {"float16", "bfloat16"}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_decode_to_the_bits_of_the_published_package(name: str) -> None:
    folder, expected = GOLDEN / name / "checkpoint", load_file(GOLDEN / name / "expected.safetensors")
    config = formats.check(folder)
    matrices = {key.removesuffix(".weight"): value for key, value in expected.items() if key.endswith(".weight")}
    weights = dict(formats.read_weights(folder))
    assert config.format == "vptq" and config.matrices.keys() == matrices.keys() == weights.keys()
    for module, wanted in matrices.items():
        assert torch.equal(weights[module].dequantize(wanted.dtype), wanted), module
    reader = CheckpointReader(folder)
    owned = {key for key in reader.names() if any(key.startswith(f"{module}.") for module in matrices)}
    assert config.tensors().keys() == owned
    stored, count = sum(reader.bytes(key) for key in owned), sum(matrix.numel() for matrix in matrices.values())
    assert config.bits_per_weight == 8 * stored / count


def test_golden_checkpoints_cover_the_forms_of_the_config() -> None:
    found = {name: formats.raw_config(GOLDEN / name / "checkpoint") or {} for name in CHECKPOINTS}
    assert len(found) == 6
    assert "shared_layer_config" in found["shared"] and "config_for_layers" in found["plain"]
    assert not {"shared_layer_config", "config_for_layers"} & found["flat"].keys()


# ------------------------------------------------------------------------------------------------ beyond its limits


def agrees(weight: VQWeight, entry: Entry, tensors: Mapping[str, Tensor], dtypes: tuple[str, ...], where: str) -> None:
    """The weight decodes, in each dtype, to the bits of the independent decoder."""
    for name in dtypes:
        wanted = torch.from_numpy(decode(entry, raw(tensors), name))
        found = weight.dequantize(getattr(torch, name)).double()
        assert torch.equal(found, wanted), (where, name, entry)
    if entry["bias"]:
        assert weight.bias is not None and torch.equal(weight.bias.double(), tensors["bias"].double()), where
    else:
        assert weight.bias is None


@pytest.mark.parametrize("floats", ["float16", "bfloat16", "float32", "mixed"])
def test_any_geometry_decodes_as_the_format_says(tmp_path: Path, floats: Floats) -> None:
    rng = random.Random(floats)
    entries = {f"m.{i}.proj": random_entry(rng) for i in range(40)}
    drawn = list(entries.values())
    assert any(e["num_res_centroids"][1] > e["num_centroids"][1] for e in drawn)
    assert any(e.get("norm_dim") for e in drawn) and any(not e["is_indice_packed"] for e in drawn)
    stored = {module: make_tensors(entry, i, floats) for i, (module, entry) in enumerate(entries.items())}
    folder = write_folder(tmp_path / "x", stored, quantization(entries), max_shard_bytes=20_000)
    config = formats.check(folder)
    for module, weight in formats.read_weights(folder):
        # Of several dtypes, float32 is the one that all are widened to; a norm may be in it for books that are not.
        step = "float32" if floats == "mixed" else floats
        agrees(weight, entries[module], stored[module], (step,), module)
        assert config.matrices[module].bits() == sum(8 * t.nbytes for t in stored[module].values())


def test_floats_of_several_dtypes_are_widened_exactly(tmp_path: Path) -> None:
    entry = make_entry(9, groups=(1, 12), residual=4, outliers=(2, 3, 8), norm=True, bias=True)
    tensors = make_tensors(entry, 3, "bfloat16")
    tensors["res_centroids.weight"] = tensors["res_centroids.weight"].half()
    ((_, weight),) = formats.read_weights(write_folder(tmp_path / "x", {"m.q": tensors}, quantization({"m.q": entry})))
    assert weight.layout.codebook_dtype == "float32" and weight.layout.side_dtype == "bfloat16"
    agrees(weight, entry, tensors, ("float32",), "m.q")


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_rows_of_few_bits_are_read(tmp_path: Path, columns: int) -> None:
    # The published package takes the padding of such rows for indices.
    for bits in (1, 2, 5):
        entry = make_entry(13, groups=(3, columns), centroids=1 << bits)
        tensors = make_tensors(entry, bits)
        folder = write_folder(tmp_path / str(bits), {"m.q": tensors}, quantization({"m.q": entry}))
        ((_, weight),) = formats.read_weights(folder)
        agrees(weight, entry, tensors, ("float16",), f"{columns} x {bits}")


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint16, torch.float16])
def test_sixteen_bit_indices_are_read_whatever_they_are_called(tmp_path: Path, dtype: torch.dtype) -> None:
    entry = make_entry(
        33, groups=(2, 9), centroids=1 << 16, residual=8, outliers=(4, 4, 1 << 16), permuted=True, packed=False
    )
    tensors = make_tensors(entry, 5)
    assert int(tensors["indices"].min()) < 0, "numbers beyond int16 are wanted here"
    for name in ("indices", "res_indices", "outlier_indices"):
        tensors[name] = tensors[name].view(dtype)
    # As the published package declares it for layers that are not packed.
    tensors["perm"] = tensors["perm"].long() & 0xFFFF
    ((_, weight),) = formats.read_weights(write_folder(tmp_path / "x", {"m.q": tensors}, quantization({"m.q": entry})))
    agrees(weight, entry, tensors, ("float16",), str(dtype))


@pytest.mark.parametrize("form", ["paths", "shared", "flat", "text"])
def test_every_place_of_the_entries_is_found(tmp_path: Path, form: Form) -> None:
    entries = {
        f"model.layers.{i}.{leaf}": make_entry(8, groups=(1, columns), residual=4, norm=True)
        for i in range(2)
        for leaf, columns in (("q_proj", 6), ("mlp.down_proj", 7))
    }
    stored = {module: make_tensors(entry, i) for i, (module, entry) in enumerate(entries.items())}
    folder = write_folder(tmp_path / "x", stored, quantization(entries, form), form)
    assert formats.is_quantized(folder)
    assert formats.check(folder).matrices.keys() == entries.keys()
    for module, weight in formats.read_weights(folder):
        agrees(weight, entries[module], stored[module], ("float16",), module)


def test_an_entry_by_path_goes_before_a_shared_one(tmp_path: Path) -> None:
    shared, own = make_entry(8, groups=(1, 6)), make_entry(8, groups=(2, 3))
    stored = {"m.0.q": make_tensors(shared, 0), "m.1.q": make_tensors(own, 1)}
    config = {**quantization({"m.1.q": own}), **quantization({"q": shared}, "shared")}
    config |= {"modules_to_not_convert": None, "enable_proxy_error": False, "something": "new"}
    found = formats.check(write_folder(tmp_path / "x", stored, config)).layouts
    assert found["m.0.q"].books == 1 and found["m.1.q"].books == 2


# ------------------------------------------------------------------------------------------------ GPTQModel's dialect

#: Setting, inputs, and what they make: (outliers, groups, columns of each).
DIALECT: list[tuple[dict[str, Any], int, tuple[int, int, int]]] = [
    ({}, 10, (0, 1, 10)),
    ({"group_num": -1, "group_size": -1}, 11, (0, 1, 11)),
    ({"group_num": 5}, 10, (0, 5, 2)),
    ({"group_num": 3}, 10, (0, 3, 4)),  # the last group is padded
    ({"group_num": 7}, 10, (0, 7, 2)),  # two groups are nothing but padding
    ({"group_num": 4}, 9, (0, 4, 3)),
    ({"group_size": 8}, 30, (0, 4, 8)),
    ({"group_size": 64}, 30, (0, 1, 64)),  # one group, mostly padding
    ({"group_num": 4, "npercent": 10}, 31, (7, 4, 6)),  # outliers take what the groups leave
    ({"group_num": 3, "npercent": 0.5}, 31, (1, 3, 10)),
    ({"group_size": 16, "npercent": 20.0}, 20, (4, 1, 16)),
    ({"group_size": 16, "npercent": 20}, 22, (5, 2, 16)),
    ({"group_size": 16, "npercent": 50}, 20, (10, 1, 16)),
    ({"npercent": 1, "vector_lens": [1, 3], "num_centroids": [4, 32]}, 12, (1, 1, 11)),  # outliers one by one
    ({"group_num": 3, "npercent": 0, "vector_lens": [8, 3], "num_centroids": [4, 32]}, 10, (0, 3, 4)),
    ({"group_num": 2, "enable_norm": True, "norm_dim": 1, "enable_perm": True}, 9, (0, 2, 5)),
]


@pytest.mark.parametrize(("setting", "inputs", "split"), DIALECT)
def test_the_one_setting_of_gptqmodel_gives_every_matrix_its_geometry(
    tmp_path: Path, setting: dict[str, Any], inputs: int, split: tuple[int, int, int]
) -> None:
    outliers, groups, columns = split
    config: dict[str, Any] = {
        "quant_method": "vptq",
        "format": "vptq",
        "bits": 2,
        "vector_lens": [4 if outliers else -1, 3],
        "num_centroids": [16 if outliers else -1, 32],
        "num_res_centroids": [-1, 4],
        "npercent": 0.0,
        "group_size": -1,
        "group_num": -1,
        "enable_norm": True,
        "norm_dim": 0,
        "enable_perm": True,
        **setting,
    }
    entry = {
        **{key: config[key] for key in ("vector_lens", "num_centroids", "num_res_centroids", "norm_dim")},
        **{"in_features": inputs, "out_features": 10, "outlier_size": outliers},
        **{"group_num": groups, "group_size": columns, "is_indice_packed": True, "indices_as_float": False},
        **{"enable_norm": config["enable_norm"], "enable_perm": config["enable_perm"], "bias": True},
    }
    tensors = make_tensors(entry, 7, wide=True)
    assert tensors["perm"].dtype == torch.int32 and all(
        t.dtype == torch.int32 for name, t in tensors.items() if name == "outlier_indices"
    )
    folder = write_folder(tmp_path / "x", {"m.q": tensors}, config)
    asked: list[str] = []

    def shapes(module: str) -> tuple[int, int]:
        asked.append(module)
        return 10, inputs

    assert formats.check(folder, shapes=shapes).matrices["m.q"].bits() == sum(8 * t.nbytes for t in tensors.values())
    assert asked == ["m.q"]
    ((_, weight),) = formats.read_weights(folder, shapes)
    agrees(weight, entry, tensors, ("float16",), "m.q")
    with pytest.raises(FormatError, match="GPTQModel's files do not say the shapes"):
        formats.check(folder)


# ------------------------------------------------------------------------------------------------ what is written

GOOD = Layout(shape=(64, 512), vector_length=8, stages=(8,), channel_norm="input")
RICH = Layout(
    shape=(30, 300),
    vector_length=12,
    stages=(10, 10),
    tile=(36, 59),
    outliers=Outliers(5, 4, 6),
    channel_norm="input",
    permuted=True,
    bias=True,
)
FLAT = replace(GOOD, channel_norm="none")


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    side = {"codebook_dtype": "bfloat16", "side_dtype": "bfloat16"}
    layouts = {"m.0.q": GOOD, "m.0.up": RICH, "m.1.q": Layout.from_dict(RICH.to_dict() | side)}
    weights = {module: random_weight(layout, i) for i, (module, layout) in enumerate(layouts.items())}
    VPTQ.require(layouts)
    config = VPTQ.quantization_config(layouts, "kmeans", {"seed": 3}, ["lm_head"])
    assert config["modules_to_not_convert"] == ["lm_head"]
    tensors = {module: VPTQ.encode(weight) for module, weight in weights.items()}
    folder = write_folder(tmp_path / "x", tensors, config)
    found = formats.check(folder)
    assert found.layouts == layouts and found.method == "kmeans" and found.details == {"seed": 3}
    assert sum(matrix.bits() for matrix in found.matrices.values()) == sum(map(VPTQ.bits, layouts.values()))
    for module, weight in formats.read_weights(folder):
        assert torch.equal(weight.dequantize(), weights[module].dequantize()), module
        assert same(VPTQ.encode(weight), tensors[module]), module


def test_entries_have_only_the_keys_that_the_published_package_takes() -> None:
    entries = VPTQ.quantization_config({"m.q": RICH}, "vptq", {})["config_for_layers"]
    assert entries["m.q"] == make_entry(
        30, groups=(5, 59), vector_length=12, centroids=1024, residual=1024, outliers=(5, 4, 64), norm=True,
        permuted=True, bias=True,
    )  # fmt: skip


def test_details_that_are_no_json_are_refused() -> None:
    for details in ({"x": float("nan")}, {"x": object()}):
        with pytest.raises(UsageError, match="wanted JSON values"):
            VPTQ.quantization_config({"m.q": GOOD}, "vptq", details)


# ------------------------------------------------------------------------------------------------ its limits

EQUAL = replace(GOOD, stages=(8, 8))
LIMITS: list[tuple[Layout, str]] = [
    (Layout((64, 512), 1, (4,), codebook_dtype="grid"), r"uniform grids have no codebook; .*--method vptq"),
    (replace(GOOD, direction="row"), r"vectors of outputs, not of inputs \(--method vptq\)"),
    (replace(GOOD, sign_bits=True), "VPTQ has no signs apart$"),
    (replace(GOOD, block_scale=BlockScale(32)), "VPTQ has no block scales$"),
    (replace(GOOD, codebook_rank=2), "VPTQ has no low-rank codebooks$"),
    (replace(GOOD, stages=(8, 8, 8)), "VPTQ has no more than two codebook stages$"),
    (replace(GOOD, tile=(32, 512)), "VPTQ has no codebooks per rows$"),
    (replace(GOOD, sign_bits=True, block_scale=BlockScale(32)), "VPTQ has no signs apart and no block scales$"),
    (FLAT, "a norm of the input channels: .* norm=true"),
    (replace(GOOD, channel_norm="output"), "a norm of the input channels"),
    (replace(GOOD, codebook_dtype="int8"), "codebooks in int8 and scales in float16: .* float16 or bfloat16"),
    (replace(GOOD, codebook_dtype="float32", side_dtype="float32"), "codebooks in float32 and scales in float32"),
    (replace(GOOD, side_dtype="bfloat16"), "codebooks in float16 and scales in bfloat16"),
    (replace(GOOD, vector_length=3), "vectors of 3: its CUDA kernels know 2, 4, .*; nearest 2 or 4$"),
    (replace(GOOD, vector_length=1), "vectors of 1: .*; nearest 2$"),
    (replace(GOOD, vector_length=14), "vectors of 14: .*; nearest 12 or 16$"),
    (replace(GOOD, stages=(9,)), "512 centroids: .* know 16, 256, 1024, .*; nearest 256 or 1024$"),
    (replace(GOOD, stages=(3,)), "8 centroids: .*; nearest 16$"),
    (replace(GOOD, stages=(8, 1)), "2 residual centroids: .*; nearest 4$"),
    (replace(GOOD, stages=(16, 13)), "8192 residual centroids: .*; nearest 4096 or 32768$"),
    (replace(GOOD, stages=(8, 10)), "1024 residual centroids beside 256: .*swap the two, or make them equal$"),
    (replace(GOOD, stages=(8, 4), tile=(64, 256)), r"2 groups with 256 \+ 16 centroids: .*residual_centroids=256"),
    (replace(GOOD, shape=(64, 256)), r"256 inputs: its kernels know 257\.\.65536; .*--skip$"),
    (replace(GOOD, shape=(64, 65537)), r"65537 inputs: its kernels know 257\.\.65536"),
    (replace(GOOD, tile=(64, 200)), "512 columns in groups of 200: .*; nearest groups=2 or 4$"),
    (replace(GOOD, tile=(64, 2)), "groups of 2 columns of 8 bits: it misreads rows below 17 bits$"),
    (replace(GOOD, outliers=Outliers(2, 2, 8)), r"outlier vectors of 2: .*outlier_vector_length=4\)$"),
    (replace(GOOD, vector_length=6, outliers=Outliers(2, 4, 8)), "4 beside vectors of 6: .*; nearest 4 or 8$"),
]


@pytest.mark.parametrize(("layout", "words"), LIMITS, ids=[words[:40] for _, words in LIMITS])
def test_what_its_kernels_cannot_read_is_refused_with_the_nearest_that_they_can(layout: Layout, words: str) -> None:
    (found,) = VPTQ.refusals(layout)
    with pytest.raises(UsageError, match=rf"(?m)^- m\.q: .*{words}"):
        VPTQ.require({"m.q": layout})
    with pytest.raises(UsageError, match="the vptq format cannot hold these matrices"):
        VPTQ.quantization_config({"m.good": GOOD, "m.q": layout}, "vptq", {})
    assert "\n" not in found


@pytest.mark.parametrize(
    "layout",
    [
        *(GOOD, RICH, EQUAL),
        replace(GOOD, stages=(16, 8)),
        replace(EQUAL, tile=(64, 128)),
        replace(GOOD, tile=(64, 4)),
        replace(GOOD, stages=(13, 12), vector_length=6, outliers=None),
        replace(GOOD, shape=(1, 257), codebook_dtype="bfloat16", side_dtype="bfloat16"),
        replace(GOOD, shape=(4, 65536), permuted=True),
    ],
)
def test_what_its_kernels_read_is_not_refused(layout: Layout) -> None:
    assert VPTQ.refusals(layout) == []


def test_all_refused_matrices_are_counted_by_reason() -> None:
    layouts = {f"m.{i}.q": replace(GOOD, vector_length=3) for i in range(3)}
    layouts |= {"m.good": GOOD, "m.up": replace(GOOD, stages=(9,)), "m.down": replace(GOOD, vector_length=3)}
    with pytest.raises(UsageError) as caught:
        VPTQ.require(layouts)
    _, first, second = str(caught.value).splitlines()
    assert first.startswith("- m.0.q and 3 more: vectors of 3")
    assert second.startswith("- m.up: 512 centroids")


# ------------------------------------------------------------------------------------------------ adapt and fit


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("book", ["int8", "int4", "float32"])
def test_codebooks_are_rounded_to_the_models_dtype(book: Any, dtype: torch.dtype) -> None:
    weight = random_weight(replace(RICH, codebook_dtype=book, side_dtype="float32"), 4, scale=0.01)
    layout = VPTQ.adapt(weight.layout, dtype)
    assert layout.codebook_dtype == layout.side_dtype == str(dtype).removeprefix("torch.")
    fitted = VPTQ.fit(weight, layout, "m.q")
    assert fitted.layout == layout and not VPTQ.refusals(layout)
    for stage in range(2):
        assert torch.equal(fitted.tensors[f"codebook_{stage}"], weight.codebook(stage).to(dtype))
    for name in ("channel_scale", "channel_offset", "bias", "outlier_codebook"):
        assert torch.equal(fitted.tensors[name], weight.tensors[name].to(dtype)), name
    for name in ("indices", "outlier_indices", "permutation"):
        assert torch.equal(fitted.tensors[name], weight.tensors[name]), name


def test_a_norm_that_changes_nothing_is_added() -> None:
    weight = random_weight(FLAT, 4)
    layout = VPTQ.adapt(FLAT, torch.float16)
    assert layout == GOOD
    fitted = VPTQ.fit(weight, layout, "m.q")
    assert torch.equal(fitted.tensors["channel_scale"], torch.ones(512, dtype=torch.float16))
    assert torch.equal(fitted.tensors["channel_offset"], torch.zeros(512, dtype=torch.float16))
    for dtype in (torch.float16, torch.float32):
        assert torch.equal(fitted.dequantize(dtype), weight.dequantize(dtype))


def test_a_weight_that_fits_stays_as_it_is() -> None:
    weight = random_weight(RICH)
    assert VPTQ.fit(weight, VPTQ.adapt(RICH, torch.float16), "m.q") is weight


def test_one_codebook_for_all_is_written_without_a_tile() -> None:
    weight = random_weight(replace(GOOD, tile=(64, 512)), 2)
    fitted = VPTQ.fit(weight, VPTQ.adapt(weight.layout, torch.float16), "m.q")
    assert fitted.layout == GOOD and torch.equal(fitted.dequantize(), weight.dequantize())


def test_what_cannot_be_adapted_is_left_for_the_refusal() -> None:
    for layout in (Layout((64, 512), 1, (4,), codebook_dtype="grid"), replace(GOOD, codebook_rank=3)):
        assert VPTQ.adapt(layout, torch.bfloat16) == layout


def test_values_beyond_float16_are_refused_by_name() -> None:
    weight = random_weight(replace(GOOD, codebook_dtype="float32", side_dtype="float32"), scale=1e6)
    with pytest.raises(NumericalError, match=r"m\.q: codebook 0: .* not finite in torch.float16"):
        VPTQ.fit(weight, VPTQ.adapt(weight.layout, torch.float16), "m.q")


@pytest.mark.parametrize(
    ("dtype", "wanted"), [("float16", "float16"), ("bfloat16", "bfloat16"), ("float32", "float16")]
)
def test_files_are_in_the_models_dtype_if_the_kernels_know_it(dtype: str, wanted: str) -> None:
    assert VPTQ.adapt(GOOD, getattr(torch, dtype)).codebook_dtype == wanted
    for key in ("dtype", "torch_dtype"):
        found = VPTQ.model_config({"hidden_size": 1, key: dtype})
        assert found == {"hidden_size": 1, "dtype": wanted, "torch_dtype": wanted}
    options = VPTQ.options({"norm": None, "codebook_dtype": "auto", "groups": 2}, getattr(torch, dtype))
    assert options == {"norm": True, "codebook_dtype": wanted, "groups": 2, "side_dtype": wanted}
    # What somebody asked for stays, and is refused.
    assert VPTQ.options({"norm": False, "codebook_dtype": "int8"}, torch.float16)["codebook_dtype"] == "int8"
