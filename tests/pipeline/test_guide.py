"""What errors cost, and what follows: token weights, bits per matrix, exact sizes, overrides, catching up."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from faults.jobs import digests, make_quick, stop_after
from octavo import algorithms, formats
from octavo._core.errors import FormatError, Interrupted, UsageError
from octavo._core.seeds import generator
from octavo.calibration import capture
from octavo.calibration.gradients import backpropagate
from octavo.math.hessian import HessianAccumulator, caught_up
from octavo.models.adapter import CausalModel
from octavo.models.source import resolve
from octavo.pipeline import guide
from octavo.pipeline.guide import measure
from octavo.pipeline.output import weight_bytes
from octavo.pipeline.plan import plan
from octavo.pipeline.run import quantize


def settings(text: Path, **changes: Any) -> dict[str, Any]:
    """A guided job on few tokens."""
    job = {"method": "universal", "bits": 2.6, "calib": text, "samples": 4, "ctx": 32, "guided": "both"}
    return {**job, "options": {"beam": 4, "sweeps": 1}, **changes}


@pytest.fixture
def causal(tiny_llama: Path) -> CausalModel:
    return CausalModel(resolve(tiny_llama))


def some_tokens() -> Tensor:
    return torch.randint(3, 300, (3, 24), generator=torch.Generator().manual_seed(5))


# -------------------------------------------------------------------------------------------------- the measurement


def test_weights_and_importances_are_those_of_the_definition(causal: CausalModel) -> None:
    """In float64 from the very same gradients: s_t = mean_j g_tj^2, tr of the LDL innovations of E[s x x^T]."""
    tokens, method = some_tokens(), algorithms.get("vptq")(bits=3)
    found = measure(causal, method, tokens, seed=7)
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    backpropagate(
        causal,
        tokens,
        lambda _, name, x, g: seen.setdefault(name, []).append((x.clone(), g.clone())),
        generator=generator(7, "labels"),
    )
    assert seen.keys() == found.weights.keys() == found.importance.keys()
    for name, parts in seen.items():
        x = torch.cat([x for x, _ in parts]).double().numpy()
        s = torch.cat([g for _, g in parts]).double().numpy() ** 2
        s = s.mean(axis=1)
        np.testing.assert_allclose(found.weights[name].numpy(), np.minimum(s, 10 * s.mean()), rtol=1e-4)
        hessian = (x * s[:, None]).T @ x / len(x)
        hessian += 0.01 * hessian.diagonal().mean() * np.eye(len(hessian))
        # H = R D R^T with R unit upper triangular: D_j is what column j costs once later ones make up for it.
        upper = np.linalg.cholesky(hessian[::-1, ::-1])[::-1, ::-1]
        weight = causal.weight(name).double().numpy()
        wanted = 0.5 * ((np.diag(upper) ** 2) * (weight**2).sum(axis=0)).sum()
        assert found.importance[name] == pytest.approx(wanted, rel=1e-3), name


def test_no_token_outweighs_all_others(causal: CausalModel) -> None:
    weights = torch.tensor([0.0, 1.0, 2.0, 1e6] * 100)
    capped = guide._capped(weights)
    assert float(capped.max()) <= 10 * float(weights.mean())
    assert torch.equal(capped[:3], weights[:3])


def test_the_guide_is_the_same_on_disk_and_in_memory(causal: CausalModel, tmp_path: Path) -> None:
    method = algorithms.get("universal")(bits=2.5)
    one = measure(causal, method, some_tokens(), 0)
    other = measure(causal, method, some_tokens(), 0, tmp_path / "states")
    assert one.importance == other.importance
    assert all(torch.equal(s, other.weights[name]) for name, s in one.weights.items())


def test_the_guide_survives_its_store(causal: CausalModel, tiny_text_file: Path, tmp_path: Path) -> None:
    from octavo.pipeline.store import Store

    store = Store(tmp_path / "work", {"a": 1})
    store.create()
    found = measure(causal, algorithms.get("rtn")(bits=4), some_tokens(), 0)
    store.commit_guide(found.put(store))
    again = Store(tmp_path / "work", {"a": 1})
    again.resume()
    assert again.state.guide is not None
    read = guide.Guide.get(again, again.state.guide)
    assert read.importance == found.importance
    assert all(torch.equal(s, read.weights[name]) for name, s in found.weights.items())


# -------------------------------------------------------------------------------------------------- in a job


def test_a_guided_job_continues_with_the_same_bytes_and_measures_once(
    tiny_llama: Path, tiny_text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_quick(monkeypatch)
    job = settings(tiny_text_file, catch_up=0.5)
    quantize(tiny_llama, tmp_path / "whole", **job)
    with pytest.raises(Interrupted):
        quantize(tiny_llama, tmp_path / "parts", **job, stop=stop_after(1))
    monkeypatch.setattr(guide, "measure", None)
    quantize(tiny_llama, tmp_path / "parts", **job, resume=True)
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")


def test_jobs_of_several_sizes_share_a_guide(
    tiny_llama: Path, tiny_text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_quick(monkeypatch)
    file, job = tmp_path / "guide", settings(tiny_text_file)
    quantize(tiny_llama, tmp_path / "alone", **job)
    keys = ("method", "guided", "samples", "ctx", "calib", "options")
    planned = plan(tiny_llama, **{key: job[key] for key in keys}, bits=3.1, guide=file)
    monkeypatch.setattr(guide, "measure", None)
    quantize(tiny_llama, tmp_path / "shared", **job, guide=file)
    assert digests(tmp_path / "shared") == digests(tmp_path / "alone")
    other = quantize(tiny_llama, tmp_path / "other", **{**job, "bits": 3.1}, guide=file)
    assert other.bits_per_weight == planned.bits_per_weight > 2.6
    with pytest.raises(UsageError, match=r"other calibration, shape\."):
        quantize(tiny_llama, tmp_path / "longer", **{**job, "samples": 5}, guide=file)
    file.write_bytes(b"something else")
    with pytest.raises(FormatError, match="no guide"):
        quantize(tiny_llama, tmp_path / "damaged", **job, guide=file)


@pytest.mark.parametrize("change", [{"guided": "weights"}, {"catch_up": 0.25}, {"overrides": {"mlp.down_proj": 3.0}}])
def test_a_job_is_not_continued_with_another_guide(
    tiny_llama: Path, tiny_text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    make_quick(monkeypatch)
    with pytest.raises(Interrupted):
        quantize(tiny_llama, tmp_path / "out", **settings(tiny_text_file), stop=stop_after(1))
    with pytest.raises(UsageError, match=next(iter(change))):
        quantize(tiny_llama, tmp_path / "out", **settings(tiny_text_file, **change), resume=True)


def test_what_costs_more_gets_more_bits(
    tiny_llama: Path, tiny_text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All importances alike, but for one block's."""

    def biased(causal: CausalModel, *_: Any) -> guide.Guide:
        names = [name for i in range(len(causal.blocks)) for name in causal.targets(i)]
        return guide.Guide({}, {name: 100.0 if name.startswith(causal.blocks[1]) else 1.0 for name in names})

    monkeypatch.setattr(guide, "measure", biased)
    keys = ("method", "bits", "guided", "samples", "ctx", "calib")
    found = plan(tiny_llama, **{key: settings(tiny_text_file)[key] for key in keys})
    bits = {m.module: m.layout.nominal_bits for m in found.matrices}
    first = [b for name, b in bits.items() if ".0." in name]
    second = [b for name, b in bits.items() if ".1." in name]
    assert min(second) > max(first)
    assert found.predicted_kl is not None
    assert found.bits_per_weight <= 2.6


