"""Quantized checkpoints: a model's tensors under bitsandbytes' keys in safetensors files."""

from qkern.checkpoint.load import load_into, read_tensors
from qkern.checkpoint.save import save

__all__ = ["load_into", "read_tensors", "save"]
