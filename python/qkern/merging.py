"""Adapters merged into their quantized weights, and taken out again."""

from __future__ import annotations

from torch import Tensor, nn

from qkern import shards
from qkern.adapted import adapted_layers
from qkern.errors import AdapterMismatchError, DeviceError, QkernError
from qkern.layers import QLoRALinear, QuantizedLinear
from qkern.ops import has_data
from qkern.tensor_dispatch import take_back

# What merging calls its addition to a weight.
_MERGED = "adapter"


def merge_adapter(model: nn.Module) -> None:
    """Add every adapter to its quantized weight; ``unmerge_adapter`` restores the bytes.

    It is the active adapter that is merged. The sum is quantized again, which loses a part of a
    small adapter.

    Raises:
        AdapterMismatchError: if no adapter is active, one is merged already, or several are in use
            (``qkern.adapter_rows``).
        NonFiniteError: if an adapter holds NaN or infinity; nothing is merged then.
        FormatError: if 8-bit scales cannot hold a sum; nothing is merged then.
        DeviceError: if an adapter is on another device than its weight, or both are on meta.
    """
    done: list[QLoRALinear] = []
    for name, layer in _in_state(model, merged=False).items():
        try:
            _check_device(layer)
            layer.weight.data.add_(layer.delta().to(layer.weight.dtype))
            layer.quantized_weight.undo.label = _MERGED
        except QkernError as error:
            for merged in done:
                _take_out(merged)
            msg = f"{name}: {error}; nothing was merged"
            raise type(error)(msg) from error
        layer.merged = True
        done.append(layer)


def _check_device(layer: QLoRALinear) -> None:
    here, devices = layer.weight.device, {layer.lora_A.device, layer.lora_B.device}
    if devices != {here} or here.type == "meta":
        found = ", ".join(sorted(map(str, devices)))
        msg = (
            f"its weight is on {here}, its adapter on {found}: a merge needs both on one device "
            "that holds values; move the model with .to()"
        )
        raise DeviceError(msg)


def unmerge_adapter(model: nn.Module) -> None:
    """Take merged adapters out again; the bytes are those of before the merge.

    That holds through copies, casts and moves of the model. Where something else has written to a
    weight since, it leaves an ordinary subtraction, quantized again.

    Raises:
        AdapterMismatchError: if there is no adapter, or one is not merged.
    """
    for layer in _in_state(model, merged=True).values():
        _take_out(layer)


def _take_out(layer: QLoRALinear) -> None:
    if not take_back(layer.quantized_weight, _MERGED):
        layer.weight.data.sub_(layer.delta().to(layer.weight.dtype))
    layer.merged = False


def _in_state(model: nn.Module, *, merged: bool) -> dict[str, QLoRALinear]:
    found = dict(adapted_layers(model))
    layers = {name: layer for name, layer in found.items() if layer.adapter is not None}
    if any(layer.rows is not None for layer in found.values()):
        msg = "rows of a batch have adapters of their own: leave qkern.adapter_rows first"
        raise AdapterMismatchError(msg)
    wrong = [name for name, layer in layers.items() if layer.merged is not merged]
    if not layers or wrong:
        what = "not merged" if merged else "merged already"
        msg = f"{wrong[0]} is {what}" if wrong else "the model has no adapter, or none is active"
        raise AdapterMismatchError(msg)
    return layers


def unmerged_parts(layer: QuantizedLinear) -> tuple[Tensor | None, ...] | None:
    """Codes and scales without a merged adapter; None if they are not here as a whole, or lost."""
    weight = layer.weight
    if shards.is_sharded(weight) or not has_data(layer.quantized_weight.packed):
        return None
    if not getattr(layer, "merged", False):
        return layer.quantized_weight.parts
    undo = layer.quantized_weight.undo
    return undo.parts if undo.label == _MERGED else None
