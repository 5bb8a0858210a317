"""Values to bytes.

``qkern::quantize``: values to codes and fp32 scales by the block maximum.
``qkern::quantize_absmax``: those scales to 8 bits, with the answer whether that is safe.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qkern import reference
from qkern.errors import NonFiniteError
from qkern.formats import NESTED_BLOCKSIZE, QuantFormat
from qkern.ops import host


@torch.library.custom_op(
    "qkern::quantize",
    mutates_args=(),
    schema="(Tensor values, str quant_type, int blocksize, str nonfinite) -> (Tensor, Tensor)",
)
def quantize(
    values: Tensor, quant_type: str, blocksize: int, nonfinite: str
) -> tuple[Tensor, Tensor]:
    """Flat packed codes and fp32 absmax (blocks,) of ``values`` (any shape, any strides).

    Raises:
        DTypeError: unless values are float32, float16 or bfloat16.
        NonFiniteError: for NaN or infinity, unless ``nonfinite`` is ``"keep"``.
    """
    host.dtype_name(values.dtype)
    if nonfinite == "error":
        check_finite(values)
    parts = reference.quantize(values, QuantFormat(quant_type, blocksize, double_quant=False))
    return parts.packed, parts.absmax


@quantize.register_fake
def _(values: Tensor, quant_type: str, blocksize: int, nonfinite: str) -> tuple[Tensor, Tensor]:
    host.dtype_name(values.dtype)
    fmt = QuantFormat(quant_type, blocksize, double_quant=False)
    packed_dtype = getattr(torch, fmt.packed_dtype)
    packed = values.new_empty(fmt.packed_size(values.numel()), dtype=packed_dtype)
    return packed, values.new_empty(fmt.num_blocks(values.numel()), dtype=torch.float32)


@quantize.register_kernel("cpu")
def _(values: Tensor, quant_type: str, blocksize: int, nonfinite: str) -> tuple[Tensor, Tensor]:
    fmt = QuantFormat(quant_type, blocksize, double_quant=False)
    return host.quantize(values, fmt, nonfinite)


@torch.library.custom_op(
    "qkern::quantize_absmax",
    mutates_args=(),
    schema="(Tensor absmax) -> (Tensor, Tensor, Tensor, Tensor)",
)
def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """8-bit codes (blocks,), nested_absmax (groups,), offset (1,) and safe (1,) bool of scales.

    Not safe: a decoded scale changed its sign, or is off by more than 1/8.
    """
    codes, nested, offset = reference.quantize_absmax(absmax)
    decoded = reference.dequantize_absmax(codes, nested, offset)
    safe = reference.scales_are_safe(absmax, decoded)
    return codes, nested, offset, torch.tensor([safe], device=absmax.device)


@quantize_absmax.register_fake
def _(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    groups = -(-absmax.shape[0] // NESTED_BLOCKSIZE)
    return (
        absmax.new_empty(absmax.shape, dtype=torch.uint8),
        absmax.new_empty(groups),
        absmax.new_empty(1),
        absmax.new_empty(1, dtype=torch.bool),
    )


@quantize_absmax.register_kernel("cpu")
def _(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return host.quantize_absmax(absmax)


def check_finite(values: Tensor) -> None:
    """Refuse NaN and infinity, naming how many and where the first one is."""
    bad = ~torch.isfinite(values)
    count = int(bad.sum())
    if count:
        first = int(bad.reshape(-1).to(torch.uint8).argmax())
        msg = (
            f"{count} of {values.numel()} values are NaN or infinite, the first at flat index "
            f'{first}: repair them, or pass nonfinite="keep" to confine each to its own block'
        )
        raise NonFiniteError(msg)
