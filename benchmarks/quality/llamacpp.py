"""llama.cpp's quantization types with importance matrices, as peers of Octavo on the same model, tokens and reference.

    python benchmarks/quality/llamacpp.py MODEL OUT --type Q2_K --type IQ2_XXS --calib FILES [--samples 32 --ctx 512]

Needs llama-cpp-python. For every type there will be ``OUT/TYPE.gguf``, which llama.cpp wrote, and ``OUT/TYPE/``, the
same weights decoded to an ordinary float32 model (4 bytes per weight of disk) that ``octavo eval`` takes, with
``peer.json``: its true size and what it is made of. A TYPE that is there already is left alone.

The importance matrix is what llama.cpp's own tool computes: for every linear layer of the blocks the mean square of
each input channel, here of the original in float32 over the windows that ``octavo quantize`` takes for the same
--calib, --samples, --ctx and --seed. Embedding and head have none, as there.

What to know before comparing:

- ``--head source`` (default) keeps embedding and head in the type they came in, as Octavo does; ``f16`` in 16 bits;
  ``default`` quantizes them as llama.cpp likes.
- A TYPE is a mixture: llama.cpp gives some matrices more bits. ``--pure`` gives all matrices of the blocks one type.
- The types below 4 bits cut rows into 256 weights. Where the width is no multiple of that llama.cpp falls back to types
  of 4.5 bits and more, so ``peer.json`` counts the bits that were stored, never the ones that the name promises.
- A model that comes out of a GGUF (see ``fetch.py``) lies on the grid of that file's type, which flatters this type and
  its relatives.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Ggml
from torch import Tensor, nn

from octavo._core.errors import FormatError, OctavoError, UsageError, did_you_mean
from octavo._core.io import write_json
from octavo.calibration import capture
from octavo.calibration.data import Tokens, read_text, windows
from octavo.formats import CheckpointReader
from octavo.formats.writer import ShardWriter
from octavo.models import resolve
from octavo.models.adapter import CausalModel
from octavo.models.source import ModelSource

_ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}
_STORED = {torch.float32: Ggml.F32, torch.float16: Ggml.F16, torch.bfloat16: Ggml.BF16}
_FALLBACK = re.compile(
    r"warning: (\S+)\s+- ncols\s+(\d+) not divisible by\s+\d+ \(required for type\s+(\w+)\) .*?falling back to\s+(\w+)"
)


class Names:
    """How a model's tensors are called and laid out in a GGUF file. Raises UsageError for a model it does not know."""

    def __init__(self, source: ModelSource) -> None:
        config = source.config.get_text_config()
        rope = getattr(config, "rope_parameters", None) or {}
        if config.model_type not in _ARCHITECTURES or rope.get("rope_type", "default") != "default":
            raise UsageError(
                f"{source.name}: wanted model_type {' or '.join(_ARCHITECTURES)} with plain rotary positions, got "
                f"{config.model_type} with {rope.get('rope_type', 'default')}; teach this script its GGUF keys first."
            )
        self.arch = _ARCHITECTURES[config.model_type]
        self.config = config
        self.rope_theta = float(rope["rope_theta"])
        self.head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._map = gguf.get_tensor_name_map(self.arch, config.num_hidden_layers)

    def gguf_name(self, name: str) -> str:
        """``model.layers.3.self_attn.q_proj.weight`` -> ``blk.3.attn_q.weight``."""
        found = self._map.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UsageError(f"GGUF has no name for the tensor {name} of the architecture {self.arch.name}.")
        return found

    def stored(self, reader: CheckpointReader) -> dict[str, str]:
        """GGUF name -> checkpoint name of every tensor that belongs into the file; tied heads do not."""
        tied = {"lm_head.weight"} if self.config.tie_word_embeddings else set()
        return {self.gguf_name(name): name for name in reader.names() if name not in tied}

    def reorder(self, gguf_name: str, tensor: Tensor, undo: bool = False) -> Tensor:
        """Rows [heads * d, ..] of q and k in llama.cpp's order, or back.

        Rotary positions turn row i of a head with row i + d/2 in transformers, with its neighbour in llama.cpp's llama.
        """
        if self.arch != gguf.MODEL_ARCH.LLAMA or not re.search(r"\.attn_[qk]\.", gguf_name):
            return tensor
        half = self.head_width // 2
        cut = (-1, half, 2) if undo else (-1, 2, half)
        return tensor.reshape(*cut, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape).contiguous()


