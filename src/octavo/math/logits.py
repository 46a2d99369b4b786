"""A head's softmax over many contexts: what an error of a token's row costs, and classes of tokens whose logits tie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

#: Share of the uniform distribution that is mixed into every context's, so that tokens which never came keep a weight.
SMOOTHING = 0.1
#: Logits that are held at a time: 64 MiB in float32.
_CHUNK_NUMBERS = 1 << 24


@dataclass
class LogitStatistics:
    """Sums over n contexts with states h [width] and the model's distributions p [tokens].

    Attributes:
        count: n.
        curvature: sum of p~ (1 - p~), p~ = (1 - e) p + e / tokens with e = 0.1; [tokens] float64.
        mass: sum of p, [tokens] float64.
        pull: sum of p h^T, [tokens, width] float32, or None if it was not asked for.
        entropy: sum of sum_i p_i log p_i in nats (not positive).
    """

    count: int
    curvature: Tensor
    mass: Tensor
    pull: Tensor | None
    entropy: float

    def row_weights(self) -> Tensor:
        """lambda_k = E[p~_k (1 - p~_k)], [tokens] float64.

        A head with errors E loses about E[z^T (diag p - p p^T) z] / 2 nats, z = E h. With the two factors taken as
        independent and the first as diagonal that is sum_k lambda_k E_k Sigma E_k^T / 2 (SoftWater, arXiv 2608.12026).
        """
        return self.curvature / self.count


def logit_statistics(
    states: Tensor, logits: Callable[[Tensor], Tensor], tokens: int, *, pull: bool = False
) -> LogitStatistics:
    """One pass over ``states`` [n, width].

    Args:
        logits: gives the model's logits [m, tokens] for states [m, width], in any float dtype.
        tokens: size of the vocabulary.
        pull: work out :attr:`LogitStatistics.pull` too, for as much time again and 4 x tokens x width bytes.
    """
    curvature, mass = (torch.zeros(tokens, dtype=torch.float64) for _ in range(2))
    pulled = torch.zeros(tokens, states.shape[1]) if pull else None
    entropy = 0.0
    for part in states.split(max(_CHUNK_NUMBERS // tokens, 1)):
        log_p = torch.log_softmax(logits(part).float(), dim=-1)
        p = log_p.exp()
        # Of a token whose probability underflows nothing is left, and its logarithm is finite.
        entropy += float((log_p * p).sum(dtype=torch.float64))
        mass += p.sum(dim=0, dtype=torch.float64)
        if pulled is not None:
            # In the dtype of the states: products in bfloat16 are several times faster where there are such.
            pulled += (p.to(part.dtype).T @ part).float()
        smooth = p.mul_(1 - SMOOTHING).add_(SMOOTHING / tokens)
        curvature += (smooth - smooth.square()).sum(dim=0, dtype=torch.float64)
    return LogitStatistics(len(states), curvature, mass, pulled, entropy)


def tied_loss(codes: Tensor, counts: Tensor, states: Tensor, pull: Tensor, entropy: float) -> tuple[float, Tensor]:
    """Mean KL(p || q) in nats, where the tokens of a class share a logit, and its gradient; convex in the codes.

    With n_c tokens in class c and s = C h, q of one token is e^{s_c} / sum_b n_b e^{s_b}. As all of p that enters is
    its mass per class, KL = sum_i p_i log p_i - sum_c P_c s_c + log sum_c n_c e^{s_c}; its sum over the contexts needs
    P only in sum_h P h^T, and the gradient of it is sum_h (n_c e^{s_c} / Z - P_c) h^T.

    Args:
        codes: C [k, width] float32.
        counts: n [k], tokens of each class; one without any is never chosen.
        states: [n, width], float32 or bfloat16.
        pull: sum over the states of P h^T [k, width] float32.
        entropy: sum over the states of sum_i p_i log p_i.
    """
    log_counts = counts.float().log()
    narrow = codes.to(states.dtype)
    gradient, total = -pull, entropy - float((pull * narrow).sum(dtype=torch.float64))
    for part in states.split(max(_CHUNK_NUMBERS // len(codes), 1)):
        scores = (part @ narrow.T).float() + log_counts
        total += float(scores.logsumexp(dim=1).sum(dtype=torch.float64))
        gradient += (torch.softmax(scores, dim=1).to(part.dtype).T @ part).float()
    return total / len(states), gradient / len(states)
