"""bitsandbytes' operators on a CPU, by the codec: what torch's dispatcher calls once enabled.

Arguments, shapes and dtypes are those of bitsandbytes' own schemas (``bitsandbytes/_ops.py``),
whose names they keep. A is what is quantized or multiplied, B the packed weight.

    quantize_4bit           A of any shape  ->  packed (ceil(n / 2) bytes, 1), absmax (blocks,) fp32
    dequantize_4bit         packed, absmax  ->  `shape`, `dtype`
    gemm_4bit, gemv_4bit    A (..., K), B of (N, K)  ->  (..., N)
    int8_vectorwise_quant   A (..., K)  ->  int8 (..., K), absmax of each row fp32, outlier columns
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from qkern.errors import DTypeError, FormatError, ShapeError
from qkern.formats import NESTED_BLOCKSIZE, QuantFormat, dynamic_code
from qkern.ops import host
from qkern.reference import Parts

# Rows that bitsandbytes interleaves when it repacks a weight for its own CPU kernel.
_INTERLEAVED = 32


def quantize_4bit(
    A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The bytes that bitsandbytes writes; NaN and infinity stay in their blocks, as there."""
    packed, absmax = host.quantize(A, _format(quant_type, blocksize), "keep")
    if not packed.numel():  # which NumPy gives strides that no view takes
        return packed.new_empty((0, 1), dtype=quant_storage), absmax
    return packed.view(quant_storage).unsqueeze(1), absmax


