"""Rounding, widening, dividing: the same on the device, in the interpreter, in any Triton."""

from __future__ import annotations

import os

import triton
import triton.language as tl

# The interpreter truncates fp32 to bf16; there the rounding is done on the bits.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
# In 3.3 and before it takes subnormal numbers for zeros; 3.4 and 3.5 have not been looked at.
_DIV_RN = tl.constexpr(VERSION >= (3, 6))


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


@triton.jit
def divide(a, b):
    """fp32 ``a / b``, rounded once; subnormal numbers are what they are."""
    if _DIV_RN:
        return tl.div_rn(a, b)
    else:  # fp64 has more than twice the digits: rounding its quotient is rounding the true one
        return (a.to(tl.float64) / b.to(tl.float64)).to(tl.float32)
