"""A ``QuantizedTensor`` as flat ``state_dict`` entries, and back: bitsandbytes' keys and shapes.

For the prefix ``layer.weight``:

    layer.weight                               uint8 (ceil(n / 2), 1); int8 (n,)
    layer.weight.absmax                        fp32 or uint8 (blocks,)
    layer.weight.quant_map                     fp32 (16,)        4-bit formats
    layer.weight.nested_absmax                 fp32 (groups,)    double quantization
    layer.weight.nested_quant_map              fp32 (256,)       double quantization
    layer.weight.quant_state.bitsandbytes__nf4 uint8 (bytes of JSON,); __fp4; qkern__int8

int8 blocks have no twin in bitsandbytes: their 1-D weight cannot be mistaken for a dense one. int8
rows have the keys of its ``Linear8bitLt``, which do not say what dtype the weight had:

    layer.weight                               int8 (out_features, in_features)
    layer.SCB                                  fp32 (out_features,), the rows' absmax
    layer.weight_format                        uint8 (), 0: rows; may be missing
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from qkern.errors import CorruptFileError, QkernError
from qkern.formats import DTYPES, NESTED_BLOCKSIZE, QuantFormat, dynamic_code
from qkern.ops import has_data
from qkern.reference import Parts
from qkern.tensor import QuantizedTensor

_STATE = "quant_state."
_ROWS = QuantFormat("int8_row", 0)
_WEIGHT, _SCALES, _LAYOUT = "weight", "SCB", "weight_format"
_COMPANIONS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def flatten(q: QuantizedTensor, prefix: str) -> dict[str, Tensor]:
    """The entries of ``q`` under ``prefix``; plain tensors that share its memory."""
    fmt, packed, absmax = q.format, q.packed, q.absmax.reshape(-1)
    if fmt.kind.state is None:
        shape = q.shape if q.has_rows else q.whole_shape
        packed = packed.reshape(shape)
        if absmax.numel() == 0:  # rows without values
            absmax = absmax.new_zeros(shape[:-1].numel())
    else:
        packed = packed.reshape(-1, 1) if fmt.bits == 4 else packed.reshape(-1)
    return {prefix: packed, scales_key(prefix, fmt): absmax} | companions(q, prefix)


def companions(q: QuantizedTensor, prefix: str) -> dict[str, Tensor]:
    """The entries that are the same in every shard: tables, second-level scales, JSON."""
    fmt, entries = q.format, {}
    if fmt.code is not None:
        entries[f"{prefix}.quant_map"] = torch.tensor(fmt.code, dtype=torch.float32, device="cpu")
    if q.nested_absmax is not None:
        entries[f"{prefix}.nested_absmax"] = q.nested_absmax
        entries[f"{prefix}.nested_quant_map"] = torch.tensor(
            dynamic_code(), dtype=torch.float32, device="cpu"
        )
    if fmt.kind.state is None:
        entries[_sibling(prefix, _LAYOUT)] = torch.tensor(0, dtype=torch.uint8, device="cpu")
    else:
        entries[f"{prefix}.{_STATE}{fmt.kind.state}"] = _json(q)
    device = q.packed.device
    return {key: entry if entry.is_meta else entry.to(device) for key, entry in entries.items()}


def _json(q: QuantizedTensor) -> Tensor:
    """What bitsandbytes' ``quant_state`` entry says, its JSON as bytes."""
    state: dict[str, Any] = {
        "quant_type": q.format.quant_type,
        "blocksize": q.format.blocksize,
        # A file names what was quantized: float64 is only ever reported by a cast model.
        "dtype": str(q.dtype).removeprefix("torch.").replace("float64", "float32"),
        "shape": list(q.whole_shape),
    }
    if q.offset is not None:
        state["nested_blocksize"] = NESTED_BLOCKSIZE
        state["nested_dtype"] = "float32"
        state["nested_offset"] = float(q.offset) if has_data(q.offset) else 0.0
    return torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)


def scales_key(prefix: str, fmt: QuantFormat) -> str:
    """The key of the scales."""
    return _sibling(prefix, _SCALES) if fmt.kind.state is None else f"{prefix}.absmax"


def prefixes(keys: Iterable[str]) -> list[str]:
    """The prefixes of the quantized tensors that ``keys`` speak of, each once."""
    found: dict[str, None] = {}
    for key in keys:
        prefix = _state_prefix(key)
        if prefix:
            found[prefix] = None
        elif key.rpartition(".")[2] in (_SCALES, _LAYOUT):
            found[_sibling(key, _WEIGHT)] = None
    return list(found)


