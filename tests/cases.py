"""Inputs on which quantizers disagree: the named cases that codec tests share.

Each value pattern is there for a reason that its name says; shapes cover whole blocks, ragged
ends, odd counts, less than a block, and rows that share blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from qkern.formats import BLOCKSIZES, DTYPES, FP4, NF4

F32 = npt.NDArray[np.float32]
CODES = {"nf4": NF4, "fp4": FP4}
Bits = npt.NDArray[Any]

# Of one row: a lone value, whole blocks, one more and one less, odd counts, nothing but a tail.
LENGTHS = (1, 2, 31, 64, 65, 127, 128, 1000, 4096, 4099)
SHAPES = (
    *((n,) for n in LENGTHS),
    (1, 1),
    (63, 1),
    (3, 5),  # less than any block
    (7, 33),  # odd, rows across blocks
    (5, 96),  # rows of one block and a half
    (4, 480),
    (129, 64),
    (2, 4304),  # a vision model's width: a multiple of 16, of no block size
    (3, 4096),
    (17, 513),
    (2, 3, 50),
    (3, 16, 172),  # experts
    (1, 2, 2, 1031),  # a prime count, four dimensions
)


class Case(NamedTuple):
    """A tensor to quantize: ``bits`` is float32, or uint16 bit patterns of ``dtype``."""

    pattern: str
    bits: Bits
    shape: tuple[int, ...]
    dtype: str
    quant_type: str
    blocksize: int

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{self.pattern}[{shape}] {self.dtype} {self.quant_type} by {self.blocksize}"


def generated_cases(settings_each: int = 8) -> Iterator[Case]:
    """Every shape with every pattern, each in ``settings_each`` of the 48 4-bit settings."""
    rng = np.random.default_rng(0)
    settings = [(d, q, b) for d in DTYPES for q in CODES for b in BLOCKSIZES]
    for shape in SHAPES:
        n = math.prod(shape)
        patterns = dict(value_patterns(n, rng))
        for name in (*patterns, "near_bounds"):
            for i in rng.permutation(len(settings))[:settings_each]:
                dtype, quant_type, blocksize = settings[i]
                if name == "near_bounds":
                    values = near_bounds(CODES[quant_type], dtype, blocksize, n, rng)
                else:
                    values = patterns[name]
                yield Case(name, as_bits(values, dtype), shape, dtype, quant_type, blocksize)


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


def near_bounds(
    code: tuple[float, ...], dtype: str, blocksize: int, n: int, rng: np.random.Generator
) -> F32:
    """Values of ``dtype`` that are nearest to a boundary times their block's absmax.

    In turn: the nearest one, the one below and the one above, of every boundary. Each block
    starts with its absmax, of another size and sign than the last block's.
    """
    blocks = -(-n // blocksize)
    sizes = rng.uniform(1, 2, blocks) * 2.0 ** rng.integers(-8, 8, blocks)
    absmax = from_bits(as_bits(sizes.astype(np.float32), dtype), dtype).astype(np.float64)
    per_block = blocksize - 1
    turn = np.arange(blocks * per_block).reshape(blocks, per_block) % 45
    exact = midpoints(code).astype(np.float64)[turn // 3] * absmax[:, None]
    near = neighbour(as_bits(exact.astype(np.float32), dtype), np.array([0, -1, 1])[turn % 3])
    signed = absmax * np.where(np.arange(blocks) % 2, -1, 1)
    values = np.concatenate([signed[:, None], from_bits(near, dtype)], axis=1)
    return values.astype(np.float32).reshape(-1)[:n]


def value_patterns(n: int, rng: np.random.Generator) -> Iterator[tuple[str, F32]]:
    """Named float32 inputs of ``n`` values."""
    normal = rng.standard_normal(n).astype(np.float32)
    place = np.arange(n)
    yield "normal", normal
    yield "uniform", rng.uniform(-0.1, 0.1, n).astype(np.float32)
    yield "heavy_tail", (normal**5).astype(np.float32)
    yield "rows_1000_apart", normal * np.where(place // 64 % 2, 1e-3, 1).astype(np.float32)
    yield "single_spike", np.where(place == n // 2, 1e4, normal * 1e-2).astype(np.float32)
    yield "zeros", np.zeros(n, np.float32)
    yield "one_zero_block", np.where(place < 64, 0, normal).astype(np.float32)
    yield "negative_zero", np.full(n, -0.0, np.float32)
    yield "zeros_of_both_signs", np.copysign(np.float32(0), normal)
    yield "zeros_among_values", np.where(place % 3, np.copysign(np.float32(0), normal), normal)
    yield "constant", np.full(n, -0.37, np.float32)
    yield "one_hot", (place % 64 == 5).astype(np.float32)
    yield "powers_of_two", np.exp2(rng.integers(-12, 4, n)).astype(np.float32) * np.sign(normal)
    yield "nf4_ties", ties(NF4, n)
    yield "fp4_ties", ties(FP4, n)
    yield "subnormal", normal * np.float32(1e-39)
    yield "around_the_floor", (normal * 1e-38).astype(np.float32)
    yield "tiny", normal * np.float32(1e-30)
    yield "huge", np.clip(normal, -1, 1) * np.float32(3e38)
    yield "every_magnitude", (normal * 10.0 ** rng.uniform(-40, 37, n)).astype(np.float32)


def as_bits(values: F32, dtype: str) -> Bits:
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


def from_bits(bits: Bits, dtype: str) -> F32:
    """The float32 values of what ``as_bits`` returns, exactly."""
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float32)
    return bits if dtype == "float32" else (bits.astype(np.uint32) << 16).view(np.float32)


def as_tensor(bits: np.ndarray, dtype: str) -> torch.Tensor:
    """The torch tensor with these bits."""
    if dtype == "float32":
        return torch.from_numpy(bits.copy())
    return torch.from_numpy(bits.view(np.int16).copy()).view(getattr(torch, dtype))


def neighbour(bits: Bits, steps: npt.NDArray[np.int_]) -> Bits:
    """The floats of a dtype ``steps`` places above those of ``as_bits``; the zeros are one."""
    signed = np.dtype(np.int32 if bits.dtype == np.float32 else np.int16)
    lowest = np.iinfo(signed).min
    magnitudes = bits.view(signed).astype(np.int64)
    places = np.where(magnitudes < 0, lowest - magnitudes, magnitudes) + steps
    return np.where(places < 0, lowest - places, places).astype(signed).view(bits.dtype)
