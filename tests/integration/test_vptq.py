"""VPTQ checkpoints through plain transformers and ``octavo.load``: the published package's files, and GPTQModel's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.quantizers.quantizer_vptq import VptqHfQuantizer

import octavo
from formats.checkpoints import edit_json, write_plain
from formats.tiny_models import MODELS, decoded_model, write_tokenizer
from golden.vptq_layers import pack
from integration.vptq_models import dense_model, same_bits, tensors_of
from octavo import formats
from octavo._core.errors import FormatError, UsageError
from octavo.formats.reader import CheckpointReader
from octavo.integrations.transformers import OctavoQuantizer, load
from octavo.models import quantized
from octavo.nn import VQLinear
from octavo.weight import VQWeight

GOLDEN = Path(__file__).parents[1] / "golden" / "vptq"
NAMES = ("attention_bias", "flat", "partial", "plain", "residual", "shared")


@pytest.fixture(autouse=True)
def chosen_on_purpose(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding at every call is what these tests want."""
    monkeypatch.setenv("OCTAVO_KERNEL", "reference")


@pytest.fixture(autouse=True)
def not_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own quantizer, which wants the vptq package and a GPU, is never made."""
    monkeypatch.setattr(VptqHfQuantizer, "__init__", lambda *_, **__: pytest.fail("transformers' own quantizer"))


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, Tensor]]]:
    """``golden(name)``: a copy of the folder, with a tokenizer, and what the published package makes of it."""
    made: dict[str, tuple[Path, dict[str, Tensor]]] = {}

    def get(name: str) -> tuple[Path, dict[str, Tensor]]:
        if name not in made:
            folder = Path(shutil.copytree(GOLDEN / name / "checkpoint", tmp_path_factory.mktemp("vptq") / name))
            write_tokenizer(folder)
            made[name] = folder, load_file(GOLDEN / name / "expected.safetensors")
        return made[name]

    return get


Golden = Callable[[str], tuple[Path, dict[str, Tensor]]]


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def layers_of(model: Any) -> dict[str, VQLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, VQLinear)}


def matrices_of(expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removesuffix(".weight"): t for name, t in expected.items() if name.endswith(".weight")}


# ------------------------------------------------------------------------------------------------ loading


@pytest.mark.parametrize("name", NAMES)
def test_from_pretrained_has_the_matrices_of_the_published_package(golden: Golden, name: str) -> None:
    folder, expected = golden(name)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert isinstance(model.hf_quantizer, OctavoQuantizer)
    assert not model.training
    layers, matrices = layers_of(model), matrices_of(expected)
    assert layers.keys() == matrices.keys()
    for module, matrix in matrices.items():
        assert torch.equal(layers[module].vq_weight().dequantize(matrix.dtype), matrix), module
    ids, weights = expected["input_ids"], {module: layer.vq_weight() for module, layer in layers.items()}
    # The published package decodes in the stored dtype: with its matrices everything else gives its logits.
    theirs = dense_model(folder, matrices, weights)
    torch.testing.assert_close(logits(theirs, ids), expected["logits_float32"], rtol=1e-5, atol=1e-5)
    ours = dense_model(folder, {module: weight.dequantize() for module, weight in weights.items()}, weights)
    assert torch.equal(logits(model, ids), logits(ours, ids))


@pytest.mark.parametrize("name", NAMES)
def test_load_packed_dense_and_auto_compute_the_same(golden: Golden, name: str) -> None:
    folder, expected = golden(name)
    ids, found = expected["input_ids"], {}
    for decode in ("packed", "dense", "auto"):
        model, tokenizer = load(folder, dtype="float32", decode=decode)
        assert model.octavo_decode == ("packed" if decode == "packed" else "dense")
        kind = VQLinear if decode == "packed" else nn.Linear
        assert all(type(model.get_submodule(module)) is kind for module in matrices_of(expected))
        found[decode] = logits(model, ids)
        assert len(tokenizer) == 256
    assert torch.equal(found["packed"], found["dense"])
    assert torch.equal(found["auto"], found["dense"])


@pytest.mark.parametrize("name", ["plain", "residual"])
def test_in_their_own_dtype_logits_are_close_to_the_published_packages(golden: Golden, name: str) -> None:
    folder, expected = golden(name)
    model, _ = load(folder)
    stored = next(iter(matrices_of(expected).values())).dtype
    assert model.dtype == stored
    worst = (logits(model, expected["input_ids"]).float() - expected["logits"]).norm() / expected["logits"].norm()
    # Rounding of every activation, which the order of operations decides: a few units in the last place.
    assert worst < 16 * torch.finfo(stored).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["residual", "attention_bias", "plain"])
def test_no_dtype_request_casts_codebooks_scales_or_biases(golden: Golden, name: str, dtype: torch.dtype) -> None:
    folder, expected = golden(name)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    loaded = {module: layer.vq_weight() for module, layer in layers_of(model).items()}
    stored = dict(formats.read_weights(folder))
    assert loaded.keys() == stored.keys()
    for module, weight in stored.items():
        assert loaded[module].layout == weight.layout
        assert same_bits(loaded[module].tensors, weight.tensors), module
    assert logits(model, expected["input_ids"]).dtype == dtype
    model.to(torch.float32)
    assert all(
        same_bits(layer.vq_weight().tensors, stored[module].tensors) for module, layer in layers_of(model).items()
    )


def test_a_fresh_process_needs_import_octavo_alone(golden: Golden, tmp_path: Path) -> None:
    """Whichever of the two is imported first."""
    folder, expected = golden("residual")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    running = {}
    for imports in ("import octavo", "import transformers.modeling_utils, octavo"):
        code = (
            f"{imports}\n"
            "import sys\n"
            "from transformers import AutoModelForCausalLM\n"
            f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
            "import torch\n"
            "weight = model.get_submodule('model.layers.1.mlp.down_proj').vq_weight().dequantize(torch.bfloat16)\n"
            f"out = {str(tmp_path / f'{len(running)}.pt')!r}\n"
            "torch.save((weight, type(model.hf_quantizer).__name__, 'vptq' in sys.modules), out)\n"
        )
        # Both at once: nearly all of their time goes into imports.
        running[imports] = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
    for number, (imports, process) in enumerate(running.items()):
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0, f"{imports}: {said}"
        weight, quantizer, theirs = torch.load(tmp_path / f"{number}.pt")
        assert (quantizer, theirs) == ("OctavoQuantizer", False)
        assert torch.equal(weight, expected["model.layers.1.mlp.down_proj.weight"])


def test_tied_heads_are_tied_whether_the_file_has_them_or_not(golden: Golden, tmp_path: Path) -> None:
    folder, expected = golden("flat")
    tensors = tensors_of(folder)
    assert "lm_head.weight" not in tensors
    # As the published package needs it.
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    shutil.copytree(folder, tmp_path / "with", ignore=shutil.ignore_patterns("*.safetensors"))
    write_plain(tmp_path / "with", tensors)
    for place in (folder, tmp_path / "with"):
        model: Any = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert len(layers_of(model)) == len(matrices_of(expected))


# ------------------------------------------------------------------------------------------------ what it becomes


@pytest.mark.parametrize("name", ["residual", "partial", "flat", "attention_bias"])
def test_save_pretrained_writes_octavos_own_format(golden: Golden, tmp_path: Path, name: str) -> None:
    folder, expected = golden(name)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    before = logits(model, expected["input_ids"])
    model.save_pretrained(tmp_path / "own", max_shard_size="20KB")
    config = formats.check(tmp_path / "own")
    assert (config.format, config.method) == ("octavo", "vptq")
    assert config.layouts == quantized.check(folder).layouts
    for (module, weight), (again, same) in zip(
        sorted(formats.read_weights(folder)), sorted(formats.read_weights(tmp_path / "own")), strict=True
    ):
        assert module == again
        assert same_bits(weight.tensors, same.tensors)
    own: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "own")
    assert (own.dtype, own.quantization_method) == (model.dtype, model.quantization_method)
    assert torch.equal(logits(own, expected["input_ids"]), before)


def test_dequantize_gives_an_ordinary_model(golden: Golden, tmp_path: Path) -> None:
    folder, expected = golden("residual")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = logits(model, expected["input_ids"])
    dense = model.dequantize()
    assert not layers_of(dense)
    assert not hasattr(dense.config, "quantization_config")
    assert torch.equal(logits(dense, expected["input_ids"]), before)
    dense.save_pretrained(tmp_path / "dense")
    assert not formats.is_quantized(tmp_path / "dense")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(logits(plain, expected["input_ids"]), before)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_map_is_honoured(golden: Golden, device_map: Any) -> None:
    folder, expected = golden("residual")
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    mapped: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map=device_map)
    assert layers_of(mapped).keys() == layers_of(plain).keys()
    found = logits(mapped, expected["input_ids"].to(mapped.device)).cpu()
    torch.testing.assert_close(found, logits(plain, expected["input_ids"]))


def test_a_model_that_is_partly_on_disk_computes_the_same(golden: Golden, tmp_path: Path) -> None:
    folder, expected = golden("residual")
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    places = {name: "cpu" for name in ("model.embed_tokens", "model.layers.0", "model.rotary_emb", "lm_head")}
    places |= {"model.layers.1": "disk", "model.norm": "cpu"}
    spread: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map=places, offload_folder=tmp_path
    )
    assert torch.equal(logits(spread, expected["input_ids"]), logits(plain, expected["input_ids"]))


def test_models_without_a_folder_are_refused(golden: Golden) -> None:
    folder, _ = golden("plain")
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    config = {"quantization_config": formats.raw_config(folder)}
    quantizer = OctavoQuantizer(octavo_config(config["quantization_config"]), pre_quantized=True)
    with pytest.raises(UsageError, match="loaded from its folder"):
        quantizer._process_model_before_weight_loading(model)


def octavo_config(raw: Any) -> Any:
    from octavo.integrations.transformers import OctavoConfig

    return OctavoConfig(**raw)


# ------------------------------------------------------------------------------------------------ refusing


def damaged(folder: Path, out: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """A copy with changed tensors."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = tensors_of(folder)
    change(tensors)
    write_plain(out, tensors)
    return out


