"""Where a model has weights, and which of them are quantized."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qkern import experts, saved_modules
from qkern.errors import FormatError
from qkern.formats import QuantFormat
from qkern.layers import QuantizedLinear
from qkern.module_tree import module_paths
from qkern.name_patterns import is_router, matches
from qkern.tensor import QuantizedTensor


@dataclasses.dataclass(frozen=True)
class Site:
    """Where a weight is: by name, so that a dense layer is freed once it is replaced.

    Args:
        names: every path of its module.
        parameter: its name in the module.
        reason: why it must stay dense, empty if nothing speaks against quantizing it.
        counts: False for a weight that another module shares, and that is counted there.
    """

    names: list[str]
    parameter: str
    reason: str
    counts: bool


def sites(model: nn.Module, exclude: str | Sequence[str], fmt: QuantFormat) -> list[Site]:
    """The parameters of 2 or more dimensions, but for adapters.

    Args:
        model: to look at.
        exclude: module paths, ends of paths or globs of what stays dense.
        fmt: what the others get.

    Raises:
        FormatError: if ``exclude`` matches nothing that could be quantized, or if the model is a
            single layer.
    """
    if isinstance(model, nn.Linear):
        msg = "the model is a single layer, which has no parent: QuantizedLinear.from_linear is it"
        raise FormatError(msg)
    patterns = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    owners: dict[int, list[str]] = {}
    found = []
    for module, names in module_paths(model):
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() >= 2 and not key.startswith("lora_"):
                owners.setdefault(id(parameter), []).append(names[0])
                found.append((module, names, key, owners[id(parameter)]))
    matched: set[str] = set()
    heads, whole, listed = output_heads(model), saved_modules.parts_of_saved(model), []
    paths = {name for name, _ in model.named_modules()}
    for module, names, key, shared in found:
        paths_here = [*names, whole[id(module)]] if id(module) in whole else names
        hits = [p for p in patterns if any(matches(n, p) for n in called(module, paths_here))]
        matched.update(hits)
        others = [other for other in shared if other != names[0]]
        reason = ""
        if hits:
            reason = f"excluded by {hits[0]!r}"
        elif id(module) in whole and is_linear(module):
            reason = "trained as a whole, by modules_to_save"
        elif id(module) in heads and is_linear(module):
            reason = "the output head"
        elif others and is_linear(module):
            reason = f"shares its weight with {others[0]}"
        elif type(module) is nn.Linear and is_router(names[0], paths):
            reason = "a router, by its name"
        reason = reason or _why_dense(module, key, fmt)
        listed.append(Site(names, key, reason, counts=shared[0] == names[0]))
    unmatched = [pattern for pattern in patterns if pattern not in matched]
    if unmatched:
        msg = f"exclude={unmatched[0]!r} matches no linear layer: names, ends of paths or globs do"
        raise FormatError(msg)
    return listed


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies by weights, which ``quantize_model`` may quantize."""
    return isinstance(module, nn.Linear) or is_conv1d(module) or experts.is_experts(module)


def dense_linear(model: nn.Module) -> list[str]:
    """Paths of the linear layers that are not quantized: those that others would quantize."""
    return [
        name
        for name, module in model.named_modules()
        if is_conv1d(module)
        or (isinstance(module, nn.Linear) and not isinstance(module, QuantizedLinear))
    ]


def called(module: nn.Module, names: list[str]) -> list[str]:
    """What a user may exclude a module of these paths by; nothing for one never quantized."""
    if not is_linear(module):
        return []
    if not experts.is_experts(module):
        return names
    # Both weights or none, by the name of either.
    weights = experts.weight_names(module)
    return names + [f"{name}.{weight}" for name in names for weight in weights]


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' ``Conv1D``: a linear layer whose weight is (in, out)."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def linear_of_conv1d(module: nn.Module) -> nn.Linear:
    """The ``nn.Linear`` of the same values, in the same mode and with the same hooks."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    in_features, out_features = weight.shape
    layer = nn.Linear(in_features, out_features, device="meta")
    # A forward that was replaced on the instance is refused there, as with other layers.
    kept = {k: v for k, v in vars(module).items() if k.endswith("_hooks") or k == "forward"}
    vars(layer).update(kept)
    layer.weight = nn.Parameter(weight.detach().mT, requires_grad=False)
    layer.bias = module.bias  # type: ignore[assignment]
    return layer.train(module.training)


def conv1d_of_linear(layer: nn.Linear) -> nn.Module:
    """The ``Conv1D`` of the same values, where a layer took the place of one."""
    conv1d: Any = vars(sys.modules["transformers.pytorch_utils"])["Conv1D"]
    with torch.device("meta"):
        made: nn.Module = conv1d(layer.out_features, layer.in_features)
    made.weight = nn.Parameter(layer.weight.detach().mT.contiguous(), requires_grad=False)
    made.bias = layer.bias
    return made


def _why_dense(module: nn.Module, parameter: str, fmt: QuantFormat) -> str:
    """Why a weight is none that is quantized; empty if it is one."""
    kind, weight = type(module).__name__, module._parameters[parameter]
    if weight is None or isinstance(weight, QuantizedTensor):
        return ""
    if experts.is_experts(module):
        names = experts.weight_names(module)
        if parameter not in names:
            return "a bias of experts" if parameter.endswith("_bias") else f"{kind}.{parameter}"
        # Both or none, or the class's own forward would copy one of them dense.
        found = (module._parameters[name] for name in names)
        reasons = (experts.why_not(fmt, w.shape) for w in found if w is not None)
        return next(filter(None, reasons), "")
    if type(module) is nn.Linear and parameter != "weight":
        return f"its weight is computed from {parameter}"
    is_plain = type(module) is nn.Linear or isinstance(module, QuantizedLinear)
    if parameter == "weight" and (is_plain or is_conv1d(module)):
        return ""
    return f"{kind}{'' if parameter == 'weight' else f'.{parameter}'}, not nn.Linear"


def output_heads(model: nn.Module) -> set[int]:
    """Ids of the layers that make logits, as transformers' models place them.

    The output embeddings, and whatever is outside of the base model (a classifier): these are
    trained for the task, and small or sensitive.
    """
    heads = set()
    get = getattr(model, "get_output_embeddings", None)
    if callable(get):
        heads.add(id(get()))
    base = getattr(model, getattr(model, "base_model_prefix", None) or " ", None)
    if isinstance(base, nn.Module):
        inside = {id(module) for module in base.modules()}
        heads |= {id(module) for module in model.modules() if id(module) not in inside}
    return heads
