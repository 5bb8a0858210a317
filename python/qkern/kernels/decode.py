"""Codes and scales to tiles of weights: what every kernel that reads a packed weight shares.

    W[n, k] = round(code[n, k] * absmax[n, k // blocksize])       4 bits, any table of 16
    W[n, k] = round(q[n, k] * (absmax[n, k // blocksize] / 127))  8 bits, blocks or rows
    absmax[b] = nested_code[a[b]] * nested_absmax[b // 256] + offset   double-quantized

W is (N, K), row-major; a block never crosses a row here. Products in fp32, one rounding to the
compute dtype: the value of ``dequantize(q, dtype)``, to the bit, if the launch sets
``enable_fp_fusion=False`` (``launch.EXACT``). A scale may have either sign.

Byte ``j`` of a row holds column ``2 j`` in its high nibble and ``2 j + 1`` in its low one.

How a 4-bit code is looked up, ``LOOKUP``; each gives the same values:

- "table": a load from the table in memory. Every device, and the interpreter.
- "shuffle": lane ``i`` of a warp keeps entry ``i % 16``, and a code fetches it by a warp shuffle,
  which reads the lower 4 bits of its operand by itself: a shift and a shuffle per value. Inline
  PTX, NVIDIA only.

``tables`` is fp32 (272,): the 16 values of 4-bit codes, then the 256 of double-quantized scales.

A tile is read in two parts, ``load_*`` and ``decode``/``decode_scales``, so that a loop can load
the next one before it needs it:

    codes = load_codes(...)                                         (R, BK // 8) or (R, BK)
    absmax, nested = load_scales(...)                               (R, BLOCKS)
    scales = decode_scales(absmax, nested, tables_ptr, offset, ...) (R, 1) or (R, BK)
    w = decode(codes, scales, table, BITS, LOOKUP, DTYPE)           (R, BK)
"""

from __future__ import annotations

import triton
import triton.language as tl

from qkern.formats import NESTED_BLOCKSIZE
from qkern.kernels.rounding import round_to

_GROUP = tl.constexpr(NESTED_BLOCKSIZE)
_NESTED_CODE = tl.constexpr(16)  # where the second table begins


def _shuffle_asm() -> str:
    """4 bytes in $8, the lane's entry in $9: high nibbles to $0..$3, low ones to $4..$7."""
    # Segments of 16 lanes (0x10), the last lane of each as the bound (0x0f).
    fetch = "shfl.sync.idx.b32 {}, $9, {}, 0x100f, 0xffffffff;"
    lines = []
    for byte in range(4):
        lines += [f"shr.u32 t, $8, {8 * byte + 4};", fetch.format(f"${byte}", "t")]
        if byte:
            lines.append(f"shr.u32 t, $8, {8 * byte};")
        lines.append(fetch.format(f"${byte + 4}", "t" if byte else "$8"))
    return "{\n.reg .b32 t;\n" + "\n".join(lines) + "\n}"


SHUFFLE = tl.constexpr(_shuffle_asm())
# Outputs are written before all inputs are read.
_OF_A_WORD = tl.constexpr(",".join(["=&r"] * 8 + ["r", "r"]))
_EIGHT_FLOATS = tl.constexpr((tl.float32,) * 8)
_OF_FOUR_BYTES = tl.constexpr(",".join(["=&r"] * 8 + ["r"] * 5))  # the entry once for each byte


@triton.jit
def open_table(tables_ptr, LOOKUP: tl.constexpr):
    """What ``decode`` looks codes up in; made once in a kernel, outside of its loops."""
    if LOOKUP == "shuffle":
        # A scalar that differs from lane to lane: its entry.
        lane = tl.inline_asm_elementwise(
            "mov.u32 $0, %laneid;", "=r,r", [tl.program_id(0)], tl.int32, is_pure=True, pack=1
        )
        return tl.load(tables_ptr + (lane & 15))
    else:
        return tables_ptr


@triton.jit
def byte_values(packed, table, LOOKUP: tl.constexpr):
    """fp32 values (R, 2 C) of uint8 ``packed`` (R, C), 4 bytes a thread or a multiple."""
    if LOOKUP == "shuffle":
        # Not pure: no pass may move a shuffle to where only some lanes of a warp run.
        high, low = tl.inline_asm_elementwise(
            SHUFFLE,
            _OF_FOUR_BYTES,
            [packed, table],
            (tl.float32, tl.float32),
            is_pure=False,
            pack=4,
        )
    else:
        high = tl.load(table + (packed >> 4).to(tl.int32))
        low = tl.load(table + (packed & 15).to(tl.int32))
    return tl.reshape(tl.join(high, low), [packed.shape[0], 2 * packed.shape[1]])


