"""Make a module that can take a quantized weight of a file, in the place of a dense one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qkern import experts, flat_keys
from qkern.errors import CorruptFileError
from qkern.formats import QuantFormat
from qkern.layers import QuantizedLinear
from qkern.module_tree import module_at, replace_module
from qkern.tensor import QuantizedTensor
from qkern.weight_sites import is_conv1d


def place(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    prefix: str,
    dtype: torch.dtype | None,
    paths: Mapping[str, list[str]],
) -> None:
    """Let the module that holds a parameter take the quantized tensor at ``prefix``.

    A linear layer is replaced at all of its paths; experts become quantized ones in their place.
    What is there already, is left. Values are not read: the strict load does that.

    Args:
        model: changed in place.
        tensors: entries of the file.
        prefix: of the tensor's keys.
        dtype: of the weight, for files that do not say.
        paths: every path of each module, by each of them.

    Raises:
        CorruptFileError: if there is no such module, or none that takes quantized weights.
    """
    name, _, parameter = prefix.rpartition(".")
    try:
        module = module_at(model, name)
    except AttributeError as error:
        msg = f"the model has no layer {name}, for which the file holds a quantized weight"
        raise CorruptFileError(msg) from error
    held: Any = module._parameters.get(parameter)
    if isinstance(module, QuantizedLinear) or isinstance(held, QuantizedTensor):
        return
    if not _takes(module, parameter):
        msg = f"{prefix}: a quantized weight for a {type(module).__name__}, nn.Linear is needed"
        raise CorruptFileError(msg)
    loaded = flat_keys.unflatten(tensors, prefix, dtype or held.dtype)
    expected = held.shape
    if _is_swapped(module, loaded.format):
        expected = torch.Size((*expected[:-2], expected[-1], expected[-2]))
    if loaded.shape != expected:
        msg = f"{prefix}: the file holds {tuple(loaded.shape)}, {tuple(expected)} needed"
        raise CorruptFileError(msg)
    # On meta the strict load hands over the file's own memory; else it copies.
    empty: Any = torch.empty_like(loaded, device=held.device)
    if experts.is_experts(module):
        experts.hold_quantized(module, parameter, empty, name)
        return
    bias: Any = module.bias
    if bias is not None:
        bias.requires_grad_(False)
    layer = QuantizedLinear(empty, bias).train(module.training)
    layer.fan_in_fan_out = is_conv1d(module)
    replace_module(model, paths[name], layer)


def _takes(module: nn.Module, parameter: str) -> bool:
    if experts.is_experts(module):
        return parameter in experts.weight_names(module)
    return parameter == "weight" and (type(module) is nn.Linear or is_conv1d(module))


def _is_swapped(module: nn.Module, fmt: QuantFormat) -> bool:
    """Whether the file holds (..., out, in) of what the module holds as (..., in, out)."""
    if is_conv1d(module):
        return True
    holds = experts.is_experts(module) and bool(module.is_transposed)
    return holds and not experts.is_transposed(module, fmt)
