"""A model's modules: find and replace one by path; what is done to all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qkern.codec import COMPUTE, check_choice
from qkern.layers import QuantizedLinear


def module_paths(model: nn.Module) -> list[tuple[nn.Module, list[str]]]:
    """Every module with all of its paths, as ``named_modules`` has them."""
    paths: dict[int, tuple[nn.Module, list[str]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), (module, []))[1].append(name)
    return list(paths.values())


def module_at(model: nn.Module, path: str) -> nn.Module:
    """``get_submodule`` for any path of ``named_modules``: a module's own name may hold dots.

    Raises:
        AttributeError: if there is none.
    """
    parent, key = _place(model, path) if path else (model, "")
    return parent._modules[key] if path else model  # type: ignore[return-value]


def replace_module(model: nn.Module, paths: Sequence[str], layer: nn.Module) -> None:
    """Put a layer at its paths, the first of which is what its errors name."""
    if isinstance(layer, QuantizedLinear):
        layer.path = paths[0]
    for path in paths:
        parent, key = _place(model, path)
        setattr(parent, key, layer)


def _place(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The parent of the module at a path, and its name there."""
    for key, child in model._modules.items():
        if key == path:
            return model, key
        if child is not None and path.startswith(f"{key}."):
            with contextlib.suppress(AttributeError):
                return _place(child, path.removeprefix(f"{key}."))
    msg = f"the model has no module {path}"
    raise AttributeError(msg)


def set_compute(model: nn.Module, compute: str) -> int:
    """Tell every quantized layer how to multiply, see ``qkern.linear``; how many there are.

    Raises:
        FormatError: for anything but "exact" and "int8"; nothing is changed then.
    """
    check_choice("compute", compute, COMPUTE)
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    for layer in layers:
        layer.compute = compute
    return len(layers)


def leave_inference_mode(model: nn.Module) -> None:
    """Replace what inference mode made by ordinary tensors: autograd cannot save the others."""
    made: dict[int, Any] = {}  # tied ones stay tied

    def ordinary(tensor: Tensor) -> Any:
        if id(tensor) not in made:
            copy = tensor.detach().clone()
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(copy, tensor.requires_grad) if is_parameter else copy
        return made[id(tensor)]

    with torch.inference_mode(False):
        for module in model.modules():
            tensors: dict[str, Any]
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None and tensor.is_inference():
                        tensors[name] = ordinary(tensor)
