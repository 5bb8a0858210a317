"""Adapters as files in PEFT's format.

A directory holds ``adapter_config.json`` and ``adapter_model.safetensors`` with the keys

    base_model.model.<path of the layer>.lora_A.weight    (r, in_features)
    base_model.model.<path of the layer>.lora_B.weight    (out_features, r)
    base_model.model.<path of the layer>.lora_magnitude_vector    (out_features,), with DoRA
    base_model.model.<path of a module>.<its entries>     of modules_to_save

and for weights of stacked experts (``target_parameters``), each with one more ``base_layer`` than
the one after it, and in the layout that ``lora_adapter`` tells of,

    base_model.model.<path of the module>[.base_layer].lora_A.weight    (experts r, in_features)
    base_model.model.<path of the module>[.base_layer].lora_B.weight    (out_features, r experts)

which PEFT loads over the same base model, and whose own files load here. The file's metadata, which
PEFT ignores, keeps the format of the quantized base under "qkern", a fingerprint of its bytes under
"qkern_base", and the number of tokens of its embeddings under "qkern_tokens": an adapter is of use
over the weights that it was trained on alone. Under "qkern_merge_into" it says what the layers were
trained to be merged into (``merge_into``).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qkern.adapted import (
    Adapted,
    adapted_layers,
    attach_adapters,
    check_unmerged,
)
from qkern.adapter_checks import (
    check_copies,
    check_finite,
    check_fit,
    check_place,
    check_tokens,
    pairs_of_experts,
    token_count,
)
from qkern.adapter_config import (
    BASE_KEY,
    CHANGED_KEY,
    CONFIG_NAME,
    FORMAT_KEY,
    PREFIX,
    TOKENS_KEY,
    WEIGHTS_NAME,
    alphas_of,
    check_config,
    number_of,
    peft_paths,
)
from qkern.adapter_description import describe
from qkern.adapter_files import check_files
from qkern.adapter_tensors import MAGNITUDE, read_tensors
from qkern.errors import (
    AdapterMismatchError,
    CorruptFileError,
    DeviceError,
    QkernError,
)
from qkern.experts_lora import ExpertWeight
from qkern.files import read_json, replacing, write_json
from qkern.fingerprint import base_fingerprint
from qkern.formats import QuantFormat
from qkern.layers import QuantizedLinear
from qkern.lora_adapter import DEFAULT, LoRAAdapter, check_name, joined
from qkern.merge_aware import check_settings
from qkern.merge_target import MERGE_KEY, MergeTarget, targets_as_text, targets_of_text
from qkern.merging import unmerged_format
from qkern.saved_modules import (
    find_modules,
    make_copies,
    original_module,
    saved_copies,
)


def save_adapter(
    model: nn.Module, path: str | PathLike[str], *, adapter_name: str | None = None
) -> None:
    """Write a model's adapter as PEFT's two files, each replaced as a whole.

    Args:
        model: with adapters, after ``add_lora``.
        path: the directory.
        adapter_name: of the adapter, which files do not keep; None for the active one.

    Raises:
        AdapterMismatchError: if the model has no such adapter, or layers of different dropout or
            kind.
        NonFiniteError: if the adapter holds NaN or infinity; a file that is there stays.
        DeviceError: if it is on meta.
    """
    from safetensors.torch import save_file

    layers = dict(adapted_layers(model))
    adapters = _adapters_of(layers, adapter_name)
    if not adapters:
        what = "active adapter" if adapter_name is None else f"adapter {adapter_name!r}"
        msg = f"the model has no {what} to save: call qkern.add_lora or set_adapter first"
        raise AdapterMismatchError(msg)
    layers = {name: layers[name] for name in adapters}
    names = {adapter_name or layer.active_adapter or "" for layer in layers.values()}
    tensors = {}
    inside = peft_paths([name for name, adapter in adapters.items() if adapter.experts is not None])
    for name, adapter in adapters.items():
        factors = (_plain(adapter.lora_A), _plain(adapter.lora_B))
        if adapter.experts is not None:
            factors = joined(*factors)
        for part, tensor in zip("AB", factors, strict=True):
            tensors[f"{PREFIX}{inside.get(name, name)}.lora_{part}.weight"] = tensor
        if adapter.lora_magnitude is not None:
            tensors[f"{PREFIX}{name}.{MAGNITUDE}"] = _plain(adapter.lora_magnitude)
    copies = saved_copies(model, next(iter(names)))
    for name, module in copies.items():
        for key, tensor in module.state_dict().items():
            tensors[f"{PREFIX}{name}.{key}"] = _plain(tensor).clone()  # tied ones twice
    check_finite(tensors)
    formats = [unmerged_format(layer) for layer in layers.values()]
    # A tensor that 8-bit scales could not hold says nothing about what was asked for.
    fmt = formats[0].template.replace(double_quant=any(f.double_quant for f in formats))
    changed = {adapter.changed_base for adapter in adapters.values()} - {""}
    metadata = {"format": "pt", FORMAT_KEY: json.dumps(dataclasses.asdict(fmt))}
    targets = {name: a.merge_into for name, a in adapters.items() if a.merge_into is not None}
    if targets:
        metadata[MERGE_KEY] = targets_as_text(targets)
    base = base_fingerprint(layers)
    if base is not None:
        metadata[BASE_KEY] = base
    tokens = token_count(model)
    if tokens is not None:
        metadata[TOKENS_KEY] = str(tokens)
    if changed:
        metadata[CHANGED_KEY] = ", ".join(sorted(changed))
    directory = Path(path)
    with replacing(directory / WEIGHTS_NAME) as temporary:
        save_file(tensors, temporary, metadata)
    write_json(directory / CONFIG_NAME, describe(model, adapters, list(copies)))


def _adapters_of(layers: Mapping[str, Adapted], adapter_name: str | None) -> dict[str, LoRAAdapter]:
    """The adapter of a name, or the active one, by the layers' paths."""
    found = {}
    for name, layer in layers.items():
        adapter = layer.adapter if adapter_name is None else layer.adapter_of(adapter_name)
        if adapter is not None:
            found[name] = adapter
    return found


