"""The operators beside the CPU: kernels where they serve, else torch's products of a dense weight.

    h  = s x A^T          fp32 (M, r)      one pass over x; x dropped by the kernel, if at all
    y  = x W^T + h B^T + bias
    G  = s dY B           fp32 (M, r)
    dB = dY^T h           (N, r)           the same pass over dY as G's
    dA = G^T x            (r, K)           one pass over x
    dX = dY W + G A       (M, K)

W is multiplied packed, with the adapter in the same kernel, for as many tokens as
``kernels.linear.config_for`` has a tile. For more, torch multiplies a dense copy, and the adapter
is a pass over the result. dX takes the same way as y, at every number of tokens: its kernel decodes
a weight with as many instructions, and both would need the same dense copy. Merged, the adapter is
added to the dense copy before it is rounded, so one product is all.

Where kernels do not run at all the weight is always dequantized, and adapters are multiplied in
fp32: sums of fp16 factors could overflow. bf16 is multiplied in fp32 on GPUs that have no products
of bf16: fp16, which they have, ends at 65504.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from qkern import kernels
from qkern.errors import DeviceError
from qkern.formats import QuantFormat
from qkern.ops.dequantize import dense
from qkern.ops.tuning import tune_if_asked
from qkern.reference import Parts

if TYPE_CHECKING:
    from qkern.kernels.dropout import Dropout
    from qkern.kernels.launch import Weight

_FACTORS = (torch.float32, torch.float16, torch.bfloat16)


class Base(NamedTuple):
    """A frozen weight."""

    parts: Parts
    fmt: QuantFormat
    shape: tuple[int, int]  # (N, K)


class Adapter(NamedTuple):
    """A low-rank adapter, and how it is applied.

    Args:
        A: (r, K).
        B: (N, r).
        scaling: s.
        seed: int64 (1,), what x is dropped by; None for no dropout.
        dropout: the probability.
        merged: whether it is added to dense copies of the weight. Then h is not kept.
    """

    A: Tensor
    B: Tensor
    scaling: float
    seed: Tensor | None = None
    dropout: float = 0.0
    merged: bool = False


def serves(x: Tensor) -> bool:
    """Whether products of x are this module's: on all devices but the CPU."""
    return not x.is_cpu


def check_compute(compute: str, device: torch.device) -> None:
    """Refuse what only a CPU computes.

    Raises:
        DeviceError: unless ``compute`` is "exact"; on meta nothing is computed.
    """
    if compute != "exact" and device.type != "meta":
        msg = f"compute={compute!r} is for weights on a CPU, not on {device}: leave it out"
        raise DeviceError(msg)


def linear(x: Tensor, base: Base, bias: Tensor | None) -> Tensor:
    """``x W^T + bias``: (..., K) to (..., N)."""
    weight = _packed(x, base)
    if weight is None:
        return _multiply(x, _decoded(x, base), bias)
    from qkern.kernels.linear import linear as multiply

    return multiply(x, weight, bias)


def linear_backward(grad: Tensor, base: Base) -> Tensor:
    """``dY W``: (..., N) to (..., K)."""
    weight = _packed(grad, base)
    if weight is None:
        return _multiply(grad, _decoded(grad, base).mT, None)
    from qkern.kernels.linear_backward import linear_backward as multiply

    return multiply(grad, weight)


def lora_linear(
    x: Tensor, base: Base, bias: Tensor | None, adapter: Adapter
) -> tuple[Tensor, Tensor]:
    """``x W^T + h B^T + bias``, (..., N), and h, fp32 (M, r); (0, r) if merged."""
    weight, rows = _packed(x, base), _rows(x)
    N, r = adapter.B.shape
    h = rows.new_empty((0, r), dtype=torch.float32)
    if adapter.merged and weight is None:
        y = _multiply(rows, merged_weight(base, adapter, x.dtype), bias)
        return y.reshape(*x.shape[:-1], N), h
    used = _hidden(rows, adapter)
    if weight is None:
        y = _multiply(rows, _decoded(x, base), bias)
        y = _add_adapter(y, used, adapter.B.mT)
    else:
        from qkern.kernels.linear import linear as multiply
        from qkern.kernels.lora import FEW

        B = _factor(adapter.B)
        # One product on tensor cores, not three, and fewer registers. fp16 could overflow.
        rounded = B.dtype == torch.bfloat16 and rows.shape[0] > FEW
        y = multiply(rows, weight, bias, used.to(B.dtype) if rounded else used, B)
    return y.reshape(*x.shape[:-1], N), h if adapter.merged else used


