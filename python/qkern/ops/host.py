"""The CPU side of the operators: torch tensors seen as NumPy buffers, and bounded matmuls.

No dense copy of a whole weight: a panel of rows is dequantized, multiplied and forgotten.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qkern import codec
from qkern.errors import DTypeError
from qkern.formats import DTYPES, QuantFormat
from qkern.reference import Parts

# Bytes of a dequantized panel: a few of them stay in the outer cache.
PANEL_BYTES = 8 << 20
# Bytes of a fresh output from which huge pages pay: smaller ones the allocator recycles.
HUGE_BYTES = 4 << 20


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` to "bfloat16", refusing what cannot be quantized.

    Raises:
        DTypeError: unless the dtype is float32, float16 or bfloat16.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        msg = f"dtype {name} is not supported: allowed are {', '.join(DTYPES)}; convert first"
        raise DTypeError(msg)
    return name


def as_array(tensor: Tensor) -> npt.NDArray[Any]:
    """A flat view of a CPU tensor to read; fp16 and bf16 as uint16 bit patterns.

    Through DLPack: ``Tensor.numpy()`` would pin the storage's size, which FSDP2 changes.
    """
    flat = tensor.detach().reshape(-1)
    if flat.dtype in (torch.float16, torch.bfloat16):
        return np.from_dlpack(flat.view(torch.int16)).view(np.uint16)
    return np.from_dlpack(flat)


def as_buffer(tensor: Tensor) -> npt.NDArray[Any]:
    """A flat view of a contiguous CPU tensor of this module's own, to write."""
    flat = tensor.view(-1)
    if flat.dtype in (torch.float16, torch.bfloat16):
        return flat.view(torch.int16).numpy().view(np.uint16)
    return flat.numpy()


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A fresh dense CPU tensor; a large one in huge pages, where the system has them.

    The first write to each page of 4 KiB costs several times what the codec does for it. NumPy
    asks for huge pages under its large arrays by itself.
    """
    out = torch.empty(tuple(shape), dtype=dtype)
    if out.nbytes >= HUGE_BYTES:
        codec.advise_huge_pages(as_buffer(out).view(np.uint8))
    return out


def as_parts(parts: Parts) -> codec.Parts:
    """The flat arrays of a quantized tensor on the CPU."""
    return codec.Parts(*(None if part is None else as_array(part) for part in parts))  # type: ignore[arg-type]


def quantize(values: Tensor, fmt: QuantFormat, nonfinite: str) -> tuple[Tensor, Tensor]:
    """Flat packed codes and fp32 absmax (blocks,) of values of any shape and strides."""
    name = dtype_name(values.dtype)
    parts = codec.encode(as_array(values.contiguous()), name, fmt, nonfinite=nonfinite)
    return torch.from_numpy(parts.packed), torch.from_numpy(parts.absmax)


def search_scales(
    values: Tensor, fmt: QuantFormat, importance: Tensor | None, nonfinite: str
) -> Tensor:
    """Scales (blocks,) of least squared error for values of any shape and strides."""
    name = dtype_name(values.dtype)
    weights = None if importance is None else as_array(importance.contiguous())
    flat = as_array(values.contiguous())
    return torch.from_numpy(codec.search_scales(flat, name, fmt, weights, nonfinite=nonfinite))


def encode(values: Tensor, scales: Tensor, fmt: QuantFormat) -> Tensor:
    """Flat packed codes of values of any shape and strides against scales (blocks,)."""
    flat, scale = as_array(values.contiguous()), as_array(scales.contiguous())
    return torch.from_numpy(codec.encode_codes(flat, dtype_name(values.dtype), fmt, scale))


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """8-bit codes, nested_absmax, offset (1,) and safe (1,) of fp32 scales (blocks,)."""
    codes, nested, offset, safe = codec.encode_absmax(as_array(absmax.contiguous()))
    arrays = (torch.from_numpy(codes), torch.from_numpy(nested), torch.from_numpy(offset))
    return (*arrays, torch.tensor([safe]))


def dequantize_into(parts: Parts, fmt: QuantFormat, out: Tensor, *, reused: bool = False) -> None:
    """Write the values into ``out``, (n,) contiguous; ``reused`` as in ``codec.decode``."""
    codec.decode(as_parts(parts), fmt, as_buffer(out), dtype_name(out.dtype), reused=reused)


def matmul(
    x: Tensor, parts: Parts, fmt: QuantFormat, out_features: int, bias: Tensor | None
) -> Tensor:
    """``x W^T + bias``: (..., in_features) to (..., out_features)."""
    in_features = x.shape[-1]
    flat = x.reshape(x.shape[:-1].numel(), in_features)  # (M, K)
    out = x.new_empty(flat.shape[0], out_features)  # (M, N)
    if in_features == 0:  # an empty sum
        out[:] = 0 if bias is None else bias
        return out.reshape(*x.shape[:-1], out_features)
    for start, panel in _panels(parts, fmt, out_features, in_features, x.dtype):
        rows = slice(start, start + panel.shape[0])
        part = None if bias is None else bias[rows]
        product = torch.nn.functional.linear(flat, panel, part)
        if panel.shape[0] == out_features:
            out = product
        else:
            out[:, rows] = product
    return out.reshape(*x.shape[:-1], out_features)


def matmul_backward(grad: Tensor, parts: Parts, fmt: QuantFormat, in_features: int) -> Tensor:
    """``dY W``: (..., out_features) to (..., in_features)."""
    out_features = grad.shape[-1]
    flat = grad.reshape(grad.shape[:-1].numel(), out_features)  # (M, N)
    # Summed over panels in fp32: rounding each sum would make the result depend on their size.
    total = flat.new_zeros(flat.shape[0], in_features, dtype=torch.float32)  # (M, K)
    for start, panel in _panels(parts, fmt, out_features, in_features, grad.dtype):
        if panel.shape[0] == out_features:
            return (flat @ panel).reshape(*grad.shape[:-1], in_features)
        total += flat[:, start : start + panel.shape[0]] @ panel
    return total.to(grad.dtype).reshape(*grad.shape[:-1], in_features)


def _panels(
    parts: Parts, fmt: QuantFormat, rows: int, cols: int, dtype: torch.dtype
) -> Iterator[tuple[int, Tensor]]:
    """Dense panels of whole rows, (first row, (panel rows, cols)), each valid until the next.

    A panel starts where a block starts. Rows that share a block with the next row are taken
    together, so any ``cols`` is right.
    """
    if rows == 0 or cols == 0:
        return
    step = fmt.blocksize // math.gcd(cols, fmt.blocksize)  # rows between block starts
    step *= max(1, PANEL_BYTES // (step * cols * dtype.itemsize))
    arrays = as_parts(parts)
    arrays = codec.Parts(arrays.packed, codec.decode_absmax(arrays), None, None)
    buffer = torch.empty(min(step, rows), cols, dtype=dtype)
    name, values = dtype_name(dtype), as_buffer(buffer)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        first, last = start * cols, stop * cols
        codec.decode_range(arrays, fmt, first, last, values[: last - first], name)
        yield start, buffer[: stop - start]
