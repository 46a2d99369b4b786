"""The Triton kernels of :mod:`octavo.kernels.triton_lookup`; importing this wants Triton."""

from __future__ import annotations

import triton
import triton.language as tl

# pyright: reportMissingImports=false, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false


@triton.jit
def _codes(start, offset, vector, mask, nibbles: tl.constexpr):
    """The codes of a plane for rows that begin at ``start`` [rows, 1] and ``vector`` [1, vectors], int32."""
    if nibbles:
        byte = tl.load(start + offset + vector // 2, mask=mask, other=0).to(tl.int32)
        return (byte >> 4 * (vector % 2)) & 15
    return tl.load(start + offset + vector, mask=mask, other=0).to(tl.int32)


@triton.jit
def _decoded(
    codes, books, row, vector, vectors, padded, row_bytes, rows,
    V: tl.constexpr, STAGES: tl.constexpr, NIBBLES: tl.constexpr, SIGNS: tl.constexpr,
):  # fmt: skip
    """Weights [rows, vectors, V] float32 before scales; bit s of NIBBLES says that codes of plane s have four bits."""
    element = tl.arange(0, V)[None, None, :]
    mask = (row[:, None] < rows) & (vector[None, :] < vectors)
    start = codes + row[:, None].to(tl.int64) * row_bytes
    weights = tl.zeros([row.shape[0], vector.shape[0], V], dtype=tl.float32)
    offset = 0
    for stage in tl.static_range(STAGES):
        code = _codes(start, offset, vector[None, :], mask, (NIBBLES >> stage) & 1)
        weights += tl.load(books + (stage * 256 + code)[:, :, None] * V + element).to(tl.float32)
        offset += padded // (1 + ((NIBBLES >> stage) & 1))
    if SIGNS:
        bits = _codes(start, offset, vector[None, :], mask, (NIBBLES >> STAGES) & 1)
        weights = tl.where((bits[:, :, None] >> element) & 1 != 0, -weights, weights)
    return tl.where(mask[:, :, None], weights, 0.0)


@triton.jit
def one(
    x, codes, books, scales, bias, y, rows, inputs, vectors, padded, row_bytes,
    V: tl.constexpr, STAGES: tl.constexpr, NIBBLES: tl.constexpr, SIGNS: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """y [rows] for one x [inputs], in float32 within; a program has ROWS rows, VECTORS vectors of them at a time."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS], dtype=tl.float32)
    for first in range(0, vectors, VECTORS):
        vector = first + tl.arange(0, VECTORS)
        weights = _decoded(codes, books, row, vector, vectors, padded, row_bytes, rows, V, STAGES, NIBBLES, SIGNS)
        column = vector[:, None] * V + tl.arange(0, V)[None, :]
        values = tl.load(x + column, mask=column < inputs, other=0.0).to(tl.float32)
        total += tl.sum(tl.sum(weights * values[None, :, :], axis=2), axis=1)
    total *= tl.load(scales + row, mask=row < rows, other=0.0)
    if BIAS:
        total += tl.load(bias + row, mask=row < rows, other=0.0)
    tl.store(y + row, total.to(y.dtype.element_ty), mask=row < rows)


@triton.jit
def many(
    x, codes, books, scales, bias, y, count, rows, inputs, vectors, padded, row_bytes,
    V: tl.constexpr, STAGES: tl.constexpr, NIBBLES: tl.constexpr, SIGNS: tl.constexpr, BIAS: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """y [count, rows] for x [count, inputs]; tiles of weights are rounded to the dtype of x and multiplied."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    total = tl.zeros([TOKENS, ROWS], dtype=tl.float32)
    from_token = x + token[:, None].to(tl.int64) * inputs
    for first in range(0, vectors, VECTORS):
        vector = first + tl.arange(0, VECTORS)
        weights = _decoded(codes, books, row, vector, vectors, padded, row_bytes, rows, V, STAGES, NIBBLES, SIGNS)
        weights = tl.reshape(weights, [ROWS, VECTORS * V]).to(x.dtype.element_ty)
        column = first * V + tl.arange(0, VECTORS * V)
        inside = (token[:, None] < count) & (column[None, :] < inputs)
        values = tl.load(from_token + column[None, :], mask=inside, other=0.0)
        total = tl.dot(values, tl.trans(weights), total, input_precision="ieee")
    total *= tl.load(scales + row, mask=row < rows, other=0.0)[None, :]
    if BIAS:
        total += tl.load(bias + row, mask=row < rows, other=0.0)[None, :]
    to = y + token[:, None].to(tl.int64) * rows + row[None, :]
    tl.store(to, total.to(y.dtype.element_ty), mask=(token[:, None] < count) & (row[None, :] < rows))
