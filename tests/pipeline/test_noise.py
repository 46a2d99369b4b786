"""What errors cost by noise: alpha is the KL of the noisy model over the square of the noise, and shares bits out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import VOCABULARY
from faults.jobs import digests, make_quick, stop_after
from octavo import algorithms, formats
from octavo._core.errors import Interrupted, UsageError
from octavo._core.seeds import generator
from octavo.calibration.gradients import backpropagate
from octavo.models.adapter import CausalModel
from octavo.models.source import resolve
from octavo.pipeline import guide
from octavo.pipeline.guide import measure
from octavo.pipeline.noise import measure_noise
from octavo.pipeline.plan import plan
from octavo.pipeline.run import quantize
from oracle.noise import divergence, whole_model

Tiny = Callable[[str], Path]


@pytest.fixture
def causal(tiny_llama: Path) -> CausalModel:
    return CausalModel(resolve(tiny_llama))


def some_tokens(windows: int = 3, ctx: int = 24) -> Tensor:
    return torch.randint(3, VOCABULARY, (windows, ctx), generator=torch.Generator().manual_seed(5))


def settings(text: Path, **changes: Any) -> dict[str, Any]:
    """A job on few tokens, guided by noise."""
    job = {"method": "universal", "bits": 2.6, "calib": text, "samples": 4, "ctx": 32, "guided": "both"}
    return {**job, "sensitivity": "noise", "options": {"beam": 4, "sweeps": 1}, **changes}


def names_of(causal: CausalModel) -> list[str]:
    return [name for index in range(len(causal.blocks)) for name in causal.targets(index)]


# -------------------------------------------------------------------------------------------------- the measurement


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "gpt2"])
def test_alpha_is_the_kl_of_the_noisy_model(tiny_model: Tiny, name: str) -> None:
    """Of every matrix, against transformers in float64: biases, soft caps, windows and transposed layers included."""
    folder, tokens = tiny_model(name), some_tokens()
    causal, model = CausalModel(resolve(folder)), whole_model(folder)
    found = measure_noise(causal, tokens, 7, error=0.05)
    assert list(found) == names_of(causal)
    for index in range(len(causal.blocks)):
        for matrix, target in causal.targets(index).items():
            wanted = divergence(model, tokens, matrix, 7, 0.05, target.transposed) / 0.05**2
            assert found[matrix] == pytest.approx(wanted, rel=1e-3), matrix


def test_the_kl_is_quadratic_in_the_noise(causal: CausalModel) -> None:
    tokens = some_tokens(16, 32)
    one, half = (measure_noise(causal, tokens, 0, error=error) for error in (0.05, 0.025))
    for name, alpha in one.items():
        assert half[name] == pytest.approx(alpha, rel=0.1), name


def test_noise_is_far_above_rounding(causal: CausalModel) -> None:
    """Noise of a tenth of the default's size still gives the same numbers: a hundredth of its KL."""
    tokens = some_tokens(16, 32)
    one, tenth = (measure_noise(causal, tokens, 0, error=error) for error in (0.05, 0.005))
    for name, alpha in one.items():
        assert tenth[name] == pytest.approx(alpha, rel=0.1), name


@pytest.mark.parametrize("streams", [1, 3, 9])
def test_groups_change_no_bit(tiny_gemma3: Path, streams: int) -> None:
    """However many noisy models are carried together, groups that end inside a block included."""
    causal, tokens = CausalModel(resolve(tiny_gemma3)), some_tokens()
    held = streams * 4 * tokens.numel() * causal.config.get_text_config().hidden_size
    assert measure_noise(causal, tokens, 0, held_bytes=held) == measure_noise(causal, tokens, 0)


