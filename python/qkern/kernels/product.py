"""Products of tiles, the same on the device and in Triton's interpreter."""

from __future__ import annotations

import triton
import triton.language as tl

from qkern.kernels.rounding import INTERPRETED


@triton.jit
def multiply(a, b, sums, PRECISION: tl.constexpr = "ieee"):
    """``sums + a b`` in fp32: (M, K) (K, N) of one dtype, sums (M, N) fp32.

    Args:
        a: (M, K) fp32, fp16 or bf16.
        b: (K, N), the same dtype.
        sums: (M, N) fp32.
        PRECISION: of fp32 factors: "ieee" on ordinary units, "tf32x3" as three products on
            tensor cores, within some units of 2^-22. 16-bit factors are always exact.
    """
    if INTERPRETED:  # it takes the bits of bf16 for integers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums)
    elif a.dtype == tl.float32:
        return tl.dot(a, b, sums, input_precision=PRECISION)
    else:
        return tl.dot(a, b, sums)
