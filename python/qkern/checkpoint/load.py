"""Read a quantized checkpoint into a model that has the right layers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from qkern import flat_keys
from qkern.adapter_config import CONFIG_NAME as ADAPTER_NAME
from qkern.adapter_files import kept_with_base
from qkern.adapters import load_adapter
from qkern.checkpoint.placing import check_places, check_transposed, place, place_tied
from qkern.checkpoint.reader import open_maps
from qkern.checkpoint.source import Source, dtype_of_config
from qkern.checkpoint.stacking import Pieces, restack
from qkern.errors import CorruptFileError
from qkern.module_tree import module_paths


def load_into(
    model: nn.Module,
    path: str | PathLike[str],
    *,
    names: Callable[[nn.Module, Iterable[str]], Pieces] | None = None,
) -> None:
    """Load a quantized checkpoint into a model, in place and strictly.

    Linear layers that the file holds quantized become ``QuantizedLinear``, modules of experts
    ``QuantizedExperts``; an adapter beside the base is loaded too. Parameters on meta take over the
    file's tensors.

    Files of bitsandbytes' int8 rows do not say what dtype the weights had: they get the dtype of
    ``config.json`` beside them, or if that does not say, of the layers that they replace.

    Args:
        model: dense, of the checkpoint's architecture; on meta to save memory.
        path: a directory that ``save`` or transformers with bitsandbytes wrote.
        names: for files with names that are not the model's: where the dense tensors go.

    Raises:
        FileNotFoundError: if the directory holds no safetensors weights.
        CorruptFileError: if the file does not fit the model, or contradicts itself. Some layers may
            have been replaced then, without values: build the model again.
        FormatError: for a linear layer that computes something else than ``nn.Linear`` does;
            nothing is changed then.
    """
    directory = Path(path)
    source = Source(directory)
    tensors = _map_tensors(source)
    pieces = {} if names is None else names(model, source.tensors)
    if pieces:
        tensors = restack(tensors, pieces)
    paths = {name: names for _, names in module_paths(model) for name in names}
    prefixes = flat_keys.prefixes(tensors)
    _check_scales(model, tensors, prefixes)
    check_places(model, prefixes)
    named = dtype_of_config(source.config)
    dtype = None if named is None else getattr(torch, named)
    for prefix in prefixes:
        place(model, tensors, prefix, dtype, paths)
    check_transposed(model, prefixes)
    assign = any(parameter.is_meta for parameter in model.parameters())
    try:
        missing, unexpected = model.load_state_dict(tensors, strict=False, assign=assign)
    except RuntimeError as error:
        msg = f"{directory}: {error}"
        raise CorruptFileError(msg) from error
    if unexpected:  # torch does not see that a module's own name holds a dot
        known = model.state_dict().keys()
        unexpected = [key for key in unexpected if key not in known]
    tie = getattr(model, "tie_weights", None)
    if callable(tie):
        tie()
        place_tied(model, paths)
    # A parameter that is tied to a loaded one needs no entry of its own.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    held = {id(parameters[key]) for key in tensors if key in parameters}
    # A model on meta was just built: its buffers hold what they are computed to hold.
    computed = dict(model.named_buffers()) if assign else {}
    missing = [k for k in missing if id(parameters.get(k)) not in held and k not in computed]
    advice = kept_with_base(unexpected)
    if advice:
        msg = f"{directory}: {advice}"
        raise CorruptFileError(msg)
    if missing or unexpected:
        msg = (
            f"{directory} does not fit {type(model).__name__}: missing {missing[:5]}, "
            f"unexpected {list(unexpected)[:5]}"
        )
        raise CorruptFileError(msg)
    if (directory / ADAPTER_NAME).exists():
        load_adapter(model, directory)


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a directory's safetensors files, memory-mapped; shared ones put back."""
    return _map_tensors(Source(directory))


def is_quantized(directory: Path) -> bool:
    """Whether a directory's weights hold quantized tensors, by its files' headers alone."""
    return Source(directory).is_quantized


def _map_tensors(source: Source) -> dict[str, Tensor]:
    with contextlib.ExitStack() as stack:
        maps = open_maps(source, stack)
        tensors: dict[str, Tensor] = {
            key: maps[entry.file].get_tensor(key) for key, entry in source.entries.items()
        }
    return tensors | {key: tensors[owner] for key, owner in source.tied_entries.items()}


def _check_scales(model: nn.Module, tensors: dict[str, Tensor], prefixes: list[str]) -> None:
    """Refuse int8 codes for a dense parameter: their values would pass for weights."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for key, tensor in tensors.items():
        if tensor.dtype == torch.int8 and key in parameters and key not in prefixes:
            msg = f"{key}: int8 codes without their scales: there is no entry SCB beside it"
            raise CorruptFileError(msg)
