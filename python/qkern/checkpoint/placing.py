"""Make a module that can take a quantized weight of a file, in the place of a dense one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qkern import embeddings, experts, flat_keys, operands
from qkern.errors import CorruptFileError, QkernError
from qkern.formats import QuantFormat
from qkern.layers import QuantizedLinear
from qkern.module_tree import module_at, replace_module
from qkern.quantized_linear import take_hooks
from qkern.tensor import QuantizedTensor
from qkern.weight_sites import is_conv1d


def check_places(model: nn.Module, prefixes: Iterable[str]) -> None:
    """Refuse a model that cannot take quantized tensors, before anything of it is changed.

    Args:
        model: what they are for.
        prefixes: of the tensors' keys.

    Raises:
        CorruptFileError: if there is no such module, or none that takes quantized weights.
        FormatError: for a linear layer that computes something else than ``nn.Linear`` does.
    """
    for prefix in prefixes:
        name, _, parameter = prefix.rpartition(".")
        try:
            module = module_at(model, name)
        except AttributeError as error:
            msg = f"the model has no layer {name}, for which the file holds a quantized weight"
            raise CorruptFileError(msg) from error
        if not _is_quantized(module, parameter):
            _check_takes(module, prefix)


def place(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    prefix: str,
    dtype: torch.dtype | None,
    paths: Mapping[str, list[str]],
) -> None:
    """Let the module that holds a parameter take the quantized tensor at ``prefix``.

    As ``place_empty`` does. What is there already, is left. Values are not read: the strict load
    does that.

    Args:
        model: changed in place; one that ``check_places`` lets pass.
        tensors: entries of the file.
        prefix: of the tensor's keys.
        dtype: of the weight, for files that do not say.
        paths: every path of each module, by each of them.

    Raises:
        CorruptFileError: if the module takes no weight of this shape.
        FormatError: for an embedding in another format than int8_row.
    """
    name, _, parameter = prefix.rpartition(".")
    module = module_at(model, name)
    if _is_quantized(module, parameter):
        return
    held: Any = module._parameters[parameter]
    loaded = flat_keys.unflatten(tensors, prefix, dtype or held.dtype)
    # On meta the strict load hands over the file's own memory; else it copies.
    place_empty(model, prefix, torch.empty_like(loaded, device=held.device), paths)


def place_empty(model: nn.Module, prefix: str, empty: Any, paths: Mapping[str, list[str]]) -> None:
    """Let the module that holds a parameter have a quantized tensor in its place.

    A linear layer is replaced at all of its paths; experts become quantized ones in their place.

    Args:
        model: changed in place.
        prefix: name of the parameter.
        empty: what it gets, without values.
        paths: every path of each module, by each of them.

    Raises:
        CorruptFileError: if the module takes no quantized weight, or none of this shape.
        FormatError: for an embedding in another format than int8_row, and a linear layer that
            computes something else than ``nn.Linear`` does.
    """
    name, _, parameter = prefix.rpartition(".")
    module = module_at(model, name)
    _check_takes(module, prefix)
    held: Any = module._parameters[parameter]
    expected = held.shape
    if is_swapped(module, empty.format):
        expected = torch.Size((*expected[:-2], expected[-1], expected[-2]))
    if empty.shape != expected:
        msg = f"{prefix}: the file holds {tuple(empty.shape)}, {tuple(expected)} needed"
        raise CorruptFileError(msg)
    if experts.is_experts(module):
        experts.hold_quantized(module, parameter, empty, name)
        return
    if isinstance(module, nn.Embedding):
        embeddings.hold_quantized(module, empty)
        return
    _replace_linear(model, paths[name], module, empty)


def place_tied(model: nn.Module, paths: Mapping[str, list[str]]) -> None:
    """Make layers quantized ones that were tied to a quantized embedding: heads, embeddings."""
    for name, module in list(model.named_modules()):
        weight = module._parameters.get("weight")
        if not isinstance(weight, QuantizedTensor):
            continue
        if type(module) is nn.Linear:
            _replace_linear(model, paths[name], module, weight)
        elif isinstance(module, nn.Embedding):
            embeddings.hold_quantized(module, weight)


def check_transposed(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse quantized ``Conv1D``s that may be stored (in, out): the shapes of others would tell.

    Args:
        model: with everything in its place.
        names: of the quantized tensors.

    Raises:
        CorruptFileError: if there are such, and all of them are square.
    """
    modules = (module_at(model, name.rpartition(".")[0]) for name in names)
    layers = [m for m in modules if isinstance(m, QuantizedLinear) and m.fan_in_fan_out]
    if layers and all(layer.in_features == layer.out_features for layer in layers):
        msg = (
            f"{layers[0].path} is a quantized Conv1D, and nothing says whether it is transposed: "
            "quantize wider ones too, or none"
        )
        raise CorruptFileError(msg)


def _replace_linear(model: nn.Module, paths: list[str], module: Any, weight: Any) -> None:
    if module.bias is not None:
        module.bias.requires_grad_(False)
    layer = take_hooks(QuantizedLinear(weight, module.bias), module)
    if isinstance(weight, nn.Parameter):
        layer.weight = weight  # the same one, not another of the same values
    layer.fan_in_fan_out = is_conv1d(module)
    replace_module(model, paths, layer)


def _is_quantized(module: nn.Module, parameter: str) -> bool:
    held = module._parameters.get(parameter)
    return isinstance(module, QuantizedLinear) or isinstance(held, QuantizedTensor)


def _check_takes(module: nn.Module, prefix: str) -> None:
    parameter = prefix.rpartition(".")[2]
    if experts.is_experts(module):
        takes = parameter in experts.weight_names(module)
    else:
        linear = type(module) is nn.Linear or is_conv1d(module)
        takes = parameter == "weight" and (linear or isinstance(module, nn.Embedding))
    if not takes:
        msg = f"{prefix}: a quantized weight for a {type(module).__name__}, nn.Linear is needed"
        raise CorruptFileError(msg)
    if type(module) is nn.Linear:
        try:
            operands.check_layer(module)
        except QkernError as error:
            msg = f"{prefix}: {error}"
            raise type(error)(msg) from error


def is_swapped(module: nn.Module, fmt: QuantFormat) -> bool:
    """Whether the file holds (..., out, in) of what the module holds as (..., in, out)."""
    if is_conv1d(module):
        return True
    holds = experts.is_experts(module) and bool(module.is_transposed)
    return holds and not experts.is_transposed(module, fmt)
