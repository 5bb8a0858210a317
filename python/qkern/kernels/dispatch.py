"""Which kernel multiplies, with which tile: a table for each family of GPUs, and rules beside it.

``configs/<family>.json`` holds rows, tried from the top: a row serves at most ``tokens`` tokens of
``bits``-bit activations, and of one shape (N, K) if it names one; those come first. Without a row
the caller dequantizes the weight and multiplies that. Nothing is timed at run time; rows that were
timed before, on request, come first (``tune``).

    op      "matvec", "matmul_small" (columns are split) or "matmul" (where tiles are too few for
            the GPU, "matmul_small" with the same tile)
    tile    BM, BN, BK; of matvec, BN is the largest
    ahead   see ``product.sum_over_columns``
    split   programs that share a tile's columns; 0: by the number of multiprocessors
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
from typing import Protocol

# Enough programs to hide each other's waiting.
_PROGRAMS_EACH = 2
_STEPS_AT_LEAST = 4  # of a program that shares a tile
_LARGEST_SPLIT = 16
_FEWEST_ROWS = 4  # of a matvec program
_MOST_COLUMNS_OF_BYTES = 64  # of a tile of 8-bit codes: more take registers that are not there


@dataclasses.dataclass(frozen=True)
class Config:
    """A row of a table; the module's text says what its entries mean."""

    op: str
    bits: int
    tokens: int
    tile: tuple[int, int, int]
    warps: int
    stages: int
    ahead: bool = False
    split: int = 0
    shape: tuple[int, int] | None = None

    def decodes_ahead(self, weight_bits: int) -> bool:
        """Whether tiles of W are decoded a step ahead; 8-bit ones of ``matmul`` would spill."""
        return self.ahead and (weight_bits == 4 or self.op == "matmul_small")

    def for_codes(self, weight_bits: int) -> Config:
        """The row for a weight of this width: tiles of 8-bit codes have as many bytes, not more."""
        BM, BN, BK = self.tile
        if weight_bits == 4 or self.op == "matvec" or BK <= _MOST_COLUMNS_OF_BYTES:
            return self
        return self.replace(tile=(BM, BN, _MOST_COLUMNS_OF_BYTES))

    def replace(self, **changes: object) -> Config:
        """A copy with some entries changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


def family(arch: str) -> str:
    """The table that serves an architecture such as "sm_86", "gfx942", or "" (the interpreter).

    Tables differ by the tensor-core instruction: wgmma, and its successor, take a right operand
    in shared memory; mma takes registers.
    """
    if arch.startswith("gfx"):
        return "gfx942"
    return "sm_90" if arch in {"sm_90", "sm_100", "sm_103"} else "sm_80"


@functools.cache
def table(name: str) -> tuple[Config, ...]:
    """The rows of a family."""
    file = importlib.resources.files("qkern.kernels") / "configs" / f"{name}.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    return tuple(
        Config(**row | {key: tuple(row[key]) for key in ("tile", "shape") if key in row})
        for row in rows
    )


class Rows(Protocol):
    """Rows that come before those of a table, see ``tune``."""

    def find(self, bits: int, M: int, N: int, K: int) -> Config | None:
        """The row for a product, ready to be launched; its op may be "dense"."""


@functools.lru_cache(maxsize=4096)
def choose(
    arch: str, processors: int, bits: int, M: int, N: int, K: int, tuned: Rows | None = None
) -> Config | None:
    """The config of a product, its ``tile`` and ``split`` fitted to the shape; None if no row fits.

    Args:
        arch: the device's, or "".
        processors: its multiprocessors.
        bits: of an activation, 16 or 32.
        M: tokens.
        N: out_features.
        K: in_features.
        tuned: of the device, if there are any.
    """
    own = None if tuned is None else tuned.find(bits, M, N, K)
    if own is not None:
        if own.op == "matvec":
            return own.replace(tile=(M, *own.tile[1:]))
        return None if own.op == "dense" else own
    rows = [row for row in table(family(arch)) if row.bits == bits and row.tokens >= M]
    rows = [row for row in rows if row.shape == (N, K)] or [r for r in rows if r.shape is None]
    return fitted(rows[0], processors, M, N, K) if rows else None


def fitted(row: Config, processors: int, M: int, N: int, K: int) -> Config:
    """A row of a table for a product, see ``choose``: as many programs as keep the GPU busy."""
    if row.op == "matvec":
        _, BN, BK = row.tile
        while BN > _FEWEST_ROWS and -(-N // BN) < (_PROGRAMS_EACH + 1) * processors:
            BN //= 2
        return row.replace(tile=(M, BN, BK))
    if row.split:
        return row
    BM, BN, BK = row.tile
    tiles = -(-M // BM) * -(-N // BN)
    most = max(min(-(-K // BK) // _STEPS_AT_LEAST, _LARGEST_SPLIT), 1)
    if row.op == "matmul_small":
        return row.replace(split=max(min(_PROGRAMS_EACH * processors // tiles, most), 1))
    # Large tiles have larger partial sums: only where most of the GPU would be idle.
    split = min(processors // tiles, most)
    return row if split < _PROGRAMS_EACH else row.replace(op="matmul_small", split=split)
