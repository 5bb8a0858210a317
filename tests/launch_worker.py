"""Every launch of a kernel, to a driver that only writes down where it was asked to run.

Run by reliability/test_devices.py, without Triton's interpreter. Operands stand for tensors of GPU
1 while GPU 0 is the current one: a launch must make GPU 1 current and take its stream. Prints a
line for each launch, and "done".
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from qkern import reference
from qkern.formats import QuantFormat
from qkern.kernels import dequantize as dequantize_file
from qkern.kernels import launch, linear, linear_backward, lora, lora_backward
from qkern.kernels import quantize as quantize_file
from qkern.kernels.dequantize_merged import dequantize_merged
from qkern.kernels.quantize_absmax import quantize_absmax

STREAMS = {0: 3, 1: 7}  # the current one of each GPU


class FakeDriver:
    """What Triton asks before a launch."""

    def __init__(self) -> None:
        self.device = 0

    def get_current_device(self) -> int:
        """The index of the current GPU."""
        return self.device

    def get_current_stream(self, device: int) -> int:
        """The current stream of a GPU."""
        return STREAMS[device]


FAKE = FakeDriver()


@contextlib.contextmanager
def device_of(tensor: Tensor) -> Iterator[None]:
    """``torch.cuda.device_of`` of operands that are all on GPU 1."""
    assert isinstance(tensor, Tensor)
    before, FAKE.device = FAKE.device, 1
    try:
        yield
    finally:
        FAKE.device = before


def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """``JITFunction.run`` up to the launch."""
    assert not warmup
    values = [*args, *kwargs.values()]
    assert any(isinstance(value, Tensor) for value in values)
    sizes = grid(kwargs) if callable(grid) else grid
    assert all(isinstance(size, int) and 0 < size < 2**31 for size in sizes), sizes
    device = driver.active.get_current_device()
    stream = driver.active.get_current_stream(device)
    print(f"{kernel.__name__} device {device} stream {stream}")


def launch_all() -> None:
    """Every kernel of one layer, at several numbers of tokens."""
    torch.manual_seed(0)
    dense = torch.randn(64, 256)
    for fmt in (QuantFormat("nf4", 64, double_quant=True), QuantFormat("int8", 64)):
        parts = reference.quantize(dense, fmt)
        weight = launch.weight(*parts, fmt, dense.shape)
        quantize_file.quantize(dense, fmt)
        dequantize_file.dequantize(*parts, fmt, dense.numel(), torch.bfloat16)
        A, B = torch.randn(8, 256), torch.randn(64, 8)
        dequantize_merged(weight, A, B, 1.0, torch.bfloat16)
        for tokens in (1, 16, 128, 512):
            x, grad = torch.randn(tokens, 256).bfloat16(), torch.randn(tokens, 64).bfloat16()
            h = lora.hidden(x, A)
            linear.linear(x, weight, None, h, B)
            linear_backward.linear_backward(grad, weight, A, B, 1.0)
            lora_backward.grad_hidden(grad, B, torch.zeros(tokens, 8), 1.0)
            lora_backward.grad_a(torch.zeros(tokens, 8), x, torch.float32)
    quantize_absmax(torch.rand(4096))


def counters_of_a_stream() -> None:
    """The counters that split products share are those of the operands' GPU and its stream."""
    asked: list[torch.device] = []

    def current_stream(device: torch.device) -> Any:
        asked.append(device)
        return mock.Mock(cuda_stream=STREAMS[device.index])

    made: list[torch.device] = []

    def zeros(*sizes: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        made.append(device)
        return torch.empty(sizes, dtype=dtype).fill_(0)

    gpu = torch.device("cuda", 1)
    with (
        mock.patch("torch.cuda.current_stream", current_stream),
        mock.patch("torch.cuda.is_current_stream_capturing", return_value=False),
        mock.patch("torch.zeros", zeros),
    ):
        first = launch.counters(gpu, 4)
        assert launch.counters(gpu, 4) is first
        with mock.patch.dict(STREAMS, {1: 8}):  # another stream has its own
            assert launch.counters(gpu, 4) is not first
        kept = len(made)
        with mock.patch("torch.cuda.is_current_stream_capturing", return_value=True):
            # A launch of a graph has its own, which its graph need not set to zero.
            taken = [launch.counters(gpu, count) for count in (4, 40, 1)]
            assert [t.numel() for t in taken] == [4, 40, 1]
            places = [t.data_ptr() - taken[0].data_ptr() for t in taken]
            assert places == [0, 128, 384]
            assert first.data_ptr() not in [t.data_ptr() for t in taken]
            assert not any(t.any() for t in taken)
            assert len(made) == kept
            for _ in range(launch.GRAPH_COUNTERS // launch.COUNTERS):
                last = launch.counters(gpu, launch.COUNTERS)
            assert len(made) == kept + 1  # there were no more
            assert last.shape == (launch.COUNTERS,)
    assert set(made) == set(asked) == {gpu}
    print(f"counters device {gpu.index} stream {STREAMS[gpu.index]}")


if __name__ == "__main__":
    driver.set_active(FAKE)  # type: ignore[arg-type]
    with (
        mock.patch("torch.cuda.device_of", device_of),
        mock.patch.object(JITFunction, "run", run),
    ):
        launch_all()
    assert FAKE.device == 0
    counters_of_a_stream()
    print("done")
