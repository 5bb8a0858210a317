"""Every operation again in a few readable lines: the specification and the oracle of the tests.

Runs on any torch device. Slow on purpose: nothing here is blocked, fused or threaded. Devices that
have no kernels of their own use it as they are.

Shapes: ``n`` values, ``b = ceil(n / blocksize)`` blocks, ``g = ceil(b / 256)`` groups of scales.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qkern.formats import NESTED_BLOCKSIZE, QuantFormat, dynamic_code

# Below this, bitsandbytes' reciprocal would overflow: its floor for the block maximum.
ABSMAX_FLOOR = 1e-38
# Below this, 127 / absmax is not finite in fp32: such an int8 block is stored as zeros.
INT8_ABSMAX_FLOOR = 1e-36


class Parts(NamedTuple):
    """The tensors of a quantized value; the last two are None with fp32 scales."""

    packed: Tensor  # uint8 (ceil(n / 2),) or int8 (n,)
    absmax: Tensor  # fp32 (b,), or uint8 codes (b,)
    nested_absmax: Tensor | None  # fp32 (g,)
    offset: Tensor | None  # fp32 (1,)


def quantize(values: Tensor, fmt: QuantFormat) -> Parts:
    """Codes and scales of ``values`` (any shape), chosen by the block maximum.

    Double quantization is applied as the format says, without asking whether it is safe
    (``scales_are_safe``).
    """
    encode = _encode_int8 if fmt.code is None else _encode_4bit
    packed, absmax = encode(values.detach().reshape(-1).float(), fmt)
    if not fmt.double_quant:
        return Parts(packed, absmax, None, None)
    return Parts(packed, *quantize_absmax(absmax))


def dequantize(parts: Parts, fmt: QuantFormat, numel: int, dtype: torch.dtype) -> Tensor:
    """The ``numel`` values, flat: ``code * absmax`` in fp32, rounded once to ``dtype``."""
    absmax = parts.absmax.reshape(-1)
    if parts.nested_absmax is not None and parts.offset is not None:
        absmax = dequantize_absmax(absmax, parts.nested_absmax, parts.offset)
    packed = parts.packed.reshape(-1)
    if fmt.code is None:
        codes, step = packed.float(), absmax * torch.tensor(1 / 127, dtype=torch.float32)
    else:
        index = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)[:numel]
        codes, step = _code_tensor(fmt, packed.device)[index.int()], absmax
    scales = step.repeat_interleave(fmt.blocksize)[:numel]  # (n,)
    return (codes * scales).to(dtype)


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """8-bit codes (b,), group maxima (g,) and offset (1,) of fp32 scales (b,)."""
    groups = _blocks(absmax.double(), NESTED_BLOCKSIZE)
    # Summed group by group in fp64: the same mean for any number of threads.
    total = sum(group.sum() for group in groups) if len(groups) else torch.zeros(())
    mean = torch.as_tensor(total, dtype=torch.float64) / max(absmax.numel(), 1)
    offset = mean.float().reshape(1).to(absmax.device)
    residual = absmax - offset
    nested = _block_absmax(residual, NESTED_BLOCKSIZE)
    scale = nested.repeat_interleave(NESTED_BLOCKSIZE)[: absmax.numel()]
    scaled = torch.where(scale == 0, torch.zeros_like(scale), residual / scale)
    code = torch.tensor(dynamic_code(), dtype=torch.float32, device=absmax.device)
    return torch.bucketize(scaled, (code[:-1] + code[1:]) / 2).to(torch.uint8), nested, offset


def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
    """fp32 scales (b,) of 8-bit codes: ``code * nested_absmax``, then ``+ offset``."""
    code = torch.tensor(dynamic_code(), dtype=torch.float32, device=codes.device)
    scale = nested_absmax.repeat_interleave(NESTED_BLOCKSIZE)[: codes.numel()]
    return code[codes.int()] * scale + offset


def scales_are_safe(absmax: Tensor, decoded: Tensor) -> bool:
    """Whether each scale that is not 0 kept its sign and lies within 1/8 of what it was."""
    kept = (absmax.sign() == decoded.sign()) & ((decoded - absmax).abs() <= absmax.abs() / 8)
    return bool((kept | (absmax == 0)).all())


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """``x W^T + bias + scaling (x A^T) B^T``, in x's dtype; the adapter's part in its own dtype.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features), dequantized to x's dtype.
        bias: (out_features,) or None.
        lora_A: (r, in_features) or None.
        lora_B: (out_features, r) or None.
        scaling: factor of the adapter's part.
    """
    y = torch.nn.functional.linear(x, weight, bias)  # (..., out_features)
    if lora_A is None or lora_B is None:
        return y
    h = x.to(lora_A.dtype) @ lora_A.mT  # (..., r)
    return (y + (h @ lora_B.mT) * scaling).to(x.dtype)


def _encode_4bit(x: Tensor, fmt: QuantFormat) -> tuple[Tensor, Tensor]:
    absmax = _block_absmax(x, fmt.blocksize)
    full = x.numel() // fmt.blocksize * fmt.blocksize
    inverse = (1.0 / absmax.clamp_min(ABSMAX_FLOOR)).repeat_interleave(fmt.blocksize)
    scaled = x * inverse[: x.numel()]
    if full < x.numel():  # the ragged last block divides instead, as bitsandbytes does
        absmax[-1] = absmax[-1].clamp_min(ABSMAX_FLOOR)
        scaled[full:] = x[full:] / absmax[-1]
    if x.numel() % 2:
        scaled = torch.cat([scaled, scaled.new_zeros(1)])
    code = _code_tensor(fmt, x.device)
    ascending, order = torch.sort(code, stable=True)
    # A value equal to a midpoint takes the lower code.
    index = torch.bucketize(scaled.clamp(-1, 1), (ascending[:-1] + ascending[1:]) / 2)
    nibble = order[index].to(torch.uint8)
    return (nibble[0::2] << 4) | nibble[1::2], absmax


def _encode_int8(x: Tensor, fmt: QuantFormat) -> tuple[Tensor, Tensor]:
    absmax = _block_absmax(x, fmt.blocksize)
    if fmt.kind.per_row:  # bitsandbytes' factor: now and then an ulp off the quotient
        factor = 127.0 * absmax.reciprocal()
    else:  # torch computes 127 / t as 127 * (1 / t); two tensors are divided for real
        factor = torch.full_like(absmax, 127.0) / absmax
    factor[absmax < INT8_ABSMAX_FLOOR] = 0.0
    scaled = x * factor.repeat_interleave(fmt.blocksize)[: x.numel()]
    return scaled.round().clamp(-127, 127).to(torch.int8), absmax


def _blocks(x: Tensor, blocksize: int) -> Tensor:
    """``x`` (n,) as rows of a block each, the last one filled up with zeros."""
    return torch.nn.functional.pad(x, (0, -x.numel() % blocksize)).reshape(-1, blocksize)


def _block_absmax(x: Tensor, blocksize: int) -> Tensor:
    if x.numel() == 0:
        return x.new_empty(0)
    return _blocks(x, blocksize).abs().amax(dim=1)


def _code_tensor(fmt: QuantFormat, device: torch.device) -> Tensor:
    return torch.tensor(fmt.code, dtype=torch.float32, device=device)
