"""Codes and scales to values in one pass over the flat tensor.

    w[i] = round(code[i] * absmax[i // blocksize])
    absmax[b] = nested_code[a[b]] * nested_absmax[b // 256] + offset      double-quantized

fp32 products; one rounding to the output dtype. Byte ``j`` of a 4-bit tensor holds value ``2 j`` in
its high nibble and ``2 j + 1`` in its low one; both lie in the same block. Rows of int8 may have
any length; each compiles once.

Bytes are promised, so products and sums must not be fused: every launch sets
``enable_fp_fusion=False``. Format: docs of ``qkern.formats``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkern.formats import QuantFormat
from qkern.kernels import launch
from qkern.kernels.aot import AotSpec, is_quick, lookup_of
from qkern.kernels.decode import (
    decode,
    decode_scales,
    load_absmax,
    load_offset,
    open_table,
)
from qkern.kernels.rounding import round_to

# Bytes of codes of one program, or one block: 2 or 4 KiB of 16-bit output.
BYTES = 1024


@triton.jit
def _dequantize_kernel(
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    offset_ptr,
    tables_ptr,
    out_ptr,
    numel,
    stored,
    BLOCKS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    BITS: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    LOOKUP: tl.constexpr,
    DTYPE: tl.constexpr,
):
    WIDTH: tl.constexpr = BLOCKSIZE * BITS // 8
    table = open_table(tables_ptr, LOOKUP)
    offset = load_offset(offset_ptr, DOUBLE_QUANT)
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)  # (BLOCKS,)
    at = block[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]  # (BLOCKS, WIDTH)
    packed = tl.load(packed_ptr + at, mask=at < stored, other=0)
    inside = block * BLOCKSIZE < numel
    absmax, nested = load_absmax(absmax_ptr, nested_absmax_ptr, block, inside, DOUBLE_QUANT)
    scales = decode_scales(
        absmax[:, None], nested[:, None], tables_ptr, offset, BLOCKSIZE, BITS, DOUBLE_QUANT
    )  # (BLOCKS, 1)
    values = decode(packed, scales, table, BITS, LOOKUP, DTYPE)  # (BLOCKS, BLOCKSIZE)
    to = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    tl.store(out_ptr + to, values, mask=to < numel)


@triton.jit
def _dequantize_rows_kernel(
    packed_ptr,
    absmax_ptr,
    out_ptr,
    numel,
    LENGTH: tl.constexpr,
    DTYPE: tl.constexpr,
    BYTES: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)  # (BYTES,)
    mask = at < numel
    q = tl.load(packed_ptr + at, mask=mask, other=0).to(tl.float32)
    step = tl.load(absmax_ptr + at // LENGTH, mask=mask, other=0.0) * 0.007874015718698502
    tl.store(out_ptr + at, round_to(q * step, DTYPE), mask=mask)


def dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    fmt: QuantFormat,
    numel: int,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """The ``numel`` values, flat, on the device of ``packed``.

    Args:
        packed: uint8 (ceil(numel / 2),) or int8 (numel,), any shape, contiguous.
        absmax: fp32 or uint8 (blocks,), any shape, contiguous.
        nested_absmax: fp32 (groups,) or None.
        offset: fp32 (1,) or None.
        fmt: how the bytes are read.
        numel: values.
        dtype: float32, float16 or bfloat16.
        out: (numel,) in ``dtype``, contiguous, to write into; a new tensor if None.
    """
    device = packed.device
    if out is None:
        out = torch.empty(numel, dtype=dtype, device=device)
    if numel == 0:
        return out
    stored = fmt.packed_size(numel)
    constants = {"DTYPE": launch.TL_DTYPES[dtype], **launch.EXACT}
    with torch.cuda.device_of(packed):
        if fmt.kind.per_row:
            grid = (triton.cdiv(stored, BYTES),)
            _dequantize_rows_kernel[grid](
                packed, absmax, out, numel, LENGTH=fmt.blocksize, BYTES=BYTES, **constants
            )
            return out
        tables = launch.tables_of(fmt.code, device)
        nested = (tables, tables) if nested_absmax is None else (nested_absmax, offset)
        blocks = _blocks_of_program(fmt)
        _dequantize_kernel[(triton.cdiv(fmt.num_blocks(numel), blocks),)](
            packed,
            absmax,
            *nested,
            tables,
            out,
            numel,
            stored,
            BLOCKS=blocks,
            BLOCKSIZE=fmt.blocksize,
            BITS=fmt.bits,
            DOUBLE_QUANT=nested_absmax is not None,
            LOOKUP=launch.lookup(device),
            **constants,
        )
    return out


def _blocks_of_program(fmt: QuantFormat) -> int:
    return max(BYTES * 8 // (fmt.blocksize * fmt.bits), 1)


def aot_specs(arch: str) -> Iterator[AotSpec]:
    """Every kind of code and scale, in bf16."""
    pointers = {
        "nested_absmax_ptr": "*fp32",
        "offset_ptr": "*fp32",
        "tables_ptr": "*fp32",
        "out_ptr": "*bf16",
        "numel": "i64",
        "stored": "i64",
    }
    for quant_type, double_quant in (("nf4", True), ("nf4", False), ("int8", True)):
        fmt = QuantFormat(quant_type, 64, double_quant)
        codes = {"packed_ptr": "*u8" if fmt.bits == 4 else "*i8"}
        codes["absmax_ptr"] = "*u8" if double_quant else "*fp32"
        constants = {
            "BLOCKS": _blocks_of_program(fmt),
            "BLOCKSIZE": 64,
            "BITS": fmt.bits,
            "DOUBLE_QUANT": double_quant,
            "LOOKUP": lookup_of(arch),
            "DTYPE": tl.bfloat16,
        }
        scales = "8-bit" if double_quant else "fp32"
        name = f"dequantize {fmt.bits}-bit, {scales} scales"
        yield AotSpec(
            name,
            _dequantize_kernel,
            codes | pointers,
            constants,
            divisible=("numel", "stored"),
            quick=is_quick(arch, "dequantize"),
        )
    signature = {"packed_ptr": "*i8", "absmax_ptr": "*fp32", "out_ptr": "*bf16", "numel": "i64"}
    constants = {"LENGTH": 172, "DTYPE": tl.bfloat16, "BYTES": BYTES}
    yield AotSpec(
        "dequantize int8 rows",
        _dequantize_rows_kernel,
        signature,
        constants,
        quick=is_quick(arch, "dequantize"),
    )
