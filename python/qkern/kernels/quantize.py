"""Values to codes and scales, the bytes of the host's codec.

    absmax  = max |x| of the block; NaN if there is one
    4 bits    s    = x * (1 / max(absmax, 1e-38));  the ragged last block divides instead
              code = order[number of midpoints strictly below s];  a NaN is above all of them
    int8      q    = round_half_even(x * (127 / absmax));  a row multiplies by 127 * (1 / absmax);
              0 where absmax is below 1e-36 or not finite

fp32 arithmetic on blocks over the flat tensor, (blocks, blocksize); value ``2 j`` goes to the high
nibble of byte ``j``. Bytes are promised: quotients are ``divide``'s, every launch sets
``enable_fp_fusion=False``. NaN and infinity show in ``absmax``, so nothing waits for the device
here. Format: docs of ``qkern.formats``; the same in plain torch: ``qkern.reference``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkern.formats import QuantFormat
from qkern.kernels import lasting
from qkern.kernels.aot import AotSpec
from qkern.kernels.launch import EXACT
from qkern.kernels.rounding import divide, widen

# Values of one program: 16 for each of its threads.
TILE = 2048
# Columns of a row that are read at once.
CHUNK = 4096
_ABSMAX_FLOOR = tl.constexpr(0x006CE3EE)  # 1e-38: below it, bitsandbytes' reciprocal would overflow
_INT8_ABSMAX_FLOOR = tl.constexpr(1e-36)  # below it, 127 / absmax would
_INFINITY = tl.constexpr(0x7F800000)
_NAN = tl.constexpr(0x7FC00000)
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: a sum with it has an integer in its low bits


@triton.jit
def _magnitude(x):
    """The bits of ``|x|``, ordered as magnitudes are, with NaN above infinity."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _as_absmax(bits):
    """The float of the largest magnitude; any NaN becomes the usual one."""
    return tl.where(bits > _INFINITY, _NAN, bits).to(tl.float32, bitcast=True)


@triton.jit
def _at_least_floor(scale):
    """Scales of magnitude 1e-38 or more, with their signs; NaN stays."""
    bits, magnitude = scale.to(tl.int32, bitcast=True), _magnitude(scale)
    sign = bits ^ magnitude
    return tl.where(magnitude < _ABSMAX_FLOOR, sign | _ABSMAX_FLOOR, bits).to(
        tl.float32, bitcast=True
    )


@triton.jit
def _count_below(s, bounds_ptr):
    """How many of 15 ascending bounds lie strictly below ``s``: 4 comparisons.

    Of the bounds that a step may need, few are chosen between and many are loaded: fewest
    instructions.
    """
    below = s <= tl.load(bounds_ptr + 7)
    index = tl.where(below, 0, 8)
    bound = tl.where(below, tl.load(bounds_ptr + 3), tl.load(bounds_ptr + 11))
    index += tl.where(s <= bound, 0, 4)
    index += tl.where(s <= tl.load(bounds_ptr + index + 1), 0, 2)
    index += tl.where(s <= tl.load(bounds_ptr + index), 0, 1)
    return index