def load_adapter(
    model: nn.Module,
    path: str | PathLike[str],
    *,
    force: bool = False,
    adapter_name: str = DEFAULT,
) -> None:
    """Load an adapter of PEFT's format, strictly.

    Layers get it if the model has none of the name; else the file must fit the one that is there.
    It is active if it is the model's first: else ``set_adapter`` makes it so.

    Args:
        model: after ``quantize_model``.
        path: a directory with PEFT's two files.
        adapter_name: what it is called in the model.
        force: load an adapter that was trained over other quantized weights all the same. The
            files that PEFT wrote do not say, and load without.

    Raises:
        FileNotFoundError: if a file is missing.
        CorruptFileError: if a file cannot be read.
        AdapterMismatchError: if the adapter is of another kind, or of another model.
        FormatError: if it was trained for a merge, and the model's layers have dropout, DoRA or
            ``lora_mode="merged"``.
        DeviceError: if the model is on meta, where there is no place for its values.
    """
    directory = Path(path)
    check_files(directory)
    config = read_json(directory / CONFIG_NAME)
    # PEFT says fan_in_fan_out for Conv1D, whose factors are those of any layer.
    applied = ("use_dora", "modules_to_save", "fan_in_fan_out", "target_parameters")
    check_config(config, directory, applied=applied)
    found = read_tensors(directory / WEIGHTS_NAME, use_dora=bool(config.get("use_dora")))
    copied = find_modules(model, _saved_names(config, directory))
    states = {
        name: found.module(name) for name in copied if original_module(model, name).state_dict()
    }
    pairs = pairs_of_experts(
        model, found.pairs(), _names(config, "target_parameters", directory), directory
    )
    check_name(adapter_name)
    check_unmerged(model)
    adapters = _adapters_of(dict(adapted_layers(model)), adapter_name)
    bases = check_fit(model, pairs, adapters)
    check_copies(model, states, adapter_name if adapters else None, directory)
    for name, adapter in adapters.items():
        if adapter.use_dora != found.use_dora:
            msg = f"{directory}: use_dora={found.use_dora} for {name}, which has another kind"
            raise AdapterMismatchError(msg)
    targets = _merge_targets(directory / WEIGHTS_NAME)
    _check_targets(model, adapters, targets)
    alphas = alphas_of(config, pairs, directory)
    check_place(bases)
    if not force:
        _check_base(bases, directory)
        trained_on = _read_metadata(directory / WEIGHTS_NAME).get(TOKENS_KEY)
        check_tokens(model, trained_on, directory)
    if not adapters:
        attach_adapters(
            model,
            {n: {"r": p.A.shape[-2], "merge_into": targets.get(n)} for n, p in pairs.items()},
            copies=lambda: make_copies(model, list(states), tied=_are_tied(model, states)),
            lora_dropout=number_of(config, "lora_dropout", 0.0, directory),
            use_dora=found.use_dora,
            adapter_name=adapter_name,
        )
        adapters = _adapters_of(dict(adapted_layers(model)), adapter_name)
    use_rslora = bool(config.get("use_rslora"))
    changed = _read_metadata(directory / WEIGHTS_NAME).get(CHANGED_KEY, "")
    with torch.no_grad():
        for name, pair in pairs.items():
            adapter = adapters[name]
            adapter.lora_A.copy_(pair.A)
            adapter.lora_B.copy_(pair.B)
            if adapter.lora_magnitude is not None and pair.magnitude is not None:
                adapter.lora_magnitude.copy_(pair.magnitude)
            adapter.set_scaling(alphas[name], use_rslora=use_rslora)
            adapter.changed_base, adapter.merge_into = changed, targets.get(name)
    for name, module in saved_copies(model, adapter_name).items():
        module.load_state_dict(states[name])


