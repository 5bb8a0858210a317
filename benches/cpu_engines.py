"""Linear layers to time, ``y = x W^T`` without gradients: qkern's calls and torch's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from cpu_timing import Effort, Engine, absent, relative_error
from torch import Tensor
from torch.nn import functional as F

import qkern
from qkern.tensor import QuantizedTensor

# Rows of x whose products are compared: the ends of the tiles and panels that kernels have.
CHECKED = (*range(9), 15, 16, 17, 31, 63, 127, 255, 511, 1023, 2047)


class WrongResultError(AssertionError):
    """An engine is further from the product of its own weight than it may be."""


class Inputs:
    """x for all M, each the beginning of the largest, and what the oracle makes of it in fp64."""

    def __init__(self, exact: Tensor, M: int) -> None:
        """``exact`` is the unquantized weight (out_features, in_features), M the largest."""
        self.exact = exact
        self.x = torch.randn(M, exact.shape[1], generator=torch.Generator().manual_seed(1))
        self._products: dict[tuple[str, torch.dtype], Tensor] = {}

    def product(self, name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """x W^T for the rows of CHECKED, x rounded to ``dtype``; kept by name."""
        key = (name, dtype)
        if key not in self._products:
            rows = self.x[[m for m in CHECKED if m < len(self.x)]].to(dtype)
            self._products[key] = rows.double() @ weight.double().mT
        return self._products[key]


@dataclass
class Linear:
    """A layer of one package, in as many copies as leave the caches.

    Attributes:
        name: in the results.
        weights: one for each copy.
        call: (weight, x) to y.
        dense: (out_features, in_features), what its weight stands for: the oracle multiplies it.
        dtype: of x.
        tolerance: relative RMS error that it may have against x W^T in fp64.
        slow_above: largest M at which it is worth waiting for.
        only: the M at which it is measured, if not at all.
        executor: the thread it must run on, if not the caller's.
        bind_with: makes one call for each copy, and what gives the last one's y; for packages whose
            calls are prepared for an x.
    """

    name: str
    weights: list[Any]
    call: Callable[[Any, Tensor], Tensor]
    dense: Tensor
    dtype: torch.dtype
    tolerance: float
    slow_above: int = 1 << 20
    only: tuple[int, ...] = ()
    executor: Executor | None = None
    bind_with: Callable[[Tensor], tuple[list[Callable[[], Any]], Callable[[], Tensor]]] | None = (
        None
    )

    def bind(self, x: Tensor) -> tuple[list[Callable[[], Any]], Callable[[], Tensor]]:
        """One call for each copy, and one that gives y."""
        if self.bind_with is not None:
            return self.bind_with(x)
        calls = [partial(self.call, weight, x) for weight in self.weights]
        return calls, calls[-1]

    def engine(self, inputs: Inputs, M: int) -> Engine:
        """Checked against the oracle, ready to be timed.

        Args:
            inputs: x and the unquantized weight.
            M: rows of x to multiply.

        Raises:
            WrongResultError: if the product is not that of its weight.
        """
        calls, result = self.bind(inputs.x[:M].to(self.dtype))
        rows = [m for m in CHECKED if m < M]
        run = calls[-1]
        if self.executor is not None:
            self.executor.submit(run).result()
            y = self.executor.submit(result).result()
        else:
            run()
            y = result()
        mine = inputs.product(self.name, self.dense, self.dtype)[: len(rows)]
        exact = inputs.product("exact", inputs.exact, self.dtype)[: len(rows)]
        facts = {
            "error": relative_error(y[rows], mine),
            "error against the exact weight": relative_error(y[rows], exact),
            "copies": len(calls),
        }
        if not facts["error"] <= self.tolerance:  # a NaN is wrong too
            msg = f"{self.name}, M={M}: relative error {facts['error']:.2e} > {self.tolerance}"
            raise WrongResultError(msg)
        return Engine(self.name, calls, facts, self.executor)


def qkern_weights(w: Tensor, effort: Effort, quant_type: str = "nf4") -> list[QuantizedTensor]:
    """Copies with scales in 8 bits, blocks of 64: what ``quantize`` gives by default."""
    first = qkern.quantize(w, quant_type)
    more = effort.copies(first.packed.nbytes) - 1
    return [first, *(qkern.quantize(w, quant_type) for _ in range(more))]


def with_qkern(
    w: Tensor, effort: Effort, *, dtype: torch.dtype = torch.bfloat16, compute: str = "exact"
) -> Linear:
    """``qkern.linear(x, q)``."""
    weights = qkern_weights(w, effort)
    name, tolerance = "qkern", 1e-6 if dtype == torch.float32 else 5e-3
    if compute != "exact":
        name, tolerance = f"qkern, {compute} compute", 5e-2

    def call(q: Any, x: Tensor) -> Tensor:
        return qkern.linear(x, q, compute=compute)

    return Linear(name, weights, call, weights[0].dequantize(torch.float32), dtype, tolerance)


def with_torch(w: Tensor, effort: Effort, *, dtype: torch.dtype) -> Linear:
    """The unquantized layer."""
    weights = [w.to(dtype, copy=True) for _ in range(effort.copies(w.numel() * dtype.itemsize))]
    short = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    return Linear(
        f"torch {short}", weights, lambda w, x: F.linear(x, w), weights[0].float(), dtype, tolerance
    )


MINE = ("qkern", "qkern, int8 compute", "torch bf16", "torch fp32")
Builder = Callable[[Tensor, Effort], Linear]

OWN: dict[str, Builder] = {
    "qkern": with_qkern,
    "qkern, int8 compute": partial(with_qkern, compute="int8"),
    "torch bf16": partial(with_torch, dtype=torch.bfloat16),
}


def build(
    builders: dict[str, Builder], w: Tensor, effort: Effort
) -> tuple[list[Linear], list[dict[str, Any]]]:
    """The layers that can be had, and rows that say why the others cannot."""
    layers, missing = [], []
    for name, builder in builders.items():
        try:
            layers.append(builder(w, effort))
        except Exception as error:  # noqa: PERF203 - whatever a peer raises is its reason
            if name in OWN:
                raise
            missing.append(absent(name, error))
    return layers, missing


def engines(
    layers: Iterable[Linear], inputs: Inputs, M: int
) -> tuple[list[Engine], list[dict[str, Any]]]:
    """Checked engines for M rows, and rows for those that fail; qkern and torch must not fail."""
    ready, failed = [], []
    for layer in layers:
        if layer.slow_above < M:
            failed.append(absent(layer.name, f"left out above M={layer.slow_above}: too slow"))
            continue
        if layer.only and M not in layer.only:
            failed.append(absent(layer.name, f"measured at M in {layer.only} only"))
            continue
        try:
            ready.append(layer.engine(inputs, M))
        except Exception as error:
            if layer.name in MINE:
                raise
            failed.append(absent(layer.name, error))
    return ready, failed
