"""Quantize and dequantize beside a copy that moves as many bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import gpu_weights
import torch
from gpu_plan import Cell, Row, Run, Shape
from gpu_timing import Engine, absent, add_ratios, checked, interleaved, relative_error
from gpu_weights import NF4_BYTES
from torch import Tensor

import qkern
from qkern.formats import QuantFormat

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FORMAT = QuantFormat("nf4", 64)
BITSANDBYTES = "bitsandbytes"
# Of NF4 itself on Gaussian values.
TOLERANCE = 0.12


def cells(run: Run) -> Iterator[Cell]:
    """Both ways in bf16, as layers need them; fp32 after that."""
    shape = (64, 128) if run.plan.quick else (28672, 4096)
    for name, importance in (("bf16", 1), ("fp32", 3))[: 1 if run.plan.quick else 2]:
        for op, work in (("quantize", quantize_rows), ("dequantize", dequantize_rows)):
            cell = partial(work, run, shape, name)
            yield Cell("codec", f"{op} {name}", importance, 4, cell)


def compilations(run: Run) -> Iterator[Callable[[], object]]:
    """Each kernel in each dtype."""
    for dtype in DTYPES.values():
        yield partial(_round_trip, dtype, run.plan.device)


def _round_trip(dtype: torch.dtype, device: torch.device) -> None:
    _decode(_encode(torch.ones(64, 128, dtype=dtype, device=device)), dtype, 64 * 128)


def _encode(values: Tensor) -> tuple[Tensor, ...]:
    """The kernels, without the question whether all is finite and scales are safe."""
    from qkern.kernels.quantize import quantize
    from qkern.kernels.quantize_absmax import quantize_absmax

    packed, absmax = quantize(values, FORMAT.replace(double_quant=False))
    return (packed, *quantize_absmax(absmax)[:3])


def _decode(
    parts: tuple[Any, ...], dtype: torch.dtype, numel: int, out: Tensor | None = None
) -> Tensor:
    from qkern.kernels.dequantize import dequantize

    return dequantize(*parts, FORMAT, numel, dtype, out)


def _copies(run: Run, nbytes: int) -> int:
    return 1 if run.plan.quick else max(2, min(8, run.plan.effort.copies(nbytes)))


def _copy(nbytes: float, device: torch.device) -> Engine:
    """torch's copy of half as many bytes: read and written they are as many."""
    source, target = torch.randint(0, 256, (2, int(nbytes / 2)), device=device, dtype=torch.uint8)
    return Engine("copy", [lambda: target.copy_(source)], graph=True)


def _reported(run: Run, engines: list[Engine], nbytes: float, **about: Any) -> Iterator[Row]:
    rows = interleaved(engines, run.plan.effort, run.plan.device)
    add_ratios(rows, "copy", "share of copy")
    add_ratios(rows, BITSANDBYTES, f"times faster than {BITSANDBYTES}")
    for row in rows:
        yield {**about, **row, "GB/s": nbytes / row["median"] / 1e9}


def quantize_rows(run: Run, shape: Shape, name: str) -> Iterator[Row]:
    """Values to NF4 and 8-bit scales."""
    plan, dtype = run.plan, DTYPES[name]
    numel = shape[0] * shape[1]
    nbytes = numel * (dtype.itemsize + NF4_BYTES)
    w = gpu_weights.values(shape, plan.device).to(dtype)
    copies = [w, *(w.clone() for _ in range(_copies(run, w.nbytes) - 1))]
    about = {"case": "quantize", "dtype": name, "N": shape[0], "K": shape[1]}
    decoded = _decode(_encode(w), torch.float32, numel)
    facts = checked("quantize", {"error": relative_error(decoded, w.reshape(-1))}, TOLERANCE)
    public = qkern.quantize(w).dequantize(torch.float32)
    checked("qkern.quantize", {"error": relative_error(public, w)}, TOLERANCE)
    engines = [
        _copy(nbytes, plan.device),
        Engine("qkern", [partial(_encode, c) for c in copies], facts, graph=True),
        Engine("qkern.quantize, checks included", [partial(qkern.quantize, c) for c in copies]),
    ]
    if plan.peers:
        try:
            theirs = relative_error(gpu_weights.Theirs.of(w).dense(), w)
            facts = checked(BITSANDBYTES, {"error": theirs}, TOLERANCE)
        except Exception as error:
            yield about | absent(BITSANDBYTES, error)
        else:
            # Not in a graph: it copies its table of codes from the host in each call.
            calls = [partial(gpu_weights.Theirs.of, c) for c in copies]
            engines.append(Engine(BITSANDBYTES, calls, facts))
    yield from _reported(run, engines, nbytes, **about)


def dequantize_rows(run: Run, shape: Shape, name: str) -> Iterator[Row]:
    """NF4 and 8-bit scales to values: in one kernel, into memory that is used again."""
    plan, dtype = run.plan, DTYPES[name]
    numel = shape[0] * shape[1]
    nbytes = numel * (dtype.itemsize + NF4_BYTES)
    w = gpu_weights.values(shape, plan.device)
    copies = gpu_weights.quantized(w, plan)[: _copies(run, int(nbytes))]
    out = torch.empty(numel, dtype=dtype, device=plan.device)
    about = {"case": "dequantize", "dtype": name, "N": shape[0], "K": shape[1]}
    error = relative_error(_decode(copies[-1].parts, dtype, numel, out), w.reshape(-1))
    facts = checked("dequantize", {"error": error}, TOLERANCE)
    calls = [partial(_decode, q.parts, dtype, numel, out) for q in copies]
    public = [partial(q.dequantize, dtype) for q in copies]
    engines = [
        _copy(nbytes, plan.device),
        Engine("qkern", calls, facts, graph=True),
        Engine("q.dequantize, fresh output", public, graph=True),
    ]
    if plan.peers and name == "bf16":
        try:
            weights = gpu_weights.their_copies(w, plan)[: len(copies)]
            facts = checked(
                BITSANDBYTES, {"error": relative_error(weights[-1].dense(), w)}, TOLERANCE
            )
        except Exception as error:
            yield about | absent(BITSANDBYTES, error)
        else:
            engines.append(
                Engine(BITSANDBYTES, [weight.dense for weight in weights], facts, graph=True)
            )
    yield from _reported(run, engines, nbytes, **about)
