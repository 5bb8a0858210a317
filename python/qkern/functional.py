"""``qkern.quantize`` and ``qkern.dequantize`` for torch tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from qkern.codec import NONFINITE, QuantizedArray, check_choice
from qkern.errors import ShapeError
from qkern.formats import QuantFormat, resolve_format
from qkern.ops import host
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
    """Quantize a torch tensor on its device: ``qkern.quantize`` for tensors."""
    fmt = resolve_format(quant_type, blocksize=blocksize, double_quant=double_quant)
    check_choice("nonfinite", nonfinite, NONFINITE)
    return QuantizedTensor.from_dense(
        values, fmt, method=method, importance=importance, nonfinite=nonfinite
    )


def dequantize(
    q: QuantizedTensor, dtype: torch.dtype | None = None, *, out: Tensor | None = None
) -> Tensor:
    """The dense tensor, into ``out`` if it is given: ``qkern.dequantize`` for tensors."""
    if out is None:
        return q.dequantize(dtype)
    if dtype not in (None, out.dtype) or out.shape != q.shape or out.device != q.device:
        msg = (
            f"out is {tuple(out.shape)} {out.dtype} on {out.device}: {tuple(q.shape)} "
            f"{dtype or out.dtype} on {q.device} is needed"
        )
        raise ShapeError(msg)
    if out.device.type == "cpu" and out.is_contiguous() and q.is_whole:
        host.dequantize_into(q.parts, q.format, out)
        return out
    return out.copy_(q.dequantize(out.dtype))


def from_array(q: QuantizedArray) -> QuantizedTensor:
    """The tensor that shares a ``QuantizedArray``'s memory."""
    arrays = (q.packed, q.absmax, q.nested_absmax, q.offset)
    parts = Parts(*(None if a is None else torch.from_numpy(a) for a in arrays))  # type: ignore[arg-type]
    return QuantizedTensor.from_parts(parts, q.format, q.shape, getattr(torch, q.dtype))
