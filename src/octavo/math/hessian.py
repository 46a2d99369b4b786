"""The second moment H = E[x x^T] of a linear layer's inputs, and its factorisation for error feedback."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo._core.errors import NumericalError

#: Relative damping tried in turn until the Cholesky factorisation succeeds.
DAMPING_LADDER = (1e-2, 3e-2, 1e-1, 3e-1, 1.0)
#: Rows of the Hessian that are accumulated by one product.
_TILE = 1024
#: Triangular matrices of at most so many rows are inverted as a whole.
_LEAF = 512
#: Tokens of a piece: pieces of the text are taken as independent of each other, the tokens of one are not.
_PIECE = 1024
#: More non-finite calibration rows than this share means that the statistics cannot be trusted.
MAX_BAD_SHARE = 0.1


class HessianAccumulator:
    """Sum of s x^T x over tokens with weights s, in float32, with non-finite rows left out and counted.

    Attributes:
        tokens: rows that entered the sum.
        bad_tokens: rows that were left out because of NaN or infinity.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self._sum = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.tokens = 0
        self.bad_tokens = 0
        self._pieces = 0
        #: Sum over pieces of the squares of what each adds off the diagonal, per token of it.
        self._squares = 0.0

    @property
    def in_features(self) -> int:
        """Number of input features."""
        return self._sum.shape[0]

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Add inputs ``x`` [tokens, in_features] of any float dtype, with non-negative ``weights`` [tokens] or ones."""
        x = x.to(self._sum.dtype)
        if weights is not None:
            x = x * weights.to(x.device, x.dtype).sqrt().unsqueeze(1)
        # A finite sum proves finite entries (short of overflow, which the exact test below then settles).
        if not bool(torch.isfinite(x.sum())):
            good = torch.isfinite(x).all(dim=1)
            self.bad_tokens += int((~good).sum())
            x = x[good]
        self.tokens += x.shape[0]
        for piece in x.tensor_split(-(-x.shape[0] // _PIECE)) if x.shape[0] else ():
            self._add_piece(piece)

    def _add_piece(self, x: Tensor) -> None:
        self._pieces += 1
        with exact_float32():
            # H is symmetric: only the tiles on and right of the diagonal are computed.
            for start in range(0, self.in_features, _TILE):
                product = x[:, start : start + _TILE].T @ x[:, start:]
                self._sum[start : start + _TILE, start:].add_(product)
                self._squares += _off_diagonal_square(product) / x.shape[0]

    def matrix(self, shrink: float = 0.0) -> Tensor:
        """H [in, in], float32, normalised by the number of tokens (zeros when there were none).

        Args:
            shrink: multiple of :meth:`shrinkage` by which H is drawn towards its diagonal; 0 leaves it as it was seen.
        """
        upper = self._sum.triu()
        upper.div_(max(self.tokens, 1))
        matrix = upper.add_(upper.triu(1).T)
        if shrink and (share := min(shrink * self.shrinkage(), 1.0)):
            diagonal = matrix.diagonal().clone()
            matrix.mul_(1 - share).diagonal().copy_(diagonal)
        return matrix

    def shrinkage(self) -> float:
        """The share of chance in what H has off its diagonal, 0 to 1: sum of variances over sum of squares.

        (1 - share) H + share diag(H) has the least expected squared distance to the H of endless text (Ledoit and Wolf
        2004). The variance is that between pieces of at most 1,024 tokens, since neighbouring tokens are alike, and
        since token weights let few of them count; with fewer than two pieces it is unknown and taken as 0.
        """
        if self._pieces < 2:
            return 0.0
        starts = range(0, self.in_features, _TILE)
        total = sum(_off_diagonal_square(self._sum[start : start + _TILE, start:]) for start in starts)
        # A piece of n_p of n tokens has the variance n_p v; v = sum_p (S_p - n_p S / n)^2 / n_p / (pieces - 1).
        variance = (self._squares - total / self.tokens) * self.tokens / (self._pieces - 1)
        return min(max(variance / total, 0.0), 1.0) if total > 0 and math.isfinite(variance) else 0.0

    def check(self, where: str) -> None:
        """Refuse statistics that must not be used.

        Raises:
            NumericalError: too many non-finite rows, or a sum that overflowed; ``where`` names the module.
        """
        total = self.tokens + self.bad_tokens
        if total and self.bad_tokens > MAX_BAD_SHARE * total:
            raise NumericalError(
                f"{where}: {self.bad_tokens} of {total} calibration rows are NaN or infinite (limit "
                f"{MAX_BAD_SHARE:.0%}). The model itself overflows on this text: check the checkpoint and its dtype."
            )
        check_finite(self._sum, where)


def _off_diagonal_square(rows: Tensor) -> float:
    """Sum of squares of a symmetric matrix off its diagonal, from ``rows`` of it that begin at the diagonal."""
    corner, rest = rows[:, : rows.shape[0]], rows[:, rows.shape[0] :]
    norms = [float(torch.linalg.vector_norm(part, dtype=torch.float64)) for part in (corner, corner.diagonal(), rest)]
    return norms[0] ** 2 - norms[1] ** 2 + 2 * norms[2] ** 2


def check_finite(hessian: Tensor, where: str) -> None:
    """Refuse a Hessian with NaN or infinity, which damping cannot repair.

    Raises:
        NumericalError: with the counts and the module's name.
    """
    if not bool(torch.isfinite(hessian).all()):
        nan, inf = int(torch.isnan(hessian).sum()), int(torch.isinf(hessian).sum())
        raise NumericalError(
            f"{where}: the Hessian holds {nan} NaN and {inf} infinite entries of {hessian.numel()}; the activations "
            "overflow in float32. Check the checkpoint, or use --on-bad-hessian rtn to round this matrix to nearest."
        )


@contextmanager
def exact_float32() -> Iterator[None]:
    """Full float32 products (no TF32, no autocast) inside the block; the caller's setting is restored."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@dataclass(frozen=True)
