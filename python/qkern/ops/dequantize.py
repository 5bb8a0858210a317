"""``qkern::dequantize``: codes and scales to values.

w[i] = round_to_dtype(code[i] * absmax[i // blocksize])     product in fp32, rounded once
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from qkern import kernels, reference
from qkern.formats import NESTED_BLOCKSIZE, QuantFormat
from qkern.ops import host
from qkern.ops.dequantize_torch import dequantize_torch
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


def decoded_into(parts: reference.Parts, fmt: QuantFormat, out: Tensor) -> bool:
    """Write the values into the memory of ``out``, if nothing watches and it is theirs in order.

    Args:
        parts: of the quantized tensor.
        fmt: how the bytes are read.
        out: of the shape and on the device of the dense tensor, in its dtype.

    Returns:
        Whether it was done; if not, ``out`` is as it was.

    Raises:
        DTypeError: unless ``out`` is float32, float16 or bfloat16.
    """
    is_plain = is_unobserved(parts.packed, parts.absmax, out) and not out.is_neg()
    if not is_plain or not out.is_contiguous():
        return False
    host.dtype_name(out.dtype)
    if not out.is_inference():  # those have no version
        increment_version(out)
    flat = out.detach().view(-1)
    if _is_hosts(out.device):
        host.dequantize_into(parts, fmt, flat, reused=True)
    else:
        _on_device(parts, fmt, out.numel(), out.dtype, flat)
    return True


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


def parts_of_expert(
    parts: reference.Parts, fmt: QuantFormat, experts: int, expert: int
) -> tuple[reference.Parts, QuantFormat]:
    """Parts of one of ``experts`` stacked weights of whole blocks, and how their bytes are read.

    Views, where the expert's 8-bit scales are whole groups; else its scales are decoded to fp32.
    """
    packed = parts.packed.reshape(experts, -1)[expert]
    absmax = parts.absmax.reshape(experts, -1)[expert]
    blocks = absmax.numel()
    alone = reference.Parts(packed, absmax, parts.nested_absmax, parts.offset)
    if parts.nested_absmax is None:
        return alone, fmt
    group, lead = divmod(expert * blocks, NESTED_BLOCKSIZE)
    if lead:
        scaled = parts_of_shard(alone, fmt, expert * blocks * fmt.blocksize)
        return scaled, fmt.replace(double_quant=False)
    nested = parts.nested_absmax[group : group + -(-blocks // NESTED_BLOCKSIZE)]
    return alone._replace(nested_absmax=nested), fmt


def dense(
    parts: reference.Parts, fmt: QuantFormat, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The values by the best way that their device has: host code, a kernel, torch."""
    if _is_hosts(parts.packed.device):
        out = host.empty(shape, dtype)
        host.dequantize_into(parts, fmt, out)
        return out
    return _on_device(parts, fmt, torch.Size(shape).numel(), dtype).reshape(tuple(shape))


def _is_hosts(device: torch.device) -> bool:
    """Whether the codec decodes what lies there."""
    return device.type == "cpu"


def _on_device(
    parts: reference.Parts,
    fmt: QuantFormat,
    numel: int,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """The values, flat, by a kernel or by torch; in ``out`` (numel,) if it is given."""
    if kernels.is_supported(parts.packed.device):
        from qkern.kernels.dequantize import dequantize as launch

        return launch(*parts, fmt, numel, dtype, out)
    return dequantize_torch(parts, fmt, numel, dtype, out)


def why_no_kernel(device: torch.device) -> str:
    """Why ``dense`` takes torch on a device that is no CPU; empty where it does not."""
    return kernels.why_not(device)


def has_kernels(device: torch.device) -> bool:
    """Whether kernels run on a device."""
    return kernels.is_supported(device)
