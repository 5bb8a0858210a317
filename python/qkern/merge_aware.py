"""Training for a merge: the layer multiplies what a merge into a quantized format would leave.

    W' = dequantize(quantize(W + s B A))        the weight of the forward pass
    y  = x W'^T + bias
    dX = dY W'
    dA = (s dY B)^T x,  dB = s dY^T (x A^T)     as if W' were W + s B A

The gradient of A and B goes straight through the rounding: Bengio et al.,
https://arxiv.org/abs/1308.3432. So the adapter learns what the rounding leaves of it, and the merge
into that format, which stores W', loses nothing.

W' changes where a sum crosses the border between two codes, or the largest of a block moves its
scale: in steps, which training gets over once the adapter is as large as they are.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from qkern import operands, ops, reference
from qkern.errors import DTypeError, FormatError, ShapeError
from qkern.formats import QuantFormat, resolve_format
from qkern.lora_adapter import LoRAAdapter
from qkern.merge_target import MergeTarget
from qkern.tensor import QuantizedTensor


def resolve_target(
    merge_into: str | QuantFormat | MergeTarget | None, weight: QuantizedTensor
) -> MergeTarget | None:
    """The target that a setting names for a weight.

    A name is that of the weight's own format, where this is of that name, with scales that are
    searched where the weight's were; else it is the format of 64 values a scale, with 8-bit scales.
    """
    if merge_into is None:
        return None
    target = merge_into if isinstance(merge_into, MergeTarget) else None
    if isinstance(merge_into, str):
        own = weight.format.quant_type == merge_into
        kept = weight.format if own else QuantFormat("nf4")
        fmt = resolve_format(merge_into, blocksize=kept.blocksize, double_quant=kept.double_quant)
        target = MergeTarget(fmt, "search" if own and _was_searched(weight) else "absmax")
    elif isinstance(merge_into, QuantFormat):
        target = MergeTarget(merge_into)
    if target is None:
        msg = f"merge_into is a name, a QuantFormat or a MergeTarget, got {merge_into!r}"
        raise DTypeError(msg)
    return dataclasses.replace(target, format=target.format.for_shape(weight.shape))


def _was_searched(weight: QuantizedTensor) -> bool:
    """Whether scales have signs that a search chose: absmax has none below 0."""
    _, scales, nested, offset = weight.parts
    if weight.format.bits != 4 or not ops.has_data(scales):
        return False
    if nested is not None and offset is not None:
        if bool(offset.any()):  # which may turn signs; where they were chosen there is none
            return False
        scales = reference.dequantize_absmax(scales.reshape(-1), nested, offset)
    return bool((scales < 0).any())


def check_settings(adapter: LoRAAdapter, lora_mode: str, name: str = "") -> None:
    """Refuse what a weight with the adapter in it cannot have.

    Args:
        adapter: to be trained for a merge.
        lora_mode: of its layer.
        name: of the layer, for errors.

    Raises:
        FormatError: for dropout of the adapter's input, for DoRA and ``lora_mode="merged"``.
    """
    msg = ""
    if adapter.lora_dropout > 0.0:
        msg = (
            f"merge_into has one weight for base and adapter, and no input of the adapter's own to "
            f"drop: got lora_dropout={adapter.lora_dropout:g}, set it to 0"
        )
    elif adapter.use_dora:
        msg = "merge_into rounds W + s B A, without DoRA's lengths of its rows: got use_dora=True"
    elif lora_mode != "separate":
        msg = f'merge_into is a way of its own to apply an adapter: got lora_mode="{lora_mode}"'
    if msg:
        raise FormatError(f"{name}: {msg}" if name else msg)


def linear(
    x: Tensor,
    weight: QuantizedTensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    target: MergeTarget,
    *,
    compute: str = "exact",
    layer: nn.Module | None = None,
) -> Tensor:
    """``x W'^T + bias`` with ``W' = dequantize(quantize(W + s B A))``, on the packed bytes of W'.

    The sum is fp32, under autocast too. For the backward pass W' is kept as codes.

    Args:
        x: (..., in_features).
        weight: W, (out_features, in_features).
        bias: (out_features,) or None.
        lora_A: (r, in_features).
        lora_B: (out_features, r).
        scaling: s.
        target: what W' is stored as.
        compute: "exact" or "int8", see ``qkern.linear``.
        layer: what errors name.

    Returns:
        (..., out_features) in x's dtype, or in autocast's.

    Raises:
        ShapeError: for a size that does not fit, and for a shard of a weight.
        DTypeError: for anything but floating-point tensors.
        DeviceError: as ``qkern.linear``.
    """
    with torch._C.DisableTorchFunctionSubclass():  # a call for each property of the weight
        operands.check_linear(x, weight, bias, lora_A, lora_B, layer)
        if not weight.is_whole:
            msg = "merge_into needs the whole weight: this is one rank's shard of it"
            raise ShapeError(msg)
        dense = operands.need_dense_weight(x, weight)
    if dense:
        return reference_linear(x, weight, bias, lora_A, lora_B, scaling, target)
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    bias = None if bias is None else bias.to(x.dtype)
    how = (target.format, target.method)
    base = (weight.parts, weight.format, weight.dtype)
    packed, scales, _, _ = ops.quantize_merged(*base, lora_A, lora_B, scaling, *how)
    fmt = target.format.replace(double_quant=False)
    y: Tensor = _StraightThrough.apply(
        x, bias, lora_A, lora_B, packed, scales, fmt, scaling, compute
    )
    return y


class _StraightThrough(torch.autograd.Function):
    """``x W'^T + bias`` of finished codes and scales, with gradients for what they came from."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        packed: Tensor,
        scales: Tensor,
        fmt: QuantFormat,
        scaling: float,
        compute: str,
    ) -> Tensor:
        kept = x if any(ctx.needs_input_grad[2:4]) else None
        ctx.save_for_backward(kept, lora_A, lora_B, packed, scales)
        ctx.format, ctx.scaling = fmt, scaling
        parts = reference.Parts(packed, scales, None, None)
        return ops.linear(x, parts, fmt, lora_B.shape[0], bias, compute=compute)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, lora_A, lora_B, packed, scales = ctx.saved_tensors
        weight = reference.Parts(packed, scales, None, None)
        need_x, need_bias, need_A, need_B = ctx.needs_input_grad[:4]
        dX = dbias = dA = dB = None
        if need_x and torch.is_grad_enabled():  # gradients of gradients, through the rounding too
            shape = (lora_B.shape[0], lora_A.shape[1])
            rounded = ops.decoded(weight, ctx.format, shape, grad.dtype)
            dX = grad @ _straight(rounded, lora_A, lora_B, ctx.scaling)
        elif need_x:
            dX = ops.input_gradient(grad, weight, ctx.format, lora_A.shape[1])
        if need_bias:
            dbias = grad.reshape(-1, grad.shape[-1]).sum(0)
        if need_A or need_B:
            dA, dB = ops.adapter_gradients(x, grad, lora_A, lora_B, ctx.scaling)
        return dX, dbias, dA if need_A else None, dB if need_B else None, *[None] * 5


