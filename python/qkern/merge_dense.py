"""A quantized model made dense, with its adapter merged into its layers."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from qkern.adapted import Adapted, adapted_layers, holders
from qkern.errors import AdapterMismatchError, FormatError, QkernError
from qkern.experts import hold_dense
from qkern.experts_lora import ExpertWeight, QLoRAExperts, expert_weights
from qkern.flat_weight import FlatParameters
from qkern.layers import QLoRALinear, QuantizedLinear
from qkern.merge_loss import MergedLayer, MergeLoss
from qkern.merge_sums import check_rounded, dense_stack, exact_sum, squares_of
from qkern.merging import aware_weight, check_place, check_rows, merged_row
from qkern.module_tree import module_at, module_paths, replace_module
from qkern.quantized_linear import take_hooks
from qkern.saved_modules import SavedModule
from qkern.weight_sites import conv1d_of_linear


def merge_to_dense(model: nn.Module, *, dtype: torch.dtype | None = None) -> MergeLoss:
    """Replace every quantized layer by a plain ``nn.Linear`` with its adapter in it, in place.

    The base in its dtype, exactly as it was trained over, and what the active adapter adds are
    added in fp32 and rounded once; a layer with ``merge_into`` becomes the rounded weight that it
    multiplies. What was a ``Conv1D`` becomes one again, and modules that the adapter trains as a
    whole (``modules_to_save``) take their places. Adapters that are not active are dropped.
    Experts become dense if the adapter has a part in them; others, and embeddings, stay quantized
    (transformers' ``model.dequantize()`` does the rest, if it loaded the model). Nothing undoes it.
    Layer by layer, so that only one is there twice.

    Args:
        model: after ``quantize_model``, with or without adapters.
        dtype: float32, float16 or bfloat16 of the weights and their biases; None for what each
            weight reports, so that the model goes on as it is.

    Returns:
        How much of each adapter the rounding kept, see ``merge_adapter``.

    Raises:
        AdapterMismatchError: if an adapter is merged (call ``unmerge_adapter`` first), or several
            are in use (``qkern.adapter_rows``).
        FormatError: if there is no quantized layer, or the model is a single one, which cannot be
            replaced in place: its ``dequantize()`` makes a dense one. Also for settings that
            ``merge_into`` has not.
        NonFiniteError: if an adapter holds NaN or infinity, or float16 cannot hold a sum.
        ShapeError: for a shard of a weight.
        DeviceError: if an adapter is on another device than its weight, or both are on meta.
    """
    paths = _paths_to_merge(model)
    rows = []
    for names in paths:
        layer = cast("QuantizedLinear", module_at(model, names[0]))
        try:
            dense, row = _dense(names[0], layer, dtype)
        except QkernError as error:
            msg = f"{names[0]}: {error}; layers before it are dense already"
            raise type(error)(msg) from error
        replace_module(model, names, dense)
        if row is not None:
            rows.append(row)
    for module, names in module_paths(model):
        if isinstance(module, QLoRAExperts):
            rows += _merge_experts(names[0], module, dtype)
        if isinstance(module, SavedModule):
            kept = module.module_of(module.active_adapter).requires_grad_(requires_grad=False)
            replace_module(model, names, kept)
    _tell_transformers(model)
    return MergeLoss(tuple(rows))


def _tell_transformers(model: nn.Module) -> None:
    """A model that ``from_pretrained`` quantized is no longer one, if nothing is left of that."""
    forget = getattr(getattr(model, "hf_quantizer", None), "remove_quantization_config", None)
    modules = (m for m in model.modules() if isinstance(m, FlatParameters))
    if forget is not None and not any(module.quantized_names() for module in modules):
        forget(model)


def _paths_to_merge(model: nn.Module) -> list[list[str]]:
    """All paths of each quantized layer, if every one can be made dense."""
    found = [(names, m) for m, names in module_paths(model) if isinstance(m, QuantizedLinear)]
    experts = {n: layer for n, layer in adapted_layers(model) if isinstance(layer, ExpertWeight)}
    if (not found and not experts) or (found and found[0][0][0] == ""):
        msg = "the model is a single layer" if found else "the model has no quantized layer"
        raise FormatError(msg)
    check_rows(holders(model))
    layers: dict[str, QuantizedLinear | ExpertWeight] = {names[0]: m for names, m in found}
    layers |= experts
    for name, layer in layers.items():
        try:
            check_place(layer)
        except QkernError as error:
            msg = f"{name}: {error}; nothing was merged"
            raise type(error)(msg) from error
        if isinstance(layer, Adapted) and layer.merged:
            msg = f"{name} is merged already: call qkern.unmerge_adapter first"
            raise AdapterMismatchError(msg)
    return [names for names, _ in found]


def _dense(
    name: str, layer: QuantizedLinear, dtype: torch.dtype | None
) -> tuple[nn.Module, MergedLayer | None]:
    """The dense layer, and what became of its adapter if one is active."""
    dtype = layer.weight.dtype if dtype is None else dtype
    dense, row = layer.dequantize(dtype), None
    if dense.bias is not None:
        dense.bias = nn.Parameter(dense.bias.to(dtype), requires_grad=False)
    if isinstance(layer, QLoRALinear) and layer.adapter is not None:
        values, row = _sum(name, layer, dtype)
        dense.weight = nn.Parameter(values, requires_grad=False)
    return take_hooks(conv1d_of_linear(dense) if layer.fan_in_fan_out else dense, layer), row


def _merge_experts(path: str, module: QLoRAExperts, dtype: torch.dtype | None) -> list[MergedLayer]:
    """Make experts dense with the active adapter in them; leave those without one quantized."""
    weights = expert_weights(path, module)
    sums, rows = {}, []
    for name, weight in weights.items():
        if weight.adapter is None:
            continue
        try:
            values, row = _sum(name, weight, dtype or weight.weight.dtype)
        except QkernError as error:
            msg = f"{name}: {error}; layers before it are dense already"
            raise type(error)(msg) from error
        sums[weight.parameter] = values
        rows.append(row)
    module.drop_adapters()
    if sums:
        hold_dense(module, dtype, sums)
        for name, parameter in module.named_parameters(recurse=False):
            cast = parameter.detach().to(dtype or parameter.dtype)
            module._parameters[name] = nn.Parameter(cast, requires_grad=False)
    return rows


def _sum(name: str, layer: Adapted, dtype: torch.dtype) -> tuple[Tensor, MergedLayer]:
    """A weight with its adapter, rounded once, and what became of the adapter."""
    into = str(dtype).removeprefix("torch.")
    if isinstance(layer, ExpertWeight):
        values, squares = dense_stack(layer, dtype)
        return values, merged_row(name, layer, into, squares)
    delta, merged = layer.delta().float(), aware_weight(layer)
    if merged is None:
        exact = exact_sum(layer.quantized_weight, delta)
    else:
        exact = merged.dequantize(torch.float32)
    values = exact.to(dtype)
    check_rounded(values, exact)
    return values, merged_row(name, layer, into, squares_of(exact, values.float(), delta))
