"""Triton kernels: plain tensors in, plain tensors out. Called by ``ops`` alone.

triton is imported by the kernel files, and these only for a device that ``is_supported`` names.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")

# Older GPUs (Turing and before) are no longer served by Triton.
MIN_CAPABILITY = (8, 0)


def is_supported(device: torch.device) -> bool:
    """Whether kernels run on ``device``; if not, the readable fallback does."""
    return not why_not(device)


# What ``torch.compiler.assume_constant_result`` sets: compiled code is made for one device anyway.
# That function would load the compiler, which takes longer than all of qkern.
is_supported._dynamo_marked_constant = True  # type: ignore[attr-defined]


def multiplies_bf16(device: torch.device) -> bool:
    """Whether ``device`` has products of bf16: NVIDIA's have since Ampere."""
    if device.type != "cuda" or torch.version.hip is not None:
        return True
    return _capability(device.index or 0) >= MIN_CAPABILITY


def why_not(device: torch.device) -> str:
    """Why no kernel runs on ``device``; empty if one does.

    AMD's GPUs are "cuda" too. For Intel's all kernels compile, without fused products, but to a
    language that leaves subnormal numbers to the driver. Bytes are promised, so torch computes.
    """
    if device.type == "xpu":
        return "no kernels for xpu: what Intel's driver makes of them has not been checked"
    if device.type != "cuda":
        return f"no kernels for {device.type}"
    if not _has_triton():
        return "triton is not installed"
    capability = _capability(device.index or 0)
    if capability < MIN_CAPABILITY:
        found, needed = (".".join(map(str, c)) for c in (capability, MIN_CAPABILITY))
        return f"compute capability {found}, triton needs {needed}"
    return ""


def lasting(device: torch.device, make: Callable[[], T]) -> T:
    """What ``make`` allocates on ``device``, in memory that stays its own after the call at hand.

    ``torch.compile(mode="reduce-overhead")`` first runs a function with all that its thread
    allocates in the pool of its graphs, which later take whatever there is not an output of theirs.
    So tensors that a cache keeps are made by another thread, on the same stream.
    """
    if device.type != "cuda":
        return make()
    stream = torch.cuda.current_stream(device)

    def on_stream() -> T:
        with torch.cuda.stream(stream):
            return make()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(on_stream).result()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)
