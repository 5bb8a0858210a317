"""Products of a ``QuantizedTensor``: what ``F.linear`` and ``F.embedding`` make of one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qkern import operands, ops, reference
from qkern.codec import COMPUTE, check_choice

if TYPE_CHECKING:
    from qkern.tensor import QuantizedTensor


def multiply(
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
    """``qkern.linear``, of a weight that is known to be quantized; see there."""
    with torch._C.DisableTorchFunctionSubclass():  # a call for each property of the weight
        operands.check_linear(x, weight, bias, lora_A, lora_B, layer)
        dense = operands.need_dense_weight(x, weight)
        out_features = weight.shape[0]
    check_choice("compute", compute, COMPUTE)
    if lora_mode != "separate":
        operands.check_lora_mode(lora_mode, lora_dropout, x, layer)
    adapter = (lora_A, lora_B)
    dropped = None
    if lora_dropout != 0.0 and lora_A is not None and lora_B is not None:
        operands.check_dropout(lora_dropout)
        if dense or not ops.drops_in_kernel(x):
            dropped, adapter = (lora_A, lora_B), (None, None)
    if dense:
        bias = None if bias is None else bias.to(x.dtype)
        y = reference.linear(x, weight.dequantize(x.dtype), bias, *adapter, scaling)
    else:
        product = (weight.parts, weight.format, out_features, bias, *adapter, scaling)
        y = ops.linear(x, *product, compute, lora_dropout, lora_mode)
    return y if dropped is None else ops.add_dropped(y, x, *dropped, scaling, lora_dropout)


def linear(
    cls: type[QuantizedTensor],
    input: Tensor,  # noqa: A002 - torch's name
    weight: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """``F.linear`` where an argument is quantized."""
    if isinstance(input, cls):
        input = input.dequantize()  # noqa: A001
    if isinstance(bias, cls):
        bias = bias.dequantize()
    if isinstance(weight, cls):
        with torch._C.DisableTorchFunctionSubclass():
            is_trained = weight.requires_grad
        if not is_trained:
            return multiply(input, weight, bias)
        weight = weight + 0  # something trained was added in place: its gradient goes on
    return torch.nn.functional.linear(input, weight, bias)


def embedding(input: Tensor, weight: QuantizedTensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: A002
    """``F.embedding`` with a quantized weight: with a scale a row, the rows that are asked for."""
    if not (weight.format.kind.per_row and weight.is_whole and weight.dim() == 2):
        return torch.nn.functional.embedding(input, weight.dequantize(), *args, **kwargs)
    # Not by indexing, which takes -1 for the last row.
    parts = (weight.packed, weight.absmax.reshape(-1, 1))
    codes, absmax = (torch.nn.functional.embedding(input, part) for part in parts)
    values = codes.float() * (absmax * absmax.new_tensor(1 / 127))  # as ``reference.dequantize``
    return values.to(weight.dtype)
