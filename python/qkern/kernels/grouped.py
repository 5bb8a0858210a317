"""``y = x W^T + bias`` for rows that are sorted by expert, over the packed weights of all experts.

    y (M, N), x (M, K), W (E, N, K), bias (E, N); rows of expert e: offsets[e - 1] to offsets[e]
    transposed: W (E, K, N), and y = x W

E experts. The stacked weights are one matrix of E N rows (E K transposed), whose tiles are decoded
and multiplied as those of ``matmul`` and ``matmul_backward``: so every value is
``dequantize(q, x.dtype)``, sums are fp32 and rounded once.

A program computes a tile (BM, BN) of the rows of one expert. How many tiles each has, only the
device knows: as many programs are launched as there can be (each expert adds at most one tile that
is not full), and each finds its own by the offsets. Nothing waits for the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkern.kernels import launch
from qkern.kernels.aot import AotSpec, lookup_of
from qkern.kernels.launch import Weight
from qkern.kernels.product import finish, sum_over_columns
from qkern.kernels.product_backward import sum_over_rows


class _Config(NamedTuple):
    """A tile of y, the columns of x in a step, and what its loop takes."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int
    ahead: bool = True  # see ``product.sum_over_columns``


@triton.jit
def _tile_of_rows(offsets_ptr, E, tile, BM: tl.constexpr, BE: tl.constexpr):
    """Expert of a tile (BE or more if there is none), its first row, and where the expert ends."""
    e = tl.arange(0, BE)  # (BE,)
    ends = tl.load(offsets_ptr + e, mask=e < E, other=0)
    starts = tl.load(offsets_ptr + e - 1, mask=(e > 0) & (e < E), other=0)
    tiles = (ends - starts + BM - 1) // BM
    last = tl.cumsum(tiles, 0)
    before = last <= tile
    expert = tl.sum(before.to(tl.int32), 0)
    own = e == expert
    start = tl.sum(tl.where(own, starts, 0), 0)
    skipped = tl.sum(tl.where(before, tiles, 0), 0)
    return expert, start + (tile - skipped) * BM, tl.sum(tl.where(own, ends, 0), 0)


@triton.jit
def _grouped_kernel(
    x_ptr,
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    offset_ptr,
    tables_ptr,
    bias_ptr,
    offsets_ptr,
    y_ptr,
    tiles_m,
    N,
    K,
    E,
    BITS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    LOOKUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BE: tl.constexpr,
    AHEAD: tl.constexpr,
):
    # EVEN: columns of W are whole tiles of it.
    expert, first, end = _tile_of_rows(offsets_ptr, E, tl.program_id(0) % tiles_m, BM, BE)
    if expert >= E:
        return
    m = first + tl.arange(0, BM)  # (BM,)
    start = tl.program_id(0) // tiles_m * BN
    n = start + tl.arange(0, BN)  # (BN,)
    if TRANSPOSED:
        row = expert * K  # of W
        sums = sum_over_rows(
            tl.full([BM, BN], 0.0, tl.float32),
            x_ptr - row,  # so that column k of x is that of row k of W
            packed_ptr,
            absmax_ptr,
            nested_absmax_ptr,
            offset_ptr,
            tables_ptr,
            m,
            start,
            end,
            K,
            N,
            row,
            row + K,
            BITS,
            BLOCKSIZE,
            DOUBLE_QUANT,
            LOOKUP,
            BN,
            BK,
            EVEN,
            AHEAD,
        )  # (BM, BN)
    else:
        row = expert * N
        sums = sum_over_columns(
            x_ptr,
            packed_ptr,
            absmax_ptr,
            nested_absmax_ptr,
            offset_ptr,
            tables_ptr,
            m,
            row + n,
            end,
            row + N,
            K,
            0,
            K,
            BITS,
            BLOCKSIZE,
            DOUBLE_QUANT,
            LOOKUP,
            BK,
            EVEN,
            AHEAD,
        )  # (BM, BN)
    finish(
        sums,
        bias_ptr + expert.to(tl.int64) * N,
        x_ptr,
        x_ptr,
        y_ptr,
        m,
        n,
        end,
        N,
        N,
        0,
        0,
        HAS_BIAS,
        0,
        16,
        "ieee",
    )


