"""Multiple-choice scoring against the same sums written out by hand, and the reader's refusals."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from octavo._core.errors import FormatError, NumericalError, UsageError
from octavo.evaluation import harness
from octavo.evaluation.zeroshot import Item, Task, evaluate_task, read_task

VOCABULARY = 130


class Characters:
    """A tokenizer of one token per ASCII character, with an optional BOS, and EOS if asked for."""

    bos_token_id = 128
    eos_token_id = 129
    eos_token = "</s>"

    def __init__(self, bos: bool = False, eos: bool = False) -> None:
        self.bos, self.eos = bos, eos

    def __call__(self, text: str) -> dict[str, list[int]]:
        ids = [ord(c) for c in text]
        return {"input_ids": [self.bos_token_id] * self.bos + ids + [self.eos_token_id] * self.eos}


class Bigram(nn.Module):
    """log p(next | token) from a table; the attention mask must mark exactly the padding."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.shapes: list[tuple[int, int]] = []

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if attention_mask is not None:
            self.shapes.append((tokens.shape[0], tokens.shape[1]))
            lengths = attention_mask.sum(1)
            positions = torch.arange(tokens.shape[1])
            assert bool(((positions < lengths.unsqueeze(1)) == attention_mask.bool()).all())
            assert bool((tokens[attention_mask == 0] == 0).all())
        return self.table[tokens]


def bigram(seed: int = 0) -> Bigram:
    return Bigram(3 * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed)))


def task(*items: Item) -> Task:
    return Task("toy", items, "0" * 64)


def by_hand(model: Bigram, query: str, choice: str) -> float:
    log_p = torch.log_softmax(model.table.detach().double(), -1)
    text = query + choice
    return sum(float(log_p[ord(text[i - 1]), ord(text[i])]) for i in range(len(query), len(text)))


def random_items(count: int) -> list[Item]:
    g = torch.Generator().manual_seed(5)

    def word(low: int, high: int) -> str:
        length = int(torch.randint(low, high, (1,), generator=g))
        return "".join(chr(int(c)) for c in torch.randint(97, 123, (length,), generator=g))

    return [
        Item((query := "Q" + word(1, 30), query, query), (" " + word(1, 4), " " + word(3, 9), " " + word(5, 20)), n % 3)
        for n in range(count)
    ]


@pytest.mark.parametrize("batch_tokens", [1, 64, 100_000])
@pytest.mark.parametrize("bos", [False, True])
def test_accuracy_is_that_of_the_summed_log_probabilities(batch_tokens: int, bos: bool) -> None:
    model, items = bigram(), random_items(40)
    right = right_norm = 0
    for item in items:
        sums = [by_hand(model, q, c) for q, c in zip(item.queries, item.choices, strict=True)]
        norm = [s / len(c.strip()) for s, c in zip(sums, item.choices, strict=True)]
        right += max(range(3), key=sums.__getitem__) == item.gold
        right_norm += max(range(3), key=norm.__getitem__) == item.gold
    got = evaluate_task(model, Characters(bos), task(*items), batch_tokens=batch_tokens)
    assert got.acc == right / 40
    assert got.acc_norm == right_norm / 40
    assert got.acc != got.acc_norm
    assert got.acc_se == pytest.approx((got.acc * (1 - got.acc) / 39) ** 0.5)
    assert got.chance == pytest.approx(1 / 3)


def test_length_normalisation_counts_bytes_of_the_choice() -> None:
    """The same log-probability per character: the longer choice loses the sum and ties per byte unless it is better."""
    table = torch.zeros(VOCABULARY, VOCABULARY)
    table[ord("b"), ord("b")] = 1.0
    item = Item(("q", "q"), (" a", " bbbbbb"), 1)
    got = evaluate_task(Bigram(table), Characters(), task(item))
    assert (got.acc, got.acc_norm) == (0.0, 1.0)


def test_a_query_of_its_own_for_every_choice_is_scored_on_the_common_ending() -> None:
    model = bigram(3)
    ending = " ran."
    first, second = by_hand(model, "the cat", ending), by_hand(model, "the dog", ending)
    item = Item(("the cat", "the dog"), (ending, ending), int(second > first))
    assert evaluate_task(model, Characters(), task(item)).acc == 1.0


def test_white_space_that_ends_a_query_belongs_to_the_choice() -> None:
    model = bigram(4)
    spaced = Item(("ab ", "ab "), ("c", "d"), 0)
    plain = Item(("ab", "ab"), (" c", " d"), 0)
    got = [evaluate_task(model, Characters(), task(item)).acc for item in (spaced, plain)]
    assert got[0] == got[1]


def test_an_appended_end_token_is_not_scored() -> None:
    items = random_items(20)
    plain = evaluate_task(bigram(), Characters(bos=True), task(*items))
    assert evaluate_task(bigram(), Characters(bos=True, eos=True), task(*items)) == plain


def test_an_empty_query_is_conditioned_on_the_beginning_of_text() -> None:
    table = torch.zeros(VOCABULARY, VOCABULARY)
    table[128, ord("x")] = 5.0
    assert evaluate_task(Bigram(table), Characters(), task(Item(("", ""), ("y", "x"), 1))).acc == 1.0


def test_a_single_choice_is_right_when_it_is_the_greedy_continuation() -> None:
    table = torch.zeros(VOCABULARY, VOCABULARY)
    table[ord("a"), ord("b")] = table[ord("b"), ord("c")] = 1.0
    got = evaluate_task(
        Bigram(table), Characters(), task(Item(("xa",), ("bc",), 0), Item(("xa",), ("bd",), 0), Item(("a",), ("b",), 0))
    )
    assert got.acc == pytest.approx(2 / 3)
    assert got.chance is None


