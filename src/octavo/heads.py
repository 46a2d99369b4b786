"""VQHead: an output head made of quantized matrices, of codewords that tokens share (VQ-Logits), or of both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from octavo import compiled
from octavo._core.errors import FormatError, UsageError
from octavo.formats.head import CLASSES, HeadLayout
from octavo.layout import Layout
from octavo.math.pack import pack, unpack
from octavo.nn import LazyMatrix, VQLinear

#: Up to so many inputs at a time, candidates are scored one by one; beyond, a product with all rows is faster.
_FEW = 4
#: Codewords whose tokens are scored together in search of the certified largest logits.
_VISITED = 16


class VQHead(nn.Module):
    """Logits of a model's head, stored as a :class:`HeadLayout` says; for inference only.

    Without parts the logit of a token is that of its codeword, ``codes[map[token]] . h``: tokens of one codeword tie.
    With parts it is the quantized row's, and with codewords beside them as many as :attr:`candidates` tokens, those of
    the codewords with the largest logits, get theirs from their rows and all others from their codewords.

    Args:
        layout: what there is.
        parts: layouts of the matrices below it, by name.
        device: where the (uninitialised) buffers are made.

    Attributes:
        candidates: tokens that are scored by their rows; 0 for all. Whole codewords are taken until there are enough.
    """

    def __init__(
        self, layout: HeadLayout, parts: Mapping[str, Layout], device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.layout = layout
        self.in_features, self.out_features = layout.width, layout.tokens
        self.candidates = 0
        for name in layout.parts:
            self.add_module(name, VQLinear(parts[name], device))
        for name, (dtype, shape) in layout.tensors().items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device))
        self._dense_dtype = torch.get_default_dtype()
        self._derived: tuple[Any, _Places] | None = None

    # ---------------------------------------------------------------- what is stored

    @property
    def parts(self) -> list[VQLinear]:
        """The matrices, in the order of :attr:`HeadLayout.parts`."""
        return [self.get_submodule(name) for name in self.layout.parts]  # type: ignore[misc]

    @property
    def layouts(self) -> dict[str, Layout]:
        """Layouts of the parts by name."""
        return {name: part.layout for name, part in zip(self.layout.parts, self.parts, strict=True)}

    @property
    def token_codes(self) -> Tensor:
        """The codeword of every token, int64 [tokens]."""
        return self._places().codes

    @property
    def places(self) -> Tensor:
        """The row of every token in the parts one after the other, int64 [tokens]."""
        return self._places().rows

    @property
    def bytes_per_state(self) -> int:
        """What the logits of one state read of the stored tensors; of a candidate its share of a part."""
        rows = sum(part.layout.bits() // 8 for part in self.parts)
        if not self.layout.codes:
            return rows
        shared = self._buffer("codes").nbytes + self._buffer("map").nbytes
        if self.candidates and self.layout.parts:
            return shared + rows * min(self.candidates, self.out_features) // self.out_features
        return rows or shared

    def validate(self, where: str) -> None:
        """Check what no header tells; the parts have been checked.

        Raises:
            FormatError: classes of other sizes than the matrices, codewords that are not finite or not there.
        """
        if self.layout.parts == CLASSES:
            found, wanted = int(unpack(self._buffer("classes"), 1, self.out_features).sum()), self.parts[0].out_features
            if found != wanted:
                raise FormatError(f"{where}: classes names {found} frequent tokens, their matrix has {wanted} rows.")
        if self.layout.codes:
            if not bool(torch.isfinite(self._buffer("codes")).all()):
                raise FormatError(f"{where}: codes holds NaN or infinity. The file is damaged; fetch it again.")
            if int(unpack(self._buffer("map"), self.layout.map_bits, self.out_features).max()) >= self.layout.codes:
                raise FormatError(f"{where}: map names a codeword beyond the {self.layout.codes} that there are.")

    # ---------------------------------------------------------------- logits

    def forward(self, x: Tensor) -> Tensor:
        """Logits [.., tokens] of states [.., width], in the dtype of ``x``."""
        if torch.compiler.is_exporting():
            return self.multiply_decoded(x)
        if torch.compiler.is_compiling():
            wants_gradient = x.requires_grad and torch.is_grad_enabled()
            number = compiled.number_of(self, packed=not wants_gradient)
            return compiled.linear(x, number, self.layout.tokens, wants_gradient)
        return self.multiply(x)

    def multiply_decoded(self, x: Tensor) -> Tensor:
        """:meth:`forward` without candidates, in plain torch, through which gradients pass."""
        return functional.linear(x, self.dequantize().to(x.dtype))

    def prepared(self) -> None:
        """Make what the next call would make: packed parts, and where tokens are."""
        self._places()
        for part in self.parts:
            part.prepared()

    def multiply(self, x: Tensor) -> Tensor:
        """:meth:`forward` outside of graphs."""
        if not self.layout.parts:
            return self._by_codes(x).index_select(-1, self._places().codes)
        if not self.candidates or not self.layout.codes or self.candidates >= self.out_features:
            return self._by_rows(x)
        rows = x.flatten(0, -2) if x.ndim > 1 else x.unsqueeze(0)
        scored = self._few(rows) if len(rows) <= _FEW else self._many(rows)
        return scored.view(*x.shape[:-1], self.out_features)

    def code_logits(self, x: Tensor) -> Tensor:
        """Logits [.., codes] of the codewords, in the dtype of ``x``."""
        return self._by_codes(x)

    def _by_codes(self, x: Tensor) -> Tensor:
        return functional.linear(x, self._places().table(self._buffer("codes"), x.dtype))

    def _by_rows(self, x: Tensor) -> Tensor:
        logits = [part(x) for part in self.parts]
        return logits[0] if len(logits) == 1 else torch.cat(logits, dim=-1).index_select(-1, self._places().rows)

    def _few(self, x: Tensor) -> Tensor:
        """States [n, width] one after the other: only candidates meet their rows."""
        places, scores = self._places(), self._by_codes(x)
        logits = scores.index_select(1, places.codes)
        for state, score, row in zip(x, scores, logits, strict=True):
            order = score.argsort(descending=True)
            ends = places.sizes[order].cumsum(0)
            tokens = places.members(order[: int((ends < self.candidates).sum()) + 1])
            row[tokens] = self.rows_times(tokens, state).to(row.dtype)
        return logits

    def _many(self, x: Tensor) -> Tensor:
        """The same by products with all rows."""
        places, scores = self._places(), self._by_codes(x)
        order = scores.argsort(dim=1, descending=True)
        sizes = places.sizes[order]
        taken = sizes.cumsum(1) - sizes < self.candidates
        chosen = torch.zeros_like(taken).scatter_(1, order, taken)
        exact = self._by_rows(x)
        return torch.where(chosen.index_select(1, places.codes), exact, scores.index_select(1, places.codes))

    def rows_times(self, tokens: Tensor, x: Tensor) -> Tensor:
        """Logits [n] float32 of some tokens, int64 [n], for one state [width]."""
        if len(self.parts) == 1:
            return self.parts[0].rows_times(tokens, x)
        logits, place = torch.empty(len(tokens), dtype=torch.float32, device=x.device), self._places().rows[tokens]
        first = self.parts[0].out_features
        for part, mine, start in zip(self.parts, (place < first, place >= first), (0, first), strict=True):
            logits[mine] = part.rows_times(place[mine] - start, x)
        return logits

    def top_tokens(self, x: Tensor, k: int) -> tuple[Tensor, Tensor, int]:
        """The k tokens with the largest logits by their rows, for one state [width]: certified, whatever that takes.

        |h . (w - c)| <= |h| r for a row w of codeword c, r being the largest |w - c| of its tokens. Codewords are
        visited by falling c . h + |h| r until that is below the k-th logit found.

        Returns:
            Tokens [k] int64 and their logits [k] float32, falling, and how many tokens were scored.

        Raises:
            UsageError: a head without codewords or without rows, or fewer than k tokens.
        """
        if not self.layout.codes or not self.layout.parts or not 1 <= k <= self.out_features:
            raise UsageError(f"top_tokens wants codewords, rows and k in 1..{self.out_features}, got k = {k}.")
        places, x = self._places(), x.float()
        bounds = self._by_codes(x) + x.norm() * places.radii(self)
        order = bounds.where(places.sizes > 0, -torch.inf).argsort(descending=True)
        tokens, logits = places.codes.new_empty(0), x.new_empty(0)
        best, scored = tokens, 0
        for some in order.split(_VISITED):
            if len(best) == k and float(logits.min()) >= float(bounds[some[0]]):
                break
            fresh = places.members(some)
            scored += len(fresh)
            tokens, values = torch.cat([best, fresh]), torch.cat([logits, self.rows_times(fresh, x)])
            logits, which = values.topk(min(k, len(values)))
            best = tokens[which]
        return best, logits, scored

    # ---------------------------------------------------------------- rows

    @property
    def weight(self) -> Tensor:
        """The dense [tokens, width] matrix, decoded only if it is used and not for its dtype or device."""
        return LazyMatrix(self)  # type: ignore[arg-type]

    def rows(self, index: Tensor) -> Tensor:
        """Rows of the matrix by token, int64 [..]; gives [.., width] in the dtype of a dense layer here."""
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            number = compiled.number_of(self, packed=False)
            return compiled.rows(index, number, self.layout.width, self._dense_dtype)
        return self.decoded_rows(index, self._dense_dtype)

    def decoded_rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """:meth:`rows` in a dtype of the caller's choice."""
        flat = index.reshape(-1)
        if not self.layout.parts:
            rows = self._buffer("codes")[self._places().codes[flat]]
        else:
            place, first = self._places().rows[flat], self.parts[0].out_features
            rows = torch.empty(len(flat), self.in_features, dtype=dtype, device=index.device)
            for part, start in zip(self.parts, (0, first), strict=False):
                mine = (place >= start) & (place < start + part.out_features)
                rows[mine] = part.decoded_rows(place[mine] - start, dtype)
        return rows.to(dtype).view(*index.shape, self.in_features)

    def dequantize(self) -> Tensor:
        """The dense matrix [tokens, width], float32."""
        if not self.layout.parts:
            return self._buffer("codes").float()[self._places().codes]
        return torch.cat([part.vq_weight().dequantize() for part in self.parts])[self._places().rows]

    @torch.no_grad()
    def densify(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """An ordinary linear layer without candidates: the matrix, rounded once to ``dtype`` (default float32)."""
        dense = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        dense.weight = nn.Parameter(self.dequantize().to(dtype or torch.float32), requires_grad=False)
        return dense.train(self.training)

    # ---------------------------------------------------------------- house-keeping

    def extra_repr(self) -> str:
        layout = self.layout
        return f"tokens={layout.tokens}, width={layout.width}, codes={layout.codes}, candidates={self.candidates}"

    def _buffer(self, name: str) -> Tensor:
        buffer = self._buffers[name]
        assert buffer is not None
        return buffer

    def _places(self) -> _Places:
        """What the packed tensors say; worked out anew if one of them was replaced or written to."""
        if torch.compiler.is_exporting():
            return _Places(self)  # A part of the program, not of this module.
        buffers = [self._buffers[name] for name in self.layout.tensors()]
        state = [(id(t), t._version) for t in buffers if t is not None and not t.is_inference()]
        if self._derived is None or self._derived[0] != state:
            with torch.inference_mode(False):  # Later calls may want gradients.
                self._derived = state, _Places(self)
        return self._derived[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_derived": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VQHead:
        """As for :class:`VQLinear`: devices change, stored dtypes never."""
        home = next(iter(self.buffers())).device
        self._dense_dtype = fn(torch.empty(0, dtype=self._dense_dtype, device=home)).dtype
        self._derived = None

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        for part in self.children():
            part._apply(fn, recurse)
        return super()._apply(move, recurse=False)


class _Places:
    """Where tokens are: their rows in the parts one after the other, and their codewords."""

    def __init__(self, head: VQHead) -> None:
        layout = head.layout
        tokens = torch.arange(layout.tokens, device=next(head.buffers()).device)
        self.rows, self.codes, self.sizes = tokens, tokens, tokens
        self._table: Tensor | None = None
        self._radii: Tensor | None = None
        if layout.parts == CLASSES:
            frequent = unpack(head._buffer("classes"), 1, layout.tokens)[0].bool()
            first = head.parts[0].out_features
            self.rows = torch.where(frequent, frequent.cumsum(0) - 1, first - 1 + (~frequent).cumsum(0))
        if layout.codes:
            self.codes = unpack(head._buffer("map"), layout.map_bits, layout.tokens)[0]
            self.sizes = self.codes.new_zeros(layout.codes).scatter_add_(0, self.codes, torch.ones_like(self.codes))
            self._sorted = self.codes.argsort(stable=True)
            self._starts = self.sizes.cumsum(0) - self.sizes

    def radii(self, head: VQHead) -> Tensor:
        """The largest distance of a token's row from its codeword, [codes] float32; decodes all rows once."""
        if self._radii is None:
            distances = (head.dequantize() - head._buffer("codes").float()[self.codes]).norm(dim=1)
            # A little more than float rounding may take away.
            largest = distances.new_zeros(len(self.sizes)).scatter_reduce_(0, self.codes, distances, "amax")
            self._radii = 1.001 * largest
        return self._radii

    def table(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """The codewords in the dtype of the states, converted once."""
        if self._table is None or self._table.dtype != dtype:
            with torch.inference_mode(False):
                self._table = codes.to(dtype)
        return self._table

    def members(self, codes: Tensor) -> Tensor:
        """The tokens of some codewords, one after the other."""
        sizes = self.sizes[codes]
        begins = sizes.cumsum(0) - sizes
        within = torch.arange(int(sizes.sum()), device=codes.device) - begins.repeat_interleave(sizes)
        return self._sorted[self._starts[codes].repeat_interleave(sizes) + within]


def pack_classes(frequent: Tensor) -> Tensor:
    """The stored ``classes`` of a mask [tokens]."""
    return pack(frequent.long().unsqueeze(0), 1)


def pack_map(codes: Tensor, layout: HeadLayout) -> Tensor:
    """The stored ``map`` of codewords [tokens], int64."""
    return pack(codes.unsqueeze(0), layout.map_bits)


def set_candidates(model: Any, candidates: int) -> None:
    """Let a loaded model score so many candidates per position by their rows; 0 for all.

    Raises:
        UsageError: the model's head has no codewords to choose them by.
    """
    head = model.get_output_embeddings()
    if candidates and not (isinstance(head, VQHead) and head.layout.codes and head.layout.parts):
        raise UsageError(
            "candidates need a head with codewords beside its rows; quantize with --head vq --head-bits B --head-codes "
            "K, and load with --decode packed."
        )
    if isinstance(head, VQHead):
        head.candidates = candidates
