"""The operators beside the CPU: kernels where they serve, else a dense copy of the weight."""

from __future__ import annotations

from torch import Tensor

from qkern import kernels, reference
from qkern.formats import QuantFormat
from qkern.ops.dequantize import dense


def linear(
    x: Tensor,
    parts: reference.Parts,
    fmt: QuantFormat,
    out_features: int,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
) -> Tensor:
    """``x W^T + bias + scaling (x A^T) B^T``: (..., in_features) to (..., out_features)."""
    y = _by_kernel(x, parts, fmt, out_features, bias, lora_A, lora_B, scaling)
    if y is not None:
        return y
    weight = dense(parts, fmt, (out_features, x.shape[-1]), x.dtype)
    return reference.linear(x, weight, bias, lora_A, lora_B, scaling)


def _by_kernel(
    x: Tensor,
    parts: reference.Parts,
    fmt: QuantFormat,
    out_features: int,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
) -> Tensor | None:
    """The product without a dense copy of the weight; None where no kernel serves it.

    So it is for blocks that cross rows, for many tokens, and for float64.
    """
    if not kernels.is_supported(x.device):
        return None
    from qkern.kernels import launch
    from qkern.kernels.linear import config_for
    from qkern.kernels.linear import linear as multiply

    in_features, tokens = x.shape[-1], x.shape[:-1].numel()
    if not launch.fits(fmt, (out_features, in_features)):
        return None
    if config_for(x.device, x.dtype, tokens, out_features, in_features) is None:
        return None
    weight = launch.weight(*parts, fmt, (out_features, in_features))
    h = None
    if lora_A is not None and lora_B is not None:
        h = (x.to(lora_A.dtype) @ lora_A.mT) * scaling  # (..., r)
    return multiply(x, weight, bias, h, lora_B)
