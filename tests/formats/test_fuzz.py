"""Thousands of damaged copies of small checkpoints: an OctavoError or a load that works, never anything else."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from formats.checkpoints import header_and_payload, put_header
from formats.vptq_folders import make_entry, make_tensors, quantization, write_folder
from octavo import formats
from octavo._core.errors import FormatError, OctavoError

GOLDEN = [Path(__file__).parents[1] / "golden" / name / "checkpoint" for name in ("native_v1", "native_v1_scales")]
FILES = sorted(path.name for path in GOLDEN[0].iterdir())
HOSTILE: list[Any] = [
    *(-1, 0, 1, 2, 3, 16, 17, 33, 2**31, 2**63, 2**64, 10**40, 0.5, 1.0, 2.0, 1e300),
    *(
        True,
        False,
        None,
        "",
        "x",
        "row",
        "int8",
        "int4",
        "../x",
        "\ud800",
        [],
        [[]],
        [1],
        [4, 4],
        [2.0, 8],
        {},
        {"a": 1},
    ),
]


@pytest.fixture(params=GOLDEN, ids=lambda path: path.parent.name)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(request.param, tmp_path / "copy"))


def load_or_refuse(folder: Path) -> bool:
    """True if the folder loads and decodes, False if it is refused; any other exception fails the test."""
    try:
        for module, weight in formats.read_weights(folder):
            matrix = weight.dequantize()
            assert tuple(matrix.shape) == weight.layout.shape, module
    except OctavoError:
        return False
    return True


def damage(data: bytes, rng: random.Random) -> bytes:
    """One to three random edits of a byte string."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(6)
        if kind == 0:
            data = data[:at]
        elif kind == 1:
            data = data[:at] + rng.randbytes(rng.randint(1, 9)) + data[at:]
        elif kind == 2:
            data = data[:at] + data[at + rng.randint(1, 9) :]
        elif kind == 3:
            data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        elif kind == 4:
            data = data[:at] + rng.choice(b'0123456789-{}[],:"eE.').to_bytes(1, "little") + data[at + 1 :]
        else:
            data = data[:at] + data[max(0, at - 40) : at] + data[at:]
    return data


@pytest.mark.parametrize("name", FILES)
def test_byte_mutations_are_refused_or_load(folder: Path, name: str) -> None:
    rng = random.Random(name)
    path, good = folder / name, (folder / name).read_bytes()
    outcomes = []
    for _ in range(100):
        bad = damage(good, rng)
        path.write_bytes(bad)
        outcomes.append(load_or_refuse(folder))
        if bad != good and name != formats.MANIFEST_FILE:
            assert formats.problems(folder), "the manifest must notice every change"
    assert False in outcomes
    path.write_bytes(good)
    assert load_or_refuse(folder)


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".safetensors")])
def test_every_byte_of_a_header_matters_or_is_refused(folder: Path, name: str) -> None:
    path, good = folder / name, bytearray((folder / name).read_bytes())
    end = 8 + int.from_bytes(good[:8], "little")
    for at in range(0, end, 7):
        bad = bytearray(good)
        bad[at] ^= 1 << (at % 8)
        path.write_bytes(bad)
        load_or_refuse(folder)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in list(items):
        yield value, key
        yield from places(child)


def replaced(value: Any, rng: random.Random) -> Any:
    """A copy of a JSON value with one node replaced, removed or renamed."""
    copy = json.loads(json.dumps(value))
    container, key = rng.choice(list(places(copy)))
    kind = rng.randrange(8)
    if kind == 0:
        del container[key]
    elif kind == 1 and isinstance(container, dict):
        container[rng.choice(["tile", "", "x", "..", "block_scale", "indices"])] = container.pop(key)
    else:
        container[key] = json.loads(json.dumps(rng.choice(HOSTILE)))
    return copy


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".json")])
def test_hostile_json_values_are_refused_or_load(folder: Path, name: str) -> None:
    rng = random.Random(name)
    good = json.loads((folder / name).read_text())
    for _ in range(300):
        bad = replaced(good, rng)
        if name == "config.json":
            bad = {**good, "quantization_config": replaced(good["quantization_config"], rng)}
        (folder / name).write_text(json.dumps(bad))
        load_or_refuse(folder)


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".safetensors")])
def test_hostile_headers_are_refused_or_load(folder: Path, name: str) -> None:
    rng = random.Random(name)
    (folder / formats.MANIFEST_FILE).unlink()
    header, payload = header_and_payload(folder / name)
    for _ in range(200):
        put_header(folder / name, replaced(header, rng), payload)
        load_or_refuse(folder)


# ------------------------------------------------------------------------------------------------ VPTQ's format