def _saved_names(config: Mapping[str, Any], directory: Path) -> list[str]:
    return _names(config, "modules_to_save", directory)


def _names(config: Mapping[str, Any], key: str, directory: Path) -> list[str]:
    names = config.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        msg = f"{directory}: {key} is {str(names)[:80]}, a list of names is needed"
        raise CorruptFileError(msg)
    return names


def _are_tied(model: nn.Module, states: Mapping[str, Mapping[str, Tensor]]) -> bool:
    """Whether the file's values of parameters that the model ties are the same."""
    first: dict[int, Tensor] = {}
    for name, state in states.items():
        for key, parameter in original_module(model, name).named_parameters():
            other = first.setdefault(id(parameter), state[key])
            if not torch.equal(other, state[key]):
                return False
    return True


def read_quantization(path: str | PathLike[str]) -> QuantFormat | None:
    """The format of the base that an adapter was trained on, None if the file does not say.

    Raises:
        FileNotFoundError: if there is no adapter.
        CorruptFileError: if its file cannot be read.
    """
    check_files(Path(path))
    file = Path(path) / WEIGHTS_NAME
    text = _read_metadata(file).get(FORMAT_KEY)
    try:
        return None if text is None else QuantFormat(**json.loads(text))
    except (ValueError, TypeError, QkernError) as error:
        msg = f"{file}: not a readable adapter: {error}"
        raise CorruptFileError(msg) from error


def _check_base(layers: Mapping[str, QuantizedLinear | ExpertWeight], directory: Path) -> None:
    """Refuse an adapter that says it was trained over other bytes than these layers have."""
    metadata, here = _read_metadata(directory / WEIGHTS_NAME), base_fingerprint(layers)
    trained_on, changed = metadata.get(BASE_KEY), metadata.get(CHANGED_KEY)
    unknown = trained_on is None or here is None
    if trained_on == here or (unknown and not changed):
        return
    fmt = next(iter(layers.values())).quantized_weight.format
    msg = (
        f"{directory}: the adapter was trained over other quantized weights than the model has: "
        f"fingerprint {str(trained_on)[:12]}, {read_quantization(directory)}; here "
        f"{str(here)[:12]}, {fmt}. "
        "Load it over its own base, quantized as it was, or pass force=True"
    )
    if changed:
        msg = (
            f"{directory}: the adapter was initialized by {changed}, which took a part out of the "
            f"base: fingerprint {str(trained_on)[:12]}, here {str(here)[:12]}. It is right over "
            "that base alone: save both by qkern.save, or make the base again by the same "
            "add_lora; force=True loads it all the same"
        )
    raise AdapterMismatchError(msg)


def _merge_targets(file: Path) -> dict[str, MergeTarget]:
    """What layers were trained to be merged into, by path."""
    text = _read_metadata(file).get(MERGE_KEY)
    return {} if text is None else targets_of_text(text, file)


def _check_targets(
    model: nn.Module, adapters: Mapping[str, LoRAAdapter], targets: Mapping[str, MergeTarget]
) -> None:
    """Refuse targets of layers whose adapters cannot be trained for them."""
    layers = dict(adapted_layers(model))
    for name in targets.keys() & adapters.keys():
        check_settings(adapters[name], layers[name].lora_mode, name)


def _read_metadata(file: Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            return opened.metadata() or {}
    except SafetensorError as error:
        msg = f"{file}: not a readable adapter: {error}"
        raise CorruptFileError(msg) from error


def _plain(parameter: Tensor) -> Tensor:
    if parameter.is_meta:
        msg = "the adapter is on meta, where it has no values to save: load it first"
        raise DeviceError(msg)
    full = getattr(parameter, "full_tensor", None)  # a DTensor is gathered
    tensor: Tensor = full() if full is not None else parameter
    return tensor.detach().cpu().contiguous()
