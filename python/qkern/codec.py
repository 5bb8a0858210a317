"""Host quantize and dequantize on NumPy arrays, over the native extension. No torch.

``encode``/``decode`` work on flat buffers and are what the torch operators call too;
``quantize``/``dequantize`` are the front door for arrays of any shape and strides. How codes are
chosen is the ``method``; how they are read is the format.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from qkern import _native  # noqa: TID251 - the one importer
from qkern.errors import DTypeError, FormatError, ShapeError
from qkern.formats import (
    DTYPES,
    KINDS,
    NESTED_BLOCKSIZE,
    QuantFormat,
    dynamic_code,
    resolve_format,
)

METHODS: Final = ("absmax", "search")
NONFINITE: Final = ("error", "keep")

Array = npt.NDArray[Any]
U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]


class Parts(NamedTuple):
    """Flat arrays of a quantized value; the last two are None with fp32 scales."""

    packed: Array  # uint8 (ceil(n / 2),) or int8 (n,)
    absmax: Array  # fp32 (blocks,), or uint8 codes (blocks,)
    nested_absmax: F32 | None  # fp32 (groups,)
    offset: F32 | None  # fp32 (1,)


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
    check_method(method, fmt, importance is not None)
    check_choice("nonfinite", nonfinite, NONFINITE)
    fmt = fmt.for_shape(np.shape(values))
    bits, name = _as_bits(np.asarray(values), dtype)
    flat = np.ascontiguousarray(bits).reshape(-1)
    if method == "absmax":
        parts = encode(flat, name, fmt, nonfinite=nonfinite)
    else:
        weights = as_importance(importance, np.shape(values))
        parts = encode_searched(flat, name, fmt, weights, nonfinite=nonfinite)
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
    decode(parts, q.format, bits.reshape(-1), name)
    return out if out is not None else _from_bits(bits, name)


def encode(values: Array, dtype: str, fmt: QuantFormat, *, nonfinite: str = "error") -> Parts:
    """Codes and scales of a flat C-contiguous buffer.

    Args:
        values: (n,) float32, or uint16 bit patterns of ``dtype``.
        dtype: "float32", "float16" or "bfloat16".
        fmt: the format to write, after ``for_shape``; unsafe double quantization comes back as
            fp32 scales.
        nonfinite: "error" or "keep".
    """
    n = values.size
    absmax = np.empty(fmt.num_blocks(n), np.float32)
    packed: Array = np.empty(fmt.packed_size(n), fmt.packed_dtype)
    outputs = (fmt.blocksize, packed, absmax)
    if fmt.code is not None:
        code = code_array(fmt.quant_type)
        _native.quantize_4bit(values, dtype, code, *outputs, nonfinite=nonfinite)
    elif fmt.kind.per_row:
        _native.quantize_int8_rows(values, dtype, *outputs, nonfinite=nonfinite)
    else:
        _native.quantize_int8(values, dtype, *outputs, nonfinite=nonfinite)
    if not fmt.double_quant:
        return Parts(packed, absmax, None, None)
    codes, nested, offset, safe = encode_absmax(absmax)
    return Parts(packed, codes, nested, offset) if safe else Parts(packed, absmax, None, None)


def encode_searched(
    values: Array,
    dtype: str,
    fmt: QuantFormat,
    importance: F32 | None,
    *,
    nonfinite: str = "error",
) -> Parts:
    """As ``encode``, with scales of least squared error.

    Codes are chosen against the scales as they will be decoded, after double quantization too.

    Args:
        values: (n,), see ``encode``.
        dtype: of the values.
        fmt: a 4-bit format.
        importance: (columns,) fp32 weights of the squared errors, or None.
        nonfinite: "error" or "keep".
    """
    scales = search_scales(values, dtype, fmt, importance, nonfinite=nonfinite)
    if fmt.double_quant:
        codes, nested, offset, safe = encode_absmax(scales)
        if safe:
            parts = Parts(np.empty(0, np.uint8), codes, nested, offset)
            packed = encode_codes(values, dtype, fmt, decode_absmax(parts))
            return parts._replace(packed=packed)
    return Parts(encode_codes(values, dtype, fmt, scales), scales, None, None)


def search_scales(
    values: Array,
    dtype: str,
    fmt: QuantFormat,
    importance: F32 | None = None,
    *,
    nonfinite: str = "error",
) -> F32:
    """Scales (blocks,) of least squared error, of either sign, for the values (n,)."""
    scales = np.empty(fmt.num_blocks(values.size), np.float32)
    code = code_array(fmt.quant_type)
    _native.search_scales(
        values, dtype, code, fmt.blocksize, scales, importance=importance, nonfinite=nonfinite
    )
    return scales


def encode_codes(values: Array, dtype: str, fmt: QuantFormat, scales: F32) -> U8:
    """Packed codes of the values (n,) against fp32 scales (blocks,) of either sign."""
    packed = np.empty(fmt.packed_size(values.size), np.uint8)
    code = code_array(fmt.quant_type)
    _native.encode_4bit(values, dtype, code, fmt.blocksize, scales, packed)
    return packed


def encode_absmax(absmax: F32) -> tuple[U8, F32, F32, bool]:
    """8-bit codes (blocks,), nested_absmax (groups,), offset (1,) of scales, and if it is safe."""
    codes = np.empty(absmax.size, np.uint8)
    nested = np.empty(-(-absmax.size // NESTED_BLOCKSIZE), np.float32)
    offset, safe = _native.quantize_absmax(absmax, nested_code_array(), codes, nested)
    return codes, nested, np.array([offset], np.uint32).view(np.float32), safe


def decode(parts: Parts, fmt: QuantFormat, out: Array, dtype: str) -> None:
    """Write the values of ``parts`` into ``out``: (n,) float32, or uint16 bits of ``dtype``."""
    absmax = decode_absmax(parts)
    if fmt.code is not None:
        code = code_array(fmt.quant_type)
        _native.dequantize_4bit(parts.packed, absmax, code, fmt.blocksize, out, dtype)
    else:
        _native.dequantize_int8(parts.packed, absmax, fmt.blocksize, out, dtype)


def decode_range(
    parts: Parts, fmt: QuantFormat, first: int, last: int, out: Array, dtype: str
) -> None:
    """Write the values of flat indices ``first`` to ``last`` (exclusive) into ``out``.

    Args:
        parts: of the whole value, with fp32 scales (see ``decode_absmax``).
        fmt: how the bytes are read.
        first: where a block starts, or inside of the block of ``last``; even if codes have 4 bits.
        last: where to stop, anywhere.
        out: (last - first,) float32, or uint16 bits of ``dtype``.
        dtype: "float32", "float16" or "bfloat16".
    """
    packed = parts.packed[fmt.packed_size(first) : fmt.packed_size(last)]
    absmax = parts.absmax[first // fmt.blocksize : fmt.num_blocks(last)]
    decode(Parts(packed, absmax, None, None), fmt.replace(double_quant=False), out, dtype)


def decode_absmax(parts: Parts) -> F32:
    """The fp32 scales (blocks,), decoded if they are double-quantized."""
    if parts.nested_absmax is None or parts.offset is None:
        return parts.absmax
    absmax = np.empty(parts.absmax.size, np.float32)
    offset = int(parts.offset.view(np.uint32)[0])  # bits: see the extension
    _native.dequantize_absmax(
        parts.absmax, nested_code_array(), parts.nested_absmax, offset, absmax
    )
    return absmax


def check_choice(what: str, got: str, allowed: tuple[str, ...]) -> None:
    """Refuse a setting that is not among ``allowed``."""
    if got not in allowed:
        msg = f"unknown {what} {got!r}: allowed are {', '.join(map(repr, allowed))}"
        raise FormatError(msg)


def check_method(method: str, fmt: QuantFormat, has_importance: bool) -> None:  # noqa: FBT001
    """Refuse a method that does not exist or that the format has not."""
    check_choice("method", method, METHODS)
    if method == "search" and fmt.code is None:
        msg = f'method "search" is for 4-bit formats: {fmt.quant_type} is quantized by "absmax"'
        raise FormatError(msg)
    if has_importance and method != "search":
        msg = f'importance weighs the errors of method "search", got method {method!r}'
        raise FormatError(msg)


def as_importance(importance: Any, shape: tuple[int, ...]) -> F32 | None:
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


@functools.cache
def code_array(quant_type: str) -> F32:
    """The 16 values of a 4-bit format, (16,) fp32."""
    return np.array(KINDS[quant_type].code, np.float32)


@functools.cache
def nested_code_array() -> F32:
    """The 256 values of a double-quantized scale, (256,) fp32."""
    return np.array(dynamic_code(), np.float32)


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
