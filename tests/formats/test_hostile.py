"""One test per fault of a damaged or hostile folder: a FormatError that says which, before any weight is read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from formats.checkpoints import edit_header, edit_json, header_and_payload, plain_tensors, put_header, write_plain
from octavo._core import io
from octavo._core.errors import FormatError
from octavo.formats import reader as reader_module
from octavo.formats.reader import CheckpointReader

INDEX = "model.safetensors.index.json"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A folder with one file that holds a (8 bytes) and b (16 bytes)."""
    write_plain(tmp_path, {"a": torch.zeros(2), "b": torch.ones(4)})
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder with three shards."""
    index = write_plain(tmp_path, plain_tensors(), max_shard_bytes=30)
    assert len(set(index["weight_map"].values())) == 3
    return tmp_path


@pytest.fixture(autouse=True)
def no_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks must not open the payload."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a payload was opened")

    monkeypatch.setattr(reader_module, "safe_open", refuse)


def refused(folder: Path, message: str, *, strict: bool = False) -> None:
    with pytest.raises(FormatError, match=message):
        CheckpointReader(folder, strict=strict)


def last_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[-1]


# ------------------------------------------------------------------------------------------------ files


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "does not exist")


def test_empty_folder_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, r"holds neither model.safetensors .* The folder is empty")


@pytest.mark.parametrize(
    ("file", "message"), [("pytorch_model.bin", "pickled"), ("m.gguf", r"\.gguf"), ("notes", "notes")]
)
def test_folder_without_safetensors_says_what_it_holds(tmp_path: Path, file: str, message: str) -> None:
    (tmp_path / file).write_bytes(b"x")
    refused(tmp_path, f"holds neither .*{message}")


def test_truncated_shard_is_refused(sharded: Path) -> None:
    shard = last_shard(sharded)
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(sharded, f"{shard.name} is truncated: .* Fetch it again")


def test_shard_cut_inside_its_header_is_refused(sharded: Path) -> None:
    shard = last_shard(sharded)
    shard.write_bytes(shard.read_bytes()[:50])
    refused(sharded, f"{shard.name} is truncated: its header takes")


@pytest.mark.parametrize("size", [0, 7])
def test_almost_empty_file_is_refused(single: Path, size: int) -> None:
    (single / "model.safetensors").write_bytes(b"\0" * size)
    refused(single, f"has {size} bytes: it is truncated or empty")


def test_trailing_bytes_are_refused(single: Path) -> None:
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"\0" * 3)
    refused(single, "3 bytes after the last tensor")


def test_missing_shards_are_counted_and_named(sharded: Path) -> None:
    last_shard(sharded).unlink()
    refused(sharded, "1 of 3 shards named by .* are missing: model-00003-of-00003.safetensors")


def test_git_lfs_pointer_is_recognised(single: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123\n"
    (single / "model.safetensors").write_text(pointer)
    refused(single, "Git-LFS pointer.*git lfs pull")


def test_web_page_instead_of_weights_is_refused(single: Path) -> None:
    (single / "model.safetensors").write_text("<!DOCTYPE html><html>not found</html>")
    refused(single, "no safetensors file")


def test_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    refused(tmp_path, "no regular file")


def test_pipe_in_place_of_a_file_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    refused(tmp_path, "no regular file")


# ------------------------------------------------------------------------------------------------ headers


def test_header_length_beyond_the_limit_is_refused(single: Path) -> None:
    path = single / "model.safetensors"
    path.write_bytes((100_000_001).to_bytes(8, "little") + path.read_bytes()[8:])
    refused(single, "header of 100000001 bytes is larger than")


@pytest.mark.parametrize(
    "text", [b"{", b"\xff\xfe{}", b"[1]", b"7", b"null", b'{"a": 1' + b"0" * 5000 + b"}", b'{"a": NaN}']
)
def test_header_that_is_no_json_object_is_refused(single: Path, text: bytes) -> None:
    put_header(single / "model.safetensors", text, b"")
    refused(single, "not valid JSON|no JSON object|wanted exactly dtype")


def test_deeply_nested_header_is_refused(single: Path) -> None:
    put_header(single / "model.safetensors", b'{"a":' * 100_000, b"")
    refused(single, "not valid JSON")


def test_header_without_tensors_is_refused(single: Path) -> None:
    put_header(single / "model.safetensors", {"__metadata__": {"format": "pt"}}, b"")
    refused(single, "holds no tensors")


def test_tensor_listed_twice_in_a_header_is_refused(single: Path) -> None:
    entry = b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    put_header(single / "model.safetensors", b"{" + entry + b"," + entry + b"}", bytes(8))
    refused(single, "lists a twice")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.update(data_offsets=[12, 28]), "leaves a hole"),
        (lambda e: e.update(data_offsets=[4, 20]), "overlaps"),
        (lambda e: e.update(data_offsets=[8, 20]), r"takes 16 bytes, but its data_offsets are \[8, 20\]"),
        (lambda e: e.update(data_offsets=[24, 8]), "data_offsets"),
        (lambda e: e.update(data_offsets=[-8, 8]), "data_offsets"),
        (lambda e: e.update(data_offsets=[8.0, 24.0]), "two integers"),
        (lambda e: e.update(data_offsets=[8]), "two integers"),
        (lambda e: e.update(data_offsets="8, 24"), "two integers"),
        (lambda e: e.update(data_offsets=[2**64, 2**64 + 16]), "leaves a hole"),
        (lambda e: e.update(shape=[2**32, 2**32]), f"takes {2**66} bytes"),
        (lambda e: e.update(shape=[2**62, 4]), f"takes {2**66} bytes"),
        (lambda e: e.update(shape=[2**63]), "every dimension"),
        (lambda e: e.update(shape=[0]), "every dimension"),
        (lambda e: e.update(shape=[-4]), "every dimension"),
        (lambda e: e.update(shape=[-2, -2]), "every dimension"),
        (lambda e: e.update(shape=[4.0]), "integers"),
        (lambda e: e.update(shape=[True, 4]), "integers"),
        (lambda e: e.update(shape=4), "integers"),
        (lambda e: e.update(shape=[1] * 17 + [4]), "at most 16"),
        (lambda e: e.update(dtype="F33"), "unknown dtype 'F33'"),
        (lambda e: e.update(dtype=32), "unknown dtype"),
        (lambda e: e.pop("dtype"), "wanted exactly"),
        (lambda e: e.update(extra=1), "wanted exactly"),
    ],
)
def test_illegal_header_entries_are_refused(
    single: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    edit_header(single / "model.safetensors", lambda header: change(header["b"]))
    refused(single, f"tensor b.*{message}")


# ------------------------------------------------------------------------------------------------ index


def test_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    first, second, _ = sorted(sharded.glob("*.safetensors"))
    header, payload = header_and_payload(first)
    other, rest = header_and_payload(second)
    name = next(n for n in header if n != "__metadata__" and header[n]["data_offsets"][0] == 0)
    size = header[name]["data_offsets"][1]
    moved = {
        n: {**e, "data_offsets": [o + size for o in e["data_offsets"]]} for n, e in other.items() if n != "__metadata__"
    }
    put_header(second, {name: header[name], **moved}, payload[:size] + rest)
    refused(sharded, f"tensor {name} is in two shards, {first.name} and {second.name}")


def test_tensor_in_no_shard_is_refused(sharded: Path) -> None:
    shard = last_shard(sharded).name
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update(ghost=shard))
    refused(sharded, "lists ghost, but no shard holds it")


def test_tensor_in_another_shard_than_the_index_says_is_refused(sharded: Path) -> None:
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update({"a.codes": last_shard(sharded).name}))
    refused(sharded, "says that a.codes is in model-00003.*but it is in model-00002")


def test_tensor_that_the_index_omits_is_refused_only_in_our_own_checkpoints(sharded: Path) -> None:
    edit_json(sharded / INDEX, lambda index: index["weight_map"].pop("flag"))
    assert "flag" in CheckpointReader(sharded)
    refused(sharded, "does not list flag", strict=True)


def test_wrong_total_size_is_refused_only_in_our_own_checkpoints(sharded: Path) -> None:
    edit_json(sharded / INDEX, lambda index: index["metadata"].update(total_size=1))
    assert CheckpointReader(sharded).total_bytes > 1
    refused(sharded, "total_size 1, the shards hold", strict=True)


def test_two_checkpoints_in_one_folder_are_refused_only_as_our_own(sharded: Path) -> None:
    write_plain(sharded / "other", {"x": torch.zeros(1)})
    os.replace(sharded / "other" / "model.safetensors", sharded / "model.safetensors")
    assert CheckpointReader(sharded).names() == ["x"]  # what transformers takes, too
    refused(sharded, "two checkpoints in one folder", strict=True)


@pytest.mark.parametrize("value", [[], 7, {}, {"weight_map": {}}, {"weight_map": [1]}, {"weight_map": "x"}])
def test_index_without_a_weight_map_is_refused(sharded: Path, value: Any) -> None:
    (sharded / INDEX).write_text(json.dumps(value))
    refused(sharded, "weight_map")


@pytest.mark.parametrize(
    "target",
    [
        "../outside.safetensors",
        "sub/../../outside.safetensors",
        "sub/inside.safetensors",
        "/outside.safetensors",
        "..\\outside.safetensors",
        "C:\\outside.safetensors",
        "a\0b.safetensors",
    ],
)
def test_index_that_names_files_elsewhere_is_refused(sharded: Path, target: str) -> None:
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update(flag=target))
    refused(sharded, "not a plain file name")


@pytest.mark.parametrize("target", [None, 3, "weights.bin", "", ["x"]])
def test_index_that_names_no_safetensors_file_is_refused(sharded: Path, target: Any) -> None:
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update(flag=target))
    refused(sharded, "a .safetensors file is wanted")


@pytest.mark.parametrize("target", ["x" * 5000 + ".safetensors", "\ud800.safetensors"])
def test_index_with_impossible_file_names_is_refused(sharded: Path, target: str) -> None:
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update(flag=target))
    refused(sharded, "1 of 4 shards .* are missing")


def test_huge_index_is_refused_without_parsing_it(sharded: Path) -> None:
    with open(sharded / INDEX, "r+b") as file:
        file.truncate(io.MAX_JSON_BYTES + 1)
    refused(sharded, "is not plausible")


def test_deeply_nested_index_is_refused(sharded: Path) -> None:
    (sharded / INDEX).write_text("[" * 200_000)
    refused(sharded, "not valid JSON")


# ------------------------------------------------------------------------------------------------ links


@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", INDEX])
def test_symlink_out_of_the_folder_is_refused(
    sharded: Path, name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside") / "file"
    os.replace(sharded / name, outside)
    (sharded / name).symlink_to(outside)
    refused(sharded, "symbolic link out of the checkpoint folder")


def test_symlink_inside_the_folder_is_followed(sharded: Path) -> None:
    shard = last_shard(sharded)
    os.replace(shard, sharded / "blob")
    shard.symlink_to("blob")
    assert CheckpointReader(sharded, strict=True).names() == sorted(plain_tensors())


def test_dangling_and_circular_symlinks_are_refused(single: Path) -> None:
    path = single / "model.safetensors"
    path.unlink()
    path.symlink_to("gone")
    refused(single, "cannot be read")
    path.unlink()
    path.symlink_to("model.safetensors")
    refused(single, "cannot be read")


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--x--y" / "snapshots" / "0123", tmp_path / "models--x--y" / "blobs"
    write_plain(snapshot, plain_tensors(), max_shard_bytes=30)
    blobs.mkdir()
    for path in list(snapshot.iterdir()):
        os.replace(path, blobs / path.name)
        path.symlink_to(f"../../blobs/{path.name}")
    assert CheckpointReader(snapshot, strict=True).names() == sorted(plain_tensors())
    shard = last_shard(snapshot)
    shard.unlink()
    shard.symlink_to("../../../elsewhere")
    refused(snapshot, "symbolic link out")
