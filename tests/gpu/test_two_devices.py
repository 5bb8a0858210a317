"""A weight on one GPU, while another is the current one."""

from __future__ import annotations

import pytest
import torch
from gpu_work import layer, step
from kernel_device import DEVICE, same_bytes

import qkern
from qkern.errors import DeviceError

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU: this is about two")


def test_a_layer_on_the_other_device_computes_the_same() -> None:
    made = layer(320, 512)
    other = torch.device(DEVICE.type, 1)
    for M in (1, 8, 64, 300, 700):
        x, grad = (torch.randn(M, n, device=DEVICE).bfloat16() for n in (512, 320))
        here = step(made, x, grad)
        there = step(made.to(other), x.to(other), grad.to(other))
        made.to(DEVICE)
        for one, moved in zip(here, there, strict=True):
            assert moved.device == other
            torch.testing.assert_close(one, moved.to(DEVICE), rtol=2e-2, atol=2e-2)


def test_bytes_are_written_on_the_values_device() -> None:
    values = torch.randn(100, 192, device=torch.device(DEVICE.type, 1))
    q = qkern.quantize(values)
    assert q.device == values.device
    for got, right in zip(q.parts, qkern.quantize(values.cpu()).parts, strict=True):
        assert same_bytes(got, right)
    with pytest.raises(DeviceError):
        qkern.linear(torch.randn(1, 192, device=DEVICE), q)
