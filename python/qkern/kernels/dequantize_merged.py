"""``W + s B A`` as one dense matrix: a weight with its adapter in it, for ordinary products.

    W'[n, k] = round(code[n, k] * absmax[n, k // blocksize] + s (B A)[n, k])

W (N, K), B (N, r), A (r, K), all row-major. The weight is not rounded before the sum: W' is within
half an ulp of the fp32 sum, and its noise is that of one rounding, which an update far smaller than
an ulp of W drowns in. B A is a product in fp32, of factors as in ``thin_product``. Tiles (BN, BK).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkern.kernels import launch
from qkern.kernels.aot import AotSpec, lookup_of
from qkern.kernels.decode import (
    decode,
    decode_scales,
    load_codes,
    load_offset,
    load_scales,
    open_table,
)
from qkern.kernels.launch import Weight
from qkern.kernels.lora import name_of, pointer_to
from qkern.kernels.rounding import round_to
from qkern.kernels.thin_product import multiply_thin, precision, precision_of

_TILE = {"BN": 64, "BK": 64}


@triton.jit
def _dequantize_merged_kernel(
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    offset_ptr,
    tables_ptr,
    A_ptr,
    B_ptr,
    out_ptr,
    N,
    K,
    scaling,
    BITS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    LOOKUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    RANK: tl.constexpr,
    BR: tl.constexpr,
    PRECISION: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    tiles_k = (K + BK - 1) // BK
    n = tl.program_id(0) // tiles_k * BN + tl.arange(0, BN)  # (BN,)
    first = tl.program_id(0) % tiles_k * BK
    rows, row_mask = n.to(tl.int64), n < N
    k = first + tl.arange(0, BK)  # (BK,)
    delta = tl.full([BN, BK], 0.0, tl.float32)
    for r in tl.static_range(0, RANK, BR):
        rank = r + tl.arange(0, BR)  # (BR,)
        in_rank = rank < RANK
        at_B = rows[:, None] * RANK + rank[None, :]
        B = tl.load(B_ptr + at_B, mask=row_mask[:, None] & in_rank[None, :], other=0.0)
        at_A = rank.to(tl.int64)[:, None] * K + k[None, :]
        A = tl.load(A_ptr + at_A, mask=in_rank[:, None] & (k < K)[None, :], other=0.0)
        delta = multiply_thin(B, A, delta, PRECISION)

    table = open_table(tables_ptr, LOOKUP)
    offset = load_offset(offset_ptr, DOUBLE_QUANT)
    codes = load_codes(packed_ptr, rows, row_mask, first, K, BK, BITS, EVEN_K)
    absmax, nested = load_scales(
        absmax_ptr, nested_absmax_ptr, rows, row_mask, first, K, BK, BLOCKSIZE, DOUBLE_QUANT
    )
    scales = decode_scales(absmax, nested, tables_ptr, offset, BK, BITS, DOUBLE_QUANT)
    w = decode(codes, scales, table, BITS, LOOKUP, tl.float32)  # (BN, BK)
    merged = round_to(w + delta * scaling, out_ptr.dtype.element_ty)
    to = rows[:, None] * K + k[None, :]
    tl.store(out_ptr + to, merged, mask=row_mask[:, None] & (k < K)[None, :])


def dequantize_merged(
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """The dense (N, K) with the adapter added.

    Args:
        weight: (N, K), of ``launch.weight``.
        lora_A: (r, K), contiguous: fp32, fp16 or bf16.
        lora_B: (N, r), contiguous, the same dtype.
        scaling: s.
        dtype: of the result: float32, float16 or bfloat16.
        out: (N, K) in ``dtype``, contiguous, to write into; a new tensor if None.
    """
    launch.same_device(weight.pointers[0], lora_A, lora_B)
    N, K, R = weight.out_features, weight.in_features, lora_A.shape[0]
    if out is None:
        out = torch.empty((N, K), dtype=dtype, device=weight.device)
    with torch.cuda.device_of(out):
        _dequantize_merged_kernel[(triton.cdiv(N, _TILE["BN"]) * triton.cdiv(K, _TILE["BK"]),)](
            *weight.pointers,
            lora_A,
            lora_B,
            out,
            N,
            K,
            scaling,
            EVEN_K=K % _TILE["BK"] == 0,
            RANK=R,
            BR=launch.rank_step(R),
            PRECISION=precision(out.device),
            **weight.constants,
            **_TILE,
            **launch.EXACT,
        )
    return out


def aot_specs(arch: str) -> Iterator[AotSpec]:
    """Adapters in bf16 and fp32, over 4 and 8 bits."""
    for bits, dtype, rank in (
        (4, torch.bfloat16, 16),
        (4, torch.float32, 64),
        (8, torch.float32, 16),
    ):
        signature = {
            "packed_ptr": "*u8" if bits == 4 else "*i8",
            "absmax_ptr": "*u8",
            **dict.fromkeys(("nested_absmax_ptr", "offset_ptr", "tables_ptr"), "*fp32"),
            **dict.fromkeys(("A_ptr", "B_ptr"), pointer_to(dtype)),
            "out_ptr": "*bf16",
            "N": "i32",
            "K": "i32",
            "scaling": "fp32",
        }
        constants = {
            "BITS": bits,
            "BLOCKSIZE": 64,
            "DOUBLE_QUANT": True,
            "LOOKUP": lookup_of(arch),
            "EVEN_K": True,
            "RANK": rank,
            "BR": launch.rank_step(rank),
            "PRECISION": precision_of(arch),
            **_TILE,
        }
        yield AotSpec(
            f"dequantize_merged {bits}-bit, adapter {name_of(dtype)} r{rank}",
            _dequantize_merged_kernel,
            signature,
            constants,
            divisible=("K",),
            tensor_cores=True,
        )
