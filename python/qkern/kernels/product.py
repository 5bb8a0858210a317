"""Products of tiles: one, a sum of them over in-features, and the adapter's at the end.

    sums = x[m, k0:k1] W[n, k0:k1]^T     W decoded tile by tile, see ``decode``
    y = sums + h[m] B[n]^T + bias[n]     h = s x A^T (M, r), B (N, r); rounded once

x (M, K), W (N, K), row-major. All sums are fp32; their order is fixed by the tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qkern.kernels.decode import (
    decode,
    decode_scales,
    load_codes,
    load_offset,
    load_scales,
    open_table,
)
from qkern.kernels.rounding import round_to
from qkern.kernels.thin_product import multiply, multiply_thin


@triton.jit
def sum_over_columns(
    x_ptr,
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    offset_ptr,
    tables_ptr,
    m,  # (BM,) int32, rows of x
    n,  # (BN,) int32, rows of W
    M,
    N,
    K,
    start,
    end,
    BITS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    LOOKUP: tl.constexpr,
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """fp32 (BM, BN): the products over columns start to end, multiples of BK or K.

    Codes and scales are loaded one step ahead into registers, x by the pipeline of the loop. 8-bit
    scales are loaded two ahead unless AHEAD, and looked up in between: that pipeline would copy
    their table as well if a step both looked up and multiplied.

    AHEAD: the next tile is decoded at the end of a step, so that W is carried from step to step.
    That takes registers, and is not needed for wgmma, whose right operand lies in shared memory.
    For mma it is: there Triton chooses a layout that ``ldmatrix`` cannot load if it sees, within
    the loop, that W was joined from halves.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    rows = n.to(tl.int64)
    table = open_table(tables_ptr, LOOKUP)
    offset = load_offset(offset_ptr, DOUBLE_QUANT)
    x_row = x_ptr + m.to(tl.int64)[:, None] * K  # (BM, 1)
    x_mask = (m < M)[:, None]  # (BM, 1)
    column = tl.arange(0, BK)
    sums = tl.full([m.shape[0], n.shape[0]], 0.0, tl.float32)  # (BM, BN)
    row_mask = n < N  # (BN,)
    # A scalar condition is spread by hand: the interpreter mistakes one for a number.
    zeros = tl.full([n.shape[0]], 0, tl.int32)  # (BN,)
    valid = row_mask & (zeros + start < end)  # none beyond the last step
    codes = load_codes(packed_ptr, rows, valid, start, K, BK, BITS, EVEN_K)  # (BN, C)
    absmax, nested = load_scales(
        absmax_ptr, nested_absmax_ptr, rows, valid, start, K, BK, BLOCKSIZE, DOUBLE_QUANT
    )  # (BN, blocks)
    scales = decode_scales(absmax, nested, tables_ptr, offset, BK, BITS, DOUBLE_QUANT)
    if AHEAD:
        w = decode(codes, scales, table, BITS, LOOKUP, DTYPE)  # (BN, BK)
    else:
        if DOUBLE_QUANT:
            valid = row_mask & (zeros + (start + BK) < end)
            absmax, nested = load_scales(
                absmax_ptr, nested_absmax_ptr, rows, valid, start + BK, K, BK, BLOCKSIZE, True
            )
    for k in range(start, end, BK):
        mask = x_mask
        if not EVEN_K:
            mask = mask & (k + column < K)[None, :]
        x = tl.load(x_row + (k + column)[None, :], mask=mask, other=0.0)  # (BM, BK)
        if not AHEAD:
            w = decode(codes, scales, table, BITS, LOOKUP, DTYPE)  # (BN, BK)
        valid = row_mask & (zeros + (k + BK) < end)
        codes = load_codes(packed_ptr, rows, valid, k + BK, K, BK, BITS, EVEN_K)
        at = k + BK
        if DOUBLE_QUANT and not AHEAD:
            scales = decode_scales(absmax, nested, tables_ptr, offset, BK, BITS, True)
            at = k + 2 * BK
            valid = row_mask & (zeros + at < end)
        absmax, nested = load_scales(
            absmax_ptr, nested_absmax_ptr, rows, valid, at, K, BK, BLOCKSIZE, DOUBLE_QUANT
        )
        if not DOUBLE_QUANT:
            scales = decode_scales(absmax, nested, tables_ptr, offset, BK, BITS, False)
        sums = multiply(x, tl.trans(w), sums)  # type: ignore[possibly-undefined]
        if AHEAD:
            if DOUBLE_QUANT:
                scales = decode_scales(absmax, nested, tables_ptr, offset, BK, BITS, True)
            w = decode(codes, scales, table, BITS, LOOKUP, DTYPE)
    return sums


@triton.jit
def add_adapter(
    sums,  # (BM, BN) fp32
    h_ptr,
    B_ptr,
    m,  # (BM,) int32
    n,  # (BN,) int32
    M,
    N,
    width,
    rank,
    RANK: tl.constexpr,
    BR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``sums + h[m] B[n]^T``, multiplied as ``thin_product`` says.

    A row of h has ``width`` values, of which the first ``rank`` count, a row of B ``rank``; at most
    RANK.
    """
    for r in tl.static_range(0, RANK, BR):
        column = r + tl.arange(0, BR)  # (BR,)
        inside = (column < rank)[None, :]
        at_h = m.to(tl.int64)[:, None] * width + column[None, :]
        at_B = n.to(tl.int64)[:, None] * rank + column[None, :]
        h = tl.load(h_ptr + at_h, mask=(m < M)[:, None] & inside, other=0.0)
        B = tl.load(B_ptr + at_B, mask=(n < N)[:, None] & inside, other=0.0)
        sums = multiply_thin(h, tl.trans(B), sums, PRECISION)
    return sums


@triton.jit
def finish(
    sums,  # (BM, BN) fp32
    bias_ptr,
    h_ptr,
    B_ptr,
    y_ptr,
    m,  # (BM,) int32
    n,  # (BN,) int32
    M,
    N,
    biased,
    width,
    rank,
    HAS_BIAS: tl.constexpr,
    RANK: tl.constexpr,
    BR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the adapter's part and the bias, round, store y (M, N).

    The bias has ``biased`` values (all or none); for the rest see ``add_adapter``.
    """
    sums = add_adapter(sums, h_ptr, B_ptr, m, n, M, N, width, rank, RANK, BR, PRECISION)
    if HAS_BIAS:
        sums += tl.load(bias_ptr + n, mask=n < biased, other=0.0).to(tl.float32)[None, :]
    at = m.to(tl.int64)[:, None] * N + n[None, :]  # (BM, BN)
    y = round_to(sums, y_ptr.dtype.element_ty)
    tl.store(y_ptr + at, y, mask=(m < M)[:, None] & (n < N)[None, :])
