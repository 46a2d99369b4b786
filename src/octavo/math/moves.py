"""From gradients to other codes: which codeword a vector moves to, given how far descent would push it.

A code is a discrete choice, so what descent does to the decoded vector, a displacement u, is counted as evidence for
moves from its codeword to others. With d the way to another codeword and s the way to the nearest one, the evidence is

    e = (u . d) / |d|^2 * (|d| / |s|)^p,

and a vector moves to the codeword of most evidence once that exceeds 1/2. The natural gradient of a soft assignment is
in proportion to the distance (p = 2), so that codes jump to the far ends of the codebook; JLCM (arXiv 2309.17361) puts
a decreasing function of the distance in its place (p = 0). That is a proximal step: 1/2 is the midpoint, beyond which
another codeword is nearer to the displaced vector than its own. Of the nearest codeword both say the same.

Gradients are divided by their running root mean square before they are added up, as Adafactor keeps it
(arXiv 1804.04235): a factor per row times one per column. Those stand for how much the loss curves along a weight - its
row's way to the output and its column's inputs - and keep what gradients of single weights say. A size of its own for
every weight (Adam's) would give all of them the same pace, noise or not.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Rule = Literal["proximal", "ste"]
#: The power p by rule.
POWERS: dict[Rule, float] = {"proximal": 0.0, "ste": 2.0}
_THRESHOLD = 0.5
#: Decay of the running mean squares of gradients.
_DECAY = 0.99


class Displacement:
    """How far descent would push the vectors of a matrix from their codewords, in mean gaps of their codebooks.

    Args:
        books: [books, k, v] float32.
        owner: [rows, columns] int64: which codebook each vector refers to.
    """

    def __init__(self, books: Tensor, owner: Tensor) -> None:
        self._owner = owner
        self._gap = gaps(books)[owner].unsqueeze(2)
        self._value = torch.zeros(*owner.shape, books.shape[2], device=books.device)
        #: What is added to the vectors: nothing, but with a gradient.
        self.probe = torch.zeros_like(self._value).requires_grad_(True)
        self._rows = self._columns = torch.zeros(1, 1, 1, device=books.device)
        self._steps = 0

    def attach(self, vectors: Tensor) -> Tensor:
        """``vectors`` [rows, columns, v] as they are, so that a backward pass leaves their gradient here."""
        return vectors + self.probe * self._gap

    def step(self, codes: Tensor, books: Tensor, rate: float, rule: Rule, neighbours: int) -> Tensor:
        """Add the last gradient to the displacements; the codes [rows, columns] after the moves that follow from them.

        Vectors that move start anew from where they are: what pushed them was the slope at the codeword they left.
        """
        gradient, self.probe.grad = self.probe.grad, None
        if gradient is None:
            # An expert that no token of the step was routed to.
            return codes
        self._value -= rate * gradient / self._size(gradient)
        flat = (self._value * self._gap).view(-1, books.shape[2])
        after = moved(codes.reshape(-1), flat, books, self._owner.reshape(-1), rule, neighbours).view_as(codes)
        self._value[after != codes] = 0
        return after

    def _size(self, gradient: Tensor) -> Tensor:
        """The running root mean square of gradients [rows, columns, v]; infinite where none was seen."""
        square = gradient.square()
        self._steps += 1
        self._rows = _DECAY * self._rows + (1 - _DECAY) * square.mean(dim=(1, 2), keepdim=True)
        self._columns = _DECAY * self._columns + (1 - _DECAY) * square.mean(dim=0, keepdim=True)
        mean = self._rows.mean() * (1 - _DECAY**self._steps)
        # Roots first: mean squares of small gradients, multiplied, would be too small for float32.
        size = self._rows.sqrt() * (self._columns / mean).sqrt()
        return torch.where(size > 0, size, torch.inf)


def gaps(books: Tensor) -> Tensor:
    """The mean distance from a codeword to the nearest other one, per codebook: [books] of [books, k, v]."""
    return _neighbours(books, 1)[1].sqrt().mean(dim=(1, 2))


def moved(codes: Tensor, displacement: Tensor, books: Tensor, owner: Tensor, rule: Rule, neighbours: int) -> Tensor:
    """The codes after the moves that there is evidence for.

    Args:
        codes: [n] int64.
        displacement: [n, v], in the units of the codebooks.
        books: [books, k, v], codewords that may be equal to each other.
        owner: [n] int64: which codebook each code refers to.
        rule: how evidence depends on the distance.
        neighbours: codewords that a vector may move to: so many nearest ones of its own.

    Returns:
        [n] int64; equal evidence goes to the nearer codeword.
    """
    k, v = books.shape[1:]
    nearest, distance = _neighbours(books, min(neighbours, k - 1))
    start = books.unsqueeze(2)
    ways = torch.gather(books.unsqueeze(1).expand(-1, k, -1, -1), 2, nearest.unsqueeze(3).expand(-1, -1, -1, v)) - start
    # A codeword that another one equals has nowhere nearer to go.
    usable = torch.where(distance > 0, distance, torch.inf)
    power = POWERS[rule] / 2
    shortest = usable.amin(dim=2, keepdim=True)
    weight = torch.where(distance > 0, usable.pow(power - 1) / shortest.pow(power), 0.0)
    ways = (ways * weight.unsqueeze(3)).flatten(0, 1)
    flat = codes + owner * k
    best, result = torch.full_like(displacement[:, 0], _THRESHOLD), codes
    for rank in range(nearest.shape[2]):
        evidence = (displacement * ways[:, rank].index_select(0, flat)).sum(dim=1)
        better = evidence > best
        best = torch.where(better, evidence, best)
        result = torch.where(better, nearest[:, :, rank].reshape(-1).index_select(0, flat), result)
    return result


def _neighbours(books: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The nearest other codewords [books, k, count] of each, and their squared distances, by rising distance."""
    k = books.shape[1]
    squared = torch.cdist(books, books, compute_mode="donot_use_mm_for_euclid_dist").square()
    squared[:, range(k), range(k)] = torch.inf
    distance, index = squared.topk(count, dim=2, largest=False)
    return index, distance
