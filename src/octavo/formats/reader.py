"""Reading safetensors checkpoints that nobody vouches for.

The headers of *all* shards are parsed here, by ourselves, and held against the index and the file sizes before a
single weight is read: a damaged or hostile folder fails at once and by name, never after an hour of work.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from stat import S_ISREG
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from octavo._core.errors import FormatError
from octavo._core.io import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
#: The safetensors specification caps headers at 100 MB.
MAX_HEADER_BYTES = 100_000_000
#: Endings of files that hold pickles, which are never opened.
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_MAX_RANK = 16
_LFS_MAGIC = b"version https://git-lfs"

#: safetensors dtype code -> torch dtype.
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: shard file, safetensors dtype code, shape, first and past-the-last payload byte."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class CheckpointReader:
    """A folder of safetensors weights whose headers, sizes and index are known to agree.

    Args:
        folder: holds ``model.safetensors``, or ``model.safetensors.index.json`` and the shards that it names.
        strict: refuse what Octavo itself never writes: tensors that the index does not list, an index next to a
            single file, a wrong ``total_size``. Original models of other people may have these.

    Raises:
        FormatError: anything is missing, truncated, inconsistent or outside the folder. No payload has been read.
    """

    def __init__(self, folder: str | Path, *, strict: bool = False) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FormatError(f"checkpoint folder {self.folder} does not exist or is no folder.")
        self._tensors: dict[str, TensorInfo] = {}
        self._open: dict[Path, Any] = {}
        has_single, has_index = (os.path.lexists(self.folder / name) for name in (SINGLE_FILE, INDEX_FILE))
        if strict and has_single and has_index:
            raise FormatError(
                f"{self.folder} holds both {SINGLE_FILE} and {INDEX_FILE}: two checkpoints in one folder. "
                "Delete the one that is stale."
            )
        if has_single:
            self.files = [self._inside(SINGLE_FILE)]
            self._tensors = read_header(self.files[0])
        elif has_index:
            self._read_shards(strict)
        else:
            raise FormatError(f"{self.folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}.{self._what_is_there()}")
        if not self._tensors:
            raise FormatError(f"{self.folder}: the checkpoint holds no tensors.")

    # ---------------------------------------------------------------- what there is

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def info(self, name: str) -> tuple[str, tuple[int, ...]]:
        """The safetensors dtype code (``"BF16"``, a key of :data:`DTYPES`) and the shape of one tensor."""
        entry = self._entry(name)
        return entry.dtype, entry.shape

    def file_of(self, name: str) -> Path:
        """The shard that holds a tensor."""
        return self._entry(name).file

    def bytes(self, name: str) -> int:
        """Payload bytes of one tensor."""
        entry = self._entry(name)
        return entry.end - entry.begin

    @property
    def total_bytes(self) -> int:
        """Payload bytes of all tensors."""
        return sum(info.end - info.begin for info in self._tensors.values())

    def read(self, name: str) -> Tensor:
        """Load one tensor to the CPU (memory-mapped: private pages of the file, not a copy of it).

        Raises:
            FormatError: no such tensor, or the file was changed since its header was checked.
        """
        entry = self._entry(name)
        try:
            if entry.file not in self._open:
                self._open[entry.file] = safe_open(entry.file, framework="pt")
            tensor = self._open[entry.file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise FormatError(f"{entry.file}: cannot read {name}: {error}. Was the file changed meanwhile?") from error
        if tensor.dtype != DTYPES[entry.dtype] or tuple(tensor.shape) != entry.shape:
            raise FormatError(f"{entry.file}: {name} changed while it was being read.")
        return tensor

    def close(self) -> None:
        """Let go of the open files; tensors that were read stay valid."""
        self._open.clear()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _entry(self, name: str) -> TensorInfo:
        try:
            return self._tensors[name]
        except KeyError:
            raise FormatError(f"{self.folder}: the checkpoint has no tensor {name}.") from None

    # ---------------------------------------------------------------- checks

    def _read_shards(self, strict: bool) -> None:
        weight_map, total = self._read_index()
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if not os.path.lexists(self.folder / name)]
        if missing:
            raise FormatError(
                f"{self.folder}: {len(missing)} of {len(names)} shards named by {INDEX_FILE} are missing: "
                f"{listing(missing)}. The download or copy is incomplete; fetch them again."
            )
        self.files = [self._inside(name) for name in names]
        for file in self.files:
            for name, info in read_header(file).items():
                if name in self._tensors:
                    both = f"{self._tensors[name].file.name} and {file.name}"
                    raise FormatError(f"{self.folder}: tensor {name} is in two shards, {both}.")
                self._tensors[name] = info
        for name, file_name in weight_map.items():
            if name not in self._tensors:
                raise FormatError(f"{self.folder}: {INDEX_FILE} lists {name}, but no shard holds it.")
            if self._tensors[name].file.name != file_name:
                raise FormatError(
                    f"{self.folder}: {INDEX_FILE} says that {name} is in {file_name}, "
                    f"but it is in {self._tensors[name].file.name}."
                )
        if strict:
            extra = self._tensors.keys() - weight_map.keys()
            if extra:
                raise FormatError(f"{self.folder}: {INDEX_FILE} does not list {listing(extra)}, which a shard holds.")
            if total is not None and total != self.total_bytes:
                raise FormatError(
                    f"{self.folder}: {INDEX_FILE} says total_size {total}, the shards hold {self.total_bytes} bytes."
                )

    def _read_index(self) -> tuple[dict[str, str], Any]:
        path = self._inside(INDEX_FILE)
        index = read_json(path, "shard index")
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise FormatError(f"shard index {path}: a non-empty object 'weight_map' is wanted.")
        for name, file_name in weight_map.items():
            if not isinstance(file_name, str) or not file_name.endswith(".safetensors"):
                raise FormatError(
                    f"shard index {path}: {name} is mapped to {file_name!r}; a .safetensors file is wanted."
                )
            if file_name != os.path.basename(file_name) or "\\" in file_name or "\0" in file_name:
                raise FormatError(
                    f"shard index {path}: {name} is mapped to {file_name!r}, which is not a plain file name. "
                    "A checkpoint may only name files in its own folder; do not use this one."
                )
        metadata = index.get("metadata")
        return weight_map, metadata.get("total_size") if isinstance(metadata, dict) else None

    def _inside(self, name: str) -> Path:
        """The path of a file of the folder, unless a symlink leads out of it.

        The Hub cache is the one place where links are normal: ``snapshots/<commit>/x -> ../../blobs/<hash>``.
        """
        path, home = self.folder / name, Path(os.path.realpath(self.folder))
        target = Path(os.path.realpath(path))
        allowed = [home]
        if home.parent.name == "snapshots":
            allowed.append(home.parent.parent / "blobs")
        if not any(target.is_relative_to(root) for root in allowed):
            raise FormatError(f"{path} is a symbolic link out of the checkpoint folder. Copy the file itself.")
        return path

    def _what_is_there(self) -> str:
        try:
            present = sorted(os.listdir(self.folder))
        except OSError as error:
            return f" It cannot be listed: {error.strerror}."
        if any(name.endswith(PICKLED) for name in present):
            return " It has pickled PyTorch weights, which can run code when loaded; convert them to safetensors first."
        if any(name.endswith(".gguf") for name in present):
            return " It has a .gguf file; pass that file itself as MODEL."
        return " The folder is empty." if not present else f" It has: {listing(present)}."


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Parse and check the header of one safetensors file.

    Raises:
        FormatError: not a safetensors file, truncated, or a header that does not describe exactly its payload.
    """
    try:
        status = path.stat()
        if not S_ISREG(status.st_mode):
            raise FormatError(f"{path} is no regular file.")
        size = status.st_size
        with open(path, "rb") as file:
            start = file.read(len(_LFS_MAGIC))
            if start == _LFS_MAGIC:
                raise FormatError(f"{path} is a Git-LFS pointer, not the weights. Run 'git lfs pull' in that folder.")
            if size < 8:
                raise FormatError(f"{path} has {size} bytes: it is truncated or empty. Fetch it again.")
            length = int.from_bytes(start[:8], "little")
            if length > MAX_HEADER_BYTES:
                raise FormatError(
                    f"{path}: a header of {length} bytes is larger than {MAX_HEADER_BYTES}: "
                    "this is no safetensors file, or it is damaged."
                )
            if length > size - 8:
                raise FormatError(
                    f"{path} is truncated: its header takes {length} bytes, the whole file has {size}. Fetch it again."
                )
            file.seek(8)
            raw = file.read(length)
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        header = json.loads(raw, object_pairs_hook=_no_duplicates)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: the header is not valid JSON: {str(error)[:200]}") from error
    if not isinstance(header, dict):
        raise FormatError(f"{path}: the header is no JSON object.")
    header.pop("__metadata__", None)
    tensors = {name: _tensor_info(path, name, entry) for name, entry in header.items()}
    _check_tiling(path, tensors, size - 8 - length)
    return tensors


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        repeated = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        raise FormatError(f"the header lists {listing(repeated)} twice.")
    return result


