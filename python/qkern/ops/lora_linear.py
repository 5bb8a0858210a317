"""``qkern::lora_linear``: ``qkern::linear`` with an adapter, on devices other than a CPU.

    forward    h = s dropout(x) A^T             fp32 (M, r), kept for backward
               y = x W^T + h B^T + bias         (M, N)
    backward   ``qkern::lora_linear_backward``, dY read once for G and dB
               G = s dY B                       fp32 (M, r)
               dX = dY W + dropped(G A)         (M, K)
               dA = G^T dropout(x)              (r, K)
               dB = dY^T h                      (N, r)
               dbias = sum over M of dY

M tokens, N out_features, K in_features, r rank, s scaling. How each is computed: ``device``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qkern.formats import QuantFormat
from qkern.ops import device
from qkern.ops.dequantize import FORMAT_SCHEMA, PARTS_SCHEMA
from qkern.ops.direct import is_unobserved, wants_grad
from qkern.ops.lora_gradients import add_product, lora_gradients
from qkern.reference import Parts

_ADAPTER_SCHEMA = (
    "Tensor lora_A, Tensor lora_B, float scaling, Tensor? seed, float dropout, bool merged"
)
# Places of x, bias, A and B among the arguments of ``qkern::lora_linear``, and how many there are.
_X, _BIAS, _A, _B = 0, 7, 8, 9
_COUNT = 14


def _forward(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    seed: Tensor | None,
    dropout: float,
    merged: bool,  # noqa: FBT001 - the operator's schema
) -> tuple[Tensor, Tensor]:
    """The product (..., N) and h, fp32 (M, r); (0, r) if ``merged``. See ``device.Adapter``."""
    base = _base((packed, absmax, nested_absmax, offset), quant_type, blocksize, lora_A, lora_B)
    adapter = device.Adapter(lora_A, lora_B, scaling, seed, dropout, merged)
    return device.lora_linear(x, base, bias, adapter)


lora_linear = torch.library.custom_op(
    "qkern::lora_linear",
    _forward,
    mutates_args=(),
    schema=f"(Tensor x, {PARTS_SCHEMA}, {FORMAT_SCHEMA}, Tensor? bias, {_ADAPTER_SCHEMA})"
    " -> (Tensor, Tensor)",
)


@lora_linear.register_fake
def _(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    (N, r), merged = arguments[_B - 1].shape, arguments[-1]
    tokens = 0 if merged else math.prod(x.shape[:-1])
    return x.new_empty((*x.shape[:-1], N)), x.new_empty((tokens, r), dtype=torch.float32)


def _gradients(
    grad: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    seed: Tensor | None,
    dropout: float,
    merged: bool,  # noqa: FBT001 - the operator's schema
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of x (..., K), A and B; (0,) in place of those that are not needed."""
    base = _base((packed, absmax, nested_absmax, offset), quant_type, blocksize, lora_A, lora_B)
    adapter = device.Adapter(lora_A, lora_B, scaling, seed, dropout, merged)
    needs_x, needs_A, needs_B = needs
    grads = device.lora_linear_backward(grad, x, h, base, adapter, (needs_x, needs_A, needs_B))
    dX, dA, dB = (grad.new_empty(0) if found is None else found for found in grads)
    return dX, dA, dB


lora_linear_backward = torch.library.custom_op(
    "qkern::lora_linear_backward",
    _gradients,
    mutates_args=(),
    schema=f"(Tensor grad, Tensor? x, Tensor? h, {PARTS_SCHEMA}, {FORMAT_SCHEMA},"
    f" {_ADAPTER_SCHEMA}, bool[3] needs) -> (Tensor, Tensor, Tensor)",
)


