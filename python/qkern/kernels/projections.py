"""``y_i = x W_i^T + h_i B_i^T + bias_i`` of layers that share x, such as q, k and v: one launch.

    y_i (M, N_i) = x (M, K) W_i (N_i, K)^T + h_i (M, r_i) B_i (N_i, r_i)^T + bias_i (N_i,)

The weights stay where they are: arguments are tuples, with an entry for each layer. Tiles of all
y_i are numbered through, so none has columns of two layers, and scales are found within their own
weight: 8-bit ones have an offset and groups of their own. h has all h_i side by side, (M, R), of
``lora.hidden`` in one pass over x. Sums are those of ``matvec``, ``matmul`` and ``matmul_small``: a
config gives the bits that it gives each layer alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkern.errors import ShapeError
from qkern.kernels import launch
from qkern.kernels.aot import AotSpec, member_specs
from qkern.kernels.dispatch import Config
from qkern.kernels.launch import Weight
from qkern.kernels.linear import config_for
from qkern.kernels.matmul import tile_constants
from qkern.kernels.members import (
    adapter_of,
    adapters,
    check_weights,
    filled,
    member_of,
    pick,
    total,
)
from qkern.kernels.product import finish, sum_over_columns
from qkern.kernels.vector_product import store_tokens, sums_of_tokens


@triton.jit
def _vectors_kernel(
    x_ptr,
    packed,
    absmax,
    nested_absmax,
    offset,
    tables_ptr,
    bias,
    h_ptr,
    B,
    y,
    rows,
    ranks,
    K,
    BITS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    LOOKUP: tl.constexpr,
    BIASED: tl.constexpr,
    RANK: tl.constexpr,
    BR: tl.constexpr,
    EVEN_K: tl.constexpr,
    TOKENS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    member, start, _ = member_of(tl.program_id(0), rows, BN)
    n = start + tl.arange(0, BN)  # (BN,)
    N = pick(rows, member)
    sums0, sums1, sums2, sums3 = sums_of_tokens(
        x_ptr,
        pick(packed, member),
        pick(absmax, member),
        pick(nested_absmax, member),
        pick(offset, member),
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
    h_of, width, B_of, rank = adapter_of(h_ptr, B, ranks, member)
    store_tokens(
        sums0,
        sums1,
        sums2,
        sums3,
        pick(bias, member),
        h_of,
        B_of,
        pick(y, member),
        n,
        N,
        tl.where((BIASED >> member) & 1 == 1, N, 0),
        width,
        rank,
        BIASED > 0,
        RANK,
        BR,
        TOKENS,
    )


@triton.jit
def _tiles_kernel(
    x_ptr,
    packed,
    absmax,
    nested_absmax,
    offset,
    tables_ptr,
    bias,
    h_ptr,
    B,
    y,
    partials_ptr,
    counters_ptr,
    rows,
    ranks,
    M,
    K,
    BITS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    LOOKUP: tl.constexpr,
    BIASED: tl.constexpr,
    RANK: tl.constexpr,
    BR: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    AHEAD: tl.constexpr,
):
    tile = tl.program_id(0)
    tiles_m = (M + BM - 1) // BM
    m = tile % tiles_m * BM + tl.arange(0, BM)  # (BM,)
    member, first, before = member_of(tile // tiles_m, rows, BN)
    n = first + tl.arange(0, BN)  # (BN,)
    N = pick(rows, member)
    start = tile * 0
    end = K
    if SPLIT:
        steps = (K + BK - 1) // BK
        share = (steps + tl.num_programs(1) - 1) // tl.num_programs(1) * BK
        start = tl.program_id(1) * share
        end = min(start + share, K)
    sums = sum_over_columns(
        x_ptr,
        pick(packed, member),
        pick(absmax, member),
        pick(nested_absmax, member),
        pick(offset, member),
        tables_ptr,
        m,
        n,
        M,
        N,
        K,
        start,
        end,
        BITS,
        BLOCKSIZE,
        DOUBLE_QUANT,
        LOOKUP,
        BK,
        EVEN_K,
        AHEAD,
    )  # (BM, BN)
    h_of, width, B_of, rank = adapter_of(h_ptr, B, ranks, member)
    biased = tl.where((BIASED >> member) & 1 == 1, N, 0)
    bias_ptr = pick(bias, member)
    y_ptr = pick(y, member)
    if SPLIT:  # as in ``matmul_small``; a row of the parts has the columns of all layers
        parts = tl.num_programs(1)
        columns = total(rows)
        at = m.to(tl.int64)[:, None] * columns + (before + n)[None, :]  # (BM, BN)
        mask = (m < M)[:, None] & (n < N)[None, :]
        plane = tl.cast(M, tl.int64) * columns
        tl.store(partials_ptr + tl.program_id(1) * plane + at, sums, mask=mask)
        tl.debug_barrier()  # all threads have stored before one counts
        arrived = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel")
        if arrived == parts - 1:
            tl.store(counters_ptr + tile, 0)
            sums = tl.full([BM, BN], 0.0, tl.float32)
            for i in range(parts):
                sums += tl.load(
                    partials_ptr + i * plane + at, mask=mask, other=0.0, cache_modifier=".cg"
                )
            finish(
                sums,
                bias_ptr,
                h_of,
                B_of,
                y_ptr,
                m,
                n,
                M,
                N,
                biased,
                width,
                rank,
                BIASED > 0,
                RANK,
                BR,
                PRECISION,
            )
    else:
        finish(
            sums,
            bias_ptr,
            h_of,
            B_of,
            y_ptr,
            m,
            n,
            M,
            N,
            biased,
            width,
            rank,
            BIASED > 0,
            RANK,
            BR,
            PRECISION,
        )


def projections(
    x: Tensor,
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None],
    h: Tensor | None = None,
    lora_B: Sequence[Tensor | None] = (),
    *,
    config: Config | None = None,
) -> list[Tensor]:
    """The products; sums in fp32, rounded once to x's dtype. Equal calls give equal bits.

    Args:
        x: (..., K) in fp32, fp16 or bf16.
        weights: (N_i, K) each, of ``launch.weight``, of one format.
        biases: (N_i,) in x's dtype, or None, each.
        h: (M, R), ``lora.hidden`` of all adapters, in their order.
        lora_B: (N_i, r_i) each, of one dtype, or None.
        config: how to run; by default the ``config_for`` one weight with all of their rows.

    Returns:
        (..., N_i) in x's dtype, each in memory of its own.

    Raises:
        ShapeError: for shapes that do not fit each other, or products that no config serves.
        DTypeError: for other dtypes.
        DeviceError: for tensors on several devices.
    """
    check_weights(weights)
    K = weights[0].in_features
    flat = launch.operand(x, K, "x")  # (M, K)
    M, rows = flat.shape[0], tuple(weight.out_features for weight in weights)
    y = tuple(torch.empty((M, N), dtype=x.dtype, device=x.device) for N in rows)
    shapes = [(*x.shape[:-1], N) for N in rows]
    if M == 0:
        return [each.reshape(shape) for each, shape in zip(y, shapes, strict=True)]
    taken, ranks = adapters(h, lora_B, rows, M)
    biased = [
        None if bias is None else launch.operand(bias, N, "bias")
        for bias, N in zip(biases, rows, strict=True)
    ]
    present = [t for t in (*biased, *taken) if t is not None]
    launch.same_device(flat, *(weight.pointers[0] for weight in weights), *present)
    config = config or config_for(x.device, x.dtype, M, sum(rows), K)
    if config is None:
        msg = f"no kernel multiplies {M} tokens of {x.dtype}: dequantize the weights instead"
        raise ShapeError(msg)
    config = config.for_codes(weights[0].fmt.bits)
    packed, absmax, nested, offset, tables = zip(*(w.pointers for w in weights), strict=True)
    operands = (
        *(flat, packed, absmax, nested, offset, tables[0], filled(biased, flat)),
        *(flat if h is None else h, filled(taken, flat), y),
    )
    constants = _constants(flat, weights[0], biased, max(ranks), config)
    run = _vectors if config.op == "matvec" else _tiles
    run(operands, rows, ranks, config, constants)
    return [each.reshape(shape) for each, shape in zip(y, shapes, strict=True)]


def _vectors(
    operands: tuple[Any, ...],
    rows: tuple[int, ...],
    ranks: tuple[int, ...],
    config: Config,
    constants: dict[str, Any],
) -> None:
    flat = operands[0]
    _, BN, BK = config.tile
    del constants["PRECISION"]
    with torch.cuda.device_of(flat):
        _vectors_kernel[(sum(triton.cdiv(N, BN) for N in rows),)](
            *operands,
            rows,
            ranks,
            flat.shape[1],
            **constants,
            TOKENS=flat.shape[0],
            BN=BN,
            BK=BK,
            num_warps=config.warps,
            num_stages=config.stages,
            **launch.FUSED,
        )


def _tiles(
    operands: tuple[Any, ...],
    rows: tuple[int, ...],
    ranks: tuple[int, ...],
    config: Config,
    constants: dict[str, Any],
) -> None:
    flat = operands[0]
    M, K = flat.shape
    BM, BN, _ = config.tile
    tiles = triton.cdiv(M, BM) * sum(triton.cdiv(N, BN) for N in rows)
    split = config.split if config.op == "matmul_small" else 1
    with torch.cuda.device_of(flat):
        workspace = (flat, flat)
        if split > 1:
            partials = torch.empty((split, M, sum(rows)), dtype=torch.float32, device=flat.device)
            workspace = (partials, launch.counters(flat.device, tiles))
        _tiles_kernel[(tiles, split)](
            *operands,
            *workspace,
            rows,
            ranks,
            M,
            K,
            **constants,
            SPLIT=split > 1,
            **tile_constants(config, constants["BITS"]),
            **launch.EXACT,
        )


def _constants(
    x: Tensor, weight: Weight, biases: Sequence[Tensor | None], rank: int, config: Config
) -> dict[str, Any]:
    """Those of ``launch.product_constants``, with a bit of BIASED for each bias."""
    constants = launch.product_constants(x, weight, None, None, config.tile[2])
    del constants["HAS_BIAS"]
    biased = sum(1 << i for i, bias in enumerate(biases) if bias is not None)
    return constants | {"BIASED": biased, "RANK": rank, "BR": launch.rank_step(rank)}


def aot_specs(arch: str) -> Iterator[AotSpec]:
    """Three layers, with every tile of the architecture's table."""
    workspace = {"partials_ptr": "*fp32", "counters_ptr": "*i32"}
    yield from member_specs("matvec", _vectors_kernel, arch, 3, exact=False)
    yield from member_specs("matmul_small", _tiles_kernel, arch, 3, more=workspace)
    yield from member_specs("matmul", _tiles_kernel, arch, 3, more=workspace)
