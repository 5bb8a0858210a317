"""Engines in turn on a GPU, each through its copies of the weights.

Calls are captured: a replay of the graph is one call on each copy, so that the gaps between
launches are the device's own. What cannot be captured is enqueued call by call.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from gpu_device import captured, seconds, synchronize
from torch import Tensor

Row = dict[str, Any]


class WrongResultError(AssertionError):
    """An engine is further from what it should compute than it may be."""


@dataclass(frozen=True)
class Effort:
    """How long to measure, and through how many bytes of weights.

    Attributes:
        repeats: rounds; a slow engine sits some of them out.
        min_time: seconds that one measurement lasts at least.
        budget: seconds for all measurements of one engine; three of them are always made.
        rotate: bytes of weights that the copies take together: several times the L2.
        copies_between: fewest and most copies.
    """

    repeats: int = 15
    min_time: float = 1e-3
    budget: float = 0.25
    rotate: int = 256 << 20
    copies_between: tuple[int, int] = (8, 64)

    def copies(self, nbytes: int) -> int:
        """How many weights of ``nbytes`` leave the caches."""
        fewest, most = self.copies_between
        return max(fewest, min(most, math.ceil(self.rotate / nbytes)))


QUICK = Effort(repeats=1, min_time=0.0, budget=0.0, rotate=1, copies_between=(1, 1))


@dataclass
class Engine:
    """What is timed: the same work on each copy of the weights.

    Attributes:
        name: in the results.
        calls: one for each copy.
        facts: what else its row says, such as errors.
        graph: capture the calls, on a GPU.
    """

    name: str
    calls: Sequence[Callable[[], object]]
    facts: Mapping[str, Any] = field(default_factory=dict)
    graph: bool = False


class _Unit:
    """An engine in a form that can be repeated: one graph, or one call after the other."""

    def __init__(self, engine: Engine, device: torch.device, *, warm: bool) -> None:
        self.engine, self.device = engine, device
        self.facts = dict(engine.facts)
        self.calls_each, self.position = 1, 0
        self.replay: Callable[[], None] | None = None
        for call in engine.calls if warm else ():  # compiles, and fills caches of allocators
            call()
        synchronize(device)
        if engine.graph and device.type == "cuda":
            try:
                self.replay = captured(self._all)
                self.calls_each = len(engine.calls)
            except RuntimeError as error:
                if "captur" not in str(error).lower():
                    raise
                self.facts["no graph"] = str(error).splitlines()[0][:200]
                synchronize(device)
        self.facts["timed"] = "graph" if self.replay else "calls"

    def _all(self) -> None:
        for call in self.engine.calls:
            call()

    def _some(self, loops: int) -> None:
        for _ in range(loops):
            if self.replay is not None:
                self.replay()
            else:
                self.engine.calls[self.position % len(self.engine.calls)]()
                self.position += 1

    def measure(self, loops: int) -> float:
        """Seconds of one call."""
        return seconds(self.device, lambda: self._some(loops)) / (loops * self.calls_each)


def interleaved(engines: Iterable[Engine], effort: Effort, device: torch.device) -> list[Row]:
    """One row for each engine: median, quartiles, minimum in seconds, and its facts.

    Args:
        engines: measured in turn, round after round.
        effort: see there.
        device: whose clock counts.
    """
    plans = []
    for engine in engines:
        unit = _Unit(engine, device, warm=effort.repeats > 1)
        if effort.repeats == 1:
            plans.append((unit, 1, 1))
            continue
        unit.measure(1)
        each = max(unit.measure(1) * unit.calls_each, 1e-9)
        loops = max(1, math.ceil(effort.min_time / each))
        rounds = min(effort.repeats, max(3, int(effort.budget / (each * loops))))
        plans.append((unit, loops, max(1, effort.repeats // rounds)))
    times: list[list[float]] = [[] for _ in plans]
    gc.collect()
    gc.disable()
    try:
        for turn in range(effort.repeats):
            for found, (unit, loops, every) in zip(times, plans, strict=True):
                if turn % every == 0:
                    found.append(unit.measure(loops))
    finally:
        gc.enable()
    return [
        {"engine": unit.engine.name, **_summary(found), **unit.facts}
        for found, (unit, _, _) in zip(times, plans, strict=True)
    ]


def _summary(times: list[float]) -> Row:
    times = sorted(times)
    several = len(times) > 1
    quartiles = statistics.quantiles(times, n=4, method="inclusive") if several else times * 3
    return {
        "median": statistics.median(times),
        "quartiles": [quartiles[0], quartiles[2]],
        "minimum": times[0],
        "repeats": len(times),
    }


def add_ratios(rows: list[Row], base: str, key: str) -> None:
    """``key``: how many times faster than engine ``base`` each row is, by medians."""
    found = [row for row in rows if row["engine"] == base]
    for row in rows if found else []:
        row[key] = found[0]["median"] / row["median"]


def absent(engine: str, error: BaseException | str, **fields: Any) -> Row:
    """The row of an engine that cannot run here, with the reason."""
    reason = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    lines = reason.strip().splitlines() or ["no reason given"]
    return {"engine": engine, "absent": lines[0][:300], **fields}


def relative_error(found: Tensor, expected: Tensor) -> float:
    """``|found - expected| / |expected|``, in fp64; NaN where a value was not written."""
    distance = (found.double() - expected.double()).norm()
    return float(distance / expected.double().norm().clamp(min=1e-300))


def checked(name: str, errors: Mapping[str, float], tolerance: float) -> dict[str, float]:
    """The errors, if they may be so large.

    Raises:
        WrongResultError: if one is larger, or NaN.
    """
    if not all(error <= tolerance for error in errors.values()):
        msg = f"{name}: {dict(errors)}, at most {tolerance}"
        raise WrongResultError(msg)
    return dict(errors)
