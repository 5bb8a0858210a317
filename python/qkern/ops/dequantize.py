"""``qkern::dequantize``: codes and scales to values.

w[i] = round_to_dtype(code[i] * absmax[i // blocksize])     product in fp32, rounded once
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qkern import kernels, reference
from qkern.formats import QuantFormat
from qkern.ops import host
from qkern.ops.direct import is_unobserved

# Schema fragment of a quantized tensor, the same in every operator.
PARTS_SCHEMA = "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? offset"
FORMAT_SCHEMA = "str quant_type, int blocksize"


@torch.library.custom_op(
    "qkern::dequantize",
    mutates_args=(),
    schema=f"({PARTS_SCHEMA}, {FORMAT_SCHEMA}, SymInt[] shape, ScalarType dtype) -> Tensor",
)
def dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """The dense tensor of ``shape`` and ``dtype``."""
    fmt = QuantFormat(quant_type, blocksize, nested_absmax is not None)
    parts = reference.Parts(packed, absmax, nested_absmax, offset)
    return dense(parts, fmt, shape, dtype)


@dequantize.register_fake
def _(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty(shape, dtype=dtype)


def decoded(
    parts: reference.Parts, fmt: QuantFormat, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The operator, or its work where nothing watches."""
    if is_unobserved(parts.packed, parts.absmax):
        return dense(parts, fmt, shape, dtype)
    out: Tensor = dequantize(*parts, fmt.quant_type, fmt.blocksize, list(shape), dtype)
    return out


def dense(
    parts: reference.Parts, fmt: QuantFormat, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The values by the best way that their device has: host code, a kernel, the reference."""
    numel = torch.Size(shape).numel()
    device = parts.packed.device
    if device.type == "cpu":
        out = host.empty(shape, dtype)
        host.dequantize_into(parts, fmt, out)
        return out
    if kernels.is_supported(device):
        from qkern.kernels.dequantize import dequantize as launch

        return launch(*parts, fmt, numel, dtype).reshape(tuple(shape))
    return reference.dequantize(parts, fmt, numel, dtype).reshape(tuple(shape))


def why_no_kernel(device: torch.device) -> str:
    """Why ``dense`` takes the reference on a device that is no CPU; empty where it does not."""
    return kernels.why_not(device)
