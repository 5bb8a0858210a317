"""Quantized checkpoints: a model's tensors under bitsandbytes' keys in safetensors files.

Importing this package imports nothing else: what reads and converts files needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qkern.checkpoint.load import load_into, read_tensors
    from qkern.checkpoint.save import save

__all__ = ["load_into", "read_tensors", "save"]

# Where each name lives; resolved by __getattr__ on first use.
_HOMES = {
    "load_into": "qkern.checkpoint.load",
    "read_tensors": "qkern.checkpoint.load",
    "save": "qkern.checkpoint.save",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        msg = f"module 'qkern.checkpoint' has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(importlib.import_module(home), name)
