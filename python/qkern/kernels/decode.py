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
  PTX, NVIDIA only. Needs 4 bytes of codes per thread or a multiple.

``tables`` is fp32 (272,): the 16 values of 4-bit codes, then the 256 of double-quantized scales.
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
# Outputs are written before all inputs are read; the entry is given once for each of 4 bytes.
_SHUFFLE_REGISTERS = tl.constexpr(",".join(["=&r"] * 8 + ["r"] * 5))


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
def code_values(packed, table, LOOKUP: tl.constexpr):
    """The fp32 values of the high and of the low nibbles of uint8 ``packed``, any shape."""
    if LOOKUP == "shuffle":
        # Not pure: no pass may move a shuffle to where only some lanes of a warp run.
        high, low = tl.inline_asm_elementwise(
            SHUFFLE,
            _SHUFFLE_REGISTERS,
            [packed, table],
            (tl.float32, tl.float32),
            is_pure=False,
            pack=4,
        )
        return high, low
    else:
        high = tl.load(table + (packed >> 4).to(tl.int32))
        low = tl.load(table + (packed & 15).to(tl.int32))
        return high, low


@triton.jit
def load_offset(offset_ptr, DOUBLE_QUANT: tl.constexpr):
    """The offset of double-quantized scales, read once in a kernel; 0 for fp32 scales."""
    if DOUBLE_QUANT:
        return tl.load(offset_ptr)
    else:
        return 0.0


@triton.jit
def load_absmax(
    absmax_ptr, nested_absmax_ptr, tables_ptr, offset, block, mask, DOUBLE_QUANT: tl.constexpr
):
    """fp32 scales of ``block``, any shape of indices; 0 or ``offset`` where masked."""
    if DOUBLE_QUANT:
        code = tl.load(absmax_ptr + block, mask=mask, other=0).to(tl.int32)
        value = tl.load(tables_ptr + _NESTED_CODE + code)
        nested = tl.load(nested_absmax_ptr + block // _GROUP, mask=mask, other=0.0)
        return value * nested + offset
    else:
        return tl.load(absmax_ptr + block, mask=mask, other=0.0)


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
    """Bytes of W[rows, k : k + BK], (R, BK * BITS // 8); 0 where masked or beyond K."""
    column = (k * BITS) // 8 + tl.arange(0, BK * BITS // 8)  # (C,)
    row_bytes = (K * BITS) // 8
    mask = row_mask[:, None]
    if not EVEN_K:
        mask = mask & (column < row_bytes)[None, :]  # (R, C)
    return tl.load(packed_ptr + rows[:, None] * row_bytes + column[None, :], mask=mask, other=0)


@triton.jit
def load_scales(
    absmax_ptr,
    nested_absmax_ptr,
    tables_ptr,
    offset,
    rows,  # (R,) int64
    row_mask,  # (R,)
    k,
    K,
    BK: tl.constexpr,
    BITS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
):
    """fp32 factors of the codes of W[rows, k : k + BK], for ``decode``.

    (R, 1), or (R, BK * BITS // 8) where several blocks lie in the tile. ``k`` is a multiple of BK;
    of BLOCKSIZE and BK one is a multiple of the other. BLOCKSIZE 0 is a scale a row.
    """
    if BLOCKSIZE == 0:
        absmax = tl.load(absmax_ptr + rows, mask=row_mask, other=0.0)[:, None]  # (R, 1)
    elif BLOCKSIZE >= BK:
        block = rows * (K // BLOCKSIZE) + k // BLOCKSIZE  # (R,)
        absmax = load_absmax(
            absmax_ptr, nested_absmax_ptr, tables_ptr, offset, block, row_mask, DOUBLE_QUANT
        )[:, None]  # (R, 1)
    else:
        COUNT: tl.constexpr = BK // BLOCKSIZE
        BYTES: tl.constexpr = BLOCKSIZE * BITS // 8
        R: tl.constexpr = rows.shape[0]
        index = k // BLOCKSIZE + tl.arange(0, COUNT)  # (COUNT,)
        block = (rows * (K // BLOCKSIZE))[:, None] + index[None, :]  # (R, COUNT)
        mask = row_mask[:, None] & (index < K // BLOCKSIZE)[None, :]  # (R, COUNT)
        each = load_absmax(
            absmax_ptr, nested_absmax_ptr, tables_ptr, offset, block, mask, DOUBLE_QUANT
        )  # (R, COUNT)
        spread = tl.broadcast_to(each[:, :, None], [R, COUNT, BYTES])
        absmax = tl.reshape(spread, [R, COUNT * BYTES])  # (R, C)
    if BITS == 8:
        return absmax * 0.007874015718698502  # fp32 of 1 / 127
    else:
        return absmax


@triton.jit
def decode(packed, scales, table, BITS: tl.constexpr, LOOKUP: tl.constexpr, DTYPE: tl.constexpr):
    """The weights (R, BK) in DTYPE of ``load_codes`` and ``load_scales``."""
    if BITS == 8:
        return round_to(packed.to(tl.float32) * scales, DTYPE)  # (R, BK)
    else:
        high, low = code_values(packed, table, LOOKUP)  # (R, BK // 2)
        pairs = tl.join(round_to(high * scales, DTYPE), round_to(low * scales, DTYPE))
        return tl.reshape(pairs, [packed.shape[0], 2 * packed.shape[1]])  # (R, BK)
