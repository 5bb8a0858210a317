"""A ``QuantizedTensor`` as flat ``state_dict`` entries, and back: bitsandbytes' keys and shapes.

For the prefix ``layer.weight``:

    layer.weight                               uint8 (ceil(n / 2), 1); int8 (n,)
    layer.weight.absmax                        fp32 or uint8 (blocks,)
    layer.weight.quant_map                     fp32 (16,)        4-bit formats
    layer.weight.nested_absmax                 fp32 (groups,)    double quantization
    layer.weight.nested_quant_map              fp32 (256,)       double quantization
    layer.weight.quant_state.bitsandbytes__nf4 uint8 (bytes of JSON,); __fp4; qkern__int8

int8 blocks have no twin in bitsandbytes: their 1-D weight cannot be mistaken for a dense one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qkern.errors import CorruptFileError, QkernError
from qkern.formats import CODES, DTYPES, NESTED_BLOCKSIZE, QuantFormat, dynamic_code
from qkern.operands import has_data
from qkern.reference import Parts
from qkern.tensor import QuantizedTensor

_STATE = "quant_state."


def state_name(quant_type: str) -> str:
    """Last part of the key that holds the JSON."""
    owner = "qkern" if quant_type == "int8" else "bitsandbytes"
    return f"{_STATE}{owner}__{quant_type}"


def prefix_of_state(key: str) -> str:
    """The tensor's own key, if ``key`` is the one of its JSON; empty for every other key.

    A module may be called ``quant_state`` itself.
    """
    prefix, _, last = key.rpartition(f".{_STATE}")
    return prefix if last.startswith(("bitsandbytes__", "qkern__")) else ""


def flatten(q: QuantizedTensor, prefix: str) -> dict[str, Tensor]:
    """The entries of ``q`` under ``prefix``; plain tensors that share its memory."""
    fmt = q.format
    weight = q.packed.reshape(-1, 1) if fmt.bits == 4 else q.packed.reshape(-1)
    entries = {prefix: weight, f"{prefix}.absmax": q.absmax.reshape(-1)}
    return entries | companions(q, prefix)


def companions(q: QuantizedTensor, prefix: str) -> dict[str, Tensor]:
    """The entries that are the same in every shard: tables, second-level scales, JSON."""
    fmt, entries = q.format, {}
    if fmt.code is not None:
        entries[f"{prefix}.quant_map"] = torch.tensor(fmt.code, dtype=torch.float32, device="cpu")
    state: dict[str, Any] = {
        "quant_type": fmt.quant_type,
        "blocksize": fmt.blocksize,
        # A file names what was quantized: float64 is only ever reported by a cast model.
        "dtype": str(q.dtype).removeprefix("torch.").replace("float64", "float32"),
        "shape": list(q.whole_shape),
    }
    if q.nested_absmax is not None and q.offset is not None:
        entries[f"{prefix}.nested_absmax"] = q.nested_absmax
        entries[f"{prefix}.nested_quant_map"] = torch.tensor(
            dynamic_code(), dtype=torch.float32, device="cpu"
        )
        state["nested_blocksize"] = NESTED_BLOCKSIZE
        state["nested_dtype"] = "float32"
        state["nested_offset"] = float(q.offset) if has_data(q.offset) else 0.0
    blob = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    entries[f"{prefix}.{state_name(fmt.quant_type)}"] = blob
    device = q.packed.device
    return {key: entry if entry.is_meta else entry.to(device) for key, entry in entries.items()}


def owned_keys(entries: Mapping[str, Any], prefix: str) -> list[str]:
    """Keys of ``entries`` that belong to the tensor at ``prefix``."""
    return [key for key in entries if key == prefix or key.startswith(f"{prefix}.")]


def missing_keys(entries: Mapping[str, Any], prefix: str, fmt: QuantFormat) -> list[str]:
    """Keys that a tensor of ``fmt`` needs and ``entries`` does not have."""
    names = ["absmax", state_name(fmt.quant_type)]
    if fmt.code is not None:
        names.append("quant_map")
    if f"{prefix}.nested_absmax" in entries or f"{prefix}.nested_quant_map" in entries:
        names += ["nested_absmax", "nested_quant_map"]
    wanted = [prefix, *(f"{prefix}.{name}" for name in names)]
    return [key for key in wanted if key not in entries]


def read_state(entries: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    """The checked JSON of the tensor at ``prefix``.

    Raises:
        CorruptFileError: if there is none, or it does not say what a tensor needs.
    """
    keys = [key for key in entries if key.startswith(f"{prefix}.{_STATE}")]
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
    if dtype not in DTYPES or min(shape, default=0) < 0 or nested != NESTED_BLOCKSIZE:
        msg = (
            f"{keys[0]}: dtype {dtype!r}, shape {shape}, nested_blocksize {nested}: allowed are "
            f"{', '.join(DTYPES)}, sizes of 0 or more, {NESTED_BLOCKSIZE}"
        )
        raise CorruptFileError(msg)
    return {"format": fmt, "shape": shape, "dtype": getattr(torch, dtype), "offset": offset}


def unflatten(entries: Mapping[str, Tensor], prefix: str) -> QuantizedTensor:
    """The tensor at ``prefix``, sharing the entries' memory where it can.

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
    packed_dtype = torch.uint8 if fmt.bits == 4 else torch.int8
    absmax_dtype = torch.uint8 if fmt.double_quant else torch.float32

    def entry(name: str, size: int, dtype: torch.dtype) -> Tensor:
        key = f"{prefix}.{name}" if name else prefix
        found = entries.get(key)
        if found is None:
            msg = f"{prefix}: missing {key}, which the state says is there"
            raise CorruptFileError(msg)
        if found.dtype != dtype or found.numel() != size:
            msg = f"{key}: got {found.numel()} x {found.dtype}, the state says {size} x {dtype}"
            raise CorruptFileError(msg)
        return found.reshape(-1)

    packed = entry("", fmt.packed_size(numel), packed_dtype)
    absmax = entry("absmax", fmt.num_blocks(numel), absmax_dtype)
    if fmt.code is not None:
        _check_table(entry("quant_map", 16, torch.float32), CODES[fmt.quant_type], prefix)
    nested_absmax = offset = None
    if fmt.double_quant:
        nested_absmax = entry("nested_absmax", fmt.num_nested(numel), torch.float32)
        finite = not has_data(nested_absmax) or bool(nested_absmax.isfinite().all())
        if not finite or not math.isfinite(state["offset"]):
            msg = f"{prefix}: NaN or infinity among its second-level scales or its offset"
            raise CorruptFileError(msg)
        _check_table(entry("nested_quant_map", 256, torch.float32), dynamic_code(), prefix)
        offset = torch.tensor([state["offset"]], dtype=torch.float32, device=packed.device)
    parts = Parts(packed, absmax, nested_absmax, offset)
    return QuantizedTensor.from_parts(parts, fmt, state["shape"], state["dtype"])


def _check_table(found: Tensor, expected: tuple[float, ...], prefix: str) -> None:
    if found.is_meta:
        return
    table = torch.tensor(expected, dtype=torch.float32)
    # 0.0 and -0.0 are both written for FP4's negative zero: compare values, not bits.
    if not torch.equal(found.cpu(), table):
        msg = f"{prefix}: its table of {len(expected)} codes is not the format's own"
        raise CorruptFileError(msg)
