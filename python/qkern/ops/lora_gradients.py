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

from qkern.ops import device, host


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


def add_product(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``y + a b`` in y's dtype, (..., N) + (..., r) (r, N); one pass over y where dtypes agree."""
    flat_y, flat_a = y.reshape(-1, y.shape[-1]), a.reshape(-1, a.shape[-1])
    if b.dtype == y.dtype:
        return torch.addmm(flat_y, flat_a, b).reshape(y.shape)
    return (y + (flat_a @ b).reshape(y.shape)).to(y.dtype)


@torch.library.custom_op(
    "qkern::lora_gradients",
    mutates_args=(),
    schema="(Tensor x, Tensor grad, Tensor lora_A, Tensor lora_B, float scaling)"
    " -> (Tensor, Tensor)",
)
def _lora_gradients(
    x: Tensor, grad: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    if torch.float64 in (x.dtype, grad.dtype, lora_A.dtype, lora_B.dtype):
        return lora_gradients(x, grad, lora_A, lora_B, scaling)
    return device.lora_gradients(x, grad, device.Adapter(lora_A, lora_B, scaling))


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