VPTQ_ENTRIES = {
    "m.0.q": make_entry(
        10, groups=(2, 5), residual=4, outliers=(2, 4, 16), norm=True, permuted=True, bias=True, vector_length=3
    ),
    "m.0.up": make_entry(7, groups=(3, 4), residual=2, packed=False),
}
#: GPTQModel's one setting for the first matrix.
VPTQ_SETTING = {
    **{"quant_method": "vptq", "npercent": 10, "group_num": 2, "enable_norm": True, "enable_perm": True},
    **{key: VPTQ_ENTRIES["m.0.q"][key] for key in ("vector_lens", "num_centroids", "num_res_centroids")},
}
VPTQ_KEYS = sorted({*VPTQ_SETTING, *VPTQ_ENTRIES["m.0.q"], "norm_dim", "shared_layer_config", "config_for_layers"})


@pytest.fixture(params=["paths", "shared", "flat", "text", "gptqmodel"])
def vptq_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Small matrices with every tensor of the format, the config in one of its forms."""
    form, entries = request.param, dict(VPTQ_ENTRIES)
    if form == "gptqmodel":
        entries.pop("m.0.up")
    tensors = {module: make_tensors(entry, 1, wide=form == "gptqmodel") for module, entry in entries.items()}
    config = VPTQ_SETTING if form == "gptqmodel" else quantization(entries, form)
    return write_folder(tmp_path / form, tensors, config, "text" if form == "text" else "paths")


def vptq_loads(folder: Path) -> bool:
    """True if the folder loads and decodes, False for a FormatError; any other exception fails the test."""
    try:
        for module, weight in formats.read_weights(folder, lambda _: (10, 12)):
            assert tuple(weight.dequantize().shape) == weight.layout.shape, module
    except FormatError:
        return False
    return True


def test_hostile_configs_of_vptq_are_refused_or_load(vptq_folder: Path) -> None:
    rng = random.Random(vptq_folder.name)
    path = vptq_folder / "config.json"
    good = json.loads(path.read_text())
    assert vptq_loads(vptq_folder)
    outcomes = []
    for _ in range(200):
        bad = replaced(good, rng) if rng.random() < 0.7 else json.loads(json.dumps(good))
        if rng.random() < 0.4:
            # A known key in an unknown place, or another value of it.
            container = rng.choice([c for c, _ in places(bad) if isinstance(c, dict)] or [bad])
            container[rng.choice(VPTQ_KEYS)] = json.loads(json.dumps(rng.choice(HOSTILE)))
        path.write_text(json.dumps(bad))
        outcomes.append(vptq_loads(vptq_folder))
    assert True in outcomes and False in outcomes


def test_hostile_headers_of_vptq_are_refused_or_load(vptq_folder: Path) -> None:
    rng = random.Random(vptq_folder.name)
    path = vptq_folder / "model.safetensors"
    header, payload = header_and_payload(path)
    for _ in range(100):
        bad = replaced(header, rng)
        if rng.random() < 0.3:
            # Another number of the same size, so that only the config can tell.
            entry = rng.choice([entry for entry in bad.values() if isinstance(entry, dict)])
            swap = {"I16": ("F16", "U16", "BF16"), "F16": ("BF16", "I16"), "I32": ("F32", "U32")}
            if entry.get("dtype") in ("I16", "F16", "I32"):
                entry["dtype"] = rng.choice(swap[entry["dtype"]])
            if isinstance(entry.get("shape"), list):
                rng.shuffle(entry["shape"])
        put_header(path, bad, payload)
        vptq_loads(vptq_folder)


def test_damaged_bytes_of_vptq_are_refused_or_load(vptq_folder: Path) -> None:
    rng = random.Random(vptq_folder.name)
    for name in ("config.json", "model.safetensors"):
        path, good = vptq_folder / name, (vptq_folder / name).read_bytes()
        outcomes = []
        for _ in range(40):
            path.write_bytes(damage(good, rng))
            outcomes.append(vptq_loads(vptq_folder))
        path.write_bytes(good)
        assert False in outcomes and vptq_loads(vptq_folder)


def test_random_payloads_of_vptq_are_refused_or_load(vptq_folder: Path) -> None:
    rng = random.Random(vptq_folder.name)
    path = vptq_folder / "model.safetensors"
    header, payload = header_and_payload(path)
    tensors = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
    outcomes = []
    for _ in range(50):
        begin, end = rng.choice(tensors)
        put_header(path, header, payload[:begin] + rng.randbytes(end - begin) + payload[end:])
        outcomes.append(vptq_loads(vptq_folder))
    assert True in outcomes and False in outcomes
