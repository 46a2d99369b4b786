"""Heads of several parts - rows of two classes, codewords, both - in files, transformers and the native decoder."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from faults.jobs import digests, make_quick, stop_after
from octavo import formats
from octavo._core import clib
from octavo._core.errors import FormatError, Interrupted, UsageError
from octavo.formats.reader import CheckpointReader
from octavo.heads import VQHead, set_candidates
from octavo.integrations.transformers import load
from octavo.kernels import select
from octavo.math.pack import unpack
from octavo.nn import TiedEmbedding, VQEmbedding
from octavo.pipeline import plan
from octavo.pipeline.convert import convert
from octavo.pipeline.run import quantize
from octavo.pipeline.tune import tune
from octavo.runtime.decoder import NativeDecoder, why_not
from oracle import logits as oracle

Tiny = Callable[[str], Path]
TIED, APART = "llama", "qwen2"
FAST: dict[str, Any] = {"bits": 3.3, "samples": 3, "ctx": 32, "guided": "none", "options": {"beam": 4, "sweeps": 0}}
HEADS: dict[str, dict[str, Any]] = {
    "classes": {"head_bits": 4, "head_settings": {"classes": True}},
    "codes": {"head": "vq-logits", "head_codes": 24, "head_settings": {"steps": 2}},
    "both": {
        "head": "vq",
        "head_bits": 3,
        "head_codes": 24,
        "head_settings": {"classes": True, "steps": 1, "start": "frequency"},
    },
    "whole": {"head_bits": 2, "head_codes": 24, "head_settings": {"steps": 0, "start": "random"}},
}
IDS = torch.arange(3, 43).reshape(2, 20)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)
    monkeypatch.delenv(select.ENVIRONMENT, raising=False)


@pytest.fixture(scope="module", params=[(TIED, kind) for kind in HEADS] + [(APART, "classes"), (APART, "codes")])
def made(request: pytest.FixtureRequest, tiny_model: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    family, kind = request.param
    out = tmp_path_factory.mktemp("parts") / "out"
    quantize(tiny_model(family), out, **HEADS[kind], **FAST)
    return family, (kind, out)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits.float()


def close(found: torch.Tensor, wanted: torch.Tensor, share: float = 1e-2) -> bool:
    return float((found - wanted).abs().max()) < share * float(wanted.abs().max())


def test_what_is_stored_is_what_runs(made: tuple[str, Any], tmp_path: Path) -> None:
    """Packed, decoded, saved again, copied and in bfloat16; the plan knew its size."""
    family, (kind, folder) = made
    config = formats.check(folder)
    assert config.head is not None
    assert {"classes": 2, "both": 2, "codes": 0, "whole": 1}[kind] == len(config.head.parts)
    assert config.head.codes == HEADS[kind].get("head_codes", 0)
    model = load(folder, dtype=torch.float32, decode="packed")[0]
    head = model.get_output_embeddings()
    assert isinstance(head, VQHead)
    dense = load(folder, dtype=torch.float32, decode="dense")[0]
    wanted = logits(dense)
    assert close(logits(model), wanted)
    assert torch.equal(dense.lm_head.weight, head.dequantize())
    embedding = model.get_input_embeddings()
    if kind == "codes":
        assert type(embedding) is torch.nn.Embedding
    else:
        assert isinstance(embedding, TiedEmbedding if family == TIED else VQEmbedding)
    assert torch.equal(embedding(IDS), dense.get_input_embeddings()(IDS))
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    twin = twin.to(torch.bfloat16)
    assert all(twin.lm_head.get_buffer(k).dtype == dtype for k, (dtype, _) in config.head.tensors().items())
    assert close(logits(twin), wanted, 0.1)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    assert torch.equal(logits(again), logits(model))


def test_tokens_of_a_codeword_tie(made: tuple[str, Any]) -> None:
    _, (kind, folder) = made
    if kind != "codes":
        return
    model = load(folder, dtype=torch.float32, decode="packed")[0]
    found, codes = logits(model), model.lm_head.token_codes
    for code in codes.unique():
        mine = found[..., codes == code]
        assert torch.equal(mine, mine[..., :1].expand_as(mine))


def test_candidates_have_their_rows_logits_and_others_their_codewords(made: tuple[str, Any]) -> None:
    """One by one and many at a time; as many candidates as tokens are no candidates."""
    _, (kind, folder) = made
    model = load(folder, dtype=torch.float32, decode="packed")[0]
    if kind not in ("both", "whole"):
        with pytest.raises(UsageError, match="candidates need a head with codewords"):
            set_candidates(model, 8)
        return
    head = model.lm_head
    states = torch.randn(9, head.in_features, generator=torch.Generator().manual_seed(0))
    exact, coarse = head(states), head.code_logits(states)
    assert torch.equal(exact, head(states))
    set_candidates(model, 10)
    for states_now in (states, states[:2]):
        for found, full, scores in zip(head(states_now), exact, coarse, strict=False):
            order = scores.argsort(descending=True)
            taken, count = set(), 0
            for code in order.tolist():
                if count >= 10:
                    break
                taken.add(code)
                count += int((head.token_codes == code).sum())
            inside = torch.tensor([code in taken for code in head.token_codes.tolist()])
            assert count <= int(inside.sum()) and 10 <= int(inside.sum()) < head.out_features
            torch.testing.assert_close(found[inside], full[inside], rtol=2e-2, atol=2e-2)
            torch.testing.assert_close(found[~inside], scores[head.token_codes[~inside]])
    set_candidates(model, head.out_features)
    assert torch.equal(head(states), exact)


def test_the_certified_top_tokens_are_those_of_all_rows(made: tuple[str, Any]) -> None:
    _, (kind, folder) = made
    head = load(folder, dtype=torch.float32, decode="packed")[0].lm_head
    state = torch.randn(head.in_features, generator=torch.Generator().manual_seed(1))
    if kind not in ("both", "whole"):
        with pytest.raises(UsageError, match="top_tokens wants codewords, rows"):
            head.top_tokens(state, 3)
        return
    logits = (head.dequantize().double() @ state.double()).numpy()
    for k in (1, 5, head.out_features):
        tokens, values, scored = head.top_tokens(state, k)
        assert tokens.tolist() == oracle.top(logits, k)
        np.testing.assert_allclose(values.numpy(), logits[tokens.numpy()], rtol=1e-3, atol=1e-4)
        assert k <= scored <= head.out_features
    with pytest.raises(UsageError, match="got k = 0"):
        head.top_tokens(state, 0)


@pytest.mark.skipif(clib.library() is None, reason=f"no C++ library: {clib.why_missing()}")
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_torchs_default_dtype_is_of_no_account(made: tuple[str, Any], default: torch.dtype) -> None:
    kind, folder = made[1]
    model = load(folder, dtype=torch.float32, decode="packed")[0]
    set_candidates(model, 10 if kind in ("both", "whole") else 0)
    decoder, tokens = NativeDecoder(model, 32, threads=2), IDS[0, :3]
    wanted = decoder.run(tokens)
    torch.set_default_dtype(default)
    try:
        decoder.length = 0
        found = decoder.run(tokens)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32 and torch.equal(found, wanted)


@pytest.mark.skipif(clib.library() is None, reason=f"no C++ library: {clib.why_missing()}")
def test_the_native_decoder_runs_them(made: tuple[str, Any]) -> None:
    _, (kind, folder) = made
    model = load(folder, dtype=torch.float32, decode="packed")[0]
    assert not why_not(model)
    set_candidates(model, 10 if kind in ("both", "whole") else 0)
    wanted = logits(model)[0]
    decoder = NativeDecoder(model, 32, threads=2)
    assert decoder.bytes_per_token > 0
    for i, token in enumerate(IDS[0]):
        assert close(decoder.run(token.reshape(1)), wanted[i], 3e-2)


def test_a_graph_computes_what_they_do_and_an_export_holds_their_tensors(made: tuple[str, Any]) -> None:
    _, (kind, folder) = made
    model = load(folder, dtype=torch.float32, decode="packed")[0]
    set_candidates(model, 10 if kind in ("both", "whole") else 0)
    with torch.no_grad():
        wanted = logits(model)
        graph = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.equal(graph(IDS).logits, wanted)
        head, states = model.get_output_embeddings(), torch.randn(3, model.config.hidden_size)
        program = torch.export.export(head, (states,))
        torch.testing.assert_close(program.module()(states), states @ head.dequantize().T)
        assert "octavo" not in str(program.graph)


def test_gradients_pass_after_inference_mode(made: tuple[str, Any]) -> None:
    model = load(made[1][1], dtype=torch.float32, decode="packed")[0]
    head, states = model.get_output_embeddings(), torch.randn(2, model.config.hidden_size)
    with torch.inference_mode():
        head(states)
    head(states.requires_grad_()).square().sum().backward()
    assert states.grad is not None and bool(states.grad.isfinite().all())


def test_a_tied_matrix_may_be_stored_under_the_name_of_the_head(tiny_model: Tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model(TIED), tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    quantize(folder, tmp_path / "out", **HEADS["codes"], **FAST)
    assert bool(logits(load(tmp_path / "out", dtype=torch.float32, decode="packed")[0]).isfinite().all())


def test_the_frequent_rows_are_those_of_the_classes(made: tuple[str, Any], tiny_model: Tiny) -> None:
    family, (kind, folder) = made
    if kind != "classes":
        return
    config, reader = formats.check(folder), CheckpointReader(folder)
    head = load(folder, dtype=torch.float32, decode="packed")[0].lm_head
    frequent = unpack(reader.read("lm_head.classes"), 1, head.out_features)[0].bool()
    assert int(frequent.sum()) == config.layouts["lm_head.frequent"].shape[0]
    original = AutoModelForCausalLM.from_pretrained(tiny_model(family), dtype=torch.float32).lm_head.weight.detach()
    lost = (head.dequantize() - original).square().sum(1) / original.square().sum(1)
    # 6 bits against 3; codes are chosen by what logits lose, not by this.
    assert float(lost[frequent].mean()) < 0.3 * float(lost[~frequent].mean())


def test_the_plan_is_what_comes_out(made: tuple[str, Any], tiny_model: Tiny) -> None:
    family, (kind, folder) = made
    planned = plan(tiny_model(family), **HEADS[kind], **{k: v for k, v in FAST.items() if k != "samples"})
    config, reader = formats.check(folder), CheckpointReader(folder)
    assert {m.module: m.layout for m in planned.matrices} == dict(config.layouts)
    assert planned.head == config.head
    assert planned.file_bytes == sum(reader.bytes(name) for name in reader.names())
    assert planned.bits_per_weight == pytest.approx(config.bits_per_weight)


def test_a_stopped_job_goes_on_to_the_same_bytes_and_a_size_is_kept(tiny_model: Tiny, tmp_path: Path) -> None:
    options = {**HEADS["both"], **{k: v for k, v in FAST.items() if k != "bits"}, "size": 70_000}
    report = quantize(tiny_model(TIED), tmp_path / "whole", **options)
    assert 0.85 * 70_000 < report.file_bytes <= 70_000
    with pytest.raises(Interrupted):
        quantize(tiny_model(TIED), tmp_path / "parts", stop=stop_after(2), **options)
    with pytest.raises(UsageError, match="head"):
        quantize(tiny_model(TIED), tmp_path / "parts", resume=True, **{**options, "head_codes": 25})
    quantize(tiny_model(TIED), tmp_path / "parts", resume=True, **options)
    assert digests(tmp_path / "whole") == digests(tmp_path / "parts")


def test_tuning_and_conversion_carry_them_on(made: tuple[str, Any], tmp_path: Path, tiny_model: Tiny) -> None:
    family, (_, folder) = made
    calib = tmp_path / "text.txt"
    calib.write_text("words of a text that is long enough for a few windows of it. " * 60)
    options: dict[str, Any] = {"calib": str(calib), "samples": 8, "ctx": 32, "steps": 1}
    tune(folder, tmp_path / "tuned", reference=tiny_model(family), **options)
    convert(folder, tmp_path / "same", to="octavo")
    before = CheckpointReader(folder)
    ends = [name for name in before.names() if ".layers." not in name and "norm" not in name]
    for copied in (tmp_path / "tuned", tmp_path / "same"):
        after = CheckpointReader(copied)
        assert all(torch.equal(before.read(name), after.read(name)) for name in ends)
        assert formats.check(copied).head == formats.check(folder).head
    with pytest.raises(UsageError, match="no place for a quantized embedding or tied head"):
        convert(folder, tmp_path / "out", to="vptq")


def test_what_does_not_fit_is_refused(made: tuple[str, Any], tmp_path: Path) -> None:
    _, (_, folder) = made
    raw = copy.deepcopy(formats.raw_config(folder))
    assert raw is not None
    for key, value, message in (
        ("module", "model.norm", "parts|wants a head"),
        ("tokens", 7, "codewords|parts|wants a head|wanted torch"),
        ("parts", ["rare"], "which cannot be"),
        ("codes", -1, "which cannot be"),
    ):
        with pytest.raises(FormatError, match=message):
            broken = {**raw, "head": {**raw["head"], key: value}}
            formats.check(folder, broken)
            load_with(folder, broken, tmp_path / f"{key}")
    with pytest.raises(FormatError, match="head wanted an object"):
        formats.check(folder, {**raw, "head": {"module": "lm_head"}})


def load_with(folder: Path, raw: dict[str, Any], to: Path) -> None:
    to.mkdir()
    for file in folder.iterdir():
        if file.name != formats.MANIFEST_FILE:
            (to / file.name).write_bytes(file.read_bytes())
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | {"quantization_config": raw}))
    load(to, dtype=torch.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "vq"}, "--head vq wants --head-bits"),
        ({"head": "vq-logits", "head_bits": 4}, "has codewords and no rows"),
        ({"head_codes": 8}, "--head-codes and --head-set want"),
        ({"head": "vq-logits", "head_codes": 10_000}, "fewer than the"),
        ({"head_bits": 4, "head_settings": {"steps": 3}}, "is an option of codewords"),
        ({"head": "vq-logits", "head_settings": {"start": "zipf"}}, "start wanted kmeans, frequency, random"),
        ({"head": "softmax"}, "--head wanted vq or vq-logits"),
        ({"head_bits": 6, "head_settings": {"classes": True}}, "classes=true wants --head-bits of"),
        ({"head": "vq-logits", "head_settings": {"classes": True}}, "classes=true wants --head-bits of"),
        ({"head": "vq-logits", "head_codes": 8, "head_settings": {"codes": 9}}, "are the same; give one"),
    ],
)
def test_options_that_contradict_each_other(
    tiny_model: Tiny, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        quantize(tiny_model(TIED), tmp_path / "out", **options, **FAST)
