"""JLCM: groups of rows, first codes, and how codes move, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from octavo._core.errors import UsageError
from octavo.algorithms import get
from octavo.math.grouping import grouped_order, shape_features
from octavo.math.hessian import proxy_loss
from octavo.math.moves import Displacement, Rule, gaps, moved
from octavo.pipeline._tunable import TunableLinear
from octavo.weight import VQWeight
from oracle import jlcm as oracle
from oracle.gptvq import Tiles, gptvq
from oracle.matrices import activations, normal_weight, second_moment


def _matrix(out: int, inp: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    weight = normal_weight(rng, out, inp) * np.exp(rng.normal(size=(out, 1)))
    return torch.from_numpy(weight).float(), torch.from_numpy(second_moment(activations(rng, inp))).float()


def _quantize(weight: torch.Tensor, hessian: torch.Tensor, **options: Any) -> VQWeight:
    return get("jlcm")(**{"bits": 2.3, **options}).quantize(weight, hessian=hessian)


# ---------------------------------------------------------------- groups of rows


def test_features_are_the_oracles_and_know_neither_size_nor_order_of_a_row() -> None:
    weight = _matrix(7, 40)[0]
    weight[3] = 0
    np.testing.assert_allclose(shape_features(weight).numpy(), oracle.shape_features(weight.numpy()), atol=1e-12)
    again = weight[:, torch.randperm(40)] * 3.7
    torch.testing.assert_close(shape_features(again), shape_features(weight), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 2, 3, 21, 64])
def test_the_order_is_the_oracles(rows: int) -> None:
    features = torch.from_numpy(np.random.default_rng(rows).normal(size=(rows, 5)))
    order = grouped_order(features)
    assert sorted(order.tolist()) == list(range(rows))
    assert order.tolist() == oracle.grouped_order(features.numpy())


def test_rows_of_one_kind_become_neighbours() -> None:
    """Four kinds of rows, mixed: each quarter of the order is one kind."""
    rng = np.random.default_rng(0)
    kinds = [rng.normal(size=(16, 400)), rng.uniform(-1, 1, (16, 400)), rng.laplace(size=(16, 400))]
    kinds.append(np.sign(rng.normal(size=(16, 400))))
    mixed = rng.permutation(64)
    weight = torch.from_numpy(np.concatenate(kinds)[mixed])
    order = grouped_order(shape_features(weight)).numpy()
    quarters = (mixed[order] // 16).reshape(4, 16)
    assert all(len(set(quarter)) == 1 for quarter in quarters.tolist())


def test_a_codebook_per_kind_of_rows_loses_less_in_that_order() -> None:
    rng = np.random.default_rng(1)
    levels = rng.choice([-2.0, -0.5, 0.5, 2.0], (32, 64))
    weight = np.concatenate([rng.uniform(-1, 1, (32, 64)), levels])[rng.permutation(64)]
    matrix = torch.from_numpy(weight).float()
    method = get("jlcm")(bits=2.3, groups=2)
    order = method.row_order([matrix])
    assert method.orders_rows and not get("jlcm")(reorder=False).orders_rows
    eye = torch.eye(64)
    grouped = proxy_loss(matrix[order], method.quantize(matrix[order]).dequantize(), eye)
    assert grouped < 0.9 * proxy_loss(matrix, method.quantize(matrix).dequantize(), eye)


def test_one_order_serves_all_matrices_of_the_neurons() -> None:
    gate, up = _matrix(24, 30, 1)[0], _matrix(24, 30, 2)[0]
    order = get("jlcm")().row_order([gate, up])
    both = np.concatenate([oracle.shape_features(m.numpy()) for m in (gate, up)], axis=1)
    assert order.tolist() == oracle.grouped_order(both)


# ---------------------------------------------------------------- layouts


def test_layouts_have_codebooks_per_group_and_a_byte_of_scale_per_row() -> None:
    layouts = list(get("jlcm")(bits=2.3, groups=8).candidates((64, 96), False))
    assert {layout.stages for layout in layouts} == {(1,), (2,), (3,), (4,)}
    for layout in layouts:
        spec = layout.tensors()
        assert (layout.vector_length, layout.direction, layout.tile) == (1, "row", (8, 96))
        assert spec["codebook_0"] == (torch.int8, (8, 1 << layout.stages[0], 1))
        assert spec["block_scale_code"][1] == (1, 16)
    two = next(layout for layout in layouts if layout.stages == (2,))
    # 6 words of indices a row; 4 entries and a float16 scale per book; a byte per row, two float16 for all.
    assert two.bits() == 64 * 6 * 32 + 8 * (4 * 8 + 16) + 64 * 8 + 32


def test_fractions_of_bits_come_from_matrices_of_different_widths() -> None:
    shapes = [((192, 192), False)] * 6
    for bits in (2.3, 3.0, 4.0):
        layouts = get("jlcm")(bits=bits).layouts(shapes)
        total = sum(layout.bits() for layout in layouts) / sum(layout.weights for layout in layouts)
        assert bits - 0.05 < total <= bits


def test_codebooks_of_single_rows_need_no_scales() -> None:
    layout = next(iter(get("jlcm")(bits=2.3, groups=1000).candidates((48, 64), False)))
    assert (layout.tile, layout.block_scale) == ((1, 64), None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vector_length": 3}, "vector_length wanted one of 1, 2, 4, 8; got 3"),
        ({"vector_length": 8}, "want codebooks beyond 2.12; give a shorter vector_length"),
        ({"groups": 0}, "groups wanted a whole number >= 1, got 0"),
        ({"reorder": 1}, "reorder wanted one of True, False; got 1"),
        ({"learn": "codes"}, "learn wanted one of none, books, joint; got 'codes'"),
        ({"rule": "adam"}, "rule wanted one of proximal, ste; got 'adam'"),
        ({"metric": "euclid"}, "metric wanted one of block, diagonal, none; got 'euclid'"),
        ({"rounds": -1}, "rounds wanted a whole number >= 0, got -1"),
        ({"damping": 0}, "damping wanted a number above 0"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        get("jlcm")(**options)


# ---------------------------------------------------------------- the first codes


@pytest.mark.parametrize("v", [1, 2])
def test_the_first_codes_are_the_nearest_under_error_feedback(v: int) -> None:
    weight, hessian = _matrix(24, 32)
    result = _quantize(weight, hessian, groups=3, vector_length=v, update="none", side_dtype="float32")
    tile = result.layout.tile
    assert tile is not None
    books = result.codebook(0).view(3, 1, -1, v).double().numpy()
    scales = result.block_scales().double().expand(-1, 32).numpy()
    np.testing.assert_allclose(scales[:, 0], weight.double().square().mean(dim=1).sqrt(), rtol=0.02)
    codes = result.codes()[0].numpy()
    wanted = gptvq(weight.numpy(), hessian.numpy(), books, Tiles(8, 32, v), scales=scales, follow=codes)
    assert wanted.worst < 1e-4
    np.testing.assert_allclose(result.dequantize().numpy(), wanted.values, atol=1e-5 * np.abs(wanted.values).max())


# ---------------------------------------------------------------- moves


@pytest.mark.parametrize("rule", ["proximal", "ste"])
@pytest.mark.parametrize(("v", "k", "neighbours"), [(1, 4, 8), (1, 16, 3), (2, 8, 4), (4, 16, 8)])
def test_learning_steps_are_the_oracles(rule: Rule, v: int, k: int, neighbours: int) -> None:
    rng = np.random.default_rng(k + v)
    books, owner = rng.normal(size=(3, k, v)), np.repeat([0, 1, 2], 4)[:, None] * np.ones((1, 9), dtype=np.int64)
    codes, weights = rng.integers(0, k, (12, 9)), np.exp(rng.normal(size=(1, 9, 1)))
    state = oracle.State.of(codes, v)
    tensor_books, current = torch.from_numpy(books).float(), torch.from_numpy(codes)
    displacement = Displacement(tensor_books, torch.from_numpy(owner.astype(np.int64)))
    for _ in range(5):
        slope = rng.normal(size=(12, 9, v)) * weights
        decoded = tensor_books[torch.from_numpy(owner.astype(np.int64)), current].requires_grad_(True)
        attached = displacement.attach(decoded)
        assert torch.equal(attached, decoded)
        (attached * torch.from_numpy(slope).float()).sum().backward()
        current = displacement.step(current, tensor_books, 0.2, rule, neighbours)
        oracle.learn(state, slope, books, owner.astype(np.int64), 0.2, rule, neighbours)
        np.testing.assert_array_equal(current.numpy(), state.codes)
    assert 0 < (state.codes != codes).mean() < 1


def test_the_proximal_rule_goes_to_the_neighbour_and_the_plain_one_to_the_end() -> None:
    book = torch.tensor([[[-3.0], [-1.0], [1.0], [3.0]]])
    start, owner = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    for push, proximal, plain in ((0.3, 0, 0), (0.7, 0, 3), (1.1, 1, 3), (1.9, 1, 3)):
        there = torch.full((1, 1), push)
        assert moved(start, there, book, owner, "proximal", 8).item() == proximal
        assert moved(start, there, book, owner, "ste", 8).item() == plain
        assert moved(start, there, book, owner, "ste", 1).item() == proximal


def test_codewords_that_are_equal_are_no_place_to_go() -> None:
    book = torch.tensor([[[0.0], [0.0], [1.0], [1.0]]])
    codes, owner = torch.tensor([0, 1, 2]), torch.zeros(3, dtype=torch.int64)
    push = torch.tensor([[0.6], [-0.6], [-0.6]])
    for rule in ("proximal", "ste"):
        got = moved(codes, push, book, owner, rule, 8)
        assert book[0, got, 0].tolist() == [1.0, 0.0, 0.0]
    assert torch.isfinite(gaps(book)).all()


def test_the_gradient_that_moves_codes_is_that_of_the_decoded_vectors() -> None:
    """Through scales of rows and groups of books: dL/dW times the scale, in gaps of the row's codebook."""
    weight, hessian = _matrix(12, 16)
    quantized = _quantize(weight, hessian, groups=3)
    layer = TunableLinear(quantized, ("books", "scales", "codes"), "fc")
    x, y = torch.randn(20, 16), torch.randn(20, 12)
    assert layer.codes is not None
    (layer(x) - y).square().sum().backward()
    slope = 2 * (x @ quantized.dequantize().T - y).T @ x
    books = quantized.codebook(0)
    gap = gaps(books).repeat_interleave(4).unsqueeze(1)
    wanted = (slope * quantized.block_scales() * gap).unsqueeze(2)
    assert layer.codes.probe.grad is not None
    torch.testing.assert_close(layer.codes.probe.grad, wanted, rtol=1e-4, atol=1e-4)
    layer.move_codes(1.0, "proximal", 8)
    after = layer.rounded()
    assert layer.moved_codes() == int((after.codes()[0] != quantized.codes()[0]).sum()) > 0
    assert all(torch.equal(after.tensors[key], quantized.tensors[key]) for key in after.tensors if key != "indices")
    assert torch.equal(layer.start.tensors["indices"], quantized.tensors["indices"])


def test_a_layer_that_no_token_reached_keeps_its_codes() -> None:
    layer = TunableLinear(_quantize(*_matrix(12, 16), groups=3), ("books", "codes"), "expert")
    layer.move_codes(1.0, "proximal", 8)
    assert layer.moved_codes() == 0
