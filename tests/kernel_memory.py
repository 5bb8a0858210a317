"""Memory that shows what a kernel missed, and what it wrote beside its outputs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch

GUARD = 64  # bytes on each side
CANARY = 0xA5
POISON = 0xFF  # NaN in every float dtype


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """``torch.empty`` gives NaN between canaries, which must live when the block ends."""
    memory: list[torch.Tensor] = []
    empty = torch.empty

    def poisoned(*shape: Any, dtype: torch.dtype | None = None, device: Any = None) -> torch.Tensor:
        sizes: Sequence[int] = shape[0] if shape and not isinstance(shape[0], int) else shape
        dtype = dtype or torch.float32
        used = math.prod(sizes) * dtype.itemsize
        block = empty(used + 2 * GUARD, dtype=torch.uint8, device=device).fill_(CANARY)
        memory.append(block)
        return block[GUARD : GUARD + used].fill_(POISON).view(dtype).reshape(tuple(sizes))

    with mock.patch.object(torch, "empty", poisoned):
        yield
    assert memory, "nothing was allocated by torch.empty"
    for block in memory:
        guards = torch.cat([block[:GUARD], block[-GUARD:]])
        assert bool((guards == CANARY).all()), "a kernel wrote beside its output"
