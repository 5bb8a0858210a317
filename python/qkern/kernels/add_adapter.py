"""``y += h B``: an adapter's part added to a finished product, in place.

    y (M, N) += h (M, r) B (r, N)                      forward: h = s x A^T, and B transposed
    dX (M, K) += dropped(G (M, r) A (r, K))            backward: G = s dY B

For products of a dense weight, which torch makes: y is read and written once, the sum is fp32, and
rounded once more. Factors are multiplied as in ``thin_product``. Where x was dropped for the
adapter, so is its part of the gradient. A program for each tile (BM, BK).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkern.kernels.aot import AotSpec
from qkern.kernels.dropout import Dropout, arguments, gain_of
from qkern.kernels.launch import rank_step, same_device
from qkern.kernels.lora import name_of, pointer_to
from qkern.kernels.product_backward import add_masked_adapter
from qkern.kernels.rounding import round_to, widen
from qkern.kernels.thin_product import precision, precision_of

_TILE = {"BM": 64, "BK": 64}


@triton.jit
def _add_adapter_kernel(
    y_ptr,
    h_ptr,
    B_ptr,
    seed_ptr,
    M,
    K,
    threshold,
    gain,
    RANK: tl.constexpr,
    BR: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    tiles_k = (K + BK - 1) // BK
    m = tl.program_id(0) // tiles_k * BM + tl.arange(0, BM)  # (BM,)
    first = tl.program_id(0) % tiles_k * BK
    k = first + tl.arange(0, BK)  # (BK,)
    part = add_masked_adapter(
        tl.full([BM, BK], 0.0, tl.float32),
        h_ptr,
        B_ptr,
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
    at = m.to(tl.int64)[:, None] * K + k[None, :]  # (BM, BK)
    mask = (m < M)[:, None] & (k < K)[None, :]
    sums = widen(tl.load(y_ptr + at, mask=mask, other=0.0)) + part
    tl.store(y_ptr + at, round_to(sums, y_ptr.dtype.element_ty), mask=mask)


def add_adapter(y: Tensor, h: Tensor, B: Tensor, *, dropout: Dropout | None = None) -> Tensor:
    """``y``, after ``h B`` was added to it in place.

    Args:
        y: (M, N), contiguous: fp32, fp16 or bf16.
        h: fp32 (M, r), contiguous.
        B: (r, N), contiguous: any of these dtypes.
        dropout: of the sum's second part, by the row and the column of y.
    """
    same_device(y, h, B)
    (M, N), rank = y.shape, B.shape[0]
    if 0 in (M, N, rank):
        return y
    tiles = triton.cdiv(M, _TILE["BM"]) * triton.cdiv(N, _TILE["BK"])
    with torch.cuda.device_of(y):
        _add_adapter_kernel[(tiles,)](
            y,
            h,
            B,
            M=M,
            K=N,
            gain=gain_of(dropout.p) if dropout is not None else 1.0,
            RANK=rank,
            BR=rank_step(rank),
            PRECISION=precision(y.device),
            **arguments(dropout, y),
            **_TILE,
        )
    return y


def aot_specs(arch: str) -> Iterator[AotSpec]:
    """The part of an adapter in fp32 and bf16, with and without dropout."""
    for dtype, adapter, rank, dropout in (
        (torch.bfloat16, torch.float32, 16, False),
        (torch.bfloat16, torch.bfloat16, 64, True),
        (torch.float16, torch.float32, 64, False),
        (torch.float32, torch.float32, 64, True),
    ):
        pointers = {"y_ptr": pointer_to(dtype), "h_ptr": "*fp32", "B_ptr": pointer_to(adapter)}
        sizes = {"seed_ptr": "*i64", "M": "i32", "K": "i32", "threshold": "i32", "gain": "fp32"}
        constants = {"RANK": rank, "BR": rank_step(rank), "DROPOUT": dropout}
        yield AotSpec(
            f"add adapter {name_of(adapter)} r{rank} to {name_of(dtype)}"
            f"{', dropout' if dropout else ''}",
            _add_adapter_kernel,
            pointers | sizes,
            constants | {"PRECISION": precision_of(arch)} | _TILE,
            divisible=("K",),
            exact=False,
            tensor_cores=True,
        )
