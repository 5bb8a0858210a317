"""What bench_gpu.py measures: sizes, stages, and cells that can be left out one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from gpu_timing import QUICK, Effort

Row = dict[str, Any]
Shape = tuple[int, int]  # (out_features, in_features)

STAGES = ("ceilings", "checks", "decode", "linear", "train", "model", "codec")
# Rank of the adapters.
R = 16


@dataclass(frozen=True)
class Plan:
    """Sizes of everything.

    Attributes:
        device: to measure.
        quick: one tiny case of each, whose times mean nothing.
        peers: other packages too.
    """

    device: torch.device
    quick: bool = False
    peers: bool = True

    @property
    def effort(self) -> Effort:
        """How long to measure."""
        return QUICK if self.quick else Effort()

    @property
    def shapes(self) -> dict[Shape, int]:
        """Weights of Llama 8B, q+k+v and gate+up in one too; and how much each matters, 1 most."""
        if self.quick:
            return {(64, 128): 1}
        main = {(14336, 4096): 1, (4096, 4096): 1, (4096, 14336): 2, (1024, 4096): 2}
        return main | {(6144, 4096): 3, (28672, 4096): 3}

    @property
    def tokens(self) -> dict[int, int]:
        """Rows of x; those of the goals matter most."""
        if self.quick:
            return {1: 1, 8: 1, 600: 2}
        first = dict.fromkeys((1, 8, 16, 64, 512), 1)
        second = dict.fromkeys((4, 32, 128, 256, 2048), 2)
        third = dict.fromkeys((1024, 4096, 8192), 3)
        return dict(sorted((first | second | third).items()))


@dataclass(frozen=True)
class Cell:
    """Rows that belong together, and are left out together.

    Attributes:
        stage: of ``STAGES``.
        name: of the cell within its stage.
        importance: 0 is never left out, then 1 first; what is left out has the highest number.
        seconds: that it is expected to take.
        run: makes the rows.
    """

    stage: str
    name: str
    importance: int
    seconds: float
    run: Callable[[], Iterable[Row]] = field(repr=False)

    @property
    def key(self) -> str:
        """Its name in the results."""
        return f"{self.stage}: {self.name}"


def in_order(cells: Iterable[Cell]) -> list[Cell]:
    """The order in which they run: what matters first, else as they come."""
    return sorted(cells, key=lambda cell: cell.importance)


class Run:
    """What stages ask for besides the plan: rows that earlier cells made."""

    def __init__(self, plan: Plan, rows: list[Row]) -> None:
        self.plan, self.rows = plan, rows

    def ceiling(self, engine: str, key: str) -> float | None:
        """A ceiling that this run measured; None before."""
        found = [row[key] for row in self.rows if row.get("engine") == engine and key in row]
        return found[0] if found else None

    def floor(self, nbytes: float, operations: float) -> float | None:
        """Seconds that moving the bytes and the products take at least, by measured ceilings."""
        copy, rate = self.ceiling("copy", "GB/s"), self.ceiling("matmul bf16", "TFLOP/s")
        if copy is None or rate is None:
            return None
        return max(nbytes / copy / 1e9, operations / rate / 1e12)


def _modules(stages: Iterable[str]) -> list[Any]:
    """Those of the stages, in the order of ``STAGES``."""
    import gpu_ceilings
    import gpu_checks
    import gpu_codec
    import gpu_decode
    import gpu_linear
    import gpu_model
    import gpu_train

    modules = (gpu_ceilings, gpu_checks, gpu_decode, gpu_linear, gpu_train, gpu_model, gpu_codec)
    chosen = set(stages)
    return [each for stage, each in zip(STAGES, modules, strict=True) if stage in chosen]


def cells(run: Run, stages: Iterable[str]) -> Iterator[Cell]:
    """All cells of the stages, in the order in which they are listed."""
    for module in _modules(stages):
        yield from module.cells(run)


def compilations(run: Run, stages: Iterable[str]) -> list[Callable[[], object]]:
    """Calls that compile what will run, to be shared among processes; the longest first.

    The model needs what training a layer needs.
    """
    needed = {"train" if stage == "model" else stage for stage in stages} - {"ceilings"}
    return [call for module in _modules(needed) for call in module.compilations(run)]
