"""``qkern::linear``: ``y = x W^T + bias + scaling (x A^T) B^T`` over quantized W, LoRA optional.

What a CPU computes; other devices multiply without an adapter so, and with one by ``lora_linear``.

    forward    h = x A^T              (M, r)
               y = x W^T + s h B^T    (M, N)
    backward   G = s dY B             (M, r)
               dX = dY W + G A        (M, K)       ``qkern::linear_backward``
               dA = G^T x             (r, K)       ``qkern::lora_gradients``
               dB = s dY^T h          (N, r)
               dbias = sum over M of dY

M tokens, N out_features, K in_features, r rank, s scaling. Forward and backward multiply the same
W: ``dequantize(q, x.dtype)``, rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qkern import reference
from qkern.formats import QuantFormat
from qkern.ops import device, host, lora_linear
from qkern.ops.dequantize import FORMAT_SCHEMA, PARTS_SCHEMA
from qkern.ops.direct import is_unobserved, wants_grad
from qkern.ops.lora_dropout import draw_seed
from qkern.ops.lora_gradients import add_product, lora_gradients

_LORA_SCHEMA = "Tensor? lora_A, Tensor? lora_B, float scaling"


def linear(
    x: Tensor,
    parts: reference.Parts,
    fmt: QuantFormat,
    out_features: int,
    bias: Tensor | None = None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
    compute: str = "exact",
    lora_dropout: float = 0.0,
    lora_mode: str = "separate",
) -> Tensor:
    """The operator, with autocast: x, bias and adapter are cast, scales never are.

    Without autocast a bias of another dtype is cast to x's.

    Args:
        x: (..., in_features).
        parts: the quantized weight, (out_features, in_features).
        fmt: how its bytes are read.
        out_features: rows of the weight.
        bias: (out_features,) or None.
        lora_A: (r, in_features) or None.
        lora_B: (out_features, r) or None.
        scaling: factor of the adapter's part.
        compute: "exact" or "int8", see ``qkern.linear``.
        lora_dropout: probability of zeroing an input of the adapter's part, for where
            ``drops_in_kernel`` holds; 0 elsewhere.
        lora_mode: "separate" or "merged", see ``qkern.linear``: not on a CPU.

    Returns:
        (..., out_features) in x's dtype, or in autocast's.
    """
    # meta knows no autocast, and asking is an error
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        lora_A = None if lora_A is None else lora_A.to(dtype)
        lora_B = None if lora_B is None else lora_B.to(dtype)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    on_device = device.serves(x)
    if on_device and lora_A is not None and lora_B is not None:
        device.check_compute(compute, x.device)
        seed = draw_seed(x) if lora_dropout > 0.0 else None
        merged = lora_mode == "merged"
        adapter = device.Adapter(lora_A, lora_B, scaling, seed, lora_dropout, merged)
        return lora_linear.multiply(x, parts, fmt, bias, adapter)
    operands = (bias, lora_A, lora_B)
    direct = is_unobserved(x, *operands, parts.packed)
    recorded = wants_grad(x, *operands)
    if direct and not recorded and not on_device:
        return host.linear(x, parts, fmt, out_features, *operands, scaling, compute)
    weight = (*parts, fmt.quant_type, fmt.blocksize, out_features)
    operator: Any = torch.ops.qkern.linear
    if direct:
        operator = _Linear.apply if recorded else _linear_device
    out: Tensor = operator(x, *weight, *operands, scaling, compute)
    return out


def _linear_device(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    out_features: int,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    compute: str = "exact",
) -> Tensor:
    device.check_compute(compute, x.device)
    fmt = QuantFormat(quant_type, blocksize, nested_absmax is not None)
    parts = reference.Parts(packed, absmax, nested_absmax, offset)
    base = device.Base(parts, fmt, (out_features, x.shape[-1]))
    if lora_A is None or lora_B is None:
        return device.linear(x, base, bias)
    return device.lora_linear(x, base, bias, device.Adapter(lora_A, lora_B, scaling))[0]


_linear = torch.library.custom_op(
    "qkern::linear",
    _linear_device,
    mutates_args=(),
    schema=f"(Tensor x, {PARTS_SCHEMA}, {FORMAT_SCHEMA}, int out_features, Tensor? bias,"
    f" {_LORA_SCHEMA}, str compute='exact') -> Tensor",
)


@_linear.register_fake
def _(x: Tensor, *args: Any) -> Tensor:
    out_features = args[6]
    return x.new_empty((*x.shape[:-1], out_features))


@_linear.register_kernel("cpu")
def _linear_cpu(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    out_features: int,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    compute: str = "exact",
) -> Tensor:
    fmt = QuantFormat(quant_type, blocksize, nested_absmax is not None)
    parts = reference.Parts(packed, absmax, nested_absmax, offset)
    return host.linear(x, parts, fmt, out_features, bias, lora_A, lora_B, scaling, compute)


def _linear_backward_device(
    grad: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    in_features: int,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """``dY W + scaling (dY B) A``: (..., out_features) to (..., in_features)."""
    fmt = QuantFormat(quant_type, blocksize, nested_absmax is not None)
    parts = reference.Parts(packed, absmax, nested_absmax, offset)
    base = device.Base(parts, fmt, (grad.shape[-1], in_features))
    if lora_A is None or lora_B is None:
        return device.linear_backward(grad, base)
    return device.grad_x(grad, base, device.Adapter(lora_A, lora_B, scaling))


_linear_backward = torch.library.custom_op(
    "qkern::linear_backward",
    _linear_backward_device,
    mutates_args=(),
    schema=f"(Tensor grad, {PARTS_SCHEMA}, {FORMAT_SCHEMA}, int in_features,"
    " Tensor? lora_A=None, Tensor? lora_B=None, float scaling=1.0) -> Tensor",
)


@_linear_backward.register_fake
def _(grad: Tensor, *args: Any) -> Tensor:
    in_features = args[6]
    return grad.new_empty((*grad.shape[:-1], in_features))


@_linear_backward.register_kernel("cpu")
def _linear_backward_cpu(
    grad: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    in_features: int,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    fmt = QuantFormat(quant_type, blocksize, nested_absmax is not None)
    parts = reference.Parts(packed, absmax, nested_absmax, offset)
    return host.linear_backward(grad, parts, fmt, in_features, lora_A, lora_B, scaling)


def _setup_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, absmax, nested_absmax, offset, quant_type, blocksize = inputs[:7]
    out_features, _, lora_A, lora_B, scaling, _ = inputs[7:]
    needs_x = lora_A is not None and (ctx.needs_input_grad[9] or ctx.needs_input_grad[10])
    ctx.save_for_backward(
        x if needs_x else None, packed, absmax, nested_absmax, offset, lora_A, lora_B
    )
    ctx.sizes = (quant_type, blocksize, x.shape[-1], out_features)
    ctx.scaling = scaling


def _backward_linear(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, *parts, lora_A, lora_B = ctx.saved_tensors
    *weight, out_features = ctx.sizes
    need_x, need_bias, need_A, need_B = (ctx.needs_input_grad[i] for i in (0, 8, 9, 10))
    dX = dbias = dA = dB = None
    if need_bias:
        dbias = grad.reshape(-1, out_features).sum(0)
    if torch.is_grad_enabled():  # gradients of gradients: in operations that have theirs
        if need_x:
            dX = torch.ops.qkern.linear_backward(grad, *parts, *weight)
            if lora_A is not None:
                dX = add_product(dX, (grad.to(lora_B.dtype) @ lora_B) * ctx.scaling, lora_A)
        if need_A or need_B:
            dA, dB = lora_gradients(x, grad, lora_A, lora_B, ctx.scaling)
    else:
        adapter = (lora_A, lora_B, ctx.scaling)
        direct = is_unobserved(x, grad, lora_A, lora_B, parts[0])
        if need_x:
            on_device = device.serves(grad)
            multiply: Any = torch.ops.qkern.linear_backward
            if direct:
                multiply = _linear_backward_device if on_device else _linear_backward_cpu
            dX = multiply(grad, *parts, *weight, *adapter)
        if need_A or need_B:  # of an operator on a device, or of a CPU
            direct = direct and grad.is_cpu
            reduce = host.lora_gradients if direct else torch.ops.qkern.lora_gradients
            dA, dB = reduce(x, grad, *adapter)
    return (dX, *[None] * 7, dbias, dA if need_A else None, dB if need_B else None, None, None)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, packed, absmax, nested_absmax, offset, quant_type, blocksize = inputs[:7]
    ctx.save_for_backward(packed, absmax, nested_absmax, offset)
    ctx.sizes = (quant_type, blocksize, grad.shape[-1])


def _double_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """``dY W`` is linear in dY: its gradient is the forward product."""
    product = None
    if ctx.needs_input_grad[0]:
        weight = (*ctx.saved_tensors, *ctx.sizes)
        product = torch.ops.qkern.linear(grad, *weight, None, None, None, 1.0)
    return (product, *[None] * 10)


class _Linear(torch.autograd.Function):
    """The operator, recorded for gradients without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        on_device = device.serves(inputs[0])
        output: Tensor = _linear_device(*inputs) if on_device else _linear_cpu(*inputs)
        _setup_linear(ctx, inputs, output)  # as setup_context it would cost 80 us a call
        return output

    backward = staticmethod(_backward_linear)


_linear.register_autograd(_backward_linear, setup_context=_setup_linear)
_linear_backward.register_autograd(_double_backward, setup_context=_setup_backward)
