"""Dense values written into a ``QuantizedTensor``: quantized as it is, and kept to be taken back.

They get the tensor's own format, or fp32 scales where 8 bits cannot hold theirs, as everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qkern import ops
from qkern.errors import ShapeError
from qkern.undo import Kept, before_last_sum, put_back, take_parts

if TYPE_CHECKING:
    from qkern.formats import QuantFormat
    from qkern.reference import Parts
    from qkern.tensor import QuantizedTensor

aten = torch.ops.aten
# On a dense sum that took the place of a copy: what the copy was. See dense_sum.
_SUM_OF = "_qkern_sum_of"
_INVERSE = {aten.add_.Tensor: aten.sub_.Tensor, aten.sub_.Tensor: aten.add_.Tensor}


def assign(q: QuantizedTensor, values: Tensor) -> None:
    """Quantize dense ``values`` into the bytes of ``q``; nothing is written on an error."""
    _write(q, values)
    q.undo.clear()


def _write(q: QuantizedTensor, values: Tensor) -> None:
    if values.shape != q.shape or not q.is_whole:
        msg = f"cannot assign {tuple(values.shape)} to a quantized tensor of {tuple(q.shape)}"
        if values.dim() == q.dim() and q.is_whole:
            msg += ", which keeps its shape: quantize the model after it is resized"
        if values.dim() == 1 < q.dim():
            msg += (
                ": packed bytes cannot be part of a flat parameter, as FSDP1 makes them; use FSDP2 "
                "(fully_shard), or give FullyShardedDataParallel qkern.fsdp_ready(model).frozen "
                "as ignored_states"
            )
        raise ShapeError(msg)
    take_parts(q, *_quantize_like(q, values))


def set_data(q: QuantizedTensor, value: Tensor) -> None:
    """``q.data = value``: take over quantized parts, quantize dense ones."""
    if type(value) is not type(q):
        before: Kept | None = getattr(value, _SUM_OF, None)
        if before is not None and not _same_bytes(q, before):
            before = None
        fmt = q.format
        _write(q, value)
        if before is None:
            q.undo.clear()
        else:
            q.undo.push(before, fmt)
        return
    if value.shape != q.shape:
        msg = f"cannot set data of {tuple(value.shape)} on a quantized {tuple(q.shape)}"
        raise ShapeError(msg)
    q.hold(value)
    if value.dtype != q.dtype or value.device != q.device:
        # dtype and device live in the C++ half, which only a swap of the whole tensor changes.
        torch.Tensor.data.__set__(q, value)  # type: ignore[attr-defined]


def _quantize_like(q: QuantizedTensor, values: Tensor) -> tuple[Parts, QuantFormat]:
    """Values in q's format, or with fp32 scales where 8 bits cannot hold them, as ``quantize``."""
    values = values.detach().float() if values.dtype == torch.float64 else values.detach()
    with torch.inference_mode(False):
        parts, fmt = ops.to_parts(values, q.format, "absmax", None, "error")
    packed, absmax = parts.packed.reshape(q.packed.shape), parts.absmax.reshape(q.absmax.shape)
    return parts._replace(packed=packed, absmax=absmax), fmt


def in_place(func: Any, args: Any, kwargs: Any) -> QuantizedTensor:
    """An operator that writes, on the dequantized value; the inverse of a sum restores bytes."""
    q = args[0]
    before = q.dequantize()
    rest = [a.dequantize() if isinstance(a, type(q)) else a for a in args[1:]]
    after = func(before.clone(), *rest, **kwargs)
    inverse = _INVERSE.get(func)
    if inverse is not None and q.undo.parts is not None:
        old = before_last_sum(q)
        redone = inverse(old.dequantize(), *rest, **kwargs)
        parts, fmt = _quantize_like(old, redone)
        if fmt == q.format and _same_bytes(q, parts):
            put_back(q)
            return q  # type: ignore[no-any-return]
    with torch.inference_mode(False):
        kept, kept_format = tuple(None if p is None else p.clone() for p in q.parts), q.format
    if not torch.equal(after, before):  # quantizing the same values again would change bytes
        _write(q, after)
    if inverse is None:
        q.undo.clear()
    else:
        q.undo.push(kept, kept_format)
    return q  # type: ignore[no-any-return]


def dense_sum(q: QuantizedTensor, add: Callable[[Tensor], Any]) -> Tensor:
    """What ``+=`` makes of a clone: the dense sum, with its gradient, not rounded again."""
    total = q.dequantize()
    add(total)
    setattr(total, _SUM_OF, q.parts)
    return total


def _same_bytes(q: QuantizedTensor, parts: Kept) -> bool:
    return all(
        old is None
        or new is None
        or (old.dtype == new.dtype and torch.equal(old.reshape(-1), new.reshape(-1)))
        for old, new in zip(q.parts, parts, strict=True)
    )