class Factor:
    """Upper-triangular U with (H + damping)^-1 = U^T U, and the relative damping that it took.

    ``feedback`` is U with every row divided by its diagonal entry (unit upper triangular: the LDL factor of H^-1);
    ``variance`` [in] is U_jj^2, whose inverse is the weight of column j's error in the proxy loss.
    """

    feedback: Tensor
    variance: Tensor
    damping: float


def dead_columns(hessian: Tensor) -> Tensor:
    """Boolean mask [in] of input channels that never fired (H_jj = 0)."""
    return torch.diagonal(hessian) <= 0


def damped(hessian: Tensor, damping: float) -> Tensor:
    """H as :func:`factorize` takes it: symmetric, dead channels with the mean, ``damping`` times the mean added."""
    mean = float(torch.diagonal(hessian).clamp(min=0).mean())
    base = (hessian + hessian.T) / 2
    base.diagonal().masked_fill_(torch.diagonal(base) <= 0, mean).add_(damping * mean)
    return base


def factorize(hessian: Tensor, where: str = "matrix", damping: float = DAMPING_LADDER[0]) -> Factor:
    """Factorise a damped Hessian for error feedback.

    H is symmetrised, dead channels get the mean diagonal, and ``damping`` times the mean diagonal is added; when the
    factorisation fails the damping climbs :data:`DAMPING_LADDER`, first in float32, then once more in float64.
    With J the reversal of the order of the columns, J H J = L L^T gives H = V V^T for the upper-triangular V = J L J,
    so U = V^-1 satisfies H^-1 = U^T U: one Cholesky and one triangular inverse, never H^-1 itself.

    Raises:
        NumericalError: non-finite entries, an empty Hessian, or failure at full damping.
    """
    check_finite(hessian, where)
    diagonal = torch.diagonal(hessian)
    if not bool((diagonal > 0).any()):
        raise NumericalError(
            f"{where}: the Hessian's diagonal has no positive entry: the layer saw no calibration data at all. More "
            "damping cannot help; check the calibration text, or use --on-bad-hessian rtn."
        )
    mean = float(diagonal.clamp(min=0).mean())
    ladder = sorted({damping, *(d for d in DAMPING_LADDER if d > damping)})
    for dtype in (torch.float32, torch.float64):
        for damp in ladder:
            lower, info = torch.linalg.cholesky_ex(damped(hessian.to(dtype), damp).flip(0, 1))
            if int(info) != 0 or not bool(torch.isfinite(lower).all()):
                continue
            with exact_float32():
                inverse = _inverse_of_lower(lower).flip(0, 1)
            scale = torch.diagonal(inverse)
            return Factor((inverse / scale.unsqueeze(1)).float(), (scale * scale).float(), damp)
    raise NumericalError(
        f"{where}: Cholesky factorisation failed even with damping {ladder[-1]} times the mean diagonal ({mean:.3g}). "
        "The statistics are unusable; use more calibration text, or --on-bad-hessian rtn."
    )


def _inverse_of_lower(lower: Tensor) -> Tensor:
    """The inverse of a lower-triangular matrix, half by half: a third of the work of solving for all columns."""
    n = lower.shape[0]
    if n <= _LEAF:
        identity = torch.eye(n, dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_triangular(lower, identity, upper=False)
    half = n // 2
    inverse = torch.zeros_like(lower)
    inverse[:half, :half] = _inverse_of_lower(lower[:half, :half])
    inverse[half:, half:] = _inverse_of_lower(lower[half:, half:])
    inverse[half:, :half] = -(inverse[half:, half:] @ (lower[half:, :half] @ inverse[:half, :half]))
    return inverse


def proxy_loss(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """Relative proxy error tr(E H E^T) / tr(W H W^T) with E = W - Q, all in float32 with exact products."""
    with exact_float32():
        error = weight - quantized
        top = float(((error @ hessian) * error).sum())
        bottom = float(((weight @ hessian) * weight).sum())
    return top / bottom if bottom > 0 else (float("inf") if top > 0 else 0.0)


def caught_up(weight: Tensor, hessian: Tensor, drift: Tensor, strength: float, damping: float = 1e-2) -> Tensor:
    """The matrix [out, in] that does best on the drifted inputs x what ``weight`` does on the original's x_o.

    ``W + strength W C H^-1`` with C = E[(x_o - x) x^T] [in, in] minimises E|W x_o - W' x|^2 at strength 1 (asymmetric
    calibration of GPTAQ, arXiv 2504.02692); a damped H keeps what few tokens say small.
    """
    with exact_float32():
        factor, info = torch.linalg.cholesky_ex(damped(hessian, damping))
        if int(info) != 0:
            return weight
        return weight + strength * torch.cholesky_solve((weight @ drift).T, factor).T
