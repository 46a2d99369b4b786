"""The coder of row vectors: codebooks per tile, block scales, and the passes over a matrix that GPTVQ makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from octavo._core.errors import UsageError
from octavo.algorithms._base import Problem, check_damping
from octavo.algorithms._books import BookMap, adam, least_squares, output_loss
from octavo.math.feedback import error_feedback
from octavo.math.hessian import Factor, dead_columns, factorize
from octavo.math.pack import pack
from octavo.math.tiles import Seeding, block_roots, fit_tiles, nearest_tiles
from octavo.stored import decode_codebooks, log2_scale_table, pack_codes, store_codebooks, store_low_rank

_LAZY = 128
#: Widest group of columns whose codebook is fitted to fully compensated weights.
_WIDEST_LAZY = 512
#: Weight of an input that never fired, relative to the mean that it was given to be factorised.
_DEAD = 0.03


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """How the passes over a matrix are made.

    Attributes:
        scale_norm: scales are the largest magnitude (``max``) or the root mean square (``rms``) of their block.
        refresh: take a block's scales when its turn comes, from weights that hold all compensation, instead of once
            per codebook.
        init: seeding of the codebook fits.
        metric: what counts as near: ``block``: the loss that is left after the best compensation by later columns,
            |e U_PP^-1|^2; ``diagonal``: sum e_j^2 / U_jj^2, which ignores what couples a vector's columns; ``none``:
            |e|^2.
        exact_feedback: compensate a vector's error as a whole, e U_PP^-1 U_PF, instead of column by column as if its
            columns were independent (the released code).
        iterations: most steps of a codebook fit.
        update: after all indices are chosen, fit the codebooks to the layer's output error: ``least_squares`` solves
            for the minimum, ``adam`` takes the 25 steps of the released code.
        rounds: further passes that choose all indices anew for the updated codebooks; the best pass is kept.
        damping: relative damping of the Hessian's diagonal.
    """

    scale_norm: Literal["max", "rms"] = "rms"
    refresh: bool = True
    init: Seeding = "kmeans++"
    metric: Literal["block", "diagonal", "none"] = "block"
    exact_feedback: bool = True
    iterations: int = 30
    update: Literal["least_squares", "adam", "none"] = "least_squares"
    rounds: int = 1
    damping: float = 0.01


def check_row_options(algorithm: Any) -> None:
    """Refuse :class:`RowOptions` of a method that have no meaning.

    Raises:
        UsageError: what was wanted and given.
    """
    for option, choices in (
        ("scale_norm", ("max", "rms")),
        ("init", ("mahalanobis", "kmeans++")),
        ("metric", ("block", "diagonal", "none")),
        ("update", ("least_squares", "adam", "none")),
        ("refresh", (True, False)),
        ("exact_feedback", (True, False)),
    ):
        check_choice(algorithm, option, choices)
    for option, least in (("iterations", 1), ("rounds", 0)):
        value = getattr(algorithm, option)
        if type(value) is not int or value < least:
            raise UsageError(f"{algorithm.name}: {option} wanted a whole number >= {least}, got {value!r}")
    check_damping(algorithm)


def check_choice(algorithm: Any, option: str, choices: Sequence[Any]) -> None:
    """Refuse an option that is none of the choices, types included."""
    value = getattr(algorithm, option)
    if not any(value is choice or (type(value) is type(choice) and value == choice) for choice in choices):
        raise UsageError(f"{algorithm.name}: {option} wanted one of {', '.join(map(str, choices))}; got {value!r}")


class RowCoder:
    """What is known about a matrix while it is quantized: codebooks, scales and codes, as they will be stored."""

    def __init__(self, options: RowOptions, problem: Problem) -> None:
        self.options, self.weight, self.layout, self.name = options, problem.weight, problem.layout, problem.name
        self.hessian, self.generator = problem.statistics, problem.generator
        layout, device = self.layout, self.weight.device
        assert layout.tile is not None
        self.v = layout.vector_length
        self.tile_rows, self.tile_columns = min(layout.tile[0], layout.shape[0]), layout.tile[1]
        self.factor = factorize(self.hessian, self.name, options.damping)
        self.roots = self._roots()
        rows, vectors = layout.index_shape
        k = 1 << layout.stages[0]
        self.codes = torch.zeros(rows, vectors, dtype=torch.int64, device=device)
        # ``books`` as fitted, ``used`` as their stored form decodes.
        self.books = torch.zeros(*layout.books_shape, k, self.v, device=device)
        self.used = torch.zeros_like(self.books)
        self.tile_of_row = torch.arange(rows, device=device) // self.tile_rows
        self.block = layout.block_scale.columns if layout.block_scale else 0
        if layout.block_scale:
            blocks = -(-layout.shape[1] // self.block)
            self.scale_codes = torch.zeros(blocks, rows, dtype=torch.int64, device=device)
            side = layout.tensors()["block_scale_low"][0]
            self.scale_low = torch.zeros(blocks, dtype=side, device=device)
            self.scale_step = torch.zeros(blocks, dtype=side, device=device)
            self.scales = torch.ones(rows, blocks, device=device)

    def _roots(self) -> Tensor | None:
        if self.options.metric == "none":
            columns = self.layout.shape[1]
            if columns % self.v == 0:
                return None
            # Identities, but for the padding of the last vector, which must not count.
            identity = torch.eye(columns, device=self.weight.device)
            return block_roots(Factor(identity, torch.ones_like(identity[0]), 0.0), self.v)
        roots = block_roots(self.factor, self.v, diagonal=self.options.metric == "diagonal")
        dead = functional.pad(dead_columns(self.hessian), (0, roots.shape[0] * self.v - self.hessian.shape[0]))
        return torch.where(dead.view(-1, self.v, 1), roots * _DEAD, roots)

    # ---------------------------------------------------------------- the whole job

    def run(self) -> dict[str, Tensor]:
        """All passes; returns the tensors of the layout, the bias apart."""
        best = None
        # Codebooks that are not updated would only be given the same codes again.
        rounds = 0 if self.options.update == "none" else self.options.rounds
        for number in range(rounds + 1):
            loss = self._pass(fits=number == 0)
            loss = self._update(loss)
            if best is None or loss < best[0]:
                best = (loss, self._state())
        assert best is not None
        self._restore(best[1])
        tensors = {"indices": pack_codes(self.layout, [self.codes])}
        if self.layout.codebook_rank:
            tensors = self._low_rank()
        else:
            tensors |= store_codebooks(self.layout, 0, self.books.flatten(0, 1), f"{self.name}: codebooks")
        if self.layout.block_scale:
            tensors["block_scale_code"] = pack(self.scale_codes, self.layout.block_scale.log2_bits)
            tensors |= {"block_scale_low": self.scale_low, "block_scale_step": self.scale_step}
        return tensors

    def _state(self) -> dict[str, Tensor]:
        names = (
            "codes",
            "books",
            "used",
            *(("scale_codes", "scale_low", "scale_step", "scales") if self.block else ()),
        )
        return {name: getattr(self, name).clone() for name in names}

    def _restore(self, state: dict[str, Tensor]) -> None:
        for name, tensor in state.items():
            setattr(self, name, tensor)

    def _pass(self, fits: bool) -> float:
        """Choose all codes from left to right; with ``fits``, fit each codebook when its columns begin."""
        # Fits of codebooks and scales look at all of their columns, so these stay together while compensation is lazy.
        span = max(self.tile_columns, self.block)
        lazy = span * max(_LAZY // span, 1) if span <= _WIDEST_LAZY else _LAZY

        def quantize(values: Tensor, position: int, upcoming: Tensor) -> Tensor:
            if position % self.tile_columns == 0 and fits:
                self._fit(position // self.tile_columns, upcoming)
            if self.block and position % self.block == 0 and self.options.refresh:
                self._fit_scales(position // self.block, upcoming, position)
            return self._encode(values, position)

        quantized, _ = error_feedback(
            self.weight, self.factor, quantize, self.v, lazy, exact=self.options.exact_feedback
        )
        return output_loss(self.weight, quantized, self.hessian)

    # ---------------------------------------------------------------- one vector column, one codebook, one scale

    def _encode(self, values: Tensor, position: int) -> Tensor:
        width = values.shape[1]
        column, group = position // self.v, position // self.tile_columns
        scale = self.scales[:, position // self.block].unsqueeze(1) if self.block else None
        points = values if scale is None else values / scale
        if width < self.v:
            points = functional.pad(points, (0, self.v - width))
        books = self.used[:, group]
        root = None if self.roots is None else self.roots[column]
        codes = nearest_tiles(points, books, self.tile_rows, root)
        self.codes[:, column] = codes
        decoded = books[self.tile_of_row, codes][:, :width]
        return decoded if scale is None else decoded * scale

    def _ahead(self, start: int, width: int, upcoming: Tensor, position: int) -> Tensor:
        """Columns from ``start`` on with all the compensation that is known at ``position``."""
        values = self.weight[:, start : start + width].clone()
        known = upcoming[:, start - position :][:, : values.shape[1]]
        values[:, : known.shape[1]] = known
        return values

    def _fit(self, group: int, upcoming: Tensor) -> None:
        start = group * self.tile_columns
        values = self._ahead(start, self.tile_columns, upcoming, start)
        weights = None
        vectors = -(-values.shape[1] // self.v)
        if self.block:
            for block in range(-(-start // self.block), -(-(start + values.shape[1]) // self.block)):
                self._fit_scales(block, upcoming, start)
            which = torch.arange(start, start + values.shape[1], device=values.device) // self.block
            values = values / self.scales[:, which]
            # Only ratios matter; unlike the scales themselves, they have squares that float32 can hold.
            weights = self.scales[:, which[:: self.v]]
            weights = (weights / weights.amax()).square()
        points = functional.pad(values, (0, vectors * self.v - values.shape[1])).view(-1, vectors, self.v)
        column = start // self.v
        books = fit_tiles(
            points,
            self.books.shape[2],
            self.tile_rows,
            generator=self.generator,
            roots=None if self.roots is None else self.roots[column : column + vectors],
            weights=weights,
            seeding=self.options.init,
            iterations=self.options.iterations,
        )
        self.books[:, group] = books
        self.used[:, group] = self._as_stored(books)

    def _as_stored(self, books: Tensor) -> Tensor:
        """Codebooks [n, k, v] as their stored form decodes; low-rank ones are rounded at the end."""
        if self.layout.codebook_rank:
            return books
        return decode_codebooks(self.layout, 0, store_codebooks(self.layout, 0, books, f"{self.name}: codebooks"))

    def _fit_scales(self, block: int, upcoming: Tensor, position: int) -> None:
        """log2 scales of a block of columns: 16 steps between the smallest and the largest of all rows."""
        assert self.layout.block_scale is not None
        values = self._ahead(block * self.block, self.block, upcoming, position)
        bits = self.layout.block_scale.log2_bits
        size = values.abs().amax(dim=1)
        if self.options.scale_norm == "rms":
            # Relative to the largest magnitude: squares of very large or small weights are beyond float32.
            share = values / torch.where(size > 0, size, 1).unsqueeze(1)
            size = size * share.square().mean(dim=1).sqrt()
        log = torch.log2(size.clamp(min=torch.finfo(torch.float32).tiny))
        live = log[size > 1e-30]
        low, high = (live.amin(), live.amax()) if live.numel() else (log.new_zeros(()), log.new_zeros(()))
        top = (1 << bits) - 1
        self.scale_low[block] = low
        self.scale_step[block] = (high - low) / top
        step = self.scale_step[block].float()
        codes = ((log - self.scale_low[block].float()) / torch.where(step > 0, step, 1)).round().clamp(0, top).long()
        self.scale_codes[block] = codes
        table = log2_scale_table(self.scale_low[block : block + 1], self.scale_step[block : block + 1], bits)
        self.scales[:, block] = table[0, codes]

    # ---------------------------------------------------------------- updates of the codebooks

    def _chart(self) -> BookMap:
        k = self.books.shape[2]
        columns = torch.arange(self.codes.shape[1], device=self.codes.device) * self.v // self.tile_columns
        book = self.tile_of_row.unsqueeze(1) * self.books.shape[1] + columns
        scale = None
        if self.block:
            which = torch.arange(self.layout.shape[1], device=self.codes.device) // self.block
            scale = self.scales[:, which]
        return BookMap(book * k + self.codes, scale, self.layout.shape[1])

    def _update(self, loss: float) -> float:
        """Improve the codebooks for the chosen codes; keeps the old ones, and returns ``loss``, if that fails."""
        if self.options.update == "none":
            return loss
        chart, flat = self._chart(), self.used.reshape(-1, self.v)
        if self.options.update == "least_squares":
            books = least_squares(flat, chart, self.weight, self.hessian)
        else:
            (books,) = adam([flat], lambda values: values, chart, self.weight, self.hessian)
        if not bool(torch.isfinite(books).all()):
            return loss
        books = books.view_as(self.books)
        used = self._as_stored(books.flatten(0, 1)).view_as(books)
        after = output_loss(self.weight, chart.expand(used.view(-1, self.v)), self.hessian)
        if not after < loss:
            return loss
        self.books, self.used = books, used
        return after

    def _low_rank(self) -> dict[str, Tensor]:
        """Replace the codebooks of scalars by a basis and coefficients (Section 3.3: entries sorted, then SVD)."""
        rank, k = self.layout.codebook_rank, self.books.shape[2]
        table = self.books.reshape(-1, k).sort(dim=1).values
        left, size, right = torch.linalg.svd(table.double(), full_matrices=False)
        coefficients, basis = (left * size).float(), right.float()
        # Fewer codebooks than the rank asked for: the rest of the basis is zero.
        missing = max(rank - coefficients.shape[1], 0)
        coefficients = functional.pad(coefficients[:, :rank], (0, missing))
        basis = functional.pad(basis[:rank], (0, 0, 0, missing))

        def decode(coefficients: Tensor, basis: Tensor) -> Tensor:
            return (coefficients @ basis).reshape(-1, 1)

        self.used = decode(coefficients, basis).view_as(self.books)
        self._pass(fits=False)
        if self.options.update != "none":
            coefficients, basis = adam([coefficients, basis], decode, self._chart(), self.weight, self.hessian)
        tensors = store_low_rank(self.layout, coefficients, basis.view(rank, k, 1), self.name)
        self.used = decode_codebooks(self.layout, 0, tensors).view_as(self.books)
        self._pass(fits=False)
        return {"indices": pack_codes(self.layout, [self.codes]), **tensors}
