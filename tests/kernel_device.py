"""Where the tests of kernels run: in Triton's interpreter on the CPU, or on a GPU.

QKERN_TEST_DEVICE names the device, "cpu" by default; "cuda" is a GPU of NVIDIA or AMD. Tests in
``tests/kernels`` make their tensors there; what they are compared with comes from the host.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from qkern.ops import host
from qkern.reference import Parts

HOST = torch.device("cpu")
DEVICE = torch.device(os.environ.get("QKERN_TEST_DEVICE", "cpu"))
INTERPRETED = DEVICE.type == "cpu"
if DEVICE.index is None and not INTERPRETED:
    DEVICE = torch.device(DEVICE.type, 0)

# Tensor cores cut the terms of a sum to the place of the largest; the interpreter, as ordinary
# units do, rounds each sum of two.
SUMS = 1.0 if INTERPRETED else 8.0


def on_device(parts: Parts) -> Parts:
    """The parts of a quantized tensor on the device under test."""
    return Parts(*(part if part is None else part.to(DEVICE) for part in parts))  # type: ignore[arg-type]


def same_bytes(got: Tensor, right: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits; NaN of the same bits are the same.

    Args:
        got: on any device.
        right: on any device.
    """
    if (got.dtype, got.shape) != (right.dtype, right.shape):
        return False
    if got.numel() == 0:
        return True
    one, other = (t.detach().cpu().reshape(-1).contiguous() for t in (got, right))
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@contextlib.contextmanager
def host_code_takes_cpu_tensors_alone() -> Iterator[None]:
    """A failed test instead of a crash, where a test hands a GPU's memory to the codec."""
    lend = host.lend

    def checked(tensor: Tensor) -> object:
        assert tensor.is_cpu, f"host code was given the memory of {tensor.device}"
        return lend(tensor)

    with mock.patch.object(host, "lend", checked):
        yield


def patch_once_a_launch() -> None:
    """Spare Triton's interpreter a quarter of its time.

    It puts its operations in place of those of ``triton.language`` where a launch begins, and again
    at each call of a function from a kernel, where they are in place already.
    """
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    language = importlib.import_module("triton.language")
    patch, run = interpreter._patch_lang, interpreter.GridExecutor.__call__
    done: set[frozenset[int]] = set()

    def patch_lang(fn: Any) -> Any:
        modules = (m for m in fn.__globals__.values() if inspect.ismodule(m))
        patched = frozenset(id(m) for m in modules if m in (language, language.core))
        if patched in done:
            return None
        done.add(patched)
        return patch(fn)

    def launch(self: Any, *arguments: Any, **settings: Any) -> Any:
        done.clear()
        try:
            return run(self, *arguments, **settings)
        finally:
            done.clear()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_lang, launch
