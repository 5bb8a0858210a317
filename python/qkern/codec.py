"""Codes and scales of flat host buffers, over the native extension. No torch.

What the torch operators and ``arrays`` call. How codes are chosen is the ``method``; how they are
read is the format.
"""

from __future__ import annotations

import functools
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from qkern import _native  # noqa: TID251 - the one importer
from qkern.errors import FormatError
from qkern.formats import (
    KINDS,
    NESTED_BLOCKSIZE,
    QuantFormat,
    dynamic_code,
)

METHODS: Final = ("absmax", "search")
NONFINITE: Final = ("error", "keep")
COMPUTE: Final = ("exact", "int8")

Array = npt.NDArray[Any]
U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]
Buffer = _native.Buffer  # memory by its address, for callers to whom arrays cost too much


class Parts(NamedTuple):
    """Flat arrays of a quantized value; the last two are None with fp32 scales."""

    packed: Array  # uint8 (ceil(n / 2),) or int8 (n,)
    absmax: Array  # fp32 (blocks,), or uint8 codes (blocks,)
    nested_absmax: F32 | None  # fp32 (groups,)
    offset: F32 | None  # fp32 (1,)


class LentParts(NamedTuple):
    """Parts by their addresses."""

    packed: Buffer
    absmax: Buffer
    nested_absmax: Buffer | None
    offset: Buffer | None


class Weight(NamedTuple):
    """A quantized weight of 2 dimensions as the products take it, in the extension's order."""

    packed: Array | Buffer  # uint8 or int8
    code: F32 | None  # (16,) of a 4-bit format
    absmax: Array | Buffer  # fp32, or uint8 codes
    nested_code: F32 | None  # (256,) of 8-bit scales
    nested_absmax: F32 | Buffer | None
    offset: F32 | Buffer | None
    blocksize: int
    out_features: int
    in_features: int


class Adapter(NamedTuple):
    """A low-rank adapter: ``scaling (x A^T) B^T`` is added to a product."""

    lora_A: Array | Buffer  # (r * in_features,) float32, or uint16 bits of dtype
    lora_B: Array | Buffer  # (out_features * r,)
    dtype: str
    r: int
    scaling: float


def encode(
    values: Array | Buffer,
    dtype: str,
    fmt: QuantFormat,
    *,
    nonfinite: str = "error",
    threads: int = 0,
) -> Parts:
    """Codes and scales of a flat C-contiguous buffer.

    Args:
        values: (n,) float32, or uint16 bit patterns of ``dtype``.
        dtype: "float32", "float16" or "bfloat16".
        fmt: the format to write, after ``for_shape``; unsafe double quantization comes back as
            fp32 scales.
        nonfinite: "error" or "keep".
        threads: how many, 0 for one per core.
    """
    fmt.check_encodes()
    n = values.size
    absmax = np.empty(fmt.num_blocks(n), np.float32)
    packed: Array = np.empty(fmt.packed_size(n), fmt.packed_dtype)
    outputs = (fmt.blocksize, packed, absmax)
    how: Any = {"nonfinite": nonfinite, "threads": threads}
    if fmt.code is not None:
        code = code_array(fmt.quant_type)
        _native.quantize_4bit(values, dtype, code, *outputs, **how)
    elif fmt.kind.per_row:
        _native.quantize_int8_rows(values, dtype, *outputs, **how)
    else:
        _native.quantize_int8(values, dtype, *outputs, **how)
    if not fmt.double_quant:
        return Parts(packed, absmax, None, None)
    codes, nested, offset, safe = encode_absmax(absmax, threads=threads)
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
    values: Array | Buffer,
    dtype: str,
    fmt: QuantFormat,
    importance: F32 | Buffer | None = None,
    *,
    nonfinite: str = "error",
    threads: int = 0,
) -> F32:
    """Scales (blocks,) of least squared error, of either sign, for the values (n,)."""
    fmt.check_encodes()
    scales = np.empty(fmt.num_blocks(values.size), np.float32)
    code = code_array(fmt.quant_type)
    how: Any = {"importance": importance, "nonfinite": nonfinite, "threads": threads}
    _native.search_scales(values, dtype, code, fmt.blocksize, scales, **how)
    return scales


def encode_codes(
    values: Array | Buffer,
    dtype: str,
    fmt: QuantFormat,
    scales: F32 | Buffer,
    *,
    threads: int = 0,
) -> U8:
    """Packed codes of the values (n,) against fp32 scales (blocks,) of either sign."""
    fmt.check_encodes()
    packed = np.empty(fmt.packed_size(values.size), np.uint8)
    code = code_array(fmt.quant_type)
    _native.encode_4bit(values, dtype, code, fmt.blocksize, scales, packed, threads=threads)
    return packed


