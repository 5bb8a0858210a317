"""The front door for NumPy arrays of any shape and strides. No torch."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from qkern import codec
from qkern.codec import F32, NONFINITE, Array, Parts
from qkern.errors import DTypeError, ShapeError
from qkern.formats import DTYPES, QuantFormat, resolve_format


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedArray:
    """A quantized NumPy array: the same fields as ``QuantizedTensor``, as plain arrays.

    Args:
        packed: uint8 (ceil(n / 2),) for 4 bits, int8 (n,) for int8.
        absmax: fp32 (blocks,), or uint8 codes (blocks,) when double-quantized.
        nested_absmax: fp32 (groups,) when double-quantized, else None.
        offset: fp32 (1,) when double-quantized, else None.
        format: how the bytes are read.
        shape: of the array that was quantized.
        dtype: of the array that was quantized: "float32", "float16" or "bfloat16".
    """

    packed: Array
    absmax: Array
    nested_absmax: F32 | None
    offset: F32 | None
    format: QuantFormat
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        parts = (self.packed, self.absmax, self.nested_absmax, self.offset)
        return sum(part.nbytes for part in parts if part is not None)

    def __repr__(self) -> str:
        fmt = self.format
        return (
            f"QuantizedArray(shape={self.shape}, dtype={self.dtype}, {fmt.quant_type}, "
            f"blocksize={fmt.blocksize}, double_quant={fmt.double_quant})"
        )


def quantize(
    values: Array,
    quant_type: str | QuantFormat = "nf4",
    *,
    blocksize: int = 64,
    double_quant: bool = True,
    method: str = "absmax",
    importance: Array | None = None,
    dtype: str | None = None,
    nonfinite: str = "error",
) -> QuantizedArray:
    """Quantize an array of any shape and strides.

    A tensor whose scales 8 bits cannot hold (a decoded scale with another sign, or off by more
    than 1/8) keeps fp32 scales: look at ``.format.double_quant``.

    Args:
        values: float32, float16 or (``ml_dtypes``) bfloat16; or uint16 bit patterns of bfloat16
            with ``dtype="bfloat16"``.
        quant_type: "nf4", "fp4", "int8", "int8_row", or a ``QuantFormat``.
        blocksize: values that share a scale; unused by int8_row, where a row does.
        double_quant: store the scales in 8 bits; unused by int8_row.
        method: how codes are chosen. "absmax": a block's scale is its largest magnitude, as in
            bitsandbytes. "search", 4-bit formats only: the scale, of either sign, with the least
            squared error; never worse than absmax on a block with fp32 scales, about 10 % less RMS
            error, the same bytes to read.
        importance: weights of the squared errors for "search", one for each column (of the last
            dimension), finite and not negative: such as the mean square of each input feature.
        dtype: what uint16 input holds.
        nonfinite: "error", or "keep" to confine NaN and infinity to their own block.

    Raises:
        DTypeError: for any other dtype.
        FormatError: for an unknown format, method or setting, or one that the format has not.
        ShapeError: for an ``importance`` of another length than the last dimension.
        NonFiniteError: for NaN or infinity, unless kept.

    Example:
        >>> import numpy as np
        >>> q = quantize(np.ones((4, 64), np.float32), double_quant=False)
        >>> q.packed.shape, q.absmax.shape
        ((128,), (4,))
    """
    fmt = resolve_format(quant_type, blocksize=blocksize, double_quant=double_quant)
    codec.check_method(method, fmt, importance is not None)
    codec.check_choice("nonfinite", nonfinite, NONFINITE)
    fmt = fmt.for_shape(np.shape(values))
    bits, name = _as_bits(np.asarray(values), dtype)
    flat = np.ascontiguousarray(bits).reshape(-1)
    if method == "absmax":
        parts = codec.encode(flat, name, fmt, nonfinite=nonfinite)
    else:
        weights = _as_importance(importance, np.shape(values))
        parts = codec.encode_searched(flat, name, fmt, weights, nonfinite=nonfinite)
    if fmt.double_quant and parts.offset is None:
        fmt = fmt.replace(double_quant=False)
    return QuantizedArray(*parts, format=fmt, shape=tuple(np.shape(values)), dtype=name)


def dequantize(q: QuantizedArray, dtype: Any = None, *, out: Array | None = None) -> Array:
    """The dense array: ``code * absmax`` in fp32, rounded once.

    Args:
        q: what ``quantize`` returned.
        dtype: "float32", "float16" or "bfloat16" (default: the dtype that was quantized). Without
            ``ml_dtypes`` installed, bfloat16 comes back as uint16 bit patterns.
        out: a C-contiguous array of q's shape to write into.

    Raises:
        DTypeError: for any other dtype.
        ShapeError: for an ``out`` of another shape or layout.
    """
    if out is not None:
        bits, name = _as_bits(out, _dtype_name(dtype) if dtype is not None else None)
        if out.shape != q.shape or not out.flags.c_contiguous:
            msg = f"out has shape {out.shape} and strides {out.strides}: a C-contiguous array of "
            raise ShapeError(msg + f"shape {q.shape} is needed")
    else:
        name = _dtype_name(dtype if dtype is not None else q.dtype)
        bits = np.empty(q.shape, np.float32 if name == "float32" else np.uint16)
    parts = Parts(q.packed, q.absmax, q.nested_absmax, q.offset)
    codec.decode(parts, q.format, bits.reshape(-1), name, reused=out is not None)
    return out if out is not None else _from_bits(bits, name)


def _as_importance(importance: Any, shape: tuple[int, ...]) -> F32 | None:
    """The weights of columns, (columns,) fp32, for values of ``shape``."""
    if importance is None:
        return None
    weights = np.ascontiguousarray(importance, np.float32)
    columns = shape[-1] if shape else 1
    if weights.shape != (columns,):
        msg = f"importance has shape {weights.shape}, values of {shape} need ({columns},)"
        raise ShapeError(msg)
    # Without columns there is nothing to weigh, and nothing that the extension could count.
    return weights if columns else None


def _as_bits(values: Array, dtype: str | None) -> tuple[Array, str]:
    """A view that the native extension takes (float32, or uint16 bits), and the dtype's name."""
    name = values.dtype.name
    if name == "uint16" and dtype in ("bfloat16", "float16"):
        return values, dtype
    if name not in DTYPES or (dtype is not None and dtype != name):
        wanted = f", and dtype={dtype!r} was given" if dtype is not None else ""
        msg = (
            f"an array of {name} cannot be used{wanted}: allowed are {', '.join(DTYPES)}, or "
            'uint16 bit patterns with dtype="bfloat16"'
        )
        raise DTypeError(msg)
    return (values if name == "float32" else values.view(np.uint16)), name


def _from_bits(bits: Array, name: str) -> Array:
    if name == "float16":
        return bits.view(np.float16)
    if name == "bfloat16":
        try:
            import ml_dtypes
        except ImportError:
            return bits
        return bits.view(ml_dtypes.bfloat16)
    return bits


def _dtype_name(dtype: Any) -> str:
    try:
        name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    except TypeError:  # no dtype of NumPy's
        name = repr(dtype)
    if name not in DTYPES:
        msg = f"cannot dequantize to {name}: allowed are {', '.join(DTYPES)}"
        raise DTypeError(msg)
    return str(name)