def dequantize_4bit(
    A: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """``round_to_dtype(code * absmax)``, exact for every shape."""
    fmt = _format(quant_type, blocksize)
    parts = _parts(A, absmax, fmt, math.prod(shape))
    out = host.empty(shape, dtype)
    host.dequantize_into(parts, fmt, out)
    return out


def dequantize_4bit_out(
    A: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    out: Tensor,
) -> None:
    """The same, into ``out``."""
    _check_out(out, shape, dtype)
    if not out.is_contiguous():
        out.copy_(dequantize_4bit(A, absmax, blocksize, quant_type, shape, dtype))
        return
    fmt = _format(quant_type, blocksize)
    parts = _parts(A, absmax, fmt, math.prod(shape))
    host.dequantize_into(parts, fmt, out, reused=True)


def dequantize_blockwise_out(
    A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype, out: Tensor
) -> None:
    """Bitsandbytes' own 8-bit codes, into ``out``: on a CPU it has no such kernel."""
    _check_out(out, A.shape, dtype)
    own = torch.ops.bitsandbytes.dequantize_blockwise.default
    out.copy_(own(A, absmax, code, blocksize, dtype))


def gemm_4bit(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    """``A B^T + bias`` on the packed bytes, scales decoded with the codes they belong to."""
    fmt = _format(quant_type, blocksize)
    if absmax_8bit is None or absmax_code is None or absmax_offset is None:
        return _linear(A, B, shapeB, absmax, None, None, fmt, bias)
    offset = absmax_offset.float().reshape(1)
    if torch.equal(absmax_code, _dynamic_code()):
        fmt = _format(quant_type, blocksize, nested=True)
        return _linear(A, B, shapeB, absmax_8bit, absmax, offset, fmt, bias)
    groups = absmax.float().repeat_interleave(NESTED_BLOCKSIZE)[: absmax_8bit.numel()]
    scales = absmax_code.float()[absmax_8bit.long()] * groups + offset
    return _linear(A, B, shapeB, scales, None, None, fmt, bias)


def gemv_4bit(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    code: Tensor,
    blocksize: int,
) -> Tensor:
    """``A B^T`` for any number of rows of A; ``code`` tells FP4 from NF4, as in bitsandbytes.

    A weight that bitsandbytes has repacked for its own kernel, by its absmax of 2 dimensions, is
    brought back to the common layout first, each time.
    """
    if absmax.ndim == 2:
        B, absmax = _from_interleaved(B, absmax, shapeB)
    fmt = _format("fp4" if code[1] > 0 else "nf4", blocksize)
    return _linear(A, B, shapeB, absmax, None, None, fmt, None)


def gemv_4bit_out(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    code: Tensor,
    blocksize: int,
    out: Tensor,
) -> None:
    """The same, into ``out``."""
    _check_out(out, (*A.shape[:-1], shapeB[0]), A.dtype)
    out.copy_(gemv_4bit(A, B, shapeB, absmax, code, blocksize))


def int8_vectorwise_quant(
    A: Tensor, threshold: float = 0.0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, absmax of each row, and the columns of outliers: None without a threshold.

    Values of at least ``threshold`` count for no absmax and are coded as 0, as is all of their
    column if there is more than one row.
    """
    columns = None
    if threshold > 0.0:
        outliers = A.abs() >= threshold
        columns = outliers.flatten(0, -2).any(dim=0).argwhere().reshape(-1)
        if columns.numel():
            A = A.masked_fill(outliers, 0.0)
    fmt = QuantFormat("int8_row", 0, double_quant=False).for_shape(A.shape)
    packed, absmax = host.quantize(A, fmt, "keep")
    codes = packed.view(A.shape)
    if columns is not None and columns.numel() and absmax.numel() > 1:
        codes[..., columns] = 0
    return codes, absmax, columns


KERNELS: Final[dict[str, Callable[..., Any]]] = {
    "quantize_4bit": quantize_4bit,
    "dequantize_4bit": dequantize_4bit,
    "dequantize_4bit.out": dequantize_4bit_out,
    "dequantize_blockwise.out": dequantize_blockwise_out,
    "gemm_4bit": gemm_4bit,
    "gemv_4bit": gemv_4bit,
    "gemv_4bit.out": gemv_4bit_out,
    "int8_vectorwise_quant": int8_vectorwise_quant,
}


@functools.cache
def _format(quant_type: str, blocksize: int, nested: bool = False) -> QuantFormat:  # noqa: FBT001
    """A format of bitsandbytes' operators."""
    if quant_type not in ("nf4", "fp4"):
        msg = f"quant_type must be 'nf4' or 'fp4', got {quant_type!r}"
        raise FormatError(msg)
    return QuantFormat(quant_type, blocksize, double_quant=nested)


def _parts(
    packed: Tensor,
    absmax: Tensor,
    fmt: QuantFormat,
    numel: int,
    nested_absmax: Tensor | None = None,
    offset: Tensor | None = None,
) -> Parts:
    """Flat parts of ``numel`` values; bytes that storage or padding adds at the end are left out.

    Raises:
        ShapeError: for fewer bytes or scales than the values need.
    """
    codes = packed.detach().contiguous().view(-1).view(torch.uint8)
    scales = absmax.detach().reshape(-1)
    if not fmt.double_quant:
        scales = scales.float()
    for name, part, needed in (
        ("packed codes", codes, fmt.packed_size(numel)),
        ("absmax", scales, fmt.num_blocks(numel)),
    ):
        if part.numel() < needed:
            msg = (
                f"{numel} values in blocks of {fmt.blocksize} need {needed} {name}, got "
                f"{part.numel()}: these parts belong to another weight"
            )
            raise ShapeError(msg)
    codes, scales = codes[: fmt.packed_size(numel)], scales[: fmt.num_blocks(numel)]
    return Parts(codes, scales, nested_absmax, offset)


def _linear(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    fmt: QuantFormat,
    bias: Tensor | None,
) -> Tensor:
    out_features, in_features = shapeB
    if A.shape[-1] != in_features:
        msg = (
            f"a weight of {out_features} x {in_features} multiplies inputs (..., {in_features}), "
            f"got {tuple(A.shape)}"
        )
        raise ShapeError(msg)
    parts = _parts(B, absmax, fmt, out_features * in_features, nested_absmax, offset)
    return host.linear(A, parts, fmt, out_features, bias, None, None, 1.0, "exact")


def _from_interleaved(B: Tensor, absmax: Tensor, shapeB: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Common layout of a weight that ``Linear4bit`` repacked: B (N, K/2), absmax (K/blocksize, N).

    Within 32 rows and two columns 64 codes stand in one order; byte j of 32 holds codes j (low)
    and 32 + j (high).
    """
    rows, columns = shapeB
    groups = B.reshape(rows // _INTERLEAVED, columns // 2, _INTERLEAVED)
    codes = torch.cat([groups & 15, groups >> 4], dim=-1)
    packed = (codes[..., 0::2] << 4 | codes[..., 1::2]).transpose(1, 2)
    return packed.reshape(-1), absmax.t().reshape(-1)


def _check_out(out: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    if tuple(out.shape) != tuple(shape):
        msg = f"out must have the shape {tuple(shape)}, got {tuple(out.shape)}"
        raise ShapeError(msg)
    if out.dtype != dtype:
        msg = f"out must be {dtype}, got {out.dtype}"
        raise DTypeError(msg)


@functools.cache
def _dynamic_code() -> Tensor:
    return torch.tensor(dynamic_code(), dtype=torch.float32)
