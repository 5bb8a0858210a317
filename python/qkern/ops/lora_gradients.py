"""``qkern::lora_gradients``: the gradients of a low-rank adapter.

    h = x A^T                (M, r)
    G = scaling dY B         (M, r)
    dA = G^T x               (r, K)
    dB = scaling dY^T h      (N, r)

M tokens, N out_features, K in_features, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qkern import kernels
from qkern.ops import host

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def lora_gradients(
    x: Tensor, grad: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """In torch's operations, which have gradients of their own.

    Args:
        x: (..., in_features).
        grad: dY, (..., out_features).
        lora_A: (r, in_features).
        lora_B: (out_features, r).
        scaling: factor of the adapter's part.

    Returns:
        dA (r, in_features) and dB (out_features, r), in the adapter's dtype.
    """
    flat_x = x.reshape(-1, x.shape[-1]).to(lora_A.dtype)  # (M, in_features)
    flat_grad = grad.reshape(-1, grad.shape[-1]).to(lora_A.dtype)  # (M, out_features)
    G = (flat_grad @ lora_B) * scaling  # (M, r)
    return G.mT @ flat_x, flat_grad.mT @ (flat_x @ lora_A.mT) * scaling


@torch.library.custom_op(
    "qkern::lora_gradients",
    mutates_args=(),
    schema="(Tensor x, Tensor grad, Tensor lora_A, Tensor lora_B, float scaling)"
    " -> (Tensor, Tensor)",
)
def _lora_gradients(
    x: Tensor, grad: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    tensors = (x, grad, lora_A, lora_B)
    if kernels.is_supported(x.device) and all(t.dtype in _DTYPES for t in tensors):
        return _by_kernels(*tensors, scaling)
    return lora_gradients(*tensors, scaling)


def _by_kernels(
    x: Tensor, grad: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """One pass over dY and two over x, sums in fp32, in the order that the shapes fix."""
    from qkern.kernels.launch import operand
    from qkern.kernels.lora import hidden
    from qkern.kernels.lora_backward import grad_a, grad_hidden

    flat_x = operand(x, x.shape[-1], "x")  # (M, in_features)
    flat_grad = operand(grad, grad.shape[-1], "grad")  # (M, out_features)
    A, B = (operand(t, t.shape[-1], name) for t, name in ((lora_A, "lora_A"), (lora_B, "lora_B")))
    h = hidden(flat_x, A, scaling)  # (M, r)
    G, dB = grad_hidden(flat_grad, B, h, scaling)
    return grad_a(G, flat_x, lora_A.dtype), dB


@_lora_gradients.register_fake
def _(
    x: Tensor, grad: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    return lora_A.new_empty(lora_A.shape), lora_B.new_empty(lora_B.shape)


@_lora_gradients.register_kernel("cpu")
def _(
    x: Tensor, grad: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    return host.lora_gradients(x, grad, lora_A, lora_B, scaling)
