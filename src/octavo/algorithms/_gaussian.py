"""The coder of universal codebooks: the codes and scales of one matrix, as they will be stored."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from octavo.codebooks import get as get_codebook
from octavo.layout import DTYPES, Layout
from octavo.math.additive import nearest_additive
from octavo.math.hessian import exact_float32
from octavo.math.pack import pack
from octavo.math.tiles import nearest_tiles
from octavo.stored import log2_scale_table, pack_codes, to_stored

#: Rows without any weight get scales this much below the largest.
_RANGE = 2.0**-16
#: The largest scale where there is no weight at all: what is decoded with it vanishes beside any weights.
_NOTHING = 2.0**-100


class GaussianCoder:
    """Codes of a matrix with a universal codebook, scales along its rows.

    Attributes:
        scales: [out, blocks] as they decode.
        roots: [vectors, width, width]: the metric of every block of columns during error feedback.
    """

    scales: Tensor
    roots: Tensor

    def __init__(self, layout: Layout, beam: int, device: torch.device, name: str) -> None:
        assert layout.block_scale is not None
        self.layout, self.beam, self.name = layout, beam, name
        # Error feedback calls with torch confined to one thread, and the search is worth more.
        self.threads = torch.get_num_threads()
        self.v, self.scale_columns = layout.vector_length, layout.block_scale.columns
        book = get_codebook(layout.codebook)
        books = [book.centroids(stage) for stage in range(len(book.stages))]
        self.signs = book.sign_bits
        if book.sign_bits:
            # Magnitudes and signs are one codebook, written out; its index is sign bits above, magnitude below.
            bits = (torch.arange(1 << self.v).unsqueeze(1) >> torch.arange(self.v)) & 1
            books = [((1 - 2 * bits.float()).unsqueeze(1) * books[0]).reshape(-1, self.v)]
        self.books = [centroids.to(device) for centroids in books]
        self.codes = torch.zeros(len(books), *layout.index_shape, dtype=torch.int64, device=device)
        self._stored: dict[str, Tensor] = {}

    # ---------------------------------------------------------------- scales

    def fit_scales(self, values: Tensor) -> None:
        """Scales that give every row, or block of it, the source's variance."""
        # Squares of very large and very small weights leave the range of float32.
        squares = functional.pad(values.double().square(), (0, -values.shape[1] % self.scale_columns))
        total = squares.view(values.shape[0], -1, self.scale_columns).sum(dim=2)
        counts = torch.full((total.shape[1],), float(self.scale_columns), device=values.device)
        counts[-1] -= -values.shape[1] % self.scale_columns
        self._store_scales((total / counts).sqrt().float())

    def refit_scales(
        self, weight: Tensor, weight_image: Tensor, quantized: Tensor, hessian: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scales that minimise tr((W - Q) H (W - Q)^T) with all codes fixed, block after block.

        They stay as they are if rounding them to their grid costs more than they gain.

        Args:
            weight_image: W H, which is the same every time: products with H are most of what this takes.

        Returns:
            the new Q and (W - Q) H for it.
        """
        before, stored = self.scales, self._stored
        factors = torch.ones_like(before)
        with exact_float32():
            image = quantized @ hessian
            pull = weight_image - image
            loss = (pull * (weight - quantized)).sum(dtype=torch.float64)
            moved = pull
            for block in range(before.shape[1]):
                part = slice(block * self.scale_columns, (block + 1) * self.scale_columns)
                mine = quantized[:, part]
                if before.shape[1] > 1:
                    image = mine @ hessian[part]
                curvature = (image[:, part] * mine).sum(dim=1)
                step = torch.where(curvature > 0, (moved[:, part] * mine).sum(dim=1) / curvature, 0.0)
                # A scale never changes its sign, nor leaps.
                step = step.nan_to_num(0.0, 0.0, 0.0).clamp(-0.5, 1.0)
                factors[:, block] += step
                if block + 1 < before.shape[1]:
                    moved = moved - step.unsqueeze(1) * image
            self._store_scales(before * factors)
            ratio = self.scales / before
            refitted = quantized * self._along(ratio)[:, : weight.shape[1]]
            refitted_image = image * ratio if before.shape[1] == 1 else refitted @ hessian
            refitted_pull = weight_image - refitted_image
            if bool((refitted_pull * (weight - refitted)).sum(dtype=torch.float64) > loss):
                self.scales, self._stored = before, stored
                return quantized, pull
        return refitted, refitted_pull

    def _store_scales(self, scales: Tensor) -> None:
        block = self.layout.block_scale
        assert block is not None
        top = scales.amax(dim=0)
        top = torch.where(top > 0, top, _NOTHING)
        logs = torch.maximum(scales, top * _RANGE).log2().T
        dtype = DTYPES[self.layout.side_dtype]
        low = to_stored(logs.amin(dim=1), dtype, f"{self.name}: scales")
        # Rounded up, so that the largest scale is in reach.
        span = (logs.amax(dim=1) - low.float()).clamp(min=0) / ((1 << block.log2_bits) - 1) * (1 + 2.0**-7)
        step = span.to(dtype)  # It may vanish: then all scales are as good as equal.
        width = torch.where(step > 0, step.float(), torch.ones_like(span)).unsqueeze(1)
        codes = ((logs - low.float().unsqueeze(1)) / width).round().clamp(0, (1 << block.log2_bits) - 1).long()
        self._stored = {
            "block_scale_code": pack(codes, block.log2_bits),
            "block_scale_low": low,
            "block_scale_step": step,
        }
        self.scales = log2_scale_table(low, step, block.log2_bits).gather(1, codes).T.contiguous()

    def _along(self, scales: Tensor) -> Tensor:
        """[out, >= in]: a value per scale, repeated over its columns."""
        return scales.repeat_interleave(self.scale_columns, dim=1)

    # ---------------------------------------------------------------- codes

    def feed(self, values: Tensor, position: int, upcoming: Tensor) -> Tensor:
        """Quantize a block of columns [out, width]; a :data:`octavo.math.feedback.BlockQuantizer`."""
        root = self.roots[position // self.roots.shape[1]] if self.layout.direction == "row" else None
        codes, decoded = self._nearest(values, position, root)
        self.codes[:, *self._place(position)] = codes
        return decoded

    def choose(self, targets: Tensor, position: int, root: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """A :data:`octavo.math.descent.Chooser`."""
        if self.layout.direction == "row":
            codes, decoded = self._nearest(targets, position, root)
        else:
            codes, decoded = self._nearest(targets, position, None)
        place = self.codes[:, *self._place(position)]

        def take(gains: Tensor) -> Tensor:
            # A vector changes as a whole, and changes nothing that is better as it is.
            length = 1 if self.layout.direction == "row" else self.v
            vectors = functional.pad(gains, (0, -gains.numel() % length)).view(-1, length).sum(dim=1) > 0
            place[...] = torch.where(vectors, codes, place)
            return vectors.repeat_interleave(length)[: gains.numel()]

        return decoded, take

    def _place(self, position: int) -> tuple[slice, int]:
        """Where in the index matrix the codes of the block at a column are."""
        return slice(None), position // self.v if self.layout.direction == "row" else position

    def _nearest(self, values: Tensor, position: int, root: Tensor | None) -> tuple[Tensor, Tensor]:
        """Codes [stages, vectors] of a block of columns [out, width] and what they decode to."""
        out, width = values.shape
        scale = self.scales[:, position // self.scale_columns].unsqueeze(1)
        points = values / scale
        if self.layout.direction == "column":
            points = functional.pad(points.T, (0, -out % self.v)).reshape(-1, self.v)
        elif width < self.v:
            points = functional.pad(points, (0, self.v - width))
            if root is not None and root.shape[0] < self.v:
                spare = self.v - root.shape[0]
                root = functional.pad(root, (0, spare, 0, spare))
                root.diagonal()[-spare:] = 1e-3 * root.diagonal()[:-spare].mean()
        points = points.contiguous()
        if self.signs:
            codes = nearest_tiles(points, self.books[0].unsqueeze(0), points.shape[0], root).unsqueeze(1)
        else:
            codes = nearest_additive(points, self.books, root, self.beam, self.threads)
        decoded = self.books[0].index_select(0, codes[:, 0])
        for stage in range(1, len(self.books)):
            decoded = decoded + self.books[stage].index_select(0, codes[:, stage])
        if self.layout.direction == "column":
            decoded = decoded.reshape(1, -1)[:, :out].T
        return codes.T, decoded[:, :width] * scale

    # ---------------------------------------------------------------- result

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is stored, the transform's signs and the bias excepted."""
        parts = list(self.codes)
        if self.signs:
            bits = self.layout.stages[0]
            parts = [parts[0] & ((1 << bits) - 1), parts[0] >> bits]
        return self._stored | {"indices": pack_codes(self.layout, parts)}