def reference_linear(
    x: Tensor,
    weight: QuantizedTensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    target: MergeTarget,
) -> Tensor:
    """The same in plain operations of torch on dense weights: what ``linear`` is tested against.

    It also serves float64 and the derivatives that operators have no rules for.
    """
    rounded = merged_weight(weight, lora_A, lora_B, scaling, target).dequantize(x.dtype)
    straight = _straight(rounded, lora_A, lora_B, scaling)
    return torch.nn.functional.linear(x, straight, None if bias is None else bias.to(x.dtype))


def _straight(rounded: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """The rounded weight, with the gradient of ``s B A``."""
    delta = ((lora_B @ lora_A) * scaling).to(rounded.dtype)
    return rounded + (delta - delta.detach())


def merged_weight(
    weight: QuantizedTensor, lora_A: Tensor, lora_B: Tensor, scaling: float, target: MergeTarget
) -> QuantizedTensor:
    """W', as a merge stores it.

    Raises:
        NonFiniteError: if the adapter holds NaN or infinity.
        DTypeError: for a sharded adapter, and inside of a ``torch.func`` transform of it.
    """
    operands.check_dense(lora_A)
    operands.check_dense(lora_B)
    base = (weight.parts, weight.format, weight.shape, weight.dtype)
    with torch._C._DisableFuncTorch():  # transforms of the input are none of the weight
        values = ops.merged_values(*base, lora_A, lora_B, scaling)
        merged = QuantizedTensor.from_dense(values, target.format, method=target.method)
    return merged.like(dtype=weight.dtype)
