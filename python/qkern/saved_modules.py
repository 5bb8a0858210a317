"""Modules that an adapter trains as a whole, PEFT's ``modules_to_save``: embeddings, norms, heads.

Each is replaced by a ``SavedModule``, which holds it and a trained copy for each adapter.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qkern.adapter_config import PREFIX, nearest
from qkern.adapter_holder import NamedAdapters
from qkern.errors import AdapterMismatchError
from qkern.module_tree import module_at, module_paths, replace_module
from qkern.tensor import QuantizedTensor


class SavedModule(NamedAdapters):
    """A module and the copies that adapters train.

    Attributes other than these are those of what is computed: ``weight`` of an embedding, say.

    Args:
        module: of one tensor, as embeddings, norms and heads are.
        path: where the model holds it.

    Attributes:
        original_module: frozen.
        adapters: copies by the name of their adapter.
    """

    def __init__(self, module: nn.Module, path: str = "") -> None:
        super().__init__()
        self.path = path
        self.original_module = module
        self.adapters = nn.ModuleDict()
        self.active_adapter = None
        self.train(module.training)

    def module_of(self, name: str | None) -> nn.Module:
        """The copy of an adapter; the module itself if it has none."""
        copied = self.adapters._modules.get(name)  # type: ignore[arg-type]
        return self.original_module if copied is None else copied

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the active adapter's copy makes, or the copies of each row's adapter."""
        if not self.has_rows():
            return self.module_of(self.active_adapter)(*args, **kwargs)
        inputs = [*args, *kwargs.values()]
        if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
            msg = f"{self._name()} is called with more than a tensor: adapter_rows cannot split it"
            raise AdapterMismatchError(msg)
        return self.by_rows(inputs[0], lambda part, name: self.module_of(name)(part))

    def __getattr__(self, name: str) -> Any:
        """Of this module, or of what it computes."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "original_module" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.module_of(self.active_adapter), name)


def saved_copies(model: nn.Module, adapter_name: str) -> dict[str, nn.Module]:
    """The copies of an adapter by the paths of their modules."""
    return {
        name: module.adapters[adapter_name]
        for name, module in model.named_modules()
        if isinstance(module, SavedModule) and adapter_name in module.adapters
    }


def parts_of_saved(model: nn.Module) -> dict[int, str]:
    """What modules that are trained as a whole consist of, by id: the path without adapters."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, SavedModule):
            for held in (module.original_module, *module.adapters.values()):
                for name, part in held.named_modules(prefix=path):
                    found[id(part)] = name
    return found


def find_modules(model: nn.Module, targets: Sequence[str]) -> dict[str, list[str]]:
    """The modules whose paths end in a target, as PEFT finds them: all paths of each, by the first.

    A module inside of another one that was found is a part of that.
    """
    found: dict[str, list[str]] = {}
    inside: list[str] = []
    for module, paths in module_paths(model):
        name = paths[0]
        if not name or name.startswith(tuple(inside)):
            continue
        ends = any(f"{PREFIX}{path}".endswith(target) for path in paths for target in targets)
        if ends or isinstance(module, NamedAdapters):
            inside.append(f"{name}.")
        if ends:
            found[name] = paths
    return found


def with_tied(model: nn.Module, names: Sequence[str]) -> list[str]:
    """These modules, and those that share a parameter with one: they would come apart."""
    chosen = [module_at(model, name) for name in names]
    shared = {id(p) for module in chosen for p in _original(module).parameters()}
    inside = {id(part) for module in chosen for part in module.modules()}
    tied = [
        paths[0].partition(".original_module")[0]  # of another adapter's module, too
        for module, paths in module_paths(model)
        if id(module) not in inside and any(id(p) in shared for p in module._parameters.values())
    ]
    return [*names, *dict.fromkeys(tied)]


def check_modules(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """The paths of modules that can be trained as a whole.

    Raises:
        AdapterMismatchError: if a target matches none, or one that is quantized or has no
            parameter.
    """
    for target in targets:
        if not find_modules(model, [target]):
            known = [name for name, module in model.named_modules() if name and _trainable(module)]
            ends = sorted({name.rpartition(".")[2] for name in known})
            near = nearest(target, [*ends, *known])
            msg = f"modules_to_save={target!r} matches no module; nearest: {near}"
            raise AdapterMismatchError(msg)
    names = list(find_modules(model, targets))
    for name in names:
        module = module_at(model, name)
        if any(isinstance(p, QuantizedTensor) for p in module.parameters()):
            msg = (
                f"modules_to_save: {name} is quantized and cannot be trained as a whole: leave it "
                f"dense, quantize_model(model, exclude=[{name!r}]), or give it an adapter"
            )
            raise AdapterMismatchError(msg)
        if not _trainable(module):
            msg = f"modules_to_save: {name}, a {type(module).__name__}, has nothing to train"
            raise AdapterMismatchError(msg)
    return names


def make_copies(model: nn.Module, names: Sequence[str], *, tied: bool) -> dict[str, nn.Module]:
    """A copy of each module, on its own memory.

    Args:
        model: that holds them.
        names: their paths.
        tied: whether copies of modules that share parameters do so as well.
    """
    memo: dict[int, Any] = {}
    copies = {}
    with torch.inference_mode(False):  # what is made under it could never be trained on
        for name in names:
            module = original_module(model, name)
            copies[name] = copy.deepcopy(module, memo if tied else {})
    return copies


def attach_copies(
    model: nn.Module, copies: Mapping[str, nn.Module], adapter_name: str, active: str | None
) -> None:
    """Put each copy beside its module; it trains if its adapter is the active one."""
    paths = {names[0]: names for _, names in module_paths(model)}
    for name, made in copies.items():
        module = module_at(model, name)
        if not isinstance(module, SavedModule):
            saved = SavedModule(module, name)
            replace_module(model, paths[name], saved)
            module = saved
        module.adapters[adapter_name] = made.requires_grad_(adapter_name == active)
        module.active_adapter = active


def original_module(model: nn.Module, name: str) -> nn.Module:
    """The module at a path, without what adapters made of it."""
    return _original(module_at(model, name))


def _original(module: nn.Module) -> nn.Module:
    return module.original_module if isinstance(module, SavedModule) else module


def _trainable(module: nn.Module) -> bool:
    return any(p.is_floating_point() for p in module.parameters())


def base_name(name: str, holders: Sequence[str]) -> str | None:
    """What a parameter or module is called in a model without adapters; None for an adapter's.

    Args:
        name: a path, or a key of a ``state_dict``.
        holders: paths of the ``NamedAdapters`` of the model.
    """
    for holder in holders:
        if f"{name}.".startswith(f"{holder}.adapters."):
            return None
        if f"{name}.".startswith(f"{holder}.original_module."):
            return f"{holder}{name.removeprefix(f'{holder}.original_module')}"
    return name
