"""Perplexity, KL divergence to a reference and top-1 agreement of several models in one pass over a text.

With ``p`` the reference's and ``q`` a model's next-token distribution at a position, and ``y`` the token that follows::

    nll = mean -log q(y)      perplexity = exp(nll)      kl = mean sum_i p_i (log p_i - log q_i)

in nats per token, over every token of every window after its first. Tokens of one window are correlated, windows are
taken as independent: all standard errors are those of the mean over windows (clusters), and that of the perplexity
follows by the delta method. They say how far another text of the same kind may be off, not how exact this run is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from octavo._core.errors import FormatError, NumericalError, UsageError

CONVENTION = "every token of every window after its first"
#: A perplexity above this is no property of a language model, but of a wrong tokenizer, a wrong text or broken weights.
IMPLAUSIBLE_PERPLEXITY = 1e4
#: float32 logits held at a time for one model: 32 Mi numbers, 128 MiB (220 positions of a 151,936-token vocabulary).
_CHUNK_NUMBERS = 1 << 25
#: Largest logit tensor of a model whose head cannot be applied separately: 256 Mi numbers.
_WHOLE_NUMBERS = 1 << 28
_PROBE_TOKENS = 8

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Metrics:
    """What one model scores on a text. Standard errors are None when there is only one window.

    Attributes:
        nll: mean negative log-likelihood in nats per token, with ``nll_se``.
        perplexity: ``exp(nll)``, with ``perplexity_se``.
        nll_gap: ``nll`` minus the reference's, in nats, on the same tokens, with its paired standard error.
        kl: mean KL(reference || model) in nats per token, with ``kl_se`` and the median over tokens.
        top1: share of positions at which reference and model have the same most likely token, with ``top1_se``.
        tokens: predictions counted. windows, ctx: the text was cut into ``windows`` of ``ctx`` tokens.
        convention: which tokens count.
        warning: why the numbers should not be believed, or an empty string.
    """

    perplexity: float
    perplexity_se: float | None
    nll: float
    nll_se: float | None
    tokens: int
    windows: int
    ctx: int
    nll_gap: float | None = None
    nll_gap_se: float | None = None
    kl: float | None = None
    kl_se: float | None = None
    kl_median: float | None = None
    top1: float | None = None
    top1_se: float | None = None
    convention: str = CONVENTION
    warning: str = ""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dictionary of all fields."""
        return asdict(self)


