"""Adapters merged into their weights: quantized ones, and out again; or dense ones."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from qkern import shards
from qkern.codec import check_method
from qkern.errors import AdapterMismatchError, FormatError, NonFiniteError, QkernError, ShapeError
from qkern.formats import QuantFormat
from qkern.layers import HOOKS, QLoRALinear, QuantizedLinear
from qkern.merge_aware import check_settings, merged_weight, resolve_target
from qkern.merge_loss import MergedLayer, MergeLoss
from qkern.merge_target import MergeTarget
from qkern.model import adapted_layers
from qkern.module_tree import module_at, module_paths, replace_module
from qkern.ops import has_data
from qkern.tensor import QuantizedTensor
from qkern.tensor_dispatch import replace, take_back

# What merging calls its addition to a weight.
_MERGED = "adapter"


def merge_adapter(
    model: nn.Module, *, method: str = "absmax", min_kept: float | None = None
) -> MergeLoss:
    """Add every adapter to its quantized weight; ``unmerge_adapter`` restores the bytes.

    The base in its dtype and ``scaling * B A`` are added in fp32, and the sum is quantized again:
    to the weight's own format, which loses a part of a small adapter, or to what ``merge_into``
    names: such a layer has been multiplying the result all along, and nothing is lost.

    Args:
        model: with adapters.
        method: "absmax" or "search" (4-bit only), how codes are chosen, see ``qkern.quantize``;
            a layer with ``merge_into`` has its own.
        min_kept: least share of what the adapters add that must be left, 0 to 1; None for any.

    Returns:
        How much of each adapter is kept: ``1 - ||result - exact|| / ||delta||``, as
        ``merge_checkpoint`` tells it; ``print`` shows it as a table.

    Raises:
        AdapterMismatchError: if there is no adapter, or one is merged already.
        NonFiniteError: if an adapter holds NaN or infinity; nothing is merged then.
        LostDeltaError: if less than ``min_kept`` would be left; nothing is merged then.
        FormatError: for an unknown method; nothing is merged then.
        ShapeError: for a shard of a weight; nothing is merged then.
    """
    done: list[QLoRALinear] = []
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
    """Train a model's adapters for a merge from now on, or with None no longer.

    A large adapter gets farther if the first half of its training is an ordinary one, a small one
    if all of it is for the merge: see docs/merging.md.

    Args:
        model: with adapters.
        merge_into: "nf4", a ``QuantFormat`` or a ``MergeTarget``, see ``QLoRALinear``.

    Raises:
        AdapterMismatchError: if there is no adapter, or one is merged.
        FormatError: for an unknown format, and for layers with ``lora_dropout`` or
            ``lora_mode="merged"``; nothing is changed then.
    """
    targets = []
    for name, layer in _in_state(model, merged=False).items():
        try:
            target = resolve_target(merge_into, layer.quantized_weight)
            if target is not None:
                check_settings(layer.lora_dropout, layer.lora_mode)
        except QkernError as error:
            msg = f"{name}: {error}"
            raise type(error)(msg) from error
        targets.append((layer, target))
    for layer, target in targets:
        layer.merge_into = target


def merge_to_dense(model: nn.Module, *, dtype: torch.dtype | None = None) -> MergeLoss:
    """Replace every quantized layer by a plain ``nn.Linear`` with its adapter in it, in place.

    The base in its dtype, exactly as it was trained over, and ``scaling * B A`` are added in fp32
    and rounded once; a layer with ``merge_into`` becomes the rounded weight that it multiplies.
    Nothing undoes it. Layer by layer, so that only one is there twice.

    Args:
        model: after ``quantize_model``, with or without adapters.
        dtype: float32, float16 or bfloat16 of the weights and their biases; None for what each
            weight reports, so that the model goes on as it is.

    Returns:
        How much of each adapter the rounding kept, see ``merge_adapter``.

    Raises:
        AdapterMismatchError: if an adapter is merged: call ``unmerge_adapter`` first.
        FormatError: if there is no quantized layer, or the model is a single one, which cannot be
            replaced in place: its ``dequantize()`` makes a dense one.
        NonFiniteError: if an adapter holds NaN or infinity, or float16 cannot hold a sum.
        ShapeError: for a shard of a weight.
    """
    found = [(names, m) for m, names in module_paths(model) if isinstance(m, QuantizedLinear)]
    if not found or found[0][0][0] == "":
        msg = "the model is a single layer" if found else "the model has no quantized layer"
        raise FormatError(msg)
    for names, layer in found:
        _check_whole(names[0], layer)
        if isinstance(layer, QLoRALinear) and layer.merged:
            msg = f"{names[0]} is merged already: call qkern.unmerge_adapter first"
            raise AdapterMismatchError(msg)
    paths = [names for names, _ in found]
    del found, layer
    rows = []
    for names in paths:
        try:
            dense, row = _dense(
                names[0], cast("QuantizedLinear", module_at(model, names[0])), dtype
            )
        except QkernError as error:
            msg = f"{names[0]}: {error}; layers before it are dense already"
            raise type(error)(msg) from error
        replace_module(model, names, dense)
        if row is not None:
            rows.append(row)
    return MergeLoss(tuple(rows))


def _merge(name: str, layer: QLoRALinear, method: str) -> MergedLayer:
    """Quantize a layer's weight with its adapter into the weight."""
    _check_whole(name, layer)
    weight, delta = layer.quantized_weight, layer.delta().float()
    merged = _aware_weight(layer)
    if merged is not None:
        exact = merged.dequantize(torch.float32)
    else:
        exact = _exact_sum(weight, delta)
        check_method(method, weight.format, has_importance=False)
        merged = weight  # if nothing is added: quantizing the same again would change bytes
        if bool(delta.any()):
            merged = QuantizedTensor.from_dense(exact, weight.format, method=method)
    row = _row(
        name, layer, merged.format.quant_type, merged.dequantize(torch.float32), exact, delta
    )
    replace(weight, merged, _MERGED)
    return row


