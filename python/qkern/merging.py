"""Adapters merged into their quantized weights, and out again."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from qkern import shards
from qkern.adapted import Adapted, adapted_layers, holders
from qkern.adapter_holder import NamedAdapters
from qkern.codec import check_method
from qkern.errors import AdapterMismatchError, DeviceError, QkernError, ShapeError
from qkern.experts_lora import ExpertWeight
from qkern.formats import QuantFormat
from qkern.layers import QLoRALinear, QuantizedLinear
from qkern.merge_aware import check_settings, merged_weight
from qkern.merge_loss import MergedLayer, MergeLoss
from qkern.merge_sums import Squares, exact_sum, quantized_stack, squares_of, stack_without
from qkern.merge_target import MergeTarget
from qkern.ops import has_data
from qkern.tensor import QuantizedTensor
from qkern.undo import replace, take_back

# What merging calls its addition to a weight.
_MERGED = "adapter"


def merge_adapter(
    model: nn.Module, *, method: str = "absmax", min_kept: float | None = None
) -> MergeLoss:
    """Add every adapter to its quantized weight; ``unmerge_adapter`` restores the bytes.

    It is the active adapter that is merged. The base in its dtype and what the adapter adds are
    added in fp32, and the sum is quantized again: to the weight's own format, which loses a part of
    a small adapter, or to what ``merge_into`` names: such a layer has been multiplying the result
    all along, and nothing is lost.

    Args:
        model: with adapters.
        method: "absmax" or "search" (4-bit only), how codes are chosen, see ``qkern.quantize``;
            a layer with ``merge_into`` has its own.
        min_kept: least share of what the adapters add that must be left, 0 to 1; None for any.

    Returns:
        How much of each adapter is kept: ``1 - ||result - exact|| / ||delta||``, as
        ``merge_checkpoint`` tells it; ``print`` shows it as a table.

    Raises:
        AdapterMismatchError: if no adapter is active, one is merged already, or several are in use
            (``qkern.adapter_rows``).
        NonFiniteError: if an adapter holds NaN or infinity; nothing is merged then.
        LostDeltaError: if less than ``min_kept`` would be left; nothing is merged then.
        FormatError: for an unknown method, and for settings that ``merge_into`` has not; nothing is
            merged then.
        ShapeError: for a shard of a weight; nothing is merged then.
        DeviceError: if an adapter is on another device than its weight, or both are on meta;
            nothing is merged then.
    """
    done: list[Adapted] = []
    rows: list[MergedLayer] = []
    try:
        for name, layer in _in_state(model, merged=False).items():
            try:
                rows.append(_merge(name, layer, method))
            except QkernError as error:
                msg = f"{name}: {error}; nothing was merged"
                raise type(error)(msg) from error
            layer.merged = True
            done.append(layer)
        loss = MergeLoss(tuple(rows))
        if min_kept is not None:
            loss.check(min_kept)
    except BaseException:
        for layer in done:
            _take_out(layer)
        raise
    return loss


def unmerge_adapter(model: nn.Module) -> None:
    """Take merged adapters out again; the bytes are those of before the merge.

    That holds through copies, casts and moves of the model. Where something else has written to a
    weight since, it leaves an ordinary subtraction, quantized again.

    Raises:
        AdapterMismatchError: if there is no adapter, or one is not merged.
    """
    for layer in _in_state(model, merged=True).values():
        _take_out(layer)


def set_merge_into(model: nn.Module, merge_into: str | QuantFormat | MergeTarget | None) -> None:
    """Train a model's active adapter for a merge from now on, or with None no longer.

    A large adapter gets farther if the first half of its training is an ordinary one, a small one
    if all of it is for the merge: see docs/merging.md.

    Args:
        model: with adapters.
        merge_into: "nf4", a ``QuantFormat`` or a ``MergeTarget``, see ``QLoRALinear``.

    Raises:
        AdapterMismatchError: if no adapter is active, one is merged, or several are in use
            (``qkern.adapter_rows``).
        FormatError: for an unknown format, and for adapters with ``lora_dropout``, DoRA or
            ``lora_mode="merged"``; nothing is changed then.
    """
    targets = []
    for name, layer in _in_state(model, merged=False).items():
        adapter = layer.active()
        try:
            target = layer.target_of(adapter, merge_into)
        except QkernError as error:
            msg = f"{name}: {error}"
            raise type(error)(msg) from error
        targets.append((adapter, target))
    for adapter, target in targets:
        adapter.merge_into = target


def _merge(name: str, layer: Adapted, method: str) -> MergedLayer:
    """Quantize a layer's weight with its adapter into the weight."""
    check_place(layer)
    if isinstance(layer, ExpertWeight):
        merged, squares = quantized_stack(layer, method)
    else:
        merged, squares = _quantized(layer, method)
    replace(layer.quantized_weight, merged, _MERGED)
    return merged_row(name, layer, merged.format.quant_type, squares)


