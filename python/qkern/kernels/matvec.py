"""``y = x W^T + h B^T + bias`` for 1 to 4 tokens, on ordinary units.

    y (M, N) = x (M, K) W (N, K)^T + h (M, r) B (N, r)^T + bias (N,)

A program computes BN outputs for all tokens in steps of BK columns. A chunk is 32 values of a row,
of one block, in one thread: their codes are multiplied as they are, and the sum by the scale.

    sums[m, n, c] += scale[n, c] * (sum over k in chunk c of code[n, k] x[m, k])

In fp32 throughout: W is never rounded to x's dtype. Each weight is within half an ulp (of fp16 or
bf16 x) of the one that other numbers of tokens multiply, and within two of fp32's: products may be
fused into sums here, those of 8-bit scales too.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkern.kernels import launch
from qkern.kernels.aot import AotSpec, product_specs
from qkern.kernels.decode import (
    decode_absmax,
    load_absmax,
    load_codes,
    load_offset,
    open_table,
    word_values,
)
from qkern.kernels.dispatch import Config
from qkern.kernels.launch import Weight
from qkern.kernels.rounding import round_to

# Tokens of a launch at most: each has its own sums in registers.
MOST_TOKENS = 4
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
    sums,  # four of (BN, CHUNKS) fp32
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
    for i in tl.static_range(TOKENS):
        store_token(
            sums[i],
            bias_ptr,
            h_ptr,
            B_ptr,
            y_ptr,
            first + i,
            n,
            N,
            biased,
            width,
            rank,
            HAS_BIAS,
            RANK,
            BR,
        )


@triton.jit
def _matvec_kernel(
    x_ptr,
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    offset_ptr,
    tables_ptr,
    bias_ptr,
    h_ptr,
    B_ptr,
    y_ptr,
    N,
    K,
    BITS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    LOOKUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RANK: tl.constexpr,
    BR: tl.constexpr,
    EVEN_K: tl.constexpr,
    TOKENS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    n = tl.program_id(0) * BN + tl.arange(0, BN)  # (BN,)
    sums = sums_of_tokens(
        x_ptr,
        packed_ptr,
        absmax_ptr,
        nested_absmax_ptr,
        offset_ptr,
        tables_ptr,
        n,
        N,
        K,
        BITS,
        BLOCKSIZE,
        DOUBLE_QUANT,
        LOOKUP,
        EVEN_K,
        TOKENS,
        BK,
    )
    store_tokens(
        sums,
        bias_ptr,
        h_ptr,
        B_ptr,
        y_ptr,
        n,
        N,
        N,
        RANK,
        RANK,
        HAS_BIAS,
        RANK,
        BR,
        TOKENS,
    )


def matvec(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    h: Tensor | None,
    lora_B: Tensor | None,
    config: Config,
    out: Tensor,
) -> Tensor:
    """The product for at most ``MOST_TOKENS`` rows of x; arguments are those of ``matmul``."""
    M, N = out.shape
    _, BN, BK = config.tile
    constants = launch.product_constants(x, weight, bias, lora_B, BK)
    del constants["PRECISION"]
    with torch.cuda.device_of(x):
        _matvec_kernel[(triton.cdiv(N, BN),)](
            x,
            *weight.pointers,
            *launch.epilogue(x, bias, h, lora_B),
            out,
            N,
            weight.in_features,
            **constants,
            TOKENS=M,
            BN=BN,
            BK=BK,
            num_warps=config.warps,
            num_stages=config.stages,
            **launch.FUSED,
        )
    return out


def aot_specs(arch: str) -> Iterator[AotSpec]:
    """Every row of the architecture's table for this kernel."""
    yield from product_specs("matvec", _matvec_kernel, arch, exact=False)
