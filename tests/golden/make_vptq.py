"""Golden data of the VPTQ checkpoint format, made by the published package vptq 0.0.5.post1 itself.

It wants transformers 4, so it runs in an environment of its own, without Octavo and without a GPU::

    python -m venv peer
    peer/bin/pip install torch==2.13.0 transformers==4.57.6 accelerate==1.15.0 safetensors numpy
    peer/bin/pip install --no-deps vptq==0.0.5.post1
    PYTHONPATH=tests peer/bin/python tests/golden/make_vptq.py layers tests/golden/vptq/layers.json
    PYTHONPATH=tests peer/bin/python tests/golden/make_vptq.py checkpoints tests/golden/vptq
    PYTHONPATH=tests peer/bin/python tests/golden/make_vptq.py check FOLDER DECODED.safetensors

torch must be a build for the CPU: the package takes its CUDA kernels, whose last bits differ, wherever they load, even
for tensors on the CPU. Of its other requirements only sentence-transformers is imported, by the module that packs
indices, for an isinstance; an empty class stands for it.

``layers``: one entry per line, for ``vptq_layers.random_layer``; ``inputs`` and ``weight`` are SHA-256 of the layer's
tensors and of the [out, in] matrix that the package decoded, in the layer's dtype. On the way the package must build
the same words from the same indices, and must have exactly the tensors that the layer has.

``checkpoints``: one folder per entry of ``SETS``, with ``checkpoint`` and ``expected.safetensors``: ``<module>.weight``
of every quantized module as the package decodes it, ``input_ids``, ``logits`` of the package's model in its own dtype
(as float32) and ``logits_float32`` of the same model with the decoded matrices and everything else in float32. All but
``flat`` are loaded by the package's own AutoModelForCausalLM. That form it cannot load any more, since it finds no
layers there; nor does it load tied embeddings unless ``lm_head.weight`` is in the file all the same: it never ties
them. That model is put together by hand from the package's layers, as in ``check`` where the package's loader fails.

Geometries left out because the package itself decodes them wrongly or not at all:

- more residual than main centroids: the residual index is masked with the width of the main index;
- group_size * (index bits) <= 16: it removes (bits of the words) mod (bits of the row) as padding, which is too few;
- codebooks whose size is no power of two;
- layers with a residual that are not packed: it reads an attribute before it sets it;
- norm over the outputs: it has no such option.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from golden.vptq_layers import DTYPES, inputs_sha256, pack, random_layer, sha256, unpack

sys.modules["sentence_transformers"] = types.ModuleType("sentence_transformers")
_stub: Any = types.ModuleType("sentence_transformers.SentenceTransformer")
_stub.SentenceTransformer = type("SentenceTransformer", (), {})
sys.modules[_stub.__name__] = _stub
# Not `import`: the project's own environment, where this file is checked, has no vptq.
vptq, model_base, quant_gemm, vptq_pack = (
    importlib.import_module(f"vptq{name}") for name in ("", ".layers.model_base", ".ops.quant_gemm", ".utils.pack")
)
transformers = importlib.import_module("transformers")

Draw = Callable[[int], int]
VECTOR_LENGTHS = (*range(1, 17), *(2, 4, 6, 8, 10, 12, 16) * 2)
#: (main bits, residual bits, vector length, groups, group size, outliers, (their length, centroids), out features)
SPECIAL = [
    (8, 0, 4, 1, 40_000, 0, (-1, -1), 6),  # a permutation beyond int16
    (16, 8, 8, 1, 2048, 0, (-1, -1), 64),  # the community's v8-k65536-256
    (12, 0, 6, 4, 255, 0, (-1, -1), 100),
    (13, 7, 12, 2, 500, 24, (4, 4096), 130),
    (10, 3, 10, 1, 61, 3, (4, 65536), 33),  # outlier indices beyond int16
    (12, 12, 8, 1, 90, 1, (8, 256), 64),
    (1, 0, 3, 1, 17, 0, (-1, -1), 10),  # the fewest bits of a row
    (16, 1, 2, 2, 1, 1, (2, 2), 9),
    (16, 8, 5, 1, 1, 0, (-1, -1), 64),
    (16, 16, 4, 3, 1, 2, (4, 16), 7),
    (8, 8, 16, 1, 40, 0, (-1, -1), 1),  # fewer outputs than a vector has
    (4, 4, 16, 2, 40, 4, (8, 512), 3),
]


# ------------------------------------------------------------------------------------------------ the package's decoder


def published(layer: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """The package's module for one entry of ``config_for_layers``."""
    return vptq.VQuantLinear(**layer, enable_proxy_error=False, dtype=dtype)