def test_plan_and_job_agree_when_guided(tiny_llama: Path, tiny_text_file: Path, tmp_path: Path) -> None:
    job = settings(tiny_text_file)
    quantize(tiny_llama, tmp_path / "out", **job)
    keys = ("method", "bits", "guided", "samples", "ctx", "calib", "options")
    found = plan(tiny_llama, **{key: job[key] for key in keys})
    written = {name: weight.layout for name, weight in formats.read_weights(tmp_path / "out")}
    assert written == {m.module: m.layout for m in found.matrices}


@pytest.mark.parametrize("wrong", [{"guided": "maybe"}, {"catch_up": 2.0}, {"overrides": {"no.such": 2.0}}])
def test_wrong_settings_are_refused_before_anything_is_written(
    tiny_llama: Path, tiny_text_file: Path, tmp_path: Path, wrong: dict[str, Any]
) -> None:
    with pytest.raises(UsageError):
        quantize(tiny_llama, tmp_path / "out", **settings(tiny_text_file, **wrong))
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------- sizes, overrides


@pytest.mark.parametrize("method", ["universal", "vptq", "gptvq"])
def test_weight_files_are_never_larger_than_asked(
    tiny_llama: Path, tiny_text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    make_quick(monkeypatch)
    job = settings(tiny_text_file, method=method, bits=None, guided="none", options={"sweeps": 0})
    if method != "universal":
        job["options"] = {"iterations": 2}
    payload = [plan(tiny_llama, method=method, bits=b, options=job["options"]).file_bytes for b in (2.8, 3.2, 3.9)]
    sizes = []
    for target in [size + 9000 for size in payload]:
        out = tmp_path / str(target)
        quantize(tiny_llama, out, **job, size=target)
        sizes.append(weight_bytes(out))
        assert sizes[-1] <= target
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({"size": 1000}, "cannot be met"),
        ({"size": 10**9}, "cannot be met"),
        ({"size": 200_000, "bits": 2.0}, "leave --bits"),
        ({"size": 200_000, "preset": "4d-2.25"}, "leave --bits"),
        ({"size": 200_000, "method": "gptq"}, "whole number"),
    ],
)
def test_sizes_that_cannot_be_met_are_refused(tiny_llama: Path, job: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan(tiny_llama, **job)


def test_overrides_hold_whatever_the_others_get(tiny_llama: Path) -> None:
    plain = plan(tiny_llama, method="universal", bits=2.6)
    found = plan(tiny_llama, method="universal", bits=2.6, overrides={"mlp.*": 1.6, "layers.1.mlp.down_proj": 4.1})
    bits = {m.module: m.layout.nominal_bits for m in found.matrices}
    assert bits["model.layers.1.mlp.down_proj"] > 3
    assert all(b <= 1.6 for name, b in bits.items() if "mlp" in name and name != "model.layers.1.mlp.down_proj")
    assert found.bits_per_weight <= 2.6
    before = {m.module: m.layout.nominal_bits for m in plain.matrices}
    assert all(bits[name] >= b for name, b in before.items() if "attn" in name)


# -------------------------------------------------------------------------------------------------- catching up


def test_catching_up_is_the_least_squares_answer() -> None:
    """With the damping next to nothing: what numpy's solver finds for the same inputs."""
    rng = np.random.default_rng(0)
    original = rng.standard_normal((500, 12))
    drifted = original + 0.3 * rng.standard_normal((500, 12)) @ rng.standard_normal((12, 12))
    weight = rng.standard_normal((5, 12))
    wanted = np.linalg.lstsq(drifted, original @ weight.T, rcond=None)[0].T
    hessian = torch.from_numpy(drifted.T @ drifted / 500).float()
    drift = torch.from_numpy((original - drifted).T @ drifted / 500).float()
    found = caught_up(torch.from_numpy(weight).float(), hessian, drift, 1.0, damping=1e-9)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=1e-4)
    half = caught_up(torch.from_numpy(weight).float(), hessian, drift, 0.5, damping=1e-9)
    np.testing.assert_allclose(half.numpy(), (wanted + weight) / 2, rtol=0, atol=1e-4)


