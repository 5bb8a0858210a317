"""``y = x W^T + h B^T + bias`` for up to hundreds of tokens: tiles on tensor cores.

    y (M, N) = x (M, K) W (N, K)^T + h (M, r) B (N, r)^T + bias (N,)

W is decoded in registers, once for each tile of tokens, to ``dequantize(q, x.dtype)`` exactly; sums
are fp32 and rounded once. A program computes a tile (BM, BN) of y in steps of BK columns. Programs
of the same rows of W run side by side, so that its codes come from memory once.

The units of a program wait for each other: while it decodes, its tensor cores are idle. So tiles
leave room for two programs on a multiprocessor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkern.kernels import launch
from qkern.kernels.aot import AotSpec, product_specs
from qkern.kernels.dispatch import Config
from qkern.kernels.launch import Weight
from qkern.kernels.product import finish, sum_over_columns


@triton.jit
def _matmul_kernel(
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
    M,
    N,
    K,
    BITS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    LOOKUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RANK: tl.constexpr,
    BR: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    AHEAD: tl.constexpr,
):
    tiles_m = (M + BM - 1) // BM
    m = tl.program_id(0) % tiles_m * BM + tl.arange(0, BM)  # (BM,)
    n = tl.program_id(0) // tiles_m * BN + tl.arange(0, BN)  # (BN,)
    sums = sum_over_columns(
        x_ptr,
        packed_ptr,
        absmax_ptr,
        nested_absmax_ptr,
        offset_ptr,
        tables_ptr,
        m,
        n,
        M,
        N,
        K,
        0,
        K,
        BITS,
        BLOCKSIZE,
        DOUBLE_QUANT,
        LOOKUP,
        BK,
        EVEN_K,
        AHEAD,
    )  # (BM, BN)
    finish(
        sums,
        bias_ptr,
        h_ptr,
        B_ptr,
        y_ptr,
        m,
        n,
        M,
        N,
        N,
        RANK,
        RANK,
        HAS_BIAS,
        RANK,
        BR,
        PRECISION,
    )


def matmul(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    h: Tensor | None,
    lora_B: Tensor | None,
    config: Config,
    out: Tensor,
) -> Tensor:
    """The product, into ``out``; arguments are those of ``qkern.kernels.linear``, checked.

    Args:
        x: (M, K), contiguous, at a multiple of 16 bytes.
        weight: (N, K).
        bias: (N,) or None.
        h: (M, r) or None.
        lora_B: (N, r) or None.
        config: of ``dispatch``; ``split`` is not used.
        out: (M, N) in x's dtype, contiguous.
    """
    M, N = out.shape
    BM, BN, _ = config.tile
    grid = (triton.cdiv(M, BM) * triton.cdiv(N, BN),)
    with torch.cuda.device_of(x):
        _matmul_kernel[grid](
            x,
            *weight.pointers,
            *launch.epilogue(x, bias, h, lora_B),
            out,
            M,
            N,
            weight.in_features,
            **launch.product_constants(x, weight, bias, lora_B, config.tile[2]),
            **tile_constants(config, weight.fmt.bits),
            **launch.EXACT,
        )
    return out


def tile_constants(config: Config, weight_bits: int) -> dict[str, Any]:
    """BM, BN, BK, AHEAD, warps and stages."""
    BM, BN, BK = config.tile
    options = {"num_warps": config.warps, "num_stages": config.stages}
    return {"BM": BM, "BN": BN, "BK": BK, "AHEAD": config.decodes_ahead(weight_bits), **options}


def aot_specs(arch: str) -> Iterator[AotSpec]:
    """Every row of the architecture's table for this kernel."""
    yield from product_specs("matmul", _matmul_kernel, arch)