@lora_linear_backward.register_fake
def _(grad: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    lora_A, lora_B = arguments[8:10]
    needs_x, needs_A, needs_B = arguments[-1]
    nothing = grad.new_empty(0)
    return (
        grad.new_empty((*grad.shape[:-1], lora_A.shape[1])) if needs_x else nothing.clone(),
        lora_A.new_empty(lora_A.shape) if needs_A else nothing.clone(),
        lora_B.new_empty(lora_B.shape) if needs_B else nothing.clone(),
    )


def _base(
    parts: Sequence[Tensor | None], quant_type: str, blocksize: int, A: Tensor, B: Tensor
) -> device.Base:
    fmt = QuantFormat(quant_type, blocksize, parts[2] is not None)
    return device.Base(Parts(*parts), fmt, (B.shape[0], A.shape[1]))  # type: ignore[arg-type]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *parts, quant_type, blocksize, _, A, B, scaling, seed, dropout, merged = inputs
    needs_A, needs_B = ctx.needs_input_grad[_A], ctx.needs_input_grad[_B]
    kept_x = x if needs_A or needs_B else None
    kept_h = output[1] if needs_B else None
    ctx.save_for_backward(kept_x, kept_h, *parts, A, B, seed)
    ctx.kind, ctx.how = (quant_type, blocksize), (scaling, dropout, merged)


def _setup_operator(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _setup(ctx, inputs, output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # h has none


def _backward(ctx: Any, grad: Tensor | None, _: None = None) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * _COUNT
    if grad is None:
        return tuple(grads)
    if ctx.needs_input_grad[_BIAS]:
        grads[_BIAS] = grad.reshape(-1, grad.shape[-1]).sum(0)
    needs = tuple(ctx.needs_input_grad[i] for i in (_X, _A, _B))
    if any(needs):
        # Gradients of gradients: in operations that have theirs.
        function = _differentiable if torch.is_grad_enabled() else _by_operator
        found = function(ctx, grad, needs)
        for i, needed, one in zip((_X, _A, _B), needs, found, strict=True):
            grads[i] = one if needed else None
    return tuple(grads)


def _by_operator(ctx: Any, grad: Tensor, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    x, h, *parts, A, B, seed = ctx.saved_tensors
    scaling, dropout, merged = ctx.how
    arguments = (grad, x, h, *parts, *ctx.kind, A, B, scaling, seed, dropout, merged, needs)
    compute = _gradients if is_unobserved(grad, x, A, B, parts[0]) else lora_linear_backward
    found: tuple[Tensor, Tensor, Tensor] = compute(*arguments)
    return found


def _differentiable(ctx: Any, grad: Tensor, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """The gradients by torch, of the weight and the adapter apart."""
    x, _, *parts, A, B, seed = ctx.saved_tensors
    scaling, dropout, _ = ctx.how
    dX = dA = dB = mask = None
    if seed is not None:
        mask = device.dropout_mask(seed, dropout, (*grad.shape[:-1], A.shape[1]))
    if needs[0]:
        dX = torch.ops.qkern.linear_backward(grad, *parts, *ctx.kind, A.shape[1])
        G = (grad.to(B.dtype) @ B) * scaling
        if mask is None:
            dX = add_product(dX, G, A)
        else:
            dX = (dX + (G @ A) * mask).to(grad.dtype)
    if needs[1] or needs[2]:
        dropped = x if mask is None else x * mask
        dA, dB = lora_gradients(dropped, grad, A, B, scaling)
    return dX, dA, dB


class _LoraLinear(torch.autograd.Function):
    """The operator's y, recorded for gradients without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output: tuple[Tensor, Tensor] = _forward(*inputs)
        _setup(ctx, inputs, output)
        return output[0]

    backward = staticmethod(_backward)


lora_linear.register_autograd(_backward, setup_context=_setup_operator)


def multiply(
    x: Tensor,
    parts: Parts,
    fmt: QuantFormat,
    bias: Tensor | None,
    adapter: device.Adapter,
) -> Tensor:
    """The product by the operator, or by its work where nothing watches."""
    arguments: tuple[Any, ...] = (x, *parts, fmt.quant_type, fmt.blocksize, bias, *adapter)
    tensors = (x, bias, adapter.A, adapter.B)
    y: Tensor
    if not is_unobserved(*tensors, parts.packed):
        y = lora_linear(*arguments)[0]
    elif wants_grad(*tensors):
        y = _LoraLinear.apply(*arguments)
    else:
        y = _forward(*arguments)[0]
    return y