def write_gguf(source: ModelSource, names: Names, path: Path) -> Ggml:
    """Write the original as a GGUF: matrices in the type they are stored in, vectors in float32; no vocabulary.

    Returns the type of the embedding.
    """
    config = names.config
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[names.arch])
    heads, width = config.num_attention_heads, names.head_width
    for key, value in {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "head_count": heads,
        "head_count_kv": getattr(config, "num_key_value_heads", None) or heads,
        **dict.fromkeys(("key_length", "value_length", "rope_dimension_count"), width),
        "rope_freq_base": names.rope_theta,
        "layer_norm_rms_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
    }.items():
        getattr(writer, f"add_{key}")(value)
    # Tokens come from transformers; llama.cpp needs to know only how many there are.
    writer.add_tokenizer_model("none")
    kinds: dict[str, Ggml] = {}
    with CheckpointReader(source.folder) as reader:
        stored = names.stored(reader)
        for name, original in stored.items():
            array, kinds[name] = _as_array(reader.read(original))
            writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes, kinds[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, original in stored.items():
            writer.write_tensor_data(_as_array(names.reorder(name, reader.read(original)))[0])
    writer.close()
    return kinds["token_embd.weight"]


def _as_array(tensor: Tensor) -> tuple[np.ndarray, Ggml]:
    """The tensor as GGUF stores it; bfloat16, which numpy lacks, as bytes."""
    kind = Ggml.F32 if tensor.ndim < 2 else _STORED[tensor.dtype]
    if kind == Ggml.BF16:
        return tensor.contiguous().view(torch.uint8).numpy(), kind
    return (tensor.float() if tensor.ndim < 2 else tensor).contiguous().numpy(), kind


def importance(causal: CausalModel, tokens: Tokens) -> dict[str, np.ndarray]:
    """Mean of x^2 per input channel of every linear layer of the blocks, float32 [in], by full module name."""
    inputs = causal.capture_inputs([(ids, None) for ids in tokens.ids.split(max(1, 4096 // tokens.ids.shape[1]))])
    hidden, sums = inputs.hidden, {}
    for index, prefix in enumerate(causal.blocks):
        block = causal.load_block(index)
        for name in causal.targets(index):
            layer = block.get_submodule(name.removeprefix(prefix + "."))
            layer.register_forward_pre_hook(partial(_add_squares, sums, name))
        hidden = capture.forward(block, hidden, [kwargs[index] for kwargs in inputs.kwargs], prefix)
        causal.release_block(index)
    return {name: (total / tokens.ids.numel()).float().numpy() for name, total in sums.items()}


def _add_squares(sums: dict[str, Tensor], name: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
    sums[name] = sums.get(name, 0) + args[0].flatten(0, -2).square().sum(0, dtype=torch.float64)


class LlamaCpp:
    """The library, its messages kept. Raises UsageError if it is not installed."""

    def __init__(self) -> None:
        try:
            import llama_cpp  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise UsageError("llama-cpp-python is not installed: pip install llama-cpp-python") from error
        self.api: Any = llama_cpp
        self.messages: list[str] = []
        # A callback that Python has let go of would crash the library at its next message.
        self._callback = llama_cpp.llama_log_callback(lambda level, text, data: self.messages.append(text.decode()))
        llama_cpp.llama_log_set(self._callback, ctypes.c_void_p(0))

    def file_type(self, name: str) -> int:
        """The number of a type such as IQ2_XXS. Raises UsageError if there is none of that name."""
        prefix = "LLAMA_FTYPE_MOSTLY_"
        known = {n.removeprefix(prefix): getattr(self.api, n) for n in dir(self.api) if n.startswith(prefix)}
        if name not in known:
            raise UsageError(f"llama.cpp has no type {name!r}.{did_you_mean(name, known)} It has {', '.join(known)}.")
        return known[name]

    def quantize(
        self,
        original: Path,
        out: Path,
        kind: str,
        matrix: Mapping[str, np.ndarray],
        *,
        head: Ggml | None = None,
        pure: bool = False,
        threads: int = 1,
    ) -> dict[str, tuple[int, str, str]]:
        """Quantize a GGUF file.

        Args:
            matrix: importance per input channel, float32 [in], by GGUF tensor name; empty for none.
            head: type of embedding and head, or None for llama.cpp's choice.

        Returns:
            Tensors that fell back: name -> (width, type wanted, type got).

        Raises:
            FormatError: llama.cpp refused; with its messages.
        """
        parameters = self.api.llama_model_quantize_default_params()
        parameters.nthread, parameters.pure, parameters.ftype = threads, pure, self.file_type(kind)
        if head is not None:
            parameters.token_embedding_type = parameters.output_tensor_type = int(head)
        # The entry after the last one stays zero: its missing name ends the list.
        entries = (self.api.llama_model_imatrix_data * (len(matrix) + 1))()
        for entry, (name, values) in zip(entries, matrix.items(), strict=False):
            entry.name, entry.size = name.encode(), values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        if matrix:
            parameters.imatrix = entries
        self.messages.clear()
        if self.api.llama_model_quantize(str(original).encode(), str(out).encode(), ctypes.byref(parameters)):
            raise FormatError(f"llama.cpp cannot make {kind} of {original}: {''.join(self.messages)[-300:].strip()}")
        said = "".join(self.messages)
        if missing := re.findall(r"did not find weights for (blk\S+)", said):
            raise FormatError(f"llama.cpp found no importance for {', '.join(missing[:4])}: wrong names.")
        return {name: (int(width), wanted, got) for name, width, wanted, got in _FALLBACK.findall(said)}

    def logits(self, path: Path, ids: Tensor) -> Tensor:
        """Logits [tokens, vocabulary] of llama.cpp itself after each of the tokens int64 [tokens], on one thread."""
        api, count = self.api, len(ids)
        loading, running = api.llama_model_default_params(), api.llama_context_default_params()
        # Kernels for repacked weights use AMX, which kills the process on machines that announce it and lack it.
        loading.use_extra_bufts = False
        running.n_ctx = running.n_batch = running.n_ubatch = count
        running.n_threads = running.n_threads_batch = 1
        # Keys and values in float32: what is left of a difference is how llama.cpp rounds the inputs of matrices.
        running.type_k = running.type_v = int(Ggml.F32)
        model = api.llama_model_load_from_file(str(path).encode(), loading)
        context = api.llama_init_from_model(model, running) if model else None
        if not context:
            raise FormatError(f"llama.cpp cannot load {path}: {''.join(self.messages)[-300:].strip()}")
        given = (ctypes.c_int32 * count)(*ids.tolist())
        batch = api.llama_batch_get_one(given, count)
        batch.logits = (ctypes.c_int8 * count)(*[1] * count)
        if code := api.llama_decode(context, batch):
            raise FormatError(f"llama.cpp cannot run {path}: error {code}")
        shape = (count, api.llama_vocab_n_tokens(api.llama_model_get_vocab(model)))
        result = torch.from_numpy(np.ctypeslib.as_array(api.llama_get_logits(context), shape).copy())
        api.llama_free(context)
        api.llama_model_free(model)
        return result


def decode(path: Path, folder: Path, source: ModelSource, names: Names) -> None:
    """Write the weights of a GGUF file as a float32 Hugging Face model, with the original's config and tokenizer."""
    writer = ShardWriter(folder)
    with CheckpointReader(source.folder) as reader:
        stored = names.stored(reader)
        shapes = {name: reader.info(original)[1] for name, original in stored.items()}
    for tensor in gguf.GGUFReader(path).tensors:
        values = torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        writer.add(stored[tensor.name], names.reorder(tensor.name, values.reshape(shapes[tensor.name]), undo=True))
    writer.finish()
    for file in source.auxiliary_files():
        shutil.copyfile(file, folder / file.name)
    config = json.loads((source.folder / "config.json").read_text("utf-8"))
    config.pop("torch_dtype", None)
    write_json(folder / "config.json", config | {"dtype": "float32"})


def contents(path: Path, matrices: set[str]) -> dict[str, Any]:
    """Sizes and types of what a GGUF file holds; ``matrices`` are the GGUF names of the linear layers of the blocks."""
    tensors = gguf.GGUFReader(path).tensors
    held, shares = Counter[str](), Counter[str]()
    for t in (t for t in tensors if t.name in matrices):
        held.update(bytes=int(t.n_bytes), weights=int(t.n_elements))
        shares[t.tensor_type.name] += int(t.n_elements)
    return {
        "file_bytes": path.stat().st_size,
        "matrix_bytes": held["bytes"],
        "matrix_weights": held["weights"],
        "bits_per_weight": 8 * held["bytes"] / held["weights"],
        "matrix_shares": {kind: count / held["weights"] for kind, count in shares.most_common()},
        "types": {t.name: t.tensor_type.name for t in tensors},
    }


def check(llama: LlamaCpp, path: Path, folder: Path, reference: Path, ids: Tensor) -> dict[str, float]:
    """Does llama.cpp compute with a file what the decoded folder computes, on one window of tokens int64 [tokens]?

    Returns mean KL divergences in nats, ``kl_llamacpp`` (decoded || llama.cpp) and ``kl_original`` (original ||
    decoded). The first is llama.cpp's rounding of the inputs of matrices to 8 bits; below 4 bits the second is
    far larger.
    """
    theirs = llama.logits(path, ids).log_softmax(-1)
    ours = _logits(folder, ids).log_softmax(-1)
    result = {
        "tokens": len(ids),
        "kl_llamacpp": float((ours.exp() * (ours - theirs)).sum(-1).mean()),
        "top1_llamacpp": float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
    }
    del theirs
    original = _logits(reference, ids).log_softmax(-1)
    return result | {"kl_original": float((original.exp() * (original - ours)).sum(-1).mean())}


def _logits(folder: Path, ids: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(ids[None], use_cache=False).logits[0]


def run(arguments: argparse.Namespace) -> None:
    """Everything that the command line asks for. Raises OctavoError; the types that are finished by then stay."""
    llama = LlamaCpp()
    out: Path = arguments.out
    causal = CausalModel(resolve(arguments.model))
    names = Names(causal.source)
    text, limit = read_text(arguments.calib), causal.max_positions
    seed, samples = arguments.seed, arguments.samples
    tokens = windows(causal.tokenizer(), text, arguments.ctx, samples, seed, limit=limit, source=arguments.calib)
    settings = {
        "model": causal.source.name,
        "fingerprint": causal.fingerprint(),
        "calibration": {"samples": samples, "ctx": arguments.ctx, "seed": seed, "sha256": tokens.sha256},
        "head": arguments.head,
        "pure": arguments.pure,
    }
    for kind in (kinds := dict.fromkeys(arguments.type)):
        # A mistyped last one should not show only after hours.
        llama.file_type(kind)
    wanted = [kind for kind in kinds if not _finished(out / kind, settings)]
    if not wanted:
        return
    out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    by_module = importance(causal, tokens)
    matrix = {names.gguf_name(f"{module}.weight"): values for module, values in by_module.items()}
    imatrix_seconds = time.perf_counter() - began
    print(f"importance of {len(matrix)} matrices: {imatrix_seconds:.0f} s", file=sys.stderr)
    original = out / "original.gguf"
    stored = write_gguf(causal.source, names, original)
    head = {"source": stored, "f16": Ggml.F16 if stored == Ggml.F32 else stored, "default": None}[arguments.head]
    for kind in wanted:
        path, partial = out / f"{kind}.gguf", out / f"{kind}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        began = time.perf_counter()
        options = {"head": head, "pure": arguments.pure, "threads": arguments.threads}
        fallbacks = llama.quantize(original, path, kind, matrix, **options)
        seconds = time.perf_counter() - began
        decode(path, partial, causal.source, names)
        peer = {"type": kind, **contents(path, set(matrix)), "settings": settings}
        fell = Counter(f"{old} -> {new} (width {width})" for width, old, new in fallbacks.values())
        peer |= {"fallbacks": dict(fell), "seconds": seconds, "imatrix_seconds": imatrix_seconds}
        peer |= {"threads": arguments.threads, "llama_cpp_python": llama.api.__version__}
        if arguments.verify:
            peer["check"] = check(llama, path, partial, causal.source.folder, tokens.ids[0])
        write_json(partial / "peer.json", peer)
        partial.rename(out / kind)
        print(json.dumps({key: value for key, value in peer.items() if key not in ("types", "settings")}))
    original.unlink()


def _finished(folder: Path, settings: Mapping[str, Any]) -> bool:
    if folder.exists() and json.loads((folder / "peer.json").read_text("utf-8"))["settings"] != settings:
        raise UsageError(f"{folder} was made with other settings, see its peer.json. Choose another OUT.")
    return folder.exists()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", action="append", required=True, help="Q2_K, IQ2_XXS, ..; repeatable")
    parser.add_argument("--calib", required=True, help="as for octavo quantize")
    for option, value in (("samples", 32), ("ctx", 512), ("seed", 0), ("threads", 1)):
        parser.add_argument(f"--{option}", type=int, default=value)
    parser.add_argument(
        "--head", choices=("source", "f16", "default"), default="source", help="type of embedding and head"
    )
    parser.add_argument("--pure", action="store_true", help="one type for all matrices of the blocks")
    parser.add_argument("--verify", action="store_true", help="compare with llama.cpp itself on one window")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        run(arguments)
    except OctavoError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
