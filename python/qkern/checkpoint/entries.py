"""What a tensor's entries in a safetensors file are called and how long they are. No torch.

The same keys, shapes and JSON as ``flat_keys.flatten`` writes, known before there is a tensor.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Sequence
from typing import Any, Final

from qkern.entry_keys import LAYOUT, STATE, scales_key, sibling
from qkern.formats import NESTED_BLOCKSIZE, QuantFormat, dynamic_code

# safetensors' names of integers of a byte, and of fp32.
U8, I8, F32 = "U8", "I8", "F32"
# The longest text that a float can have, for the room that a JSON entry needs at most.
_LONGEST_OFFSET: Final = -1.2345678901234567e-300


@dataclasses.dataclass(frozen=True)
class Piece:
    """One entry of a file.

    Args:
        key: its key.
        dtype: safetensors' name, such as "BF16".
        shape: of the entry.
        nbytes: its bytes.
        content: the bytes, where they are known before the values are.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    content: bytes | None = None


@dataclasses.dataclass(frozen=True)
class WeightPieces:
    """The entries of a quantized weight, by what writes them.

    Args:
        codes: its codes.
        scales: fp32, or 8-bit codes.
        nested: second-level scales, None with fp32 scales.
        tables: tables and JSON.
    """

    codes: Piece
    scales: Piece
    nested: Piece | None
    tables: tuple[Piece, ...]


def weight_pieces(
    name: str, shape: Sequence[int], dtype: str, fmt: QuantFormat, offset: float | None = None
) -> WeightPieces:
    """The entries of the weight ``name``.

    Args:
        name: its key.
        shape: of the dense tensor.
        dtype: of the dense tensor, "float32", "float16" or "bfloat16".
        fmt: after ``for_shape``.
        offset: of 8-bit scales; None for the longest JSON that one can need.
    """
    numel = math.prod(shape)
    blocks, groups = fmt.num_blocks(numel), fmt.num_nested(numel)
    packed = fmt.packed_size(numel)
    if fmt.kind.state is None:
        layout = Piece(sibling(name, LAYOUT), U8, (), 1, b"\0")
        codes = Piece(name, I8, tuple(shape), packed)
        return WeightPieces(codes, _floats(scales_key(name, fmt), blocks), None, (layout,))
    if fmt.bits == 4:
        codes = Piece(name, U8, (packed, 1), packed)
    else:
        codes = Piece(name, I8, (packed,), packed)
    tables = []
    if fmt.code is not None:
        tables.append(_table(f"{name}.quant_map", fmt.code))
    scales, nested = _floats(scales_key(name, fmt), blocks), None
    if fmt.double_quant:
        scales = Piece(scales_key(name, fmt), U8, (blocks,), blocks)
        nested = _floats(f"{name}.nested_absmax", groups)
        tables.append(_table(f"{name}.nested_quant_map", dynamic_code()))
    text = state_text(shape, dtype, fmt, _LONGEST_OFFSET if offset is None else offset).encode()
    tables.append(Piece(f"{name}.{STATE}{fmt.kind.state}", U8, (len(text),), len(text), text))
    return WeightPieces(codes, scales, nested, tuple(tables))


def state_text(shape: Sequence[int], dtype: str, fmt: QuantFormat, offset: float) -> str:
    """What bitsandbytes' ``quant_state`` entry says; ``offset`` of 8-bit scales."""
    state: dict[str, Any] = {
        "quant_type": fmt.quant_type,
        "blocksize": fmt.blocksize,
        "dtype": dtype,
        "shape": list(shape),
    }
    if fmt.double_quant:
        state["nested_blocksize"] = NESTED_BLOCKSIZE
        state["nested_dtype"] = "float32"
        state["nested_offset"] = offset
    return json.dumps(state)


def _floats(key: str, count: int) -> Piece:
    return Piece(key, F32, (count,), 4 * count)


def _table(key: str, values: tuple[float, ...]) -> Piece:
    content = struct.pack(f"<{len(values)}f", *values)
    return Piece(key, F32, (len(values),), len(content), content)
