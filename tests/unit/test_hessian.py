"""Hessian accumulation, damping, factorisation and the proxy loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo._core.errors import NumericalError
from octavo.math.hessian import (
    DAMPING_LADDER,
    HessianAccumulator,
    check_finite,
    damped,
    dead_columns,
    exact_float32,
    factorize,
    proxy_loss,
)
from oracle import feedback as oracle
from oracle import shrinkage as shrinkage_oracle
from oracle.matrices import activations, families, family, normal_weight, second_moment

_USABLE = [name for name in families() if family(name).hessian.shape[0] > 1]


@pytest.fixture
def x() -> Tensor:
    return torch.from_numpy(activations(np.random.default_rng(1), 48, 500)).float()


def _inverse_from_factor(hessian: np.ndarray) -> tuple[np.ndarray, float]:
    factor = factorize(torch.from_numpy(hessian))
    upper = factor.feedback.double() * factor.variance.double().sqrt().unsqueeze(1)
    return (upper.T @ upper).numpy(), factor.damping


# ---------------------------------------------------------------- accumulation


def test_chunks_of_any_size_add_up_to_the_mean_outer_product(x: Tensor) -> None:
    wanted = x.double().T @ x.double() / 500
    for sizes in ([500], [1] * 500, [3, 450, 0, 47]):
        accumulator = HessianAccumulator(48)
        for part in x.split(sizes):
            accumulator.add(part)
        assert (accumulator.tokens, accumulator.bad_tokens) == (500, 0)
        torch.testing.assert_close(accumulator.matrix().double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision_inputs_are_summed_in_float32(x: Tensor, dtype: torch.dtype) -> None:
    rounded = x.to(dtype)
    accumulator = HessianAccumulator(48)
    for part in rounded.split(50):
        accumulator.add(part)
    assert accumulator.matrix().dtype == torch.float32
    exact = rounded.double()
    torch.testing.assert_close(accumulator.matrix().double(), exact.T @ exact / 500, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_weights_multiply_the_outer_products_of_their_tokens(x: Tensor, dtype: torch.dtype) -> None:
    weights = torch.rand(500) ** 3
    weights[:7] = 0
    accumulator = HessianAccumulator(48)
    for rows, part in zip(x.to(dtype).split([3, 450, 0, 47]), weights.split([3, 450, 0, 47]), strict=True):
        accumulator.add(rows, part.to(dtype if dtype == torch.float64 else torch.float32))
    exact = x.to(dtype).double()
    wanted = (weights.double().unsqueeze(1) * exact).T @ exact / 500
    torch.testing.assert_close(accumulator.matrix().double(), wanted, rtol=1e-5, atol=1e-6)
    # Tokens without weight are tokens: H is a mean over all of them.
    assert accumulator.tokens == 500


def test_weights_of_one_are_none(x: Tensor) -> None:
    plain, weighted = HessianAccumulator(48), HessianAccumulator(48)
    before = x.clone()
    plain.add(x)
    weighted.add(x, torch.ones(500))
    assert torch.equal(plain.matrix(), weighted.matrix())
    weighted.add(x, torch.full((500,), 4.0))
    torch.testing.assert_close(weighted.matrix(), 2.5 * plain.matrix())
    assert torch.equal(x, before)


def test_rows_that_are_not_finite_are_left_out_with_their_weights(x: Tensor) -> None:
    weights, bad = torch.rand(500), x.clone()
    bad[3, 0], bad[40, 5] = torch.nan, torch.inf
    keep = torch.ones(500, dtype=torch.bool)
    keep[[3, 40]] = False
    accumulator, clean = HessianAccumulator(48), HessianAccumulator(48)
    accumulator.add(bad, weights)
    clean.add(x[keep], weights[keep])
    assert (accumulator.tokens, accumulator.bad_tokens) == (498, 2)
    torch.testing.assert_close(accumulator.matrix(), clean.matrix())


def test_rows_with_nan_or_infinity_are_left_out_and_counted(x: Tensor) -> None:
    bad = x.clone()
    bad[3, 0], bad[40, 5], bad[40, 6], bad[99, 47] = torch.nan, torch.inf, -torch.inf, -torch.inf
    keep = torch.ones(500, dtype=torch.bool)
    keep[[3, 40, 99]] = False
    accumulator, clean = HessianAccumulator(48), HessianAccumulator(48)
    accumulator.add(bad)
    clean.add(x[keep])
    assert (accumulator.tokens, accumulator.bad_tokens) == (497, 3)
    torch.testing.assert_close(accumulator.matrix(), clean.matrix())
    accumulator.check("layer")


def test_finite_rows_whose_sum_overflows_are_kept() -> None:
    rows = torch.full((2, 4), 3e38)
    accumulator = HessianAccumulator(4)
    accumulator.add(rows * torch.tensor([[1e-20], [1.0]]))
    assert accumulator.bad_tokens == 0
    assert accumulator.tokens == 2


def test_more_than_a_tenth_of_bad_rows_is_refused_with_module_and_counts(x: Tensor) -> None:
    bad = x.clone()
    bad[:51] = torch.nan
    accumulator = HessianAccumulator(48)
    accumulator.add(bad)
    with pytest.raises(NumericalError, match=r"model\.layers\.3\.mlp: 51 of 500 calibration rows are NaN or infinite"):
        accumulator.check("model.layers.3.mlp")


def test_a_sum_that_overflows_float32_is_refused() -> None:
    accumulator = HessianAccumulator(2)
    accumulator.add(torch.tensor([[1e30, 1.0]]))
    with pytest.raises(NumericalError, match=r"block: the Hessian holds 0 NaN and 1 infinite entries of 4"):
        accumulator.check("block")


def test_no_tokens_give_zeros_not_nan() -> None:
    accumulator = HessianAccumulator(5)
    accumulator.check("expert")
    assert torch.equal(accumulator.matrix(), torch.zeros(5, 5))


# ---------------------------------------------------------------- shrinkage


@pytest.mark.parametrize("width", [6, 1030])
@pytest.mark.parametrize("weighted", [False, True])
def test_shrinkage_is_variance_between_pieces_over_squares(width: int, weighted: bool) -> None:
    # More inputs than a tile has take the products apart; the oracle sees the six that differ from 0.
    rng = np.random.default_rng(2)
    x = np.zeros((2048, width))
    places = np.sort(rng.choice(width, 6, replace=False))
    x[:, places] = rng.standard_normal((2048, 6)) @ rng.standard_normal((6, 6))
    s = rng.random(2048) ** 4 if weighted else np.ones(2048)
    accumulator = HessianAccumulator(width)
    for part in (slice(0, 700), slice(700, 1724), slice(1724, 2048)):
        accumulator.add(torch.from_numpy(x[part]), torch.from_numpy(s[part]) if weighted else None)
    cuts = (700, 1724)
    wanted = shrinkage_oracle.shrinkage(np.split(x[:, places], cuts), np.split(s, cuts))
    assert accumulator.shrinkage() == pytest.approx(wanted, rel=1e-4)


def test_pieces_have_about_a_thousand_tokens_however_they_arrive(x: Tensor) -> None:
    rows = x.repeat(5, 1)[:2048] * torch.rand(2048, 1)
    whole, parts = HessianAccumulator(48), HessianAccumulator(48)
    whole.add(rows)
    parts.add(rows[:1024])
    parts.add(rows[:0])
    parts.add(rows[1024:])
    assert 0 < whole.shrinkage() == parts.shrinkage() < 1


def test_for_independent_tokens_shrinkage_is_what_ledoit_and_wolf_say() -> None:
    """E of the variance of H_ij is (H_ii H_jj + H_ij^2) / n for Gaussian tokens."""
    width, pieces = 64, 24
    mix = torch.randn(width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    mix[:, 0] *= 4
    truth = mix @ mix.T
    accumulator = HessianAccumulator(width)
    for seed in range(pieces):
        accumulator.add(torch.randn(1024, width, generator=torch.Generator().manual_seed(seed)) @ mix.T.float())
    off = ~torch.eye(width, dtype=torch.bool)
    diagonal = truth.diagonal()
    variance = (diagonal[:, None] * diagonal + truth.square())[off].sum() / (1024 * pieces)
    assert accumulator.shrinkage() == pytest.approx(float(variance / truth[off].square().sum()), rel=0.1)


@pytest.mark.parametrize("sizes", [(1024, 1024, 1024, 1024), (1024, 100), (900, 300, 60), (4096, 1)])
def test_pieces_of_unlike_sizes_do_not_look_like_chance(sizes: tuple[int, ...]) -> None:
    shares = []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        mix = torch.randn(24, 24, generator=torch.Generator().manual_seed(0)).T
        accumulator = HessianAccumulator(24)
        for size in sizes:
            accumulator.add(torch.randn(size, 24, generator=generator) @ mix)
        shares.append(accumulator.shrinkage())
    truth = (mix.T @ mix).double()
    off, diagonal = ~torch.eye(24, dtype=torch.bool), truth.diagonal()
    variance = (diagonal[:, None] * diagonal + truth.square())[off].sum() / sum(sizes)
    assert np.mean(shares) == pytest.approx(float(variance / truth[off].square().sum()), rel=0.25)


def test_a_shrunk_hessian_keeps_its_diagonal_and_is_nearer_to_the_truth(x: Tensor) -> None:
    mix = torch.randn(48, 48, generator=torch.Generator().manual_seed(4))
    accumulator = HessianAccumulator(48)
    for seed in range(3):
        # Every row stands for 64 tokens: neighbours are alike.
        rows = torch.randn(16, 48, generator=torch.Generator().manual_seed(seed)).repeat_interleave(64, 0)
        accumulator.add(rows @ mix.T)
    plain, share = accumulator.matrix(), accumulator.shrinkage()
    assert 0.1 < share < 0.5
    for factor in (0.5, 1.0, 2.0):
        shrunk = accumulator.matrix(factor)
        assert torch.equal(shrunk.diagonal(), plain.diagonal())
        wanted = (1 - factor * share) * plain + factor * share * torch.diag(plain.diagonal())
        torch.testing.assert_close(shrunk, wanted)
    assert torch.equal(accumulator.matrix(1000.0), torch.diag(plain.diagonal()))
    truth = mix @ mix.T
    assert float((accumulator.matrix(1.0) - truth).norm()) < 0.95 * float((plain - truth).norm())


def test_shrinkage_of_too_little_or_nothing_is_none(x: Tensor) -> None:
    accumulator = HessianAccumulator(48)
    assert accumulator.shrinkage() == 0
    accumulator.add(x)
    assert accumulator.shrinkage() == 0
    silent, diagonal = HessianAccumulator(48), HessianAccumulator(1)
    for part in x.split(100):
        silent.add(torch.zeros_like(part))
        diagonal.add(part[:, :1])
    assert silent.shrinkage() == diagonal.shrinkage() == 0
    assert torch.equal(silent.matrix(2.0), torch.zeros(48, 48))


def test_the_tf32_setting_is_restored_even_after_an_error() -> None:
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    try:
        for wanted in ("tf32", "ieee"):
            settings.fp32_precision = wanted
            with pytest.raises(ZeroDivisionError), exact_float32():
                assert settings.fp32_precision == "ieee"
                raise ZeroDivisionError
            HessianAccumulator(3).add(torch.ones(2, 3))
            proxy_loss(torch.ones(2, 3), torch.zeros(2, 3), torch.eye(3))
            assert settings.fp32_precision == wanted
    finally:
        settings.fp32_precision = before


# ---------------------------------------------------------------- factorisation


@pytest.mark.parametrize("name", _USABLE)
def test_the_factor_squares_to_the_inverse_of_the_damped_hessian(name: str) -> None:
    hessian = family(name).hessian
    got, damping = _inverse_from_factor(hessian)
    assert damping == DAMPING_LADDER[0]
    exact = oracle.damped(hessian, damping)
    wanted = np.linalg.inv(exact)
    # In units of sqrt(Hinv_ii Hinv_jj) the damped matrix has the condition number that bounds the loss of digits.
    size = np.sqrt(np.outer(np.diag(wanted), np.diag(wanted)))
    error = np.abs((got - wanted) / size).max()
    assert error <= 1e-6 + 1e-7 * np.linalg.cond(exact * size), f"{error:.2e}"


@pytest.mark.parametrize("channels", [511, 513, 1100])
def test_large_factors_are_as_exact(channels: int) -> None:
    """They are inverted half by half."""
    x = torch.from_numpy(activations(np.random.default_rng(5), channels, 2 * channels)).double()
    hessian = x.T @ x / (2 * channels)
    factor = factorize(hessian.float())
    upper = factor.feedback.double() * factor.variance.double().sqrt().unsqueeze(1)
    assert torch.equal(upper, upper.triu())
    exact = damped(hessian, factor.damping)
    identity = torch.eye(channels, dtype=torch.float64)
    torch.testing.assert_close(upper.T @ upper @ exact, identity, rtol=0, atol=1e-3)


@pytest.mark.parametrize("damping", [0.01, 0.3])
@pytest.mark.parametrize("name", _USABLE)
def test_damping_is_that_of_the_textbook_and_changes_no_input(name: str, damping: float) -> None:
    hessian = torch.from_numpy(family(name).hessian)
    skew = torch.randn(hessian.shape) * hessian.diagonal().mean()
    crooked = hessian + (skew - skew.T)
    before = crooked.clone()
    got = damped(crooked, damping)
    wanted = oracle.damped(family(name).hessian, damping)
    np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
    assert torch.equal(crooked, before)
    assert torch.equal(got, got.T)


def test_the_feedback_factor_is_unit_upper_triangular_with_positive_variances() -> None:
    factor = factorize(torch.from_numpy(family("few_tokens").hessian))
    assert torch.equal(factor.feedback, factor.feedback.triu())
    assert torch.equal(torch.diagonal(factor.feedback), torch.ones(factor.feedback.shape[0]))
    assert bool((factor.variance > 0).all())


def test_variance_is_the_inverse_weight_of_a_columns_error() -> None:
    hessian = family("well_conditioned").hessian
    exact = oracle.damped(hessian)
    factor = factorize(torch.from_numpy(hessian))
    # 1 / U_jj^2 is what an error in column j costs once the columns after it have absorbed what they can:
    # the Schur complement H_jj - H_jF H_FF^-1 H_Fj.
    for j in (0, 100, 254, 255):
        rest = slice(j + 1, None)
        absorbed = exact[j, rest] @ np.linalg.solve(exact[rest, rest], exact[rest, j]) if j < 255 else 0.0
        assert 1 / float(factor.variance[j]) == pytest.approx(exact[j, j] - absorbed, rel=1e-4)


def test_powers_of_two_in_the_hessian_do_not_change_the_feedback() -> None:
    hessian = torch.from_numpy(family("dead_columns").hessian)
    plain = factorize(hessian)
    for scale in (2.0**-60, 2.0**40):
        scaled = factorize(hessian * scale)
        assert torch.equal(scaled.feedback, plain.feedback)
        torch.testing.assert_close(scaled.variance * scale, plain.variance)


def test_an_asymmetric_hessian_counts_as_its_symmetric_part() -> None:
    hessian = torch.from_numpy(family("well_conditioned").hessian)
    skew = torch.randn(hessian.shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    crooked = factorize(hessian + (skew - skew.T))
    torch.testing.assert_close(crooked.feedback, factorize(hessian).feedback, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("lowest", "taken"), [(-0.005, 0.01), (-0.02, 0.03), (-0.2, 0.3), (-0.7, 1.0)])
def test_the_ladder_climbs_just_as_far_as_an_indefinite_hessian_needs(lowest: float, taken: float) -> None:
    basis, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(40, 40)))
    values = np.ones(40)
    values[0] = lowest
    values[1:] = (40 - lowest) / 39
    hessian = torch.from_numpy((basis * values) @ basis.T).float()
    assert factorize(hessian, "layer").damping == pytest.approx(taken)


def test_the_damping_asked_for_is_the_first_one_tried() -> None:
    hessian = torch.from_numpy(family("well_conditioned").hessian)
    assert factorize(hessian, damping=0.2).damping == 0.2
    assert factorize(hessian, damping=1e-4).damping == 1e-4
    indefinite = hessian - 0.25 * hessian.diagonal().mean() * torch.eye(256)
    assert factorize(indefinite, damping=0.2).damping == 0.3


def test_failure_at_full_damping_names_the_module_and_what_to_do() -> None:
    hessian = torch.eye(4)
    hessian[0, 1] = hessian[1, 0] = 50.0
    with pytest.raises(NumericalError, match=r"q_proj: Cholesky .* damping 1\.0 .*on-bad-hessian rtn"):
        factorize(hessian, "q_proj")


def test_nan_and_infinity_are_counted_before_any_factorisation() -> None:
    hessian = torch.eye(10)
    hessian[2, 3] = hessian[3, 2] = torch.nan
    hessian[5, 5] = torch.inf
    for call in (lambda: factorize(hessian, "blocks.7.fc"), lambda: check_finite(hessian, "blocks.7.fc")):
        with pytest.raises(NumericalError, match=r"blocks\.7\.fc: the Hessian holds 2 NaN and 1 infinite .* of 100"):
            call()


@pytest.mark.parametrize("diagonal", [0.0, -1.0])
def test_an_empty_diagonal_is_missing_calibration_data_not_too_little_damping(diagonal: float) -> None:
    with pytest.raises(NumericalError, match=r"expert\.4: .*no calibration data.*More damping cannot help"):
        factorize(torch.eye(6) * diagonal, "expert.4")


def test_dead_columns_are_found_and_neither_get_nor_give_feedback() -> None:
    hessian = torch.from_numpy(family("dead_columns").hessian)
    dead = dead_columns(hessian)
    assert torch.equal(dead, hessian.diagonal() == 0)
    assert int(dead.sum()) == 256 // 5
    factor = factorize(hessian)
    off = factor.feedback - torch.eye(256)
    assert not bool(off[dead].any())
    assert not bool(off[:, dead].any())
    diagonal = hessian.diagonal()
    alive = factorize(hessian[~dead][:, ~dead], damping=0.01 * float(diagonal.mean() / diagonal[~dead].mean()))
    torch.testing.assert_close(factor.feedback[~dead][:, ~dead], alive.feedback, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- proxy loss


def test_the_proxy_loss_is_the_relative_output_error_on_the_calibration_inputs() -> None:
    rng = np.random.default_rng(5)
    x, weight = activations(rng, 32, 300), normal_weight(rng, 20, 32)
    quantized = weight + rng.normal(size=weight.shape).astype(np.float32) * 0.01
    got = proxy_loss(*(torch.from_numpy(a) for a in (weight, quantized, second_moment(x))))
    wanted = np.square(x @ (weight - quantized).T).sum() / np.square(x @ weight.T).sum()
    assert got == pytest.approx(wanted, rel=1e-4)
    assert got == pytest.approx(oracle.proxy_loss(weight, quantized, second_moment(x)), rel=1e-4)


def test_the_proxy_loss_is_0_without_error_1_for_zeros_and_defined_for_zero_weights() -> None:
    weight, hessian = torch.ones(2, 3), torch.eye(3)
    assert proxy_loss(weight, weight, hessian) == 0.0
    assert proxy_loss(weight, torch.zeros(2, 3), hessian) == 1.0
    assert proxy_loss(torch.zeros(2, 3), torch.zeros(2, 3), hessian) == 0.0
