"""Scales to 8 bits: double quantization on the device, the bytes of the host's codec.

    offset  = mean of absmax; 0 if one of them is negative
    nested  = max |absmax - offset| of a group of 256
    code    = number of midpoints strictly below (absmax - offset) / nested
    safe    = every decoded scale is within 1/8 of its own

The mean is part of the bytes, so its sum has one order: each group in fp64, value by value, then
the groups, one by one. A thread adds a group, one thread adds the groups: little work, and a sum
in another order could round to another offset. No fused products; quotients are ``divide``'s.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkern.formats import NESTED_BLOCKSIZE, dynamic_code
from qkern.kernels import lasting
from qkern.kernels.aot import AotSpec
from qkern.kernels.launch import EXACT, tables_of
from qkern.kernels.rounding import divide

# Groups of one program: of the sums a warp's, of the codes 1024 scales.
SUMMED = 32
CODED = 4
_SUMS = {"GROUP": NESTED_BLOCKSIZE, "GROUPS": SUMMED}
_OFFSET = {"UNROLL": 16, "CHUNK": 1024}
_CODES = {"GROUP": NESTED_BLOCKSIZE, "GROUPS": CODED}


@triton.jit
def _group_sums_kernel(
    absmax_ptr, sums_ptr, negative_ptr, blocks, GROUP: tl.constexpr, GROUPS: tl.constexpr
):
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)  # (GROUPS,)
    total = tl.zeros([GROUPS], tl.float64)
    lowest = tl.zeros([GROUPS], tl.float32)
    for i in range(GROUP):
        place = group * GROUP + i
        absmax = tl.load(absmax_ptr + place, mask=place < blocks, other=0.0)
        total += absmax.to(tl.float64)
        lowest = tl.minimum(lowest, absmax)
    exists = group * GROUP < blocks
    tl.store(sums_ptr + group, total, mask=exists)
    tl.store(negative_ptr + group, (lowest < 0).to(tl.int32), mask=exists)


@triton.jit
def _offset_kernel(
    sums_ptr, negative_ptr, offset_ptr, groups, blocks, UNROLL: tl.constexpr, CHUNK: tl.constexpr
):
    one = tl.arange(0, 1)
    total = tl.zeros([1], tl.float64)
    for start in range(0, groups, UNROLL):
        for i in tl.static_range(UNROLL):  # loads that need not wait for the sum
            place = start + i + one
            total += tl.load(sums_ptr + place, mask=place < groups, other=0.0)
    negative = tl.zeros([CHUNK], tl.int32)
    for start in range(0, groups, CHUNK):
        place = start + tl.arange(0, CHUNK)
        negative |= tl.load(negative_ptr + place, mask=place < groups, other=0)
    mean = total / (tl.zeros([1], tl.float64) + blocks)
    offset = tl.where(tl.max(negative, axis=0) > 0, 0.0, mean.to(tl.float32))
    tl.store(offset_ptr + one, offset)


@triton.jit
def _code_scales_kernel(
    absmax_ptr,
    offset_ptr,
    bounds_ptr,
    code_ptr,
    codes_ptr,
    nested_ptr,
    safe_ptr,
    blocks,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)  # (GROUPS,)
    place = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]  # (GROUPS, GROUP)
    mask = place < blocks
    exists = group * GROUP < blocks
    offset = tl.load(offset_ptr)
    absmax = tl.load(absmax_ptr + place, mask=mask, other=0.0)
    residual = tl.where(mask, absmax - offset, 0.0)
    magnitude = residual.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    nested = tl.max(magnitude, axis=1).to(tl.float32, bitcast=True)  # (GROUPS,)
    tl.store(nested_ptr + group, nested, mask=exists)
    divisor = tl.where(nested == 0, 1.0, nested)[:, None]
    scaled = divide(residual, tl.broadcast_to(divisor, residual.shape))
    scaled = tl.where(scaled == scaled, scaled, 0.0)

    code = tl.zeros([GROUPS, GROUP], tl.int32)
    for i in tl.static_range(8):
        bound = tl.load(bounds_ptr + code + ((128 >> i) - 1))  # (GROUPS, GROUP)
        code += tl.where(scaled <= bound, 0, 128 >> i)
    tl.store(codes_ptr + place, code.to(tl.uint8), mask=mask)
    decoded = tl.load(code_ptr + code) * nested[:, None] + offset
    safe = (absmax == 0) | (tl.abs(decoded - absmax) <= tl.abs(absmax) * 0.125)
    safe = tl.min((safe | (place >= blocks)).to(tl.int32), axis=1)
    tl.store(safe_ptr + group, safe.to(tl.uint8), mask=exists)


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """8-bit codes (blocks,), group maxima (groups,), offset (1,) and whether they are safe (1,).

    Nothing waits for the device.

    Args:
        absmax: fp32 (blocks,), contiguous.
    """
    device, blocks = absmax.device, absmax.numel()
    groups = triton.cdiv(blocks, NESTED_BLOCKSIZE)
    codes = torch.empty(blocks, dtype=torch.uint8, device=device)
    nested = torch.empty(groups, device=device)
    if blocks == 0:
        safe = torch.ones(1, dtype=torch.bool, device=device)
        return codes, nested, torch.zeros(1, device=device), safe
    offset = torch.empty(1, device=device)
    sums = torch.empty(groups, dtype=torch.float64, device=device)
    negative = torch.empty(groups, dtype=torch.int32, device=device)
    safe = torch.empty(groups, dtype=torch.uint8, device=device)
    with torch.cuda.device_of(absmax):
        _group_sums_kernel[(triton.cdiv(groups, SUMMED),)](
            absmax, sums, negative, blocks, **_SUMS, num_warps=1, **EXACT
        )
        _offset_kernel[(1,)](sums, negative, offset, groups, blocks, **_OFFSET, **EXACT)
        _code_scales_kernel[(triton.cdiv(groups, CODED),)](
            absmax,
            offset,
            _bounds(device),
            tables_of(None, device)[16:],
            codes,
            nested,
            safe,
            blocks,
            **_CODES,
            **EXACT,
        )
    return codes, nested, offset, safe.view(torch.bool).all().reshape(1)


@functools.lru_cache(maxsize=32)
def _bounds(device: torch.device) -> Tensor:
    """fp32 midpoints (255,) of the 8-bit code."""
    code = torch.tensor(dynamic_code(), dtype=torch.float32, device="cpu")
    bounds = (code[:-1] + code[1:]) / 2
    return lasting(device, lambda: bounds.to(device))


def aot_specs(arch: str) -> Iterator[AotSpec]:
    """Its three kernels."""
    sums = {"absmax_ptr": "*fp32", "sums_ptr": "*fp64", "negative_ptr": "*i32", "blocks": "i64"}
    yield AotSpec("quantize_absmax sums", _group_sums_kernel, sums, _SUMS, warps=1)
    offset = {"sums_ptr": "*fp64", "negative_ptr": "*i32", "offset_ptr": "*fp32"}
    offset |= {"groups": "i32", "blocks": "i64"}
    yield AotSpec("quantize_absmax offset", _offset_kernel, offset, _OFFSET)
    names = ("absmax", "offset", "bounds", "code", "nested")
    codes = {f"{name}_ptr": "*fp32" for name in names}
    codes |= {"codes_ptr": "*u8", "safe_ptr": "*u8", "blocks": "i64"}
    yield AotSpec(
        "quantize_absmax codes", _code_scales_kernel, codes, _CODES, quick=arch == "sm_90"
    )
