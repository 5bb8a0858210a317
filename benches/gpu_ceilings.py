"""The two numbers that all others are held against: bandwidth and bf16 products; launch gaps."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from gpu_device import captured, random, seconds
from gpu_plan import Cell, Row, Run
from gpu_timing import Engine, interleaved

LAUNCHES = 1000


def cells(run: Run) -> Iterator[Cell]:
    """One, needed by all others."""
    yield Cell("ceilings", "memory, products, launches", 0, 8, lambda: rows(run))


def rows(run: Run) -> Iterator[Row]:
    """GB/s of bytes read and written; TFLOP/s on random data; seconds of a launch."""
    plan = run.plan
    device, quick = plan.device, plan.quick
    nbytes = 1 << 16 if quick else 4 << 30
    source = torch.empty(nbytes // 4, device=device).normal_()
    target = torch.empty_like(source)
    side = 64 if quick else 8192
    a, b = (random(side, side, device=device, seed=s).bfloat16() for s in (1, 2))
    moved = {"copy": 2 * nbytes, "read": nbytes}
    engines = [
        Engine("copy", [lambda: target.copy_(source)]),
        Engine("read", [source.sum]),
        Engine("matmul bf16", [lambda: a @ b], {"M": side, "N": side, "K": side}),
    ]
    for row in interleaved(engines, plan.effort, device):
        if row["engine"] in moved:
            row["GB/s"] = moved[row["engine"]] / row["median"] / 1e9
        else:
            row["TFLOP/s"] = 2 * side**3 / row["median"] / 1e12
        yield {"case": "ceiling", **row}
    yield from launches(run)


def launches(run: Run) -> Iterator[Row]:
    """A kernel that does nothing much, called, and as a node of a graph."""
    device = run.plan.device
    one = torch.zeros(1, device=device)
    count = 5 if run.plan.quick else LAUNCHES

    def many() -> None:
        for _ in range(count):
            one.add_(1)

    ways = {"launch by a call": many}
    if device.type == "cuda":
        ways["launch in a graph"] = captured(many)
    for name, way in ways.items():
        way()
        times = sorted(seconds(device, way) / count for _ in range(5))
        row = {"engine": name, "median": times[2], "quartiles": [times[1], times[3]]}
        yield {"case": "ceiling", **row, "minimum": times[0], "repeats": 5}
