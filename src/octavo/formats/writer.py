"""Writing sharded safetensors: durable, deterministic, one shard in memory at a time.

The safetensors library writes its files with mode 0600 and without fsync, and reorders tensors; the format is small
enough to write it here, and reading goes through the library.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo._core.errors import UsageError
from octavo._core.io import disk_errors, fsync_dir, require_space, write_json
from octavo.formats.reader import DTYPES, INDEX_FILE, SINGLE_FILE

_CODES = {dtype: code for code, dtype in DTYPES.items()}


class ShardWriter:
    """Writes tensors, in the order in which they are added, to shards of about ``max_shard_bytes``.

    A finished checkpoint is ``model.safetensors``, or ``model-0000i-of-0000n.safetensors`` with
    ``model.safetensors.index.json``, which is written last. Until :meth:`finish` only hidden temporary files exist;
    used as a context manager, they are removed when the block fails. The same tensors give the same bytes.

    Raises:
        UsageError: the folder already holds weights; nothing of other people's is overwritten.
    """

    def __init__(self, folder: str | Path, max_shard_bytes: int = 1 << 30) -> None:
        if max_shard_bytes < 1:
            raise UsageError(f"max_shard_bytes wanted >= 1, got {max_shard_bytes}.")
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        present = sorted(
            p.name for p in self.folder.iterdir() if p.name.endswith(".safetensors") or p.name == INDEX_FILE
        )
        if present:
            raise UsageError(f"{self.folder} already holds weights ({present[0]}). Choose another output folder.")
        self._max = max_shard_bytes
        self._names: set[str] = set()
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[tuple[Path, list[str]]] = []
        self._total = 0
        self._closed = False

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one tensor of any shape and device; it must not change until its shard is full and written.

        Raises:
            UsageError: an empty or repeated name, a dtype that safetensors lacks, or an empty tensor.
            ResourceError: the disk is full; the temporary files are gone.
        """
        self._require_open()
        if not name or name == "__metadata__" or name in self._names:
            raise UsageError(
                f"{self.folder}: cannot write a tensor called {name!r}: empty, reserved or written already."
            )
        if tensor.dtype not in _CODES or tensor.numel() == 0:
            raise UsageError(f"{self.folder}: cannot write {name}: {tensor.dtype} {tuple(tensor.shape)}.")
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self._max:
            self._flush()
        self._names.add(name)
        self._pending[name] = tensor.detach().to("cpu").contiguous()
        self._pending_bytes += size

    def finish(self) -> dict[str, Any]:
        """Write the last shard, give all of them their names, and the index if there is more than one.

        Returns:
            The index: ``{"metadata": {"total_size": bytes}, "weight_map": {tensor: file}}``.

        Raises:
            UsageError: nothing was added.
            ResourceError: the disk is full; the temporary files are gone.
        """
        self._require_open()
        if self._pending:
            self._flush()
        if not self._shards:
            raise UsageError(f"{self.folder}: a checkpoint without tensors cannot be written.")
        count, weight_map = len(self._shards), {}
        for number, (temporary, names) in enumerate(self._shards, 1):
            final = SINGLE_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            os.replace(temporary, self.folder / final)
            weight_map.update(dict.fromkeys(names, final))
        fsync_dir(self.folder)
        index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        if count > 1:
            write_json(self.folder / INDEX_FILE, index)
        self._closed = True
        return index

    def abort(self) -> None:
        """Remove the temporary files; the writer cannot be used any more."""
        for temporary, _ in self._shards:
            temporary.unlink(missing_ok=True)
        self._pending = {}
        self._closed = True

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self.abort()

    def _require_open(self) -> None:
        if self._closed:
            raise UsageError(f"{self.folder}: this writer is finished or failed before; start again with a new one.")

    def _flush(self) -> None:
        # Wide elements first keeps every tensor aligned without holes, which the format forbids.
        ordered = sorted(self._pending.items(), key=lambda item: -item[1].element_size())
        header = _header(ordered)
        temporary = self.folder / f".shard-{len(self._shards) + 1:05d}.{os.getpid()}.tmp"
        try:
            require_space(self.folder, len(header) + self._pending_bytes, f"shard {len(self._shards) + 1}")
            with disk_errors(temporary), open(temporary, "wb") as file:
                file.write(header)
                for _, tensor in ordered:
                    file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            temporary.unlink(missing_ok=True)
            self.abort()
            raise
        self._shards.append((temporary, list(self._pending)))
        self._total += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0


def _header(tensors: list[tuple[str, Tensor]]) -> bytes:
    """Length, JSON header padded with spaces to 8 bytes, as the safetensors specification wants it."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in tensors:
        end = position + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
