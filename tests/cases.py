"""Inputs on which quantizers disagree: the named cases that codec tests share.

Each value pattern is there for a reason that its name says; lengths cover whole blocks, ragged
ends, odd counts and less than a block.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from qkern.formats import FP4, NF4

F32 = npt.NDArray[np.float32]

LENGTHS = (1, 2, 31, 64, 65, 127, 128, 1000, 4096, 4099)


def midpoints(code: tuple[float, ...]) -> F32:
    """The decision boundaries of a table, fp32."""
    ascending = np.sort(np.array(code, np.float32))
    return ((ascending[:-1] + ascending[1:]) / np.float32(2)).astype(np.float32)


def ties(code: tuple[float, ...], n: int) -> F32:
    """Boundaries and their neighbours one ulp away, each block scaled by exactly 1."""
    bounds = midpoints(code)
    around = [np.nextafter(bounds, np.float32(d)) for d in (-2, 2)]
    pattern = np.concatenate([[np.float32(1)], bounds, *around]).astype(np.float32)
    return np.resize(pattern, n).astype(np.float32)


def value_patterns(n: int, rng: np.random.Generator) -> Iterator[tuple[str, F32]]:
    """Named float32 inputs of ``n`` values."""
    normal = rng.standard_normal(n).astype(np.float32)
    yield "normal", normal
    yield "uniform", rng.uniform(-0.1, 0.1, n).astype(np.float32)
    yield "heavy_tail", (normal**5).astype(np.float32)
    yield "rows_1000_apart", normal * np.where(np.arange(n) // 64 % 2, 1e-3, 1).astype(np.float32)
    yield "zeros", np.zeros(n, np.float32)
    yield "one_zero_block", np.where(np.arange(n) < 64, 0, normal).astype(np.float32)
    yield "negative_zero", np.full(n, -0.0, np.float32)
    yield "constant", np.full(n, -0.37, np.float32)
    yield "one_hot", (np.arange(n) % 64 == 5).astype(np.float32)
    yield "nf4_ties", ties(NF4, n)
    yield "fp4_ties", ties(FP4, n)
    yield "subnormal", normal * np.float32(1e-39)
    yield "tiny", normal * np.float32(1e-30)
    yield "huge", np.clip(normal, -1, 1) * np.float32(3e38)


def as_bits(values: F32, dtype: str) -> npt.NDArray[np.generic]:
    """float32 values as the native extension takes them: float32, or uint16 bits of ``dtype``."""
    if dtype == "float32":
        return values
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if dtype == "float16":
        return np.where(np.isfinite(half), half, np.float16(6e4)).astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where((rounded & 0x7FFF) >= 0x7F80, 0x7F7F, rounded).astype(np.uint16)