def owner(key: str) -> str:
    """The prefix of the tensor that ``key`` would belong to if that one is quantized."""
    prefix = _state_prefix(key)
    if prefix:
        return prefix
    parent, _, last = key.rpartition(".")
    if last in (_SCALES, _LAYOUT):
        return _sibling(key, _WEIGHT)
    return parent if last in _COMPANIONS else key


def _state_prefix(key: str) -> str:
    """The prefix of the JSON entry ``key``; empty for other keys.

    A module may be called ``quant_state`` itself.
    """
    prefix, _, last = key.rpartition(f".{_STATE}")
    return prefix if last.startswith(("bitsandbytes__", "qkern__")) else ""


def owned_keys(entries: Mapping[str, Any], prefix: str) -> list[str]:
    """Keys of ``entries`` that belong to the tensor at ``prefix``."""
    whole = (prefix, _sibling(prefix, _SCALES), _sibling(prefix, _LAYOUT))
    return [key for key in entries if key in whole or key.startswith(f"{prefix}.")]


def known_keys(q: QuantizedTensor, prefix: str) -> set[str]:
    """Keys that a file may hold for ``q``, with 8-bit scales or without."""
    keys = {prefix, scales_key(prefix, q.format), *companions(q, prefix)}
    if "nested" in q.format.kind.scales:
        keys |= {f"{prefix}.nested_absmax", f"{prefix}.nested_quant_map"}
    return keys


def missing_keys(entries: Mapping[str, Any], prefix: str, fmt: QuantFormat) -> list[str]:
    """Keys that a tensor of ``fmt`` needs and ``entries`` does not have."""
    names = [] if fmt.kind.state is None else [f"{_STATE}{fmt.kind.state}"]
    if fmt.code is not None:
        names.append("quant_map")
    nested = ["nested_absmax", "nested_quant_map"]
    if "nested" in fmt.kind.scales and any(f"{prefix}.{name}" in entries for name in nested):
        names += nested
    wanted = [prefix, scales_key(prefix, fmt), *(f"{prefix}.{name}" for name in names)]
    return [key for key in wanted if key not in entries]


