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
from qkern.kernels.dispatch import Config
from qkern.kernels.launch import Weight
from qkern.kernels.vector_product import store_tokens, sums_of_tokens

# Tokens of a launch at most: each has its own sums in registers.
MOST_TOKENS = 4


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
    sums0, sums1, sums2, sums3 = sums_of_tokens(
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
        sums0,
        sums1,
        sums2,
        sums3,
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
