"""Small quantization jobs, and what there is to say about their files."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from octavo.models.adapter import CausalModel
from octavo.models.source import ModelSource
from octavo.pipeline import Report, quantize
from octavo.pipeline import run as pipeline_run
from octavo.pipeline import store as pipeline_store

#: Needs no calibration, so a job on a tiny model takes a fraction of a second.
RTN: dict[str, Any] = {"method": "rtn", "bits": 4, "options": {"group_size": 32}}


def gptq(text: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a job with calibration and error feedback."""
    settings = {"method": "gptq", "bits": 3, "calib": text, "samples": 2, "ctx": 16, "options": {"group_size": 32}}
    return settings | changes


def vptq(text: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a job with everything: calibration, randomness, learned codebooks."""
    options = {"iterations": 2, "sweeps": 0}
    return {"method": "vptq", "bits": 3, "calib": text, "samples": 2, "ctx": 16, "options": options} | changes


def run(model: Path, out: Path, settings: dict[str, Any] | None = None, **changes: Any) -> Report:
    """Quantize with the given settings (RTN if none), some of them changed."""
    return quantize(model, out, **{**(settings or RTN), **changes})


def stop_after(blocks: int) -> Callable[[], bool]:
    """A ``stop`` that answers yes after that many blocks."""
    asked: list[None] = []

    def stop() -> bool:
        asked.append(None)
        return len(asked) == blocks

    return stop


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, by relative name."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def with_tensors(model: Path, target: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of a one-shard model with changed tensors."""
    shutil.copytree(model, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def with_config(model: Path, target: Path, **values: Any) -> Path:
    """A copy of a model with changed entries of config.json."""
    shutil.copytree(model, target)
    config = json.loads((target / "config.json").read_text()) | values
    (target / "config.json").write_text(json.dumps(config))
    return target


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """A disk that takes no file of more than ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def make_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Open a model once for many jobs, and measure no machine: what remains is arithmetic and files."""
    opened: dict[tuple[Path, tuple[str, ...], bool], CausalModel] = {}

    def open_once(source: ModelSource, *, skip: Sequence[str] = (), with_ends: bool = False) -> CausalModel:
        key = (source.folder, tuple(skip), with_ends)
        if key not in opened:
            opened[key] = CausalModel(source, skip=skip, with_ends=with_ends)
        return opened[key]

    monkeypatch.setattr(pipeline_run, "CausalModel", open_once)
    # The package re-exports a function of the module's name.
    monkeypatch.setattr(import_module("octavo.pipeline.plan"), "_measured_flops", lambda: 1e9)


#: Where the disk changes: (module, function). Deletions do not fail for want of space.
WRITES = (
    (os, "mkdir"),
    (os, "fsync"),
    (os, "replace"),
    (os, "rename"),
    (pipeline_store, "save_file"),
    (shutil, "copyfile"),
)
DELETIONS = ((os, "unlink"), (os, "rmdir"))


@contextmanager
def before_each(operations: Sequence[tuple[Any, str]], act: Callable[[], None]) -> Iterator[None]:
    """Call ``act`` before every one of the operations, but not for those that ``act`` does itself."""
    acting = [False]

    def wrapped(real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            if not acting[0]:
                acting[0] = True
                try:
                    act()
                finally:
                    acting[0] = False
            return real(*args, **kwargs)

        return operation

    with pytest.MonkeyPatch.context() as patch:
        for module, name in operations:
            patch.setattr(module, name, wrapped(getattr(module, name)))
        yield
