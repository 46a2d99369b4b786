"""What errors cost: the loss's gradients at every matrix, collected before anything is quantized.

To second order, changing the outputs of a layer by d costs KL = 1/2 sum_t sum_j g_tj^2 d_tj^2 with the gradients g of
the loss on labels that the model drew itself (the Fisher information's diagonal). Two things follow from one pass:

- token weights s_t = mean_j g_tj^2: with H = E[s x x^T] a method spends its errors where the loss does not feel them
  (GuidedQuant, arXiv 2505.07004);
- importances: the KL that an error as large as the weights would cost, matrix by matrix, between which bits are shared
  out (the linearity of HIGGS, arXiv 2411.17525, with gradients in place of measured curves).

Importances can come from noise, too (:mod:`octavo.pipeline.noise`). That measures alpha, the KL that an error as large
as the weights W and without structure would cost, whereas a method with error feedback leaves errors that H hardly
feels. What that saves depends on W and H alone: noise N as large as W loses E tr(N H N^T) = |W|^2 tr(H) / in, errors of
that size under feedback lose sum_j D_j |W_j|^2 with the innovations D of H = R D R^T and the columns W_j
(:meth:`octavo.algorithms.Algorithm.sensitivity`), so::

    importance = alpha * gain        gain = sum_j D_j |W_j|^2 / (|W|^2 tr(H) / in)

H is E[s x x^T] here as there: the importance by gradients is the same product with 1/2 |W|^2 tr(H) / in, what gradients
predict, for alpha. Both are KL per token for an error as large as the weights, with error feedback.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from octavo._core import io
from octavo._core.errors import FormatError, UsageError
from octavo._core.seeds import generator
from octavo.algorithms import Algorithm
from octavo.algorithms._base import identity_options
from octavo.calibration.data import Tokens
from octavo.calibration.gradients import backpropagate, token_weights
from octavo.math.hessian import HessianAccumulator
from octavo.models.adapter import CausalModel
from octavo.pipeline.noise import measure_noise
from octavo.pipeline.store import Store

#: What a guide is asked for: weights of the tokens, how bits are shared out, or both.
Guided = Literal["none", "weights", "bits", "both"]
#: Where importances come from; token weights always come from gradients.
Sensitivity = Literal["gradients", "noise"]
#: No token weighs more than so many times the mean.
_CAP = 10.0
#: Where the header of a guide's file has what is no tensor.
_HEADER = "octavo_guide"


@dataclass(frozen=True)
class Guide:
    """What one pass over the calibration text found out.

    Attributes:
        weights: by matrix, the weights s [tokens] float32 of the calibration tokens. Missing are matrices that do not
            see every token once (experts).
        importance: by matrix, KL per token (nats) for an error as large as the weights, with error feedback.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    importance: dict[str, float] = field(default_factory=dict)

    def put(self, store: Store) -> dict[str, Any]:
        """Store it; the entry that :meth:`get` wants."""
        return {"object": store.put_tensors(self.weights), "importance": self.importance}

    @classmethod
    def get(cls, store: Store, entry: dict[str, Any]) -> Guide:
        """Read it back."""
        # Copies of their own: products of mapped, unaligned memory may round differently.
        weights = {name: tensor.clone() for name, tensor in store.get_tensors(entry["object"]).items()}
        return cls(weights, entry["importance"])

    def save(self, path: Path, identity: dict[str, Any]) -> None:
        """Write it to a file of its own, atomically, with what it is a guide to."""
        header = json.dumps({"identity": identity, "importance": self.importance}, sort_keys=True)
        io.write_bytes(path, save(self.weights, {_HEADER: header}))

    @classmethod
    def load(cls, path: Path, identity: dict[str, Any]) -> Guide:
        """Read what :meth:`save` wrote.

        Raises:
            FormatError: the file is no guide.
            UsageError: it is one to another job; says what differs.
        """
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})[_HEADER])
                weights = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            theirs, importance = header["identity"], header["importance"]
        except (SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
            raise FormatError(f"{path} is no guide that --guide wrote: {error}") from error
        if differing := [key for key in identity if theirs.get(key) != identity[key]]:
            raise UsageError(
                f"{path} is the guide of a job with other {', '.join(differing)}. Give another --guide file, or delete "
                "this one to have it made anew."
            )
        return cls(weights, importance)


def check_guided(guided: str, sensitivity: str) -> None:
    """Refuse what is no :data:`Guided` or no :data:`Sensitivity`, and noise that would decide nothing.

    Raises:
        UsageError: says which.
    """
    if guided not in get_args(Guided):
        raise UsageError(f"guided wanted {', '.join(get_args(Guided))}; got {guided!r}")
    if sensitivity not in get_args(Sensitivity):
        raise UsageError(f"sensitivity wanted {', '.join(get_args(Sensitivity))}; got {sensitivity!r}")
    if sensitivity == "noise" and guided not in ("bits", "both"):
        raise UsageError(
            f"sensitivity noise decides how bits are shared out, and guided {guided} shares none out by what errors "
            "cost. Give --guided bits or both, or leave --sensitivity out."
        )


def find(
    causal: CausalModel,
    algorithm: Algorithm,
    tokens: Tokens,
    seed: int,
    *,
    sensitivity: Sensitivity = "gradients",
    file: Path | None = None,
    folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Guide:
    """The guide of a job: read from ``file`` if that is there, else measured, and written to ``file`` if one is given.

    It does not depend on the bits asked for, so jobs of many sizes can share one.

    Raises:
        FormatError, UsageError: as :meth:`Guide.load`.
        OctavoError: as :func:`measure`.
    """
    options = identity_options(algorithm)
    del options["bits"]
    identity = {
        "model": causal.fingerprint(),
        "calibration": tokens.sha256,
        "shape": list(tokens.ids.shape),
        "seed": seed,
        "method": algorithm.name,
        "sensitivity": sensitivity,
        "options": json.loads(json.dumps(options)),
    }
    if file is not None and file.exists():
        return Guide.load(file, identity)
    found = measure(causal, algorithm, tokens.ids, seed, folder, progress, sensitivity)
    if file is not None:
        found.save(file, identity)
    return found


def measure(
    causal: CausalModel,
    algorithm: Algorithm,
    tokens: Tensor,
    seed: int,
    folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    sensitivity: Sensitivity = "gradients",
) -> Guide:
    """Find out what errors of every matrix cost, for a method and calibration tokens [windows, ctx].

    Args:
        folder: where hidden states of all blocks are kept meanwhile; None keeps them in memory.
        progress: called with (steps done, steps) of the gradients, and then of the noise.
        sensitivity: what importances come from. With ``noise``, a matrix that the few windows of noise do not reach
            (an expert) keeps the importance by gradients, which has the same unit.

    Raises:
        OctavoError: as :func:`octavo.calibration.gradients.backpropagate` and :func:`measure_noise`.
    """
    collector = _Collector(causal, algorithm, tokens.numel(), seed)
    labels = generator(seed, "labels")
    backpropagate(causal, tokens, collector.visit, generator=labels, folder=folder, progress=progress)
    collector.finish()
    found = collector.guide()
    if sensitivity == "gradients":
        return found
    alphas = measure_noise(causal, tokens, seed, progress=progress)
    ratios = {name: alphas[name] / plain for name, plain in collector.plain.items() if alphas[name] > 0 and plain > 0}
    return replace(found, importance={name: cost * ratios.get(name, 1.0) for name, cost in found.importance.items()})


def _capped(weights: Tensor) -> Tensor:
    """Weights of which none is far above the mean.

    The gradients of keys and values sit on few tokens (the first of a window above all); their Hessians would see no
    others.
    """
    return weights.clamp(max=_CAP * float(weights.mean()))


class _Collector:
    """Statistics of the block whose gradients are just arriving, and the results of those that are done.

    Attributes:
        plain: by matrix, KL per token for an error as large as the weights and without structure or feedback.
    """

    def __init__(self, causal: CausalModel, algorithm: Algorithm, tokens: int, seed: int) -> None:
        self._causal, self._algorithm, self._tokens, self._seed = causal, algorithm, tokens, seed
        self._block = -1
        self._hessians: dict[str, HessianAccumulator] = {}
        self._weights: dict[str, list[Tensor]] = {}
        self._importance: dict[str, float] = {}
        self.plain: dict[str, float] = {}

    def visit(self, block: int, name: str, x: Tensor, g: Tensor) -> None:
        if block != self._block:
            self.finish()
            self._block = block
        weights = token_weights(g)
        self._weights.setdefault(name, []).append(weights.cpu())
        if name not in self._hessians:
            self._hessians[name] = HessianAccumulator(x.shape[1], device=x.device)
        self._hessians[name].add(x, weights)

    def finish(self) -> None:
        """Turn the statistics of a block into importances."""
        for name, hessian in self._hessians.items():
            # The sum over tokens per calibration token: experts that few tokens reach matter little.
            total = hessian.matrix(self._algorithm.shrink) * (hessian.tokens / self._tokens)
            weight = self._causal.weight(name)
            # Transforms draw the same signs as when it is quantized. Token weights are not capped here: an importance
            # is what errors cost, whoever feels them.
            shape = (weight.shape[0], weight.shape[1])
            rng = generator(self._seed, self._algorithm.stream(name, shape))
            self._importance[name] = 0.5 * self._algorithm.sensitivity(weight, total, rng, name)
            energy = weight.square().sum(dtype=torch.float64) * total.diagonal().mean(dtype=torch.float64)
            self.plain[name] = 0.5 * float(energy)
        self._hessians.clear()

    def guide(self) -> Guide:
        weights = {name: _capped(torch.cat(parts)) for name, parts in self._weights.items()}
        complete = {name: s for name, s in weights.items() if s.numel() == self._tokens}
        return Guide(complete, {name: self._importance[name] for name in sorted(self._importance)})
