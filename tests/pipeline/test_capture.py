"""Hessians of real blocks: right numbers, shared where inputs are shared, without padding, and never silently empty."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import make_text
from octavo._core.errors import NumericalError, UsageError
from octavo.calibration.capture import Captured, collect, forward
from octavo.calibration.data import windows
from octavo.models.adapter import CausalModel
from octavo.models.source import resolve

Tiny = Callable[[str], Path]


def capture_block(
    folder: Path, index: int = 0, padded: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[CausalModel, nn.Module, Any, Captured]:
    model = CausalModel(resolve(folder))
    ids = windows(model.tokenizer(), make_text(400), 32, samples=3, seed=5).ids
    mask = torch.ones_like(ids)
    if padded:
        mask[0, 20:] = 0
    inputs = model.capture_inputs([(ids[:2], mask[:2] if padded else None), (ids[2:], None)], dtype)
    block = model.load_block(index, dtype)
    names = [name.removeprefix(model.blocks[index] + ".") for name in model.targets(index)]
    captured = collect(block, names, inputs.hidden, [k[index] for k in inputs.kwargs], inputs.mask, where="block")
    return model, block, inputs, captured


def test_the_first_hessian_is_that_of_the_normed_hidden_states(tiny_llama: Path) -> None:
    _, block, inputs, captured = capture_block(tiny_llama)
    x = torch.cat([block.input_layernorm(h).reshape(-1, 64) for h in inputs.hidden])  # type: ignore[operator]
    hessian = captured.hessians["self_attn.q_proj"]
    assert hessian.tokens == 96
    torch.testing.assert_close(hessian.matrix(), x.T @ x / 96, rtol=1e-5, atol=1e-6)


def test_layers_that_read_the_same_tensor_share_their_statistics(tiny_llama: Path) -> None:
    hessians = capture_block(tiny_llama)[3].hessians
    attention = [hessians[f"self_attn.{name}_proj"] for name in "qkv"]
    assert attention[0] is attention[1] is attention[2]
    assert hessians["mlp.gate_proj"] is hessians["mlp.up_proj"]
    assert len({id(h) for h in hessians.values()}) == 4
    assert all(h.tokens == 96 for h in hessians.values())
    assert hessians["mlp.down_proj"].in_features == 128


def test_conv1d_layers_are_captured_by_their_inputs(tiny_gpt2: Path) -> None:
    hessians = capture_block(tiny_gpt2, index=1)[3].hessians
    assert {name: h.in_features for name, h in hessians.items()} == {
        "attn.c_attn": 64,
        "attn.c_proj": 64,
        "mlp.c_fc": 64,
        "mlp.c_proj": 256,
    }
    assert len({id(h) for h in hessians.values()}) == 4


def test_padding_rows_do_not_enter(tiny_llama: Path) -> None:
    model, block, inputs, captured = capture_block(tiny_llama, padded=True)
    assert all(h.tokens == 96 - 12 for h in captured.hessians.values())
    # Whatever stands in the padding must not matter.
    names = list(captured.hessians)
    hidden = [h.clone() for h in inputs.hidden]
    hidden[0][0, 20:] = 1e3
    kwargs = [k[0] for k in inputs.kwargs]
    again = collect(block, names, hidden, kwargs, inputs.mask)
    for name in names:
        torch.testing.assert_close(again.hessians[name].matrix(), captured.hessians[name].matrix())
    without = collect(block, names, hidden, kwargs, [None, None])
    assert without.hessians["mlp.down_proj"].tokens == 96
    model.release_block(0)


def test_statistics_of_bfloat16_activations_are_float32(tiny_qwen2: Path) -> None:
    coarse = capture_block(tiny_qwen2, dtype=torch.bfloat16)[3].hessians["mlp.up_proj"].matrix()
    fine = capture_block(tiny_qwen2)[3].hessians["mlp.up_proj"].matrix()
    assert coarse.dtype == torch.float32
    assert float((coarse - fine).norm() / fine.norm()) < 0.02
    # A sum that was kept in bfloat16 would have only 8 significant bits.
    assert not torch.equal(coarse, coarse.bfloat16().float())


def test_non_finite_rows_are_left_out_and_counted(tiny_llama: Path) -> None:
    _, block, inputs, captured = capture_block(tiny_llama)
    hidden = [h.clone() for h in inputs.hidden]
    hidden[1][0, 31, 3] = float("nan")
    again = collect(block, ["self_attn.q_proj"], hidden, [k[0] for k in inputs.kwargs], [None, None])
    assert captured.bad_tokens == {}
    assert again.bad_tokens == {"self_attn.q_proj": 1}
    assert again.hessians["self_attn.q_proj"].tokens == 95
    assert bool(again.hessians["self_attn.q_proj"].matrix().isfinite().all())


def test_forward_names_the_block_whose_output_is_not_finite(tiny_llama: Path) -> None:
    _, block, inputs, _ = capture_block(tiny_llama)
    kwargs = [k[0] for k in inputs.kwargs]
    outputs = forward(block, inputs.hidden, kwargs, "model.layers.0")
    assert [o.shape for o in outputs] == [h.shape for h in inputs.hidden]
    with torch.no_grad():
        block.mlp.down_proj.weight[0, 0] = float("inf")  # type: ignore[union-attr,index,operator]
    with pytest.raises(NumericalError, match=r"model\.layers\.0: \d+ of 4096 output values are NaN or infinite"):
        forward(block, inputs.hidden, kwargs, "model.layers.0")


# -------------------------------------------------------------------------------------------------- odd blocks


class Block(nn.Module):
    """A block of two layers whose way of calling them is given."""

    def __init__(self, run: Callable[[Block, Tensor], Any]) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.calls = 0
        self._run = run

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return self._run(self, x)


def run(block: Block, *hidden: Tensor, mask: list[Tensor | None] | None = None, **options: Any) -> Captured:
    return collect(
        block, ["one", "two"], list(hidden), [{} for _ in hidden], mask or [None] * len(hidden), where="b", **options
    )


def test_a_layer_without_inputs_is_an_error_unless_allowed() -> None:
    block = Block(lambda b, x: b.one(x))
    with pytest.raises(NumericalError, match="b: layer collected no inputs: two"):
        run(block, torch.ones(1, 2, 4))
    captured = run(block, torch.ones(1, 2, 4), allow_unused=True)
    assert captured.unused == ("two",)
    assert captured.hessians["two"].tokens == 0
    assert captured.hessians["two"].in_features == 4


def test_equal_but_different_tensors_do_not_share() -> None:
    captured = run(Block(lambda b, x: b.one(x) + b.two(x.clone())), torch.randn(1, 3, 4))
    assert captured.hessians["one"] is not captured.hessians["two"]
    torch.testing.assert_close(captured.hessians["one"].matrix(), captured.hessians["two"].matrix())


def test_a_layer_that_joins_later_gets_statistics_of_its_own() -> None:
    block = Block(lambda b, x: b.one(x) if b.calls == 1 else b.one(x) + b.two(x))
    captured = run(block, torch.randn(1, 3, 4), torch.randn(1, 5, 4))
    assert (captured.hessians["one"].tokens, captured.hessians["two"].tokens) == (8, 5)


def test_layers_that_stop_sharing_are_refused_rather_than_mixed_up() -> None:
    block = Block(lambda b, x: b.one(x) + b.two(x if b.calls == 1 else 2 * x))
    with pytest.raises(UsageError, match=r"b\.two shares its input with other layers in some calls"):
        run(block, torch.randn(1, 3, 4), torch.randn(1, 3, 4))


def test_four_dimensional_keyword_and_tuple_calls_are_understood() -> None:
    x = torch.randn(2, 3, 4)
    wide = Block(lambda b, x: b.one(input=x.unsqueeze(2).expand(-1, -1, 5, -1)) + b.two(x).unsqueeze(2))
    mask: list[Tensor | None] = [torch.tensor([[1, 1, 0], [1, 1, 1]])]
    captured = run(wide, x, mask=mask)
    assert (captured.hessians["one"].tokens, captured.hessians["two"].tokens) == (25, 5)
    torch.testing.assert_close(captured.hessians["one"].matrix(), captured.hessians["two"].matrix())

    class TakesTuple(nn.Linear):
        def forward(self, input: Any) -> Tensor:
            return super().forward(input[0])

    block = Block(lambda b, x: b.one((x, None)) + b.two(x))
    block.one = TakesTuple(4, 4)
    assert run(block, x).hessians["one"].tokens == 6


def test_flattened_inputs_are_masked_and_unclear_ones_refused() -> None:
    x, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]])
    flat = Block(lambda b, x: b.one(x.reshape(-1, 4)) + b.two(x.reshape(-1, 4)))
    assert run(flat, x, mask=[mask]).hessians["one"].tokens == 3
    routed = Block(lambda b, x: b.one(x.reshape(-1, 4)[:4]) + b.two(x.reshape(-1, 4)[:4]))
    assert run(routed, x).hessians["one"].tokens == 4
    with pytest.raises(UsageError, match=r"b\.one: inputs of shape \[4, 4\] do not tell which rows are padding"):
        run(routed, x, mask=[mask])


def test_hooks_are_gone_after_an_error() -> None:
    block = Block(lambda b, x: b.one(x))
    with pytest.raises(NumericalError):
        run(block, torch.ones(1, 2, 4))
    assert not block.one._forward_pre_hooks
    with pytest.raises(UsageError, match="equally many batches"):
        collect(block, ["one"], [torch.ones(1, 2, 4)], [], [])


# -------------------------------------------------------------------------------------------------- token weights


def test_weights_are_those_of_the_tokens_over_all_batches() -> None:
    x, s = torch.randn(3, 5, 4), torch.rand(15)
    captured = run(Block(lambda b, x: b.one(x) + b.two(x)), x[:1], x[1:], weights={"two": s})
    rows = x.reshape(-1, 4)
    torch.testing.assert_close(captured.hessians["two"].matrix(), (s[:, None] * rows).T @ rows / 15)
    torch.testing.assert_close(captured.hessians["one"].matrix(), rows.T @ rows / 15)
    assert captured.hessians["one"].tokens == captured.hessians["two"].tokens == 15


def test_layers_with_weights_share_with_no_other() -> None:
    x, block = torch.randn(1, 6, 4), Block(lambda b, x: b.one(x) + b.two(x))
    s, t = torch.rand(6), torch.rand(6)
    both = run(block, x, weights={"one": s, "two": t}).hessians
    assert both["one"] is not both["two"]
    for name, mine in (("one", s), ("two", t)):
        alone = run(block, x, weights={name: mine}).hessians
        assert torch.equal(alone[name].matrix(), both[name].matrix())
    shared = run(block, x, weights={"another": s}).hessians
    assert shared["one"] is shared["two"]


def test_padding_has_no_weight() -> None:
    x, s = torch.randn(2, 3, 4), torch.rand(4)
    mask: list[Tensor | None] = [torch.tensor([[1, 1, 0], [1, 1, 0]])]
    captured = run(Block(lambda b, x: b.one(x) + b.two(x)), x, mask=mask, weights={"one": s})
    rows = x[:, :2].reshape(-1, 4)
    torch.testing.assert_close(captured.hessians["one"].matrix(), (s[:, None] * rows).T @ rows / 4)


def test_rows_and_weights_that_differ_in_number_are_refused() -> None:
    x = torch.randn(1, 6, 4)
    often = Block(lambda b, x: b.one(b.one(x)) + b.two(x))
    with pytest.raises(UsageError, match=r"b\.one reads more rows than there are token weights \(6\)"):
        run(often, x, weights={"one": torch.ones(6)})
    # An expert that does not see every token: nobody knows whose weights its rows have.
    few = Block(lambda b, x: b.one(x[:, :4]).sum() + b.two(x))
    with pytest.raises(UsageError, match=r"b\.one reads 4 rows, but there are 6 token weights"):
        run(few, x, weights={"one": torch.ones(6)})
    assert not few.one._forward_pre_hooks
    unused = Block(lambda b, x: b.two(x))
    assert run(unused, x, weights={"one": torch.ones(6)}, allow_unused=True).unused == ("one",)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "phi3", "qwen3", "mistral"])
def test_every_target_of_every_block_collects(tiny_model: Tiny, name: str) -> None:
    for index in range(2):
        captured = capture_block(tiny_model(name), index)[3]
        assert captured.hessians
        assert all(h.tokens == 96 for h in captured.hessians.values())
