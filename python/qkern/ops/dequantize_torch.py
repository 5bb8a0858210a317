"""Codes and scales to values by torch's operations: for devices without kernels.

The bytes of ``reference.dequantize``. Some blocks at a time, so that what lies between codes and
values needs little memory. Nothing waits for the device.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from qkern import kernels
from qkern.formats import NESTED_BLOCKSIZE, QuantFormat, dynamic_code
from qkern.reference import Parts

_INT8_STEP = float(torch.tensor(1 / 127, dtype=torch.float32))
_VALUES_AT_ONCE = 1 << 22


def dequantize_torch(
    parts: Parts, fmt: QuantFormat, numel: int, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """The ``numel`` values, flat: ``code * absmax`` in fp32, rounded once to ``dtype``.

    Args:
        parts: of the quantized tensor.
        fmt: how the bytes are read.
        numel: values.
        dtype: of the result.
        out: (numel,) in ``dtype``, to write into; a new tensor if None.
    """
    absmax = parts.absmax.reshape(-1)
    pairs, nested_code = _tables(fmt.code, absmax.device)
    if parts.nested_absmax is not None and parts.offset is not None:
        scale = parts.nested_absmax.repeat_interleave(NESTED_BLOCKSIZE)[: absmax.numel()]
        absmax = nested_code[absmax.int()] * scale + parts.offset
    step = absmax * _INT8_STEP if fmt.code is None else absmax
    packed, each = parts.packed.reshape(-1), 8 // fmt.bits
    if out is None:
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


@functools.lru_cache(maxsize=64)
def _tables(code: tuple[float, ...] | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """fp32 values of the two codes of a byte, (256, 2), and of 8-bit scales, (256,)."""
    code = code or (0.0,) * 16
    pairs = [(code[byte >> 4], code[byte & 15]) for byte in range(256)]
    make = functools.partial(torch.tensor, dtype=torch.float32, device="cpu")
    by_pair, nested = make(pairs), make(dynamic_code())
    return kernels.lasting(device, lambda: (by_pair.to(device), nested.to(device)))
