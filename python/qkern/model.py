"""Model surgery: quantize a model's linear layers in place, and add adapters to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import nn

from qkern import saved_modules
from qkern.adapted import attach_adapters
from qkern.adapter_config import by_pattern
from qkern.adapter_targets import find_targets
from qkern.codec import COMPUTE, check_choice
from qkern.coverage import CoverageReport, CoverageRow
from qkern.dense_weights import DenseSource
from qkern.errors import AdapterMismatchError, ArgumentError, FormatError, QkernError
from qkern.experts import hold_quantized, is_experts
from qkern.formats import QuantFormat, resolve_format
from qkern.layers import QuantizedLinear
from qkern.lora_adapter import DEFAULT
from qkern.merge_target import MergeTarget
from qkern.module_tree import leave_inference_mode, module_at, module_paths, replace_module
from qkern.tensor import QuantizedTensor
from qkern.weight_sites import Site, is_conv1d, linear_of_conv1d, sites

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
    """Quantize a model's linear layers, and experts that it holds as 3-D weights, in place.

    ``nn.Linear`` and transformers' ``Conv1D`` become ``QuantizedLinear``; modules of experts become
    ``QuantizedExperts`` and stay instances of their class. Left alone: the output head, routers of
    experts, weights that another module shares, subclasses of ``nn.Linear``, weights that are
    computed from others, and what ``exclude`` names. Each has its reason in the report. Layer by
    layer: an error (no memory left, say) leaves a model whose layers are each done or untouched,
    and the next call goes on. What ``torch.inference_mode`` made becomes ordinary tensors, which
    can be trained on.

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
    for site in sites(model, exclude, fmt):
        name = site.names[0]
        weights = next((importance[n] for n in site.names if n in importance), None)
        how = {"method": method, "importance": weights, "nonfinite": nonfinite}
        module = _quantize_site(model, site, fmt, how)
        weight: Any = module._parameters[site.parameter]
        if compute is not None and isinstance(module, QuantizedLinear) and not site.reason:
            module.compute = compute
        row = _row(name, weight, site.reason, fmt)
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
    *_unnamed: NoReturn,
    r: int = 16,
    lora_alpha: float = 32,
    target_modules: str | Sequence[str] = "all-linear",
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    use_dora: bool = False,
    init_lora_weights: bool | str = True,
    dtype: torch.dtype = torch.float32,
    lora_mode: str = "separate",
    merge_into: str | QuantFormat | MergeTarget | None = None,
    adapter_name: str = DEFAULT,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    modules_to_save: str | Sequence[str] = (),
    target_parameters: Sequence[str] = (),
    dense: DenseSource | None = None,
    loftq_iterations: int = 1,
    method: str = "absmax",
) -> list[str]:
    """Give quantized layers, and experts, a trainable adapter, in place; freeze everything else.

    The first adapter of a model is active and trains. Another one waits, frozen, until
    ``qkern.set_adapter`` makes it the active one. After an error nothing has changed: no layer, and
    nothing that was trained is frozen.

    Args:
        model: after ``quantize_model``.
        r: rank.
        lora_alpha: the adapter's part is multiplied by ``lora_alpha / r``.
        target_modules: "all-linear" for every quantized layer, names or ends of paths, or one
            regular expression for whole paths, as in PEFT. ``[]`` for experts alone.
        lora_dropout: probability of zeroing an input of the adapter's part, in training.
        use_rslora: multiply by ``lora_alpha / sqrt(r)`` instead.
        use_dora: train the lengths of the rows of the sum too, see ``qkern.dora``.
        init_lora_weights: True or "gaussian" to start at the base model, False for a random
            adapter. "loftq" to make up for what quantizing lost; "pissa", "pissa_niter_N" or
            "olora" to take the largest part of each weight out of the base and train that.
        dtype: of the adapters.
        lora_mode: "separate", or "merged" for GPUs, see ``qkern.linear``; layers that have an
            adapter keep theirs.
        merge_into: train for a merge into this format ("nf4", ...), see ``QLoRALinear``: such a
            merge then loses nothing. Needs ``lora_dropout=0``, and no DoRA.
        adapter_name: several adapters of a model have different ones.
        rank_pattern: ranks of layers whose paths end in a match of a regular expression, as in
            PEFT; the first that matches counts.
        alpha_pattern: the same for ``lora_alpha``.
        modules_to_save: ends of paths of dense modules that are trained as a whole, as in PEFT:
            embeddings, norms ("norm" is the end of "input_layernorm" too), heads. What shares a
            weight with one is trained with it. They keep their dtype.
        target_parameters: weights of stacked experts, by ends of their paths, as in PEFT:
            ``["experts.gate_up_proj", "experts.down_proj"]``. Each expert gets factors of its own.
            With ``r``, ``lora_alpha``, ``use_rslora``, patterns, and plain starts only.
        dense: the weights of before quantization, for "loftq", "pissa" and "olora": the dense
            model, its state dict, or a safetensors file or directory, read layer by layer. LoftQ
            needs it, the others take the quantized weights without it.
        loftq_iterations: 0 for a plain start, 1 for factors over the base as it is; more change
            the base too. The best one of each layer counts.
        method: "absmax" or "search", see ``qkern.quantize``, for a base that an initialization
            changes.

    Returns:
        The paths of the layers that got one, and of the weights of experts.

    Raises:
        AdapterMismatchError: if a target, a pattern or one of ``modules_to_save`` matches nothing,
            a module to save is quantized, a layer has an adapter of that name already, an adapter
            is merged, or ``dense`` is of another model.
        FormatError: for another ``lora_mode``, "merged" with dropout or DoRA, or a name with a
            dot; for another format to merge into, or dropout or DoRA with one; for what adapters
            of experts have not; for targets that are no regular expression.
        ArgumentError: for a setting without its name, PEFT's ``LoraConfig`` too.
        DeviceError: for a start from weights that are on meta.
        DTypeError: for a ``dtype`` that is not float32, float16, bfloat16 or float64.
        ShapeError: for a rank below 1, or a dropout outside of [0, 1).
    """
    if _unnamed:
        raise _not_named(_unnamed[0])
    names = find_targets(model, target_modules, target_parameters)
    ranks, alphas = (
        _numbers(names, default, patterns or {}, what)
        for default, patterns, what in (
            (r, rank_pattern, "rank_pattern"),
            (lora_alpha, alpha_pattern, "alpha_pattern"),
        )
    )
    targets = [modules_to_save] if isinstance(modules_to_save, str) else modules_to_save
    saved = saved_modules.with_tied(model, saved_modules.check_modules(model, targets))
    attach_adapters(
        model,
        {name: {"r": int(ranks[name]), "lora_alpha": alphas[name]} for name in names},
        copies=lambda: saved_modules.make_copies(model, saved, tied=True),
        lora_dropout=lora_dropout,
        use_rslora=use_rslora,
        use_dora=use_dora,
        init_lora_weights=init_lora_weights,
        dtype=dtype,
        lora_mode=lora_mode,
        merge_into=merge_into,
        adapter_name=adapter_name,
        dense=dense,
        loftq_iterations=loftq_iterations,
        method=method,
    )
    return names


