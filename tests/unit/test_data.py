"""Texts, token windows, the BOS policy, and the overlap of two sets of windows."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from conftest import make_text, make_tokenizer
from octavo._core.errors import FormatError, UsageError
from octavo.calibration.data import BUNDLED, EVALUATION, overlap, read_text, windows


@pytest.fixture(scope="module")
def plain_tokenizer() -> Any:
    return make_tokenizer(add_bos=False)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# -------------------------------------------------------------------------------------------------- reading


def test_files_are_joined_by_an_empty_line_in_the_order_given(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfsecond\r\nline")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "id": 7}\n')
    assert read_text(f"{tmp_path / 'b.txt'}, {tmp_path / 'a.jsonl'}") == "second\nline\n\none\n\ntwo"


def test_a_path_with_a_comma_is_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a,b.txt"
    path.write_text("content")
    assert read_text(str(path)) == "content"


def test_the_two_bundled_texts_exist_and_differ(tiny_tokenizer: Any) -> None:
    calibration, evaluation = read_text(BUNDLED), read_text(EVALUATION)
    assert len(calibration) > 10_000
    assert len(evaluation) > 1_000
    shared = overlap(windows(tiny_tokenizer, calibration, 64), windows(tiny_tokenizer, evaluation, 64))
    assert shared < 0.02


def test_a_missing_file_is_an_error_with_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "wiki.txt").write_text("x")
    with pytest.raises(UsageError, match=r"does not exist\. Did you mean 'wiki\.txt'"):
        read_text(str(tmp_path / "wikki.txt"))
    with pytest.raises(UsageError, match="is a folder"):
        read_text(str(tmp_path))
    with pytest.raises(UsageError, match="empty entry"):
        read_text("bundled,,bundled")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"PK\x03\x04\x00\x00", "binary file"),
        (b"caf\xe9", r"not UTF-8 \(byte 3: 0xe9\)"),
    ],
)
def test_files_that_are_no_text_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=message):
        read_text(str(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [("{'text': 1}", "line 2: not JSON"), ('{"content": "x"}', "line 2.*got keys"), ("[1]", "line 2.*got list")],
)
def test_a_bad_jsonl_line_is_named_by_its_number(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "good"}) + "\n" + line + "\n")
    with pytest.raises(FormatError, match=message):
        read_text(str(path))


def test_a_missing_datasets_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"pip install 'octavo\[data\]'"):
        read_text("datasets:some/set")


def test_dataset_names_carry_configuration_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def load(*args: str, split: str, streaming: bool) -> list[dict[str, str]]:
        calls.append((*args, split, streaming))
        if args[0] == "gated":
            raise ValueError("you need to log in")
        return [{"text": "one"}, {"text": "two"}] if args[0] != "other" else [{"content": "x"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))
    assert read_text("datasets:org/name") == "one\n\ntwo"
    read_text("datasets:org/name:config:test")
    read_text("datasets:org/name:validation")
    read_text("datasets:org/name:config")
    assert calls == [
        ("org/name", "train", True),
        ("org/name", "config", "test", True),
        ("org/name", "validation", True),
        ("org/name", "config", "train", True),
    ]
    with pytest.raises(FormatError, match="no column 'text'; its columns are content"):
        read_text("datasets:other")
    with pytest.raises(UsageError, match=r"log in.*HF_TOKEN.*HF_HUB_OFFLINE"):
        read_text("datasets:gated")
    with pytest.raises(UsageError, match="wanted datasets:NAME"):
        read_text("datasets:a:b:c:d")


# -------------------------------------------------------------------------------------------------- windows


def test_evaluation_windows_are_the_text_in_order_and_count_the_tail(plain_tokenizer: Any, tiny_text: str) -> None:
    tokens = windows(plain_tokenizer, tiny_text, 100)
    ids = ids_of(plain_tokenizer, tiny_text)
    assert tokens.ids.dtype == torch.int64
    assert tokens.ids.flatten().tolist() == ids[: tokens.ids.numel()]
    assert tokens.dropped_tail == len(ids) - tokens.ids.numel() < 100
    assert tokens.bos == "none"


def test_bos_comes_once_per_window_where_the_tokenizer_adds_it_itself(tiny_tokenizer: Any, tiny_text: str) -> None:
    tokens = windows(tiny_tokenizer, tiny_text, 100)
    assert tokens.bos == "per-window <s>"
    assert tokens.ids[:, 0].eq(tiny_tokenizer.bos_token_id).all()
    assert tokens.ids[:, 1:].ne(tiny_tokenizer.bos_token_id).all()
    assert tokens.ids[:, 1:].flatten().tolist() == ids_of(tiny_tokenizer, tiny_text)[: len(tokens.ids) * 99]


def test_a_text_that_begins_with_bos_does_not_get_it_twice(tiny_tokenizer: Any, tiny_text: str) -> None:
    assert windows(tiny_tokenizer, "<s>" + tiny_text, 50).sha256 == windows(tiny_tokenizer, tiny_text, 50).sha256


def test_calibration_windows_follow_from_the_seed_and_do_not_overlap(plain_tokenizer: Any, tiny_text: str) -> None:
    first, again, other = (windows(plain_tokenizer, tiny_text, 32, samples=20, seed=s) for s in (1, 1, 2))
    assert first.ids.shape == (20, 32)
    assert first.sha256 == again.sha256 != other.sha256
    stream = ids_of(plain_tokenizer, tiny_text)
    numbered = torch.arange(len(stream))
    # A tokenizer whose ids are the positions shows where the windows lie.
    positions = windows(_Positions(numbered.tolist()), "x" * len(stream), 32, samples=len(stream) // 32, seed=1)
    assert len(set(positions.ids.flatten().tolist())) == positions.ids.numel()
    assert positions.ids.diff(dim=1).eq(1).all()


class _Positions:
    """Tokenises any text but the probe to a fixed list of ids."""

    def __init__(self, ids: list[int]) -> None:
        self._ids = ids

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [7] if text == "a" else self._ids}


def test_without_a_seed_the_first_windows_are_taken_at_most_as_many_as_asked(
    plain_tokenizer: Any, tiny_text: str
) -> None:
    everything = windows(plain_tokenizer, tiny_text, 64)
    assert torch.equal(windows(plain_tokenizer, tiny_text, 64, samples=3).ids, everything.ids[:3])
    assert windows(plain_tokenizer, tiny_text, 64, samples=10**6).sha256 == everything.sha256


def test_too_little_text_is_an_error_with_the_numbers(plain_tokenizer: Any, tiny_text: str) -> None:
    have = len(ids_of(plain_tokenizer, tiny_text))
    with pytest.raises(
        UsageError, match=rf"{have} tokens, but 1000 window\(s\) of 128 need 128000.*at most {have // 128}"
    ):
        windows(plain_tokenizer, tiny_text, 128, samples=1000, seed=0)
    with pytest.raises(
        UsageError, match=r"too little text in notes\.txt: it has \d+ tokens, but 1 window\(s\) of 64 need 64"
    ):
        windows(plain_tokenizer, "river stone", 64, source="notes.txt")


def test_a_context_that_the_model_does_not_have_is_refused(plain_tokenizer: Any, tiny_text: str) -> None:
    with pytest.raises(UsageError, match="ctx 512 is longer than the 256 positions"):
        windows(plain_tokenizer, tiny_text, 512, limit=256)
    with pytest.raises(UsageError, match="ctx wanted >= 2, got 1"):
        windows(plain_tokenizer, tiny_text, 1)
    with pytest.raises(UsageError, match="samples wanted >= 1"):
        windows(plain_tokenizer, tiny_text, 64, samples=0, seed=0)


def test_the_hash_is_that_of_shape_and_little_endian_ids(plain_tokenizer: Any, tiny_text: str) -> None:
    tokens = windows(plain_tokenizer, tiny_text, 64, samples=2, seed=0)
    content = np.array([2, 64], "<i8").tobytes() + tokens.ids.numpy().astype("<i8").tobytes()
    assert tokens.sha256 == hashlib.sha256(content).hexdigest()
    other_shape = windows(plain_tokenizer, tiny_text, 128, samples=1).sha256
    assert other_shape != windows(plain_tokenizer, tiny_text, 64, samples=2).sha256


# -------------------------------------------------------------------------------------------------- overlap


def test_overlap_is_one_for_the_same_text_and_its_share_for_a_part(plain_tokenizer: Any) -> None:
    text, stranger = make_text(3000, seed=1), make_text(3000, seed=2)
    known = windows(plain_tokenizer, text, 256)
    assert overlap(known, known) == 1.0
    new = windows(plain_tokenizer, stranger, 256)
    base = overlap(known, new)
    assert base < 0.3
    mixed = SimpleNamespace(ids=torch.cat([known.ids[:5], new.ids[:5]]))
    assert overlap(known, mixed) == pytest.approx(0.5 + base / 2, abs=0.1)  # type: ignore[arg-type]


def test_overlap_agrees_with_counting_tuples(plain_tokenizer: Any) -> None:
    one = windows(plain_tokenizer, make_text(300, seed=3), 20)
    two = windows(plain_tokenizer, make_text(300, seed=4), 24)

    def grams(ids: torch.Tensor) -> set[tuple[int, ...]]:
        return {tuple(row[i : i + 16]) for row in ids.tolist() for i in range(len(row) - 15)}

    seen, asked = grams(one.ids), grams(two.ids)
    assert overlap(one, two) == pytest.approx(len(seen & asked) / len(asked))
