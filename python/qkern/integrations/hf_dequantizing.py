"""A quantized transformers model as a dense one of the same values."""

from __future__ import annotations

import torch
from torch import nn

from qkern import embeddings, experts
from qkern.embeddings import QuantizedEmbedding
from qkern.errors import AdapterMismatchError
from qkern.experts import QuantizedExperts
from qkern.experts_lora import QLoRAExperts
from qkern.integrations.pretrained import cast_parameters
from qkern.layers import QLoRALinear, QuantizedLinear
from qkern.module_tree import module_paths, replace_module
from qkern.quantized_linear import take_hooks
from qkern.weight_sites import conv1d_of_linear


def dequantize_modules(model: nn.Module, named: torch.dtype | str | None) -> None:
    """Make every quantized module what it was before; weights that were shared are.

    Args:
        model: changed in place.
        named: dtype of its parameters, or its name, which a configuration has once it was saved;
            each keeps its own if None.

    Raises:
        AdapterMismatchError: if a layer has an adapter that is not merged; nothing is changed.
    """
    dtype: torch.dtype | None = getattr(torch, named) if isinstance(named, str) else named
    found = module_paths(model)
    for layer, names in found:
        adapted = isinstance(layer, QLoRALinear)
        adapted = adapted or (isinstance(layer, QLoRAExperts) and bool(layer.adapters))
        if adapted and not layer.merged:
            msg = (
                f"{names[0]} has an adapter, which would be lost: merge it, by "
                "qkern.merge_to_dense without a loss, or by qkern.merge_adapter into the codes"
            )
            raise AdapterMismatchError(msg)
    shared: dict[int, nn.Parameter] = {}
    for module, _ in found:
        if isinstance(module, QuantizedExperts):
            if isinstance(module, QLoRAExperts):
                module.drop_adapters()
            experts.hold_dense(module, dtype)
        elif isinstance(module, QuantizedEmbedding):
            key = id(module.weight)
            if key not in shared:
                shared[key] = nn.Parameter(module.quantized_weight.dequantize(dtype))
            embeddings.hold_dense(module, shared[key])
    for layer, names in found:
        if isinstance(layer, QuantizedLinear):
            weight = shared.get(id(layer.weight))
            replace_module(model, names, with_hook(_dense(layer, dtype, weight), layer))
    if dtype is not None:
        cast_parameters(model, dtype)


def _dense(
    layer: QuantizedLinear, dtype: torch.dtype | None, weight: nn.Parameter | None
) -> nn.Module:
    """The layer's dense twin, with its hooks; with the weight that an embedding has."""
    dense = layer.dequantize(dtype).requires_grad_(True)
    if weight is not None:
        dense.weight = weight
    made = conv1d_of_linear(dense) if layer.fan_in_fan_out else dense
    return take_hooks(made.requires_grad_(True), layer)


def with_hook(layer: nn.Module, replaced: nn.Module) -> nn.Module:
    """The layer with the hook by which accelerate moves inputs to its device."""
    hook = getattr(replaced, "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(layer, hook)
    return layer
