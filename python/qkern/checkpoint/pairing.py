"""How the tensors of two checkpoints meet: by name, some as each other's transpose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qkern.checkpoint.block_weights import holds_transposed
from qkern.checkpoint.inspection_report import Comparison
from qkern.checkpoint.reader import CheckpointReader
from qkern.checkpoint.targets import is_conv1d, quantized_transposed


def compare_names(here: CheckpointReader, there: CheckpointReader) -> Comparison:
    """What cannot be compared; a tied name is compared through its owner."""
    ours, theirs = here.tensors, there.tensors
    flipped = _transposed(here, there)
    both = ours.keys() & theirs.keys()
    unlike = [
        (name, ours[name].shape, theirs[name].shape)
        for name in ours
        if name in both and name not in flipped and ours[name].shape != theirs[name].shape
    ]
    return Comparison(
        path=there.path,
        only_here=tuple(name for name in ours if name not in theirs.keys() | there.tied),
        only_there=tuple(name for name in theirs if name not in ours.keys() | here.tied),
        shapes=tuple(unlike),
        unread=tuple(
            name
            for name in ours
            if name in both and not (ours[name].is_readable and theirs[name].is_readable)
        ),
        stored_there={
            name: tensor.format.quant_type if tensor.format else tensor.dtype
            for name, tensor in theirs.items()
        },
        transposed=tuple(name for name in ours if name in flipped),
    )


def _transposed(here: CheckpointReader, there: CheckpointReader) -> set[str]:
    """Names of which one holds the transpose of the other."""
    configs = (here.config, there.config)
    config = next((each for each in configs if each.get("model_type")), {})
    unlike = _transposed_in(here, config) ^ _transposed_in(there, config)
    return {
        name
        for name in unlike & here.tensors.keys() & there.tensors.keys()
        if here.tensors[name].shape == _swapped(there.tensors[name].shape)
    }


def _transposed_in(reader: CheckpointReader, config: Mapping[str, Any]) -> set[str]:
    """Quantized weights that are the transposes of what the model's class holds."""
    quantized = [tensor for tensor in reader.tensors.values() if tensor.format is not None]
    found = {each.name for each in quantized if holds_transposed(each, config.get("model_type"))}
    conv1d = [tensor for tensor in quantized if is_conv1d(tensor, config)]
    if quantized_transposed(conv1d) is not False:  # if nothing tells, as all known programs do it
        found |= {tensor.name for tensor in conv1d}
    return found


def _swapped(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], *shape[-2:][::-1])
