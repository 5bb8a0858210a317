"""Model surgery: quantize a model's linear layers in place, and add adapters to them."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from qkern.codec import COMPUTE, check_choice
from qkern.coverage import CoverageReport, CoverageRow
from qkern.errors import AdapterMismatchError, FormatError, QkernError
from qkern.formats import QuantFormat, resolve_format
from qkern.layers import QLoRALinear, QuantizedLinear
from qkern.merge_target import MergeTarget
from qkern.module_tree import leave_inference_mode, module_at, module_paths, replace_module
from qkern.name_patterns import matches
from qkern.tensor import QuantizedTensor

__all__ = ["CoverageReport", "add_lora", "memory_footprint", "quantize_model"]


def quantize_model(
    model: nn.Module,
    quant_type: str | QuantFormat = "nf4",
    *,
    blocksize: int = 64,
    double_quant: bool = True,
    exclude: str | Sequence[str] = (),
    min_coverage: float | None = None,
    method: str = "absmax",
    importance: Mapping[str, torch.Tensor] | None = None,
    nonfinite: str = "error",
    compute: str | None = None,
) -> CoverageReport:
    """Replace every ``nn.Linear`` of a model by ``QuantizedLinear``, in place.

    Left alone: the output head, weights that another module shares, subclasses of ``nn.Linear``,
    weights that are computed from others, and what ``exclude`` names. Each has its reason in the
    report. Layer by layer: an error (no memory left, say) leaves a model whose layers are each done
    or untouched, and the next call goes on. What ``torch.inference_mode`` made becomes ordinary
    tensors, which can be trained on.

    Args:
        model: on any device; layers on meta stay there.
        quant_type: "nf4", "fp4", "int8", "int8_row", or a ``QuantFormat``.
        blocksize: values that share a scale; unused by int8_row, where a row does.
        double_quant: store the scales in 8 bits; unused by int8_row.
        exclude: module paths, ends of paths ("down_proj") or globs ("*.layers.0.*").
        min_coverage: least share of values that must be quantized, 0 to 1.
        method: "absmax" or "search", see ``qkern.quantize``.
        importance: for "search", weights of the errors, (in_features,) for each module path; a
            layer without an entry weighs all columns alike.
        nonfinite: "error" or "keep", see ``qkern.quantize``.
        compute: "exact" or "int8", see ``qkern.linear``: how the layers multiply, those too that
            were quantized before. None: new ones "exact", the others as they do.

    Raises:
        CoverageError: if less than ``min_coverage`` was quantized.
        FormatError: for an unknown format or setting, if an ``exclude`` matches no linear layer, or
            if the model is a single one, which cannot be replaced in place.
        NonFiniteError: for NaN or infinity in a weight, naming the layer.
    """
    fmt = resolve_format(quant_type, blocksize=blocksize, double_quant=double_quant)
    importance = importance or {}
    _check_importance(model, importance)
    if compute is not None:
        check_choice("compute", compute, COMPUTE)
    rows = []
    leave_inference_mode(model)
    for site in _sites(model, exclude):
        name = site.names[0]
        module = module_at(model, name)
        weight: Any = module._parameters[site.parameter]
        if type(module) is nn.Linear and site.parameter == "weight" and not site.reason:
            weights = next((importance[n] for n in site.names if n in importance), None)
            how = {"method": method, "importance": weights, "nonfinite": nonfinite}
            module = _quantize_layer(name, module, fmt, how)
            weight = module.quantized_weight
            replace_module(model, site.names, module)
        if compute is not None and isinstance(module, QuantizedLinear) and not site.reason:
            module.compute = compute
        row = _row(name, weight, site.reason or _class_reason(module, site.parameter), fmt)
        if site.parameter != "weight":
            row = dataclasses.replace(row, name=f"{name}.{site.parameter}")
        if not site.counts:
            row = dataclasses.replace(row, numel=0, bytes_before=0, bytes_after=0)
        rows.append(row)
    report = CoverageReport(tuple(rows))
    if min_coverage is not None:
        report.check(min_coverage)
    return report


def add_lora(
    model: nn.Module,
    *,
    r: int = 16,
    lora_alpha: float = 32,
    target_modules: str | Sequence[str] = "all-linear",
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    init_lora_weights: bool = True,
    dtype: torch.dtype = torch.float32,
    lora_mode: str = "separate",
    merge_into: str | QuantFormat | MergeTarget | None = None,
) -> list[str]:
    """Give quantized layers a trainable adapter, in place, and freeze everything else.

    After an error nothing has changed: no layer, and nothing that was trained is frozen.

    Args:
        model: after ``quantize_model``.
        r: rank.
        lora_alpha: the adapter's part is multiplied by ``lora_alpha / r``.
        target_modules: "all-linear" for every quantized layer, names or ends of paths, or one
            regular expression for whole paths, as in PEFT.
        lora_dropout: probability of zeroing an input of the adapter's part, in training.
        use_rslora: multiply by ``lora_alpha / sqrt(r)`` instead.
        init_lora_weights: True to start at the base model, False for a random adapter.
        dtype: of the adapters.
        lora_mode: "separate", or "merged" for GPUs, see ``qkern.linear``.
        merge_into: train for a merge into this format ("nf4", ...), see ``QLoRALinear``: such a
            merge then loses nothing. Needs ``lora_dropout=0``.

    Returns:
        The paths of the layers that got one.

    Raises:
        AdapterMismatchError: if a target matches no quantized layer, or one has an adapter already.
        FormatError: for another ``lora_mode``, or "merged" with dropout; for another format to
            merge into, or dropout with one.
        ShapeError: for a rank below 1, or a dropout outside of [0, 1).
    """
    layers = _quantized_layers(model)
    names = [name for name in layers if _is_target(name, target_modules)]
    _check_targets(target_modules, list(layers))
    attach_adapters(
        model,
        names,
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        use_rslora=use_rslora,
        init_lora_weights=init_lora_weights,
        dtype=dtype,
        lora_mode=lora_mode,
        merge_into=merge_into,
    )
    return names


def attach_adapters(model: nn.Module, names: Sequence[str], **lora: Any) -> None:
    """Give exactly these quantized layers an adapter each, and freeze everything else.

    Args:
        model: after ``quantize_model``.
        names: paths as ``named_modules`` has them.
        **lora: arguments of ``QLoRALinear``.

    Raises:
        AdapterMismatchError: if one has an adapter already.
    """
    layers = _quantized_layers(model)
    adapted = [name for name in names if isinstance(layers[name][0], QLoRALinear)]
    if adapted:
        msg = f"{adapted[0]} and {len(adapted) - 1} more layers have an adapter already"
        raise AdapterMismatchError(msg)
    trained = [
        parameter
        for _, layer in adapted_layers(model)
        for parameter in (layer.lora_A, layer.lora_B)
        if parameter.requires_grad
    ]
    leave_inference_mode(model)
    # Before anything is frozen: if one cannot be made, the model stays as it was.
    made = [QLoRALinear.from_linear(layers[name][0], **lora) for name in names]
    model.requires_grad_(False)
    for parameter in trained:  # adapters that were there before stay trainable
        parameter.requires_grad_(True)
    for name, layer in zip(names, made, strict=True):
        replace_module(model, layers[name][1], layer)


def memory_footprint(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers as they are stored; shared ones count once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(
        t.nbytes if isinstance(t, QuantizedTensor) else t.numel() * t.element_size()
        for t in tensors.values()
    )


def _check_importance(model: nn.Module, importance: Mapping[str, torch.Tensor]) -> None:
    linear = [name for _, names in module_paths(model) for name in names]
    unknown = [name for name in importance if name not in linear]
    if unknown:
        msg = f"importance names {unknown[0]!r}, which is no module of the model: use full paths"
        raise FormatError(msg)


def _quantize_layer(
    name: str, layer: nn.Linear, fmt: QuantFormat, how: dict[str, Any]
) -> QuantizedLinear:
    try:
        return QuantizedLinear.from_linear(layer, quant_type=fmt, **how)
    except QkernError as error:
        msg = f"{name}.weight: {error}"
        raise type(error)(msg) from error


def _row(name: str, weight: Any, reason: str, fmt: QuantFormat) -> CoverageRow:
    quantized = isinstance(weight, QuantizedTensor)
    if quantized and weight.format.template != fmt.template:
        same = weight.format.replace(double_quant=fmt.double_quant) == fmt
        reason = "fp32 scales: 8 bits cannot hold them" if same else "was quantized before"
    before = weight.numel() * weight.element_size()
    return CoverageRow(
        name=name,
        shape=tuple(weight.shape),
        status=weight.format.quant_type if quantized else "dense",
        reason=reason,
        numel=weight.numel(),
        bytes_before=before,
        bytes_after=weight.nbytes if quantized else before,
    )


def _class_reason(module: nn.Module, parameter: str) -> str:
    if type(module) is nn.Linear and parameter != "weight":
        return f"its weight is computed from {parameter}"
    if type(module) is nn.Linear or isinstance(module, QuantizedLinear):
        return ""
    return (
        f"{type(module).__name__}{'' if parameter == 'weight' else f'.{parameter}'}, not nn.Linear"
    )


@dataclasses.dataclass(frozen=True)
class _Site:
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


def _sites(model: nn.Module, exclude: str | Sequence[str]) -> list[_Site]:
    """The parameters of 2 or more dimensions, but for adapters."""
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
    heads, sites = _output_heads(model), []
    for module, names, key, shared in found:
        reason = ""
        if isinstance(module, nn.Linear):
            hits = [p for p in patterns if any(matches(name, p) for name in names)]
            matched.update(hits)
            others = [other for other in shared if other != names[0]]
            if hits:
                reason = f"excluded by {hits[0]!r}"
            elif id(module) in heads:
                reason = "the output head"
            elif others:
                reason = f"shares its weight with {others[0]}"
        sites.append(_Site(names, key, reason, counts=shared[0] == names[0]))
    unmatched = [pattern for pattern in patterns if pattern not in matched]
    if unmatched:
        msg = f"exclude={unmatched[0]!r} matches no linear layer: names, ends of paths or globs do"
        raise FormatError(msg)
    return sites


def _output_heads(model: nn.Module) -> set[int]:
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


def _quantized_layers(model: nn.Module) -> dict[str, tuple[QuantizedLinear, list[str]]]:
    """First path to layer and all of its paths."""
    return {
        names[0]: (module, names)
        for module, names in module_paths(model)
        if isinstance(module, QuantizedLinear)
    }


def _check_targets(targets: str | Sequence[str], names: list[str]) -> None:
    """Refuse a target that matches no layer, naming the nearest ones."""
    wanted = [targets] if isinstance(targets, str) else list(targets)
    unmatched = [
        target
        for target in wanted
        if not any(
            _is_target(name, target if isinstance(targets, str) else [target]) for name in names
        )
    ]
    if wanted and not unmatched:
        return
    found = sorted({name.rpartition(".")[2] for name in names})
    near = difflib.get_close_matches(unmatched[0], [*found, *names], n=3) if unmatched else []
    msg = (
        f"target_modules={targets!r}: {', '.join(map(repr, unmatched)) or 'nothing'} matches no "
        f"quantized layer; nearest: {', '.join(near) or 'none'}; quantized are: "
        f"{', '.join(found) or 'none (call quantize_model first)'}"
    )
    raise AdapterMismatchError(msg)


def _is_target(name: str, targets: str | Sequence[str]) -> bool:
    if targets == "all-linear":
        return True
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, QLoRALinear]]:
    """Paths and layers that have an adapter."""
    for name, module in model.named_modules():
        if isinstance(module, QLoRALinear):
            yield name, module