def grouped(
    x: Tensor,
    offsets: Tensor,
    weight: Weight,
    experts: int,
    bias: Tensor | None = None,
    *,
    transposed: bool = False,
) -> Tensor:
    """The product, (M, N) in x's dtype; rows behind the last offset are zero.

    Args:
        x: (M, K), fp32, fp16 or bf16.
        offsets: (E,) integers: where each expert's rows end. Those that fall or leave the rows are
            taken as the nearest that do not.
        weight: (E N, K), or (E K, N) if ``transposed``, of ``launch.weight``.
        experts: E.
        bias: (E, N) in any of these dtypes, or None.
        transposed: which of the two the weight is.
    """
    rows, columns = weight.out_features // experts, weight.in_features
    N, K = (columns, rows) if transposed else (rows, columns)
    x = launch.operand(x, K, "x")
    M = x.shape[0]
    y = torch.empty((M, N), dtype=x.dtype, device=x.device).zero_()  # what no expert has
    if M == 0:
        return y
    bias = None if bias is None else launch.operand(bias, N, "bias")
    ends = torch.cummax(offsets.clamp(0, M), 0).values.to(torch.int32)
    launch.same_device(x, ends, weight.pointers[0], *(() if bias is None else (bias,)))
    config = choose_grouped(-(-M // experts), x.dtype, weight.fmt.bits)
    tiles_m = triton.cdiv(M, config.BM) + min(experts, M)
    with torch.cuda.device_of(x):
        _grouped_kernel[(tiles_m * triton.cdiv(N, config.BN),)](
            x,
            *weight.pointers,
            x if bias is None else bias,
            ends,
            y,
            tiles_m,
            N,
            K,
            experts,
            HAS_BIAS=bias is not None,
            TRANSPOSED=transposed,
            EVEN=columns % (config.BN if transposed else config.BK) == 0,
            BM=config.BM,
            BN=config.BN,
            BK=config.BK,
            BE=triton.next_power_of_2(experts),
            AHEAD=config.ahead,
            num_warps=config.warps,
            num_stages=config.stages,
            **weight.constants,
            **launch.EXACT,
        )
    return y


def choose_grouped(tokens: int, dtype: torch.dtype, weight_bits: int) -> _Config:
    """By the mean number of rows of an expert; no GPU has timed it."""
    if dtype == torch.float32:
        return _Config(32, 64, 32, warps=4, stages=2, ahead=False)
    if tokens <= 16:
        return _Config(16, 64, 128 if weight_bits == 4 else 64, warps=4, stages=3)
    return _Config(64, 64, 64, warps=4, stages=3)


def aot_specs(arch: str) -> Iterator[AotSpec]:
    """Every tile in both directions; other codes and dtypes with the largest."""
    for tokens, dtype, kind, transposed in (
        *(
            (t, d, "nf4", tr)
            for t, d in ((16, "bf16"), (64, "bf16"), (64, "fp32"))
            for tr in (0, 1)
        ),
        (64, "fp16", "int8", 0),
        (64, "bf16", "int8 rows", 1),
    ):
        bits = 8 if kind.startswith("int8") else 4
        nested = kind != "int8 rows"
        config = choose_grouped(tokens, _DTYPES[dtype], bits)
        signature = {
            **dict.fromkeys(("x_ptr", "y_ptr", "bias_ptr"), f"*{dtype}"),
            **dict.fromkeys(("nested_absmax_ptr", "offset_ptr", "tables_ptr"), "*fp32"),
            "packed_ptr": "*i8" if bits == 8 else "*u8",
            "absmax_ptr": "*u8" if nested else "*fp32",
            "offsets_ptr": "*i32",
            **dict.fromkeys(("tiles_m", "N", "K", "E"), "i32"),
        }
        constants = {
            "BITS": bits,
            "BLOCKSIZE": 64 if nested else 0,
            "DOUBLE_QUANT": nested,
            "LOOKUP": lookup_of(arch),
            "HAS_BIAS": True,
            "TRANSPOSED": bool(transposed),
            "EVEN": True,
            "BM": config.BM,
            "BN": config.BN,
            "BK": config.BK,
            "BE": 128,
            "AHEAD": config.ahead,
        }
        way = "x W" if transposed else "x W^T"
        yield AotSpec(
            f"grouped {way} {config.BM}x{config.BN}x{config.BK} {kind} {dtype}",
            _grouped_kernel,
            signature,
            constants,
            warps=config.warps,
            stages=config.stages,
            divisible=("N", "K"),
            exact=dtype != "fp32",
            tensor_cores=dtype != "fp32",
            quick=arch == "sm_90" and tokens == 16,
        )


_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
