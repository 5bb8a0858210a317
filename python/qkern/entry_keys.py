"""The flat entries of a quantized tensor: their keys, and the checks of what they say. No torch.

The keys are listed in ``flat_keys``, which makes these entries of torch tensors. Here an entry is a
dtype, a shape and, for the few that the checks read, values: so files are checked by the same lines
as state dicts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from qkern.errors import CorruptFileError, QkernError
from qkern.formats import DTYPES, KINDS, NESTED_BLOCKSIZE, QuantFormat, dynamic_code

STATE: Final = "quant_state."
WEIGHT: Final = "weight"
SCALES: Final = "SCB"
LAYOUT: Final = "weight_format"
# What packed 4-bit codes may be called: bitsandbytes' quant_storage, the same bytes.
STORAGE: Final = {
    "uint8": 1,
    "int8": 1,
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "float64": 8,
}
_ROWS: Final = QuantFormat("int8_row", 0)
_COMPANIONS: Final = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_NEEDED: Final = ("quant_type", "blocksize", "dtype", "shape")
_NESTED: Final = ("nested_blocksize", "nested_dtype", "nested_offset")
_LONGEST_STATE: Final = 65536  # bytes of JSON; written are about 200
_MOST_DIMENSIONS: Final = 64
_FLOAT32_MAX: Final = float(np.finfo(np.float32).max)
_LARGEST: Final = 2**63 - 1  # sizes and counts are signed 64-bit numbers


class Described(NamedTuple):
    """An entry as the checks see it.

    Args:
        dtype: torch's name.
        shape: of the entry itself.
        values: gives them as they are stored, None for a tensor on meta; asked of small entries.
    """

    dtype: str
    shape: tuple[int, ...]
    values: Callable[[], npt.NDArray[Any] | None]

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


class State(NamedTuple):
    """What the entries say of a quantized tensor.

    Args:
        format: after ``for_shape``.
        shape: of the dense tensor.
        dtype: of the dense tensor; None where the entries do not say (int8 rows).
        offset: of double-quantized scales.
    """

    format: QuantFormat
    shape: tuple[int, ...]
    dtype: str | None
    offset: float


def sibling(prefix: str, name: str) -> str:
    """The key ``name`` in the module whose parameter is at ``prefix``."""
    module, dot, _ = prefix.rpartition(".")
    return f"{module}{dot}{name}"


def scales_key(prefix: str, fmt: QuantFormat) -> str:
    """The key of the scales."""
    return sibling(prefix, SCALES) if fmt.kind.state is None else f"{prefix}.absmax"


def prefixes(keys: Iterable[str]) -> list[str]:
    """The prefixes of the quantized tensors that ``keys`` speak of, each once."""
    found: dict[str, None] = {}
    for key in keys:
        prefix = _state_prefix(key)
        if prefix:
            found[prefix] = None
        elif key.rpartition(".")[2] in (SCALES, LAYOUT):
            found[sibling(key, WEIGHT)] = None
    return list(found)


def owner(key: str) -> str:
    """The prefix of the tensor that ``key`` would belong to if that one is quantized."""
    prefix = _state_prefix(key)
    if prefix:
        return prefix
    parent, _, last = key.rpartition(".")
    if last in (SCALES, LAYOUT):
        return sibling(key, WEIGHT)
    return parent if last in _COMPANIONS else key


def _state_prefix(key: str) -> str:
    """The prefix of the JSON entry ``key``; empty for other keys.

    A module may be called ``quant_state`` itself.
    """
    prefix, _, last = key.rpartition(f".{STATE}")
    return prefix if last.startswith(("bitsandbytes__", "qkern__")) else ""


def owned_keys(entries: Mapping[str, Any], prefix: str) -> list[str]:
    """Keys of ``entries`` that belong to the tensor at ``prefix``."""
    whole = (prefix, sibling(prefix, SCALES), sibling(prefix, LAYOUT))
    return [key for key in entries if key in whole or key.startswith(f"{prefix}.")]


def missing_keys(entries: Mapping[str, Any], prefix: str, fmt: QuantFormat) -> list[str]:
    """Keys that a tensor of ``fmt`` needs and ``entries`` does not have."""
    names = [] if fmt.kind.state is None else [f"{STATE}{fmt.kind.state}"]
    if fmt.code is not None:
        names.append("quant_map")
    nested = ["nested_absmax", "nested_quant_map"]
    if "nested" in fmt.kind.scales and any(f"{prefix}.{name}" in entries for name in nested):
        names += nested
    wanted = [prefix, scales_key(prefix, fmt), *(f"{prefix}.{name}" for name in names)]
    return [key for key in wanted if key not in entries]


def read_state(entries: Mapping[str, Described], prefix: str) -> State:
    """What the entries say of the tensor at ``prefix``, each value checked by itself.

    Raises:
        CorruptFileError: if they do not say what a tensor needs, or contradict each other.
    """
    keys = [key for key in entries if key.startswith(f"{prefix}.{STATE}")]
    if not keys and any(sibling(prefix, name) in entries for name in (SCALES, LAYOUT)):
        return _read_rows(entries, prefix)
    if len(keys) != 1:
        msg = f"{prefix}: exactly one {prefix}.{STATE}* entry is needed, found {len(keys)}"
        raise CorruptFileError(msg)
    key = keys[0]
    state = _read_json(entries[key], key)
    try:
        fmt = QuantFormat(state["quant_type"], state["blocksize"], "nested_offset" in state)
    except QkernError as error:
        msg = f"{key}: not a readable quantization state: {str(error)[:200]}"
        raise CorruptFileError(msg) from error
    shape, dtype = state["shape"], state["dtype"]
    nested = state.get("nested_blocksize", NESTED_BLOCKSIZE), state.get("nested_dtype", "float32")
    if fmt.kind.state is None:
        msg = f"{key}: {fmt.quant_type} has no quantization state, but the key {SCALES}"
        raise CorruptFileError(msg)
    if not _is_shape(shape) or dtype not in DTYPES or nested != (NESTED_BLOCKSIZE, "float32"):
        msg = (
            f"{key}: dtype {_short(dtype)}, shape {_short(shape)}, nested_blocksize, nested_dtype "
            f"{_short(nested)}: allowed are {', '.join(DTYPES)}; sizes of 0 or more; "
            f"{NESTED_BLOCKSIZE} and float32"
        )
        raise CorruptFileError(msg)
    offset = state.get("nested_offset", 0.0)
    if type(offset) not in (int, float) or not abs(offset) <= _FLOAT32_MAX:
        msg = f"{key}: nested_offset {_short(offset)}: NaN, infinity or no number"
        raise CorruptFileError(msg)
    return State(fmt, tuple(shape), dtype, float(offset))


def _read_json(entry: Described, key: str) -> dict[str, Any]:
    """The object in a state's entry: the fields that are known, each once."""
    if entry.dtype != "uint8" or entry.numel > _LONGEST_STATE:
        msg = (
            f"{key}: not a readable quantization state: got {entry.numel} x {entry.dtype}, JSON "
            f"as uint8 is needed, {_LONGEST_STATE} bytes at most"
        )
        raise CorruptFileError(msg)
    values = entry.values()
    try:
        if values is None:
            msg = "it is on meta and has no content"
            raise ValueError(msg)  # noqa: TRY301 - named below, like every other reason
        state = json.loads(values.tobytes(), object_pairs_hook=_once)
        if not isinstance(state, dict):
            msg = f"it is a JSON {type(state).__name__}, an object is needed"
            raise TypeError(msg)  # noqa: TRY301
    except (ValueError, TypeError, RecursionError) as error:
        msg = f"{key}: not a readable quantization state: {error}"
        raise CorruptFileError(msg) from error
    missing = [name for name in _NEEDED if name not in state]
    if missing:
        msg = f"{key}: not a readable quantization state: {', '.join(missing)} missing"
        raise CorruptFileError(msg)
    unknown = sorted(set(state).difference(_NEEDED, _NESTED))
    quant_type = state["quant_type"]
    named = type(quant_type) is str
    if unknown or (named and quant_type not in KINDS):
        from qkern import __version__

        what = f"field {_short(unknown[0])}" if unknown else f"quant_type {_short(quant_type)}"
        msg = (
            f"{key}: {what} is not known here: made by a newer qkern or bitsandbytes? qkern "
            f"{__version__} knows {', '.join(KINDS)}, and the fields "
            f"{', '.join(_NEEDED + _NESTED)}"
        )
        raise CorruptFileError(msg)
    if not named:
        msg = f"{key}: not a readable quantization state: quant_type {_short(quant_type)}"
        raise CorruptFileError(msg)
    return state


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        msg = "a key stands there twice"
        raise ValueError(msg)
    return content