def _not_named(given: object) -> ArgumentError:
    """The error for a setting without its name."""
    msg = f"add_lora takes settings by name, not {str(given)[:40]!r}: add_lora(model, r=16, ...)"
    if hasattr(given, "peft_type"):
        msg = (
            f"add_lora takes settings by name, not a {type(given).__name__}: add_lora(model, r=16, "
            "lora_alpha=32, target_modules=[...], ...), with PEFT's names; or give the config to "
            "PEFT, which works over quantized layers: get_peft_model(model, config)"
        )
    return ArgumentError(msg)


def _numbers(
    names: Sequence[str], default: float, patterns: Mapping[str, float], what: str
) -> dict[str, float]:
    """The number of each layer; every pattern must be of use."""
    for pattern in patterns:
        if 1 not in by_pattern(names, 0, {pattern: 1}, what).values():
            msg = f"{what} {pattern!r} matches none of the {len(names)} layers with an adapter"
            raise AdapterMismatchError(msg)
    return by_pattern(names, default, patterns, what)


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


def _quantize_site(
    model: nn.Module, site: Site, fmt: QuantFormat, how: dict[str, Any]
) -> nn.Module:
    """Quantize a weight, if it is to be and is not; the module that has it then."""
    name = site.names[0]
    module = module_at(model, name)
    weight: Any = module._parameters[site.parameter]
    if site.reason or isinstance(module, QuantizedLinear) or isinstance(weight, QuantizedTensor):
        return module
    try:
        if is_experts(module):
            hold_quantized(
                module, site.parameter, QuantizedTensor.from_dense(weight, fmt, **how), name
            )
            return module
        linear: Any = linear_of_conv1d(module) if is_conv1d(module) else module
        layer = QuantizedLinear.from_linear(linear, quant_type=fmt, **how)
    except QkernError as error:
        msg = f"{name}.{site.parameter}: {error}"
        raise type(error)(msg) from error
    layer.fan_in_fan_out = linear is not module
    replace_module(model, site.names, layer)
    return layer


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