def encode_absmax(absmax: F32 | Buffer, *, threads: int = 0) -> tuple[U8, F32, F32, bool]:
    """8-bit codes (blocks,), nested_absmax (groups,), offset (1,) of scales, and if it is safe."""
    codes = np.empty(absmax.size, np.uint8)
    nested = np.empty(-(-absmax.size // NESTED_BLOCKSIZE), np.float32)
    offset = np.empty(1, np.float32)
    outputs = (codes, nested, offset)
    safe = _native.quantize_absmax(absmax, nested_code_array(), *outputs, threads=threads)
    return codes, nested, offset, safe


def decode(
    parts: Parts | LentParts,
    fmt: QuantFormat,
    out: Array | Buffer,
    dtype: str,
    *,
    reused: bool = False,
    threads: int = 0,
) -> None:
    """Write the values of ``parts`` into ``out``.

    Args:
        parts: flat codes and scales.
        fmt: how the bytes are read.
        out: (n,) float32, or uint16 bits of ``dtype``.
        dtype: "float32", "float16" or "bfloat16".
        reused: whether the memory of ``out`` was in use before, and is not read at once: a large
            one is then written past the caches, which is twice as fast, but slower on fresh pages.
        threads: how many, 0 for one per core.
    """
    packed, absmax, nested_absmax, offset = parts
    how: dict[str, Any] = {"reused": reused, "threads": threads}
    if nested_absmax is not None:
        nested_code = nested_code_array()
        how |= {"nested_code": nested_code, "nested_absmax": nested_absmax, "offset": offset}
    if fmt.code is not None:
        code = code_array(fmt.quant_type)
        operands = (packed, absmax, code, fmt.blocksize, out, dtype)
        _native.dequantize_4bit(*operands, **how)
    else:
        _native.dequantize_int8(packed, absmax, fmt.blocksize, out, dtype, **how)


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


def weight(
    packed: Array | Buffer,
    absmax: Array | Buffer,
    nested_absmax: F32 | Buffer | None,
    offset: F32 | Buffer | None,
    fmt: QuantFormat,
    shape: tuple[int, int],
) -> Weight:
    """Flat parts of a weight, (out_features, in_features), with the tables of its format."""
    code = None if fmt.code is None else code_array(fmt.quant_type)
    nested_code = None if nested_absmax is None else nested_code_array()
    return Weight(packed, code, absmax, nested_code, nested_absmax, offset, fmt.blocksize, *shape)


def linear(
    x: Array | Buffer,
    dtype: str,
    weight: Weight,
    out: Array | Buffer,
    *,
    bias: F32 | Buffer | None = None,
    adapter: Adapter | None = None,
    compute: str = "exact",
    threads: int = 0,
) -> None:
    """Write ``x W^T + bias``, and the adapter's part, into ``out``.

    Args:
        x: (M * in_features,) float32, or uint16 bits of ``dtype``.
        dtype: "float32", "float16" or "bfloat16", of ``x`` and ``out``.
        weight: W.
        out: (M * out_features,) like ``x``.
        bias: (out_features,) or None.
        adapter: what is added, or None.
        compute: "exact", or "int8" for products of 8-bit integers where the machine has them.
        threads: how many, 0 for one per core.
    """
    low_rank = _low_rank(adapter)
    _native.linear(x, dtype, *weight, out, bias=bias, compute=compute, threads=threads, **low_rank)


def linear_backward(
    grad: Array | Buffer,
    dtype: str,
    weight: Weight,
    out: Array | Buffer,
    *,
    adapter: Adapter | None = None,
    threads: int = 0,
) -> None:
    """Write ``dY W``, and the adapter's part, into ``out``: arguments as ``linear``'s."""
    low_rank = _low_rank(adapter)
    _native.linear_backward(grad, dtype, *weight, out, threads=threads, **low_rank)


def lora_gradients(
    x: Array | Buffer,
    grad: Array | Buffer,
    dtype: str,
    adapter: Adapter,
    dA: F32 | Buffer,
    dB: F32 | Buffer,
    *,
    threads: int = 0,
) -> None:
    """Write the gradients of an adapter: ``dA`` and ``dB``, as many as its values, in fp32."""
    _native.lora_gradients(x, grad, dtype, *adapter, grad_a=dA, grad_b=dB, threads=threads)


def _low_rank(adapter: Adapter | None) -> dict[str, Any]:
    """What it takes for an adapter."""
    if adapter is None:
        return {}
    lora_A, lora_B, dtype, _, scaling = adapter
    return {"lora_a": lora_A, "lora_b": lora_B, "lora_dtype": dtype, "scaling": scaling}


def decode_absmax(parts: Parts) -> F32:
    """The fp32 scales (blocks,), decoded if they are double-quantized."""
    if parts.nested_absmax is None or parts.offset is None:
        return parts.absmax
    absmax = np.empty(parts.absmax.size, np.float32)
    nested = (nested_code_array(), parts.nested_absmax, parts.offset)
    _native.dequantize_absmax(parts.absmax, *nested, absmax)
    return absmax


def advise_huge_pages(memory: U8) -> None:
    """Ask for huge pages under fresh bytes (n,) before the first write: no result depends on it."""
    _native.advise_huge_pages(memory)


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


@functools.cache
def code_array(quant_type: str) -> F32:
    """The 16 values of a 4-bit format, (16,) fp32."""
    return np.array(KINDS[quant_type].code, np.float32)


@functools.cache
def nested_code_array() -> F32:
    """The 256 values of a double-quantized scale, (256,) fp32."""
    return np.array(dynamic_code(), np.float32)
