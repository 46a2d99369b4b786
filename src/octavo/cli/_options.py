"""Options that ``quantize``, ``plan`` and ``demo`` share, so that a plan is made with the words of the job."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class SideDtype(StrEnum):
    """Stored dtype of scales, offsets and biases."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


class FileFormat(StrEnum):
    """The formats that can be written."""

    octavo = "octavo"
    vptq = "vptq"


class Guided(StrEnum):
    """What gradients of the loss decide."""

    none = "none"
    weights = "weights"
    bits = "bits"
    both = "both"


class Sensitivity(StrEnum):
    """Where it comes from what errors of a matrix cost."""

    gradients = "gradients"
    noise = "noise"


class Head(StrEnum):
    """What the output head becomes."""

    vq = "vq"
    vq_logits = "vq-logits"


class BadHessian(StrEnum):
    """What to do with a matrix whose calibration statistics are unusable."""

    error = "error"
    rtn = "rtn"


Model = Annotated[str, typer.Argument(metavar="MODEL", help="Local folder, hub id, or .gguf file.")]
NewFolder = Annotated[str, typer.Argument(metavar="OUT", help="New folder for the result; must not exist.")]
Quantized = Annotated[str, typer.Argument(metavar="OUT", help="Folder of a quantized model.")]
Method = Annotated[
    str | None,
    typer.Option(
        "--method",
        "-m",
        help="auto, universal, vptq, gptvq, jlcm, gptq or rtn; `octavo doctor` lists all.",
        show_default="auto",
    ),
]
Bits = Annotated[
    float | None,
    typer.Option("--bits", "-b", help="Bits per weight to aim at; codebooks are counted.", show_default="2.25"),
]
Size = Annotated[
    str | None,
    typer.Option("--size", metavar="BYTES", help="Largest size of the weight files, such as 900MB or 3.5GB."),
]
BitsOf = Annotated[
    list[str] | None,
    typer.Option("--bits-of", metavar="PATTERN=BITS", help="Bits of the matrices of this name; repeatable."),
]
HeadBits = Annotated[
    float | None,
    typer.Option(
        "--head-bits",
        help="Quantize output head and embedding too, with codes of so many bits: 1, 1.5, 2, 2.5, 3, 3.5, 4 or 6.",
        show_default="as they are",
    ),
]
HeadOption = Annotated[
    Head | None,
    typer.Option(
        "--head",
        help="Output head: quantized rows (vq, which --head-bits means alone), or codewords that tokens share "
        "(vq-logits).",
        show_default="as it is",
    ),
]
HeadCodes = Annotated[
    int | None,
    typer.Option(
        "--head-codes",
        min=2,
        help="Codewords of --head vq-logits, or beside the rows of --head-bits, to choose candidates by.",
        show_default="2048 for vq-logits",
    ),
]
HeadSettings = Annotated[
    list[str] | None,
    typer.Option(
        "--head-set",
        metavar="KEY=VALUE",
        help="An option of the head: classes, start (kmeans, frequency, random), steps, maps; repeatable.",
    ),
]
HeadCandidates = Annotated[
    int | None,
    typer.Option(
        "--head-candidates",
        min=0,
        help="Score so many tokens by their rows and the rest by codewords; for a head with both.",
        show_default="all tokens by their rows",
    ),
]
GuidedOption = Annotated[
    Guided | None,
    typer.Option(
        "--guided",
        help="What is decided by what errors cost in the end (a pass of gradients): the weights of tokens, how bits "
        "are shared out, both or none.",
        show_default="what the method does best with",
    ),
]
SensitivityOption = Annotated[
    Sensitivity,
    typer.Option(
        "--sensitivity",
        help="What --guided bits or both shares bits out by: gradients, or the KL measured with noise in one matrix "
        "after the other.",
    ),
]
GuideFile = Annotated[
    Path | None,
    typer.Option(
        "--guide",
        metavar="FILE",
        help="Keep what that pass finds in FILE, or take it from there: jobs of several sizes need it once.",
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        "--preset",
        metavar="NAME",
        help="A published setting, such as 4d-2.25 or v8-k65536-256: method, bits and options.",
    ),
]
Calibration = Annotated[
    str,
    typer.Option("--calib", help="'bundled', text or jsonl files (comma-separated), or datasets:NAME."),
]
Samples = Annotated[int, typer.Option("--samples", min=1, help="Calibration windows.")]
Context = Annotated[
    int | None,
    typer.Option("--ctx", min=2, help="Tokens per window.", show_default="1024, or what the model allows"),
]
Seed = Annotated[int, typer.Option("--seed", help="Of all randomness.")]
Skip = Annotated[
    list[str] | None, typer.Option("--skip", metavar="PATTERN", help="Glob of layers to leave as they are; repeatable.")
]
Side = Annotated[SideDtype, typer.Option("--side-dtype", help="Stored dtype of scales, offsets and biases.")]
Format = Annotated[
    FileFormat,
    typer.Option("--format", help="Of the files: Octavo's own, or VPTQ's, within what the vptq package can read."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="An option of the method, value as JSON; repeatable."),
]
EvaluationText = Annotated[
    str | None,
    typer.Option("--text", metavar="FILE", help="Text or jsonl file; the bundled evaluation text by default."),
]
Reference = Annotated[
    str | None,
    typer.Option("--reference", metavar="MODEL", help="The original model, for KL divergence and agreement."),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option("--qa", metavar="FILE", help="Multiple-choice jsonl {query, choices, gold}; repeatable."),
]
TaskLimit = Annotated[
    int | None, typer.Option("--qa-limit", min=1, help="Only the first N items of every --qa file or --lm-eval task.")
]
Harness = Annotated[
    str | None, typer.Option("--lm-eval", metavar="TASKS", help='Comma-separated lm-eval tasks (extra "eval").')
]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", min=2, help="Use only the first N tokens of the text.")]
BatchTokens = Annotated[int, typer.Option("--batch-tokens", min=1, help="Tokens per forward pass.")]


class Decode(StrEnum):
    """Whether quantized matrices are decoded once or at every call."""

    auto = "auto"
    dense = "dense"
    packed = "packed"


DecodeOption = Annotated[
    Decode, typer.Option("--decode", help="Quantized matrices: decoded once, at every call, or what suits the device.")
]


class KvCache(StrEnum):
    """How the native decoder keeps keys and values."""

    int8 = "int8"
    float16 = "float16"


KvCacheOption = Annotated[
    KvCache, typer.Option("--kv-cache", help="Keys and values of the native decoder: in bytes or in half floats.")
]
