"""Universal codebooks: int8 tables trained on N(0, 1) vectors, the same for every matrix of every model.

A matrix whose rows were rotated to look Gaussian and divided by their scale needs no codebook of its own. A name says
what a codebook is: ``gaussian-v8-k256-16`` has vectors of 8 weights and two additive stages of 256 and 16 centroids;
``-signs`` at the end means magnitudes, to which one sign bit per weight belongs.

A name is a promise: the table behind it never changes, because files that name it must decode the same for ever. A
better table gets a new name. ``scripts/train_codebooks.py`` makes the files.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor

from octavo._core.errors import FormatError, UsageError, did_you_mean

#: Name -> SHA-256 of its file.
_SHA256 = {
    "gaussian-v8-k256": "e4eaad79fc80b42dae42c98368a21b0665662b7425b828451b42b2e17442f4f7",
    "gaussian-v8-k4096": "fcffddd104b407739ffea172497e034954c8e20c84e3fdab6b2d3a803100d3c3",
    "gaussian-v8-k256-16": "a9691e584568086fa4f4dc69ed6cfe718db23f0f183a96c6cef2e5a95cc35065",
    "gaussian-v8-k256-64": "ee5396ca58a889c77e049520a05e72008625e26ffb6802ae51eee849d17415d9",
    "gaussian-v8-k256-256": "fb3f4dd07515234e14bd256f9f9d4b7249adf65f78db542d0496f689d2beb381",
    "gaussian-v8-k256-signs": "aaf2f7fd5c2be866adc88d217e8b054cc3496acf862d01d7e9f25b6d432bb05a",
    "gaussian-v8-k256-256-16": "fcd6a689c440cbc113161fddd255bd4ca58281e0df768a44168f8813c1015368",
    "gaussian-v8-k256-256-256": "e8fa84c02a5b6eab5e0a231cf00a87a3aa170190dda9c159ab0017fa0b52884c",
    "gaussian-v4-k256": "2790d4928e5b44617c62bf1b4d4d7e448738e9206a096ed97eec698c3917c5cc",
    "gaussian-v4-k256-16": "e9253293e7942f7c6447c31200c0c3e711030241a4b47d934f5997821ab5831c",
    "gaussian-v4-k256-signs": "e705277c45ef6bc2b6b0a0af91784a5bc90c4e8e2400c30336b1c40f7a0f52ca",
    "gaussian-v4-k256-64": "97ba992a0c6bc3571b35856e6bda5ff9645de4577abf62d57e30789f74828efd",
    "gaussian-v4-k256-256": "024141cd943dadb8eec9992559f6be142fc5509ea4a0a94da123db5fdda44b22",
    "gaussian-v4-k256-256-256": "5edc5ebe74656d2b03899b1c3f53253f805539462997e47bbc9ddf00bd048f04",
    "gaussian-v2-k16": "0bd15615f04cf12ee7b90e8b8c8130e55684d4dc8a541693d4385291a6c25645",
    "gaussian-v2-k64": "13df888fda408e0ebe6293ba7c28723c22c92c528c402f969821bfd524a90034",
    "gaussian-v2-k256": "33b843caf0e913a8a7dd3a3faccf45a906d3c4ff3b7c38e2f50f81e7d0b995f8",
}


@dataclass(frozen=True)
class Codebook:
    """A vector is ``sum_t tables[t][i_t] * scales[t]``; with ``sign_bits``, that times one sign per element.

    Attributes:
        name: such as ``gaussian-v8-k256-256``.
        vector_length: weights per vector, v.
        stages: index bits of every additive stage.
        sign_bits: one sign bit per weight beside the index; the tables then hold magnitudes, none negative.
        tables: int8 [2^bits, v], one per stage, in the order of their norms. Shared by all callers: not to be written.
        scales: one per stage. All are equal up to powers of two, and each has few enough digits that every
            ``table * scale`` and every sum of them is exact in float32. Vectors of 8 with two bits a weight or less
            have one scale, and sums of integers within [-127, 127]: a decoder can add int8 and multiply once.
        distortion: mean squared error per weight of N(0, 1) vectors that took no part in the training, with the best
            search.
    """

    name: str
    vector_length: int
    stages: tuple[int, ...]
    sign_bits: bool
    tables: tuple[Tensor, ...]
    scales: tuple[float, ...]
    distortion: float

    @property
    def bits(self) -> float:
        """Stored bits per weight."""
        return sum(self.stages) / self.vector_length + self.sign_bits

    def centroids(self, stage: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """[2^bits, v] of one stage: ``table * scale`` in float32, then cast to ``dtype``."""
        return (self.tables[stage].float() * self.scales[stage]).to(dtype)


def names() -> list[str]:
    """Every codebook there is; reads nothing."""
    return list(_SHA256)


@cache
def get(name: str) -> Codebook:
    """The codebook of that name, on the CPU; read once and kept.

    Raises:
        UsageError: no codebook has that name.
        FormatError: its file is missing or is not the one that belongs to the name.
    """
    if name not in _SHA256:
        raise UsageError(
            f"codebook {name!r} is unknown.{did_you_mean(name, _SHA256)} There are: {', '.join(_SHA256)}. If a newer "
            "Octavo wrote this name, upgrade."
        )
    path = Path(__file__).with_name(f"{name}.safetensors")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FormatError(f"codebook file {path} cannot be read: {error.strerror}. Install Octavo again.") from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != _SHA256[name]:
        raise FormatError(
            f"codebook file {path} is damaged: SHA-256 wanted {_SHA256[name]}, got {digest}. Install Octavo again."
        )
    tensors = load(data)
    vector_length, stages, sign_bits = parse(name)
    return Codebook(
        name=name,
        vector_length=vector_length,
        stages=stages,
        sign_bits=sign_bits,
        tables=tuple(tensors[f"table{t}"] for t in range(len(stages))),
        scales=tuple(tensors["scales"].tolist()),
        distortion=float(tensors["distortion"]),
    )


def parse(name: str) -> tuple[int, tuple[int, ...], bool]:
    """Vector length, index bits of the stages and whether there are sign bits, of a well-formed name."""
    _, vector, *sizes = name.split("-")
    sign_bits = sizes[-1] == "signs"
    counts = [int(size.removeprefix("k")) for size in sizes[: len(sizes) - sign_bits]]
    return int(vector.removeprefix("v")), tuple(count.bit_length() - 1 for count in counts), sign_bits
