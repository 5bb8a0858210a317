"""What would be lost in silence, or does not fit, where adapters are written and loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from qkern.adapted import quantized_experts
from qkern.adapter_config import nearest, not_found, peft_paths
from qkern.adapter_tensors import AdapterTensors
from qkern.errors import AdapterMismatchError, DeviceError, NonFiniteError
from qkern.experts_lora import ExpertWeight
from qkern.layers import QuantizedLinear
from qkern.lora_adapter import LoRAAdapter, stacked
from qkern.saved_modules import check_modules, original_module, saved_copies
from qkern.weight_sites import dense_linear


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse to write NaN or infinity: whoever loads it would get nothing else.

    Raises:
        NonFiniteError: naming the entry and how many of its values are.
    """
    for key, tensor in tensors.items():
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            msg = (
                f"{key} holds {bad} values that are NaN or infinite of {tensor.numel()}: the "
                "adapter is not saved; go back to an earlier one, and lower the learning rate"
            )
            raise NonFiniteError(msg)


def check_place(layers: Mapping[str, QuantizedLinear | ExpertWeight]) -> None:
    """Refuse layers on meta: the adapter's values would be lost there.

    Raises:
        DeviceError: naming the first.
    """
    for name, layer in layers.items():
        if layer.weight.is_meta:
            msg = f"{name} is on meta, where an adapter has no values: load the base model first"
            raise DeviceError(msg)


def check_tokens(model: nn.Module, trained_on: str | None, directory: Path) -> None:
    """Refuse an adapter of a model whose embeddings had another number of tokens.

    Args:
        model: to load into.
        trained_on: the number in the file; None if it does not say.
        directory: of the file.

    Raises:
        AdapterMismatchError: naming both numbers.
    """
    here = token_count(model)
    if here is None or trained_on in (None, str(here)):
        return
    msg = (
        f"{directory}: the adapter was trained with embeddings of {trained_on} tokens, the model "
        f"has {here}: resize them (model.resize_token_embeddings({trained_on})) and load what was "
        "trained of them, or pass force=True"
    )
    raise AdapterMismatchError(msg)


def token_count(model: nn.Module) -> int | None:
    """How many tokens the input embeddings of one of transformers' models have, else None."""
    get = getattr(model, "get_input_embeddings", None)
    try:
        embeddings = get() if callable(get) else None
    except NotImplementedError:  # a model of images, say
        return None
    weight = getattr(embeddings, "weight", None)
    return weight.shape[0] if isinstance(weight, Tensor) and weight.dim() == 2 else None


def check_copies(
    model: nn.Module,
    states: Mapping[str, Mapping[str, Tensor]],
    adapter_name: str | None,
    directory: Path,
) -> None:
    """Refuse entries of whole modules that do not fit the model's, or the adapter that is there.

    Args:
        model: to load into.
        states: entries of the file, by the path of their module.
        adapter_name: of the adapter that is there, None if there is none.
        directory: of the file, for errors.

    Raises:
        AdapterMismatchError: naming the module.
    """
    if states:
        check_modules(model, list(states))
    for name, state in states.items():
        module = original_module(model, name)
        here = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
        there = {key: tuple(tensor.shape) for key, tensor in state.items()}
        if here != there:
            msg = f"{directory}: {name} is saved as {there}, the model has {here}"
            if here.keys() == there.keys():
                msg += ": were tokens added? Resize the model's embeddings before the adapter"
            raise AdapterMismatchError(msg)
    if adapter_name is not None and set(saved_copies(model, adapter_name)) != set(states):
        have = sorted(saved_copies(model, adapter_name))
        msg = f"{directory}: saves the modules {sorted(states)}, the adapter here has {have}"
        raise AdapterMismatchError(msg)


