"""What tells the quantized weights under an adapter from others."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from qkern.experts_lora import ExpertWeight
from qkern.layers import QuantizedLinear
from qkern.merging import unmerged_format, unmerged_parts

# Values of each part of a weight that are read, evenly spaced: all of a small part.
_SAMPLES = 4096


def base_fingerprint(layers: Mapping[str, QuantizedLinear | ExpertWeight]) -> str | None:
    """What tells quantized weights from others: the same on every device and after a reload.

    SHA-256 over the path, shape, format and 4096 evenly spaced values of each part of each weight:
    cheap, and other weights differ nearly everywhere. A merged adapter does not count.

    Args:
        layers: path to layer, in any order.

    Returns:
        Hexadecimal digits; None if a weight is not here as a whole (sharded, on meta), or its
        bytes of before a merge are lost.
    """
    digest = hashlib.sha256()
    for name, layer in sorted(layers.items()):
        parts = unmerged_parts(layer)
        if parts is None:
            return None
        shape, fmt = tuple(layer.weight.shape), unmerged_format(layer)
        said = (name, shape, fmt.quant_type, fmt.blocksize, fmt.double_quant)
        digest.update(f"{said}\n".encode())
        for part in parts:
            if part is not None:
                digest.update(_sample(part))
    return digest.hexdigest()


def _sample(part: Tensor) -> bytes:
    flat, last = part.reshape(-1), part.numel() - 1
    index = torch.arange(min(part.numel(), _SAMPLES), device=part.device)
    if last >= _SAMPLES:
        index = index * last // (_SAMPLES - 1)
    return flat[index].cpu().view(torch.uint8).numpy().tobytes()
