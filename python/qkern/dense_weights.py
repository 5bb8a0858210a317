"""Weights of before quantization, from wherever a user has them, one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TypeAlias

from torch import Tensor, nn

from qkern.adapter_config import nearest
from qkern.errors import AdapterMismatchError, CorruptFileError
from qkern.files import read_json
from qkern.module_tree import module_at
from qkern.tensor import QuantizedTensor

DenseSource: TypeAlias = nn.Module | Mapping[str, Tensor] | str | PathLike[str]
_INDEX = "model.safetensors.index.json"


def dense_weight(source: DenseSource, name: str) -> Tensor:
    """The dense weight of a layer.

    Args:
        source: a dense model, its state dict, a safetensors file, or a directory of such.
        name: path of the layer.

    Raises:
        AdapterMismatchError: if there is none, or it is quantized.
        FileNotFoundError: if a file is missing.
        CorruptFileError: if a file cannot be read.
    """
    key = f"{name}.weight"
    if isinstance(source, nn.Module):
        try:
            found = module_at(source, name)._parameters.get("weight")
        except AttributeError:
            found = None
        return _checked(found, name, [path for path, _ in source.named_modules()])
    if isinstance(source, Mapping):
        return _checked(source.get(key), key, list(source))
    return _from_files(Path(source), key)


def _checked(found: Tensor | None, name: str, known: list[str]) -> Tensor:
    if found is None:
        msg = f"the dense weights have no {name}; nearest: {nearest(name, known)}"
        raise AdapterMismatchError(msg)
    if isinstance(found, QuantizedTensor) or not found.is_floating_point():
        msg = f"{name} is no dense weight: it is quantized in the source too"
        raise AdapterMismatchError(msg)
    return found


def _shard_of(index: Path, key: str) -> str | None:
    """The name of the file that an index says an entry is in."""
    places = read_json(index).get("weight_map", {})
    found = places.get(key, "") if isinstance(places, dict) else None
    if not isinstance(found, str) or found != Path(found).name:
        msg = f"{index}: its weight_map is no object of file names"
        raise CorruptFileError(msg)
    return found or None


def _from_files(path: Path, key: str) -> Tensor:
    from safetensors import SafetensorError, safe_open

    files = [path]
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if (path / _INDEX).exists():
            placed = _shard_of(path / _INDEX, key)
            files = files if placed is None else [path / placed]
    if not files:
        msg = f"{path} holds no safetensors file"
        raise FileNotFoundError(msg)
    known: list[str] = []
    try:
        for file in files:
            with safe_open(file, "pt") as opened:
                keys = list(opened.keys())
                if key in keys:
                    tensor: Tensor = opened.get_tensor(key)
                    return _checked(tensor, key, keys)
                known += keys
    except SafetensorError as error:
        msg = f"{path}: not a readable safetensors file: {error}"
        raise CorruptFileError(msg) from error
    return _checked(None, key, known)
