"""Values to bytes.

``qkern::quantize``: values to codes and fp32 scales by the block maximum.
``qkern::search_scales``: values to fp32 scales of least squared error.
``qkern::encode``: values to codes against such scales.
``qkern::quantize_absmax``: those scales to 8 bits, with the answer whether that is safe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from qkern import kernels, reference
from qkern.errors import FormatError, NonFiniteError, ShapeError
from qkern.formats import NESTED_BLOCKSIZE, QuantFormat
from qkern.ops import host
from qkern.ops.direct import is_unobserved


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
    fmt = QuantFormat(quant_type, blocksize, double_quant=False)
    if kernels.is_supported(values.device):
        from qkern.kernels.quantize import quantize as launch

        packed, absmax = launch(values.detach().contiguous(), fmt)
        # What is not finite shows in its scale; nothing else waits for the device.
        if nonfinite == "error" and not bool(absmax.isfinite().all()):
            check_finite(values)
        return packed, absmax
    if nonfinite == "error":
        check_finite(values)
    parts = reference.quantize(values, fmt)
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
    "qkern::search_scales",
    mutates_args=(),
    schema="(Tensor values, str quant_type, int blocksize, Tensor? importance, str nonfinite)"
    " -> Tensor",
)
def search_scales(
    values: Tensor, quant_type: str, blocksize: int, importance: Tensor | None, nonfinite: str
) -> Tensor:
    """Scales (blocks,) of least squared error, of either sign, for 4-bit codes of ``values``.

    ``importance``, (columns,) of the last dimension, weighs the squared errors.

    Raises:
        DTypeError: unless values are float32, float16 or bfloat16.
        NonFiniteError: for NaN or infinity, unless ``nonfinite`` is ``"keep"``.
    """
    host.dtype_name(values.dtype)
    if nonfinite == "error":
        check_finite(values)
    fmt = QuantFormat(quant_type, blocksize, double_quant=False)
    return reference.search_scales(values, fmt, importance)


@search_scales.register_fake
def _(
    values: Tensor, quant_type: str, blocksize: int, importance: Tensor | None, nonfinite: str
) -> Tensor:
    host.dtype_name(values.dtype)
    fmt = QuantFormat(quant_type, blocksize, double_quant=False)
    return values.new_empty(fmt.num_blocks(values.numel()), dtype=torch.float32)


@search_scales.register_kernel("cpu")
def _(
    values: Tensor, quant_type: str, blocksize: int, importance: Tensor | None, nonfinite: str
) -> Tensor:
    fmt = QuantFormat(quant_type, blocksize, double_quant=False)
    return host.search_scales(values, fmt, importance, nonfinite)


@torch.library.custom_op(
    "qkern::encode",
    mutates_args=(),
    schema="(Tensor values, Tensor scales, str quant_type, int blocksize) -> Tensor",
)
def encode(values: Tensor, scales: Tensor, quant_type: str, blocksize: int) -> Tensor:
    """Flat packed 4-bit codes of ``values`` against fp32 scales (blocks,) of either sign."""
    if kernels.is_supported(values.device):
        from qkern.kernels.quantize import encode as launch

        fmt = QuantFormat(quant_type, blocksize, double_quant=False)
        return launch(values.detach().contiguous(), scales.contiguous(), fmt)
    return reference.encode(values, scales, QuantFormat(quant_type, blocksize, double_quant=False))


@encode.register_fake
def _(values: Tensor, scales: Tensor, quant_type: str, blocksize: int) -> Tensor:
    fmt = QuantFormat(quant_type, blocksize, double_quant=False)
    return values.new_empty(fmt.packed_size(values.numel()), dtype=torch.uint8)


@encode.register_kernel("cpu")
def _(values: Tensor, scales: Tensor, quant_type: str, blocksize: int) -> Tensor:
    return host.encode(values, scales, QuantFormat(quant_type, blocksize, double_quant=False))


@torch.library.custom_op(
    "qkern::quantize_absmax",
    mutates_args=(),
    schema="(Tensor absmax) -> (Tensor, Tensor, Tensor, Tensor)",
)
def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """8-bit codes (blocks,), nested_absmax (groups,), offset (1,) and safe (1,) bool of scales.

    Not safe: a decoded scale changed its sign, or is off by more than 1/8.
    """
    if kernels.is_supported(absmax.device):
        from qkern.kernels.quantize_absmax import quantize_absmax as launch

        return launch(absmax.contiguous())
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
    codes, nested, offset, safe = host.quantize_absmax(absmax)
    return codes, nested, offset, torch.tensor([safe])


def to_parts(
    values: Tensor, fmt: QuantFormat, method: str, importance: Tensor | None, nonfinite: str
) -> tuple[reference.Parts, QuantFormat]:
    """Quantize by a method: the parts, and the format, with fp32 scales if 8 bits are not safe.

    Codes are chosen against the scales as they will be decoded.
    """
    fmt.check_encodes()
    kind = (fmt.quant_type, fmt.blocksize)
    if method == "search":
        scales = search_scales(values, *kind, _as_importance(importance, values), nonfinite)
        (absmax, nested_absmax, offset), fmt = _store_scales(scales, fmt)
        if nested_absmax is not None and offset is not None:
            scales = reference.dequantize_absmax(absmax, nested_absmax, offset)
        packed = encode(values, scales, *kind)
    else:
        if values.is_cpu and is_unobserved(values):
            packed, scales = host.quantize(
                values, QuantFormat(*kind, double_quant=False), nonfinite
            )
        else:
            packed, scales = quantize(values, *kind, nonfinite)
        (absmax, nested_absmax, offset), fmt = _store_scales(scales, fmt)
    return reference.Parts(packed, absmax, nested_absmax, offset), fmt


def stack_to_parts(
    experts: Callable[[], Iterable[Tensor]], fmt: QuantFormat, method: str
) -> tuple[reference.Parts, QuantFormat]:
    """``to_parts`` of values that come expert after expert, each of whole blocks: the same bytes.

    Args:
        experts: makes their values, in order; "search" asks twice.
        fmt: how the bytes are to be read.
        method: "absmax" or "search".

    Raises:
        NonFiniteError: for NaN or infinity, naming the expert.
    """
    fmt.check_encodes()
    kind = (fmt.quant_type, fmt.blocksize)
    alone, packed, scales = fmt.replace(double_quant=False), [], []
    for expert, values in enumerate(experts()):
        try:
            if method == "search":
                scales.append(search_scales(values, *kind, None, "error"))
                continue
            parts, _ = to_parts(values, alone, method, None, "error")
        except NonFiniteError as error:
            msg = f"expert {expert}: {error}"
            raise NonFiniteError(msg) from error
        packed.append(parts.packed)
        scales.append(parts.absmax)
    (absmax, nested_absmax, offset), fmt = _store_scales(torch.cat(scales), fmt)
    if method == "search":
        decoded = absmax
        if nested_absmax is not None and offset is not None:
            decoded = reference.dequantize_absmax(absmax, nested_absmax, offset)
        each = torch.split(decoded, [piece.numel() for piece in scales])
        packed = [encode(values, own, *kind) for values, own in zip(experts(), each, strict=True)]
    return reference.Parts(torch.cat(packed), absmax, nested_absmax, offset), fmt


def _store_scales(
    scales: Tensor, fmt: QuantFormat
) -> tuple[tuple[Tensor, Tensor | None, Tensor | None], QuantFormat]:
    """absmax, nested_absmax and offset: in 8 bits if the format says so and it is safe."""
    if not fmt.double_quant:
        return (scales, None, None), fmt
    safe: Tensor | bool
    if scales.is_cpu and is_unobserved(scales):
        codes, nested_absmax, offset, safe = host.quantize_absmax(scales)
    else:
        codes, nested_absmax, offset, safe = quantize_absmax(scales)
    if (isinstance(safe, Tensor) and not has_data(safe)) or bool(safe):
        return (codes, nested_absmax, offset), fmt
    return (scales, None, None), fmt.replace(double_quant=False)


def _as_importance(importance: Tensor | None, values: Tensor) -> Tensor | None:
    columns = values.shape[-1] if values.dim() else 1
    if importance is None:
        return None
    if importance.shape != (columns,):
        msg = (
            f"importance has shape {tuple(importance.shape)}, values of {tuple(values.shape)} "
            f"need ({columns},)"
        )
        raise ShapeError(msg)
    bad = ~(importance.isfinite() & (importance >= 0))
    if has_data(importance) and bool(bad.any()):
        column = int(bad.to(torch.uint8).argmax())
        msg = (
            f"the importance of column {column} is {float(importance[column])}: finite weights of "
            "0 or more are needed"
        )
        raise FormatError(msg)
    return importance.detach().to(values.device, torch.float32) if columns else None


def has_data(tensor: Tensor) -> bool:
    """Whether a tensor has values: not on meta, not one of ``FakeTensorMode``."""
    return not (tensor.is_meta or is_fake(tensor))


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