def lora_linear_backward(
    grad: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    base: Base,
    adapter: Adapter,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those of x (..., K), A (r, K) and B (N, r), each if it is needed, else None.

    Args:
        grad: dY (..., N).
        x: (..., K), for dA, and for dB if h is not given.
        h: of ``lora_linear``, for dB.
        base: the weight.
        adapter: the same as forward's.
        needs: which results.
    """
    needs_x, needs_A, needs_B = needs
    dX = dA = dB = None
    weight = _packed(grad, base) if needs_x else None
    is_merged = adapter.merged and weight is None
    if needs_x and is_merged:
        dX = _multiply(grad, merged_weight(base, adapter, grad.dtype).mT, None)
        needs_x = False
    if not (needs_x or needs_A or needs_B):
        return dX, dA, dB
    if needs_B and x is not None and (h is None or adapter.merged):
        h = _hidden(x, adapter)
    if needs_B and h is not None:
        G, dB = _grad_hidden(grad, h, adapter)
    else:
        G = _thin_product(grad, adapter.B.mT, adapter.scaling)
    if needs_x:
        dX = _grad_x(grad, base, weight, G, adapter)
    if needs_A and x is not None:
        dA = _grad_a(G, x, adapter)
    return dX, dA, dB


def grad_x(grad: Tensor, base: Base, adapter: Adapter) -> Tensor:
    """``dY W + G A``, (..., K)."""
    G = _thin_product(grad, adapter.B.mT, adapter.scaling)
    return _grad_x(grad, base, _packed(grad, base), G, adapter)


def lora_gradients(x: Tensor, grad: Tensor, adapter: Adapter) -> tuple[Tensor, Tensor]:
    """Those of A (r, K) and B (N, r), by x (..., K) and dY (..., N)."""
    G, dB = _grad_hidden(grad, _hidden(x, adapter), adapter)
    return _grad_a(G, x, adapter), dB


def merged_weight(base: Base, adapter: Adapter, dtype: torch.dtype) -> Tensor:
    """``W + s B A``, (N, K): the sum in fp32, rounded once."""
    A, B = _factor(adapter.A), _factor(adapter.B)
    if A.dtype != B.dtype:
        A, B = A.float(), B.float()
    if kernels.is_supported(A.device):
        from qkern.kernels import launch
        from qkern.kernels.dequantize_merged import dequantize_merged

        if launch.fits(base.fmt, base.shape):
            weight = launch.weight(*base.parts, base.fmt, base.shape)
            return dequantize_merged(weight, A, B, adapter.scaling, dtype)
    W = dense(base.parts, base.fmt, base.shape, torch.float32)
    return torch.addmm(W, B.float(), A.float(), alpha=adapter.scaling).to(dtype)


def dropout_mask(seed: Tensor, dropout: float, shape: Sequence[int]) -> Tensor:
    """What kernels multiply x of ``shape`` by for an adapter: 0, or 1 / (1 - p); fp32."""
    from qkern.kernels.add_adapter import add_adapter
    from qkern.kernels.dropout import Dropout

    *batch, columns = shape
    mask = torch.zeros((math.prod(batch), columns), dtype=torch.float32, device=seed.device)
    ones = (mask.new_ones(mask.shape[0], 1), mask.new_ones(1, columns))
    return add_adapter(mask, *ones, dropout=Dropout(dropout, seed)).reshape(*shape)


def _grad_hidden(grad: Tensor, h: Tensor, adapter: Adapter) -> tuple[Tensor, Tensor]:
    """G, fp32 (M, r), and dB (N, r), by one pass over dY."""
    rows = _rows(grad)
    if not kernels.is_supported(grad.device):
        wide = rows.float()
        G = wide @ adapter.B.float() * adapter.scaling
        return G, (wide.mT @ h).to(adapter.B.dtype)
    from qkern.kernels.lora_backward import grad_hidden

    G, dB = grad_hidden(rows, _factor(adapter.B), h, adapter.scaling)
    return G, dB.to(adapter.B.dtype)


def _grad_x(grad: Tensor, base: Base, weight: Weight | None, G: Tensor, adapter: Adapter) -> Tensor:
    """``dY W + G A``, (..., K)."""
    rows, dropout = _rows(grad), _dropout(adapter)
    if weight is None:
        dX = _multiply(rows, _decoded(grad, base).mT, None)
        dX = _add_adapter(dX, G, adapter.A, dropout)
    else:
        from qkern.kernels.linear_backward import linear_backward as multiply

        factors = (_factor(adapter.A), adapter.B)
        dX = multiply(rows, weight, *factors, adapter.scaling, G=G, dropout=dropout)
    return dX.reshape(*grad.shape[:-1], base.shape[1])


def _grad_a(G: Tensor, x: Tensor, adapter: Adapter) -> Tensor:
    """``G^T x``, (r, K)."""
    if not kernels.is_supported(x.device):
        return (G.mT @ _rows(x).float()).to(adapter.A.dtype)
    from qkern.kernels.lora_backward import grad_a

    A = _factor(adapter.A)
    return grad_a(G, _rows(x), A.dtype, dropout=_dropout(adapter)).to(adapter.A.dtype)


def _hidden(x: Tensor, adapter: Adapter) -> Tensor:
    """``s dropout(x) A^T``, fp32 (M, r)."""
    return _thin_product(x, adapter.A, adapter.scaling, _dropout(adapter))


def _thin_product(x: Tensor, A: Tensor, scaling: float, dropout: Dropout | None = None) -> Tensor:
    """The same of any factor A (r, K)."""
    rows = _rows(x)
    if not kernels.is_supported(x.device):
        return rows.float() @ A.float().mT * scaling
    from qkern.kernels.lora import hidden

    return hidden(rows, _factor(A), scaling, dropout=dropout)


def _add_adapter(y: Tensor, h: Tensor, B: Tensor, dropout: Dropout | None = None) -> Tensor:
    """``y + h B``, (M, N), h (M, r), B (r, N); y is overwritten, or lost."""
    if not kernels.is_supported(y.device):
        return (y + h @ B.float()).to(y.dtype)
    from qkern.kernels.add_adapter import add_adapter

    return add_adapter(y, h, _factor(B), dropout=dropout)


def _packed(x: Tensor, base: Base) -> Weight | None:
    """The weight as kernels take it, if it is multiplied so for the tokens of x or dY.

    It is not where blocks cross rows, for many tokens, and in float64.
    """
    if not kernels.is_supported(x.device):
        return None
    from qkern.kernels import launch
    from qkern.kernels.linear import config_for

    tokens = x.shape[:-1].numel()
    if not launch.fits(base.fmt, base.shape):
        return None
    tune_if_asked(x.device, x.dtype, tokens, base.shape)
    if config_for(x.device, x.dtype, tokens, *base.shape) is None:
        return None
    return launch.weight(*base.parts, base.fmt, base.shape)


def _decoded(x: Tensor, base: Base) -> Tensor:
    """The weight in x's dtype, (N, K)."""
    return dense(base.parts, base.fmt, base.shape, x.dtype)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + bias`` in x's dtype, by torch; rounded once."""
    if x.dtype == torch.bfloat16 and not kernels.multiplies_bf16(x.device):
        bias = None if bias is None else bias.float()
        return torch.nn.functional.linear(x.float(), weight.float(), bias).to(x.dtype)
    return torch.nn.functional.linear(x, weight, bias)


def _rows(x: Tensor) -> Tensor:
    """(..., K) as (M, K), contiguous and at a place that kernels can read."""
    if kernels.is_supported(x.device):
        from qkern.kernels.launch import operand

        return operand(x, x.shape[-1], "x")
    return x.reshape(-1, x.shape[-1])


def _factor(tensor: Tensor) -> Tensor:
    """A or B as kernels take it; float64 in fp32, as on a CPU."""
    tensor = tensor if tensor.dtype in _FACTORS else tensor.float()
    if not kernels.is_supported(tensor.device):
        return tensor
    from qkern.kernels.launch import operand

    return operand(tensor, tensor.shape[-1], "an adapter's factor")


def _dropout(adapter: Adapter) -> Dropout | None:
    if adapter.seed is None:
        return None
    from qkern.kernels.dropout import Dropout

    return Dropout(adapter.dropout, adapter.seed)
