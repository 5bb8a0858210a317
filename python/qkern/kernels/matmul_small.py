"""``y = x W^T + h B^T + bias`` for few tokens: the columns of a tile are shared by programs.

    y (M, N) = x (M, K) W (N, K)^T + h (M, r) B (N, r)^T + bias (N,)

Few tokens make few tiles (BM, BN) of y, too few for all multiprocessors. So SPLIT programs, axis 1
of the grid, each take a range of a tile's columns, and leave their fp32 sums in ``partials``
(SPLIT, M, N). Each counts itself when its part is stored; the last one adds the parts in the order
of the columns, so that the sum is the same in every run, finishes the tile as ``matmul`` does, and
sets the tile's counter back to 0.

W is decoded to ``dequantize(q, x.dtype)`` exactly.
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
from qkern.kernels.matmul import tile_constants
from qkern.kernels.product import finish, sum_over_columns


@triton.jit
def _matmul_small_kernel(
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
    partials_ptr,
    counters_ptr,
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
    tile = tl.program_id(0)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    tiles_m = (M + BM - 1) // BM
    m = tile % tiles_m * BM + tl.arange(0, BM)  # (BM,)
    n = tile // tiles_m * BN + tl.arange(0, BN)  # (BN,)
    steps = (K + BK - 1) // BK
    share = (steps + parts - 1) // parts * BK
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
        part * share,
        min(part * share + share, K),
        BITS,
        BLOCKSIZE,
        DOUBLE_QUANT,
        LOOKUP,
        BK,
        EVEN_K,
        AHEAD,
    )  # (BM, BN)
    at = m.to(tl.int64)[:, None] * N + n[None, :]  # (BM, BN)
    mask = (m < M)[:, None] & (n < N)[None, :]
    plane = tl.cast(M, tl.int64) * N  # M may be the constant 1
    tl.store(partials_ptr + part * plane + at, sums, mask=mask)
    tl.debug_barrier()  # all threads have stored before one counts
    arrived = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel")
    if arrived == parts - 1:
        tl.store(counters_ptr + tile, 0)
        sums = tl.full([BM, BN], 0.0, tl.float32)
        for i in range(parts):  # past L1, which other multiprocessors do not write
            sums += tl.load(
                partials_ptr + i * plane + at, mask=mask, other=0.0, cache_modifier=".cg"
            )
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


def matmul_small(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    h: Tensor | None,
    lora_B: Tensor | None,
    config: Config,
    out: Tensor,
) -> Tensor:
    """The product by ``config.split`` programs a tile; arguments are those of ``matmul``."""
    M, N = out.shape
    BM, BN, _ = config.tile
    tiles = triton.cdiv(M, BM) * triton.cdiv(N, BN)
    with torch.cuda.device_of(x):
        partials = torch.empty((config.split, M, N), dtype=torch.float32, device=x.device)
        _matmul_small_kernel[(tiles, config.split)](
            x,
            *weight.pointers,
            *launch.epilogue(x, bias, h, lora_B),
            out,
            partials,
            launch.counters(x.device, tiles),
            M,
            N,
            weight.in_features,
            **launch.product_constants(x, weight, bias, lora_B, config.tile[2]),
            **tile_constants(config, weight.fmt.bits),
            **launch.EXACT,
        )
    return out


def aot_specs(arch: str) -> Iterator[AotSpec]:
    """Every row of the architecture's table for this kernel."""
    workspace = {"partials_ptr": "*fp32", "counters_ptr": "*i32"}
    yield from product_specs("matmul_small", _matmul_small_kernel, arch, more=workspace)
