"""The native extension on torch tensors, with the SIMD body and the threads that a test names."""

from __future__ import annotations

import torch
from torch import Tensor

import qkern
from qkern import _native, codec, reference
from qkern.formats import QuantFormat
from qkern.ops import host

BODIES = _native.available_simd()


def encode_on(
    body: str, values: Tensor, fmt: QuantFormat, *, threads: int = 0, nonfinite: str = "error"
) -> tuple[Tensor, Tensor]:
    """Codes and fp32 scales of a tensor, in poisoned memory: what is not written shows."""
    bits, dtype = host.as_array(values.contiguous()), host.dtype_name(values.dtype)
    absmax = torch.full((fmt.num_blocks(values.numel()),), torch.nan)
    settings = {"simd": body, "threads": threads, "nonfinite": nonfinite}
    if fmt.quant_type == "int8":
        packed = torch.full((values.numel(),), -128, dtype=torch.int8)
        _native.quantize_int8(
            bits, dtype, fmt.blocksize, packed.numpy(), absmax.numpy(), **settings
        )
    else:
        packed = torch.full((fmt.packed_size(values.numel()),), 0xAB, dtype=torch.uint8)
        code = codec.code_array(fmt.quant_type)
        _native.quantize_4bit(
            bits, dtype, code, fmt.blocksize, packed.numpy(), absmax.numpy(), **settings
        )
    return packed, absmax


def decode_on(
    body: str,
    packed: Tensor,
    absmax: Tensor,
    fmt: QuantFormat,
    numel: int,
    dtype: torch.dtype,
    *,
    threads: int = 0,
) -> Tensor:
    """The values of codes and fp32 scales, flat."""
    out = torch.full((numel,), torch.nan, dtype=dtype)
    bits, name = host.as_buffer(out), host.dtype_name(dtype)
    settings = {"simd": body, "threads": threads}
    if fmt.quant_type == "int8":
        _native.dequantize_int8(
            packed.numpy(), absmax.numpy(), fmt.blocksize, bits, name, **settings
        )
    else:
        code = codec.code_array(fmt.quant_type)
        _native.dequantize_4bit(
            packed.numpy(), absmax.numpy(), code, fmt.blocksize, bits, name, **settings
        )
    return out


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same bytes: NaN equals itself, 0.0 is not -0.0."""
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8)
    )


def decoded_scales(q: qkern.QuantizedTensor) -> Tensor:
    """The fp32 scales that decoding multiplies by."""
    if q.nested_absmax is None:
        return q.absmax.reshape(-1)
    return reference.dequantize_absmax(q.absmax.reshape(-1), q.nested_absmax, q.offset)
