"""The codebook update: with all indices fixed, the codebooks that minimise the layer's output error.

The decoded matrix is linear in the codebooks, Q = A(C): a gather times the block scales. The loss
tr((W - Q) H (W - Q)^T) is a convex quadratic in C (arXiv 2402.15319, Section 3.3), whose minimum solves the normal
equations A^T(A(C) H) = A^T(W H). They have too many unknowns to be written out - the columns of a row are coupled
through H - but a product with them costs one gather, one matrix product and one scatter, so conjugate gradients solve
them, with the blocks of H that belong to single vectors as preconditioner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.math.hessian import exact_float32


@dataclass(frozen=True)
class BookMap:
    """The linear map from codebooks [books * k, v] to a matrix [rows, columns] of row vectors.

    Attributes:
        flat: [rows, vectors] int64: which row of all stacked codebooks each vector takes.
        scale: [rows, columns] or None.
        columns: true columns; the last vector may reach beyond them.
    """

    flat: Tensor
    scale: Tensor | None
    columns: int

    def expand(self, books: Tensor) -> Tensor:
        """A(C)."""
        rows = self.flat.shape[0]
        values = books.index_select(0, self.flat.reshape(-1)).view(rows, -1)[:, : self.columns]
        return values if self.scale is None else values * self.scale

    def reduce(self, matrix: Tensor, like: Tensor) -> Tensor:
        """A^T(matrix), in the shape of ``like`` [books * k, v]."""
        values = matrix if self.scale is None else matrix * self.scale
        rows, v = self.flat.shape[0], like.shape[1]
        if spare := -self.columns % v:
            values = torch.nn.functional.pad(values, (0, spare))
        return torch.zeros_like(like).index_add_(0, self.flat.reshape(-1), values.reshape(rows * self.flat.shape[1], v))

    def blocks(self, hessian: Tensor, like: Tensor) -> Tensor:
        """The diagonal blocks [books * k, v, v] of the normal equations, couplings between vectors left out."""
        v, columns = like.shape[1], self.columns
        spare = -columns % v
        padded = torch.nn.functional.pad(hessian, (0, spare, 0, spare))
        index = torch.arange(columns + spare, device=hessian.device).view(-1, v)
        corner = padded[index.unsqueeze(2), index.unsqueeze(1)]
        total = torch.zeros(like.shape[0], v * v, device=like.device)
        for column in range(self.flat.shape[1]):
            block = corner[column].expand(self.flat.shape[0], v, v)
            if self.scale is not None:
                s = self.scale[:, column * v : (column + 1) * v]
                if s.shape[1] < v:
                    s = torch.nn.functional.pad(s, (0, v - s.shape[1]))
                block = s.unsqueeze(2) * block * s.unsqueeze(1)
            total.index_add_(0, self.flat[:, column], block.reshape(-1, v * v))
        return total.view(-1, v, v)


def output_loss(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """tr((W - Q) H (W - Q)^T)."""
    with exact_float32():
        error = weight - quantized
        return float(((error @ hessian) * error).sum(dtype=torch.float64))


def least_squares(
    books: Tensor, chart: BookMap, weight: Tensor, hessian: Tensor, steps: int = 6, tolerance: float = 1e-3
) -> Tensor:
    """Codebooks [books * k, v] at the minimum of the output loss, by preconditioned conjugate gradients from ``books``.

    Args:
        steps: at most so many.
        tolerance: stop when the preconditioned residual has fallen by this factor.
    """
    with exact_float32():
        blocks = chart.blocks(hessian, books)
        # Centroids that no vector uses, or whose inputs never fire, have no equations: they stay.
        ridge = blocks.diagonal(dim1=1, dim2=2).mean(dim=1) * 1e-4
        ridge = torch.where(ridge > 0, ridge, torch.ones_like(ridge))
        blocks.diagonal(dim1=1, dim2=2).add_(ridge.unsqueeze(1))
        factor = torch.linalg.cholesky_ex(blocks).L

        def precondition(residual: Tensor) -> Tensor:
            return torch.cholesky_solve(residual.unsqueeze(2), factor).squeeze(2)

        solution = books.clone()
        residual = chart.reduce((weight - chart.expand(solution)) @ hessian, books)
        direction = precondition(residual)
        inner = float((residual * direction).sum(dtype=torch.float64))
        first = inner
        for _ in range(steps):
            if inner <= tolerance**2 * first or inner <= 0:
                break
            image = chart.reduce(chart.expand(direction) @ hessian, books)
            curvature = float((direction * image).sum(dtype=torch.float64))
            if curvature <= 0:
                break
            step = inner / curvature
            solution += step * direction
            residual -= step * image
            next_direction = precondition(residual)
            previous, inner = inner, float((residual * next_direction).sum(dtype=torch.float64))
            direction = next_direction + (inner / previous) * direction
    return solution


def adam(
    parameters: Sequence[Tensor],
    decode: Callable[..., Tensor],
    chart: BookMap,
    weight: Tensor,
    hessian: Tensor,
    steps: int = 25,
    rate: float = 1e-3,
) -> list[Tensor]:
    """The update as the paper's authors do it: full-batch Adam, begun again at a tenth of the rate if the loss rises.

    Args:
        parameters: what is trained; ``decode(*parameters)`` gives codebooks [books * k, v].
    """
    bottom = max(float(((weight @ hessian) * weight).sum()), 1e-30)

    def loss_of(values: Sequence[Tensor]) -> Tensor:
        error = weight - chart.expand(decode(*values))
        return ((error @ hessian) * error).sum() / bottom

    start = float(loss_of(parameters))
    for _ in range(4):
        values = [parameter.clone().requires_grad_(True) for parameter in parameters]
        optimizer = torch.optim.Adam(values, lr=rate)
        with torch.enable_grad():
            for _ in range(steps):
                optimizer.zero_grad()
                loss = loss_of(values)
                loss.backward()
                optimizer.step()
        values = [value.detach() for value in values]
        if float(loss_of(values)) < start:
            return values
        rate /= 10
    return list(parameters)
