"""Dropout without a stored mask: bits of a counter, the same in every kernel that asks for them.

    kept[m, k]  if 16 random bits of (seed, m, k) are at least p 2^16
    x'[m, k] = kept ? x[m, k] / (1 - p) : 0

p is rounded to a multiple of 2^-16, and 1 / (1 - p) is that of the rounded one. The bits are
Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a counter
for 8 neighbouring columns of a row, so tiles of any size see the same mask.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

_STEPS = 1 << 16


class Dropout(NamedTuple):
    """Of a tensor (M, K).

    Args:
        p: probability of 0, in [0, 1).
        seed: int64 (1,) on the device, so that a CUDA graph can draw a new one each time.
    """

    p: float
    seed: Tensor


@triton.jit
def keep(
    seed,
    m,  # (BM,) int32
    k,
    K,
    threshold,
    BK: tl.constexpr,
):
    """Which of rows ``m``, columns k to k + BK, are kept, (BM, BK); ``k`` is a multiple of 8."""
    BM: tl.constexpr = m.shape[0]
    group = k // 8 + tl.arange(0, BK // 8)
    counter = m.to(tl.int64)[:, None] * ((K + 7) // 8) + group[None, :]  # (BM, BK / 8)
    a, b, c, d = tl.randint4x(seed, counter)
    words = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), [BM, BK // 2])
    halves = tl.reshape(tl.join(words & 0xFFFF, (words >> 16) & 0xFFFF), [BM, BK])
    return halves.to(tl.int32) >= threshold


def threshold_of(p: float) -> int:
    """The random 16 bits below which a value is dropped."""
    return min(round(p * _STEPS), _STEPS - 1)


def gain_of(p: float) -> float:
    """What kept values are multiplied by."""
    return _STEPS / (_STEPS - threshold_of(p))


def arguments(dropout: Dropout | None, other: Tensor) -> dict[str, Any]:
    """The arguments seed_ptr, threshold and DROPOUT of a kernel; ``other`` is any tensor."""
    if dropout is None or threshold_of(dropout.p) == 0:
        return {"seed_ptr": other, "threshold": 0, "DROPOUT": False}
    threshold = threshold_of(dropout.p)
    return {"seed_ptr": dropout.seed, "threshold": threshold, "DROPOUT": True}
