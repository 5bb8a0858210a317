"""``qkern::dequantize``: codes and scales to values.

w[i] = round_to_dtype(code[i] * absmax[i // blocksize])     product in fp32, rounded once
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from qkern import kernels, reference
from qkern.formats import NESTED_BLOCKSIZE, QuantFormat, dynamic_code
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


def parts_of_shard(parts: reference.Parts, fmt: QuantFormat, start: int) -> reference.Parts:
    """Parts with fp32 scales of a shard of whole rows, whose first value has flat index ``start``.

    Its groups of scales may start in mid-tensor.
    """
    packed, absmax, nested_absmax, offset = parts
    if nested_absmax is None or offset is None:
        return parts
    group, lead = divmod(start // fmt.blocksize, NESTED_BLOCKSIZE)
    codes = torch.nn.functional.pad(absmax.reshape(-1), [lead, 0])
    scales = reference.dequantize_absmax(codes, nested_absmax[group:], offset)[lead:]
    return reference.Parts(packed, scales.reshape(absmax.shape), None, None)


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
    return by_torch(parts, fmt, numel, dtype).reshape(tuple(shape))


def by_torch(parts: reference.Parts, fmt: QuantFormat, numel: int, dtype: torch.dtype) -> Tensor:
    """The ``numel`` values, flat, by torch's operations: the bytes of ``reference.dequantize``.

    For GPUs that have no kernels. Some blocks at a time, so that the fp32 values need little
    memory; nothing waits for the device.
    """
    absmax = parts.absmax.reshape(-1)
    pairs, nested_code = _tables(fmt.code, absmax.device)
    if parts.nested_absmax is not None and parts.offset is not None:
        scale = parts.nested_absmax.repeat_interleave(NESTED_BLOCKSIZE)[: absmax.numel()]
        absmax = nested_code[absmax.int()] * scale + parts.offset
    step = absmax * _INT8_STEP if fmt.code is None else absmax
    packed, each = parts.packed.reshape(-1), 8 // fmt.bits
    out = torch.empty(numel, dtype=dtype, device=absmax.device)
    blocks = max(_VALUES_AT_ONCE // fmt.blocksize, 1)  # of an even size where codes have 4 bits
    for block in range(0, step.numel(), blocks):
        first = block * fmt.blocksize
        values = out[first : first + blocks * fmt.blocksize]
        codes = packed[first // each : -(-(first + values.numel()) // each)]
        looked_up = codes.float() if fmt.code is None else pairs[codes.int()].reshape(-1)
        scales = step[block : block + blocks].repeat_interleave(fmt.blocksize)
        values.copy_(looked_up[: values.numel()] * scales[: values.numel()])
    return out


_INT8_STEP = float(torch.tensor(1 / 127, dtype=torch.float32))
_VALUES_AT_ONCE = 1 << 22


@functools.lru_cache(maxsize=64)
def _tables(code: tuple[float, ...] | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """fp32 values of the two codes of a byte, (256, 2), and of 8-bit scales, (256,)."""
    code = code or (0.0,) * 16
    pairs = [(code[byte >> 4], code[byte & 15]) for byte in range(256)]
    tables = (torch.tensor(table, dtype=torch.float32) for table in (pairs, dynamic_code()))
    by_pair, nested_code = (table.to(device) for table in tables)
    return by_pair, nested_code


def why_no_kernel(device: torch.device) -> str:
    """Why ``dense`` takes the reference on a device that is no CPU; empty where it does not."""
    return kernels.why_not(device)
