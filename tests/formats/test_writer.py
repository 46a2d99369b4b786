"""ShardWriter: what it writes, in which order, with which rights, and what it leaves behind when the disk is full."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from formats.checkpoints import header_and_payload, plain_tensors, write_plain
from octavo._core.errors import ResourceError, UsageError
from octavo.formats.reader import DTYPES, CheckpointReader
from octavo.formats.writer import ShardWriter


def same_bits(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    )


def test_one_shard_is_a_single_file_that_safetensors_reads(tmp_path: Path) -> None:
    tensors = plain_tensors()
    index = write_plain(tmp_path / "out", tensors)
    assert sorted(os.listdir(tmp_path / "out")) == ["model.safetensors"]
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    assert loaded.keys() == tensors.keys() == index["weight_map"].keys()
    assert all(same_bits(loaded[name], tensor) for name, tensor in tensors.items())


def test_shards_are_filled_in_the_order_given(tmp_path: Path) -> None:
    tensors = {name: torch.full((4,), float(i)) for i, name in enumerate(["z", "a", "m", "b", "y"])}
    index = write_plain(tmp_path, tensors, max_shard_bytes=32)
    assert list(index["weight_map"].items()) == [
        ("z", "model-00001-of-00003.safetensors"),
        ("a", "model-00001-of-00003.safetensors"),
        ("m", "model-00002-of-00003.safetensors"),
        ("b", "model-00002-of-00003.safetensors"),
        ("y", "model-00003-of-00003.safetensors"),
    ]
    assert index["metadata"]["total_size"] == 80
    assert list(header_and_payload(tmp_path / "model-00001-of-00003.safetensors")[0]) == ["__metadata__", "z", "a"]


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path: Path) -> None:
    index = write_plain(
        tmp_path, {"a": torch.zeros(1), "big": torch.zeros(100), "b": torch.zeros(1)}, max_shard_bytes=16
    )
    assert len(set(index["weight_map"].values())) == 3


def test_every_tensor_starts_at_a_multiple_of_its_element_size(tmp_path: Path) -> None:
    write_plain(tmp_path, {"odd": torch.zeros(3, dtype=torch.int8), **plain_tensors()})
    header, _ = header_and_payload(tmp_path / "model.safetensors")
    header.pop("__metadata__")
    for entry in header.values():
        assert entry["data_offsets"][0] % DTYPES[entry["dtype"]].itemsize == 0


def test_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_plain(tmp_path / name, plain_tensors(), max_shard_bytes=40)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_views_and_transposes_are_written_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.bfloat16).reshape(4, 6)
    write_plain(tmp_path, {"t": base.t(), "slice": base[1:3, ::2], "parameter": torch.nn.Parameter(base[0].float())})
    reader = CheckpointReader(tmp_path)
    assert torch.equal(reader.read("t"), base.t())
    assert torch.equal(reader.read("slice"), base[1:3, ::2])
    assert torch.equal(reader.read("parameter"), base[0].float())


@settings(max_examples=50, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 5), max_size=3), min_size=1, max_size=8),
    codes=st.lists(st.sampled_from(sorted(DTYPES)), min_size=8, max_size=8),
    limit=st.integers(1, 400),
)
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, shapes, codes, limit: int) -> None:
    folder = tmp_path_factory.mktemp("round")
    tensors = {}
    for i, shape in enumerate(shapes):
        dtype = DTYPES[codes[i]]
        count = int(torch.Size(shape).numel())
        data = torch.randint(0, 2, (count,), dtype=torch.uint8) if dtype == torch.bool else None
        data = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8) if data is None else data
        tensors[f"t{i}"] = data.view(dtype).reshape(shape)
    write_plain(folder, tensors, limit)
    reader = CheckpointReader(folder, strict=True)
    assert reader.names() == sorted(tensors)
    assert reader.total_bytes == sum(t.numel() * t.element_size() for t in tensors.values())
    assert all(same_bits(reader.read(name), tensor) for name, tensor in tensors.items())
    shutil.rmtree(folder)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_have_the_mode_that_the_umask_gives(tmp_path: Path, mask: int) -> None:
    old = os.umask(mask)
    try:
        write_plain(tmp_path, plain_tensors(), max_shard_bytes=40)
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~mask}


def test_every_file_and_the_folder_are_flushed_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda fd: flushed.append(os.readlink(f"/proc/self/fd/{fd}")))
    write_plain(tmp_path, plain_tensors(), max_shard_bytes=60)
    shards = sum(path.suffix == ".safetensors" for path in tmp_path.iterdir())
    assert sum(".shard-" in name for name in flushed) == shards > 1
    assert str(tmp_path) in flushed
    assert any("index.json" in name for name in flushed)


def test_memory_holds_one_shard_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ShardWriter(tmp_path, max_shard_bytes=1000)
    held = []
    for i in range(50):
        writer.add(f"t{i}", torch.zeros(100, dtype=torch.uint8))
        held.append(sum(t.numel() for t in writer._pending.values()))
    writer.finish()
    assert max(held) == 1000


@pytest.fixture
def file_size_limit() -> Iterator[int]:
    """A disk that takes no file above 4000 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    yield 4000
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_is_a_resource_error_and_leaves_nothing_behind(tmp_path: Path, file_size_limit: int) -> None:
    writer = ShardWriter(tmp_path, max_shard_bytes=1000)
    writer.add("small", torch.zeros(100))
    with pytest.raises(ResourceError, match=r"cannot write .*--resume"):
        writer.add("large", torch.zeros(file_size_limit))
        writer.finish()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="failed before"):
        writer.add("more", torch.zeros(1))
    with pytest.raises(UsageError, match="failed before"):
        writer.finish()


def test_free_space_is_checked_before_each_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    free = iter([10**9, 10])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=next(free)))
    writer = ShardWriter(tmp_path, max_shard_bytes=400)
    with pytest.raises(ResourceError, match="shard 2 needs about"):
        for i in range(4):
            writer.add(f"t{i}", torch.zeros(100))
    assert list(tmp_path.iterdir()) == []


def test_a_failing_block_removes_the_temporary_files(tmp_path: Path) -> None:
    with pytest.raises(KeyError), ShardWriter(tmp_path, max_shard_bytes=4) as writer:
        for i in range(3):
            writer.add(f"t{i}", torch.zeros(1))
        assert len(list(tmp_path.iterdir())) == 2
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_existing_weights_are_never_overwritten(tmp_path: Path) -> None:
    write_plain(tmp_path, plain_tensors())
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(UsageError, match="already holds weights"):
        ShardWriter(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("", torch.zeros(1), "empty, reserved or written already"),
        ("__metadata__", torch.zeros(1), "reserved"),
        ("first", torch.zeros(1), "written already"),
        ("complex", torch.zeros(1, dtype=torch.complex64), "complex64"),
        ("none", torch.zeros(0, 4), r"cannot write none: torch.float32 \(0, 4\)"),
    ],
)
def test_unwritable_tensors_are_refused(tmp_path: Path, name: str, tensor: Tensor, message: str) -> None:
    writer = ShardWriter(tmp_path)
    writer.add("first", torch.zeros(1))
    with pytest.raises(UsageError, match=message):
        writer.add(name, tensor)
    assert writer.finish()["weight_map"] == {"first": "model.safetensors"}


def test_an_empty_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="without tensors"):
        ShardWriter(tmp_path).finish()
