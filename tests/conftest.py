"""Tiny models and a tiny tokenizer, built locally and deterministically; no test needs a network."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

# Before transformers is imported: a test that would reach for the hub fails at once instead of waiting for it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

# Triton decides when it is imported whether kernels are interpreted; with a GPU they run there.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _no_shipped_programs(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a checkout, whether or not a release was built in it."""
    monkeypatch.setattr("octavo.kernels._shipped.FOLDER", tmp_path_factory.getbasetemp() / "no-cubins")


VOCABULARY = 320
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "initializer_range": 0.08,
}
_GEMMA: dict[str, Any] = {**_COMMON, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16}
#: Name -> (configuration class, its arguments, saved dtype, tokenizer puts BOS first, maximal shard size).
_MODELS: dict[str, tuple[str, dict[str, Any], str, bool, str]] = {
    "llama": ("LlamaConfig", {**_COMMON, "tie_word_embeddings": True}, "float32", True, "5GB"),
    "qwen2": ("Qwen2Config", _COMMON, "bfloat16", False, "100KB"),
    "qwen3": ("Qwen3Config", {**_COMMON, "head_dim": 16}, "float32", False, "5GB"),
    "mistral": ("MistralConfig", {**_COMMON, "sliding_window": 16}, "float32", True, "5GB"),
    "phi3": ("Phi3Config", _COMMON, "float32", True, "5GB"),
    "gemma2": ("Gemma2Config", {**_GEMMA, "final_logit_softcapping": 5.0}, "float32", True, "5GB"),
    "gemma3": (
        "Gemma3TextConfig",
        {
            **_GEMMA,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
        "float32",
        True,
        "5GB",
    ),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 256,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "initializer_range": 0.08,
        },
        "float32",
        False,
        "5GB",
    ),
}
TINY_MODELS = tuple(_MODELS)


_WORDS = ("river", "stone", "light", "winter", "garden", "letter", "seven", "morning", "quiet", "market", "green")


def make_text(words: int = 6000, seed: int = 0) -> str:
    """Deterministic text with sentences and paragraphs over a small vocabulary; each word depends on the one before."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(0, 4, (words,), generator=generator).tolist()
    ends = torch.rand(words, generator=generator).tolist()
    pieces: list[str] = []
    position, capital = 0, True
    for step, end in zip(steps, ends, strict=True):
        position = (3 * position + step) % len(_WORDS)
        word = _WORDS[position]
        mark = ".\n\n" if end < 0.02 else ". " if end < 0.12 else " "
        pieces.append((word.capitalize() if capital else word) + mark)
        capital = mark != " "
    return "".join(pieces).strip()


def make_tokenizer(add_bos: bool) -> Any:
    """A byte-level BPE tokenizer of VOCABULARY entries; ``add_bos`` makes it put <s> before every text by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    core.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([make_text(1500)], trainer)
    if add_bos:
        core.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=256
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(name: str, folder: Path) -> Path:
    """Save the tiny model ``name`` (one of TINY_MODELS) with its tokenizer to ``folder``."""
    import transformers

    config_class, arguments, dtype, add_bos, shard = _MODELS[name]
    config = getattr(transformers, config_class)(**arguments)
    torch.manual_seed(sum(name.encode()))
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Fresh biases are 0 and fresh norms 1, which would hide a bias or norm that gets lost.
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)
    make_tokenizer(add_bos).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # Tiny products are faster without threads, and xdist runs several workers.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _exact_calibration() -> Iterator[None]:
    """The same numbers whether or not a processor multiplies bfloat16 fast; test_products.py has the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("octavo.calibration.products.fast_bfloat16", lambda: False)
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``tiny_model(name)``: folder of a tiny model, built once per session. Do not write into it."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = make_model(name, tmp_path_factory.mktemp("models") / f"tiny-{name}")
        return made[name]

    return get


@pytest.fixture(scope="session")
def tiny_llama(tiny_model: Callable[[str], Path]) -> Path:
    """Llama with a tied head."""
    return tiny_model("llama")


@pytest.fixture(scope="session")
def tiny_qwen2(tiny_model: Callable[[str], Path]) -> Path:
    """Qwen2 with q/k/v biases and an untied head, in bfloat16 and several shards."""
    return tiny_model("qwen2")


@pytest.fixture(scope="session")
def tiny_gemma3(tiny_model: Callable[[str], Path]) -> Path:
    """Gemma 3 (text): two sliding-window blocks and a full one, q/k norms, scaled and tied embeddings."""
    return tiny_model("gemma3")


@pytest.fixture(scope="session")
def tiny_mistral(tiny_model: Callable[[str], Path]) -> Path:
    """Mistral with a sliding window."""
    return tiny_model("mistral")


@pytest.fixture(scope="session")
def tiny_gpt2(tiny_model: Callable[[str], Path]) -> Path:
    """GPT-2: transposed Conv1D layers with biases, learned positions, tied head."""
    return tiny_model("gpt2")


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """The tiny tokenizer that puts <s> first."""
    return make_tokenizer(add_bos=True)


@pytest.fixture(scope="session")
def tiny_text() -> str:
    """About 6,000 words of deterministic text."""
    return make_text()


@pytest.fixture(scope="session")
def tiny_text_file(tmp_path_factory: pytest.TempPathFactory, tiny_text: str) -> Path:
    """The same as a file."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(tiny_text, encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------ VPTQ folders
# Modules of other folders are imported where they are used: they import this one.


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``wide(dtype, tied)``: a saved Llama with more than 256 inputs everywhere; made once."""

    from integration.vptq_models import make_wide

    @cache
    def get(dtype: str = "bfloat16", tied: bool = True) -> Path:
        return make_wide(tmp_path_factory.mktemp("wide") / f"{dtype}-{tied}", dtype, tied=tied)

    return get


@pytest.fixture(scope="session")
def vptq_folder(wide: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as other people have it, with every kind of layer, in several shards."""
    from integration.vptq_models import write_vptq

    out = tmp_path_factory.mktemp("random") / "theirs"
    write_vptq(wide(), out, max_shard_bytes=150_000)
    assert len(list(out.glob("*.safetensors"))) > 2
    return out


@pytest.fixture(scope="session")
def made(
    wide: Callable[..., Path], tiny_text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Any]:
    """``made(dtype, format)``: folder and report of a quantized model; made once."""

    from faults.jobs import run
    from pipeline.vptq_jobs import OPTIONS, job

    @cache
    def get(dtype: str = "bfloat16", form: str = "vptq") -> tuple[Path, Any]:
        out = tmp_path_factory.mktemp("made") / f"{dtype}-{form}"
        # Left to itself the method takes widths that the kernels of VPTQ do not know.
        widths = {} if form == "vptq" else {"vector_length": 4, "centroids": 256, "residual_centroids": 0}
        return out, run(wide(dtype), out, job(tiny_text_file, format=form, options=OPTIONS | widths))

    return get
