"""Rounding to a dtype and back to fp32, the same on the device and in Triton's interpreter."""

from __future__ import annotations

import os

import triton
import triton.language as tl

# The interpreter truncates fp32 to bf16; there the rounding is done on the bits.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def round_to(x, DTYPE: tl.constexpr):
    """fp32 ``x`` to ``DTYPE``, to nearest even; NaN stays NaN."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet = (bits >> 16) | 0x40
        half = tl.where(x != x, quiet, rounded)
        return half.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def widen(x):
    """Values of any dtype in fp32, exactly."""
    if INTERPRETED and x.dtype == tl.bfloat16:  # the interpreter misreads subnormal bf16
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)