def pairs_of_experts(
    model: nn.Module,
    pairs: Mapping[str, AdapterTensors],
    targets: Collection[str],
    directory: Path,
) -> dict[str, AdapterTensors]:
    """A file's entries, those of stacked experts by the paths of their weights, as stacks.

    Args:
        model: to load into.
        pairs: entries by their paths in the file.
        targets: the file's ``target_parameters``.
        directory: of the file, for errors.

    Raises:
        AdapterMismatchError: for a target that names no such weight, one without an entry, and
            an entry that cannot be divided among the experts.
    """
    experts = quantized_experts(model)
    wanted = [n for n in experts if any(n == t or n.endswith(f".{t}") for t in targets)]
    places = peft_paths(wanted)
    found = {name: pair for name, pair in pairs.items() if name not in places.values()}
    for name, place in places.items():
        pair, count = pairs.get(place), experts[name].weight.shape[0]
        if pair is None:
            msg = f"{directory}: target_parameters has {name}, the file has no entry {place}"
            raise AdapterMismatchError(msg)
        if pair.magnitude is not None or pair.A.shape[0] % count:
            what = f"{pair.A.shape[0]} rows of lora_A" if pair.magnitude is None else "DoRA"
            msg = f"{directory}: {what} for {name}, which has {count} experts"
            raise AdapterMismatchError(msg)
        found[name] = AdapterTensors(*stacked(pair.A, pair.B, count), None)
    for target in targets:
        if not any(n == target or n.endswith(f".{target}") for n in wanted):
            msg = (
                f"{directory}: target_parameters has {target!r}, no quantized weight of stacked "
                f"experts is called so; nearest: {nearest(target, experts)}"
            )
            raise AdapterMismatchError(msg)
    return found


def check_fit(
    model: nn.Module,
    pairs: Mapping[str, AdapterTensors],
    adapted: Mapping[str, LoRAAdapter],
) -> dict[str, QuantizedLinear | ExpertWeight]:
    """The layers, and weights of experts, that a file's entries are for.

    Args:
        model: to load into.
        pairs: entries of the file, by the path of their layer.
        adapted: the adapter that is there, by the path of its layers.

    Raises:
        AdapterMismatchError: for a layer that the model has not, other sizes, and for an adapter
            that has other layers than the file.
    """
    layers: dict[str, QuantizedLinear | ExpertWeight] = {
        n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)
    }
    layers |= quantized_experts(model)
    _check_names(model, pairs, layers)
    for name, (A, B, _) in pairs.items():
        layer = layers[name]
        expected = (layer.out_features, layer.in_features)
        r = A.shape[-2]  # of experts, before which there is one dimension more
        ranks = (adapted[name].r,) if name in adapted else (r,)
        found = (B.shape[-2], A.shape[-1])
        if found != expected or r not in ranks:
            msg = (
                f"{name}: the adapter is (out, in, r) = {(*found, r)}, "
                f"the layer is {(*expected, *ranks)}: is this the adapter's base model?"
            )
            raise AdapterMismatchError(msg)
    left = sorted(set(adapted) - set(pairs))
    if left:
        msg = f"the file has no entry for {len(left)} adapted layers, the first is {left[0]}"
        raise AdapterMismatchError(msg)
    more = sorted(set(pairs) - set(adapted)) if adapted else []
    if more:
        msg = (
            f"the file has {len(more)} layers that the adapter here has not, the first is "
            f"{more[0]}: load it under another adapter_name, or delete_adapter the one that is here"
        )
        raise AdapterMismatchError(msg)
    return {name: layers[name] for name in pairs}


def _check_names(model: nn.Module, pairs: Collection[str], layers: Collection[str]) -> None:
    """Refuse entries for layers that are not there, or not quantized."""
    missing = [name for name in pairs if name not in layers]
    if not missing:
        return
    dense = set(missing).intersection(dense_linear(model))
    msg = f"the model has no quantized layer {missing[0]}; "
    if dense:
        msg += (
            f"{len(dense)} of the adapter's {len(pairs)} modules are here, but dense: call "
            "qkern.quantize_model first, whose report says what stays dense and why; PEFT loads "
            "adapters over dense layers too"
        )
    else:
        msg += not_found(missing, len(pairs), layers)
    raise AdapterMismatchError(msg)