def _dense(
    name: str, layer: QuantizedLinear, dtype: torch.dtype | None
) -> tuple[nn.Linear, MergedLayer | None]:
    """The dense layer, and what became of its adapter if it has one."""
    dtype = layer.weight.dtype if dtype is None else dtype
    dense, row = layer.dequantize(dtype), None
    if dense.bias is not None:
        dense.bias = nn.Parameter(dense.bias.to(dtype), requires_grad=False)
    if isinstance(layer, QLoRALinear):
        delta, merged = layer.delta().float(), _aware_weight(layer)
        if merged is None:
            exact = _exact_sum(layer.quantized_weight, delta)
        else:
            exact = merged.dequantize(torch.float32)
        values = exact.to(dtype)
        if not bool(values.isfinite().all()):
            fits = bool(exact.isfinite().all())
            why = f"{dtype} cannot hold it, bfloat16 can" if fits else "the adapter is not finite"
            msg = f"the weight with its adapter holds NaN or infinity: {why}"
            raise NonFiniteError(msg)
        dense.weight = nn.Parameter(values, requires_grad=False)
        row = _row(name, layer, str(dtype).removeprefix("torch."), values.float(), exact, delta)
    vars(dense).update({key: value for key, value in vars(layer).items() if key in HOOKS})
    return dense, row


def _exact_sum(weight: QuantizedTensor, delta: Tensor) -> Tensor:
    """The base in its dtype and the adapter's part, added in fp32."""
    dtype = torch.float32 if weight.dtype == torch.float64 else weight.dtype
    return weight.dequantize(dtype).float() + delta


def _aware_weight(layer: QLoRALinear) -> QuantizedTensor | None:
    """What a layer that is trained for its merge multiplies; None for any other."""
    if layer.merge_into is None:
        return None
    adapter = (layer.lora_A, layer.lora_B, layer.scaling)
    return merged_weight(layer.quantized_weight, *adapter, layer.merge_into)


def _row(
    name: str, layer: QLoRALinear, into: str, result: Tensor, exact: Tensor, delta: Tensor
) -> MergedLayer:
    norms = (
        torch.linalg.vector_norm(t, dtype=torch.float64) for t in (exact, result - exact, delta)
    )
    sums = (float(norm) ** 2 for norm in norms)
    return MergedLayer(name, layer.r, layer.scaling, into, layer.merge_into is not None, *sums)


def _check_whole(name: str, layer: QuantizedLinear) -> None:
    """Refuse what is not here as a whole."""
    if shards.is_sharded(layer.weight) or not layer.quantized_weight.is_whole:
        msg = f"{name}: a merge needs the whole weight, this is one rank's shard: gather it first"
        raise ShapeError(msg)


def _take_out(layer: QLoRALinear) -> None:
    if not take_back(layer.quantized_weight, _MERGED):
        layer.weight.data.sub_(layer.delta().to(layer.weight.dtype))
    layer.merged = False


def _in_state(model: nn.Module, *, merged: bool) -> dict[str, QLoRALinear]:
    layers = dict(adapted_layers(model))
    wrong = [name for name, layer in layers.items() if layer.merged is not merged]
    if not layers or wrong:
        what = "not merged" if merged else "merged already"
        msg = f"{wrong[0]} is {what}" if wrong else "the model has no adapter"
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


def unmerged_format(layer: QuantizedLinear) -> QuantFormat:
    """The format of these parts."""
    weight: QuantizedTensor = shards.local_part(layer.weight)
    merged = getattr(layer, "merged", False) and weight.undo.label == _MERGED
    return (weight.undo.format if merged else None) or weight.format
