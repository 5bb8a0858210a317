"""Weights with what an adapter adds to them; of stacked experts one after the other.

So a merge holds an expert or two as fp32, whatever the size of the stack.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from qkern import ops
from qkern.codec import check_method
from qkern.errors import NonFiniteError
from qkern.experts_lora import ExpertWeight
from qkern.tensor import QuantizedTensor


class Squares(NamedTuple):
    """Sums of squares over the values of a weight."""

    exact: float  # the exact sum
    error: float  # the result's distance to it
    delta: float  # what was added


def exact_sum(weight: QuantizedTensor, delta: Tensor) -> Tensor:
    """The base in its dtype and the adapter's part, added in fp32."""
    return weight.dequantize(base_dtype(weight)).float() + delta


def base_dtype(weight: QuantizedTensor) -> torch.dtype:
    """What a base is rounded to before anything is added."""
    return torch.float32 if weight.dtype == torch.float64 else weight.dtype


def squares_of(exact: Tensor, result: Tensor, delta: Tensor) -> Squares:
    """Those of a whole weight, or of an expert's."""
    norms = (
        torch.linalg.vector_norm(t, dtype=torch.float64) for t in (exact, result - exact, delta)
    )
    return Squares(*(float(norm) ** 2 for norm in norms))


def quantized_stack(layer: ExpertWeight, method: str) -> tuple[QuantizedTensor, Squares]:
    """The weight with the active adapter in it, in its own format, and what became of that.

    The bytes are those of the whole sum quantized at once. If nothing is added it is the weight
    itself: quantizing the same again would change bytes.

    Raises:
        FormatError: for an unknown method, and for a format that is only read.
        NonFiniteError: for NaN or infinity in a sum.
    """
    weight = layer.quantized_weight
    check_method(method, weight.format, has_importance=False)
    merged = weight
    if _adds(layer):
        with torch.inference_mode(False):
            sums = functools.partial(_exact_sums, layer)
            parts, fmt = ops.stack_to_parts(sums, weight.format, method)
            merged = QuantizedTensor.from_parts(parts, fmt, weight.shape, torch.float32)
    return merged, _measured(layer, lambda expert, _: _decoded(merged, expert, torch.float32))


def stack_without(layer: ExpertWeight) -> QuantizedTensor:
    """The weight less what the active adapter adds, quantized again: what ``-=`` leaves."""
    weight = layer.quantized_weight

    def differences() -> Iterator[Tensor]:
        for expert in range(weight.shape[0]):
            delta = layer.delta(expert).to(weight.dtype)
            left = _decoded(weight, expert, weight.dtype) - delta
            yield left.float() if left.dtype == torch.float64 else left

    if not _adds(layer):
        return weight
    with torch.inference_mode(False):
        parts, fmt = ops.stack_to_parts(differences, weight.format, "absmax")
        return QuantizedTensor.from_parts(parts, fmt, weight.shape, weight.dtype)


def dense_stack(layer: ExpertWeight, dtype: torch.dtype) -> tuple[Tensor, Squares]:
    """The sums, rounded to a dtype, and what became of the adapter.

    Raises:
        NonFiniteError: for NaN or infinity, naming the expert.
    """
    weight = layer.quantized_weight
    values = torch.empty(weight.shape, dtype=dtype, device=weight.device)

    def rounded(expert: int, exact: Tensor) -> Tensor:
        values[expert] = exact
        try:
            check_rounded(values[expert], exact)
        except NonFiniteError as error:
            msg = f"expert {expert}: {error}"
            raise NonFiniteError(msg) from error
        return values[expert].float()

    return values, _measured(layer, rounded)


def check_rounded(values: Tensor, exact: Tensor) -> None:
    """Refuse a sum that is not finite, rounded or exact.

    Raises:
        NonFiniteError: saying why.
    """
    if not bool(values.isfinite().all()):
        fits = bool(exact.isfinite().all())
        why = (
            f"{values.dtype} cannot hold it, bfloat16 can" if fits else "the adapter is not finite"
        )
        msg = f"the weight with its adapter holds NaN or infinity: {why}"
        raise NonFiniteError(msg)


def _measured(layer: ExpertWeight, result: Callable[[int, Tensor], Tensor]) -> Squares:
    """What results are worth, that are made of an expert's number and its exact sum."""
    found = [
        squares_of(exact, result(expert, exact), delta)
        for expert, (exact, delta) in enumerate(_sums(layer))
    ]
    return Squares(*map(math.fsum, zip(*found, strict=True)))


def _adds(layer: ExpertWeight) -> bool:
    """Whether the active adapter is more than zeros."""
    return any(bool(layer.delta(expert).any()) for expert in range(layer.weight.shape[0]))


def _exact_sums(layer: ExpertWeight) -> Iterator[Tensor]:
    return (exact for exact, _ in _sums(layer))


def _sums(layer: ExpertWeight) -> Iterator[tuple[Tensor, Tensor]]:
    """Exact sum and adapter's part of each expert, fp32 (..., ...)."""
    weight = layer.quantized_weight
    for expert in range(weight.shape[0]):
        delta = layer.delta(expert)
        yield _decoded(weight, expert, base_dtype(weight)).float() + delta, delta


def _decoded(weight: QuantizedTensor, expert: int, dtype: torch.dtype) -> Tensor:
    one: QuantizedTensor = weight[expert]  # type: ignore[assignment]
    return one.dequantize(dtype)
