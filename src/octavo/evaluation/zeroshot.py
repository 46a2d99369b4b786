"""Multiple-choice tasks without examples, from jsonl files of {"query", "choices", "gold"}.

A choice scores ``sum log p(token of the choice | query, tokens before)``; ``acc`` takes the best sum, ``acc_norm`` the
best sum per byte of the choice. An item with a single choice (LAMBADA) counts as right when the choice is what greedy
decoding would have produced.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from octavo._core.errors import FormatError, UsageError
from octavo.evaluation.metrics import LogitReader, Progress, evaluating, require_finite


@dataclass(frozen=True)
class Item:
    """One question: ``queries[i] + choices[i]`` are the texts to compare, ``gold`` is the index of the right one."""

    queries: tuple[str, ...]
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class Task:
    """The items of one file, with the SHA-256 of the file."""

    name: str
    items: tuple[Item, ...]
    sha256: str


@dataclass(frozen=True)
class ZeroShot:
    """Accuracy of one model on one task. Standard errors are binomial over items, None for a single item.

    Attributes:
        acc, acc_norm: share of right answers by summed, and by per-byte, log-probability.
        items: questions counted. truncated: texts that were longer than the model's context and lost their beginning.
        chance: what guessing would score (None for a single-choice task).
    """

    task: str
    acc: float
    acc_se: float | None
    acc_norm: float
    acc_norm_se: float | None
    items: int
    truncated: int
    chance: float | None
    sha256: str

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dictionary of all fields."""
        return asdict(self)


def read_task(path: str | Path, limit: int | None = None) -> Task:
    """Read a jsonl file of items; the first ``limit`` of them if given. Empty lines are skipped.

    Raises:
        FormatError: a missing file, or a line that is no item; names the file, the line and what was wanted.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FormatError(f"task file {path} cannot be read: {error.strerror}.") from error
    items = []
    for number, line in enumerate(data.splitlines(), start=1):
        if limit is not None and len(items) >= limit:
            break
        if line.strip():
            items.append(_item(line, f"{path}, line {number}"))
    if not items:
        raise FormatError(f'task file {path} has no items; wanted lines of {{"query", "choices", "gold"}}.')
    return Task(path.stem, tuple(items), hashlib.sha256(data).hexdigest())


def _item(line: bytes, where: str) -> Item:
    def wrong(what: str) -> FormatError:
        return FormatError(f'{where}: {what}; wanted {{"query": text, "choices": [text, ..], "gold": index}}.')

    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise wrong(f"not JSON ({str(error)[:100]})") from error
    if not isinstance(record, dict):
        raise wrong(f"a JSON {type(record).__name__} instead of an object")
    for key in ("query", "choices", "gold"):
        if key not in record:
            raise wrong(f"no {key!r}")
    choices, query, gold = record["choices"], record["query"], record["gold"]
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c for c in choices):
        raise wrong("'choices' is no list of non-empty texts")
    queries = query if isinstance(query, list) else [query] * len(choices)
    if len(queries) != len(choices) or not all(isinstance(q, str) for q in queries):
        raise wrong(f"'query' is neither a text nor a list of {len(choices)} texts, one per choice")
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise wrong(f"'gold' is {gold!r}, not an index into {len(choices)} choices")
    return Item(tuple(queries), tuple(choices), gold)


@dataclass(frozen=True)
class _Text:
    """One (query, choice) pair as tokens; the last ``scored`` of them are the choice."""

    tokens: list[int]
    scored: int


def evaluate_task(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    *,
    max_tokens: int | None = None,
    batch_tokens: int = 4096,
    progress: Progress | None = None,
    name: str = "model",
) -> ZeroShot:
    """Let ``model`` answer all items of ``task``.

    Args:
        tokenizer: a transformers tokenizer; it decides about BOS.
        max_tokens: the model's context; None reads ``model.config.max_position_embeddings``. Longer texts lose their
            beginning.
        batch_tokens: tokens per forward pass, padding included.
        progress: called with (texts done, texts).

    Raises:
        NumericalError: NaN or infinite logits.
        UsageError: a choice that is longer than the model's context.
    """
    room: int = max_tokens or getattr(getattr(model, "config", None), "max_position_embeddings", None) or 1 << 30
    texts = [
        _encode(tokenizer, query, choice)
        for item in task.items
        for query, choice in zip(item.queries, item.choices, strict=True)
    ]
    if any(text.scored >= room for text in texts):
        raise UsageError(f"task {task.name}: a choice is longer than the model's context of {room} tokens.")
    truncated = sum(len(text.tokens) > room for text in texts)
    texts = [_Text(text.tokens[-room:], text.scored) for text in texts]
    score = torch.empty(len(texts), dtype=torch.float64)
    greedy = torch.empty(len(texts), dtype=torch.bool)
    with evaluating([model]):
        reader = LogitReader(name, model)
        reader.probe(torch.tensor([max((t.tokens for t in texts), key=max)]))
        done = 0
        for batch in _batches(texts, batch_tokens, reader):
            _score(reader, [texts[i] for i in batch], torch.tensor(batch), score, greedy)
            done += len(batch)
            if progress is not None:
                progress(done, len(texts))
    return _summary(task, score, greedy, truncated)


def _encode(tokenizer: Any, query: str, choice: str) -> _Text:
    """Tokens of ``query + choice``; the choice begins where the query's own tokens end."""
    # White space at the end of a query belongs to the next token in all BPE vocabularies.
    kept = query.rstrip()
    query, choice = kept, query[len(kept) :] + choice
    context = _ids(tokenizer, query)
    whole = _ids(tokenizer, query + choice)
    shared = 0
    while shared < min(len(context), len(whole) - 1) and context[shared] == whole[shared]:
        shared += 1
    if shared == 0:
        # Nothing to condition on: the first token is conditioned on the beginning of a text.
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        whole, shared = [start if start is not None else 0, *whole], 1
    return _Text(whole, len(whole) - shared)


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids = list(tokenizer(text)["input_ids"])
    if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token or "\0"):
        ids.pop()
    return ids


