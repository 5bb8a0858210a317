"""``y = x W^T`` from one token to thousands, for every shape, beside each other way to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import gpu_weights
import torch
from gpu_device import is_lost, random
from gpu_plan import Cell, Plan, Row, Run, Shape
from gpu_timing import Engine, absent, add_ratios, checked, interleaved, relative_error
from gpu_weights import NF4_BYTES, Linear
from torch import Tensor

import qkern

BASE = "torch bf16"
OURS = "qkern"
TOLERANCE = 1e-2  # relative RMS error of bf16 results
# Rows of x whose products are compared: the ends of tiles.
CHECKED = (*range(9), 15, 16, 17, 31, 63, 64, 127, 128, 255, 511, 512, 1023, 2047, 4095, 8191)


def cells(run: Run) -> Iterator[Cell]:
    """Each shape with numbers of tokens that matter as much."""
    plan = run.plan
    for shape, first in plan.shapes.items():
        groups: dict[int, list[int]] = {}
        for M, importance in plan.tokens.items():
            groups.setdefault(max(first, importance), []).append(M)
        for importance, Ms in groups.items():
            cost = sum(0.8 + 1e-14 * 150 * M * shape[0] * shape[1] for M in Ms)
            name = f"{_named(shape)}, M={','.join(map(str, Ms))}"
            yield Cell("linear", name, importance, 2 + cost, partial(grid, run, shape, Ms))
    shape = next(iter(plan.shapes))
    yield Cell("linear", "calls without a graph", 2, 4, partial(calls, run, shape))


def compilations(run: Run) -> Iterator[Callable[[], object]]:
    """Every product of the grid."""
    device = run.plan.device
    for shape in run.plan.shapes:
        for M in run.plan.tokens:
            yield partial(_compile, shape, M, device)


def _compile(shape: Shape, M: int, device: torch.device) -> None:
    x = torch.zeros(M, shape[1], dtype=torch.bfloat16, device=device)
    qkern.linear(x, gpu_weights.random_quantized(shape, device))


def _named(shape: Shape) -> str:
    return f"{shape[0]}x{shape[1]}"


def build(w: Tensor, plan: Plan) -> tuple[list[Linear], list[Row]]:
    """All ways, and rows for those that cannot be had here, with the reason."""
    ways = gpu_weights.of_qkern(w, plan) + gpu_weights.of_torch(w, plan)
    if not plan.peers:
        return ways, []
    try:
        return ways + gpu_weights.of_bitsandbytes(w, plan), []
    except Exception as error:  # whatever it raises is its reason
        return ways, [absent("bitsandbytes", error)]


class Inputs:
    """x for all M, each the beginning of the largest, and its exact products with a weight."""

    def __init__(self, M: int, K: int, device: torch.device) -> None:
        self.x = random(M, K, device=device, seed=1).bfloat16()
        self.rows = [m for m in CHECKED if m < M]
        self._exact: dict[str, Tensor] = {}

    def check(self, way: Linear, M: int) -> dict[str, float]:
        """The errors of a way at M tokens.

        Raises:
            WrongResultError: if they are too large.
        """
        if way.name not in self._exact:
            self._exact[way.name] = self.x[self.rows].double() @ way.dense().double().mT
        rows = [m for m in self.rows if m < M]
        y = way.call(way.weights[-1], self.x[:M])
        error = relative_error(y[rows], self._exact[way.name][: len(rows)])
        return checked(f"{way.name}, M={M}", {"error": error}, TOLERANCE)


def engines(
    ways: Iterable[Linear], inputs: Inputs, M: int, *, graph: bool
) -> Iterator[Engine | Row]:
    """Checked engines; rows for peers that fail. qkern and torch must not fail."""
    for way in ways:
        if M not in way.tokens:
            continue
        try:
            errors = inputs.check(way, M)
        except Exception as error:
            if way.name.startswith((OURS, BASE)) or is_lost(inputs.x.device):
                raise
            yield absent(way.name, error)
            continue
        x = inputs.x[:M]
        calls = [partial(way.call, weight, x) for weight in way.weights]
        yield Engine(way.name, calls, errors | {"copies": len(calls)}, graph)


def measured(
    case: str, ways: list[Linear], inputs: Inputs, shape: Shape, M: int, run: Run, *, graph: bool
) -> Iterator[Row]:
    """Rows of one number of tokens, with ratios and the floor that the ceilings give."""
    N, K = shape
    about = {"case": case, "dtype": "bf16", "M": M, "N": N, "K": K}
    ready = []
    for found in engines(ways, inputs, M, graph=graph):
        if isinstance(found, Engine):
            ready.append(found)
        else:
            yield about | found
    rows = interleaved(ready, run.plan.effort, run.plan.device)
    add_ratios(rows, BASE, f"times faster than {BASE}")
    ours = next(row["median"] for row in rows if row["engine"] == OURS)
    moved, operations = 2 * M * (N + K), 2 * M * N * K
    floors = {
        OURS: run.floor(N * K * NF4_BYTES + moved, operations),
        BASE: run.floor(2 * N * K + moved, operations),
    }
    for row in rows:
        row["qkern is times faster"] = row["median"] / ours
        if (floor := floors.get(row["engine"])) is not None:
            row |= {"floor": floor, "share of floor": floor / row["median"]}
        yield about | row


def grid(run: Run, shape: Shape, Ms: list[int]) -> Iterator[Row]:
    """One weight, several numbers of tokens."""
    plan = run.plan
    w = gpu_weights.values(shape, plan.device)
    ways, missing = build(w, plan)
    for row in missing:
        yield {"case": "linear", "N": shape[0], "K": shape[1], **row}
    inputs = Inputs(max(Ms), shape[1], plan.device)
    for M in Ms:
        yield from measured("linear", ways, inputs, shape, M, run, graph=True)


def calls(run: Run, shape: Shape) -> Iterator[Row]:
    """One token by calls, one after the other: what the host needs for each is in it."""
    ways, _ = build(gpu_weights.values(shape, run.plan.device), run.plan)
    inputs = Inputs(1, shape[1], run.plan.device)
    yield from measured("linear, calls", ways, inputs, shape, 1, run, graph=False)
