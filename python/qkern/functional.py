"""``quantize``, ``dequantize``, ``linear`` and ``grouped_linear`` of torch tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qkern import operands, ops, products, reference
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


def linear(
    x: Tensor,
    weight: QuantizedTensor,
    bias: Tensor | None = None,
    *,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
    lora_dropout: float = 0.0,
    lora_mode: str = "separate",
    compute: str = "exact",
    layer: torch.nn.Module | None = None,
) -> Tensor:
    """``x W^T + bias + scaling (x A^T) B^T`` on the packed bytes of W.

    The weight is dequantized to x's dtype, the bias is cast to it, whatever their own; sums are
    fp32, of an adapter too. float64, forward-mode derivatives and ``torch.func``'s transforms work
    on a dense copy of the weight, with the adapter's part in the adapter's dtype.

    Args:
        x: (..., in_features), float32, float16, bfloat16 or float64.
        weight: (out_features, in_features).
        bias: (out_features,) or None.
        lora_A: (r, in_features) or None.
        lora_B: (out_features, r) or None.
        scaling: factor of the adapter's part.
        lora_dropout: probability of zeroing an input of the adapter's part; for training.
        lora_mode: "separate", or on a GPU "merged": for many tokens, which a dense copy of the
            weight multiplies, the adapter is added to it before it is rounded. Saves passes over x
            and y; the noise of that rounding hides small updates (docs/kernels.md).
        compute: "exact", or on a CPU "int8": x is rounded to 8 bits for the product, and W where
            this is faster, an error of about one per cent of y; gradients stay exact.
        layer: what errors name.

    Returns:
        (..., out_features) in x's dtype, or in autocast's.

    Raises:
        ShapeError: if the last dimension of x is not in_features, another size does not fit, or
            ``lora_dropout`` is not in [0, 1).
        DTypeError: for anything but floating-point tensors, or a weight that is not quantized.
        DeviceError: for operands on different devices, "int8" for those not on a CPU, or "merged"
            for those on one.
        FormatError: for another ``compute`` or ``lora_mode``, and for "merged" with dropout.
    """
    if not isinstance(weight, QuantizedTensor):
        msg = f"the weight is a {type(weight).__name__}: qkern.quantize it, or call F.linear"
        raise DTypeError(msg)
    return products.multiply(
        x,
        weight,
        bias,
        lora_A=lora_A,
        lora_B=lora_B,
        scaling=scaling,
        lora_dropout=lora_dropout,
        lora_mode=lora_mode,
        compute=compute,
        layer=layer,
    )


def grouped_linear(
    x: Tensor,
    weight: QuantizedTensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    *,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
    transposed: bool = False,
    layer: torch.nn.Module | None = None,
) -> Tensor:
    """``qkern.linear`` by the expert of each row, on the packed bytes of stacked weights.

    For expert e and its rows of x: ``x W[e]^T + bias[e] + scaling (x A[e]^T) B[e]^T``. Each expert
    is an ordinary weight; where blocks cross experts, and where ``qkern.linear`` does, a dense copy
    is multiplied. Sums are fp32, rounded once; the bias of ``transposed`` weights is added to what
    was rounded.

    Args:
        x: (M, in_features), rows sorted by expert; float32, float16, bfloat16 or float64.
        weight: (experts, out_features, in_features).
        offsets: (experts,) int32 or int64: where each expert's rows end, as in
            ``torch.nn.functional.grouped_mm``. Rows behind the last one give zeros.
        bias: (experts, out_features) or None.
        lora_A: (experts, r, in_features) or None.
        lora_B: (experts, out_features, r) or None.
        scaling: factor of the adapters' part.
        transposed: the weight is (experts, in_features, out_features), as gpt-oss holds it.
        layer: what errors name.

    Returns:
        (M, out_features) in x's dtype, or in autocast's.

    Raises:
        ShapeError: for sizes that do not fit, and offsets that fall or leave the rows; a GPU's
            kernel, which does not wait for them, takes the nearest that do not.
        DTypeError: for anything but floating-point tensors, offsets that are no integers, or a
            weight that is not quantized.
        DeviceError: for operands on different devices.
    """
    if not isinstance(weight, QuantizedTensor):
        msg = f"the weight is a {type(weight).__name__}: qkern.quantize it first"
        raise DTypeError(msg)
    with torch._C.DisableTorchFunctionSubclass():  # a call for each property of the weight
        operands.check_grouped_linear(x, offsets, weight, bias, lora_A, lora_B, transposed, layer)
        experts, rows, columns = weight.shape
        dense = not weight.has_rows or operands.need_dense_weight(x, weight)
    if dense:
        bias = None if bias is None else bias.to(x.dtype)
        W = weight.dequantize(x.dtype)
        adapters = (lora_A, lora_B, scaling)
        return reference.grouped_linear(x, W, offsets, bias, *adapters, transposed=transposed)
    stack = ops.Stack(weight.parts, weight.format, (experts, rows, columns), transposed)
    return ops.grouped_linear(x, offsets, stack, bias, lora_A, lora_B, scaling)


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