@torch.no_grad()
def decode(module: Any) -> Tensor:
    """The matrix [out, in] that the package's forward multiplies by."""
    taken: list[Tensor] = []

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        taken.append(weight)
        return x[..., :1]

    # Its forward hands the matrix to `linear`; whatever stands before that is thereby run as published.
    with mock.patch.object(quant_gemm, "F", types.SimpleNamespace(linear=linear)):
        module(torch.zeros(1, 3, module.in_features, dtype=module.centroids.weight.dtype))
    return taken[0].contiguous()


def quantized(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The package's layers in a model, by path."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, vptq.VQuantLinear))


# ------------------------------------------------------------------------------------------------ layers


def draws(seed: int) -> Draw:
    """Whole numbers below n, from the raw stream of PCG64."""
    bits = np.random.PCG64(seed)
    return lambda n: int(bits.random_raw()) % n


def layer_entry(
    widths: tuple[int, int],
    vector_length: int,
    groups: tuple[int, int],
    out: int,
    *,
    outliers: int = 0,
    outlier_book: tuple[int, int] = (-1, -1),
    norm: bool = False,
    permuted: bool = False,
    bias: bool | None = False,
) -> dict[str, Any]:
    """An entry of ``config_for_layers``; ``widths``: bits of main and residual index; ``groups``: number and size."""
    return {
        "in_features": outliers + groups[0] * groups[1],
        "out_features": out,
        "vector_lens": [outlier_book[0], vector_length],
        "num_centroids": [outlier_book[1], 1 << widths[0]],
        "num_res_centroids": [-1, 1 << widths[1] if widths[1] else -1],
        "group_num": groups[0],
        "group_size": groups[1],
        "outlier_size": outliers,
        "enable_norm": norm,
        "enable_perm": permuted,
        "is_indice_packed": True,
        "indices_as_float": False,
        "bias": bias,
    }


def random_geometry(below: Draw, widths: tuple[int, int], v: int | None = None) -> dict[str, Any]:
    """A small layer with the given index widths, the rest at random."""
    while v is None or v << widths[0] > 1 << 20:
        v = VECTOR_LENGTHS[below(len(VECTOR_LENGTHS))]
    groups = min((1, 1, 2, 3, 4)[below(5)], (1 << 20) // (v << widths[0]))
    outliers, book = 0, (-1, -1)
    if below(3) == 0:
        outliers, book = 1 + below(8), ((2, 4, 8)[below(3)], 2 << below(12))
    # Rows of 16 bits and less are what the package cannot unpack.
    least, most = 16 // sum(widths) + 1, (96 - outliers) // groups
    columns = least + below(most - least + 1)
    return layer_entry(
        widths,
        v,
        (groups, columns),
        1 + below(64),
        outliers=outliers,
        outlier_book=book,
        norm=below(2) == 0,
        permuted=below(2) == 0,
        bias=below(4) == 0,
    )


def geometries(below: Draw) -> Iterator[dict[str, Any]]:
    """Every pair of index widths that the package reads, every vector length, and the special ones."""
    for main in range(1, 17):
        for residual in range(main + 1):
            yield random_geometry(below, (main, residual))
    for v in VECTOR_LENGTHS:
        for residual in (0, 2 + below(3)):
            yield random_geometry(below, (4 + below(6), residual), v)
    for main, residual, v, groups, columns, outliers, book, out in SPECIAL:
        yield layer_entry(
            (main, residual),
            v,
            (groups, columns),
            out,
            outliers=outliers,
            outlier_book=book,
            norm=below(2) == 0,
            permuted=columns > 32767 or below(2) == 0,
        )


def check_layer(entry: Mapping[str, Any], tensors: Mapping[str, Tensor], module: Any) -> None:
    """The package has the same tensors and packs the same words."""
    have, wanted = ({n: (t.dtype, t.shape) for n, t in d.items()} for d in (tensors, module.state_dict()))
    if have != wanted:
        raise SystemExit(f"{entry}: the package has {wanted}, the layer {have}")
    layer, words = entry["layer"], tensors["indices"]
    main, residual = (
        size.bit_length() - 1 if size > 0 else 0 for size in (module.num_centroids, module.num_res_centroids)
    )
    elements = unpack(words, main + residual, layer["group_size"])
    first, second = (
        torch.from_numpy(part.astype(np.uint16).view(np.int16))
        for part in (elements & np.uint64((1 << main) - 1), elements >> np.uint64(main))
    )
    packed = vptq_pack.pack_index(first, main, second if residual else None, residual)
    if not torch.equal(packed, words):
        raise SystemExit(f"{entry}: the package packs the indices into other words")


def check_packer(below: Draw) -> int:
    """``pack`` and ``unpack`` against whole rows as Python integers; how many were compared."""
    count = 0
    for width in range(1, 33):
        for columns in (1, 2, 31, 32, 33, 1 + below(70)):
            elements = np.array([[below(1 << width) for _ in range(columns)] for _ in range(2)], dtype=np.uint64)
            words = pack(elements, width)
            assert np.array_equal(unpack(words, width, columns), elements)
            for row, got in zip(elements.tolist(), words, strict=True):
                number = sum(element << (j * width) for j, element in enumerate(row))
                assert got.numpy().tobytes() == number.to_bytes(-(-columns * width // 32) * 4, "little")
                count += 1
    return count


def make_layers(path: Path) -> None:
    """Decode random layers with the package and write what came out."""
    start, below = time.perf_counter(), draws(0)
    print(f"packer: {check_packer(draws(1))} rows as by Python's integers")
    lines = []
    for seed, layer in enumerate(geometries(below)):
        exponent = (0, 0, 0, -12, 6)[below(5)]
        entry = {"seed": seed, "dtype": tuple(DTYPES)[seed % 2], "exponent": exponent, "layer": layer}
        tensors, module = random_layer(entry), published(layer, DTYPES[entry["dtype"]])
        check_layer(entry, tensors, module)
        module.load_state_dict(tensors)
        weight = decode(module)
        assert weight.shape == (layer["out_features"], layer["in_features"]) and weight.isfinite().all()
        lines.append(json.dumps({**entry, "inputs": inputs_sha256(tensors), "weight": sha256(weight)}))
    path.parent.mkdir(parents=True, exist_ok=True)
    made_by = json.dumps(f"vptq {vptq.__version__}, torch {torch.__version__}")
    path.write_text(f'{{"made_by": {made_by},\n"layers": [\n' + ",\n".join(lines) + "\n]}\n")
    print(f"{len(lines)} layers, {path.stat().st_size} bytes, {time.perf_counter() - start:.1f} s")


# ------------------------------------------------------------------------------------------------ checkpoints

HIDDEN, INTERMEDIATE, KEYS, BLOCKS, VOCABULARY = 32, 40, 16, 2, 64
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
#: Name in a block -> (out, in).
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
#: ``form`` of the quantization_config; ``layer``: of all quantized layers; ``but``: by the name in a block.
SETS: dict[str, dict[str, Any]] = {
    "plain": {"dtype": "float16", "form": "layers", "layer": {"widths": (6, 0), "v": 8}},
    "residual": {
        "dtype": "bfloat16",
        "form": "layers",
        "layer": {
            "widths": (5, 4),
            "v": 6,
            "groups": 2,
            "outliers": 4,
            "outlier_book": (4, 16),
            "norm": True,
            "permuted": True,
        },
    },
    "shared": {
        "dtype": "float16",
        "form": "shared",
        "layer": {"widths": (5, 3), "v": 4, "norm": True, "permuted": True},
        "but": {"mlp.down_proj": {"widths": (8, 0), "v": 2}},
    },
    "flat": {
        "dtype": "bfloat16",
        "form": "flat",
        "tied": True,
        "layer": {"widths": (5, 0), "v": 12, "norm": True, "bias": None},
    },
    "partial": {
        "dtype": "float16",
        "form": "layers",
        "dense": ["lm_head", *(f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down"))],
        "shards": "24KB",
        "layer": {"widths": (7, 2), "v": 10, "permuted": True},
    },
    "attention_bias": {
        "dtype": "bfloat16",
        "form": "layers",
        "layer": {"widths": (4, 4), "v": 16, "groups": 2, "bias": True, "norm": True},
        "but": {
            name: {"widths": (5, 0), "v": 4, "groups": 4, "bias": False} for name in SHAPES if name.startswith("mlp")
        },
    },
}
INPUT_IDS = torch.tensor([[0, 17, 42, 63, 3, 3, 60, 8, 1, 31, 7, 24]])


def set_layers(chosen: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The entries of a set's quantized layers, by path."""
    layers = {}
    for block in range(BLOCKS):
        for name, (out, inp) in SHAPES.items():
            path = f"model.layers.{block}.{name}"
            if path in chosen.get("dense", ()):
                continue
            options = {**chosen["layer"], **chosen.get("but", {}).get(name, {})}
            widths, v, groups = options.pop("widths"), options.pop("v"), options.pop("groups", 1)
            columns = (inp - options.get("outliers", 0)) // groups
            layers[path] = layer_entry(widths, v, (groups, columns), out, **options)
    return layers


def quantization_config(chosen: Mapping[str, Any], layers: Mapping[str, Any]) -> dict[str, Any]:
    """The set's ``quantization_config``."""
    if chosen["form"] == "flat":
        return {"quant_method": "vptq", **layers}
    if chosen["form"] == "shared":
        shared = {path.rpartition(".")[2]: layer for path, layer in layers.items()}
        return {"quant_method": "vptq", "shared_layer_config": shared}
    config = {"quant_method": "vptq", "config_for_layers": dict(layers)}
    return {**config, "modules_to_not_convert": chosen["dense"]} if "dense" in chosen else config


@torch.no_grad()
def make_checkpoint(folder: Path, chosen: Mapping[str, Any], seed: int) -> None:
    """Write a model with random layers of the package the way its users have them."""
    dtype, layers = DTYPES[chosen["dtype"]], set_layers(chosen)
    options = {"tie_word_embeddings": chosen.get("tied", False), "attention_bias": chosen["layer"].get("bias") is True}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, **options))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.3 * noise)
    model.to(dtype)
    model_base.make_quant_linear(model, layers, {}, target_layer=vptq.VQuantLinear)
    for index, (path, module) in enumerate(quantized(model)):
        entry = {"seed": 1000 * seed + index, "dtype": chosen["dtype"], "exponent": -1, "layer": layers[path]}
        module.load_state_dict(random_layer(entry))
    model.config.quantization_config = quantization_config(chosen, layers)
    model.save_pretrained(folder, max_shard_size=chosen.get("shards", "5GB"))
    if chosen is not SETS["plain"]:
        # The key's name at the time from which the public checkpoints are.
        config = json.loads((folder / "config.json").read_text())
        config["torch_dtype"] = config.pop("dtype")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


# ------------------------------------------------------------------------------------------------ folders


def load(folder: Path) -> tuple[Any, str]:
    """The model of a folder on the CPU, and who loaded it."""
    try:
        model = vptq.AutoModelForCausalLM.from_pretrained(str(folder), device_map="auto")
        if any(quantized(model)) and not any(p.is_meta for p in model.parameters()):
            return model, "the package's loader"
        why = "it left weights unset"
    except Exception as error:  # whatever the reason, the layers themselves may still be decoded
        why = f"{type(error).__name__}: {error}"
    print(f"{folder}: the package's loader failed ({why.splitlines()[0]})")
    return build(folder), "its layers, put together by hand"


def build(folder: Path) -> Any:
    """The model of a folder, from its configuration and the package's layers, without the package's loader."""
    config = transformers.AutoConfig.from_pretrained(folder)
    settings = config.quantization_config
    flat = {name: layer for name, layer in settings.items() if isinstance(layer, dict) and "vector_lens" in layer}
    model = transformers.AutoModelForCausalLM.from_config(config, torch_dtype=config.torch_dtype)
    shared = settings.get("shared_layer_config", {})
    model_base.make_quant_linear(model, settings.get("config_for_layers", flat), shared, vptq.VQuantLinear)
    stored = {
        name: tensor for file in sorted(folder.glob("model*.safetensors")) for name, tensor in load_file(file).items()
    }
    missing, unexpected = model.load_state_dict(stored, strict=False)
    if unexpected or set(missing) - ({"lm_head.weight"} if config.tie_word_embeddings else set()):
        raise SystemExit(f"{folder}: missing {missing}, unexpected {unexpected}")
    return model.eval()


@torch.no_grad()
def write_expected(folder: Path, path: Path) -> None:
    """Decode a folder and run its model, with the package."""
    model, how = load(folder)
    decoded = {f"{name}.weight": decode(module) for name, module in quantized(model)}
    plain = transformers.AutoModelForCausalLM.from_config(model.config, torch_dtype=torch.float32).eval()
    state = {name: tensor for name, tensor in {**model.state_dict(), **decoded}.items() if name in plain.state_dict()}
    plain.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    logits, exact = model(INPUT_IDS).logits.float(), plain(INPUT_IDS).logits
    assert logits.isfinite().all() and exact.isfinite().all()
    save_file({**decoded, "input_ids": INPUT_IDS, "logits": logits, "logits_float32": exact}, path)
    worst = ((logits - exact).norm() / exact.norm()).item()
    print(f"{folder}: {len(decoded)} layers, by {how}; logits {worst:.1e} apart from float32")


def make_checkpoints(root: Path) -> None:
    """Write every set."""
    for seed, (name, chosen) in enumerate(SETS.items(), start=1):
        folder = root / name
        if folder.exists():
            raise SystemExit(f"{folder} exists; it stands for files that people have. Remove it first to make it anew.")
        make_checkpoint(folder / "checkpoint", chosen, seed)
        write_expected(folder / "checkpoint", folder / "expected.safetensors")
        for file in folder.rglob("*.*"):
            file.chmod(0o644)


def check(folder: Path, decoded: Path) -> int:
    """Compare a folder, as the package decodes it, with ``<module>.weight`` of a file; 1 if a bit differs."""
    model, how = load(folder)
    wanted, bad = load_file(decoded), 0
    modules = dict(quantized(model))
    for path in sorted({*(f"{path}.weight" for path in modules), *(n for n in wanted if n.endswith(".weight"))}):
        module, other = modules.get(path.removesuffix(".weight")), wanted.get(path)
        if module is None or other is None:
            problem = f"only in {decoded if module is None else folder}"
        elif (weight := decode(module)).shape != other.shape or weight.dtype != other.dtype:
            problem = f"the package has {weight.dtype} {[*weight.shape]}, the file {other.dtype} {[*other.shape]}"
        else:
            differ = (weight.view(torch.int16) != other.contiguous().view(torch.int16)).sum().item()
            problem = f"{differ} of {weight.numel()} numbers differ" if differ else ""
        if problem:
            bad += 1
            print(f"{path}: {problem}")
    print(f"{len(modules)} layers by {how}, {bad} differences")
    if not modules:
        return 1
    if "rope_parameters" in json.loads((folder / "config.json").read_text()):
        print("the configuration has rope_parameters, which transformers 4 does not read: logits may be those of 10000")
    with torch.no_grad():
        logits = model(torch.arange(1, 9)[None]).logits.float()
    print(f"logits sha256 {sha256(logits)}, next token {logits[0, -1].argmax().item()}")
    return 1 if bad else 0


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("layers").add_argument("path", type=Path)
    commands.add_parser("checkpoints").add_argument("root", type=Path)
    checker = commands.add_parser("check")
    checker.add_argument("folder", type=Path)
    checker.add_argument("decoded", type=Path)
    arguments = parser.parse_args()
    if vptq.__version__ != "0.0.5.post1" or getattr(quant_gemm, "__cuda_ops_installed"):
        raise SystemExit(f"wanted vptq 0.0.5.post1 without CUDA kernels, got {vptq.__version__}; see this file's head")
    if arguments.command == "layers":
        make_layers(arguments.path)
    elif arguments.command == "checkpoints":
        make_checkpoints(arguments.root)
    else:
        return check(arguments.folder, arguments.decoded)
    return 0


if __name__ == "__main__":
    sys.exit(main())
