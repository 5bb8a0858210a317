"""Equal calls give equal bits: sums have one order, whatever runs when."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gpu_work import layer, step
from kernel_device import DEVICE, same_bytes
from kernel_products import product
from torch import Tensor

import qkern

pytest.importorskip("triton")
from qkern.kernels.dropout import Dropout
from qkern.kernels.linear import linear
from qkern.kernels.linear_backward import linear_backward
from qkern.kernels.lora import hidden
from qkern.kernels.lora_backward import grad_a, grad_hidden
from qkern.kernels.quantize_absmax import quantize_absmax

RUNS = 20


def assert_equal_runs(run: Callable[[], tuple[Tensor, ...]]) -> None:
    """Alone, and beside a stream that keeps the device busy and takes memory."""
    first = [t.clone() for t in run()]
    busy = torch.cuda.Stream()
    noise = torch.randn(2048, 2048, device=DEVICE, dtype=torch.bfloat16)
    busy.wait_stream(torch.cuda.current_stream())
    for turn in range(RUNS):
        if turn % 2:
            with torch.cuda.stream(busy):
                for _ in range(turn):
                    noise @ noise
        for one, other in zip(first, run(), strict=True):
            assert same_bytes(one, other), turn
    busy.synchronize()


@pytest.mark.parametrize("M", [1, 2, 5, 16, 40, 64, 100, 300, 512])
def test_products_of_any_number_of_tokens(M: int) -> None:
    operands = product(M, 1024, 4096, rank=16, bias=True)
    adapter = (operands.bias, operands.h, operands.lora_B)
    assert_equal_runs(lambda: (linear(operands.x, operands.weight, *adapter),))


@pytest.mark.parametrize("M", [1, 17, 300])
def test_gradients_of_input_and_adapter(M: int) -> None:
    operands = product(M, 1024, 2048)
    x, grad = operands.x, torch.randn(M, 1024, device=DEVICE).bfloat16()
    A, B = torch.randn(24, 2048, device=DEVICE), torch.randn(1024, 24, device=DEVICE)
    dropout = Dropout(0.1, torch.tensor([7], device=DEVICE))

    def run() -> tuple[Tensor, ...]:
        h = hidden(x, A, 0.5, dropout=dropout)
        G, dB = grad_hidden(grad, B, h, 0.5)
        dX = linear_backward(grad, operands.weight, A, B, 0.5, G=G, dropout=dropout)
        return h, G, dB, grad_a(G, x, A.dtype, dropout=dropout), dX

    assert_equal_runs(run)


@pytest.mark.parametrize("M", [1, 30, 400])
def test_a_layers_steps(M: int) -> None:
    made = layer(1024, 1024)
    x, grad = (torch.randn(M, 1024, device=DEVICE).bfloat16() for _ in range(2))
    assert_equal_runs(lambda: step(made, x, grad))


def test_quantized_bytes() -> None:
    values = torch.randn(1000, 1000, device=DEVICE)
    absmax = torch.rand(100_000, device=DEVICE)

    def run() -> tuple[Tensor, ...]:
        parts = qkern.quantize(values).parts
        return (*(part for part in parts if part is not None), *quantize_absmax(absmax))

    assert_equal_runs(run)
