"""From text to token windows: what is read, how it is cut, and where the BOS token goes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib import import_module, resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from octavo._core.errors import FormatError, UsageError, did_you_mean
from octavo._core.seeds import generator

#: The calibration text that comes with the package.
DEFAULT_CTX = 1024
BUNDLED = "bundled"
#: The (other) text that comes with the package to be measured on.
EVALUATION = "bundled-evaluation"
_DATASETS = "datasets:"
_SPLITS = ("train", "test", "validation", "valid", "dev")
#: More of a ``datasets`` split is never read: 64 million characters are about 16 million tokens.
MAX_DATASET_CHARACTERS = 64_000_000
_GRAM = 16


@dataclass(frozen=True)
class Tokens:
    """Token windows of equal length.

    Attributes:
        ids: [windows, ctx], int64.
        sha256: of shape and ids (little-endian int64); equal hashes mean equal tokens.
        bos: ``none``, or ``per-window <s>`` when every window begins with the tokenizer's own prefix.
        source: where the text came from, for reports.
        dropped_tail: tokens of the text behind the last window that are not used.
    """

    ids: Tensor
    sha256: str
    bos: str
    source: str
    dropped_tail: int


# -------------------------------------------------------------------------------------------------- reading


def read_text(spec: str) -> str:
    """The text that ``spec`` names, with ``\\n`` line ends.

    Args:
        spec: ``bundled``, ``bundled-evaluation``, a UTF-8 text file, a .jsonl file whose lines have "text", a
            ``datasets:NAME[:config][:split]`` of the Hugging Face hub (column "text", split "train" if not given), or
            a comma-separated list of these, which are joined by empty lines.

    Raises:
        UsageError: nothing of that name, or the package ``datasets`` is needed and missing.
        FormatError: a file that is empty, binary, not UTF-8, or not the jsonl that is wanted.
    """
    if "," in spec and not Path(spec).expanduser().exists():
        parts = [part.strip() for part in spec.split(",")]
        if not all(parts):
            raise UsageError(f"text {spec!r}: an empty entry in the comma-separated list.")
        return "\n\n".join(read_text(part) for part in parts)
    if spec == BUNDLED:
        return _packaged("text")
    if spec == EVALUATION:
        return _packaged("text/evaluation")
    if spec.startswith(_DATASETS):
        return _from_datasets(spec.removeprefix(_DATASETS))
    path = Path(spec).expanduser()
    if path.is_dir():
        raise UsageError(f"text {path} is a folder; name a .txt or .jsonl file in it.")
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UsageError(
            f"text file {path} does not exist.{did_you_mean(path.name, siblings)} Known besides files: {BUNDLED!r}, "
            f"{EVALUATION!r} and datasets:NAME."
        )
    text = _decode(path)
    return _from_jsonl(path, text) if path.suffix.lower() in (".jsonl", ".ndjson") else text


def _packaged(folder: str) -> str:
    root = resources.files("octavo.calibration").joinpath(folder)
    files = [f for f in root.iterdir() if f.name.endswith(".txt")] if root.is_dir() else []
    if not files:
        raise FormatError("the text that comes with Octavo is missing from this installation; reinstall the package.")
    return "\n\n".join(f.read_text("utf-8").strip("\n") for f in sorted(files, key=lambda f: f.name))


def _decode(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"text file {path} cannot be read: {error.strerror}.") from error
    if b"\0" in data[: 1 << 20]:
        raise FormatError(f"{path} is a binary file; a UTF-8 text or jsonl file is wanted.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{path} is not UTF-8 (byte {error.start}: 0x{data[error.start]:02x}). Convert it first."
        ) from error
    if not text.strip():
        raise FormatError(f"{path} is empty.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _from_jsonl(path: Path, text: str) -> str:
    documents: list[str] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{path}, line {number}: not JSON ({str(error)[:100]}).") from error
        document = entry.get("text") if isinstance(entry, dict) else None
        if not isinstance(document, str):
            has = f"keys {sorted(entry)[:6]}" if isinstance(entry, dict) else type(entry).__name__
            raise FormatError(f'{path}, line {number}: an object with a string "text" is wanted, got {has}.')
        documents.append(document)
    joined = "\n\n".join(documents)
    if not joined.strip():
        raise FormatError(f"{path}: all its documents are empty.")
    return joined


def _from_datasets(spec: str) -> str:
    name, *rest = spec.split(":")
    if not name or len(rest) > 2:
        raise UsageError(
            f"'{_DATASETS}{spec}': wanted datasets:NAME, datasets:NAME:config or datasets:NAME:config:split."
        )
    split = rest.pop() if len(rest) == 2 or (rest and rest[0].split("[")[0] in _SPLITS) else "train"
    try:
        datasets = import_module("datasets")
    except ImportError as error:
        raise UsageError(
            f"'{_DATASETS}{spec}' needs the package 'datasets': pip install 'octavo[data]'. "
            f"Or pass a text file, or {BUNDLED!r}, which works offline."
        ) from error
    try:
        rows = datasets.load_dataset(name, *rest, split=split, streaming=True)
        documents: list[str] = []
        characters = 0
        for row in rows:
            if not isinstance(row.get("text"), str):
                raise FormatError(f"dataset {name}: no column 'text'; its columns are {', '.join(sorted(row))}.")
            documents.append(row["text"])
            characters += len(row["text"])
            if characters >= MAX_DATASET_CHARACTERS:
                break
    except (OSError, ValueError) as error:
        raise UsageError(
            f"dataset {name!r} ({', '.join([*rest, split])}) cannot be read: {str(error)[:300]}. Check the name; a "
            f"gated one needs HF_TOKEN, and HF_HUB_OFFLINE must not be set. {BUNDLED!r} works offline."
        ) from error
    if not any(document.strip() for document in documents):
        raise FormatError(f"dataset {name!r}: split {split!r} has no text.")
    return "\n\n".join(documents)


# -------------------------------------------------------------------------------------------------- cutting


def window_length(ctx: int | None, positions: int | None) -> int:
    """Tokens per window: ``ctx`` if given, else 1024 or as many as the model has positions."""
    return ctx if ctx is not None else min(DEFAULT_CTX, positions or DEFAULT_CTX)


def windows(
    tokenizer: Any,
    text: str,
    ctx: int,
    samples: int | None = None,
    seed: int | None = None,
    *,
    limit: int | None = None,
    source: str = "",
) -> Tokens:
    """Tokenise ``text`` as a whole, without special tokens, and cut it into windows of ``ctx`` that do not overlap.

    A tokenizer that puts a prefix (BOS) before a text by itself gets it at the start of every window, once, as part of
    ``ctx``; another tokenizer gets none.

    Args:
        tokenizer: a transformers tokenizer.
        ctx: tokens per window.
        samples: how many windows; all that fit if None.
        seed: choose the ``samples`` windows at random, all of them (calibration). None: the first ones in the order of
            the text, at most ``samples`` (evaluation).
        limit: positions that the model has.
        source: description for :attr:`Tokens.source`.

    Raises:
        UsageError: a text that is too short, with the numbers, or a ``ctx`` that model or prefix do not allow.
    """
    if limit is not None and ctx > limit:
        raise UsageError(f"ctx {ctx} is longer than the {limit} positions of the model (max_position_embeddings).")
    if samples is not None and samples < 1:
        raise UsageError(f"samples wanted >= 1, got {samples}")
    prefix = _prefix(tokenizer)
    body = ctx - len(prefix)
    if body < 2:
        raise UsageError(f"ctx wanted >= {len(prefix) + 2}, got {ctx}")
    ids = _tokenize(tokenizer, text)
    if prefix and ids[: len(prefix)] == prefix:
        ids = ids[len(prefix) :]
    have, fitting = len(ids), len(ids) // body
    need = samples if samples is not None and seed is not None else 1
    if fitting < need:
        shorter = f", --ctx at most {have // need + len(prefix)}" if have // need > 1 else ""
        fewer = f", --samples at most {fitting}" if fitting and need > 1 else ""
        raise UsageError(
            f"too little text{f' in {source}' if source else ''}: it has {have} tokens, but {need} window(s) of {ctx} "
            f"need {need * body}. Text is never repeated: use more of it{fewer}{shorter}."
        )
    stream = torch.tensor(ids, dtype=torch.int64)
    if samples is not None and seed is not None:
        rng = generator(seed, "calibration windows")
        start = int(torch.randint(have - fitting * body + 1, (1,), generator=rng))
        slots = torch.randperm(fitting, generator=rng)[:samples]
    else:
        start, slots = 0, torch.arange(min(fitting, samples or fitting))
    cut = stream[start : start + fitting * body].view(fitting, body)[slots]
    head = torch.tensor(prefix, dtype=torch.int64).expand(len(cut), -1)
    cut = torch.cat([head, cut], dim=1).contiguous()
    bos = "per-window " + "".join(tokenizer.convert_ids_to_tokens(prefix)) if prefix else "none"
    return Tokens(cut, _hash(cut), bos, source, have - len(cut) * body)


def _tokenize(tokenizer: Any, text: str) -> list[int]:
    # verbose=False: the warning about texts longer than the model's context does not apply to windows.
    return list(tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"])


def _prefix(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts before every text by itself: usually [BOS] or nothing."""
    probe = "a"
    plain = _tokenize(tokenizer, probe)
    full = list(tokenizer(probe, verbose=False)["input_ids"])
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    raise UsageError(
        f"{type(tokenizer).__name__} tokenises {probe!r} as {full} with special tokens and as {plain} without: "
        "Octavo cannot tell what it puts before a text."
    )


