"""Write a quantized model so that qkern opens it, and bitsandbytes all formats but int8 blocks."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qkern.adapted import adapted_layers
from qkern.adapter_config import CONFIG_NAME as ADAPTER_CONFIG
from qkern.adapter_config import WEIGHTS_NAME as ADAPTER_WEIGHTS
from qkern.adapter_holder import NamedAdapters
from qkern.adapters import save_adapter
from qkern.checkpoint.file_metadata import TIED_KEY
from qkern.checkpoint.quantization_config import quantization_config
from qkern.checkpoint.source import INDEX_NAME, WEIGHTS_NAME
from qkern.errors import AdapterMismatchError, DeviceError, FormatError
from qkern.files import replacing, write_json
from qkern.flat_weight import FlatParameters
from qkern.layers import QuantizedLinear
from qkern.saved_modules import base_name
from qkern.weight_sites import dense_linear


def save(model: nn.Module, path: str | PathLike[str]) -> None:
    """Write a quantized model's weights and, for a transformers model, its configuration.

    Adapters go beside the base, as PEFT's files in the same directory, not into it. Weights,
    index and adapter of a model that was there before are replaced or removed.

    Args:
        model: after ``quantize_model``.
        path: the directory.

    Raises:
        FormatError: if no layer is quantized.
        AdapterMismatchError: if an adapter is merged into the weights, the model has several
            adapters, or is wrapped by PEFT.
        DeviceError: for a tensor on meta.
    """
    from safetensors.torch import save_file

    directory = Path(path)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, FlatParameters)}
    if not any(layer.quantized_names() for layer in layers.values()):
        msg = "no layer of the model is quantized: call qkern.quantize_model first"
        raise FormatError(msg)
    adapted = dict(adapted_layers(model))
    # A shared layer has several paths: its adapter stays out of the base at each of them.
    modules = model.named_modules(remove_duplicate=False)
    holders = [name for name, module in modules if isinstance(module, NamedAdapters)]
    if any(layer.merged for layer in adapted.values()):
        msg = (
            "an adapter is merged into the weights: call qkern.unmerge_adapter, and save both; or "
            "merge from file to file (qkern.merge_checkpoint, qkern merge --format nf4)"
        )
        raise AdapterMismatchError(msg)
    names = {name for layer in adapted.values() for name in layer.adapters}
    if len(names) > 1:
        msg = (
            f"a directory holds one adapter, the model has {sorted(names)}: write each with "
            "qkern.save_adapter(model, path, adapter_name=...), then save the model without all "
            "but one of them (qkern.delete_adapter(model, name)); over what qkern.load opens, "
            "qkern.load_adapter(model, path, adapter_name=...) brings them back"
        )
        raise AdapterMismatchError(msg)
    if any(name.endswith(".base_layer") for name in layers):
        msg = "the model is wrapped by PEFT: save its adapter with save_pretrained, and the base "
        raise AdapterMismatchError(msg + "before wrapping it (or after unload())")
    tensors, tied = _distinct(_base_state(model, holders))
    metadata = {"format": "pt", TIED_KEY: json.dumps(tied)}
    with replacing(directory / WEIGHTS_NAME) as temporary:
        save_file(tensors, temporary, metadata)
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_dict"):
        content = {**config.to_dict(), "architectures": [type(model).__name__]}
        content |= _quantization_config(model, layers, holders)
        write_json(directory / "config.json", json.loads(json.dumps(content, default=_as_text)))
    generation = getattr(model, "generation_config", None)
    if generation is not None and hasattr(generation, "to_dict"):
        write_json(directory / "generation_config.json", generation.to_dict())
    if adapted:
        save_adapter(model, directory, adapter_name=names.pop())
    # What an earlier model left here would be opened in place of this one, or on top of it.
    stale = [INDEX_NAME, *(() if adapted else (ADAPTER_CONFIG, ADAPTER_WEIGHTS))]
    for name in stale:
        (directory / name).unlink(missing_ok=True)


def _base_state(model: nn.Module, holders: list[str]) -> dict[str, Tensor]:
    """The ``state_dict`` without adapters, which ``holders`` are the paths of."""
    state = {
        name: tensor
        for key, tensor in model.state_dict().items()
        if (name := base_name(key, holders)) is not None
    }
    empty = next((name for name, tensor in state.items() if tensor.is_meta), None)
    if empty is not None:
        msg = f"{empty} is on meta and has no values to save: load the model first (qkern.load)"
        raise DeviceError(msg)
    return state


def _distinct(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Entries with memory of their own, and for the others the entry that they share."""
    kept: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for key, tensor in state.items():
        # A transposed view has the same place, shape and dtype.
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and place in first:
            tied[key] = first[place]
        else:
            first[place] = key
            kept[key] = tensor.detach().contiguous()
    return kept, tied


def _quantization_config(
    model: nn.Module, layers: dict[str, FlatParameters], holders: list[str]
) -> dict[str, Any]:
    """What transformers reads to open the directory: entries of ``config.json``."""
    weights: list[Any] = [
        layer._parameters[name] for layer in layers.values() for name in layer.quantized_names()
    ]
    formats = [weight.format.template for weight in weights]
    fmt = max(set(formats), key=formats.count)
    paths = (base_name(path, holders) for path in dense_linear(model))
    skipped = [name for name in paths if name is not None]
    plain = all(isinstance(layer, QuantizedLinear) for layer in layers.values())
    return quantization_config(fmt, skipped, _as_text(weights[0].dtype), bitsandbytes=plain)


def _as_text(value: Any) -> str:
    return str(value).removeprefix("torch.")
