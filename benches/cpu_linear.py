"""Linear layers without gradients for bench_cpu.py: the ladder of M, exact fp32, small shapes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import cpu_engines
import limits
import torch
from cpu_engines import Inputs, Linear
from cpu_peers import PEERS
from cpu_timing import Effort, Engine, add_ratios, interleaved, random_weight

import qkern
from qkern.ops import host

Row = dict[str, Any]
BASE, TILES = "torch bf16", "limit: tiles"
TILED = 32  # from so many tokens on the tile instructions of a product are a bound worth showing


def read_limits(layers: Iterable[Linear]) -> list[Engine]:
    """Reading each copy of qkern's packed weight once, scales included."""
    for layer in layers:
        if layer.name.startswith("qkern"):
            parts = [[part for part in q.parts if part is not None] for q in layer.weights]
            ahead = [limits.reader(*p, ahead=limits.AHEAD) for p in parts]
            plain = [limits.reader(*p) for p in parts]
            return [Engine("limit: read", plain), Engine("limit: read, prefetched", ahead)]
    return []


def rows_for(
    layers: list[Linear], inputs: Inputs, M: int, effort: Effort, *, bounded: bool = True
) -> Iterator[Row]:
    """Each layer at M rows of x, with its error; ``bounded``: beside the read of its weight."""
    about = {"M": M, "N": inputs.exact.shape[0], "K": inputs.exact.shape[1]}
    engines, failed = cpu_engines.engines(layers, inputs, M)
    for row in failed:
        yield about | row
    bounds = read_limits(layers) if bounded else []
    if bounded and M >= TILED and limits.has_tiles():
        bounds.append(Engine(TILES, [limits.multiplier(M, about["N"], about["K"])]))
    rows = interleaved([*bounds, *engines], effort.sustained() if M >= TILED else effort)
    add_ratios(rows, BASE, f"times faster than {BASE}")
    add_ratios(rows, "qkern", "times faster than qkern")
    found = {row["engine"]: row["median"] for row in rows}
    for row in rows:
        if TILES in found and row["engine"] in {BASE, "qkern"}:
            row["share of tiles"] = found[TILES] / row["median"]
        if bounds and row["engine"].startswith("qkern"):
            row["share of read"] = found["limit: read"] / row["median"]
            fastest = min(found["limit: read"], found["limit: read, prefetched"])
            row["share of fastest read"] = fastest / row["median"]
        yield about | row


def ladder(size: tuple[int, int], Ms: list[int], effort: Effort, *, peers: bool) -> Iterator[Row]:
    """bf16 x, every engine, M from one token to thousands."""
    w = random_weight(*size)
    builders = cpu_engines.OWN | (PEERS if peers else {})
    layers, missing = cpu_engines.build(builders, w, effort)
    for row in missing:
        yield {"case": "linear", "dtype": "bf16", **row}
    inputs = Inputs(w, max(Ms))
    for M in Ms:
        for row in rows_for(layers, inputs, M, effort):
            yield {"case": "linear", "dtype": "bf16", **row}


def exact(size: tuple[int, int], effort: Effort) -> Iterator[Row]:
    """fp32 x, one token, within 1e-6 of the product in fp64."""
    w = random_weight(*size)
    kinds = (cpu_engines.with_qkern, cpu_engines.with_torch)
    layers = [make(w, effort, dtype=torch.float32) for make in kinds]
    for row in rows_for(layers, Inputs(w, 1), 1, effort):
        yield {"case": "linear", "dtype": "fp32", **row}


def in_l2(sizes: Iterable[tuple[int, int]], Ms: list[int], effort: Effort) -> Iterator[Row]:
    """Weights that stay in L2, without an operator: what the arithmetic alone can do.

    The rate between two sizes has no fixed cost of a call in it. Where it is about the rate at
    which memory is read, a product cannot reach that.
    """
    for N, K in sizes:
        q = qkern.quantize(random_weight(N, K))
        nbytes = sum(part.nbytes for part in q.parts if part is not None)
        for M in Ms:
            x = torch.randn(M, K, dtype=torch.float32 if M == 1 else torch.bfloat16)
            dtype, no_adapter = "fp32" if M == 1 else "bf16", (None, None, None, 1.0)
            engines = [
                Engine(name, [partial(host.linear, x, q.parts, q.format, N, *no_adapter, compute)])
                for name, compute in (("qkern", "exact"), ("qkern, int8 compute", "int8"))
            ]
            for row in interleaved(engines, effort):
                about = {"case": "linear, weight in L2", "dtype": dtype, "M": M, "N": N, "K": K}
                yield about | row | {"GB/s": nbytes / row["median"] / 1e9}


def other_shapes(
    case: str, sizes: Iterable[tuple[int, int]], Ms: list[int], effort: Effort
) -> Iterator[Row]:
    """qkern and torch alone."""
    for size in sizes:
        w = random_weight(*size)
        layers, _ = cpu_engines.build(cpu_engines.OWN, w, effort)
        inputs = Inputs(w, max(Ms))
        for M in Ms:
            for row in rows_for(layers, inputs, M, effort, bounded=case == "linear"):
                yield {"case": case, "dtype": "bf16", **row}


large = partial(other_shapes, "linear")
small = partial(other_shapes, "linear, small")
