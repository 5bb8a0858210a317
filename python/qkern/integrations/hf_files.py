"""Quantized files that transformers reads: checked, and their modules put in place."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qkern import entry_keys
from qkern.adapter_files import kept_with_base
from qkern.checkpoint.placing import check_transposed, place_empty
from qkern.checkpoint.source import INDEX_NAME, Source, StoredTensor
from qkern.checkpoint.stacking import Pieces, are_quantized, check_parts, stacked
from qkern.errors import CorruptFileError
from qkern.formats import QuantFormat
from qkern.integrations.expert_names import pieces_of
from qkern.integrations.hf_names import Renaming
from qkern.module_tree import module_paths
from qkern.tensor import QuantizedTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclasses.dataclass(frozen=True)
class Stack:
    """Experts that a file holds one by one, and a model as one tensor.

    Args:
        stem: what their names begin with: "model.layers.0.mlp.experts".
        parameter: of the model: "gate_up_proj".
        tails: what follows the number of an expert, by slot: "gate_proj.weight", "up_proj.weight".
    """

    stem: str
    parameter: str
    tails: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Placed:
    """What a file holds, by names after transformers' renamings.

    They are those before it adds or takes off the base model's prefix.

    Args:
        names: for each tensor, whether it is quantized; experts of a stack are not here.
        stacks: whether each is quantized.
    """

    names: dict[str, bool]
    stacks: dict[Stack, bool]


def open_source(files: list[str] | None) -> Source:
    """The quantized checkpoint that transformers reads, checked.

    Raises:
        CorruptFileError: if it holds no safetensors, no quantized weight, or contradicts itself;
            for the shards of a ``variant``.
    """
    found = [Path(file) for file in files or []]
    if not found or any(file.suffix != ".safetensors" for file in found):
        msg = f"config.json says that qkern quantized it, which writes safetensors: got {files}"
        raise CorruptFileError(msg)
    directory = found[0].parent
    if len(found) > 1 and not (directory / INDEX_NAME).exists():
        msg = (
            f"{directory}: {found[0].name} and others are shards of a variant, of which one file "
            "alone can be read: save it with a larger max_shard_size, or without variant="
        )
        raise CorruptFileError(msg)
    source = Source(found[0] if len(found) == 1 else directory)
    if {file.name for file in source.files} != {file.name for file in found}:
        others = sorted({file.name for file in found}.difference(f.name for f in source.files))
        msg = f"{directory}: {INDEX_NAME} does not name {others[:3]}, which transformers reads"
        raise CorruptFileError(msg)
    if not source.is_quantized:
        msg = f"{source.path}: config.json says that qkern quantized it, but no weight is"
        raise CorruptFileError(msg)
    return source


def place_layers(model: PreTrainedModel, source: Source) -> Placed:
    """Put quantized modules on meta wherever the file holds a quantized weight.

    Args:
        model: on meta.
        source: of the checkpoint.

    Raises:
        CorruptFileError: if the file does not fit the model.
    """
    paths = {name: names for _, names in module_paths(model) for name in names}
    renaming, names = Renaming(model), {}
    pieces = pieces_of(model, source.tensors)
    filled = []
    for stored in source.tensors.values():
        key = renaming.parameter(stored.name)
        piece = pieces.get(stored.name)
        if stored.format is None:
            _check_dense(source, stored.name, key, renaming.state)
        if piece is not None and piece.expert is not None:
            continue
        names[renaming.renamed(stored.name)] = stored.format is not None
        if stored.format is not None:
            dtype = _dtype_of(f"{stored.file}: {stored.name}", key, renaming.state)
            place_empty(model, key, _empty(stored.format, stored.shape, dtype), paths)
            filled.append(key)
    stacks = {}
    for target, parts in stacked(source.tensors, pieces).items():
        quantized = are_quantized(target, (source.tensors[n].format is not None for n in parts))
        stacks[_stack(target, parts, pieces, renaming)] = quantized
        if quantized:
            key = renaming.prefixed(target)
            dtype = _dtype_of(f"{source.path}: {target}", key, renaming.state)
            fmt, shape = _joined(target, [source.tensors[name] for name in parts], pieces)
            place_empty(model, key, _empty(fmt, shape, dtype), paths)
    check_transposed(model, filled)
    # Tables and layout of a head that shares its codes: transformers would report them.
    stray = {renaming.renamed(k) for k in source.entries if entry_keys.owner(k) in source.tied}
    if stray:
        known = model._keys_to_ignore_on_load_unexpected or ()
        ignored: Any = {*known, *map(re.escape, stray)}
        model._keys_to_ignore_on_load_unexpected = ignored
    return Placed(names, stacks)


def main_format(source: Source) -> QuantFormat:
    """The format, before ``for_shape``, that most of the quantized weights have."""
    formats = [t.format.template for t in source.tensors.values() if t.format is not None]
    return max(set(formats), key=formats.count)


def _dtype_of(what: str, key: str, state: Mapping[str, Tensor]) -> torch.dtype:
    """That of the parameter in the model."""
    if key not in state:
        msg = f"{what} is quantized, for a parameter {key} that the model has not"
        raise CorruptFileError(msg)
    return state[key].dtype


def _empty(fmt: QuantFormat, shape: tuple[int, ...], dtype: torch.dtype) -> QuantizedTensor:
    """A quantized tensor on meta, of any format."""
    values = torch.empty(shape, dtype=dtype, device="meta")
    if not fmt.kind.decode_only:
        return QuantizedTensor.from_dense(values, fmt.template)
    # Of the same sizes.
    like = QuantizedTensor.from_dense(values, QuantFormat("nf4", fmt.blocksize, double_quant=False))
    return QuantizedTensor.from_parts(like.parts, fmt, shape, dtype)


def _joined(
    target: str, parts: list[StoredTensor], pieces: Pieces
) -> tuple[QuantFormat, tuple[int, ...]]:
    """Format and shape of a stack."""
    experts = len({pieces[part.name].expert for part in parts})
    found = [(part.format, part.shape) for part in parts if part.format is not None]
    return check_parts(target, found, experts)


def _stack(target: str, parts: list[str], pieces: Pieces, renaming: Renaming) -> Stack:
    """How the parts of a tensor are called.

    Raises:
        CorruptFileError: if a part's name is not the stack's, its number and the rest.
    """
    stem, _, parameter = target.rpartition(".")
    tails: dict[str, None] = {}
    for part in parts:
        name, before = renaming.renamed(part), f"{stem}.{pieces[part].expert}."
        if not name.startswith(before):
            msg = f"{part} is a part of {target}, which transformers cannot read: qkern.load can"
            raise CorruptFileError(msg)
        tails[name.removeprefix(before)] = None
    return Stack(stem, parameter, tuple(tails))


def _check_dense(source: Source, name: str, key: str, state: Mapping[str, Tensor]) -> None:
    """Refuse what transformers would take for weights, or pass over with a warning."""
    stored = source.tensors[name]
    if key in state and state[key].is_floating_point() and stored.dtype in ("int8", "uint8"):
        msg = f"{stored.file}: {name} holds {stored.dtype} codes without scales beside them"
        raise CorruptFileError(msg)
    advice = "" if key in state else kept_with_base([name])
    if advice:
        msg = f"{stored.file}: {advice}"
        raise CorruptFileError(msg)
