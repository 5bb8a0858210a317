"""What tells a base's quantized weights from others, by their files. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from qkern import codec, entry_keys
from qkern.checkpoint.expert_weights import ExpertStack
from qkern.checkpoint.source import Source, StoredTensor
from qkern.codec import Parts
from qkern.formats import QuantFormat

# Values of each part of a weight that its fingerprint takes, see ``qkern.fingerprint``.
_SAMPLES: Final = 4096
# Bytes of codes that are read at a time.
_WINDOW: Final = 1 << 24


def tensors_of(weight: StoredTensor | ExpertStack) -> list[StoredTensor]:
    """The tensors of a file that a weight is made of."""
    return weight.tensors if isinstance(weight, ExpertStack) else [weight]


def fingerprint(base: Source, weights: Mapping[str, StoredTensor | ExpertStack]) -> str:
    """What ``qkern.fingerprint.base_fingerprint`` says of a model with these weights.

    Args:
        base: that holds them.
        weights: quantized ones, by the path of their layer; of experts by that of the weight.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        tensors = tensors_of(weight)
        shape = weight.sizes if isinstance(weight, ExpertStack) else weight.shape
        fmt: QuantFormat = base.state(tensors[0].name).format
        scales = [_scales(base, tensor) for tensor in tensors]
        parts = [part for part in scales[0][1:] if part is not None]
        if len(tensors) > 1:  # put behind each other when a model is loaded, with decoded scales
            fmt = fmt.replace(double_quant=False)
            parts = [np.concatenate([codec.decode_absmax(own) for own in scales])]
        said = (name, shape, fmt.quant_type, fmt.blocksize, fmt.double_quant)
        digest.update(f"{said}\n".encode())
        digest.update(_sampled_codes(base, [tensor.name for tensor in tensors]))
        for part in parts:
            digest.update(part[_places(part.size)].tobytes())
    return digest.hexdigest()


def _scales(base: Source, tensor: StoredTensor) -> Parts:
    """A tensor's parts without its codes."""
    state = base.state(tensor.name)
    fmt, none = state.format, np.empty(0, np.uint8)
    scales = base.read_bytes(entry_keys.scales_key(tensor.name, fmt))
    if not fmt.double_quant:
        return Parts(none, scales.view("<f4"), None, None)
    nested = base.read_bytes(f"{tensor.name}.nested_absmax").view("<f4")
    return Parts(none, scales, nested, np.array([state.offset], "<f4"))


def _sampled_codes(base: Source, names: Sequence[str]) -> bytes:
    """Of the codes of tensors, one behind the other, in windows that memory holds."""
    sizes = [base.entries[name].nbytes for name in names]
    places, first, found = _places(sum(sizes)), 0, []
    for name, size in zip(names, sizes, strict=True):
        for start in range(0, size, _WINDOW):
            count = min(_WINDOW, size - start)
            here = places[(places >= first) & (places < first + count)]
            if here.size:
                found.append(base.read_bytes(name, start, count)[here - first].tobytes())
            first += count
    return b"".join(found)


def _places(size: int) -> npt.NDArray[np.int64]:
    """Of evenly spaced values of so many."""
    last, index = size - 1, np.arange(min(size, _SAMPLES))
    return index * last // (_SAMPLES - 1) if last >= _SAMPLES else index
