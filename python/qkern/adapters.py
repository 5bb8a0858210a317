"""Adapters as files in PEFT's format.

A directory holds ``adapter_config.json`` and ``adapter_model.safetensors`` with the keys

    base_model.model.<path of the layer>.lora_A.weight    (r, in_features)
    base_model.model.<path of the layer>.lora_B.weight    (out_features, r)

which PEFT loads over the same base model, and whose own files load here. The file's metadata, which
PEFT ignores, keeps the format of the quantized base under "qkern", and under "qkern_base" a
fingerprint of its bytes: an adapter is of use over the weights that it was trained on alone.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import sys
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from qkern import shards
from qkern.errors import AdapterMismatchError, CorruptFileError, FormatError, QkernError
from qkern.files import pickle_advice, read_json, replacing, write_json
from qkern.fingerprint import base_fingerprint
from qkern.formats import QuantFormat
from qkern.layers import QLoRALinear, QuantizedLinear
from qkern.model import adapted_layers, attach_adapters
from qkern.patterns import matching_paths

CONFIG_NAME: Final = "adapter_config.json"
WEIGHTS_NAME: Final = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FORMAT_KEY = "qkern"
_BASE_KEY = "qkern_base"
# Settings of PEFT that change what an adapter computes, with the values that are plain LoRA.
_PLAIN: Final[dict[str, tuple[Any, ...]]] = {
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "alora_invocation_tokens": (None, []),
    "kasa_config": (None,),
    "arrow_config": (None,),
    "monteclora_config": (None,),
}
# Initializations that subtract the first adapter from the base.
_CHANGED_BASE: Final = ("pissa", "olora", "corda", "lora_ga", "loftq")


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
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = _plain(layer.lora_A)
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = _plain(layer.lora_B)
    formats = [shards.local_part(layer.weight).format for layer in layers.values()]
    # A tensor that 8-bit scales could not hold says nothing about what was asked for.
    fmt = formats[0].template.replace(double_quant=any(f.double_quant for f in formats))
    metadata = {"format": "pt", _FORMAT_KEY: json.dumps(dataclasses.asdict(fmt))}
    base = base_fingerprint(layers)
    if base is not None:
        metadata[_BASE_KEY] = base
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
    """
    directory = Path(path)
    config = read_json(directory / CONFIG_NAME)
    _check_config(config, directory)
    tensors = _read_tensors(directory / WEIGHTS_NAME)
    pairs = _pairs(tensors, directory)
    layers = dict(adapted_layers(model))
    if any(layer.merged for layer in layers.values()):
        msg = "an adapter is merged into the weights: call qkern.unmerge_adapter first"
        raise AdapterMismatchError(msg)
    bases = _check_fit(model, pairs, layers)
    alphas = _alphas(config, pairs, directory)
    if not force:
        _check_base(bases, directory)
    if not layers:
        for r in sorted({A.shape[0] for A, _ in pairs.values()}):
            names = [name for name, (A, _) in pairs.items() if A.shape[0] == r]
            dropout = _number(config, "lora_dropout", 0.0, directory)
            attach_adapters(model, names, r=r, lora_dropout=dropout)
        layers = dict(adapted_layers(model))
    use_rslora = bool(config.get("use_rslora"))
    with torch.no_grad():
        for name, (A, B) in pairs.items():
            layer = layers[name]
            layer.lora_A.copy_(A)
            layer.lora_B.copy_(B)
            layer.set_scaling(alphas[name], use_rslora=use_rslora)


def read_quantization(path: str | PathLike[str]) -> QuantFormat | None:
    """The format of the base that an adapter was trained on, None if the file does not say."""
    file = Path(path) / WEIGHTS_NAME
    text = _read_metadata(file).get(_FORMAT_KEY)
    try:
        return None if text is None else QuantFormat(**json.loads(text))
    except (ValueError, TypeError, QkernError) as error:
        msg = f"{file}: not a readable adapter: {error}"
        raise CorruptFileError(msg) from error


def _check_base(layers: Mapping[str, QuantizedLinear], directory: Path) -> None:
    """Refuse an adapter that says it was trained over other bytes than these layers have."""
    trained_on = _read_metadata(directory / WEIGHTS_NAME).get(_BASE_KEY)
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


def _check_config(config: dict[str, Any], directory: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        msg = f"{directory}: the adapter is of type {kind!r}: only LORA can be loaded here"
        raise AdapterMismatchError(msg)
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.startswith(_CHANGED_BASE):
        msg = (
            f"{directory}: init_lora_weights={start!r} changed the base weights: convert the "
            "adapter with PEFT (path_initial_model_for_weight_conversion), or load it there"
        )
        raise AdapterMismatchError(msg)
    for key, allowed in _PLAIN.items():
        if key in config and config[key] not in allowed:
            msg = (
                f"{directory}: {key}={config[key]!r} is not supported: load this adapter with "
                "PEFT over the quantized model"
            )
            raise AdapterMismatchError(msg)


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
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.removesuffix(".weight").rpartition(".")
        known = key.startswith(_PREFIX) and key.endswith(".weight")
        if not known or part not in ("lora_A", "lora_B") or tensor.dim() != 2:
            msg = f"{directory}: unexpected entry {key} of shape {tuple(tensor.shape)}"
            raise AdapterMismatchError(msg)
        found.setdefault(name.removeprefix(_PREFIX), {})[part] = tensor
    for name, parts in found.items():
        if len(parts) != 2 or parts["lora_A"].shape[0] != parts["lora_B"].shape[1]:
            shapes = {part: tuple(tensor.shape) for part, tensor in parts.items()}
            msg = f"{directory}: {name} needs lora_A (r, in) and lora_B (out, r), found {shapes}"
            raise AdapterMismatchError(msg)
    if not found:
        msg = f"{directory}: the file holds no adapter"
        raise AdapterMismatchError(msg)
    return {name: (parts["lora_A"], parts["lora_B"]) for name, parts in found.items()}


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
            near = difflib.get_close_matches(name, layers, n=3)
            msg = f"the model has no quantized layer {name}; nearest: {', '.join(near) or 'none'}"
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


def _alphas(config: dict[str, Any], names: Iterable[str], directory: Path) -> dict[str, float]:
    """lora_alpha of each layer; the keys of alpha_pattern are regular expressions, as in PEFT."""
    default = _number(config, "lora_alpha", 8.0, directory)
    alphas = dict.fromkeys(names, default)
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        msg = f"{directory}: alpha_pattern is a {type(patterns).__name__}, an object is needed"
        raise CorruptFileError(msg)
    for pattern in reversed(patterns):  # the first one that matches decides
        try:
            found = matching_paths(pattern, alphas)
        except FormatError as error:
            msg = f"{directory}: alpha_pattern {pattern[:80]!r} cannot be matched here: {error}"
            raise AdapterMismatchError(msg) from error
        alphas |= dict.fromkeys(found, _number(patterns, pattern, default, directory))
    return alphas


def _number(content: dict[str, Any], key: str, default: float, directory: Path) -> float:
    """A finite number of the configuration; the default where it is null or missing."""
    value = content.get(key)
    if value is None:
        return default
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
        msg = f"{directory}: {key[:80]!r} is {str(value)[:40]!r}, a finite number is needed"
        raise CorruptFileError(msg)
    return float(value)