def _is_shape(shape: object) -> bool:
    if not isinstance(shape, list) or len(shape) > _MOST_DIMENSIONS:
        return False
    # A bool is an int in Python; 64.5 would be cut to 64.
    sizes = all(type(size) is int and 0 <= size <= _LARGEST for size in shape)
    return sizes and math.prod(shape) <= _LARGEST


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _read_rows(entries: Mapping[str, Described], prefix: str) -> State:
    """The same of bitsandbytes' int8 entries."""
    missing = missing_keys(entries, prefix, _ROWS)
    if missing:
        msg = f"{prefix}: missing {', '.join(missing)}: int8 rows are codes and scales"
        raise CorruptFileError(msg)
    _check_layout(entries, sibling(prefix, LAYOUT))
    weight, scales_at = entries[prefix], scales_key(prefix, _ROWS)
    scales, rows = entries[scales_at], math.prod(weight.shape[:-1])
    if weight.dtype != "int8" or len(weight.shape) < 2:
        msg = f"{prefix}: got {weight.dtype} {list(weight.shape)}, int8 (out, in) is needed"
        raise CorruptFileError(msg)
    if scales.dtype != "float32" or scales.numel != rows:
        msg = (
            f"{scales_at}: got {scales.dtype} {list(scales.shape)}, float32 ({rows},) is needed "
            f"for the rows of {prefix}"
        )
        raise CorruptFileError(msg)
    return State(_ROWS.for_shape(weight.shape), weight.shape, None, 0.0)


