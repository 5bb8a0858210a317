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

import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qkern import entry_keys
from qkern.entry_keys import Described, State, missing_keys, owned_keys, prefixes, scales_key
from qkern.formats import NESTED_BLOCKSIZE, dynamic_code
from qkern.ops import has_data
from qkern.reference import Parts
from qkern.tensor import QuantizedTensor

__all__ = [
    "companions",
    "flatten",
    "known_keys",
    "missing_keys",
    "owned_keys",
    "prefixes",
    "read_state",
    "scales_key",
    "unflatten",
]


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
    return {prefix: packed, entry_keys.scales_key(prefix, fmt): absmax} | companions(q, prefix)


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
        entries[entry_keys.sibling(prefix, entry_keys.LAYOUT)] = torch.tensor(
            0, dtype=torch.uint8, device="cpu"
        )
    else:
        entries[f"{prefix}.{entry_keys.STATE}{fmt.kind.state}"] = _json(q)
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


def known_keys(q: QuantizedTensor, prefix: str) -> set[str]:
    """Keys that a file may hold for ``q``, with 8-bit scales or without."""
    keys = {prefix, entry_keys.scales_key(prefix, q.format), *companions(q, prefix)}
    if "nested" in q.format.kind.scales:
        keys |= {f"{prefix}.nested_absmax", f"{prefix}.nested_quant_map"}
    return keys


def read_state(entries: Mapping[str, Tensor], prefix: str) -> State:
    """Format, shape, dtype (None if not said) and offset of the tensor at ``prefix``, checked.

    Raises:
        CorruptFileError: if the entries do not say what a tensor needs, or contradict each other.
    """
    return entry_keys.read_state(_Described(entries), prefix)


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
    described = _Described(entries)
    state = entry_keys.read_state(described, prefix)
    entry_keys.check_parts(described, prefix, state)
    fmt = state.format
    packed = entries[prefix].reshape(-1)
    if fmt.bits == 4:  # whatever bitsandbytes' quant_storage calls the bytes
        packed = packed.view(torch.uint8)
    absmax = _aligned(entries[scales_key(prefix, fmt)].reshape(-1))
    if 0 in state.shape:  # rows without values have scales in a file
        absmax = absmax[:0]
    nested_absmax = offset = None
    if fmt.double_quant:
        nested_absmax = _aligned(entries[f"{prefix}.nested_absmax"].reshape(-1))
        offset = torch.tensor([state.offset], dtype=torch.float32, device=packed.device)
    parts = Parts(packed, absmax, nested_absmax, offset)
    named = dtype if state.dtype is None else getattr(torch, state.dtype)
    return QuantizedTensor.from_parts(parts, fmt, state.shape, named)


class _Described(Mapping[str, Described]):
    """Torch tensors as the checks see them, each when it is asked for."""

    def __init__(self, entries: Mapping[str, Tensor]) -> None:
        self._entries = entries

    def __getitem__(self, key: str) -> Described:
        entry = self._entries[key]
        dtype = str(entry.dtype).removeprefix("torch.")
        return Described(dtype, tuple(entry.shape), functools.partial(_values, entry))

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _aligned(entry: Tensor) -> Tensor:
    """The entry, or a copy: in a mapped file it may begin at any byte."""
    aligned = not has_data(entry) or entry.data_ptr() % entry.element_size() == 0
    return entry if aligned else entry.clone()


def _values(entry: Tensor) -> np.ndarray[Any, Any] | None:
    return entry.detach().cpu().numpy() if has_data(entry) else None
