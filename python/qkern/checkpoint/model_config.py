"""What ``config.json`` says of a converted checkpoint, and what it must not have said before.

No torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

from qkern.adapter_files import kept_with_base
from qkern.checkpoint.output_files import quantization_entries
from qkern.checkpoint.output_plan import OutputPlan
from qkern.checkpoint.source import Source
from qkern.errors import FormatError
from qkern.formats import DTYPES, QuantFormat

QUANTIZATION: Final = "quantization_config"
# Methods whose files are read: their keys say what they hold.
_KNOWN: Final = ("bitsandbytes", "qkern", None)
# What bitsandbytes' entries say of the bytes; the others are wishes of the user, and stay.
_BYTES: Final = (
    *("quant_method", "load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit"),
    *("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_quant_storage"),
)


def quantization_method(config: Mapping[str, Any]) -> str | None:
    """Who quantized a checkpoint, as its ``config.json`` says; None if it does not."""
    found = config.get(QUANTIZATION)
    if not found:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else found
    return method if method is None else str(method)


def refuse_foreign(source: Source, known: Collection[str] = ()) -> None:
    """Refuse checkpoints quantized in a way that is not read here, or with an adapter in them.

    Args:
        source: the checkpoint.
        known: methods that the caller reads, beside bitsandbytes and qkern.

    Raises:
        FormatError: naming the method, or the adapter, which nothing would add to the result.
    """
    advice = kept_with_base(source.tensors)
    if advice:
        msg = f"{source.path}: {advice}"
        raise FormatError(msg)
    method = quantization_method(source.config)
    if method not in (*_KNOWN, *known):
        msg = (
            f"{source.path}: config.json says that it was quantized by {method!r}, which is not "
            "read here: bitsandbytes and qkern are; start from its dense model"
        )
        raise FormatError(msg)


def main_dtype(source: Source) -> str:
    """The dtype that most values have, quantized ones with that of their dense tensor."""
    counts = dict.fromkeys(DTYPES, 0)
    for tensor in source.tensors.values():
        if tensor.dtype in counts:
            counts[tensor.dtype] += tensor.numel
    return max(counts, key=lambda dtype: counts[dtype])


def main_format(plan: OutputPlan) -> QuantFormat | None:
    """The format, before ``for_shape``, that most values of a result have; None if none has one."""
    counts: dict[QuantFormat, int] = {}
    for outcome in plan.outcomes:
        if outcome.format is not None:
            fmt = outcome.format.template
            counts[fmt] = counts.get(fmt, 0) + outcome.tensor.numel
    return max(counts, key=lambda fmt: counts[fmt], default=None)


def dense_config(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Of a checkpoint whose weights became ``dtype``."""
    content = _with_dtype(config, dtype)
    content.pop(QUANTIZATION, None)
    if not {"dtype", "torch_dtype"} & set(content):
        content["dtype"] = dtype
    return content


def quantized_config(plan: OutputPlan) -> dict[str, Any]:
    """Of a checkpoint whose weights stay quantized."""
    config, fmt = plan.source.config, main_format(plan)
    if fmt is None:
        return dict(config)
    entries = quantization_entries(plan, fmt)
    before, after = config.get(QUANTIZATION), entries[QUANTIZATION]
    same = quantization_method(config) == after["quant_method"] == "bitsandbytes"
    if same and isinstance(before, dict):
        entries[QUANTIZATION] = after | {k: v for k, v in before.items() if k not in _BYTES}
    return dict(config) | entries


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A configuration and its parts (of text, of vision) that say a dtype, with another one."""
    content = dict(config)
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and value in DTYPES:
            content[key] = dtype
        elif isinstance(value, dict) and key.endswith("_config") and key != QUANTIZATION:
            content[key] = _with_dtype(value, dtype)
    return content
