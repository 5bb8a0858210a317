"""``qkern::quantize_merged``: a weight with its adapter in it, quantized again.

    W' = W + s B A               fp32 (N, K), W dequantized and rounded to ``dtype``
    packed, scales = quantize(W')

N out_features, K in_features, r rank, s scaling. Scales are fp32 as they will be decoded: those
that 8 bits hold are rounded to them first. So the shapes are the same for any values, and the
product with these parts is that with the stored ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qkern import reference
from qkern.formats import QuantFormat
from qkern.ops import device, host
from qkern.ops.dequantize import FORMAT_SCHEMA, PARTS_SCHEMA, decoded
from qkern.ops.direct import is_unobserved
from qkern.ops.lora_gradients import lora_gradients
from qkern.ops.quantize import encode, quantize, quantize_absmax, search_scales

_TARGET_SCHEMA = "str target_type, int target_blocksize, bool double_quant, str method"


def merged_values(
    parts: reference.Parts,
    fmt: QuantFormat,
    shape: Sequence[int],
    dtype: torch.dtype,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
) -> Tensor:
    """``W + s B A`` in fp32, whatever autocast says.

    Args:
        parts: the quantized weight.
        fmt: how its bytes are read.
        shape: (out_features, in_features).
        dtype: that the base is rounded to before the sum.
        lora_A: (r, in_features).
        lora_B: (out_features, r).
        scaling: factor of the adapter's part.
    """
    dtype = torch.float32 if dtype == torch.float64 else dtype
    with torch.no_grad(), torch.autocast(lora_A.device.type, enabled=False):
        base = decoded(parts, fmt, shape, dtype).float()
        return base.addmm_(lora_B.detach().float(), lora_A.detach().float(), alpha=scaling)


def _quantize_merged(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    dtype: torch.dtype,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    target_type: str,
    target_blocksize: int,
    double_quant: bool,  # noqa: FBT001 - the operator's schema
    method: str,
) -> tuple[Tensor, Tensor]:
    """Flat codes and fp32 scales (blocks,); NaN and infinity stay in their own block."""
    parts = reference.Parts(packed, absmax, nested_absmax, offset)
    fmt = QuantFormat(quant_type, blocksize, nested_absmax is not None)
    shape = (lora_B.shape[0], lora_A.shape[1])
    values = merged_values(parts, fmt, shape, dtype, lora_A, lora_B, scaling)
    kind = (target_type, target_blocksize)
    codes = None
    if method == "search":
        scales = search_scales(values, *kind, None, "keep")
    else:
        codes, scales = quantize(values, *kind, "keep")
    if double_quant:
        *stored, safe = quantize_absmax(scales)
        scales = torch.where(safe, reference.dequantize_absmax(*stored), scales)
    return encode(values, scales, *kind) if codes is None else codes, scales


_operator = torch.library.custom_op(
    "qkern::quantize_merged",
    _quantize_merged,
    mutates_args=(),
    schema=f"({PARTS_SCHEMA}, {FORMAT_SCHEMA}, ScalarType dtype, Tensor lora_A, Tensor lora_B,"
    f" float scaling, {_TARGET_SCHEMA}) -> (Tensor, Tensor)",
)


@_operator.register_fake
def _(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    dtype: torch.dtype,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    target_type: str,
    target_blocksize: int,
    double_quant: bool,  # noqa: FBT001 - the operator's schema
    method: str,
) -> tuple[Tensor, Tensor]:
    fmt = QuantFormat(target_type, target_blocksize, double_quant=False)
    numel = lora_B.shape[0] * lora_A.shape[1]
    codes = packed.new_empty(fmt.packed_size(numel), dtype=getattr(torch, fmt.packed_dtype))
    return codes, packed.new_empty(fmt.num_blocks(numel), dtype=torch.float32)


def quantize_merged(
    parts: reference.Parts,
    fmt: QuantFormat,
    dtype: torch.dtype,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    target: QuantFormat,
    method: str,
) -> reference.Parts:
    """The operator, or its work where nothing watches; without a gradient.

    Args:
        parts: the quantized weight, (out_features, in_features).
        fmt: how its bytes are read.
        dtype: that the base is rounded to before the sum.
        lora_A: (r, in_features).
        lora_B: (out_features, r).
        scaling: factor of the adapter's part.
        target: what the sum is quantized to.
        method: how codes are chosen.

    Returns:
        Codes and fp32 scales of ``target.replace(double_quant=False)``.
    """
    A, B = lora_A.detach(), lora_B.detach()
    compute = _quantize_merged if is_unobserved(A, B, parts.packed) else _operator
    kind = (target.quant_type, target.blocksize, target.double_quant, method)
    base = (*parts, fmt.quant_type, fmt.blocksize, dtype)
    packed, scales = compute(*base, A, B, scaling, *kind)
    return reference.Parts(packed, scales, None, None)


def input_gradient(
    grad: Tensor, parts: reference.Parts, fmt: QuantFormat, in_features: int
) -> Tensor:
    """``dY W``, (..., out_features) to (..., in_features); it can be differentiated again."""
    if not torch.is_grad_enabled() and is_unobserved(grad, parts.packed):
        if device.serves(grad):
            return device.linear_backward(
                grad, device.Base(parts, fmt, (grad.shape[-1], in_features))
            )
        return host.linear_backward(grad, parts, fmt, in_features, None, None, 1.0)
    weight = (*parts, fmt.quant_type, fmt.blocksize, in_features)
    found: Tensor = torch.ops.qkern.linear_backward(grad, *weight)
    return found


def adapter_gradients(
    x: Tensor, grad: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Those of A and B, see ``lora_gradients``; they can be differentiated again."""
    if torch.is_grad_enabled():
        return lora_gradients(x, grad, lora_A, lora_B, scaling)
    direct = grad.is_cpu and is_unobserved(x, grad, lora_A, lora_B)
    reduce = host.lora_gradients if direct else torch.ops.qkern.lora_gradients
    found: tuple[Tensor, Tensor] = reduce(x, grad, lora_A, lora_B, scaling)
    return found
