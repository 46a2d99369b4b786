"""Perplexity, KL and top-1 agreement against a float64 textbook version written with numpy."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from octavo._core.errors import FormatError, NumericalError, UsageError
from octavo.evaluation import metrics
from octavo.evaluation.metrics import Metrics, evaluate

VOCABULARY = 37


class Plain(nn.Module):
    """A causal toy: logits depend on the token and a running mean of the ones before. Returns a bare tensor."""

    def __init__(self, seed: int, noise: float = 0.0, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(vocabulary, 16)
        self.head = nn.Linear(16, vocabulary, bias=False)
        self.drop = nn.Dropout(0.5)
        self.embed.weight.data = torch.randn(vocabulary, 16, generator=g)
        self.head.weight.data = torch.randn(vocabulary, 16, generator=g)
        own = torch.Generator().manual_seed(seed)
        self.head.weight.data += noise * torch.randn(vocabulary, 16, generator=own)
        self.calls: list[tuple[int, ...]] = []

    def hidden(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        steps = torch.arange(1, tokens.shape[1] + 1).view(1, -1, 1)
        return self.drop(x + 0.5 * x.cumsum(1) / steps)

    def forward(self, tokens: Tensor) -> Tensor:
        self.calls.append(tuple(tokens.shape))
        return self.head(self.hidden(tokens))


class WithHead(Plain):
    """The same model with its head declared the way transformers models do."""

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def get_input_embeddings(self) -> nn.Module:
        return self.embed


class SoftCapped(WithHead):
    """Gemma 2's habit: the logits are changed after the head."""

    def forward(self, tokens: Tensor) -> Tensor:
        return 3 * torch.tanh(super().forward(tokens) / 3)


def text(windows: int = 6, ctx: int = 20, seed: int = 3) -> Tensor:
    return torch.randint(0, VOCABULARY, (windows, ctx), generator=torch.Generator().manual_seed(seed))


