"""What PEFT's ``adapter_config.json`` says of a model's adapter."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from torch import nn

from qkern.errors import AdapterMismatchError
from qkern.lora_adapter import LoRAAdapter
from qkern.saved_modules import find_modules


def describe(
    model: nn.Module, layers: dict[str, LoRAAdapter], copies: Collection[str]
) -> dict[str, Any]:
    """``adapter_config.json``: the keys that every version of PEFT knows, others where needed.

    Args:
        model: that the adapter is of.
        layers: the adapter of each layer, by path, and of each weight of experts.
        copies: paths of the modules that are trained as a whole.

    Raises:
        AdapterMismatchError: if layers differ in what PEFT has one of.
    """
    first = next(iter(layers.values()))
    kinds = {(layer.lora_dropout, layer.use_rslora, layer.use_dora) for layer in layers.values()}
    if len(kinds) > 1:
        msg = (
            f"layers differ in (lora_dropout, use_rslora, use_dora): {sorted(kinds)}; PEFT has one "
            "of each"
        )
        raise AdapterMismatchError(msg)
    linear = [name for name, adapter in layers.items() if adapter.experts is None]
    parameters = [name for name in layers if name not in linear]
    base = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None,
        "base_model_name_or_path": base,
        "r": first.r,
        "lora_alpha": first.lora_alpha,
        "lora_dropout": first.lora_dropout,
        "use_rslora": first.use_rslora,
        "target_modules": _target_names([n for n, _ in model.named_modules()], linear),
        "rank_pattern": {_pattern(n): v.r for n, v in layers.items() if v.r != first.r},
        "alpha_pattern": {
            _pattern(n): v.lora_alpha for n, v in layers.items() if v.lora_alpha != first.lora_alpha
        },
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": _saved_targets(model, copies) or None,
    }
    if parameters:
        held = [name for name, _ in model.named_parameters()]
        config["target_parameters"] = _parameter_names(held, parameters)
    return config | {"use_dora": True} if first.use_dora else config


def _pattern(name: str) -> str:
    """The regular expression that PEFT matches with this path alone."""
    return f"^{re.escape(name)}"


def _parameter_names(held: Collection[str], adapted: Collection[str]) -> list[str]:
    """What names the adapted parameters and no others: ends of paths, or paths."""
    ends = {".".join(name.split(".")[-2:]) for name in adapted}
    named = {n for n in held if any(n == end or n.endswith(f".{end}") for end in ends)}
    return sorted(ends) if named == set(adapted) else sorted(adapted)


def _target_names(modules: Collection[str], layers: Collection[str]) -> list[str] | str:
    """What names the adapted layers and no others: ends of paths, paths, or an expression."""
    ends = {name.rpartition(".")[2] for name in layers}
    for targets in (sorted(ends), sorted(layers)):
        named = {n for n in modules if any(n == t or n.endswith(f".{t}") for t in targets)}
        if named == set(layers):
            return targets
    return "|".join(re.escape(name) for name in sorted(layers))


def _saved_targets(model: nn.Module, copies: Collection[str]) -> list[str]:
    """What PEFT finds these modules by, and no others: ends of paths, or paths."""
    ends = sorted({name.rpartition(".")[2] for name in copies})
    if set(find_modules(model, ends)) == set(copies):
        return ends
    return sorted(copies)
