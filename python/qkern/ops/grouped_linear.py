"""``qkern::grouped_linear``: ``qkern::linear`` over stacked experts, LoRA for each optional.

    rows of expert e    x_e (m, K), from where e - 1 ends to offsets[e]
    forward             y_e = x_e W_e^T + s (x_e A_e^T) B_e^T + bias_e        (m, N)
    backward            dX_e = dY_e W_e + s (dY_e B_e) A_e                    (m, K)
                        dA_e, dB_e as in ``lora_gradients``
                        dbias_e = sum over m of dY_e

E experts, M rows, N out_features, K in_features, r rank, s scaling. A weight is stored (E, N, K),
or (E, K, N) where it is ``transposed``. Backward of one is forward of the other, with A and B in
each other's place: the operator is its own gradient, and that of its gradient. Rows behind the last
offset are zero, as are their gradients.

Nothing but the operator reads ``offsets``, so compiled code has no break where experts are chosen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qkern import reference
from qkern.formats import QuantFormat
from qkern.ops import experts
from qkern.ops.dequantize import FORMAT_SCHEMA, PARTS_SCHEMA
from qkern.ops.direct import is_unobserved, wants_grad
from qkern.ops.experts import Adapters, Stack
from qkern.ops.lora_gradients import lora_gradients

# Places among the operator's arguments of x, bias, A and B, and how many there are.
_X, _BIAS, _A, _B = 0, 11, 12, 13
_COUNT = 15


def grouped_linear(
    x: Tensor,
    offsets: Tensor,
    stack: Stack,
    bias: Tensor | None = None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """The operator, with autocast: x, bias and adapters are cast, scales never are.

    Without autocast a bias of another dtype is cast to x's.

    Args:
        x: (M, K), rows sorted by expert.
        offsets: (E,) int32 or int64: where each expert's rows end.
        stack: the quantized weights.
        bias: (E, N) or None.
        lora_A: (E, r, K) or None.
        lora_B: (E, N, r) or None.
        scaling: factor of the adapters' part.

    Returns:
        (M, N) in x's dtype, or in autocast's.
    """
    # meta knows no autocast, and asking is an error
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
        lora_A = None if lora_A is None else lora_A.to(dtype)
        lora_B = None if lora_B is None else lora_B.to(dtype)
    bias = None if bias is None else bias.to(x.dtype)
    kind = (stack.fmt.quant_type, stack.fmt.blocksize, *stack.shape[1:], stack.transposed)
    arguments = (x, offsets, *stack.parts, *kind, bias, lora_A, lora_B, scaling)
    operator: Any = torch.ops.qkern.grouped_linear
    if is_unobserved(x, offsets, bias, lora_A, lora_B, stack.parts.packed):
        recorded = wants_grad(x, bias, lora_A, lora_B)
        operator = _GroupedLinear.apply if recorded else _forward
    y: Tensor = operator(*arguments)
    return y


def _forward(
    x: Tensor,
    offsets: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    rows: int,
    columns: int,
    transposed: bool,  # noqa: FBT001 - the operator's schema
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
) -> Tensor:
    fmt = QuantFormat(quant_type, blocksize, nested_absmax is not None)
    parts = reference.Parts(packed, absmax, nested_absmax, offset)
    stack = Stack(parts, fmt, (offsets.shape[0], rows, columns), transposed)
    adapters = None
    if lora_A is not None and lora_B is not None:
        adapters = Adapters(lora_A, lora_B, scaling)
    return experts.multiply(x, offsets, stack, bias, adapters)


_grouped_linear = torch.library.custom_op(
    "qkern::grouped_linear",
    _forward,
    mutates_args=(),
    schema=f"(Tensor x, Tensor offsets, {PARTS_SCHEMA}, {FORMAT_SCHEMA}, int rows, int columns,"
    " bool transposed, Tensor? bias, Tensor? lora_A, Tensor? lora_B, float scaling) -> Tensor",
)


@_grouped_linear.register_fake
def _(x: Tensor, *arguments: Any) -> Tensor:
    rows, columns, transposed = arguments[7:10]
    return x.new_empty((x.shape[0], columns if transposed else rows))


def _lora_gradients(
    x: Tensor, grad: Tensor, offsets: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    return experts.lora_gradients(x, grad, offsets, Adapters(lora_A, lora_B, scaling))


_grouped_lora_gradients = torch.library.custom_op(
    "qkern::grouped_lora_gradients",
    _lora_gradients,
    mutates_args=(),
    schema="(Tensor x, Tensor grad, Tensor offsets, Tensor lora_A, Tensor lora_B, float scaling)"
    " -> (Tensor, Tensor)",
)


@_grouped_lora_gradients.register_fake
def _(
    x: Tensor, grad: Tensor, offsets: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    return lora_A.new_empty(lora_A.shape), lora_B.new_empty(lora_B.shape)


_grouped_sum = torch.library.custom_op(
    "qkern::grouped_sum",
    experts.sums,
    mutates_args=(),
    schema="(Tensor rows, Tensor offsets) -> Tensor",
)


@_grouped_sum.register_fake
def _(rows: Tensor, offsets: Tensor) -> Tensor:
    return rows.new_empty((offsets.shape[0], rows.shape[1]))


def _sum_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, offsets = inputs
    ctx.save_for_backward(offsets)
    ctx.rows = rows.shape[0]


def _sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (offsets,) = ctx.saved_tensors
    row = torch.arange(ctx.rows, device=offsets.device, dtype=offsets.dtype)
    expert = torch.searchsorted(offsets, row, right=True)  # (M,); behind the last one: E
    return torch.nn.functional.pad(grad, (0, 0, 0, 1))[expert], None


_grouped_sum.register_autograd(_sum_backward, setup_context=_sum_setup)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, offsets, *parts = inputs[:6]
    lora_A, lora_B, ctx.scaling = inputs[_A:]
    needs_x = lora_A is not None and (ctx.needs_input_grad[_A] or ctx.needs_input_grad[_B])
    ctx.save_for_backward(x if needs_x else None, offsets, *parts, lora_A, lora_B)
    ctx.kind = inputs[6:_BIAS]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, offsets, *parts, A, B = ctx.saved_tensors
    *kind, transposed = ctx.kind
    grads: list[Tensor | None] = [None] * _COUNT
    twice = torch.is_grad_enabled()  # gradients of gradients: in operations that have theirs
    direct = not twice and is_unobserved(grad, x, A, B, parts[0])
    if ctx.needs_input_grad[_X]:
        swapped = (None, None) if A is None else (B.mT, A.mT)
        multiply: Any = _forward if direct else torch.ops.qkern.grouped_linear
        grads[_X] = multiply(
            grad, offsets, *parts, *kind, not transposed, None, *swapped, ctx.scaling
        )
    if ctx.needs_input_grad[_BIAS]:
        total: Any = experts.sums if direct else torch.ops.qkern.grouped_sum
        grads[_BIAS] = total(grad, offsets)
    if ctx.needs_input_grad[_A] or ctx.needs_input_grad[_B]:
        reduce: Any = _lora_gradients if direct else torch.ops.qkern.grouped_lora_gradients
        reduce = _differentiable if twice else reduce
        dA, dB = reduce(x, grad, offsets, A, B, ctx.scaling)
        grads[_A] = dA if ctx.needs_input_grad[_A] else None
        grads[_B] = dB if ctx.needs_input_grad[_B] else None
    return tuple(grads)


def _differentiable(
    x: Tensor, grad: Tensor, offsets: Tensor, A: Tensor, B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """The adapters' gradients in torch's operations."""
    found = {e: (x[i:j], grad[i:j]) for e, i, j in experts.spans(offsets, x.shape[0])}
    pairs = [
        lora_gradients(*found[e], A[e], B[e], scaling)
        if e in found
        else (A[e].new_zeros(A[e].shape), B[e].new_zeros(B[e].shape))
        for e in range(offsets.shape[0])
    ]
    return torch.stack([dA for dA, _ in pairs]), torch.stack([dB for _, dB in pairs])


class _GroupedLinear(torch.autograd.Function):
    """The operator, recorded for gradients without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _forward(*inputs)
        _setup(ctx, inputs, output)
        return output

    backward = staticmethod(_backward)


_grouped_linear.register_autograd(_backward, setup_context=_setup)
