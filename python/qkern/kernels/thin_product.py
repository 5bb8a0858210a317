"""Products with an adapter's factors, thin and often in another dtype than the tokens.

Factors of one 16-bit dtype are multiplied as they are. Beside a bf16 factor an fp32 one is the sum
of two bf16 numbers, with 16 bits of its mantissa. Other fp32 factors are the sum of two tf32
numbers, with 22 bits; the product of the two lower ones is left out. What is not finite stays so,
as NaN. Where there is no tf32 (AMD, the interpreter) fp32 factors are multiplied as they are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qkern.kernels.launch import arch as arch_of
from qkern.kernels.rounding import INTERPRETED, round_to, widen

_IEEE = tl.constexpr("ieee")  # Triton 3.6 takes no bare string as a default


@triton.jit
def multiply(a, b, sums, PRECISION: tl.constexpr = _IEEE):
    """``sums + a b`` in fp32.

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


@triton.jit
def multiply_thin(a, b, sums, PRECISION: tl.constexpr):
    """``sums + a b``: (M, K) (K, N) of any two dtypes, sums (M, N) fp32.

    All parts are added to the same sums: ``tf32x3`` of Triton keeps a second set of them.
    """
    # One comparison each: Triton 3.2 takes no `and` of what is known when it compiles.
    if a.dtype == tl.float32:
        if b.dtype == tl.bfloat16:
            high = round_to(a, tl.bfloat16)
            low = round_to(a - widen(high), tl.bfloat16)
            return multiply(high, b, multiply(low, b, sums))
        else:
            return _multiply_wide(a, widen(b), sums, True, b.dtype == tl.float32, PRECISION)
    elif a.dtype == b.dtype:
        return multiply(a, b, sums)
    elif b.dtype == tl.float32:
        if a.dtype == tl.bfloat16:
            high = round_to(b, tl.bfloat16)
            low = round_to(b - widen(high), tl.bfloat16)
            return multiply(a, high, multiply(a, low, sums))
        else:
            return _multiply_wide(widen(a), b, sums, False, True, PRECISION)
    else:
        return _multiply_wide(widen(a), widen(b), sums, False, False, PRECISION)


@triton.jit
def _multiply_wide(
    a,
    b,
    sums,
    A_IS_LONG: tl.constexpr,
    B_IS_LONG: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``sums + a b`` of fp32 factors; one that is not long has values of 16 bits."""
    if PRECISION == "ieee":
        return multiply(a, b, sums)
    else:
        a_high = _first_bits(a) if A_IS_LONG else a  # values of 16 bits are their own first bits
        b_high = _first_bits(b) if B_IS_LONG else b
        if B_IS_LONG:
            sums = tl.dot(a_high, b - b_high, sums, input_precision="tf32")
        if A_IS_LONG:
            sums = tl.dot(a - a_high, b_high, sums, input_precision="tf32")
        return tl.dot(a_high, b_high, sums, input_precision="tf32")


@triton.jit
def _first_bits(x):
    """``x`` cut to the 11 bits of tf32's mantissa."""
    return (x.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)


def precision(device: torch.device) -> str:
    """Of products of fp32, see ``multiply``."""
    return precision_of(arch_of(device))


def precision_of(arch: str) -> str:
    """The same for an architecture of ``aot.ARCHS``."""
    return "tf32x3" if arch.startswith("sm_") else "ieee"