def _hash(ids: Tensor) -> str:
    digest = hashlib.sha256(np.asarray(ids.shape, dtype="<i8").tobytes())
    digest.update(ids.numpy().astype("<i8").tobytes())
    return digest.hexdigest()


# -------------------------------------------------------------------------------------------------- comparing


def overlap(calibration: Tokens, test: Tokens) -> float:
    """Share of the distinct 16-token sequences of ``test`` that also occur in ``calibration``, 0..1.

    Near 0 for different texts; a larger share means that the test measures memory of the calibration text.
    """
    length = min(_GRAM, calibration.ids.shape[1], test.ids.shape[1])
    seen, asked = (_grams(tokens.ids, length) for tokens in (calibration, test))
    return float(np.isin(asked, seen, assume_unique=True).mean())


def _grams(ids: Tensor, length: int) -> np.ndarray:
    """Distinct 64-bit polynomial hashes of all runs of ``length`` tokens inside the windows."""
    tokens = ids.numpy().astype(np.uint64)
    count = tokens.shape[1] - length + 1
    value = np.zeros((tokens.shape[0], count), dtype=np.uint64)
    for offset in range(length):
        value = value * np.uint64(6364136223846793005) + tokens[:, offset : offset + count] + np.uint64(1)
    return np.unique(value)