@triton.jit
def _quantize_4bit_kernel(
    values_ptr,
    scales_ptr,
    bounds_ptr,
    order_ptr,
    packed_ptr,
    numel,
    BLOCKSIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    GIVEN: tl.constexpr,  # scales are read, else written
    ASCENDING: tl.constexpr,  # codes are in the order of their values
    ZERO_CODE: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * (BLOCKS * BLOCKSIZE)
    left = tl.minimum(numel - first, BLOCKS * BLOCKSIZE).to(tl.int32)
    rows = tl.arange(0, BLOCKS)
    place = rows[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]  # (BLOCKS, BLOCKSIZE)
    mask = place < left
    x = widen(tl.load(values_ptr + first + place, mask=mask, other=0.0))

    scales_ptr += first // BLOCKSIZE + rows
    whole = rows < left // BLOCKSIZE  # (BLOCKS,)
    exists = rows * BLOCKSIZE < left
    if GIVEN:
        divisor = _at_least_floor(tl.load(scales_ptr, mask=exists, other=1.0))
    else:
        absmax = _as_absmax(tl.max(_magnitude(x), axis=1))
        divisor = _at_least_floor(absmax)
        tl.store(scales_ptr, tl.where(whole, absmax, divisor), mask=exists)
    inverse = divide(tl.full(divisor.shape, 1.0, tl.float32), divisor)
    s = x * inverse[:, None]  # (BLOCKS, BLOCKSIZE)
    if left < BLOCKS * BLOCKSIZE:
        divisors = tl.broadcast_to(divisor[:, None], x.shape)
        s = tl.where(whole[:, None], s, divide(x, divisors))

    code = _count_below(s, bounds_ptr)
    if not ASCENDING:
        code = tl.load(order_ptr + code)
    code = tl.where(mask, code, ZERO_CODE)
    high, low = tl.split(tl.reshape(code, [BLOCKS, BLOCKSIZE // 2, 2]))  # (BLOCKS, BLOCKSIZE / 2)
    byte = rows[:, None] * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]
    packed = (high * 16 + low).to(tl.uint8)
    tl.store(packed_ptr + first // 2 + byte, packed, mask=2 * byte < left)


@triton.jit
def _int8_codes(x, factor, absmax):
    """Products rounded half to even; 0 where absmax is not finite."""
    scaled = tl.where(_magnitude(absmax) < _INFINITY, x * factor, 0.0)
    return ((scaled + _ROUND).to(tl.int32, bitcast=True) & 255).to(tl.int8)


@triton.jit
def _quantize_int8_kernel(
    values_ptr, absmax_ptr, codes_ptr, numel, BLOCKSIZE: tl.constexpr, BLOCKS: tl.constexpr
):
    first = tl.program_id(0).to(tl.int64) * (BLOCKS * BLOCKSIZE)
    left = tl.minimum(numel - first, BLOCKS * BLOCKSIZE).to(tl.int32)
    rows = tl.arange(0, BLOCKS)
    place = rows[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]  # (BLOCKS, BLOCKSIZE)
    mask = place < left
    x = widen(tl.load(values_ptr + first + place, mask=mask, other=0.0))
    absmax = _as_absmax(tl.max(_magnitude(x), axis=1))  # (BLOCKS,)
    tl.store(absmax_ptr + first // BLOCKSIZE + rows, absmax, mask=rows * BLOCKSIZE < left)
    small = absmax < _INT8_ABSMAX_FLOOR
    largest = tl.full(absmax.shape, 127.0, tl.float32)
    factor = tl.where(small, 0.0, divide(largest, tl.where(small, 1.0, absmax)))
    codes = _int8_codes(x, factor[:, None], absmax[:, None])
    tl.store(codes_ptr + first + place, codes, mask=mask)


@triton.jit
def _quantize_int8_rows_kernel(values_ptr, absmax_ptr, codes_ptr, columns, CHUNK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    values_ptr += row * columns
    codes_ptr += row * columns
    offs = tl.arange(0, CHUNK)
    largest = tl.zeros([CHUNK], tl.int32)
    for start in range(0, columns, CHUNK):
        x = tl.load(values_ptr + start + offs, mask=start + offs < columns, other=0.0)  # (CHUNK,)
        largest = tl.maximum(largest, _magnitude(widen(x)))
    absmax = _as_absmax(tl.max(largest, axis=0))
    tl.store(absmax_ptr + row, absmax)
    small = absmax < _INT8_ABSMAX_FLOOR
    inverse = divide(tl.full([], 1.0, tl.float32), tl.where(small, 1.0, absmax))
    factor = tl.where(small, 0.0, 127.0 * inverse)
    for start in range(0, columns, CHUNK):
        mask = start + offs < columns
        x = widen(tl.load(values_ptr + start + offs, mask=mask, other=0.0))  # (CHUNK,)
        tl.store(codes_ptr + start + offs, _int8_codes(x, factor, absmax), mask=mask)


def quantize(values: Tensor, fmt: QuantFormat) -> tuple[Tensor, Tensor]:
    """Flat codes and fp32 absmax (blocks,) of ``values``, on their device.

    A value that is NaN or infinite makes the absmax of its block so, and touches no other block.

    Args:
        values: fp32, fp16 or bf16, any shape, contiguous.
        fmt: the format to write, after ``for_shape``; its double quantization plays no part.

    Returns:
        uint8 (ceil(numel / 2),) or int8 (numel,), and fp32 (blocks,).
    """
    absmax = torch.empty(fmt.num_blocks(values.numel()), device=values.device)
    if fmt.code is not None:
        return _launch_4bit(values, absmax, fmt, given=False), absmax
    return _launch_int8(values, absmax, fmt), absmax


def encode(values: Tensor, scales: Tensor, fmt: QuantFormat) -> Tensor:
    """Packed 4-bit codes of ``values`` against given scales of either sign.

    Args:
        values: fp32, fp16 or bf16, any shape, contiguous.
        scales: fp32 (blocks,), contiguous.
        fmt: a 4-bit format.

    Returns:
        uint8 (ceil(numel / 2),).
    """
    return _launch_4bit(values, scales, fmt, given=True)


def _launch_4bit(values: Tensor, scales: Tensor, fmt: QuantFormat, *, given: bool) -> Tensor:
    numel = values.numel()
    packed = torch.empty(fmt.packed_size(numel), dtype=torch.uint8, device=values.device)
    if numel == 0:
        return packed
    bounds, order, constants = _search_tables(fmt.quant_type, values.device)
    blocks = _blocks_of_program(fmt)
    with torch.cuda.device_of(values):
        _quantize_4bit_kernel[(triton.cdiv(numel, blocks * fmt.blocksize),)](
            values,
            scales,
            bounds,
            order,
            packed,
            numel,
            BLOCKSIZE=fmt.blocksize,
            BLOCKS=blocks,
            GIVEN=given,
            **constants,
            **EXACT,
        )
    return packed


def _launch_int8(values: Tensor, absmax: Tensor, fmt: QuantFormat) -> Tensor:
    numel = values.numel()
    codes = torch.empty(numel, dtype=torch.int8, device=values.device)
    if numel == 0:
        return codes
    with torch.cuda.device_of(values):
        if fmt.kind.per_row:
            chunk = min(triton.next_power_of_2(fmt.blocksize), CHUNK)
            _quantize_int8_rows_kernel[(absmax.numel(),)](
                values, absmax, codes, fmt.blocksize, CHUNK=chunk, **EXACT
            )
        else:
            blocks = _blocks_of_program(fmt)
            _quantize_int8_kernel[(triton.cdiv(numel, blocks * fmt.blocksize),)](
                values,
                absmax,
                codes,
                numel,
                BLOCKSIZE=fmt.blocksize,
                BLOCKS=blocks,
                **EXACT,
            )
    return codes


def _blocks_of_program(fmt: QuantFormat) -> int:
    return max(TILE // fmt.blocksize, 1)


@functools.lru_cache(maxsize=32)
def _search_tables(
    quant_type: str, device: torch.device
) -> tuple[Tensor, Tensor, dict[str, int | bool]]:
    """fp32 midpoints (15,), int32 codes in the order of their values (16,), and constants."""
    code = torch.tensor(QuantFormat(quant_type).code, dtype=torch.float32, device="cpu")
    ascending, order = torch.sort(code, stable=True)
    bounds = (ascending[:-1] + ascending[1:]) / 2
    zero_code = order[torch.bucketize(torch.zeros((), device="cpu"), bounds)]
    constants = {"ASCENDING": torch.equal(code, ascending), "ZERO_CODE": int(zero_code)}
    order = order.to(torch.int32)
    return *lasting(device, lambda: (bounds.to(device), order.to(device))), constants


def aot_specs(arch: str) -> Iterator[AotSpec]:
    """4 bits with both tables, int8 blocks and rows."""
    device = torch.device("cpu")
    pointers = {"scales_ptr": "*fp32", "bounds_ptr": "*fp32", "order_ptr": "*i32"}
    for quant_type, dtype, given in (("nf4", "bf16", False), ("fp4", "fp32", True)):
        fmt = QuantFormat(quant_type, 64)
        yield AotSpec(
            f"quantize {quant_type} of {dtype}, {'given' if given else 'absmax'} scales",
            _quantize_4bit_kernel,
            {"values_ptr": f"*{dtype}", **pointers, "packed_ptr": "*u8", "numel": "i64"},
            {
                "BLOCKSIZE": 64,
                "BLOCKS": _blocks_of_program(fmt),
                "GIVEN": given,
                **_search_tables(quant_type, device)[2],
            },
            divisible=("numel",),
            quick=arch == "sm_90" and not given,
        )
    pointers = {"values_ptr": "*bf16", "absmax_ptr": "*fp32", "codes_ptr": "*i8"}
    yield AotSpec(
        "quantize int8 of bf16",
        _quantize_int8_kernel,
        pointers | {"numel": "i64"},
        {"BLOCKSIZE": 64, "BLOCKS": TILE // 64},
        divisible=("numel",),
    )
    yield AotSpec(
        "quantize int8 rows of bf16",
        _quantize_int8_rows_kernel,
        pointers | {"columns": "i64"},
        {"CHUNK": CHUNK},
        divisible=("columns",),
    )
