"""Read a dense checkpoint into a model whose linear layers are quantized on the way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qkern.checkpoint.reader import open_maps
from qkern.checkpoint.source import Source
from qkern.checkpoint.stacking import Pieces, named
from qkern.coverage import CoverageReport
from qkern.errors import CorruptFileError, FormatError, QkernError
from qkern.formats import QuantFormat
from qkern.model import quantize_model
from qkern.module_tree import module_paths
from qkern.tensor import QuantizedTensor


def load_dense_into(
    model: nn.Module,
    path: str | PathLike[str],
    fmt: QuantFormat,
    *,
    exclude: str | Sequence[str] = (),
    method: str = "absmax",
    device: torch.device | str | None = None,
    names: Callable[[nn.Module, Iterable[str]], Pieces] | None = None,
) -> CoverageReport:
    """Load a dense checkpoint, strictly; linear layers are quantized on the host as they are read.

    What ``quantize_model`` would quantize is, to the same bytes. Memory is that of the result and
    of one weight: files are mapped, and what goes to ``device`` has its 4 or 8 bits already.

    Args:
        model: of the checkpoint's architecture, on meta; it is changed.
        path: a directory with safetensors files, or one such file.
        fmt: what linear layers get.
        exclude: see ``quantize_model``.
        method: "absmax" or "search", see ``quantize_model``.
        device: of all parameters; the CPU if None.
        names: for files with names that are not the model's: where their tensors go.

    Returns:
        What became of each weight.

    Raises:
        FormatError: if the model is not on meta, and as ``quantize_model``.
        CorruptFileError: if the files do not fit the model.
        NonFiniteError: for NaN or infinity in a weight to be quantized, naming it.
    """
    if not all(parameter.is_meta for parameter in model.parameters()):
        msg = "the model has values: build it on meta, or load it and call qkern.quantize_model"
        raise FormatError(msg)
    source = Source(path)
    pieces = {} if names is None else names(model, source.entries)
    quantize_model(model, fmt, exclude=exclude)
    owners = _owners(model)
    unexpected = []
    with contextlib.ExitStack() as stack:
        maps = open_maps(source, stack)

        def read(key: str) -> Tensor:
            tensor: Tensor = maps[source.entries[key].file].get_tensor(key)
            return tensor

        for key, name, value in named(source.entries, pieces, read):
            places = owners.get(name, [])
            if places:
                _put(places, name, value, method, device)
            else:
                unexpected.append(key)
    tie = getattr(model, "tie_weights", None)
    if callable(tie):
        tie()
    missing = [name for name, places in owners.items() if places[0].value.is_meta]
    if missing or unexpected:
        msg = (
            f"{source.path} does not fit {type(model).__name__}: missing {missing[:5]}, "
            f"unexpected {unexpected[:5]}"
        )
        raise CorruptFileError(msg)
    if device is not None:
        model.to(device)  # what is computed and not read
    return quantize_model(model, fmt, exclude=exclude)


class _Place(NamedTuple):
    """Where a module holds a tensor."""

    module: nn.Module
    key: str

    @property
    def tensors(self) -> dict[str, Any]:
        tensors: dict[str, Any] = self.module._parameters
        return tensors if self.key in tensors else self.module._buffers

    @property
    def value(self) -> Tensor:
        found: Tensor = self.tensors[self.key]
        return found


def _owners(model: nn.Module) -> dict[str, list[_Place]]:
    """For the name of each tensor, all places that hold it: tied ones share a list."""
    shared: dict[int, list[_Place]] = {}
    owners: dict[str, list[_Place]] = {}
    for module, names in module_paths(model):
        for tensors in (module._parameters, module._buffers):
            for key, value in tensors.items():
                if value is None:
                    continue
                places = shared.setdefault(id(value), [])
                places.append(_Place(module, key))
                owners |= {f"{name}.{key}" if name else key: places for name in names}
    return owners


def _put(
    places: list[_Place], key: str, value: Tensor, method: str, device: torch.device | str | None
) -> None:
    """Put a tensor of the file where it belongs, quantized if that is a quantized layer's."""
    place = places[0]
    old = place.value
    if key.endswith("weight") and getattr(place.module, "fan_in_fan_out", False):
        value = value.mT
    if value.shape != old.shape:
        msg = f"{key}: the file holds {tuple(value.shape)}, {tuple(old.shape)} needed"
        raise CorruptFileError(msg)
    new = value
    if isinstance(old, QuantizedTensor):
        try:
            new = QuantizedTensor.from_dense(value, old.format.template, method=method)
        except QkernError as error:
            msg = f"{key}: {error}"
            raise type(error)(msg) from error
    new = new if device is None else new.to(device)
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    for place in places:
        place.tensors[place.key] = new
