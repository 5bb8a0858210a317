"""A model's layers and experts with adapters: find them, and give exactly these one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from qkern import saved_modules
from qkern.adapter_holder import NamedAdapters
from qkern.dense_weights import DenseSource, dense_weight
from qkern.errors import AdapterMismatchError, QkernError
from qkern.experts_lora import ExpertWeight, expert_weights
from qkern.layers import QLoRALinear, QuantizedLinear
from qkern.lora_adapter import DEFAULT, LoRAAdapter, check_name
from qkern.module_tree import leave_inference_mode, module_paths, replace_module

# What has adapters by name: a layer, or a weight of stacked experts.
Adapted = QLoRALinear | ExpertWeight


def attach_adapters(
    model: nn.Module,
    names: Sequence[str] | Mapping[str, Mapping[str, Any]],
    *,
    adapter_name: str = DEFAULT,
    copies: Callable[[], dict[str, nn.Module]] = dict,
    dense: DenseSource | None = None,
    **lora: Any,
) -> None:
    """Give exactly these layers and weights of experts an adapter, and freeze everything else.

    Args:
        model: after ``quantize_model``.
        names: paths as ``named_modules`` has them, of experts those of their weights; with
            settings of each one's own, if given.
        adapter_name: of the adapter; it becomes the active one if the model has none.
        dense: what the layers were quantized from.
        copies: makes the modules that are trained as a whole, by their paths.
        **lora: other arguments of ``QLoRALinear``.

    Raises:
        AdapterMismatchError: if one has an adapter of that name already, or one is merged.
    """
    check_name(adapter_name)
    layers, experts = quantized_layers(model), quantized_experts(model)
    adapted: dict[str, Adapted] = {
        **{name: layer for name, (layer, _) in layers.items() if isinstance(layer, QLoRALinear)},
        **experts,
    }
    taken = [name for name in names if name in adapted and adapter_name in adapted[name].adapters]
    if taken:
        msg = (
            f"{taken[0]} and {len(taken) - 1} more layers have an adapter {adapter_name!r} already"
        )
        raise AdapterMismatchError(msg)
    check_unmerged(model)
    trained = [p for h in holders(model) for p in h.adapters.parameters() if p.requires_grad]
    leave_inference_mode(model)
    active = next((h.active_adapter for h in holders(model) if h.adapters), adapter_name)
    own = names if isinstance(names, Mapping) else {name: {} for name in names}
    known = [adapted[name] for name in names if name in adapted]
    weights = [(layer, layer.weight) for layer in known if isinstance(layer, QLoRALinear)]
    made: list[QLoRALinear | LoRAAdapter] = []
    # Before anything is frozen: if one cannot be made, the model stays as it was.
    try:
        for name in names:
            place = experts[name] if name in experts else layers[name][0]
            made.append(_make(name, place, adapter_name, dense, {**lora, **own[name]}))
        copied = copies()
    except BaseException:
        for layer, weight in weights:  # an adapter's start may have changed it
            layer.weight = weight
        raise
    model.requires_grad_(False)
    for parameter in trained:  # adapters that were there before stay trainable
        parameter.requires_grad_(True)
    for name, new in zip(names, made, strict=True):
        if isinstance(new, QLoRALinear):
            new.adapters.requires_grad_(adapter_name == active)
            replace_module(model, layers[name][1], new)
        else:
            adapted[name].add_adapter(adapter_name, new.requires_grad_(adapter_name == active))
    saved_modules.attach_copies(model, copied, adapter_name, active)
    for holder in holders(model):
        holder.active_adapter = active


def _make(
    name: str,
    layer: QuantizedLinear | ExpertWeight,
    adapter_name: str,
    dense: DenseSource | None,
    settings: dict[str, Any],
) -> QLoRALinear | LoRAAdapter:
    """An adapter for a layer, and where it can hold none the layer that takes its place."""
    try:
        if isinstance(layer, ExpertWeight):
            return layer.make_adapter(**settings)
        if dense is not None:
            weight = dense_weight(dense, name)
            settings["dense"] = weight.mT if layer.fan_in_fan_out else weight
        if not isinstance(layer, QLoRALinear):
            return QLoRALinear.from_linear(layer, adapter_name=adapter_name, **settings)
        settings.pop("lora_mode", None)
        return layer.make_adapter(**settings)
    except QkernError as error:
        msg = f"{name}: {error}"
        raise type(error)(msg) from error


def holders(model: nn.Module) -> list[NamedAdapters]:
    """What holds adapters: layers, and modules that are trained as a whole."""
    return [module for module in model.modules() if isinstance(module, NamedAdapters)]


def check_unmerged(model: nn.Module) -> None:
    """Refuse to change adapters while one is in the weights.

    Raises:
        AdapterMismatchError: if so.
    """
    if any(layer.merged for _, layer in adapted_layers(model)):
        msg = "an adapter is merged into the weights: call qkern.unmerge_adapter first"
        raise AdapterMismatchError(msg)


def quantized_layers(model: nn.Module) -> dict[str, tuple[QuantizedLinear, list[str]]]:
    """First path to layer and all of its paths."""
    return {
        names[0]: (module, names)
        for module, names in module_paths(model)
        if isinstance(module, QuantizedLinear)
    }


def quantized_experts(model: nn.Module) -> dict[str, ExpertWeight]:
    """The quantized weights of experts by their paths."""
    found: dict[str, ExpertWeight] = {}
    for name, module in model.named_modules():
        found |= expert_weights(name, module)
    return found


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """Paths and layers that have an adapter, and weights of experts that do."""
    for name, module in model.named_modules():
        if isinstance(module, QLoRALinear) and module.adapters:
            yield name, module
        for path, weight in expert_weights(name, module).items():
            if weight.adapters:
                yield path, weight