@triton.jit
def word_values(words, table, LOOKUP: tl.constexpr):
    """fp32 values (R, 8 C) of uint32 ``words`` (R, C), each 4 bytes in the order of memory."""
    if LOOKUP == "shuffle":
        h0, h1, h2, h3, l0, l1, l2, l3 = tl.inline_asm_elementwise(
            SHUFFLE,
            _OF_A_WORD,
            [words, table],
            _EIGHT_FLOATS,
            is_pure=False,
            pack=1,
        )
    else:
        h0, l0 = tl.load(table + ((words >> 4) & 15)), tl.load(table + (words & 15))
        h1, l1 = tl.load(table + ((words >> 12) & 15)), tl.load(table + ((words >> 8) & 15))
        h2, l2 = tl.load(table + ((words >> 20) & 15)), tl.load(table + ((words >> 16) & 15))
        h3, l3 = tl.load(table + (words >> 28)), tl.load(table + ((words >> 24) & 15))
    # (R, C, 2, 2, 2): upper or lower two bytes, byte of the two, nibble.
    high = tl.join(tl.join(h0, h2), tl.join(h1, h3))
    low = tl.join(tl.join(l0, l2), tl.join(l1, l3))
    return tl.reshape(tl.join(high, low), [words.shape[0], 8 * words.shape[1]])


@triton.jit
def load_offset(offset_ptr, DOUBLE_QUANT: tl.constexpr):
    """The offset of double-quantized scales, read once in a kernel; 0 for fp32 scales."""
    if DOUBLE_QUANT:
        return tl.load(offset_ptr)
    else:
        return 0.0


@triton.jit
def load_absmax(absmax_ptr, nested_absmax_ptr, block, mask, DOUBLE_QUANT: tl.constexpr):
    """Scales of ``block``, any shape of indices, for ``decode_absmax``; 0 where masked."""
    if DOUBLE_QUANT:
        code = tl.load(absmax_ptr + block, mask=mask, other=0).to(tl.int32)
        return code, tl.load(nested_absmax_ptr + block // _GROUP, mask=mask, other=0.0)
    else:
        absmax = tl.load(absmax_ptr + block, mask=mask, other=0.0)
        return absmax, absmax


@triton.jit
def decode_absmax(absmax, nested, tables_ptr, offset, DOUBLE_QUANT: tl.constexpr):
    """The fp32 scales of ``load_absmax``, any shape."""
    if DOUBLE_QUANT:
        return tl.load(tables_ptr + _NESTED_CODE + absmax) * nested + offset
    else:
        return absmax


@triton.jit
def load_codes(
    packed_ptr,
    rows,  # (R,) int64
    row_mask,  # (R,)
    k,
    K,
    BK: tl.constexpr,
    BITS: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Codes of W[rows, k : k + BK]: uint32 (R, BK // 8) or int8 (R, BK); 0 where masked.

    EVEN_K: K is a multiple of BK, so that no column is beyond it.
    """
    PER: tl.constexpr = 8 if BITS == 4 else 1  # values of a load
    source = packed_ptr.to(tl.pointer_type(tl.uint32)) if BITS == 4 else packed_ptr
    column = k // PER + tl.arange(0, BK // PER)  # (C,)
    mask = row_mask[:, None]
    if not EVEN_K:
        mask = mask & (column < K // PER)[None, :]  # (R, C)
    return tl.load(source + rows[:, None] * (K // PER) + column[None, :], mask=mask, other=0)


@triton.jit
def load_scales(
    absmax_ptr,
    nested_absmax_ptr,
    rows,  # (R,) int64
    row_mask,  # (R,)
    k,
    K,
    BK: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
):
    """Scales of W[rows, k : k + BK], for ``decode_scales``: two of (R, blocks in the tile).

    ``k`` is a multiple of BK, and of BLOCKSIZE and BK one is a multiple of the other. BLOCKSIZE 0
    is a scale a row.
    """
    if BLOCKSIZE == 0:
        block = rows[:, None]  # (R, 1)
        mask = row_mask[:, None]
    else:
        COUNT: tl.constexpr = BK // BLOCKSIZE if BK > BLOCKSIZE else 1
        index = k // BLOCKSIZE + tl.arange(0, COUNT)  # (COUNT,)
        block = rows[:, None] * (K // BLOCKSIZE) + index[None, :]  # (R, COUNT)
        mask = row_mask[:, None] & (index < K // BLOCKSIZE)[None, :]
    return load_absmax(absmax_ptr, nested_absmax_ptr, block, mask, DOUBLE_QUANT)


@triton.jit
def decode_scales(
    absmax,
    nested,
    tables_ptr,
    offset,
    BK: tl.constexpr,
    BITS: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
):
    """fp32 factors of the codes: (R, 1), or (R, BK) where several blocks lie in the tile."""
    scales = decode_absmax(absmax, nested, tables_ptr, offset, DOUBLE_QUANT)
    if BITS == 8:
        scales = scales * 0.007874015718698502  # fp32 of 1 / 127
    R: tl.constexpr = scales.shape[0]
    COUNT: tl.constexpr = scales.shape[1]
    if COUNT == 1:
        return scales
    else:
        spread = tl.broadcast_to(scales[:, :, None], [R, COUNT, BK // COUNT])
        return tl.reshape(spread, [R, BK])


@triton.jit
def decode(codes, scales, table, BITS: tl.constexpr, LOOKUP: tl.constexpr, DTYPE: tl.constexpr):
    """The weights (R, BK) in DTYPE: codes as loaded or as bytes, scales (R, 1) or (R, BK)."""
    if BITS == 8:
        values = codes.to(tl.float32)
    elif codes.dtype == tl.uint8:
        values = byte_values(codes, table, LOOKUP)
    else:
        values = word_values(codes, table, LOOKUP)
    return round_to(values * scales, DTYPE)