def test_a_block_is_read_once_for_a_group(causal: CausalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """One group: every block once, and the first one again where the model is asked how its blocks answer."""
    loaded: list[int] = []
    load = causal.load_block
    monkeypatch.setattr(causal, "load_block", lambda index, *a: (loaded.append(index), load(index, *a))[1])
    steps: list[tuple[int, int]] = []
    measure_noise(causal, some_tokens(), 0, progress=lambda *step: steps.append(step))
    assert loaded == [0, 0, 1, 0]
    assert steps == [(1, 3), (2, 3), (3, 3)]


def test_progress_ends_at_its_total_with_many_groups(causal: CausalModel) -> None:
    steps: list[tuple[int, int]] = []
    measure_noise(causal, some_tokens(), 0, held_bytes=1, progress=lambda *step: steps.append(step))
    assert [done for done, _ in steps] == list(range(1, steps[-1][1] + 1))


def test_noise_depends_on_seed_and_name_alone(tiny_llama: Path, causal: CausalModel) -> None:
    """Other layers may be skipped: the numbers of the rest stay what they are."""
    tokens = some_tokens()
    everything = measure_noise(causal, tokens, 0)
    rest = measure_noise(CausalModel(resolve(tiny_llama), skip=["mlp.*"]), tokens, 0)
    assert rest and rest == {name: alpha for name, alpha in everything.items() if ".mlp." not in name}
    other = measure_noise(causal, tokens, 1)
    assert all(other[name] != alpha for name, alpha in everything.items())


def test_a_few_windows_are_enough_unless_told_otherwise(causal: CausalModel) -> None:
    """As many as have 2,048 tokens, and two at least."""
    tokens = some_tokens(20, 128)
    assert measure_noise(causal, tokens, 0) == measure_noise(causal, tokens[:16], 0)
    assert measure_noise(causal, tokens, 0, windows=3) == measure_noise(causal, tokens[:3], 0)


@pytest.mark.parametrize("tokens", [torch.zeros(0, 8, dtype=torch.int64), torch.zeros(8, dtype=torch.int64)])
def test_no_tokens_are_refused(causal: CausalModel, tokens: Tensor) -> None:
    with pytest.raises(UsageError, match="noise wants tokens"):
        measure_noise(causal, tokens, 0)


# -------------------------------------------------------------------------------------------------- importances


def test_importance_is_alpha_times_what_feedback_leaves(causal: CausalModel) -> None:
    """In float64 from the very same gradients: sum_j D_j |W_j|^2 over |W|^2 tr(H) / in."""
    tokens, method = some_tokens(), algorithms.get("vptq")(bits=3)
    found = measure(causal, method, tokens, 7, sensitivity="noise")
    by_gradients = measure(causal, method, tokens, 7)
    alphas = measure_noise(causal, tokens, 7)
    sums: dict[str, Tensor] = {}

    def visit(_: int, name: str, x: Tensor, g: Tensor) -> None:
        weighted = x.double() * g.double().square().mean(dim=1, keepdim=True)
        sums[name] = sums.get(name, 0.0) + weighted.T @ x.double() / tokens.numel()

    backpropagate(causal, tokens, visit, generator=generator(7, "labels"))
    assert found.importance.keys() == alphas.keys()
    for name, hessian in sums.items():
        energies = causal.weight(name).double().square().sum(dim=0)
        damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
        innovations = torch.linalg.cholesky(damped.flip(0, 1)).diagonal().flip(0).square()
        gain = float((innovations * energies).sum() / (energies.sum() * hessian.diagonal().mean()))
        assert gain < 1.02
        assert found.importance[name] == pytest.approx(alphas[name] * gain, rel=1e-3), name
        assert torch.equal(found.weights[name], by_gradients.weights[name])


def test_both_importances_have_one_unit(causal: CausalModel) -> None:
    """Where the Fisher information's diagonal is all there is, they agree; here the sums do within a factor of two."""
    tokens, method = some_tokens(16, 64), algorithms.get("universal")(bits=2.5)
    noise, gradients = (
        measure(causal, method, tokens, 0, sensitivity=kind).importance for kind in ("noise", "gradients")
    )
    assert 0.5 < sum(noise.values()) / sum(gradients.values()) < 2


def test_a_matrix_that_no_noise_reached_keeps_what_gradients_say(
    causal: CausalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, method = some_tokens(), algorithms.get("universal")(bits=2.5)
    first, *others = names_of(causal)
    monkeypatch.setattr(guide, "measure_noise", lambda *_, **__: {first: 0.0, **dict.fromkeys(others, 1.0)})
    found, by_gradients = (
        measure(causal, method, tokens, 0, sensitivity=kind).importance for kind in ("noise", "gradients")
    )
    assert found[first] == by_gradients[first]
    assert all(found[name] != by_gradients[name] for name in others)


# -------------------------------------------------------------------------------------------------- in a job


def test_bits_are_shared_out_by_noise_and_tokens_weighed_by_gradients(
    tiny_llama: Path, tiny_text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan with the same words chooses the same layouts; another measurement chooses others."""
    make_quick(monkeypatch)
    job = settings(tiny_text_file)
    quantize(tiny_llama, tmp_path / "out", **job)
    keys = ("method", "bits", "guided", "samples", "ctx", "calib", "options")
    shared = {key: job[key] for key in keys}
    written = {name: weight.layout for name, weight in formats.read_weights(tmp_path / "out")}
    planned = plan(tiny_llama, **shared, sensitivity="noise")
    assert written == {m.module: m.layout for m in planned.matrices}
    assert planned.predicted_kl != plan(tiny_llama, **shared).predicted_kl
    last = names_of(CausalModel(resolve(tiny_llama)))[-1]
    monkeypatch.setattr(
        guide, "measure_noise", lambda causal, *_, **__: dict.fromkeys(names_of(causal), 1e-9) | {last: 1.0}
    )
    biased = {m.module: m.layout.nominal_bits for m in plan(tiny_llama, **shared, sensitivity="noise").matrices}
    assert biased[last] == max(biased.values()) > 3


def test_a_job_guided_by_noise_continues_with_the_same_bytes(
    tiny_llama: Path, tiny_text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_quick(monkeypatch)
    job = settings(tiny_text_file)
    quantize(tiny_llama, tmp_path / "whole", **job)
    with pytest.raises(Interrupted):
        quantize(tiny_llama, tmp_path / "parts", **job, stop=stop_after(1))
    with pytest.raises(UsageError, match="sensitivity: was 'noise', now 'gradients'"):
        quantize(tiny_llama, tmp_path / "parts", **{**job, "sensitivity": "gradients"}, resume=True)
    monkeypatch.setattr(guide, "measure_noise", None)
    quantize(tiny_llama, tmp_path / "parts", **job, resume=True)
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")


def test_a_guide_by_noise_is_no_guide_by_gradients(
    tiny_llama: Path, tiny_text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = {key: value for key, value in settings(tiny_text_file).items() if key != "bits"}
    one = plan(tiny_llama, **job, bits=2.6, guide=tmp_path / "guide")
    monkeypatch.setattr(guide, "measure", None)
    assert plan(tiny_llama, **job, bits=2.6, guide=tmp_path / "guide").predicted_kl == one.predicted_kl
    with pytest.raises(UsageError, match=r"other sensitivity\."):
        plan(tiny_llama, **{**job, "sensitivity": "gradients"}, guide=tmp_path / "guide")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sensitivity": "luck"}, "sensitivity wanted gradients, noise; got 'luck'"),
        ({"guided": "weights"}, "Give --guided bits or both"),
        ({"guided": "none"}, "Give --guided bits or both"),
        ({"guided": None, "method": "vptq", "options": {}}, "Give --guided bits or both"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_read(
    tmp_path: Path, tiny_text_file: Path, wrong: dict[str, Any], message: str
) -> None:
    """The model does not even exist."""
    job = settings(tiny_text_file, **wrong)
    with pytest.raises(UsageError, match=message):
        quantize(tmp_path / "nowhere", tmp_path / "out", **job)
    with pytest.raises(UsageError, match=message):
        plan(tmp_path / "nowhere", **{**job, "guided": job["guided"] or "none"})
    assert not list(tmp_path.iterdir())