def test_texts_longer_than_the_context_lose_their_beginning_and_are_counted() -> None:
    model, items = bigram(), random_items(10)
    got = evaluate_task(model, Characters(), task(*items), max_tokens=25)
    assert max(columns for _, columns in model.shapes) == 25
    assert got.truncated > 0
    assert got.acc == evaluate_task(bigram(), Characters(), task(*items)).acc


def test_a_choice_longer_than_the_context_is_refused() -> None:
    with pytest.raises(UsageError, match="longer than the model's context of 4"):
        evaluate_task(bigram(), Characters(), task(*random_items(3)), max_tokens=4)


def test_batches_hold_no_more_tokens_than_asked_for() -> None:
    model = bigram()
    evaluate_task(model, Characters(), task(*random_items(20)), batch_tokens=100)
    assert max(rows * columns for rows, columns in model.shapes) <= 100
    assert sum(rows for rows, _ in model.shapes) == 60


def test_non_finite_logits_are_an_error() -> None:
    model = bigram()
    model.table.data[ord("Q")] = float("nan")
    with pytest.raises(NumericalError, match="model small"):
        evaluate_task(model, Characters(), task(Item(("aQ", "aQ"), ("b", "c"), 0)), name="small")


# ------------------------------------------------------------------------------------------------ files

GOOD: dict[str, Any] = {"query": "Question: why?\nAnswer:", "choices": [" because", " no"], "gold": 1}


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_a_task_file_is_read_with_its_hash_and_empty_lines_are_skipped(tmp_path: Path) -> None:
    path = write(tmp_path / "toy.jsonl", GOOD, "", {**GOOD, "query": ["a", "b"], "gold": 0})
    got = read_task(path)
    assert got.name == "toy"
    assert got.items == (Item((GOOD["query"],) * 2, (" because", " no"), 1), Item(("a", "b"), (" because", " no"), 0))
    assert len(got.sha256) == 64
    assert len(read_task(path, limit=1).items) == 1


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{not json", "not JSON"),
        ("[1, 2]", "a JSON list instead of an object"),
        ({"query": "a", "choices": ["b"]}, "no 'gold'"),
        ({**GOOD, "choices": []}, "'choices' is no list"),
        ({**GOOD, "choices": ["a", ""]}, "'choices' is no list"),
        ({**GOOD, "choices": ["a", 3]}, "'choices' is no list"),
        ({**GOOD, "query": ["only one"]}, "nor a list of 2 texts"),
        ({**GOOD, "query": 5}, "'query' is neither"),
        ({**GOOD, "gold": 2}, "'gold' is 2, not an index into 2 choices"),
        ({**GOOD, "gold": -1}, "'gold' is -1"),
        ({**GOOD, "gold": "1"}, "'gold' is '1'"),
        ({**GOOD, "gold": True}, "'gold' is True"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(tmp_path: Path, line: Any, says: str) -> None:
    path = write(tmp_path / "toy.jsonl", GOOD, GOOD, line, GOOD)
    with pytest.raises(FormatError) as caught:
        read_task(path)
    assert f"{path}, line 3: " in str(caught.value)
    assert says in str(caught.value)
    assert 'wanted {"query"' in str(caught.value)


def test_missing_and_empty_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot be read"):
        read_task(tmp_path / "none.jsonl")
    with pytest.raises(FormatError, match="has no items"):
        read_task(write(tmp_path / "empty.jsonl", ""))


# ------------------------------------------------------------------------------------------------ lm-eval


def test_a_missing_harness_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(UsageError, match=r'pip install "octavo\[eval\]"'):
        harness.run(nn.Identity(), None, ["arc_easy"])


def test_the_harness_gets_the_model_object_and_its_numbers_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, Any] = {}

    class Wrapped:
        def __init__(self, **options: Any) -> None:
            calls["model"] = options

    class Manager:
        def match_tasks(self, names: list[str]) -> list[str]:
            return [name for name in names if name == "arc_easy"]

    def simple_evaluate(**options: Any) -> dict[str, Any]:
        calls["run"] = options
        return {
            "results": {"arc_easy": {"alias": "arc_easy", "acc,none": 0.5, "acc_stderr,none": 0.1}},
            "versions": {"arc_easy": 1.0},
            "n-shot": {"arc_easy": 0},
        }

    modules = {
        "lm_eval": SimpleNamespace(simple_evaluate=simple_evaluate),
        "lm_eval.models": SimpleNamespace(),
        "lm_eval.models.huggingface": SimpleNamespace(HFLM=Wrapped),
        "lm_eval.tasks": SimpleNamespace(TaskManager=Manager),
    }
    for name, module in modules.items():
        monkeypatch.setitem(__import__("sys").modules, name, module)
    model = nn.Identity()
    got = harness.run(model, "tokenizer", ["arc_easy"], limit=3)
    assert got == {"arc_easy": {"acc": 0.5, "acc_stderr": 0.1, "version": 1.0, "num_fewshot": 0}}
    assert calls["model"]["pretrained"] is model
    assert calls["run"]["limit"] == 3
    with pytest.raises(UsageError, match="lm-eval does not know nonsense"):
        harness.run(model, "tokenizer", ["arc_easy", "nonsense"])
