"""Four thousand damaged copies of the golden checkpoints: an OctavoError or a load that works, never anything else."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from formats.checkpoints import header_and_payload, put_header
from octavo._core.errors import OctavoError
from octavo.formats import native

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
        for module, weight in native.read_weights(folder):
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
        if bad != good and name != native.MANIFEST_FILE:
            assert native.problems(folder), "the manifest must notice every change"
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
    (folder / native.MANIFEST_FILE).unlink()
    header, payload = header_and_payload(folder / name)
    for _ in range(200):
        put_header(folder / name, replaced(header, rng), payload)
        load_or_refuse(folder)
