"""The ways to look up a 4-bit code, in the kernels that decode: which is fastest on this device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import gpu_weights
import torch
from gpu_device import random
from gpu_plan import Cell, Row, Run, Shape
from gpu_timing import Engine, absent, add_ratios, checked, interleaved, relative_error
from torch import Tensor

from qkern import kernels, reference
from qkern.tensor import QuantizedTensor

# What ``qkern.kernels.decode`` takes for LOOKUP; the interpreter runs no assembly.
WAYS = ("shuffle", "table")
TOKENS = (1, 2, 16, 64, 256)


def cells(run: Run) -> Iterator[Cell]:
    """Decoding alone, and inside products."""
    shape = next(iter(run.plan.shapes))
    yield Cell("decode", "ways to look up a code", 2, 12, partial(rows, run, shape))


def compilations(run: Run) -> Iterator[Callable[[], object]]:
    """Each way in each kernel."""
    shape = next(iter(run.plan.shapes))
    for way in _ways(run):
        yield partial(_decode, way, gpu_weights.random_quantized(shape, run.plan.device))
        for M in _tokens(run):
            yield partial(_compile, way, M, shape, run.plan.device)


def _ways(run: Run) -> tuple[str, ...]:
    from qkern.kernels import decode

    ways: tuple[str, ...] = getattr(decode, "WAYS", WAYS)
    is_nvidia = run.plan.device.type == "cuda" and torch.version.hip is None
    return ways if is_nvidia else ("table",)


def _tokens(run: Run) -> tuple[int, ...]:
    return TOKENS[:1] if run.plan.quick else TOKENS


@contextlib.contextmanager
def looked_up(way: str) -> Iterator[None]:
    """Launches within look codes up that way."""
    from qkern.kernels import launch

    with mock.patch.object(launch, "lookup", return_value=way):
        yield


def _decode(way: str, q: QuantizedTensor, out: Tensor | None = None) -> Tensor:
    from qkern.kernels.dequantize import dequantize

    with looked_up(way):
        return dequantize(*q.parts, q.format, q.numel(), torch.bfloat16, out)


def _multiply(way: str, q: QuantizedTensor, x: Tensor) -> Tensor:
    from qkern.kernels import launch
    from qkern.kernels.linear import linear

    with looked_up(way):
        return linear(x, launch.weight(*q.parts, q.format, tuple(q.shape)))


def _compile(way: str, M: int, shape: Shape, device: torch.device) -> None:
    x = torch.zeros(M, shape[1], dtype=torch.bfloat16, device=device)
    _multiply(way, gpu_weights.random_quantized(shape, device), x)


def rows(run: Run, shape: Shape) -> Iterator[Row]:
    """Each way must decode to the reference's bytes before it is timed."""
    plan = run.plan
    ways = _ways(run)
    for way in WAYS:
        if way not in ways:
            yield {"case": "decode", **absent(way, kernels_say(plan.device))}
    copies = gpu_weights.quantized(gpu_weights.values(shape, plan.device), plan)
    about = {"case": "decode", "N": shape[0], "K": shape[1]}
    out = torch.empty(copies[0].numel(), dtype=torch.bfloat16, device=plan.device)
    last = copies[-1]
    head = last.numel() // 64
    right = reference.dequantize(last.parts, last.format, last.numel(), torch.bfloat16)
    engines = []
    for way in ways:
        same = torch.equal(_decode(way, last), right)
        facts = checked(f"decode by {way}", {"error": 0.0 if same else float("nan")}, 0.0)
        calls = [partial(_decode, way, q, out) for q in copies]
        engines.append(Engine(way, calls, facts, graph=True))
    for row in _compared(engines, run):
        row["weights/ns"] = head * 64 / row["median"] / 1e9
        yield about | {"op": "dequantize"} | row
    dense = right.view(shape).double()
    for M in _tokens(run):
        x = random(M, shape[1], device=plan.device, seed=M).bfloat16()
        exact = x.double() @ dense.mT
        engines = []
        for way in ways:
            error = relative_error(_multiply(way, last, x), exact)
            facts = checked(f"{way}, M={M}", {"error": error}, 1e-2)
            calls = [partial(_multiply, way, q, x) for q in copies]
            engines.append(Engine(way, calls, facts, graph=True))
        for row in _compared(engines, run):
            yield about | {"op": "linear", "M": M} | row


def _compared(engines: list[Engine], run: Run) -> list[dict[str, Any]]:
    rows = interleaved(engines, run.plan.effort, run.plan.device)
    add_ratios(rows, "table", "times faster than table")
    return rows


def kernels_say(device: torch.device) -> str:
    """Why only one way is there."""
    return kernels.why_not(device) or "its assembly is for NVIDIA's GPUs"