def oracle(model: nn.Module, reference: nn.Module, tokens: Tensor) -> dict[str, float]:
    """The textbook formulas, in float64, one window at a time."""

    def log_p(module: nn.Module) -> np.ndarray:
        with torch.no_grad():
            z = module.double().eval()(tokens).numpy()
        module.float()
        z = z - z.max(-1, keepdims=True)
        return (z - np.log(np.exp(z).sum(-1, keepdims=True)))[:, :-1]

    q, p = log_p(model), log_p(reference)
    ids = tokens.numpy()[:, 1:]
    nll = -np.take_along_axis(q, ids[..., None], -1)[..., 0]
    nll_ref = -np.take_along_axis(p, ids[..., None], -1)[..., 0]
    kl = (np.exp(p) * (p - q)).sum(-1)
    same = (q.argmax(-1) == p.argmax(-1)).astype(float)

    def se(values: np.ndarray) -> float:
        return values.mean(1).std(ddof=1) / math.sqrt(values.shape[0])

    return {
        "nll": nll.mean(),
        "nll_se": se(nll),
        "perplexity": math.exp(nll.mean()),
        "perplexity_se": math.exp(nll.mean()) * se(nll),
        "nll_gap": (nll - nll_ref).mean(),
        "nll_gap_se": se(nll - nll_ref),
        "kl": kl.mean(),
        "kl_se": se(kl),
        "top1": same.mean(),
        "top1_se": se(same),
        "kl_median": float(np.sort(kl.ravel())[(kl.size - 1) // 2]),
    }


@pytest.mark.parametrize("kind", [Plain, WithHead, SoftCapped])
@pytest.mark.parametrize("batch_tokens", [1, 50, 10_000])
def test_every_number_agrees_with_the_float64_textbook(kind: type[Plain], batch_tokens: int) -> None:
    reference, model = kind(0), kind(1, noise=0.3)
    tokens = text()
    got = evaluate({"original": reference, "small": model}, tokens, "original", batch_tokens=batch_tokens)["small"]
    for key, wanted in oracle(model, reference, tokens).items():
        assert getattr(got, key) == pytest.approx(wanted, rel=2e-5, abs=1e-6), key
    assert (got.tokens, got.windows, got.ctx) == (6 * 19, 6, 20)


def test_positions_cut_into_small_chunks_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    models = {"original": WithHead(0), "small": WithHead(1, noise=0.3)}
    whole = evaluate(models, text(), "original")["small"]
    monkeypatch.setattr(metrics, "_CHUNK_NUMBERS", 7 * VOCABULARY)
    chunked = evaluate(models, text(), "original")["small"]
    assert chunked.kl == pytest.approx(whole.kl, rel=1e-6)
    assert chunked.nll == pytest.approx(whole.nll, rel=1e-6)


def test_the_head_sees_no_more_positions_at_a_time_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_CHUNK_NUMBERS", 7 * VOCABULARY)
    model = WithHead(0)
    sizes: list[int] = []
    model.head.register_forward_hook(lambda _m, _i, output: sizes.append(output.numel() // VOCABULARY))
    evaluate({"m": model}, text(), None)
    assert max(sizes) <= 7


def test_a_model_that_runs_whole_gets_batches_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_WHOLE_NUMBERS", 2 * 20 * VOCABULARY)
    model = SoftCapped(0)
    evaluate({"m": model}, text(windows=5), None, batch_tokens=10_000)
    assert max(rows for rows, _ in model.calls) == 2


def test_a_model_has_no_divergence_from_itself() -> None:
    model = WithHead(0)
    got = evaluate({"a": model, "b": model}, text(), "a")
    assert got["b"].kl == 0.0
    assert got["b"].top1 == 1.0
    assert got["b"].nll_gap == 0.0


def test_standard_error_counts_windows_not_tokens() -> None:
    """Tokens repeated inside their windows are no new evidence: the error must not shrink by sqrt(repetitions)."""

    class Constant(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return torch.linspace(-3, 3, VOCABULARY).expand(*tokens.shape, VOCABULARY)

    ids = torch.randint(0, VOCABULARY, (8, 1), generator=torch.Generator().manual_seed(1))
    short = evaluate({"m": Constant()}, ids.expand(8, 2).contiguous(), None)["m"]
    long = evaluate({"m": Constant()}, ids.expand(8, 201).contiguous(), None)["m"]
    assert short.perplexity_se is not None
    assert long.perplexity_se == pytest.approx(short.perplexity_se, rel=1e-5)


def test_one_window_has_no_standard_error() -> None:
    got = evaluate({"m": Plain(0)}, text(windows=1), None)["m"]
    assert got.perplexity_se is None
    assert got.nll_se is None


def test_without_a_reference_there_is_perplexity_alone() -> None:
    got = evaluate({"m": Plain(0)}, text(), None)["m"]
    assert got.kl is None
    assert got.top1 is None
    assert got.perplexity > 1


def test_models_are_left_in_the_mode_they_were_in_and_dropout_is_off() -> None:
    model = Plain(0)
    model.train()
    first = evaluate({"m": model}, text(), None)["m"]
    assert model.training
    assert evaluate({"m": model}, text(), None)["m"] == first


def test_bfloat16_logits_are_compared_in_float32() -> None:
    """bfloat16 log-probabilities would be off by a hundredth, more than the divergence itself."""

    class Half(nn.Module):
        def __init__(self, step: float) -> None:
            super().__init__()
            row = torch.arange(VOCABULARY) * 0.5 + 64.0
            row[30] += step
            self.row = nn.Parameter(row.to(torch.bfloat16))

        def forward(self, tokens: Tensor) -> Tensor:
            return self.row.expand(*tokens.shape, VOCABULARY)

    models = {"a": Half(0.0), "b": Half(0.5)}
    p, q = (torch.log_softmax(model.row.detach().double(), -1) for model in models.values())
    assert evaluate(models, text(), "a")["b"].kl == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_logits_are_an_error_that_names_model_and_window(value: float) -> None:
    class Broken(Plain):
        def forward(self, tokens: Tensor) -> Tensor:
            logits = super().forward(tokens)
            return torch.where((tokens == 36).unsqueeze(-1), torch.tensor(value), logits)

    tokens = text() % 36
    tokens[4, 7] = 36
    with pytest.raises(NumericalError, match=r"model bad: 1 positions .* window 4 after token 7"):
        evaluate({"good": Plain(0), "bad": Broken(0)}, tokens, "good", batch_tokens=40)


def test_an_implausible_perplexity_carries_a_warning() -> None:
    class Wrong(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            following = torch.roll(tokens, -1, 1)
            return -50.0 * torch.nn.functional.one_hot(following, VOCABULARY).float()

    got = evaluate({"m": Wrong()}, text(), None)["m"]
    assert got.perplexity > 1e4
    assert "check tokenizer" in got.warning


def test_a_plausible_perplexity_carries_no_warning() -> None:
    class Uniform(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return torch.zeros(*tokens.shape, VOCABULARY)

    got = evaluate({"m": Uniform()}, text(), None)["m"]
    assert got.perplexity == pytest.approx(VOCABULARY)
    assert got.warning == ""


def test_token_ids_beyond_the_embedding_are_refused_before_the_run() -> None:
    tokens = text()
    tokens[-1, -1] = VOCABULARY
    model = WithHead(0)
    with pytest.raises(FormatError, match="tokenizer does not belong"):
        evaluate({"m": model}, tokens, None)
    assert model.calls == []


def test_different_vocabularies_cannot_be_compared() -> None:
    with pytest.raises(FormatError, match="40 output tokens, the reference a has 37"):
        evaluate({"a": Plain(0), "b": Plain(0, vocabulary=40)}, text(), "a")


@pytest.mark.parametrize("shape", [(0, 5), (3, 1), (3,)])
def test_texts_without_a_prediction_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="windows >= 1, ctx >= 2"):
        evaluate({"m": Plain(0)}, torch.zeros(shape, dtype=torch.int64), None)


def test_an_unknown_reference_is_refused() -> None:
    with pytest.raises(UsageError, match="'x' is not among the models: m"):
        evaluate({"m": Plain(0)}, text(), "x")


def test_progress_counts_windows() -> None:
    seen: list[tuple[int, int]] = []
    evaluate({"m": Plain(0)}, text(windows=5), None, batch_tokens=40, progress=lambda d, n: seen.append((d, n)))
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_metrics_are_json_and_name_their_convention() -> None:
    got = evaluate({"a": Plain(0), "b": Plain(1, noise=0.1)}, text(), "a")["b"]
    data = json.loads(json.dumps(got.to_dict(), allow_nan=False))
    assert Metrics(**data) == got
    assert data["convention"] == "every token of every window after its first"