def _batches(texts: Sequence[_Text], batch_tokens: int, reader: LogitReader) -> Iterator[list[int]]:
    """Indices of texts of similar length, longest first, so that little is padding and memory peaks at once."""
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i].tokens))
    start = 0
    while start < len(order):
        longest = len(texts[order[start]].tokens)
        step = min(max(1, batch_tokens // longest), reader.max_windows(longest))
        yield order[start : start + step]
        start += step


def _score(reader: LogitReader, texts: list[_Text], index: Tensor, score: Tensor, greedy: Tensor) -> None:
    """Write summed log-probabilities of the choices, and whether they are the greedy ones, at ``index``."""
    longest = max(len(text.tokens) for text in texts)
    tokens = torch.zeros(len(texts), longest, dtype=torch.int64)
    mask = torch.zeros(len(texts), longest, dtype=torch.int64)
    rows, columns, targets = [], [], []
    for row, text in enumerate(texts):
        length = len(text.tokens)
        tokens[row, :length] = torch.tensor(text.tokens)
        mask[row, :length] = 1
        rows += [row] * text.scored
        columns += range(length - text.scored - 1, length - 1)
        targets += text.tokens[-text.scored :]
    logits = reader.positions(tokens, mask)
    total = torch.zeros(len(texts), dtype=torch.float64)
    hits = torch.ones(len(texts), dtype=torch.int64)
    where, at, wanted = torch.tensor(rows), torch.tensor(columns), torch.tensor(targets)
    for part in reader.chunks(len(rows)):
        raw = logits(where[part], at[part])
        require_finite(raw, reader.name, index[where[part]], at[part], "text")
        log_p = torch.log_softmax(raw, dim=-1)
        picked = log_p.gather(1, wanted[part].to(log_p.device).unsqueeze(1)).squeeze(1).double().cpu()
        total.index_add_(0, where[part], picked)
        is_top = (log_p.argmax(-1).cpu() == wanted[part]).long()
        hits.scatter_reduce_(0, where[part], is_top, reduce="amin")
    score[index] = total
    greedy[index] = hits.bool()


def _summary(task: Task, score: Tensor, greedy: Tensor, truncated: int) -> ZeroShot:
    right = right_norm = at = 0
    chances = []
    for item in task.items:
        count = len(item.choices)
        own = score[at : at + count]
        if count == 1:
            right += bool(greedy[at])
            right_norm += bool(greedy[at])
        else:
            chances.append(1 / count)
            size = torch.tensor([max(1, len(choice.strip().encode())) for choice in item.choices])
            right += int(own.argmax()) == item.gold
            right_norm += int((own / size).argmax()) == item.gold
        at += count
    items = len(task.items)
    return ZeroShot(
        task=task.name,
        acc=right / items,
        acc_se=_binomial_se(right, items),
        acc_norm=right_norm / items,
        acc_norm_se=_binomial_se(right_norm, items),
        items=items,
        truncated=truncated,
        chance=sum(chances) / len(chances) if len(chances) == items else None,
        sha256=task.sha256,
    )


def _binomial_se(right: int, items: int) -> float | None:
    share = right / items
    return math.sqrt(share * (1 - share) / (items - 1)) if items > 1 else None
