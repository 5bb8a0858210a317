"""Products of tiles for dX: a sum over rows of W, and the adapter's at the end.

    sums = dY[m, n0:n1] W[n0:n1, k]      W decoded tile by tile, see ``decode``
    sums + G[m] A[:, k]                  G = s dY B (M, r), A (r, K); only where x was kept

dY (M, N), W (N, K), row-major. All sums are fp32; their order is fixed by the tile. The counterpart
of ``product``.
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
from qkern.kernels.dropout import keep
from qkern.kernels.thin_product import multiply, multiply_thin


@triton.jit
def sum_over_rows(
    sums,  # (BM, BK) fp32
    grad_ptr,
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    offset_ptr,
    tables_ptr,
    m,  # (BM,) int32, rows of dY
    k,  # the first column of W
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
    BN: tl.constexpr,
    EVEN_K: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """``sums`` and the products over rows start to end of W, fp32 (BM, BK).

    Codes are loaded one step ahead, scales two, as in ``product.sum_over_columns``.
    """
    DTYPE: tl.constexpr = grad_ptr.dtype.element_ty
    table = open_table(tables_ptr, LOOKUP)
    offset = load_offset(offset_ptr, DOUBLE_QUANT)
    grad_row = grad_ptr + m.to(tl.int64)[:, None] * N  # (BM, 1)
    n = start + tl.arange(0, BN)  # (BN,)
    codes = load_codes(packed_ptr, n.to(tl.int64), n < end, k, K, BK, BITS, EVEN_K)  # (BN, C)
    absmax, nested = load_scales(
        absmax_ptr,
        nested_absmax_ptr,
        n.to(tl.int64),
        n < end,
        k,
        K,
        BK,
        BLOCKSIZE,
        DOUBLE_QUANT,
    )  # (BN, blocks)
    scales = decode_scales(absmax, nested, tables_ptr, offset, BK, BITS, DOUBLE_QUANT)
    rows = (n + BN).to(tl.int64)
    absmax, nested = load_scales(
        absmax_ptr, nested_absmax_ptr, rows, rows < end, k, K, BK, BLOCKSIZE, DOUBLE_QUANT
    )
    if AHEAD:
        w = decode(codes, scales, table, BITS, LOOKUP, DTYPE)  # (BN, BK)
        scales = decode_scales(absmax, nested, tables_ptr, offset, BK, BITS, DOUBLE_QUANT)
    for first in range(start, end, BN):
        n = first + tl.arange(0, BN)
        mask = (m < M)[:, None] & (n < end)[None, :]
        grad = tl.load(grad_row + n[None, :], mask=mask, other=0.0)  # (BM, BN)
        if not AHEAD:
            w = decode(codes, scales, table, BITS, LOOKUP, DTYPE)  # (BN, BK)
        rows = (n + BN).to(tl.int64)
        codes = load_codes(packed_ptr, rows, rows < end, k, K, BK, BITS, EVEN_K)
        if not AHEAD:
            scales = decode_scales(absmax, nested, tables_ptr, offset, BK, BITS, DOUBLE_QUANT)
        rows = (n + 2 * BN).to(tl.int64)
        absmax, nested = load_scales(
            absmax_ptr, nested_absmax_ptr, rows, rows < end, k, K, BK, BLOCKSIZE, DOUBLE_QUANT
        )
        sums = multiply(grad, w, sums)  # type: ignore[possibly-undefined]
        if AHEAD:
            w = decode(codes, scales, table, BITS, LOOKUP, DTYPE)
            scales = decode_scales(absmax, nested, tables_ptr, offset, BK, BITS, DOUBLE_QUANT)
    return sums


@triton.jit
def add_masked_adapter(
    sums,  # (BM, BK) fp32
    G_ptr,
    A_ptr,
    seed_ptr,
    m,  # (BM,) int32
    first,
    M,
    K,
    threshold,
    gain,
    RANK: tl.constexpr,
    BR: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BK: tl.constexpr,
):
    """``sums + G[m] A[:, k]``, the latter where x was kept."""
    k = first + tl.arange(0, BK)  # (BK,)
    part = sums
    if DROPOUT:
        part = tl.full([m.shape[0], BK], 0.0, tl.float32)
    for r in tl.static_range(0, RANK, BR):
        rank = r + tl.arange(0, BR)  # (BR,)
        at_G = m.to(tl.int64)[:, None] * RANK + rank[None, :]
        at_A = rank.to(tl.int64)[:, None] * K + k[None, :]
        G = tl.load(G_ptr + at_G, mask=(m < M)[:, None] & (rank < RANK)[None, :], other=0.0)
        A = tl.load(A_ptr + at_A, mask=(rank < RANK)[:, None] & (k < K)[None, :], other=0.0)
        part = multiply_thin(G, A, part, PRECISION)
    if DROPOUT:
        kept = keep(tl.load(seed_ptr), m, first, K, threshold, BK)
        return sums + tl.where(kept, part * gain, 0.0)
    else:
        return part
