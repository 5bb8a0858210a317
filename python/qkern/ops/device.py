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
    shape = (out_features, x.shape[-1])
    if not _has_kernel(x, fmt, shape):
        weight = dense(parts, fmt, shape, x.dtype)
        return reference.linear(x, weight, bias, lora_A, lora_B, scaling)
    from qkern.kernels import launch
    from qkern.kernels.linear import linear as multiply

    h = None
    if lora_A is not None and lora_B is not None:
        h = (x.to(lora_A.dtype) @ lora_A.mT) * scaling  # (..., r)
    return multiply(x, launch.weight(*parts, fmt, shape), bias, h, lora_B)


def _has_kernel(x: Tensor, fmt: QuantFormat, shape: tuple[int, int]) -> bool:
    """Whether a kernel serves: none does for blocks that cross rows, many tokens, and float64."""
    if not kernels.is_supported(x.device):
        return False
    from qkern.kernels import launch
    from qkern.kernels.linear import config_for

    if not launch.fits(fmt, shape):
        return False
    return config_for(x.device, x.dtype, x.shape[:-1].numel(), *shape) is not None