def read_state(entries: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    """Format, shape, dtype (None if not said) and offset of the tensor at ``prefix``, checked.

    Raises:
        CorruptFileError: if the entries do not say what a tensor needs, or contradict each other.
    """
    keys = [key for key in entries if key.startswith(f"{prefix}.{_STATE}")]
    if not keys and any(_sibling(prefix, name) in entries for name in (_SCALES, _LAYOUT)):
        return _read_rows(entries, prefix)
    if len(keys) != 1:
        msg = f"{prefix}: exactly one {prefix}.{_STATE}* entry is needed, found {len(keys)}"
        raise CorruptFileError(msg)
    try:
        state = json.loads(bytes(entries[keys[0]].cpu().tolist()))
        fmt = QuantFormat(state["quant_type"], state["blocksize"], "nested_offset" in state)
        shape = [int(size) for size in state["shape"]]
        dtype, nested = state["dtype"], state.get("nested_blocksize", NESTED_BLOCKSIZE)
        offset = float(state.get("nested_offset", 0.0))
    except (ValueError, KeyError, TypeError, QkernError) as error:
        msg = f"{keys[0]}: not a readable quantization state: {error}"
        raise CorruptFileError(msg) from error
    if fmt.kind.state is None:
        msg = f"{keys[0]}: {fmt.quant_type} has no quantization state, but the key {_SCALES}"
        raise CorruptFileError(msg)
    if dtype not in DTYPES or min(shape, default=0) < 0 or nested != NESTED_BLOCKSIZE:
        msg = (
            f"{keys[0]}: dtype {dtype!r}, shape {shape}, nested_blocksize {nested}: allowed are "
            f"{', '.join(DTYPES)}, sizes of 0 or more, {NESTED_BLOCKSIZE}"
        )
        raise CorruptFileError(msg)
    return {"format": fmt, "shape": shape, "dtype": getattr(torch, dtype), "offset": offset}


def _read_rows(entries: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    """The same of bitsandbytes' int8 entries."""
    missing = missing_keys(entries, prefix, _ROWS)
    if missing:
        msg = f"{prefix}: missing {', '.join(missing)}: int8 rows are codes and scales"
        raise CorruptFileError(msg)
    layout_key = _sibling(prefix, _LAYOUT)
    layout = entries.get(layout_key)
    # bitsandbytes wrote no weight_format once, and means rows by that.
    if layout is not None and not layout.is_meta and layout.cpu().tolist() not in (0, [0]):
        msg = (
            f"{layout_key}: got {layout.tolist()}, only 0 (rows) can be read: 1 to 3 are layouts "
            "of old versions of bitsandbytes; quantize the dense model again"
        )
        raise CorruptFileError(msg)
    weight, scales_at = entries[prefix], scales_key(prefix, _ROWS)
    scales, rows = entries[scales_at], weight.shape[:-1].numel()
    if weight.dtype != torch.int8 or weight.dim() < 2:
        msg = f"{prefix}: got {weight.dtype} {list(weight.shape)}, int8 (out, in) is needed"
        raise CorruptFileError(msg)
    if scales.dtype != torch.float32 or scales.numel() != rows:
        msg = (
            f"{scales_at}: got {scales.dtype} {list(scales.shape)}, float32 ({rows},) is needed "
            f"for the rows of {prefix}"
        )
        raise CorruptFileError(msg)
    shape = list(weight.shape)
    return {"format": _ROWS.for_shape(shape), "shape": shape, "dtype": None, "offset": 0.0}


def unflatten(
    entries: Mapping[str, Tensor], prefix: str, dtype: torch.dtype = torch.float16
) -> QuantizedTensor:
    """The tensor at ``prefix``, sharing the entries' memory where it can.

    Args:
        entries: of a ``state_dict`` or file.
        prefix: of the tensor's keys.
        dtype: of the dense tensor, where the entries do not say (int8 rows).

    Raises:
        CorruptFileError: if an entry is missing, has another size or dtype than the state says,
            or holds a table that is not the format's.
    """
    state = read_state(entries, prefix)
    fmt: QuantFormat = state["format"]
    missing = missing_keys(entries, prefix, fmt)
    if missing:
        msg = f"{prefix}: missing {', '.join(missing)}"
        raise CorruptFileError(msg)
    numel = torch.Size(state["shape"]).numel()
    packed_dtype = getattr(torch, fmt.packed_dtype)
    absmax_dtype = torch.uint8 if fmt.double_quant else torch.float32

    def entry(key: str, size: int, dtype: torch.dtype) -> Tensor:
        found = entries.get(key)
        if found is None:
            msg = f"{prefix}: missing {key}, which the state says is there"
            raise CorruptFileError(msg)
        if found.dtype != dtype or found.numel() != size:
            msg = f"{key}: got {found.numel()} x {found.dtype}, the state says {size} x {dtype}"
            raise CorruptFileError(msg)
        return found.reshape(-1)

    packed = entry(prefix, fmt.packed_size(numel), packed_dtype)
    scales = scales_key(prefix, fmt)
    if numel == 0 and fmt.kind.state is None:
        absmax = entries[scales].reshape(-1)[:0]  # rows without values
    else:
        absmax = entry(scales, fmt.num_blocks(numel), absmax_dtype)
    if fmt.code is not None:
        _check_table(entry(f"{prefix}.quant_map", 16, torch.float32), fmt.code, prefix)
    nested_absmax = offset = None
    if fmt.double_quant:
        nested_absmax = entry(f"{prefix}.nested_absmax", fmt.num_nested(numel), torch.float32)
        finite = not has_data(nested_absmax) or bool(nested_absmax.isfinite().all())
        if not finite or not math.isfinite(state["offset"]):
            msg = f"{prefix}: NaN or infinity among its second-level scales or its offset"
            raise CorruptFileError(msg)
        table = entry(f"{prefix}.nested_quant_map", 256, torch.float32)
        _check_table(table, dynamic_code(), prefix)
        offset = torch.tensor([state["offset"]], dtype=torch.float32, device=packed.device)
    parts = Parts(packed, absmax, nested_absmax, offset)
    return QuantizedTensor.from_parts(parts, fmt, state["shape"], state["dtype"] or dtype)


def _check_table(found: Tensor, expected: tuple[float, ...], prefix: str) -> None:
    if found.is_meta:
        return
    table = torch.tensor(expected, dtype=torch.float32)
    # 0.0 and -0.0 are both written for FP4's negative zero: compare values, not bits.
    if not torch.equal(found.cpu(), table):
        msg = f"{prefix}: its table of {len(expected)} codes is not the format's own"
        raise CorruptFileError(msg)


def _sibling(prefix: str, name: str) -> str:
    """The key ``name`` in the module whose parameter is at ``prefix``."""
    module, dot, _ = prefix.rpartition(".")
    return f"{module}{dot}{name}"
