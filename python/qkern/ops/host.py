"""The CPU side of the operators: the memory of torch tensors, lent to the codec."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

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
    name = _NAMES.get(dtype)
    if name is None:
        found = str(dtype).removeprefix("torch.")
        msg = f"dtype {found} is not supported: allowed are {', '.join(DTYPES)}; convert first"
        raise DTypeError(msg)
    return name


_NAMES = {getattr(torch, name): name for name in DTYPES}


def as_array(tensor: Tensor) -> npt.NDArray[Any]:
    """A flat view of a CPU tensor to read; fp16 and bf16 as uint16 bit patterns.

    Through DLPack: ``Tensor.numpy()`` would pin the storage's size, which FSDP2 changes.
    """
    flat = tensor.detach().reshape(-1)
    if flat.dtype in (torch.float16, torch.bfloat16):
        bits: npt.NDArray[Any] = np.from_dlpack(flat.view(torch.int16))
        return bits.view(np.uint16)
    array: npt.NDArray[Any] = np.from_dlpack(flat)
    return array


# Of elements as the codec takes them.
_STORED = {
    torch.float32: "float32",
    torch.float16: "uint16",
    torch.bfloat16: "uint16",
    torch.uint8: "uint8",
    torch.int8: "int8",
}


def lend(tensor: Tensor) -> codec.Buffer:
    """The memory of a contiguous CPU tensor, for one call; 16-bit floats as uint16."""
    return codec.Buffer(tensor.data_ptr(), tensor.numel(), _STORED[tensor.dtype], tensor)


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
    out = torch.empty(tuple(shape), dtype=dtype, device="cpu")
    if out.nbytes >= HUGE_BYTES:
        codec.advise_huge_pages(as_buffer(out).view(np.uint8))
    return out


def as_parts(parts: Parts) -> codec.Parts:
    """The flat arrays of a quantized tensor on the CPU."""
    return codec.Parts(*(None if part is None else as_array(part) for part in parts))  # type: ignore[arg-type]


def lend_parts(parts: Parts) -> codec.LentParts:
    """The memory of a quantized tensor on the CPU."""
    packed, absmax, nested_absmax, offset = parts
    return codec.LentParts(
        lend(packed.contiguous()),
        lend(absmax.contiguous()),
        None if nested_absmax is None else lend(nested_absmax.contiguous()),
        None if offset is None else lend(offset),
    )


def quantize(values: Tensor, fmt: QuantFormat, nonfinite: str) -> tuple[Tensor, Tensor]:
    """Flat packed codes and fp32 absmax (blocks,) of values of any shape and strides."""
    name, threads = dtype_name(values.dtype), torch.get_num_threads()
    parts = codec.encode(lend(values.contiguous()), name, fmt, nonfinite=nonfinite, threads=threads)
    return torch.from_numpy(parts.packed), torch.from_numpy(parts.absmax)


def search_scales(
    values: Tensor, fmt: QuantFormat, importance: Tensor | None, nonfinite: str
) -> Tensor:
    """Scales (blocks,) of least squared error for values of any shape and strides."""
    name, threads = dtype_name(values.dtype), torch.get_num_threads()
    weights = None if importance is None else lend(importance.contiguous())
    flat = lend(values.contiguous())
    scales = codec.search_scales(flat, name, fmt, weights, nonfinite=nonfinite, threads=threads)
    return torch.from_numpy(scales)


def encode(values: Tensor, scales: Tensor, fmt: QuantFormat) -> Tensor:
    """Flat packed codes of values of any shape and strides against scales (blocks,)."""
    name, threads = dtype_name(values.dtype), torch.get_num_threads()
    flat, scale = lend(values.contiguous()), lend(scales.contiguous())
    return torch.from_numpy(codec.encode_codes(flat, name, fmt, scale, threads=threads))


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor, bool]:
    """8-bit codes, nested_absmax, offset (1,) of fp32 scales (blocks,), and if they are safe."""
    flat, threads = lend(absmax.contiguous()), torch.get_num_threads()
    codes, nested, offset, safe = codec.encode_absmax(flat, threads=threads)
    return torch.from_numpy(codes), torch.from_numpy(nested), torch.from_numpy(offset), safe


def dequantize_into(parts: Parts, fmt: QuantFormat, out: Tensor, *, reused: bool = False) -> None:
    """Write the values into ``out``, (n,) contiguous; ``reused`` as in ``codec.decode``."""
    name, threads = dtype_name(out.dtype), torch.get_num_threads()
    codec.decode(lend_parts(parts), fmt, lend(out), name, reused=reused, threads=threads)


def linear(
    x: Tensor,
    parts: Parts,
    fmt: QuantFormat,
    out_features: int,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    compute: str,
    out: Tensor | None = None,
) -> Tensor:
    """``x W^T + bias + scaling (x A^T) B^T``: (..., in_features) to (..., out_features).

    It is written into ``out``, contiguous, if that is given.
    """
    *batch, in_features = x.shape
    if out is None:
        out = torch.empty((*batch, out_features), dtype=x.dtype, device="cpu")
    codec.linear(
        lend(x.contiguous()),
        dtype_name(x.dtype),
        _weight(parts, fmt, (out_features, in_features)),
        lend(out),
        bias=None if bias is None else _floats(bias),
        adapter=_adapter(lora_A, lora_B, scaling),
        compute=compute,
        threads=torch.get_num_threads(),
    )
    return out


def linear_backward(
    grad: Tensor,
    parts: Parts,
    fmt: QuantFormat,
    in_features: int,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    out: Tensor | None = None,
) -> Tensor:
    """``dY W + scaling (dY B) A``: (..., out_features) to (..., in_features).

    It is written into ``out``, contiguous, if that is given.
    """
    *batch, out_features = grad.shape
    if out is None:
        out = torch.empty((*batch, in_features), dtype=grad.dtype, device="cpu")
    codec.linear_backward(
        lend(grad.contiguous()),
        dtype_name(grad.dtype),
        _weight(parts, fmt, (out_features, in_features)),
        lend(out),
        adapter=_adapter(lora_A, lora_B, scaling),
        threads=torch.get_num_threads(),
    )
    return out


def lora_gradients(
    x: Tensor, grad: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Those of A (r, in_features) and B (out_features, r), in the adapter's dtypes."""
    lora = _factors(lora_A, lora_B, scaling)
    dA, dB = (torch.empty(t.shape, dtype=torch.float32, device="cpu") for t in (lora_A, lora_B))
    codec.lora_gradients(
        lend(x.contiguous()),
        lend(grad.to(x.dtype).contiguous()),
        dtype_name(x.dtype),
        lora,
        lend(dA),
        lend(dB),
        threads=torch.get_num_threads(),
    )
    return dA.to(lora_A.dtype), dB.to(lora_B.dtype)


def _adapter(lora_A: Tensor | None, lora_B: Tensor | None, scaling: float) -> codec.Adapter | None:
    """A low-rank adapter, or None."""
    if lora_A is None or lora_B is None:
        return None
    return _factors(lora_A, lora_B, scaling)


def _factors(lora_A: Tensor, lora_B: Tensor, scaling: float) -> codec.Adapter:
    """The memory of an adapter in its dtype; in fp32 if it has two, or one without a codec."""
    if lora_A.dtype != lora_B.dtype or lora_A.dtype not in _NAMES:
        lora_A, lora_B = lora_A.float(), lora_B.float()
    A, B = lend(lora_A.contiguous()), lend(lora_B.contiguous())
    return codec.Adapter(A, B, dtype_name(lora_A.dtype), lora_A.shape[0], scaling)


def _weight(parts: Parts, fmt: QuantFormat, shape: tuple[int, int]) -> codec.Weight:
    """The memory of a weight (out_features, in_features)."""
    return codec.weight(*lend_parts(parts), fmt, shape)


def _floats(tensor: Tensor) -> codec.Buffer:
    """The memory of a tensor, or of a copy, in fp32."""
    return lend(tensor.float().contiguous())