def _check_layout(entries: Mapping[str, Described], key: str) -> None:
    layout = entries.get(key)
    if layout is None:  # bitsandbytes wrote no weight_format once, and means rows by that
        return
    values = layout.values() if layout.numel == 1 else np.full(2, -1)
    if values is None:
        return
    found = values.reshape(-1).tolist()
    if found != [0]:
        got = found[0] if layout.numel == 1 else f"{layout.numel} values"
        msg = (
            f"{key}: got {got}, only 0 (rows) can be read: 1 to 3 are layouts "
            "of old versions of bitsandbytes; quantize the dense model again"
        )
        raise CorruptFileError(msg)


def check_parts(entries: Mapping[str, Described], prefix: str, state: State) -> None:
    """Check the entries of the tensor at ``prefix`` against what they say themselves.

    Dtypes and sizes of all; the tables, and whether second-level scales are finite, by value.

    Raises:
        CorruptFileError: if an entry is missing, has another size or dtype than ``state`` says,
            or holds a table that is not the format's.
    """
    fmt, numel = state.format, math.prod(state.shape)
    missing = missing_keys(entries, prefix, fmt)
    if missing:
        msg = f"{prefix}: missing {', '.join(missing)}"
        raise CorruptFileError(msg)

    def check(key: str, size: int, dtype: str) -> Described:
        found = entries.get(key)
        if found is None:
            msg = f"{prefix}: missing {key}, which the state says is there"
            raise CorruptFileError(msg)
        if found.dtype != dtype or found.numel != size:
            msg = f"{key}: got {found.numel} x {found.dtype}, the state says {size} x {dtype}"
            raise CorruptFileError(msg)
        return found

    packed, size = entries[prefix], fmt.packed_size(numel)
    if fmt.bits == 8 or packed.numel * STORAGE.get(packed.dtype, 0) != size:
        check(prefix, size, fmt.packed_dtype)
    if numel or fmt.kind.state is not None:  # else rows without values: their scales are unused
        absmax_dtype = "uint8" if fmt.double_quant else "float32"
        check(scales_key(prefix, fmt), fmt.num_blocks(numel), absmax_dtype)
    if fmt.code is not None:
        _check_table(check(f"{prefix}.quant_map", len(fmt.code), "float32"), fmt.code, prefix)
    if fmt.double_quant:
        second = check(f"{prefix}.nested_absmax", fmt.num_nested(numel), "float32").values()
        if second is not None and not np.isfinite(second).all():
            msg = f"{prefix}: NaN or infinity among its second-level scales"
            raise CorruptFileError(msg)
        code = dynamic_code()
        _check_table(check(f"{prefix}.nested_quant_map", len(code), "float32"), code, prefix)


def _check_table(found: Described, expected: tuple[float, ...], prefix: str) -> None:
    table = found.values()
    # 0.0 and -0.0 are both written for FP4's negative zero: compare values, not bits.
    if table is not None and not np.array_equal(table.reshape(-1), np.array(expected, np.float32)):
        msg = f"{prefix}: its table of {len(expected)} codes is not the format's own"
        raise CorruptFileError(msg)
