"""Gradients of the loss at every linear layer's output: block by block they are those of the whole model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from conftest import TINY_MODELS, VOCABULARY
from faults.jobs import file_size_limit
from octavo._core.errors import NumericalError, ResourceError, UsageError
from octavo.calibration import gradients
from octavo.calibration.gradients import backpropagate, block_gradients, draw_labels, token_weights
from octavo.models.adapter import CausalModel
from octavo.models.skeleton import Target
from octavo.models.source import resolve
from oracle.gradients import whole_model

Tiny = Callable[[str], Path]
Found = dict[str, tuple[Tensor, Tensor]]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_tokens(windows: int, ctx: int, vocabulary: int = VOCABULARY) -> Tensor:
    return torch.randint(3, vocabulary, (windows, ctx))


def streamed(causal: CausalModel, tokens: Tensor, seed: int = 0, folder: Path | None = None) -> Found:
    """What the visitor is shown, all batches of a layer together."""
    shown: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def visit(index: int, name: str, x: Tensor, g: Tensor) -> None:
        assert name in causal.targets(index)
        assert not x.requires_grad and not g.requires_grad
        assert x.dtype == g.dtype == torch.float32
        shown.setdefault(name, []).append((x.clone(), g.clone()))

    backpropagate(causal, tokens, visit, generator=seeded(seed), folder=folder)
    return {name: (torch.cat([x for x, _ in parts]), torch.cat([g for _, g in parts])) for name, parts in shown.items()}


def assert_equal_bits(one: Found, other: Found) -> None:
    assert list(one) == list(other)
    for name, (x, g) in one.items():
        assert torch.equal(x, other[name][0])
        assert torch.equal(g, other[name][1])


def assert_those_of_the_whole_model(causal: CausalModel, tokens: Tensor, seed: int = 3) -> None:
    drawn: list[Tensor] = []

    def record(p: Tensor, generator: torch.Generator) -> Tensor:
        drawn.append(draw_labels(p, generator))
        return drawn[-1]

    def draw(p: Tensor) -> Tensor:
        # Where a number falls on the edge between two labels, float32 and float64 may disagree; twice they will not.
        assert int((torch.cat(drawn) != draw_labels(p, seeded(seed))).sum()) <= 1
        return torch.cat(drawn)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradients, "draw_labels", record)
        found = streamed(causal, tokens, seed)
    names = [name for index in range(len(causal.blocks)) for name in causal.targets(index)]
    wanted = whole_model(causal.source.folder, tokens, names, draw)
    assert found.keys() == wanted.keys() == set(names)
    # Gradients that are exactly zero (of queries, in windows of one token) are only small in float32.
    typical = max(float(g.norm()) for _, g in wanted.values())
    for name, pair in wanted.items():
        for got, exact in zip(found[name], pair, strict=True):
            assert got.shape == exact.shape
            assert float((got - exact).norm()) < 1e-5 * float(exact.norm()) + 1e-7 * typical, name


def edited(folder: Path, target: Path, change: Callable[[dict[str, Tensor]], Any]) -> CausalModel:
    """A copy of a one-shard model with changed tensors."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return CausalModel(resolve(target))


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two windows of 24 tokens per batch and 7 tokens per chunk of logits, neither of which divides the whole."""
    monkeypatch.setattr(gradients, "_BATCH_TOKENS", 50)
    monkeypatch.setattr(gradients, "_CHUNK_NUMBERS", 7 * VOCABULARY)


# -------------------------------------------------------------------------------------------------- equality


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("name", TINY_MODELS)
def test_inputs_and_gradients_are_those_of_the_whole_model(tiny_model: Tiny, name: str) -> None:
    assert_those_of_the_whole_model(CausalModel(resolve(tiny_model(name))), some_tokens(5, 24))


_SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "bos_token_id": 0, "eos_token_id": 1}
_HEADS: dict[str, Any] = {
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 2,
    "initializer_range": 0.1,
}
_OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "parallel blocks, scaled logits": ("CohereConfig", {**_HEADS, "logit_scale": 0.3}),
    "scaled embeddings, residuals and logits": (
        "GraniteConfig",
        {**_HEADS, "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 0.2},
    ),
    "tuples and ALiBi": ("BloomConfig", {"n_layer": 2, "n_head": 2}),
    "tuples and local attention": (
        "GPTNeoConfig",
        {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4},
    ),
    "projected embeddings": (
        "OPTConfig",
        {"num_hidden_layers": 2, "ffn_dim": 48, "num_attention_heads": 2, "word_embed_proj_dim": 16},
    ),
}


@pytest.mark.parametrize("what", _OTHERS)
def test_families_with_peculiarities_are_no_different(tmp_path: Path, what: str) -> None:
    import transformers

    kind, options = _OTHERS[what]
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**_SIZES, **options))
    model.save_pretrained(tmp_path)
    assert_those_of_the_whole_model(CausalModel(resolve(tmp_path)), some_tokens(3, 10, vocabulary=64))


def test_windows_of_one_token_are_enough(tiny_llama: Path) -> None:
    assert_those_of_the_whole_model(CausalModel(resolve(tiny_llama)), some_tokens(7, 1))


def test_skipped_layers_are_passed_through_but_not_shown(tiny_llama: Path) -> None:
    causal, whole = CausalModel(resolve(tiny_llama), skip=["mlp.up_proj", "layers.1"]), CausalModel(resolve(tiny_llama))
    tokens = some_tokens(2, 16)
    some, every = streamed(causal, tokens), streamed(whole, tokens)
    assert len(some) == 6
    assert_equal_bits(some, {name: every[name] for name in some})


# -------------------------------------------------------------------------------------------------- order and bits


@pytest.mark.usefixtures("small_batches")
def test_blocks_come_from_last_to_first_and_batches_in_order(tiny_gemma3: Path) -> None:
    causal, tokens = CausalModel(resolve(tiny_gemma3)), some_tokens(5, 24)
    visits: list[tuple[int, str, int]] = []
    steps: list[tuple[int, int]] = []
    backpropagate(
        causal,
        tokens,
        lambda index, name, x, g: visits.append((index, name, len(x))),
        generator=seeded(),
        progress=lambda done, total: steps.append((done, total)),
    )
    rows = (48, 48, 24)
    assert visits == [(index, name, n) for index in (2, 1, 0) for n in rows for name in causal.targets(index)]
    assert steps == [(done, 7) for done in range(1, 8)]


@pytest.mark.usefixtures("small_batches")
def test_files_and_memory_give_the_same_bits_and_equal_seeds_too(tiny_qwen2: Path, tmp_path: Path) -> None:
    causal, tokens = CausalModel(resolve(tiny_qwen2)), some_tokens(3, 24)
    first = streamed(causal, tokens, seed=1)
    folder = tmp_path / "new" / "states"
    assert_equal_bits(first, streamed(causal, tokens, seed=1, folder=folder))
    # What a killed job left behind has no influence.
    for index in range(2):
        (folder / f"states_{index}.safetensors").write_bytes(b"half a fi")
    assert_equal_bits(first, streamed(CausalModel(resolve(tiny_qwen2)), tokens, seed=1, folder=folder))
    other = streamed(causal, tokens, seed=2)
    assert all(torch.equal(first[name][0], other[name][0]) for name in first)
    assert not any(torch.equal(first[name][1], other[name][1]) for name in first)


def test_batches_do_not_change_the_labels(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    causal, tokens = CausalModel(resolve(tiny_llama)), some_tokens(4, 20)
    whole = streamed(causal, tokens)
    monkeypatch.setattr(gradients, "_BATCH_TOKENS", 20)
    monkeypatch.setattr(gradients, "_CHUNK_NUMBERS", 1)
    for name, (_, g) in streamed(causal, tokens).items():
        assert float((g - whole[name][1]).norm()) < 1e-5 * float(g.norm())


# -------------------------------------------------------------------------------------------------- memory


@pytest.mark.usefixtures("small_batches")
def test_one_block_is_loaded_and_only_what_is_still_needed_is_on_disk(tiny_gemma3: Path, tmp_path: Path) -> None:
    causal, tokens = CausalModel(resolve(tiny_gemma3)), some_tokens(3, 24)
    seen: set[int] = set()

    def visit(index: int, name: str, x: Tensor, g: Tensor) -> None:
        seen.add(index)
        assert sorted(p.name for p in tmp_path.iterdir()) == [f"states_{i}.safetensors" for i in range(index + 1)]
        assert list(causal._loaded) == [index]
        assert not any(p.requires_grad for p in causal._loaded[index].parameters())
        assert all(p.device.type == "meta" for p in causal._model.parameters())

    backpropagate(causal, tokens, visit, generator=seeded(), folder=tmp_path)
    assert seen == {0, 1, 2}
    assert not list(tmp_path.iterdir())


def test_no_file_survives_an_error(tiny_llama: Path, tmp_path: Path) -> None:
    def refuse(*_: Any) -> None:
        assert list(tmp_path.iterdir())
        raise KeyError("from the visitor")

    with pytest.raises(KeyError, match="from the visitor"):
        backpropagate(CausalModel(resolve(tiny_llama)), some_tokens(2, 8), refuse, generator=seeded(), folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_error_before_and_during_the_work(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    causal, tokens = CausalModel(resolve(tiny_llama)), some_tokens(2, 32)
    with file_size_limit(5000), pytest.raises(ResourceError, match=r"cannot write .*states_0\.safetensors"):
        streamed(causal, tokens, folder=tmp_path)
    assert not list(tmp_path.iterdir())
    usage = shutil.disk_usage(tmp_path)
    # The inputs of two blocks are 2 * 2 * 32 * 64 numbers of 4 bytes.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=32768))
    assert streamed(causal, tokens, folder=tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=32767))
    with pytest.raises(ResourceError, match="hidden states of all blocks needs about"):
        streamed(causal, tokens, folder=tmp_path)


# -------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("shape", [(6,), (0, 4), (4, 0), (1, 2, 3)])
def test_tokens_that_are_no_windows_are_refused(tiny_llama: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"windows >= 1, ctx >= 1\], got shape"):
        streamed(CausalModel(resolve(tiny_llama)), torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize(
    "stored", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_non_finite_weights_are_an_error_that_names_them(tiny_llama: Path, tmp_path: Path, stored: str) -> None:
    causal = edited(tiny_llama, tmp_path / "m", lambda t: t[stored].view(-1)[7:8].fill_(float("nan")))
    folder = tmp_path / "states"
    with pytest.raises(NumericalError, match=rf"{stored} holds NaN or infinity \(1 of"):
        streamed(causal, some_tokens(2, 8), folder=folder)
    assert not folder.exists() or not list(folder.iterdir())


def test_gradients_that_overflow_name_the_block_and_the_layer(tiny_llama: Path, tmp_path: Path) -> None:
    def stretch(tensors: dict[str, Tensor]) -> None:
        """Values of block 1 are made tiny and then large again, so only the way back overflows."""
        tensors["model.layers.1.self_attn.v_proj.weight"] *= 1e-41
        tensors["model.layers.1.self_attn.o_proj.weight"].sign_().mul_(3e38)

    causal = edited(tiny_llama, tmp_path / "m", stretch)
    with pytest.raises(NumericalError, match=r"model\.layers\.1.*gradients are NaN or infinite"):
        streamed(causal, some_tokens(2, 8))


def test_predictions_that_overflow_are_refused(tiny_qwen2: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_qwen2, tmp_path / "m")
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())["weight_map"]
    shard = tmp_path / "m" / index["lm_head.weight"]
    tensors = load_file(shard)
    tensors["lm_head.weight"].fill_(3e38)
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(NumericalError, match="in its predictions"):
        streamed(CausalModel(resolve(tmp_path / "m")), some_tokens(2, 8))


def test_a_head_that_needs_more_than_hidden_states_is_refused(tiny_llama: Path) -> None:
    causal = CausalModel(resolve(tiny_llama))

    def scale(_: nn.Module, __: Any, named: dict[str, Any], output: Any) -> Any:
        output.logits = output.logits * (1 + named["input_ids"].unsqueeze(-1))
        return output

    causal._model.register_forward_hook(scale, with_kwargs=True)
    with pytest.raises(UsageError, match="LlamaForCausalLM does more between its blocks and its logits"):
        streamed(causal, some_tokens(2, 8))


# -------------------------------------------------------------------------------------------------- one block


class Routed(nn.Module):
    """Tokens with a positive first number go to expert 0, the others to expert 1, nobody to expert 2."""

    def __init__(self, *, spoil: bool = False) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.twice = nn.Linear(4, 4)
        self.unread = nn.Linear(4, 5)
        self.constant = nn.Linear(2, 4)
        self.spoil = spoil

    def forward(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, None]:
        flat = hidden.reshape(-1, 4)
        first = flat[:, 0] > 0
        out = torch.zeros_like(flat)
        for expert, chosen in zip(self.experts, (first, ~first), strict=False):
            # In place, as some models do it, after the layer has given its output.
            out[chosen] = expert(flat[chosen]).mul_(2)
        out = self.twice(self.twice(out)).tanh() + self.constant(input=positions)
        inner = flat * 1.5
        self.unread(inner)
        if self.spoil:
            inner.zero_()
        return out.view_as(hidden), None


TOY = {
    **{f"experts.{i}": Target((4, 4), True, False) for i in range(3)},
    "twice": Target((4, 4), True, False),
    "unread": Target((5, 4), True, False),
    "constant": Target((4, 2), True, False),
}


def test_layers_get_the_rows_that_reach_them_and_gradients_of_their_own_outputs() -> None:
    block, hidden, positions, gradient = Routed(), torch.randn(2, 5, 4), torch.randn(10, 2), torch.randn(2, 5, 4)
    hidden[0, 0, 0], hidden[0, 1, 0] = 1.0, -1.0
    found, into = block_gradients(block, TOY, hidden, {"positions": positions}, gradient)
    flat, down = hidden.reshape(-1, 4), gradient.reshape(-1, 4)
    first = flat[:, 0] > 0
    with torch.no_grad():
        chosen = torch.where(first.unsqueeze(1), block.experts[0](flat), block.experts[1](flat))
        once = block.twice(2 * chosen)
        outer = down * (1 - block.twice(once).tanh() ** 2)
        inner = outer @ block.twice.weight
        routed = 2 * inner @ block.twice.weight
        weights = torch.where(first.view(-1, 1, 1), block.experts[0].weight, block.experts[1].weight)  # type: ignore[call-overload]
    wanted = {
        "experts.0": (flat[first], routed[first]),
        "experts.1": (flat[~first], routed[~first]),
        "experts.2": (torch.empty(0, 4), torch.empty(0, 4)),
        "twice": (torch.cat([2 * chosen, once]), torch.cat([inner, outer])),
        "unread": (1.5 * flat, torch.zeros(10, 5)),
        "constant": (positions, down),
    }
    assert list(found) == list(wanted)
    for name, pair in wanted.items():
        for got, exact in zip(found[name], pair, strict=True):
            torch.testing.assert_close(got, exact, msg=name)
    torch.testing.assert_close(into.reshape(-1, 4), torch.einsum("toi,to->ti", weights, routed))
    assert not any(module._forward_hooks for module in block.modules())


def test_an_input_that_is_overwritten_is_refused() -> None:
    with pytest.raises(UsageError, match=r"block\.unread: the model overwrites the layer's input"):
        block_gradients(
            Routed(spoil=True), TOY, torch.randn(2, 5, 4), {"positions": torch.randn(10, 2)}, torch.randn(2, 5, 4)
        )


# -------------------------------------------------------------------------------------------------- labels, weights


def test_labels_follow_the_distribution() -> None:
    p = torch.tensor([0.0, 0.5, 0.0, 0.02, 0.3, 0.18, 0.0])
    draws = 40_000
    counts = draw_labels(p.expand(draws, -1), seeded(5)).bincount(minlength=7).double()
    assert counts[p == 0].sum() == 0
    deviation = (counts / draws - p).abs() / (p * (1 - p) / draws).sqrt().clamp(min=1e-9)
    assert float(deviation.max()) < 4.5


def test_labels_do_not_depend_on_how_the_rows_are_cut() -> None:
    p = torch.softmax(3 * torch.randn(101, 50), dim=-1)
    for step in (1, 7, 64):
        generator = seeded(9)
        parts = [draw_labels(rows, generator) for rows in p.split(step)]
        assert torch.equal(torch.cat(parts), draw_labels(p, seeded(9)))


def test_token_weights_are_the_mean_square_over_the_outputs() -> None:
    g = torch.randn(11, 6)
    wanted = torch.tensor([sum(float(v) ** 2 for v in row) / 6 for row in g])
    torch.testing.assert_close(token_weights(g), wanted)
