"""The CPU side of the operators: torch tensors seen as NumPy buffers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]

from qkern import codec
from qkern.errors import DTypeError
from qkern.formats import DTYPES, QuantFormat
from qkern.reference import Parts

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


class _Capsule:
    """A CPU tensor for ``numpy.from_dlpack``, without the checks of ``Tensor.__dlpack__``.

    Those take as long as a small product.
    """

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **_: Any) -> Any:
        return to_dlpack(self.tensor)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0  # kDLCPU


def as_array(tensor: Tensor) -> npt.NDArray[Any]:
    """A flat view of a CPU tensor to read; fp16 and bf16 as uint16 bit patterns.

    Through DLPack: ``Tensor.numpy()`` would pin the storage's size, which FSDP2 changes.
    """
    flat = tensor.detach().view(-1) if tensor.is_contiguous() else tensor.detach().reshape(-1)
    if flat.dtype in (torch.float16, torch.bfloat16):
        bits: npt.NDArray[Any] = np.from_dlpack(_Capsule(flat.view(torch.int16)))
        return bits.view(np.uint16)
    return np.from_dlpack(_Capsule(flat))


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


def adapter(lora_A: Tensor | None, lora_B: Tensor | None, scaling: float) -> codec.Adapter | None:
    """A low-rank adapter as fp32 arrays, or None."""
    if lora_A is None or lora_B is None:
        return None
    return codec.Adapter(_floats(lora_A), _floats(lora_B), lora_A.shape[0], scaling)


def linear(
    x: Tensor,
    parts: Parts,
    fmt: QuantFormat,
    out_features: int,
    bias: Tensor | None,
    lora: codec.Adapter | None,
    compute: str,
) -> Tensor:
    """``x W^T + bias`` and the adapter's part: (..., in_features) to (..., out_features)."""
    out = x.new_empty((*x.shape[:-1], out_features))
    codec.linear(
        as_array(x.contiguous()),
        dtype_name(x.dtype),
        as_parts(parts),
        fmt,
        (out_features, x.shape[-1]),
        as_buffer(out),
        bias=None if bias is None else _floats(bias),
        adapter=lora,
        compute=compute,
        threads=torch.get_num_threads(),
    )
    return out


def linear_backward(
    grad: Tensor, parts: Parts, fmt: QuantFormat, in_features: int, lora: codec.Adapter | None
) -> Tensor:
    """``dY W`` and the adapter's part: (..., out_features) to (..., in_features)."""
    out = grad.new_empty((*grad.shape[:-1], in_features))
    codec.linear_backward(
        as_array(grad.contiguous()),
        dtype_name(grad.dtype),
        as_parts(parts),
        fmt,
        (grad.shape[-1], in_features),
        as_buffer(out),
        adapter=lora,
        threads=torch.get_num_threads(),
    )
    return out


def lora_gradients(
    x: Tensor, grad: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Those of A (r, in_features) and B (out_features, r), in the adapter's dtypes."""
    lora = codec.Adapter(_floats(lora_A), _floats(lora_B), lora_A.shape[0], scaling)
    dA, dB = torch.empty(lora_A.shape), torch.empty(lora_B.shape)
    codec.lora_gradients(
        as_array(x.contiguous()),
        as_array(grad.to(x.dtype).contiguous()),
        dtype_name(x.dtype),
        lora,
        as_buffer(dA),
        as_buffer(dB),
        threads=torch.get_num_threads(),
    )
    return dA.to(lora_A.dtype), dB.to(lora_B.dtype)


def _floats(tensor: Tensor) -> npt.NDArray[np.float32]:
    """A flat fp32 view or copy."""
    return as_array(tensor.float())
