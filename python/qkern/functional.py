"""``qkern.quantize`` and ``qkern.dequantize`` for torch tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qkern import ops
from qkern.arrays import QuantizedArray
from qkern.codec import NONFINITE, check_choice
from qkern.errors import DTypeError, FrozenWeightError, ShapeError
from qkern.formats import QuantFormat, resolve_format
from qkern.reference import Parts
from qkern.tensor import QuantizedTensor


def quantize(
    values: Tensor,
    quant_type: str | QuantFormat = "nf4",
    *,
    blocksize: int = 64,
    double_quant: bool = True,
    method: str = "absmax",
    importance: Tensor | None = None,
    nonfinite: str = "error",
) -> QuantizedTensor:
    """Quantize a torch tensor on its device: ``qkern.quantize`` for tensors.

    The result is detached: quantizing has no derivative.
    """
    fmt = resolve_format(quant_type, blocksize=blocksize, double_quant=double_quant)
    check_choice("nonfinite", nonfinite, NONFINITE)
    return QuantizedTensor.from_dense(
        values, fmt, method=method, importance=importance, nonfinite=nonfinite
    )


def dequantize(
    q: QuantizedTensor, dtype: torch.dtype | None = None, *, out: Tensor | None = None
) -> Tensor:
    """The dense tensor, into ``out`` if it is given: ``qkern.dequantize`` for tensors."""
    if not isinstance(q, QuantizedTensor):
        msg = f"dequantize takes what quantize returned, got a {type(q).__name__}"
        raise DTypeError(msg)
    if dtype is not None and not isinstance(dtype, torch.dtype):
        msg = f"dtype must be a torch dtype, such as torch.bfloat16, got {dtype!r}"
        raise DTypeError(msg)
    if out is None:
        return q.dequantize(dtype)
    _check_out(q, dtype, out)
    if q.is_whole and out.dtype != torch.float64 and ops.decoded_into(q.parts, q.format, out):
        return out
    return out.copy_(q.dequantize(out.dtype))


def _check_out(q: QuantizedTensor, dtype: torch.dtype | None, out: Any) -> None:
    """Refuse what dense values cannot be written into, element by element."""
    if not isinstance(out, Tensor) or isinstance(out, QuantizedTensor):
        msg = f"out must be a dense torch tensor, got a {type(out).__name__}"
        raise DTypeError(msg)
    if dtype not in (None, out.dtype) or out.shape != q.shape or out.device != q.device:
        msg = (
            f"out is {tuple(out.shape)} {out.dtype} on {out.device}: {tuple(q.shape)} "
            f"{dtype or out.dtype} on {q.device} is needed"
        )
        raise ShapeError(msg)
    sizes = zip(out.shape, out.stride(), strict=True) if out.layout == torch.strided else [(2, 0)]
    if any(size > 1 and stride == 0 for size, stride in sizes):
        msg = "out has elements that share memory (expand), or is not dense: clone() it first"
        raise ShapeError(msg)
    if out.requires_grad and torch.is_grad_enabled():
        msg = "out requires a gradient: pass out.detach(), or call this under torch.no_grad()"
        raise FrozenWeightError(msg)


def from_array(q: QuantizedArray) -> QuantizedTensor:
    """The tensor that shares a ``QuantizedArray``'s memory."""
    arrays = (q.packed, q.absmax, q.nested_absmax, q.offset)
    parts = Parts(*(None if a is None else torch.from_numpy(a) for a in arrays))  # type: ignore[arg-type]
    return QuantizedTensor.from_parts(parts, q.format, q.shape, getattr(torch, q.dtype))