class LogitReader:
    """Next-token logits of a causal language model without ever holding [batch, ctx, vocabulary] if that is avoidable.

    The decoder body runs once per batch; the output head is applied to the wanted positions only. Models that do
    something with the logits after the head (Gemma 2's soft cap) are recognised on a probe and run whole.

    Args:
        name: the model's name in error messages.
        model: maps int64 tokens [n, ctx] to logits [n, ctx, vocabulary] (a tensor, or an object with ``.logits``).
    """

    def __init__(self, name: str, model: nn.Module) -> None:
        self.name = name
        self._model = model
        head = getattr(model, "get_output_embeddings", lambda: None)()
        self._head: nn.Module | None = head if isinstance(head, nn.Module) else None
        self._is_transformer = hasattr(model, "config")
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
        self._known_tokens: int | None = getattr(embedding, "num_embeddings", None)
        weight = next(iter(model.parameters()), None)
        self.device = weight.device if weight is not None else torch.device("cpu")
        self.vocabulary = 0

    def probe(self, tokens: Tensor) -> None:
        """Find out the vocabulary size and how to run the model, on the first tokens of the text.

        Raises:
            FormatError: the text has token ids that the model does not know.
        """
        largest = int(tokens.max())
        if self._known_tokens is not None and largest >= self._known_tokens:
            raise FormatError(
                f"model {self.name}: the text holds token id {largest}, the model knows {self._known_tokens}. "
                "This tokenizer does not belong to this model."
            )
        few = tokens[:1, :_PROBE_TOKENS].to(self.device)
        if self._head is not None:
            hidden, last = self._body(few, None)
            if hidden is None or last.shape[1] != 1 or not torch.allclose(self._head(hidden[:, -1:]), last, rtol=1e-5):
                self._head = None
            self.vocabulary = last.shape[-1]
        if self._head is None:
            self.vocabulary = self._run(few, None).shape[-1]

    def max_windows(self, ctx: int) -> int:
        """Most windows of ``ctx`` tokens that one batch may have (only bounded when the model runs whole)."""
        return max(1, _WHOLE_NUMBERS // (ctx * self.vocabulary)) if self._head is None else 1 << 30

    def chunks(self, count: int) -> Iterator[slice]:
        """Cut ``count`` positions into runs whose logits take a bounded amount of memory."""
        step = max(1, _CHUNK_NUMBERS // self.vocabulary)
        for start in range(0, count, step):
            yield slice(start, min(start + step, count))

    def positions(self, tokens: Tensor, mask: Tensor | None = None) -> Callable[[Tensor, Tensor], Tensor]:
        """Run the model on int64 tokens [n, ctx] (with an attention mask of that shape) and return its logits, lazily.

        The result is a function: ``logits(rows, columns)[i]`` are the float32 logits [vocabulary] after the token
        ``tokens[rows[i], columns[i]]``.
        """
        tokens = tokens.to(self.device)
        if mask is not None:
            mask = mask.to(self.device)
        head = self._head
        hidden, _ = self._body(tokens, mask) if head is not None else (self._run(tokens, mask), None)
        assert hidden is not None

        def logits(rows: Tensor, columns: Tensor) -> Tensor:
            picked = hidden[rows.to(hidden.device), columns.to(hidden.device)]
            return (picked if head is None else head(picked)).float()

        return logits

    def _run(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        options: dict[str, Any] = {"use_cache": False} if self._is_transformer else {}
        if mask is not None:
            options["attention_mask"] = mask
        output = self._model(tokens, **options)
        logits = getattr(output, "logits", output)
        return logits if isinstance(logits, Tensor) else output[0]

    def _body(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """The input of the head at all positions, and the model's output at the last position alone."""
        assert self._head is not None
        seen: list[Tensor] = []

        def keep_and_cut(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            seen.append(inputs[0])
            return (inputs[0][:, -1:], *inputs[1:])

        hook = self._head.register_forward_pre_hook(keep_and_cut)
        try:
            last = self._run(tokens, mask)
        finally:
            hook.remove()
        return (seen[0] if len(seen) == 1 else None), last


@dataclass
class _Sums:
    """Per-window sums of one model, in float64."""

    nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    same: list[float] = field(default_factory=list)
    token_kl: list[Tensor] = field(default_factory=list)


def evaluate(
    models: Mapping[str, nn.Module],
    tokens: Tensor,
    reference: str | None,
    batch_tokens: int = 4096,
    progress: Progress | None = None,
) -> dict[str, Metrics]:
    """Score all ``models`` in one pass over ``tokens``.

    Args:
        models: name -> causal language model (see :class:`LogitReader`).
        tokens: int64 [windows, ctx], ctx >= 2; windows are scored independently of each other.
        reference: the name among ``models`` of the original, or None for perplexity alone.
        batch_tokens: tokens per forward pass, at least one window. Large batches spare weights that are decoded on
            the fly; the head is applied to a bounded number of positions at a time in any case.
        progress: called with (windows done, windows) after every batch.

    Raises:
        UsageError: no window, a window without a second token, a reference that is not among the models.
        FormatError: token ids or vocabularies that do not fit together.
        NumericalError: logits that are NaN or infinite; says which model, window and position.
    """
    if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise UsageError(f"evaluation wants tokens [windows >= 1, ctx >= 2], got shape {list(tokens.shape)}.")
    if reference is not None and reference not in models:
        raise UsageError(f"reference {reference!r} is not among the models: {', '.join(models)}.")
    readers = {name: LogitReader(name, model) for name, model in models.items()}
    sums = {name: _Sums() for name in models}
    windows, ctx = tokens.shape
    with evaluating(models.values()):
        for reader in readers.values():
            reader.probe(tokens)
        _require_one_vocabulary(readers, reference)
        step = min([max(1, batch_tokens // ctx)] + [reader.max_windows(ctx) for reader in readers.values()])
        for start in range(0, windows, step):
            _score_batch(readers, sums, tokens[start : start + step], reference, start)
            if progress is not None:
                progress(min(start + step, windows), windows)
    base = sums[reference] if reference is not None else None
    return {name: _summary(own, base, ctx) for name, own in sums.items()}


def _require_one_vocabulary(readers: Mapping[str, LogitReader], reference: str | None) -> None:
    if reference is None:
        return
    wanted = readers[reference].vocabulary
    for name, reader in readers.items():
        if reader.vocabulary != wanted:
            raise FormatError(
                f"model {name} has {reader.vocabulary} output tokens, the reference {reference} has {wanted}; "
                "a divergence between them is not defined. Is this the right reference?"
            )


@contextmanager
def evaluating(models: Iterable[nn.Module]) -> Iterator[None]:
    """Evaluation mode (no dropout) and no autograd for ``models``; afterwards the modes they were in."""
    was = [(model, model.training) for model in models]
    try:
        for model, _ in was:
            model.eval()
        with torch.inference_mode():
            yield
    finally:
        for model, training in was:
            model.train(training)


def _score_batch(
    readers: Mapping[str, LogitReader], sums: Mapping[str, _Sums], batch: Tensor, reference: str | None, first: int
) -> None:
    count, ctx = batch.shape
    logits = {name: reader.positions(batch) for name, reader in readers.items()}
    names = sorted(readers, key=lambda name: name != reference)
    shape = (count, ctx - 1)
    nll = {name: torch.empty(shape) for name in names}
    kl = {name: torch.empty(shape) for name in names}
    same = {name: torch.empty(shape) for name in names}
    widest = max(readers.values(), key=lambda reader: reader.vocabulary)
    for part in widest.chunks(count * (ctx - 1)):
        flat = torch.arange(part.start, part.stop)
        rows, columns = flat // (ctx - 1), flat % (ctx - 1)
        targets = batch[rows, columns + 1]
        base = base_p = base_top = None
        for name in names:
            raw = logits[name](rows, columns)
            require_finite(raw, name, rows + first, columns)
            log_q = torch.log_softmax(raw, dim=-1)
            del raw
            nll[name][rows, columns] = -log_q.gather(1, targets.to(log_q.device).unsqueeze(1)).squeeze(1).cpu()
            if reference is None:
                continue
            top = log_q.argmax(dim=-1).cpu()
            if base is None or base_p is None:
                base, base_p, base_top = log_q, log_q.exp(), top
            # p log(p/q); a token whose probability underflows to zero contributes nothing, as it should.
            divergence = base.to(log_q.device) - log_q
            kl[name][rows, columns] = divergence.mul_(base_p.to(log_q.device)).sum(-1).cpu()
            same[name][rows, columns] = (top == base_top).float()
    for name in names:
        own = sums[name]
        own.nll += nll[name].double().sum(1).tolist()
        if reference is not None:
            own.kl += kl[name].double().sum(1).tolist()
            own.same += same[name].double().sum(1).tolist()
            own.token_kl.append(kl[name].flatten())


def require_finite(logits: Tensor, name: str, rows: Tensor, columns: Tensor, unit: str = "window") -> None:
    """Check logits [positions, vocabulary] that belong to (rows, columns) of the tokens.

    Raises:
        NumericalError: NaN or infinity; says how many positions, and the model, ``unit`` and token of the first.
    """
    bad = ~torch.isfinite(logits).all(dim=-1)
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        raise NumericalError(
            f"model {name}: {int(bad.sum())} positions have NaN or infinite logits, the first in {unit} "
            f"{int(rows[at])} after token {int(columns[at])}. Try --dtype float32; if that does not help, the weights "
            "are damaged (octavo verify) or the calibration went wrong."
        )


def _mean_and_se(window_sums: list[float], per_window: int) -> tuple[float, float | None]:
    """Mean per token and its standard error over windows, all of ``per_window`` tokens."""
    means = torch.tensor(window_sums, dtype=torch.float64) / per_window
    count = means.numel()
    return float(means.mean()), float(means.std(unbiased=True)) / math.sqrt(count) if count > 1 else None


def _summary(own: _Sums, base: _Sums | None, ctx: int) -> Metrics:
    per_window = ctx - 1
    windows = len(own.nll)
    nll, nll_se = _mean_and_se(own.nll, per_window)
    # exp(700) is the end of float64; the warning says the rest.
    perplexity = math.exp(min(nll, 700.0))
    warning = ""
    if perplexity > IMPLAUSIBLE_PERPLEXITY:
        warning = (
            f"check tokenizer: perplexity {perplexity:.3g} is no property of a working language model. Wrong "
            "tokenizer, missing or doubled BOS token, or damaged weights."
        )
    result: dict[str, Any] = {}
    if base is not None:
        gaps = [a - b for a, b in zip(own.nll, base.nll, strict=True)]
        result["nll_gap"], result["nll_gap_se"] = _mean_and_se(gaps, per_window)
        result["kl"], result["kl_se"] = _mean_and_se(own.kl, per_window)
        result["kl_median"] = float(torch.cat(own.token_kl).median())
        result["top1"], result["top1_se"] = _mean_and_se(own.same, per_window)
    return Metrics(
        perplexity=perplexity,
        perplexity_se=None if nll_se is None else perplexity * nll_se,
        nll=nll,
        nll_se=nll_se,
        tokens=windows * per_window,
        windows=windows,
        ctx=ctx,
        warning=warning,
        **result,
    )
