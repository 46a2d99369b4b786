"""A model of the shape of Llama-2-7B with random weights: tokens per second in a CUDA graph, and a prompt.

The same blocks in bfloat16 and with quantized matrices: norms, rotary positions, attention over a cache and the head
(in bfloat16) are torch's in both. ``run.py`` is the command.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from products import DEVICE, matrices, seconds
from torch import Tensor
from torch.nn import functional

from octavo.kernels import _gpu

Linear = Callable[[Tensor], Tensor]
#: Makes a linear layer of a shape.
Maker = Callable[[tuple[int, int]], Linear]


@dataclass(frozen=True)
class Config:
    """Of Llama-2-7B; ``fused`` makes q, k and v one matrix, and gate and up another."""

    hidden: int = 4096
    intermediate: int = 11008
    heads: int = 32
    layers: int = 32
    vocabulary: int = 32000
    fused: bool = False


class Model:
    """A decoder with linear layers as ``make`` gives them.

    Args:
        context: tokens that the cache holds.
    """

    def __init__(self, config: Config, make: Maker, context: int, device: torch.device, dtype: torch.dtype) -> None:
        self.config, hidden = config, config.hidden
        self.width = hidden // config.heads
        qkv, up = (
            ([3 * hidden], [2 * config.intermediate]) if config.fused else ([hidden] * 3, [config.intermediate] * 2)
        )
        self.blocks = [
            (
                [make((rows, hidden)) for rows in qkv],
                make((hidden, hidden)),
                [make((rows, hidden)) for rows in up],
                make((hidden, config.intermediate)),
            )
            for _ in range(config.layers)
        ]
        self.embedding = torch.randn(config.vocabulary, hidden, device=device, dtype=dtype)
        self.head = torch.randn(config.vocabulary, hidden, device=device, dtype=dtype) / hidden**0.5
        size = (config.layers, 2, config.heads, context, self.width)
        self.cache = torch.zeros(size, device=device, dtype=dtype)
        angle = torch.arange(context, device=device).float().unsqueeze(1)
        angle = angle * 10000.0 ** (-torch.arange(0, self.width, 2, device=device).float() / self.width)
        self.cosine, self.sine = angle.cos().to(dtype), angle.sin().to(dtype)

    def forward(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Logits [vocabulary] behind ``tokens`` [n] at ``position`` [n] of the cache, which they are written to.

        Several tokens are a prompt and see each other, one token sees the whole cache.
        """
        x, many = self.embedding[tokens], tokens.numel() > 1
        for number, (qkv, output, up, down) in enumerate(self.blocks):
            h = functional.rms_norm(x, (self.config.hidden,))
            q, k, v = torch.cat([linear(h) for linear in qkv], dim=-1).view(x.shape[0], 3, -1, self.width).unbind(1)
            q, k, v = self._rotated(q, position), self._rotated(k, position), v.transpose(0, 1)
            keys, values = self.cache[number]
            keys.index_copy_(1, position, k)
            values.index_copy_(1, position, v)
            seen = (k, v) if many else (keys, values)
            y = functional.scaled_dot_product_attention(q[None], seen[0][None], seen[1][None], is_causal=many)[0]
            x = x + output(y.transpose(0, 1).reshape(x.shape[0], -1))
            h = functional.rms_norm(x, (self.config.hidden,))
            gate, wide = torch.cat([linear(h) for linear in up], dim=-1).chunk(2, dim=-1)
            x = x + down(functional.silu(gate) * wide)
        return functional.linear(functional.rms_norm(x[-1:], (self.config.hidden,)), self.head)[0]

    def _rotated(self, x: Tensor, position: Tensor) -> Tensor:
        """[n, heads, width] with rotary positions: [heads, n, width]."""
        x = x.transpose(0, 1)
        low, high = x.chunk(2, dim=-1)
        cosine, sine = self.cosine[position], self.sine[position]
        return torch.cat([low * cosine - high * sine, high * cosine + low * sine], dim=-1)


def dense(shape: tuple[int, int]) -> Linear:
    """A layer in bfloat16."""
    weight = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) / shape[1] ** 0.5
    return lambda x: functional.linear(x, weight)


def quantized(name: str) -> Maker:
    """Layers of one of ``products.NAMES``."""

    def make(shape: tuple[int, int]) -> Linear:
        (matrix,) = matrices(name, shape, 1)
        return lambda x, matrix=matrix: _gpu.cuda_linear(x, matrix.handle, matrix.rows, False)

    return make


@torch.inference_mode()
def row(name: str, fused: bool, prompt: int, context: int, rounds: int) -> dict[str, Any]:
    """Tokens per second behind ``context`` tokens, and of a prompt."""
    make = dense if name == "bfloat16" else quantized(name)
    model = Model(Config(fused=fused), make, max(context, prompt), DEVICE, torch.bfloat16)
    token, position = (torch.tensor([n], device=DEVICE) for n in (1, context - 1))
    model.cache = model.cache[:, :, :, :context].contiguous()

    def step() -> None:
        token.copy_(model.forward(token, position).argmax().unsqueeze(0))

    found: dict[str, Any] = {"name": name, "fused": fused, "context": context, "prompt": prompt}
    times = seconds(step, rounds)
    found |= {"tokens_per_second": 1 / statistics.median(times), "spread": [1 / max(times), 1 / min(times)]}
    model.cache = model.cache.new_zeros(*model.cache.shape[:3], prompt, model.width)
    tokens = torch.randint(0, model.config.vocabulary, (prompt,), device=DEVICE)
    where = torch.arange(prompt, device=DEVICE)
    times = seconds(lambda: model.forward(tokens, where), min(rounds, 5), graph=False)
    return found | {"prompt_tokens_per_second": prompt / statistics.median(times)}
