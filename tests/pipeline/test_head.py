"""Heads and embeddings that are one quantized matrix: what is written is what every way of running it computes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import octavo
from faults.jobs import digests, make_quick, stop_after
from octavo import formats
from octavo._core import clib
from octavo._core.errors import FormatError, Interrupted, UsageError
from octavo.formats.reader import CheckpointReader
from octavo.integrations.transformers import load
from octavo.kernels import select
from octavo.nn import TiedEmbedding, VQEmbedding, VQLinear
from octavo.pipeline import plan
from octavo.pipeline.convert import convert
from octavo.pipeline.head import tied_hessian
from octavo.pipeline.run import quantize
from octavo.pipeline.tune import tune
from octavo.runtime.decoder import NativeDecoder, why_not
from octavo.weight import VQWeight

Tiny = Callable[[str], Path]
TIED, APART = "llama", "qwen2"
FAST: dict[str, Any] = {"bits": 3.3, "samples": 2, "ctx": 32, "guided": "none", "options": {"beam": 4, "sweeps": 0}}
IDS = torch.arange(3, 43).reshape(2, 20)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)
    monkeypatch.delenv(select.ENVIRONMENT, raising=False)


@pytest.fixture(scope="module", params=[TIED, APART])
def quantized(request: pytest.FixtureRequest, tiny_model: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("head") / request.param
    quantize(tiny_model(request.param), out, head_bits=4, **FAST)
    return out


def stored(folder: Path, module: str) -> VQWeight:
    layout, reader = formats.check(folder).layouts[module], CheckpointReader(folder)
    return VQWeight(layout, {name: reader.read(f"{module}.{name}").clone() for name in layout.tensors()})


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits.float()


def test_head_and_embedding_are_what_is_stored(quantized: Path) -> None:
    """One matrix if they are tied, two if not; transformers and Octavo load the same."""
    tied = quantized.name == TIED
    names = {"lm_head"} if tied else {"lm_head", "model.embed_tokens"}
    layouts = formats.check(quantized).layouts
    assert names == {name for name in layouts if ".layers." not in name}
    assert {layouts[name].nominal_bits for name in names} == {4.0}
    assert not [n for n in CheckpointReader(quantized).names() if n in ("lm_head.weight", "model.embed_tokens.weight")]
    model = load(quantized, dtype=torch.float32, decode="packed")[0]
    assert isinstance(model.lm_head, VQLinear)
    assert isinstance(model.get_input_embeddings(), TiedEmbedding if tied else VQEmbedding)
    table = stored(quantized, "lm_head" if tied else "model.embed_tokens").dequantize()
    assert torch.equal(model.get_input_embeddings()(IDS), table[IDS])
    assert model.get_input_embeddings()(IDS[:, :0]).shape == (2, 0, 64)
    torch.testing.assert_close(model.lm_head.weight + 0, stored(quantized, "lm_head").dequantize())
    plain = AutoModelForCausalLM.from_pretrained(quantized, dtype=torch.float32).eval()
    assert torch.equal(logits(plain), logits(model))


def test_decoded_and_packed_models_agree(quantized: Path) -> None:
    packed, dense = (load(quantized, dtype=torch.float32, decode=way)[0] for way in ("packed", "dense"))
    tied = quantized.name == TIED
    assert (dense.lm_head.weight is dense.model.embed_tokens.weight) == tied
    assert type(dense.model.embed_tokens) is torch.nn.Embedding
    theirs = logits(dense)
    assert float((logits(packed) - theirs).abs().max()) < 1e-2 * float(theirs.abs().max())


def test_saved_copied_and_moved_models_stay_tied(quantized: Path, tmp_path: Path) -> None:
    model = load(quantized, dtype=torch.float32, decode="packed")[0]
    wanted = logits(model)
    twin = copy.deepcopy(model).to(torch.bfloat16)
    assert twin.get_input_embeddings()(IDS).dtype == torch.bfloat16
    if quantized.name == TIED:
        assert twin.get_input_embeddings().head is twin.lm_head
    assert torch.equal(logits(model), wanted)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    assert torch.equal(logits(again), wanted)
    load(quantized, dtype=torch.float32, decode="dense")[0].save_pretrained(tmp_path / "dense")
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    assert float((logits(original) - wanted).abs().max()) < 1e-2 * float(wanted.abs().max())


@pytest.mark.skipif(clib.library() is None, reason=f"no C++ library: {clib.why_missing()}")
def test_the_native_decoder_runs_them(quantized: Path) -> None:
    model = load(quantized, dtype=torch.float32, decode="packed")[0]
    assert not why_not(model)
    decoder = NativeDecoder(model, 32, threads=2, kv_cache="float16")
    wanted = logits(load(quantized, dtype=torch.float32, decode="dense")[0])[0]
    for i, token in enumerate(IDS[0]):
        found = decoder.run(token.reshape(1))
        assert float((found - wanted[i]).abs().max()) < 1e-2 * float(wanted[i].abs().max())
    heads = stored(quantized, "lm_head").bits() // 8
    assert heads <= decoder.bytes_per_token < heads + sum(p.nbytes for p in model.parameters()) + 200_000


def test_the_plan_is_what_comes_out(quantized: Path, tiny_model: Tiny) -> None:
    made = plan(tiny_model(quantized.name), head_bits=4, **{k: v for k, v in FAST.items() if k != "samples"})
    assert {m.module: m.layout for m in made.matrices} == dict(formats.check(quantized).layouts)
    payload = sum(CheckpointReader(quantized).bytes(name) for name in CheckpointReader(quantized).names())
    assert made.file_bytes == payload


def test_a_size_counts_the_head(tiny_model: Tiny, tmp_path: Path) -> None:
    size = 50_000
    report = quantize(
        tiny_model(TIED), tmp_path / "out", head_bits=4, size=size, **{k: v for k, v in FAST.items() if k != "bits"}
    )
    assert 0.9 * size < report.file_bytes <= size


def test_a_job_stopped_before_the_head_goes_on_to_the_same_bytes(tiny_model: Tiny, tmp_path: Path) -> None:
    quantize(tiny_model(TIED), tmp_path / "whole", head_bits=3, **FAST)
    with pytest.raises(Interrupted):
        quantize(tiny_model(TIED), tmp_path / "parts", head_bits=3, stop=stop_after(2), **FAST)
    with pytest.raises(UsageError, match="head_bits"):
        quantize(tiny_model(TIED), tmp_path / "parts", head_bits=4, resume=True, **FAST)
    quantize(tiny_model(TIED), tmp_path / "parts", head_bits=3, resume=True, **FAST)
    assert digests(tmp_path / "whole") == digests(tmp_path / "parts")


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_every_method_can_have_a_quantized_head(tiny_model: Tiny, tmp_path: Path, method: str) -> None:
    options = {k: v for k, v in FAST.items() if k not in ("bits", "options")}
    report = quantize(tiny_model(TIED), tmp_path / "out", method=method, bits=4, head_bits=4, **options)
    assert report.matrices[-1].module == "lm_head"
    assert report.matrices[-1].error is not None
    assert formats.check(tmp_path / "out").layouts["lm_head"].codebook_dtype == "universal"


def test_tuning_leaves_them_alone(quantized: Path, tmp_path: Path, tiny_model: Tiny) -> None:
    calib = tmp_path / "text.txt"
    calib.write_text("words of a text that is long enough for a few windows of it. " * 60)
    options: dict[str, Any] = {"calib": str(calib), "samples": 8, "ctx": 32, "steps": 2}
    tune(quantized, tmp_path / "tuned", reference=tiny_model(quantized.name), **options)
    before, after = (CheckpointReader(folder) for folder in (quantized, tmp_path / "tuned"))
    ends = [name for name in before.names() if ".layers." not in name and "norm" not in name]
    assert ends
    assert all(torch.equal(before.read(name), after.read(name)) for name in ends)
    assert torch.isfinite(logits(load(tmp_path / "tuned", dtype=torch.float32)[0])).all()


def test_what_cannot_be_is_refused_before_work_starts(tiny_model: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--head-bits wanted one of 1, 1.5, 2, 2.5, 3, 3.5, 4, 6, got 8"):
        quantize(tiny_model(TIED), tmp_path / "out", head_bits=8, **FAST)
    with pytest.raises(UsageError, match="format vptq has no place"):
        quantize(tiny_model(TIED), tmp_path / "out", head_bits=4, format="vptq", method="vptq", samples=2, ctx=32)
    with pytest.raises(UsageError, match=r"embedding of Gemma3ForCausalLM is a Gemma3TextScaledWordEmbedding"):
        quantize(tiny_model("gemma3"), tmp_path / "out", head_bits=4, **FAST)
    assert not (tmp_path / "out").exists()


def test_two_matrices_are_not_tied(tiny_model: Tiny, tmp_path: Path) -> None:
    quantized = tmp_path / "out"
    quantize(tiny_model(APART), quantized, head_bits=4, **FAST)
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in quantized.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(FormatError, match="quantized, each for itself, but config.json ties them"):
        load(broken, dtype=torch.float32)


def test_other_formats_have_no_place_for_them(quantized: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no place for a quantized embedding or tied head"):
        convert(quantized, tmp_path / "out", to="vptq")
    assert not (tmp_path / "out").exists()


def test_a_tied_hessian_mixes_both_uses() -> None:
    """At share 1 an embedding, at share 0 the head; both terms have the same mean diagonal."""
    x = torch.randn(50, 8)
    hessian = x.T @ x
    assert torch.equal(tied_hessian(hessian, 1.0), torch.eye(8))
    torch.testing.assert_close(tied_hessian(hessian, 0.0), hessian / hessian.diagonal().mean())
    torch.testing.assert_close(tied_hessian(hessian, 0.25).diagonal().mean(), torch.tensor(1.0))


def test_the_package_offers_it() -> None:
    assert "head_bits" in octavo.quantize.__doc__  # type: ignore[operator]
