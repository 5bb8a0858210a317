"""Products of rows of W with few tokens, on ordinary units: their sums, and the end of a tile.

    sums[m, n, c] = sum over k in the chunks c of scale[n, k] code[n, k] x[m, k]

A chunk is 32 values of a row, of one block, in one thread: their codes are multiplied as they are,
and the sum by the scale. The counterpart of ``product``, without rounding W.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qkern.kernels.decode import (
    decode_absmax,
    load_absmax,
    load_codes,
    load_offset,
    open_table,
    word_values,
)
from qkern.kernels.rounding import round_to

_CHUNK = tl.constexpr(32)


@triton.jit
def _load_chunk_scales(
    absmax_ptr,
    nested_absmax_ptr,
    tables_ptr,
    offset,
    rows,  # (BN,) int64
    row_mask,  # (BN,)
    k,
    K,
    BK: tl.constexpr,
    BITS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
):
    """fp32 (BN, BK // 32): the factor of each chunk; 0 or finite where masked."""
    column = k + tl.arange(0, BK // _CHUNK) * _CHUNK  # (CHUNKS,)
    mask = row_mask[:, None] & (column < K)[None, :]  # (BN, CHUNKS)
    if BLOCKSIZE == 0:
        block = rows[:, None] + (column * 0)[None, :]
    else:
        block = rows[:, None] * (K // BLOCKSIZE) + (column // BLOCKSIZE)[None, :]
    absmax, nested = load_absmax(absmax_ptr, nested_absmax_ptr, block, mask, DOUBLE_QUANT)
    scales = decode_absmax(absmax, nested, tables_ptr, offset, DOUBLE_QUANT)
    if BITS == 8:
        scales = scales * 0.007874015718698502  # fp32 of 1 / 127
    return scales


@triton.jit
def _chunk_sums(values, x_ptr, k, K, EVEN_K: tl.constexpr):
    """Products of ``values`` (BN, BK) and one token's x, summed by chunks: (BN, BK // 32)."""
    BN: tl.constexpr = values.shape[0]
    BK: tl.constexpr = values.shape[1]
    column = k + tl.arange(0, BK)  # (BK,)
    if EVEN_K:
        x = tl.load(x_ptr + column).to(tl.float32)
    else:
        x = tl.load(x_ptr + column, mask=column < K, other=0.0).to(tl.float32)
    products = tl.reshape(values * x[None, :], [BN, BK // _CHUNK, _CHUNK])
    return tl.sum(products, axis=2)


@triton.jit
def store_token(
    sums,  # (BN, CHUNKS) fp32
    bias_ptr,
    h_ptr,
    B_ptr,
    y_ptr,
    m,
    n,  # (BN,)
    N,
    biased,
    width,
    rank,
    HAS_BIAS: tl.constexpr,
    RANK: tl.constexpr,
    BR: tl.constexpr,
):
    """Sum one token's chunks, add the adapter's part and the bias, round, store.

    The bias has ``biased`` values (all or none), a row of h ``width``, a row of B ``rank``, at most
    RANK.
    """
    y = tl.sum(sums, axis=1)  # (BN,)
    mask = n < N
    rows = n.to(tl.int64)
    for r in tl.static_range(0, RANK, BR):
        column = r + tl.arange(0, BR)  # (BR,)
        inside = column < rank
        h = tl.load(h_ptr + m * width + column, mask=inside, other=0.0).to(tl.float32)
        at = rows[:, None] * rank + column[None, :]
        B = tl.load(B_ptr + at, mask=mask[:, None] & inside[None, :], other=0.0).to(tl.float32)
        y += tl.sum(h[None, :] * B, axis=1)
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < biased, other=0.0).to(tl.float32)
    tl.store(y_ptr + m.to(tl.int64) * N + n, round_to(y, y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def sums_of_tokens(
    x_ptr,
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    offset_ptr,
    tables_ptr,
    n,  # (BN,) int32, rows of W
    N,
    K,
    BITS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    LOOKUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    TOKENS: tl.constexpr,
    BK: tl.constexpr,
):
    """Four of fp32 (BN, CHUNKS): the sums of each token by chunks; beyond TOKENS they are 0."""
    row_mask = n < N
    rows = n.to(tl.int64)
    table = open_table(tables_ptr, LOOKUP)
    offset = load_offset(offset_ptr, DOUBLE_QUANT)
    sums0 = tl.full([n.shape[0], BK // _CHUNK], 0.0, tl.float32)
    sums1, sums2, sums3 = sums0, sums0, sums0
    for k in range(0, K, BK):
        codes = load_codes(packed_ptr, rows, row_mask, k, K, BK, BITS, EVEN_K)  # (BN, C)
        scales = _load_chunk_scales(
            absmax_ptr,
            nested_absmax_ptr,
            tables_ptr,
            offset,
            rows,
            row_mask,
            k,
            K,
            BK,
            BITS,
            BLOCKSIZE,
            DOUBLE_QUANT,
        )  # (BN, CHUNKS)
        if BITS == 8:
            values = codes.to(tl.float32)
        else:
            values = word_values(codes, table, LOOKUP)  # (BN, BK)
        sums0 += scales * _chunk_sums(values, x_ptr, k, K, EVEN_K)
        if TOKENS > 1:
            sums1 += scales * _chunk_sums(values, x_ptr + K, k, K, EVEN_K)
        if TOKENS > 2:
            sums2 += scales * _chunk_sums(values, x_ptr + 2 * K, k, K, EVEN_K)
        if TOKENS > 3:
            sums3 += scales * _chunk_sums(values, x_ptr + 3 * K, k, K, EVEN_K)
    return sums0, sums1, sums2, sums3


@triton.jit
def store_tokens(
    sums0,  # (BN, CHUNKS) fp32, as the next three
    sums1,
    sums2,
    sums3,
    bias_ptr,
    h_ptr,
    B_ptr,
    y_ptr,
    n,  # (BN,)
    N,
    biased,
    width,
    rank,
    HAS_BIAS: tl.constexpr,
    RANK: tl.constexpr,
    BR: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """``store_token`` of each."""
    first = tl.program_id(0) * 0
    store_token(
        sums0,
        bias_ptr,
        h_ptr,
        B_ptr,
        y_ptr,
        first,
        n,
        N,
        biased,
        width,
        rank,
        HAS_BIAS,
        RANK,
        BR,
    )
    if TOKENS > 1:
        store_token(
            sums1,
            bias_ptr,
            h_ptr,
            B_ptr,
            y_ptr,
            first + 1,
            n,
            N,
            biased,
            width,
            rank,
            HAS_BIAS,
            RANK,
            BR,
        )
    if TOKENS > 2:
        store_token(
            sums2,
            bias_ptr,
            h_ptr,
            B_ptr,
            y_ptr,
            first + 2,
            n,
            N,
            biased,
            width,
            rank,
            HAS_BIAS,
            RANK,
            BR,
        )
    if TOKENS > 3:
        store_token(
            sums3,
            bias_ptr,
            h_ptr,
            B_ptr,
            y_ptr,
            first + 3,
            n,
            N,
            biased,
            width,
            rank,
            HAS_BIAS,
            RANK,
            BR,
        )
