"""Nothing waits for the device, but what must know whether a value is finite."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import pytest
import torch
from gpu_work import layer, step
from kernel_device import DEVICE

import qkern


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """An error from torch where the host waits for the device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: this is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_debug_mode_sees_a_host_that_waits() -> None:
    x = torch.ones(1, device=DEVICE)
    with no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
        x.item()


@pytest.mark.parametrize("M", [1, 8, 64, 300, 900])
def test_forward_and_backward_do_not_wait(M: int) -> None:
    made = layer(640, 1024)
    x, grad = (torch.randn(M, n, device=DEVICE).bfloat16() for n in (1024, 640))
    step(made, x, grad)  # compiles, and copies tables to the device
    with no_waiting():
        step(made, x, grad)
        made.weight.dequantize(torch.bfloat16)
        with torch.autocast("cuda", torch.float16):
            made(x)


def test_quantizing_without_a_check_does_not_wait() -> None:
    values = torch.randn(300, 512, device=DEVICE)
    operator = torch.ops.qkern
    for warm in (False, True):
        with no_waiting() if warm else contextlib.nullcontext():
            for kind in ("nf4", "int8"):
                _, absmax = operator.quantize(values, kind, 64, "keep")
                operator.quantize_absmax(absmax)
            operator.encode(values, absmax, "nf4", 64)
    assert qkern.quantize(values).device == DEVICE
