"""Triton kernels: plain tensors in, plain tensors out. Called by ``ops`` alone.

triton is imported by the kernel files, and these only for a device that ``is_supported`` names.
"""

from __future__ import annotations

import functools
import importlib.util

import torch

# Older GPUs (Turing and before) are no longer served by Triton.
MIN_CAPABILITY = (8, 0)


def is_supported(device: torch.device) -> bool:
    """Whether kernels run on ``device``; if not, the readable fallback does."""
    if device.type != "cuda":
        return False
    return _has_triton() and _capability(device.index or 0) >= MIN_CAPABILITY


def why_not(device: torch.device) -> str:
    """The reason for the fallback on ``device``, for ``qkern doctor``; empty if supported."""
    if is_supported(device):
        return ""
    if device.type != "cuda":
        return f"no kernels for {device.type}"
    if not _has_triton():
        return "triton is not installed"
    return f"compute capability {_capability(device.index or 0)} is below {MIN_CAPABILITY}"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)
