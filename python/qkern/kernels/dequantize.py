"""Codes and scales to values in one pass over the flat tensor.

    w[i] = round(code[i] * absmax[i // blocksize])
    absmax[b] = nested_code[a[b]] * nested_absmax[b // 256] + offset      double-quantized

fp32 products; one rounding to the output dtype. Byte ``j`` of a 4-bit tensor holds value ``2 j`` in
its high nibble and ``2 j + 1`` in its low one; both lie in the same block. Blocks of int8 may have
any length (rows); each length compiles once.

Bytes are promised, so products and sums must not be fused: every launch sets
``enable_fp_fusion=False``. Format: docs of ``qkern.formats``.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkern.formats import NESTED_BLOCKSIZE, QuantFormat, dynamic_code
from qkern.kernels.rounding import round_to

# Stored elements (bytes of codes) of one program: 2 or 4 KiB of 16-bit output.
BLOCK = 1024
_TL_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _load_absmax(
    absmax_ptr,
    nested_code_ptr,
    nested_absmax_ptr,
    offset_ptr,
    block,  # (BLOCK,) int64
    mask,  # (BLOCK,)
    GROUP: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
):
    """fp32 scales of ``block``."""
    if DOUBLE_QUANT:
        code = tl.load(absmax_ptr + block, mask=mask, other=0).to(tl.int32)  # (BLOCK,)
        value = tl.load(nested_code_ptr + code)  # (BLOCK,)
        nested = tl.load(nested_absmax_ptr + block // GROUP, mask=mask, other=0.0)  # (BLOCK,)
        return value * nested + tl.load(offset_ptr)
    else:
        return tl.load(absmax_ptr + block, mask=mask, other=0.0)


@triton.jit
def _dequantize_kernel(
    packed_ptr,
    absmax_ptr,
    nested_code_ptr,
    nested_absmax_ptr,
    offset_ptr,
    code_ptr,
    out_ptr,
    numel,
    stored,
    BLOCKSIZE: tl.constexpr,
    GROUP: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    mask = offs < stored
    packed = tl.load(packed_ptr + offs, mask=mask, other=0)  # (BLOCK,)
    first = offs * (8 // BITS)
    absmax = _load_absmax(
        absmax_ptr,
        nested_code_ptr,
        nested_absmax_ptr,
        offset_ptr,
        first // BLOCKSIZE,
        mask,
        GROUP,
        DOUBLE_QUANT,
    )  # (BLOCK,)
    if BITS == 8:
        step = absmax * 0.007874015718698502  # fp32 of 1 / 127
        tl.store(out_ptr + offs, round_to(packed.to(tl.float32) * step, DTYPE), mask=mask)
    else:
        high = tl.load(code_ptr + (packed >> 4).to(tl.int32)) * absmax  # (BLOCK,)
        low = tl.load(code_ptr + (packed & 15).to(tl.int32)) * absmax  # (BLOCK,)
        tl.store(out_ptr + first, round_to(high, DTYPE), mask=mask)
        tl.store(out_ptr + first + 1, round_to(low, DTYPE), mask=mask & (first + 1 < numel))


def dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    fmt: QuantFormat,
    numel: int,
    dtype: torch.dtype,
) -> Tensor:
    """The ``numel`` values, flat, on the device of ``packed``.

    Args:
        packed: uint8 (ceil(numel / 2),) or int8 (numel,), any shape, contiguous.
        absmax: fp32 or uint8 (blocks,), any shape, contiguous.
        nested_absmax: fp32 (groups,) or None.
        offset: fp32 (1,) or None.
        fmt: how the bytes are read.
        numel: values.
        dtype: float32, float16 or bfloat16.
    """
    device = packed.device
    out = torch.empty(numel, dtype=dtype, device=device)
    if numel == 0:
        return out
    nested = nested_absmax is not None
    code = _table(fmt.code or (0.0,), device)
    nested_code = _table(dynamic_code(), device) if nested else code
    stored = fmt.packed_size(numel)
    with torch.cuda.device_of(packed):
        _dequantize_kernel[(triton.cdiv(stored, BLOCK),)](
            packed,
            absmax,
            nested_code,
            nested_absmax if nested else code,
            offset if nested else code,
            code,
            out,
            numel,
            stored,
            BLOCKSIZE=fmt.blocksize,
            GROUP=NESTED_BLOCKSIZE,
            DOUBLE_QUANT=nested,
            BITS=fmt.bits,
            DTYPE=_TL_DTYPES[dtype],
            BLOCK=BLOCK,
            enable_fp_fusion=False,
        )
    return out


@functools.lru_cache(maxsize=32)
def _table(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)
