"""``dX = dY W + G A`` from the packed bytes that forward reads.

    dX (M, K) = dY (M, N) W (N, K) + G (M, r) A (r, K)        G = s dY B, see ``lora_backward``

The sum runs over rows of W, while its blocks run along the columns: a tile (BN, BK) of W is decoded
from the same bytes as in forward, to the same values ``dequantize(q, dY.dtype)``, and needs no
transposed copy. Sums are fp32 and rounded once. Where x was dropped for the adapter, so is the
adapter's part of its gradient, which is multiplied as in ``thin_product``.

A program computes a tile (BM, BK) of dX. Where there are few tiles, rows of W are split between
programs, and the parts are added in their order by a second kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkern.kernels import launch
from qkern.kernels.aot import AotSpec, lookup_of
from qkern.kernels.dropout import Dropout, arguments, gain_of
from qkern.kernels.launch import Weight
from qkern.kernels.lora import add_parts, name_of, pointer_to, split_of
from qkern.kernels.product_backward import add_masked_adapter, sum_over_rows
from qkern.kernels.rounding import round_to
from qkern.kernels.thin_product import precision, precision_of


class _Config(NamedTuple):
    """A tile, and what its loop takes."""

    BM: int
    BK: int
    BN: int
    warps: int
    stages: int
    ahead: bool = False  # the next tile of W is decoded at the end of a step: for mma, not wgmma

    @property
    def constants(self) -> dict[str, Any]:
        return {"BM": self.BM, "BK": self.BK, "BN": self.BN, "AHEAD": self.ahead}


@triton.jit
def _matmul_backward_kernel(
    grad_ptr,
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    offset_ptr,
    tables_ptr,
    G_ptr,
    A_ptr,
    seed_ptr,
    dX_ptr,
    M,
    N,
    K,
    split,
    threshold,
    gain,
    BITS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    LOOKUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    RANK: tl.constexpr,
    BR: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    AHEAD: tl.constexpr,
):
    # Programs of the same columns of W run side by side: its codes come from memory once.
    tiles_m = (M + BM - 1) // BM
    m = tl.program_id(0) % tiles_m * BM + tl.arange(0, BM)  # (BM,)
    first = tl.program_id(0) // tiles_m * BK
    start = tl.program_id(1) * split
    sums = sum_over_rows(
        tl.full([BM, BK], 0.0, tl.float32),
        grad_ptr,
        packed_ptr,
        absmax_ptr,
        nested_absmax_ptr,
        offset_ptr,
        tables_ptr,
        m,
        first,
        M,
        N,
        K,
        start,
        tl.minimum(start + split, N),
        BITS,
        BLOCKSIZE,
        DOUBLE_QUANT,
        LOOKUP,
        BK,
        BN,
        EVEN_K,
        AHEAD,
    )  # (BM, BK)
    if RANK > 0:  # noqa: SIM102 - known when compiled
        if tl.program_id(1) == 0:
            sums = add_masked_adapter(
                sums,
                G_ptr,
                A_ptr,
                seed_ptr,
                m,
                first,
                M,
                K,
                threshold,
                gain,
                RANK,
                BR,
                DROPOUT,
                PRECISION,
                BK,
            )
    k = first + tl.arange(0, BK)  # (BK,)
    at = (tl.program_id(1).to(tl.int64) * M + m)[:, None] * K + k[None, :]  # (BM, BK)
    dX = round_to(sums, dX_ptr.dtype.element_ty)
    tl.store(dX_ptr + at, dX, mask=(m < M)[:, None] & (k < K)[None, :])


def matmul_backward(
    grad: Tensor,
    weight: Weight,
    G: Tensor | None = None,
    lora_A: Tensor | None = None,
    *,
    dropout: Dropout | None = None,
) -> Tensor:
    """``dY W + G A``, (M, K) in dY's dtype.

    Args:
        grad: dY (M, N), contiguous: fp32, fp16 or bf16.
        weight: (N, K), of ``launch.weight``.
        G: fp32 (M, r), of ``lora_backward.grad_hidden``, or None.
        lora_A: (r, K), contiguous, any of these dtypes, or None.
        dropout: the same as forward's.
    """
    M, N, K = grad.shape[0], weight.out_features, weight.in_features
    dX = torch.empty((M, K), dtype=grad.dtype, device=grad.device)
    if M == 0:
        return dX
    has_adapter = G is not None and lora_A is not None and lora_A.shape[0] > 0
    rank = lora_A.shape[0] if has_adapter and lora_A is not None else 0
    config = choose_backward(M, grad.dtype, launch.arch(grad.device))
    tiles = triton.cdiv(M, config.BM) * triton.cdiv(K, config.BK)
    split = split_of(N, config.BN, tiles, grad.device)
    parts = triton.cdiv(N, split)
    out = dX
    if parts > 1:
        out = torch.empty((parts, M, K), dtype=torch.float32, device=grad.device)
    with torch.cuda.device_of(grad):
        _matmul_backward_kernel[(tiles, parts)](
            grad,
            *weight.pointers,
            G if has_adapter else grad,
            lora_A if has_adapter else grad,
            dX_ptr=out,
            M=M,
            N=N,
            K=K,
            split=split,
            gain=gain_of(dropout.p) if dropout is not None else 1.0,
            EVEN_K=K % config.BK == 0,
            RANK=rank,
            BR=launch.rank_step(rank),
            PRECISION=precision(grad.device),
            num_warps=config.warps,
            num_stages=config.stages,
            **arguments(dropout, grad),
            **weight.constants,
            **config.constants,
            **launch.EXACT,
        )
        if parts > 1:
            add_parts(out, dX)
    return dX


def choose_backward(M: int, dtype: torch.dtype, arch: str) -> _Config:
    """By tokens; wgmma, of sm_90, holds more sums and wants 64 rows of dY."""
    if dtype == torch.float32:
        return _Config(32, 64, 32, warps=4, stages=2)
    if M <= 16:
        return _Config(16, 128, 64, warps=4, stages=2, ahead=True)
    if arch != "sm_90":
        return _Config(64, 64, 64, warps=4, stages=2, ahead=True)
    if M <= 64:
        return _Config(64, 64, 64, warps=4, stages=3)
    return _Config(128, 128, 64, warps=8, stages=3)


def aot_specs(arch: str) -> Iterator[AotSpec]:
    """Every tile in bf16; other codes, dtypes and dropout with the largest."""
    sizes = {"M": "i32", "N": "i32", "K": "i32", "split": "i32", "threshold": "i32", "gain": "fp32"}
    for tokens, dtype, adapter, kind, rank in (
        (16, torch.bfloat16, torch.float32, "nf4", 16),
        (64, torch.bfloat16, torch.float32, "nf4", 16),
        (512, torch.bfloat16, torch.float32, "nf4", 16),
        (512, torch.bfloat16, torch.bfloat16, "nf4, dropout", 64),
        (512, torch.bfloat16, torch.bfloat16, "nf4", 0),
        (512, torch.float16, torch.float32, "int8", 16),
        (512, torch.bfloat16, torch.bfloat16, "int8 rows", 16),
        (512, torch.float32, torch.float32, "nf4", 16),
    ):
        config = choose_backward(tokens, dtype, arch)
        nested = kind != "int8 rows"
        signature = {
            **dict.fromkeys(("grad_ptr", "dX_ptr"), pointer_to(dtype)),
            **dict.fromkeys(("nested_absmax_ptr", "offset_ptr", "tables_ptr", "G_ptr"), "*fp32"),
            "packed_ptr": "*i8" if kind.startswith("int8") else "*u8",
            "absmax_ptr": "*u8" if nested else "*fp32",
            "A_ptr": pointer_to(adapter),
            "seed_ptr": "*i64",
        }
        constants = {
            "BITS": 8 if kind.startswith("int8") else 4,
            "BLOCKSIZE": 64 if nested else 0,
            "DOUBLE_QUANT": nested,
            "LOOKUP": lookup_of(arch),
            "EVEN_K": True,
            "RANK": rank,
            "BR": launch.rank_step(rank),
            "DROPOUT": kind.endswith("dropout"),
            "PRECISION": precision_of(arch),
        }
        tile = f"{config.BM}x{config.BK}x{config.BN}"
        yield AotSpec(
            f"matmul_backward {tile} {kind} of {name_of(dtype)}, A {name_of(adapter)} r{rank}",
            _matmul_backward_kernel,
            signature | sizes,
            constants | config.constants,
            warps=config.warps,
            stages=config.stages,
            divisible=("N", "K", "split"),
            exact=dtype != torch.float32,
            tensor_cores=dtype != torch.float32,
            quick=arch == "sm_90" and tokens == 512 and rank == 0,
        )