def _tensor_info(path: Path, name: str, entry: Any) -> TensorInfo:
    where = f"{path}: tensor {name}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{where}: wanted exactly dtype, shape and data_offsets in its header entry.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FormatError(f"{where}: unknown dtype {dtype!r}; known: {', '.join(DTYPES)}.")
    if not isinstance(shape, list) or len(shape) > _MAX_RANK or not all(type(n) is int for n in shape):
        raise FormatError(f"{where}: shape wanted a list of at most {_MAX_RANK} integers, got {str(shape)[:80]}.")
    if not all(0 < n < 1 << 63 for n in shape):
        raise FormatError(f"{where}: every dimension wanted in 1..2^63-1, got {shape}.")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int for n in offsets):
        raise FormatError(f"{where}: data_offsets wanted two integers, got {str(offsets)[:80]}.")
    begin, end = offsets
    wanted = prod(shape) * DTYPES[dtype].itemsize
    if not 0 <= begin <= end or end - begin != wanted:
        raise FormatError(f"{where}: {dtype} {shape} takes {wanted} bytes, but its data_offsets are [{begin}, {end}].")
    return TensorInfo(path, dtype, tuple(shape), begin, end)


def _check_tiling(path: Path, tensors: dict[str, TensorInfo], payload: int) -> None:
    """The tensors must tile the payload: no hole, no overlap, nothing missing or left over at the end."""
    position = 0
    for name, info in sorted(tensors.items(), key=lambda item: item[1].begin):
        if info.begin != position:
            kind = "overlaps the tensor before it" if info.begin < position else "leaves a hole before it"
            raise FormatError(f"{path}: tensor {name} at byte {info.begin} {kind} (which ends at {position}).")
        position = info.end
    if position > payload:
        raise FormatError(
            f"{path} is truncated: its header describes {position} bytes of weights, the file has {payload}. "
            "Fetch it again."
        )
    if position < payload:
        raise FormatError(f"{path}: {payload - position} bytes after the last tensor belong to nothing.")


def listing(names: Iterable[str], limit: int = 5) -> str:
    """The first few names, sorted, and how many more there are: for error messages."""
    ordered = sorted(names)
    rest = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + rest