def test_drifts_are_those_of_the_definition(causal: CausalModel) -> None:
    """E[s (x_o - x) x^T] of every layer of a block, with and without weights; the original's states go on."""
    inputs = causal.capture_inputs([(some_tokens(), None), (some_tokens().flip(0), None)])
    block, where = causal.load_block(0), causal.blocks[0]
    names = [name.removeprefix(where + ".") for name in causal.targets(0)]
    arguments = [k[0] for k in inputs.kwargs]
    hidden = [h + 0.1 * torch.randn_like(h) for h in inputs.hidden]
    weights = {names[-1]: torch.rand(2 * some_tokens().numel())}
    found = capture.collect(
        block, names, hidden, arguments, inputs.mask, where=where, weights=weights, originals=inputs.hidden
    )
    rows: dict[str, list[list[Tensor]]] = {name: [[], []] for name in names}
    for side, states in enumerate((inputs.hidden, hidden)):
        for name in names:
            layer = block.get_submodule(name)
            seen = rows[name][side]
            handle = layer.register_forward_pre_hook(partial(_remember, seen))
            capture.forward(block, states, arguments)
            handle.remove()
    for name in names:
        x_o, x = (torch.cat([r.flatten(0, -2) for r in rows[name][side]]).double() for side in (0, 1))
        s = weights.get(name, torch.ones(len(x))).double()
        wanted = ((x_o - x) * s[:, None]).T @ x / len(x)
        torch.testing.assert_close(
            found.drifts[name].double(), wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max())
        )
    for mine, theirs in zip(found.originals, capture.forward(block, inputs.hidden, arguments), strict=True):
        assert torch.equal(mine, theirs)


