"""Gradients of adapters: one pass over dY, one over x.

    G  = s dY B               (M, R)     of dY (M, N) and B (N, R)
    dB = dY^T h               (N, R)     h = s dropout(x) A^T, see ``lora``
    dA = G^T dropout(x)       (R, K)

Each tile of dY is read once for both of its products: a program walks down some rows of BN columns
of dY, writes its part of G for each tile and keeps its part of dB. Parts are added by a second
kernel in their order, without atomics: reruns have the same bits. Ranks above 64 take a pass for
each 64. Factors of different dtypes: see
``thin_product``.

With several adapters in a batch the columns of h that are not a token's own are 0, and so are those
of G: dA and dB get from each token what its adapter did.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkern.kernels.aot import AotSpec
from qkern.kernels.dropout import Dropout, arguments, keep
from qkern.kernels.launch import FUSED, same_device
from qkern.kernels.launch import arch as arch_of
from qkern.kernels.lora import Rows, add_parts, name_of, pointer_to, split_of, tile_of
from qkern.kernels.thin_product import multiply_thin, precision, precision_of

# A tile of dY takes half of the shared memory of a small GPU: two are in flight.
_OPTIONS = {"num_warps": 8, "num_stages": 2, **FUSED}


@triton.jit
def _grad_hidden_kernel(
    grad_ptr,
    B_ptr,
    h_ptr,
    G_ptr,
    dB_ptr,
    M,
    N,
    split,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
):
    tile = tl.program_id(0)
    part = tl.program_id(1)
    n = tile * BN + tl.arange(0, BN)  # (BN,)
    rank = tl.program_id(2) * BR + tl.arange(0, BR)  # (BR,)
    in_rank = (rank < RANK)[None, :]
    at_B = n.to(tl.int64)[:, None] * RANK + rank[None, :]
    mask_B = (n < N)[:, None] & in_rank
    B = tl.load(B_ptr + at_B, mask=mask_B, other=0.0)  # (BN, BR)
    dB = tl.full([BN, BR], 0.0, tl.float32)
    for start in range(part * split, tl.minimum(part * split + split, M), BM):
        m = start + tl.arange(0, BM)  # (BM,)
        at = m.to(tl.int64)[:, None] * N + n[None, :]
        mask = (m < M)[:, None]
        grad = tl.load(grad_ptr + at, mask=mask & (n < N)[None, :], other=0.0)  # (BM, BN)
        at_h = m.to(tl.int64)[:, None] * RANK + rank[None, :]
        h = tl.load(h_ptr + at_h, mask=mask & in_rank, other=0.0)  # (BM, BR)
        dB = multiply_thin(tl.trans(grad), h, dB, PRECISION)
        G = multiply_thin(grad, B, tl.full([BM, BR], 0.0, tl.float32), PRECISION)
        at_G = tile.to(tl.int64) * M * RANK + at_h
        tl.store(G_ptr + at_G, G, mask=mask & in_rank)
    tl.store(dB_ptr + part.to(tl.int64) * N * RANK + at_B, dB, mask=mask_B)


@triton.jit
def _grad_a_kernel(
    G_ptr,
    x_ptr,
    seed_ptr,
    dA_ptr,
    M,
    K,
    split,
    threshold,
    RANK: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    first = tl.program_id(0) * BK
    part = tl.program_id(1)
    k = first + tl.arange(0, BK)  # (BK,)
    rank = tl.program_id(2) * BR + tl.arange(0, BR)  # (BR,)
    dA = tl.full([BK, BR], 0.0, tl.float32)
    for start in range(part * split, tl.minimum(part * split + split, M), BM):
        m = start + tl.arange(0, BM)  # (BM,)
        at = m.to(tl.int64)[:, None] * K + k[None, :]
        x = tl.load(x_ptr + at, mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)  # (BM, BK)
        if DROPOUT:
            kept = keep(tl.load(seed_ptr), m, first, K, threshold, BK)
            x = tl.where(kept, x, tl.zeros_like(x))
        at_G = m.to(tl.int64)[:, None] * RANK + rank[None, :]
        in_G = (m < M)[:, None] & (rank < RANK)[None, :]
        G = tl.load(G_ptr + at_G, mask=in_G, other=0.0)  # (BM, BR)
        dA = multiply_thin(tl.trans(x), G, dA, PRECISION)
    at_A = (part.to(tl.int64) * RANK + rank)[:, None] * K + k[None, :]  # (BR, BK)
    tl.store(dA_ptr + at_A, tl.trans(dA), mask=(rank < RANK)[:, None] & (k < K)[None, :])


def grad_hidden(
    grad: Tensor, B: Tensor, h: Tensor, scaling: float | Tensor = 1.0, *, rows: Rows | None = None
) -> tuple[Tensor, Tensor]:
    """``G = s dY B``, fp32 (M, R), and ``dB = dY^T h``, (N, R) in B's dtype.

    Args:
        grad: dY (M, N), contiguous: fp32, fp16 or bf16.
        B: (N, R), contiguous: any of these dtypes.
        h: fp32 (M, R), what ``lora.hidden`` returned with the same scaling, rows and dropout.
        scaling: s, or fp32 (R,), one for each column of h.
        rows: the adapter of each token, if there are several.
    """
    same_device(grad, B, h)
    (M, N), R = grad.shape, B.shape[1]
    G = torch.empty((M, R), dtype=torch.float32, device=grad.device)
    dB = torch.empty((N, R), dtype=B.dtype, device=grad.device)
    if 0 in (M, N, R):
        return G.zero_(), dB.zero_()
    tile = _backward_tile(R, grad.dtype, "BN", arch_of(grad.device))
    tiles = (triton.cdiv(N, tile["BN"]), triton.cdiv(R, tile["BR"]))
    split = split_of(M, tile["BM"], tiles[0] * tiles[1], grad.device)
    parts = triton.cdiv(M, split)
    G_parts = torch.empty((tiles[0], M, R), dtype=torch.float32, device=grad.device)
    dB_parts = torch.empty((parts, N, R), dtype=torch.float32, device=grad.device)
    with torch.cuda.device_of(grad):
        _grad_hidden_kernel[(tiles[0], parts, tiles[1])](
            grad,
            B,
            h,
            G_parts,
            dB_parts,
            M,
            N,
            split,
            RANK=R,
            PRECISION=precision(grad.device),
            **tile,
            **_OPTIONS,
        )
        add_parts(G_parts, G, scaling, rows=rows)
        add_parts(dB_parts, dB)
    return G, dB


def grad_a(G: Tensor, x: Tensor, dtype: torch.dtype, *, dropout: Dropout | None = None) -> Tensor:
    """``dA = G^T dropout(x)``, (R, K) in ``dtype``.

    Args:
        G: fp32 (M, R), of ``grad_hidden``.
        x: (M, K), contiguous: fp32, fp16 or bf16.
        dtype: of the result, A's.
        dropout: the same as forward's.
    """
    same_device(G, x)
    (M, K), R = x.shape, G.shape[1]
    dA = torch.empty((R, K), dtype=dtype, device=x.device)
    if 0 in (M, K, R):
        return dA.zero_()
    dropped = arguments(dropout, G)
    drops = dropped["DROPOUT"]
    tile = _backward_tile(R, x.dtype, "BK", arch_of(x.device), dropped=drops)
    tiles = (triton.cdiv(K, tile["BK"]), triton.cdiv(R, tile["BR"]))
    split = split_of(M, tile["BM"], tiles[0] * tiles[1], x.device)
    parts = triton.cdiv(M, split)
    dA_parts = torch.empty((parts, R, K), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _grad_a_kernel[(tiles[0], parts, tiles[1])](
            G,
            x,
            dA_ptr=dA_parts,
            M=M,
            K=K,
            split=split,
            RANK=R,
            PRECISION=precision(x.device),
            **dropped,
            **tile,
            **_OPTIONS,
        )
        add_parts(dA_parts, dA, dropout=dropout)
    return dA


def _backward_tile(
    R: int, dtype: torch.dtype, columns: str, arch: str, *, dropped: bool = False
) -> dict[str, int]:
    """BM, BR and the width ``columns`` of a tile of dY or x: as wide as registers allow."""
    BM, BR = (tile_of(R, dtype, dropped=dropped)[name] for name in ("BM", "BR"))
    if dtype == torch.float32:
        return {"BM": 32, "BR": BR, columns: 32 if arch.startswith("gfx") else 64}
    # wgmma reads its operands from shared memory, so registers hold more sums; not as tf32.
    widest = 256 if arch == "sm_90" and dtype == torch.bfloat16 else 128
    return {"BM": BM, "BR": BR, columns: widest if BR <= 32 else widest // 2}


def aot_specs(arch: str) -> Iterator[AotSpec]:
    """Tokens in bf16, fp16 and fp32, with adapters in fp32 and bf16."""
    sizes = {"M": "i32", "split": "i32"}
    for dtype, adapter, R in (
        (torch.bfloat16, torch.float32, 16),
        (torch.bfloat16, torch.bfloat16, 64),
        (torch.float16, torch.float32, 64),
        (torch.float32, torch.float32, 64),
    ):
        grads = {"grad_ptr": pointer_to(dtype), "B_ptr": pointer_to(adapter)}
        grads |= {"h_ptr": "*fp32", "G_ptr": "*fp32", "dB_ptr": "*fp32", "N": "i32"}
        constants = {"RANK": R, "PRECISION": precision_of(arch)}
        yield AotSpec(
            f"lora G, dB r{R} of {name_of(dtype)}, B {name_of(adapter)}",
            _grad_hidden_kernel,
            grads | sizes,
            constants | _backward_tile(R, dtype, "BN", arch),
            warps=_OPTIONS["num_warps"],
            stages=_OPTIONS["num_stages"],
            divisible=("N",),
            exact=False,
            tensor_cores=True,
            quick=arch == "sm_90" and R == 16,
        )
        pointers = {"G_ptr": "*fp32", "x_ptr": pointer_to(dtype), "seed_ptr": "*i64"}
        pointers |= {"dA_ptr": "*fp32", "K": "i32", "threshold": "i32"}
        dropout = adapter == torch.bfloat16
        tile = _backward_tile(R, dtype, "BK", arch, dropped=dropout)
        yield AotSpec(
            f"lora dA r{R} of {name_of(dtype)}{', dropout' if dropout else ''}",
            _grad_a_kernel,
            pointers | sizes,
            constants | {"DROPOUT": dropout} | tile,
            warps=_OPTIONS["num_warps"],
            stages=_OPTIONS["num_stages"],
            divisible=("K",),
            exact=False,
            tensor_cores=True,
        )
