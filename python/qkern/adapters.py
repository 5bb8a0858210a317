"""Adapters as files in PEFT's format.

A directory holds ``adapter_config.json`` and ``adapter_model.safetensors`` with the keys

    base_model.model.<path of the layer>.lora_A.weight    (r, in_features)
    base_model.model.<path of the layer>.lora_B.weight    (out_features, r)

which PEFT loads over the same base model, and whose own files load here. The file's metadata, which
PEFT ignores, keeps the format of the quantized base under "qkern", and under "qkern_base" a
fingerprint of its bytes: an adapter is of use over the weights that it was trained on alone. Under
"qkern_merge_into" it says what the layers were trained to be merged into (``merge_into``).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qkern.adapter_config import (
    BASE_KEY,
    CONFIG_NAME,
    FORMAT_KEY,
    PREFIX,
    WEIGHTS_NAME,
    alphas_of,
    check_config,
    nearest,
    number_of,
    pair_keys,
)
from qkern.errors import AdapterMismatchError, CorruptFileError, QkernError
from qkern.files import pickle_advice, read_json, replacing, write_json
from qkern.fingerprint import base_fingerprint
from qkern.formats import QuantFormat
from qkern.layers import QLoRALinear, QuantizedLinear
from qkern.merge_aware import check_settings
from qkern.merge_target import MERGE_KEY, MergeTarget, targets_as_text, targets_of_text
from qkern.merging import unmerged_format
from qkern.model import adapted_layers, attach_adapters


def save_adapter(model: nn.Module, path: str | PathLike[str]) -> None:
    """Write a model's adapter as PEFT's two files, each replaced as a whole.

    Args:
        model: with adapters, after ``add_lora``.
        path: the directory.

    Raises:
        AdapterMismatchError: if the model has no adapter, or layers of different dropout or kind.
    """
    from safetensors.torch import save_file

    layers = dict(adapted_layers(model))
    if not layers:
        msg = "the model has no adapter to save: call qkern.add_lora first"
        raise AdapterMismatchError(msg)
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = _plain(layer.lora_A)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = _plain(layer.lora_B)
    formats = [unmerged_format(layer) for layer in layers.values()]
    # A tensor that 8-bit scales could not hold says nothing about what was asked for.
    fmt = formats[0].template.replace(double_quant=any(f.double_quant for f in formats))
    metadata = {"format": "pt", FORMAT_KEY: json.dumps(dataclasses.asdict(fmt))}
    targets = {name: layer.merge_into for name, layer in layers.items() if layer.merge_into}
    if targets:
        metadata[MERGE_KEY] = targets_as_text(targets)
    base = base_fingerprint(layers)
    if base is not None:
        metadata[BASE_KEY] = base
    directory = Path(path)
    with replacing(directory / WEIGHTS_NAME) as temporary:
        save_file(tensors, temporary, metadata)
    write_json(directory / CONFIG_NAME, _config(model, layers))


def load_adapter(model: nn.Module, path: str | PathLike[str], *, force: bool = False) -> None:
    """Load an adapter of PEFT's format, strictly.

    Layers get their adapters if the model has none; else the file must fit those that are there.

    Args:
        model: after ``quantize_model``.
        path: a directory with PEFT's two files.
        force: load an adapter that was trained over other quantized weights all the same. The
            files that PEFT wrote do not say, and load without.

    Raises:
        FileNotFoundError: if a file is missing.
        CorruptFileError: if a file cannot be read.
        AdapterMismatchError: if the adapter is of another kind, or of another model.
        FormatError: if it was trained for a merge, and the model's layers have dropout.
    """
    directory = Path(path)
    config = read_json(directory / CONFIG_NAME)
    check_config(config, directory)
    tensors = _read_tensors(directory / WEIGHTS_NAME)
    pairs = _pairs(tensors, directory)
    layers = dict(adapted_layers(model))
    if any(layer.merged for layer in layers.values()):
        msg = "an adapter is merged into the weights: call qkern.unmerge_adapter first"
        raise AdapterMismatchError(msg)
    bases = _check_fit(model, pairs, layers)
    alphas = alphas_of(config, pairs, directory)
    if not force:
        _check_base(bases, directory)
    if not layers:
        for r in sorted({A.shape[0] for A, _ in pairs.values()}):
            names = [name for name, (A, _) in pairs.items() if A.shape[0] == r]
            dropout = number_of(config, "lora_dropout", 0.0, directory)
            attach_adapters(model, names, r=r, lora_dropout=dropout)
        layers = dict(adapted_layers(model))
    use_rslora = bool(config.get("use_rslora"))
    targets = _merge_targets(directory / WEIGHTS_NAME)
    for name in targets.keys() & layers.keys():
        check_settings(layers[name].lora_dropout, layers[name].lora_mode)
    with torch.no_grad():
        for name, (A, B) in pairs.items():
            layer = layers[name]
            layer.lora_A.copy_(A)
            layer.lora_B.copy_(B)
            layer.set_scaling(alphas[name], use_rslora=use_rslora)
            layer.merge_into = targets.get(name)


def read_quantization(path: str | PathLike[str]) -> QuantFormat | None:
    """The format of the base that an adapter was trained on, None if the file does not say."""
    file = Path(path) / WEIGHTS_NAME
    text = _read_metadata(file).get(FORMAT_KEY)
    try:
        return None if text is None else QuantFormat(**json.loads(text))
    except (ValueError, TypeError, QkernError) as error:
        msg = f"{file}: not a readable adapter: {error}"
        raise CorruptFileError(msg) from error


def _check_base(layers: Mapping[str, QuantizedLinear], directory: Path) -> None:
    """Refuse an adapter that says it was trained over other bytes than these layers have."""
    trained_on = _read_metadata(directory / WEIGHTS_NAME).get(BASE_KEY)
    here = base_fingerprint(layers)
    if trained_on in (None, here) or here is None:
        return
    fmt = next(iter(layers.values())).quantized_weight.format
    msg = (
        f"{directory}: the adapter was trained over other quantized weights than the model has: "
        f"fingerprint {trained_on[:12]}, {read_quantization(directory)}; here {here[:12]}, {fmt}. "
        "Load it over its own base, quantized as it was, or pass force=True"
    )
    raise AdapterMismatchError(msg)


def _merge_targets(file: Path) -> dict[str, MergeTarget]:
    """What layers were trained to be merged into, by path."""
    text = _read_metadata(file).get(MERGE_KEY)
    return {} if text is None else targets_of_text(text, file)


def _read_metadata(file: Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            return opened.metadata() or {}
    except SafetensorError as error:
        msg = f"{file}: not a readable adapter: {error}"
        raise CorruptFileError(msg) from error


def _plain(parameter: Tensor) -> Tensor:
    full = getattr(parameter, "full_tensor", None)  # a DTensor is gathered
    tensor: Tensor = full() if full is not None else parameter
    return tensor.detach().cpu().contiguous()


def _config(model: nn.Module, layers: dict[str, QLoRALinear]) -> dict[str, Any]:
    """The keys that every version of PEFT knows."""
    first = next(iter(layers.values()))
    kinds = {(layer.lora_dropout, layer.use_rslora) for layer in layers.values()}
    if len(kinds) > 1:
        msg = f"layers differ in (lora_dropout, use_rslora): {sorted(kinds)}; PEFT has one of each"
        raise AdapterMismatchError(msg)
    base = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None,
        "base_model_name_or_path": base,
        "r": first.r,
        "lora_alpha": first.lora_alpha,
        "lora_dropout": first.lora_dropout,
        "use_rslora": first.use_rslora,
        "target_modules": _target_names(model, layers),
        "rank_pattern": {_pattern(n): v.r for n, v in layers.items() if v.r != first.r},
        "alpha_pattern": {
            _pattern(n): v.lora_alpha for n, v in layers.items() if v.lora_alpha != first.lora_alpha
        },
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }


def _pattern(name: str) -> str:
    """The regular expression that PEFT matches with this path alone."""
    return f"^{re.escape(name)}"


def _target_names(model: nn.Module, layers: dict[str, QLoRALinear]) -> list[str] | str:
    """What names the adapted layers and no others: ends of paths, paths, or an expression."""
    modules = [name for name, _ in model.named_modules()]
    ends = {name.rpartition(".")[2] for name in layers}
    for targets in (sorted(ends), sorted(layers)):
        named = {n for n in modules if any(n == t or n.endswith(f".{t}") for t in targets)}
        if named == set(layers):
            return targets
    return "|".join(re.escape(name) for name in sorted(layers))


def _read_tensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    pickled = file.with_name("adapter_model.bin")
    if not file.exists() and pickled.exists():
        msg = f"there is no {file}: {pickle_advice(pickled)}"
        raise CorruptFileError(msg)
    if not file.exists():
        msg = f"there is no {file}"
        raise FileNotFoundError(msg)
    try:
        return load_file(file)
    except SafetensorError as error:
        msg = f"{file}: not a readable safetensors file: {error}"
        raise CorruptFileError(msg) from error


def _pairs(tensors: dict[str, Tensor], directory: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Path of a layer to its A and B."""
    keys = pair_keys({key: tuple(tensor.shape) for key, tensor in tensors.items()}, directory)
    return {name: (tensors[A], tensors[B]) for name, (A, B) in keys.items()}


def _check_fit(
    model: nn.Module,
    pairs: dict[str, tuple[Tensor, Tensor]],
    adapted: dict[str, QLoRALinear],
) -> dict[str, QuantizedLinear]:
    """The layers that the file's entries are for."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    for name, (A, B) in pairs.items():
        layer = layers.get(name)
        if layer is None:
            msg = f"the model has no quantized layer {name}; nearest: {nearest(name, layers)}"
            raise AdapterMismatchError(msg)
        expected = (layer.out_features, layer.in_features)
        ranks = (adapted[name].r,) if name in adapted else (A.shape[0],)
        if (B.shape[0], A.shape[1]) != expected or A.shape[0] not in ranks:
            msg = (
                f"{name}: the adapter is (out, in, r) = {(B.shape[0], A.shape[1], A.shape[0])}, "
                f"the layer is {(*expected, *ranks)}: is this the adapter's base model?"
            )
            raise AdapterMismatchError(msg)
    left = sorted(set(adapted) - set(pairs))
    if left:
        msg = f"the file has no entry for {len(left)} adapted layers, the first is {left[0]}"
        raise AdapterMismatchError(msg)
    return {name: layers[name] for name in pairs}