def _remember(seen: list[Tensor], _: Any, inputs: tuple[Tensor, ...]) -> None:
    seen.append(inputs[0])


def test_weighted_statistics_are_those_of_the_definition() -> None:
    x, s = torch.randn(200, 9), torch.rand(200)
    accumulator = HessianAccumulator(9)
    accumulator.add(x[:50], s[:50])
    accumulator.add(x[50:], s[50:])
    wanted = (x.double() * s.double()[:, None]).T @ x.double() / 200
    torch.testing.assert_close(accumulator.matrix().double(), wanted, rtol=1e-4, atol=1e-6)


def test_reports_name_the_guide(tiny_llama: Path, tiny_text_file: Path, tmp_path: Path) -> None:
    events: list[Any] = []
    report = quantize(tiny_llama, tmp_path / "out", **settings(tiny_text_file), progress=events.append)
    assert any("predicted KL" in e.message for e in events if e.kind == "phase")
    assert report.phases["gradients"] > 0


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"method": "universal"}, {2.0}),
        ({"method": "universal", "options": {"shrink": 0.5, "beam": 4, "sweeps": 1}}, {0.5}),
        ({"method": "vptq", "options": {"vector_length": 4, "centroids": 16}}, {0.0}),
        # Heads are universal, whatever the method of the blocks.
        ({"method": "gptq", "bits": 3, "head_bits": 4, "options": {"shrink": 3.0}}, {3.0, 2.0}),
    ],
)
def test_second_moments_are_shrunk_as_the_method_says(
    tiny_llama: Path,
    tiny_text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    wanted: set[float],
) -> None:
    seen: set[float] = set()
    matrix = HessianAccumulator.matrix

    def spy(self: HessianAccumulator, shrink: float = 0.0) -> Tensor:
        seen.add(shrink)
        return matrix(self, shrink)

    monkeypatch.setattr(HessianAccumulator, "matrix", spy)
    common = {"bits": 2.5, "calib": str(tiny_text_file), "samples": 2, "ctx": 16}
    quantize(tiny_llama, tmp_path / "out", **{**common, **settings})
    assert seen == wanted
