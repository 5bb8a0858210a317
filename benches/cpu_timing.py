"""Timing for bench_cpu.py: engines in turn, each through its copies of the weights.

One thread: its CPU time, median. Two threads: wall time. Weights rotate through enough
copies to leave the caches; what an engine costs besides its own thread is recorded.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

MOST_COPIES = 64
Calls = Sequence[Callable[[], object]]
Seconds = tuple[float, float, float]


@dataclass(frozen=True)
class Effort:
    """How long to measure, and through how many bytes of weights.

    Attributes:
        repeats: rounds; a slow engine sits some of them out.
        min_time: seconds that one measurement lasts at least, by calling often.
        budget: seconds for all measurements of one engine; three of them are always made.
        rotate: bytes of weights that the copies take together.
        warm: seconds that an engine works before each measurement of it.
    """

    repeats: int = 15
    min_time: float = 0.03
    budget: float = 1.2
    rotate: int = 300 << 20
    warm: float = 0.0

    def sustained(self) -> Effort:
        """For what uses tiles: some processors slow down when these have worked a while.

        Without it the engine that is measured after one without tiles would be the faster one.
        """
        return replace(self, warm=2 * self.min_time)

    def copies(self, nbytes: int) -> int:
        """How many weights of ``nbytes`` leave the caches; small ones stay in them."""
        return max(1, min(MOST_COPIES, math.ceil(self.rotate / nbytes)))


QUICK = Effort(repeats=2, min_time=0.0, budget=0.0, rotate=1)


@dataclass
class Engine:
    """What is timed: the same work on each copy of the weights.

    Attributes:
        name: in the results.
        calls: one for each copy.
        facts: what else its row says, such as errors.
        executor: the thread it must run on, if not the caller's.
    """

    name: str
    calls: Calls
    facts: Mapping[str, Any] = field(default_factory=dict)
    executor: Executor | None = None

    def measure(self, loops: int, start: int = 0) -> Seconds:
        """A call's time: CPU time of its thread, wall, CPU time of the whole process.

        Args:
            loops: calls to make.
            start: the copy to begin with, modulo their number.
        """
        if self.executor is not None:
            return self.executor.submit(self._measure, loops, start).result()
        return self._measure(loops, start)

    def _measure(self, loops: int, start: int) -> Seconds:
        order = [self.calls[(start + i) % len(self.calls)] for i in range(loops)]
        whole, wall, own = time.process_time(), time.perf_counter(), time.thread_time()
        for call in order:
            call()
        own, wall = time.thread_time() - own, time.perf_counter() - wall
        return own / loops, wall / loops, (time.process_time() - whole) / loops


def interleaved(
    engines: Iterable[Engine], effort: Effort, *, wall: bool = False
) -> list[dict[str, Any]]:
    """One row for each engine: median, quartiles, minimum in seconds, and its facts.

    Args:
        engines: measured in turn, round after round.
        effort: see there.
        wall: wall time instead of the thread's CPU time.
    """
    plans = []
    for engine in engines:
        engine.measure(1)
        first = max(engine.measure(1)[1], 1e-9)
        loops = max(1, math.ceil(effort.min_time / first))
        rounds = min(effort.repeats, max(3, int(effort.budget / (first * loops))))
        warm = math.ceil(effort.warm / first)
        plans.append((engine, warm, loops, max(1, effort.repeats // rounds)))
    times: dict[str, list[Seconds]] = {plan[0].name: [] for plan in plans}
    position = 0  # engines that share buffers go on where the last ended: the oldest in the caches
    gc.collect()
    gc.disable()
    try:
        for turn in range(effort.repeats):
            for engine, warm, loops, every in plans:
                if turn % every == 0:
                    if warm:
                        engine.measure(warm, position)
                        position += warm
                    times[engine.name].append(engine.measure(loops, position))
                    position += loops
    finally:
        gc.enable()
    return [
        {"engine": engine.name, **_summary(times[engine.name], wall=wall), **engine.facts}
        for engine, *_ in plans
    ]


def _summary(times: list[Seconds], *, wall: bool) -> dict[str, Any]:
    own = sorted(t[1 if wall else 0] for t in times)
    quartiles = statistics.quantiles(own, n=4, method="inclusive") if len(own) > 1 else own * 3
    summary = {
        "clock": "wall" if wall else "thread CPU",
        "median": statistics.median(own),
        "quartiles": [quartiles[0], quartiles[2]],
        "minimum": own[0],
        "repeats": len(own),
    }
    whole = statistics.median(t[2] / max(t[0], 1e-9) for t in times)
    if not wall and whole > 1.2:  # CPU time that other threads took for it
        summary["CPU time of all threads"] = whole * summary["median"]
    return summary


def add_ratios(rows: list[dict[str, Any]], base: str, key: str) -> None:
    """``key``: how many times faster than engine ``base`` each row is; by minima of wall times."""
    found = [row for row in rows if row["engine"] == base]
    for row in rows if found else []:
        statistic = "minimum" if row["clock"] == "wall" else "median"
        row[key] = found[0][statistic] / row[statistic]


def absent(engine: str, error: BaseException | str, **fields: Any) -> dict[str, Any]:
    """The row of an engine that cannot run here, with the reason."""
    reason = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    lines = reason.strip().splitlines() or ["no reason given"]
    return {"engine": engine, "absent": lines[0][:300], **fields}


def relative_error(found: Tensor, expected: Tensor) -> float:
    """``|found - expected| / |expected|``, in fp64."""
    distance = (found.double() - expected.double()).norm()
    return float(distance / expected.double().norm().clamp(min=1e-300))


def random_weight(rows: int, cols: int, *, seed: int = 0) -> Tensor:
    """Gaussian fp32, as of a linear layer."""
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * 0.02
