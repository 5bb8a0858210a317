"""The largest errors of kernels over a test run, beside their bounds: a table at its end."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch


class Errors(NamedTuple):
    """Of an operation in a dtype."""

    cases: int
    worst: float  # in units of the bound
    bound: str


FOUND: dict[tuple[str, str], Errors] = {}


def within(operation: str, dtype: torch.dtype, error: float, bound: float = 1.0) -> bool:
    """Whether an error is within its bound; it is kept for the table.

    Args:
        operation: what was computed.
        dtype: of the tokens.
        error: NaN is within none.
        bound: 1 where ``error`` is in units of bounds of its own, one for each value.
    """
    text = "by value" if bound == 1.0 else f"{bound:.1e}"
    add([(operation, str(dtype).removeprefix("torch."), 1, float(error / bound), text)])
    return error <= bound


def add(rows: Iterable[tuple[str, str, int, float, str]]) -> None:
    """Keep what was found, here or in another process: operation, dtype, and ``Errors``."""
    for operation, dtype, cases, worst, bound in rows:
        found = FOUND.get((operation, dtype))
        if found is None or math.isnan(worst) or worst > found.worst:
            found = Errors(0 if found is None else found.cases, worst, bound)
        FOUND[operation, dtype] = found._replace(cases=found.cases + cases)


def dump() -> list[tuple[str, str, int, float, str]]:
    """All that was kept, for ``add`` in another process."""
    return [(*key, *errors) for key, errors in FOUND.items()]


def lines() -> list[str]:
    """The table."""
    names = sorted(FOUND)
    width = max((len(name) for name, _ in names), default=0)
    return [
        f"{name:{width}}  {dtype:8}  {FOUND[name, dtype].cases:4} cases"
        f"  worst {FOUND[name, dtype].worst:5.2f} of its bound ({FOUND[name, dtype].bound})"
        for name, dtype in names
    ]