Q = "model.layers.1.self_attn.k_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q}.indices"), rf"lists {Q} as quantized, but no tensor {Q}.indices is there"),
        (lambda t: t.pop(f"{Q}.perm"), rf"tensor {Q}.perm is missing"),
        (lambda t: t[f"{Q}.perm"].fill_(3), rf"{Q}.perm is no permutation"),
        (lambda t: t[f"{Q}.outlier_indices"].fill_(99), r"outlier_indices holds 99, but its codebook has 16"),
        (lambda t: t.update({f"{Q}.centroids.weight": torch.zeros(2, 3)}), rf"{Q}.centroids.weight wanted"),
        (lambda t: t.update({f"{Q}.weight": torch.zeros(3)}), f"{Q}.weight is unknown"),
        (lambda t: t.update({f"{Q}.centroids.bias": torch.zeros(3)}), f"{Q}.centroids.bias is unknown"),
        (lambda t: t.pop("model.norm.weight"), r"1 tensors of the model are missing \(model.norm.weight\)"),
        (lambda t: t[f"{Q}.weight_scale"].fill_(float("inf")), f"{Q}: channel_scale holds"),
    ],
)
def test_damaged_folders_are_refused(
    golden: Golden, tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    folder = damaged(golden("residual")[0], tmp_path / "bad", change)
    for loader in (AutoModelForCausalLM.from_pretrained, load):
        with pytest.raises(FormatError, match=message):
            loader(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 1}, "has no module model.layers.1"),
        ({"intermediate_size": 48}, r"is \(32, 48\) in LlamaForCausalLM, its layout in config.json \(32, 40\)"),
        ({"attention_bias": True}, "has a bias in LlamaForCausalLM, but the checkpoint stores none"),
    ],
)
def test_config_of_another_model_is_refused(
    golden: Golden, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = Path(shutil.copytree(golden("residual")[0], tmp_path / "copy"))
    edit_json(folder / "config.json", lambda config: config.update(change))
    with pytest.raises(FormatError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


# ------------------------------------------------------------------------------------------------ GPTQModel's dialect


@pytest.fixture(scope="module")
def tiny_original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with an intermediate size that does not divide into two groups."""
    folder = tmp_path_factory.mktemp("gptqmodel") / "original"
    torch.manual_seed(0)
    model = MODELS["llama"]()
    config = model.config
    config.intermediate_size = 45
    type(model)(config).eval().to(torch.float16).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


class Written:
    """A folder as GPTQModel writes it, and the matrices in it, worked out on the way."""

    def __init__(self, original: Path, out: Path, **changes: Any) -> None:
        self.settings: dict[str, Any] = {
            "quant_method": "vptq",
            "method": "vptq",
            "format": "vptq",
            "checkpoint_format": "vptq",
            "bits": 2,
            "vector_lens": [-1, 4],
            "num_centroids": [-1, 32],
            "num_res_centroids": [-1, -1],
            "npercent": 0,
            "group_size": -1,
            "group_num": -1,
            "enable_norm": False,
            "norm_dim": 0,
            "enable_perm": False,
            "meta": {"quantizer": ["gptqmodel:7.7.0"]},
        } | changes
        self.bits = np.random.Generator(np.random.PCG64(1))
        self.matrices: dict[str, Tensor] = {}
        model: Any = AutoModelForCausalLM.from_pretrained(original)
        linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
        with CheckpointReader(original) as reader:
            tensors = {n: reader.read(n) for n in reader.names() if n.rpartition(".")[0] not in linear}
        for module, layer in linear.items():
            tensors |= {f"{module}.{n}": t for n, t in self.layer(module, *layer.weight.shape).items()}
        write_plain(out, tensors)
        config = json.loads((original / "config.json").read_text()) | {"quantization_config": self.settings}
        (out / "config.json").write_text(json.dumps(config))
        shutil.copy(original / "tokenizer.json", out)
        shutil.copy(original / "tokenizer_config.json", out)

    def floats(self, *shape: int) -> Tensor:
        return torch.from_numpy(self.bits.uniform(-0.25, 0.25, shape).astype(np.float16))

    def layer(self, module: str, out: int, inp: int) -> dict[str, Tensor]:
        s = self.settings
        (v0, v), (k0, k), (_, kr) = s["vector_lens"], s["num_centroids"], s["num_res_centroids"]
        outliers = int(np.ceil(s["npercent"] / 100 * inp)) if v0 > 0 else 0
        groups = max(s["group_num"], 1)
        if outliers:
            outliers += (inp - outliers) % groups
        columns = -(-(inp - outliers) // groups)
        rows, width = -(-out // v), k.bit_length() - 1
        main = self.bits.integers(0, k, (groups, rows, columns))
        residual = self.bits.integers(0, max(kr, 1), (groups, rows, columns))
        elements = (main | (residual << width)).astype(np.uint64)
        books = self.floats(groups, k, v)
        tensors = {
            "indices": pack(elements, width + (kr.bit_length() - 1 if kr > 0 else 0)),
            "centroids.weight": books.reshape(groups, -1),
        }
        picked = torch.stack([books[g][torch.from_numpy(main[g])] for g in range(groups)])
        if kr > 0:
            residuals = self.floats(groups, kr, v)
            tensors["res_centroids.weight"] = residuals.reshape(groups, -1)
            picked = picked + torch.stack([residuals[g][torch.from_numpy(residual[g])] for g in range(groups)])
        # [groups, rows, columns, v] -> [rows * v, groups * columns]
        whole = picked.permute(1, 3, 0, 2).reshape(rows * v, -1)[:out, : inp - outliers]
        if outliers:
            index = self.bits.integers(0, k0, (1, -(-out // v0), outliers)).astype(np.int32)
            fine = self.floats(1, k0 * v0)
            tensors |= {"outlier_indices": torch.from_numpy(index), "outlier_centroids.weight": fine}
            first = fine.view(k0, v0)[torch.from_numpy(index[0]).long()].transpose(1, 2).reshape(-1, outliers)[:out]
            whole = torch.cat([first, whole], dim=1)
        if s["enable_perm"]:
            order = torch.from_numpy(self.bits.permutation(inp).astype(np.int32))
            tensors["perm"] = order
            whole = whole[:, torch.argsort(order)]
        if s["enable_norm"]:
            size = out if s["norm_dim"] else inp
            scale, offset = self.floats(size) + 1, self.floats(size)
            tensors |= {"weight_scale": scale, "weight_bias": offset}
            across = (slice(None), None) if s["norm_dim"] else (None, slice(None))
            whole = whole * scale[across] + offset[across]
        self.matrices[module] = whole
        return tensors


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"group_num": 2},
        {"num_res_centroids": [-1, 8], "enable_norm": True, "enable_perm": True},
        {"enable_norm": True, "norm_dim": 1},
        {
            "group_num": 2,
            "npercent": 5,
            "vector_lens": [2, 4],
            "num_centroids": [16, 32],
            "num_res_centroids": [-1, 4],
            "enable_perm": True,
        },
    ],
)
def test_gptqmodels_dialect_loads(tiny_original: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = tmp_path / "gptqmodel"
    written = Written(tiny_original, folder, **changes)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layers = layers_of(model)
    assert layers.keys() == written.matrices.keys()
    weights: dict[str, VQWeight] = {}
    for module, matrix in written.matrices.items():
        weights[module] = layers[module].vq_weight()
        assert torch.equal(weights[module].dequantize(torch.float16), matrix), module
    ids = torch.arange(3, 20)[None]
    assert torch.equal(logits(model, ids), logits(decoded_model(tiny_original, weights, torch.float32), ids))
    dense, _ = octavo.load(folder, dtype="float32")
    assert torch.equal(logits(dense, ids), logits(model, ids))
    # The shapes stand in the model's configuration alone.
    assert quantized.check(folder).layouts == {module: layer.layout for module, layer in layers.items()}


def test_gptqmodels_settings_that_do_not_fit_the_files_are_refused(tiny_original: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gptqmodel"
    Written(tiny_original, folder)
    edit_json(folder / "config.json", lambda config: config["quantization_config"].update(group_num=4))
    with pytest.raises(FormatError, match=r"indices wanted torch.int32 \(4, 8, "):
        AutoModelForCausalLM.from_pretrained(folder)
    edit_json(folder / "config.json", lambda config: config["quantization_config"].update(group_size=8))
    with pytest.raises(FormatError, match="group_size 8 and group_num 4 cannot both be set"):
        load(folder)
