"""A .gguf file to an ordinary Hugging Face folder, once, through transformers' own GGUF reader."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from octavo._core.errors import FormatError, UsageError
from octavo._core.io import default_mode, disk_errors, fsync_dir, fsync_file, require_space, sha256_file

_MAGIC = b"GGUF"
_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)


def convert(path: Path, work: Path | None = None) -> Path:
    """Decode a .gguf file to bfloat16 safetensors with config, tokenizer and chat template.

    The result is named after the file's content and appears all at once, so a second call only returns it, and a
    killed one leaves nothing that could be mistaken for a model.

    Args:
        path: the file, in one part.
        work: where to put the folder; a cache folder of the user's if None.

    Raises:
        FormatError: no GGUF file, damaged, of an architecture that transformers does not know, or incomplete.
        UsageError: one part of a split file.
        ResourceError: no space for the decoded weights.
    """
    with open(path, "rb") as file:
        if file.read(4) != _MAGIC:
            raise FormatError(f"{path} is no GGUF file (it does not begin with 'GGUF'). Is the download complete?")
    if _SPLIT.search(path.name):
        raise UsageError(f"{path} is one part of a split GGUF. Merge the parts first (llama-gguf-split --merge).")
    parent = work if work is not None else _cache_folder()
    folder = parent / f"gguf-{sha256_file(path)[:16]}"
    if folder.is_dir():
        return folder
    parent.mkdir(parents=True, exist_ok=True)
    # 2-bit files grow eightfold in bfloat16.
    require_space(parent, 8 * path.stat().st_size, f"converting {path.name} to bfloat16")
    temporary = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=parent))
    try:
        with disk_errors(temporary):
            _write(path, temporary)
        for file in temporary.iterdir():
            file.chmod(default_mode())
            fsync_file(file)
        temporary.chmod(default_mode() | 0o111)
        os.rename(temporary, folder)
        fsync_dir(parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "octavo"


def _write(path: Path, folder: Path) -> None:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {}
    # Newer transformers keep the blocks of the file packed, which cannot be saved, unless told otherwise.
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.bfloat16, output_loading_info=True, **options
        )
        model, report = loaded
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:
        # Several parsers read the file's bytes; a damaged one can make them fail in any way.
        raise FormatError(
            f"transformers {transformers.__version__} cannot read {path}: {str(error)[:400] or type(error).__name__}. "
            "The file is damaged, or of an architecture that it does not know; pass the original model instead."
        ) from error
    missing = sorted(report["missing_keys"])
    if missing or report["mismatched_keys"]:
        raise FormatError(
            f"{path} does not hold the whole model: {len(missing)} tensors are missing ({', '.join(missing[:4])}) and "
            f"{len(report['mismatched_keys'])} have other shapes. Pass the original model instead."
        )
    model.save_pretrained(folder, max_shard_size="2GB")
    tokenizer.save_pretrained(folder)
