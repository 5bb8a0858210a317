"""Experts that files hold one by one, for models that hold those of a layer as one tensor.

``transformers`` 5 stacks the experts of Mixtral, Qwen3-MoE and others when it loads them, and takes
them apart when it saves. Which tensor goes where it says itself (``integrations.expert_names``).

Codes of experts that were quantized one by one are put behind each other as they are: blocks never
cross them. Second-level scales are each expert's own, so they are decoded, exactly, to fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qkern import entry_keys, flat_keys, ops
from qkern.errors import CorruptFileError
from qkern.formats import QuantFormat
from qkern.reference import Parts
from qkern.tensor import QuantizedTensor


class Piece(NamedTuple):
    """Where a tensor of a file goes.

    Args:
        target: name of the model's tensor.
        expert: which of the stacked ones it is a part of; None if it is the whole tensor.
        slot: which of the expert's parts, by rows: gate before up.
    """

    target: str
    expert: int | None = None
    slot: int = 0


# By the names of dense tensors in a file: where those go that the model has under another name.
Pieces = Mapping[str, Piece]


def restack(tensors: Mapping[str, Tensor], pieces: Pieces) -> dict[str, Tensor]:
    """Entries under the model's names, stacked ones put together.

    Args:
        tensors: of the files; quantized ones as their flat entries.
        pieces: where they go.

    Raises:
        CorruptFileError: if parts are missing, or do not fit each other.
    """
    quantized = set(flat_keys.prefixes(tensors))
    out, names = {}, dict.fromkeys(_dense_name(key, quantized) for key in tensors)
    for key, tensor in tensors.items():
        name = _dense_name(key, quantized)
        piece = pieces.get(name)
        if piece is None:
            out[key] = tensor
        elif piece.expert is None:
            inside = key.startswith(name)
            at = piece.target + key.removeprefix(name)
            last = key.rpartition(".")[2]
            out[at if inside else entry_keys.sibling(piece.target, last)] = tensor
    for target, parts in stacked(names, pieces).items():
        if are_quantized(target, (name in quantized for name in parts)):
            weights = [flat_keys.unflatten(tensors, name) for name in parts]
            experts = len({pieces[name].expert for name in parts})
            out |= flat_keys.flatten(join(target, weights, experts), target)
        else:
            out[target] = join_dense(target, parts, pieces, tensors.__getitem__)
    return out


def stacked(names: Iterable[str], pieces: Pieces) -> dict[str, list[str]]:
    """For each tensor that is made of several, its parts by expert and slot.

    Raises:
        CorruptFileError: if parts are missing.
    """
    found: dict[str, dict[tuple[int, int], str]] = {}
    for name in names:
        piece = pieces.get(name)
        if piece is not None and piece.expert is not None:
            found.setdefault(piece.target, {})[piece.expert, piece.slot] = name
    for target, parts in found.items():
        experts, slots = (1 + max(place[i] for place in parts) for i in (0, 1))
        missing = [(e, s) for e in range(experts) for s in range(slots) if (e, s) not in parts]
        if missing:
            msg = f"{target}: the file lacks part {missing[0][1]} of expert {missing[0][0]}"
            raise CorruptFileError(msg)
    return {target: [parts[at] for at in sorted(parts)] for target, parts in found.items()}


def are_quantized(target: str, parts: Iterable[bool]) -> bool:
    """Whether the parts of a stacked tensor are quantized, which all or none of them must be.

    Raises:
        CorruptFileError: for some of them.
    """
    found = set(parts)
    if len(found) > 1:
        msg = f"{target}: the file holds some of its experts quantized and others dense"
        raise CorruptFileError(msg)
    return found == {True}


def join_dense(
    target: str, parts: Iterable[str], pieces: Pieces, read: Callable[[str], Tensor]
) -> Tensor:
    """The stacked tensor of dense parts, (experts, rows, columns)."""
    experts: dict[int | None, list[Tensor]] = {}
    for name in parts:
        experts.setdefault(pieces[name].expert, []).append(read(name))
    try:
        return torch.stack([torch.cat(slots) for slots in experts.values()])
    except RuntimeError as error:
        msg = f"{target}: its experts do not fit each other: {error}"
        raise CorruptFileError(msg) from error


def named(
    names: Iterable[str], pieces: Pieces, read: Callable[[str], Tensor]
) -> Iterator[tuple[str, str, Tensor]]:
    """Name in the file (of a first part), name in the model, and value of each dense tensor."""
    names = list(names)
    for name in names:
        piece = pieces.get(name)
        if piece is None:
            yield name, name, read(name)
        elif piece.expert is None:
            yield name, piece.target, read(name)
    for target, parts in stacked(names, pieces).items():
        yield parts[0], target, join_dense(target, parts, pieces, read)


def _dense_name(key: str, quantized: set[str]) -> str:
    owner = entry_keys.owner(key)
    return owner if owner in quantized else key


def check_parts(
    target: str, parts: Sequence[tuple[QuantFormat, Sequence[int]]], experts: int
) -> tuple[QuantFormat, tuple[int, ...]]:
    """Format and shape of what quantized parts are stacked to.

    Args:
        target: its name, for errors.
        parts: format and shape of each part, by expert and slot.
        experts: how many there are.

    Raises:
        CorruptFileError: if they cannot be stacked.
    """
    formats = {fmt.replace(double_quant=False) for fmt, _ in parts}
    columns = {tuple(shape[1:]) for _, shape in parts}
    rows, fmt = sum(shape[0] for _, shape in parts), next(iter(formats))
    blocks = not fmt.kind.per_row and all(
        len(shape) == 2 and math.prod(shape) % fmt.blocksize == 0 for _, shape in parts
    )
    if len(formats) > 1 or len(columns) > 1 or rows % experts or not blocks:
        found = ", ".join(sorted({f"{fmt.quant_type} {tuple(shape)}" for fmt, shape in parts}))
        msg = (
            f"{target} is to be stacked of {found}: one format of blocks, one width and whole "
            f"blocks of {fmt.blocksize} are needed; quantize the dense model with other settings"
        )
        raise CorruptFileError(msg)
    return fmt, (experts, rows // experts, *columns.pop())


def join(target: str, weights: Sequence[QuantizedTensor], experts: int) -> QuantizedTensor:
    """The stacked tensor of quantized parts, (experts, rows, columns); their codes as they are.

    Raises:
        CorruptFileError: if they cannot be stacked.
    """
    fmt, shape = check_parts(target, [(w.format, w.shape) for w in weights], experts)
    codes, scales = [], []
    for weight in weights:
        parts = ops.parts_of_shard(weight.parts, weight.format, 0)
        codes.append(parts.packed.reshape(-1))
        scales.append(parts.absmax.reshape(-1))
    parts = Parts(torch.cat(codes), torch.cat(scales), None, None)
    return QuantizedTensor.from_parts(parts, fmt, shape, weights[0].dtype)