def _quantized(layer: QLoRALinear, method: str) -> tuple[QuantizedTensor, Squares]:
    """A layer's weight with the adapter in it, and what became of that."""
    weight, delta = layer.quantized_weight, layer.delta().float()
    merged = aware_weight(layer)
    if merged is not None:
        exact = merged.dequantize(torch.float32)
    else:
        exact = exact_sum(weight, delta)
        check_method(method, weight.format, has_importance=False)
        merged = weight  # if nothing is added: quantizing the same again would change bytes
        if bool(delta.any()):
            merged = QuantizedTensor.from_dense(exact, weight.format, method=method)
    return merged, squares_of(exact, merged.dequantize(torch.float32), delta)


def aware_weight(layer: QLoRALinear) -> QuantizedTensor | None:
    """What a layer that is trained for its merge multiplies; None for any other."""
    if layer.merge_into is None:
        return None
    check_settings(layer.active(), layer.lora_mode)
    adapter = (layer.lora_A, layer.lora_B, layer.scaling)
    return merged_weight(layer.quantized_weight, *adapter, layer.merge_into)


def merged_row(name: str, layer: Adapted, into: str, squares: Squares) -> MergedLayer:
    """What a report says of a layer whose adapter was merged."""
    adapter = layer.active()
    is_aware = layer.merge_into is not None
    return MergedLayer(name, adapter.r, adapter.scaling, into, is_aware, *squares)


def check_place(layer: QuantizedLinear | ExpertWeight) -> None:
    """Refuse what is not here as a whole, and an adapter that is not where its weight is.

    Raises:
        ShapeError: for a shard.
        DeviceError: for an active adapter that is elsewhere, or without values.
    """
    if shards.is_sharded(layer.weight) or not layer.quantized_weight.is_whole:
        msg = "a merge needs the whole weight, this is one rank's shard: gather it first"
        raise ShapeError(msg)
    adapter = layer.adapter if isinstance(layer, Adapted) else None
    if adapter is None:
        return
    here, devices = layer.weight.device, {adapter.lora_A.device, adapter.lora_B.device}
    if devices != {here} or here.type == "meta":
        found = ", ".join(sorted(map(str, devices)))
        msg = (
            f"its weight is on {here}, its adapter on {found}: a merge needs both on one device "
            "that holds values; move the model with .to()"
        )
        raise DeviceError(msg)


def check_rows(held: Iterable[NamedAdapters]) -> None:
    """Refuse to merge one adapter while rows of a batch have others."""
    if any(holder.rows is not None for holder in held):
        msg = "rows of a batch have adapters of their own: leave qkern.adapter_rows first"
        raise AdapterMismatchError(msg)


def _take_out(layer: Adapted) -> None:
    weight = layer.quantized_weight
    if not take_back(weight, _MERGED):
        if isinstance(layer, ExpertWeight):
            replace(weight, stack_without(layer), "")
        else:
            weight.data.sub_(layer.delta().to(weight.dtype))
    layer.merged = False


def _in_state(model: nn.Module, *, merged: bool) -> dict[str, Adapted]:
    found = dict(adapted_layers(model))
    layers = {name: layer for name, layer in found.items() if layer.adapter is not None}
    check_rows(holders(model))
    wrong = [name for name, layer in layers.items() if layer.merged is not merged]
    if not layers or wrong:
        what = "not merged" if merged else "merged already"
        msg = f"{wrong[0]} is {what}" if wrong else "the model has no adapter, or none is active"
        raise AdapterMismatchError(msg)
    return layers


def unmerged_parts(layer: QuantizedLinear | ExpertWeight) -> tuple[Tensor | None, ...] | None:
    """Codes and scales without a merged adapter; None if they are not here as a whole, or lost."""
    weight = layer.weight
    if shards.is_sharded(weight) or not has_data(layer.quantized_weight.packed):
        return None
    if not getattr(layer, "merged", False):
        return layer.quantized_weight.parts
    undo = layer.quantized_weight.undo
    return undo.parts if undo.label == _MERGED else None


def unmerged_format(layer: QuantizedLinear | ExpertWeight) -> QuantFormat:
    """The format of these parts."""
    weight: QuantizedTensor = shards.local_part(layer.weight)
    merged = getattr(layer, "merged", False) and weight.undo.label == _MERGED
    return (weight.undo.format if merged else None) or weight.format
