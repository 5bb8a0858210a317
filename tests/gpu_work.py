"""What the tests of ``tests/gpu`` run on the device: layers, training steps, graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from kernel_device import DEVICE
from torch import Tensor

import qkern

T = TypeVar("T")
# Largest |found - exact| / |exact| of a layer's result: one rounding of each value, and fp32 sums
# (fp32: of some thousand terms, with an adapter as three TF32 products).
BOUNDS = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}


class Step(NamedTuple):
    """The results of forward and backward."""

    y: Tensor
    dX: Tensor
    dA: Tensor
    dB: Tensor


def layer(
    out_features: int,
    in_features: int,
    *,
    r: int = 5,
    dtype: torch.dtype = torch.bfloat16,
    adapter: torch.dtype = torch.float32,
    quant_type: str = "nf4",
) -> qkern.QLoRALinear:
    """On the device under test, with a bias, and an adapter that does something."""
    dense = torch.nn.Linear(in_features, out_features, device=DEVICE, dtype=dtype)
    made = qkern.QLoRALinear.from_linear(dense, r=r, quant_type=quant_type, dtype=adapter)
    torch.nn.init.normal_(made.lora_B, std=0.1)
    return made


def step(made: qkern.QLoRALinear, x: Tensor, grad: Tensor) -> Step:
    """Forward and backward."""
    x = x.detach().requires_grad_()
    y = made(x)
    grads = torch.autograd.grad(y, (x, made.lora_A, made.lora_B), grad)
    return Step(y.detach(), *grads)


def exact_step(made: qkern.QLoRALinear, x: Tensor, grad: Tensor) -> Step:
    """The same in fp64, over the weight's values in x's dtype."""
    W = made.quantized_weight.dequantize(x.dtype).double()
    A, B, bias = (t.detach().double() for t in (made.lora_A, made.lora_B, made.bias))
    x, grad = x.detach().double(), grad.double()
    h, G = made.scaling * x @ A.mT, made.scaling * grad @ B
    y = x @ W.mT + h @ B.mT + bias
    return Step(y, grad @ W + G @ A, G.mT @ x, grad.mT @ h)


def error(found: Tensor, exact: Tensor) -> float:
    """``|found - exact| / |exact|``; NaN where a value was not written."""
    return float((found.double() - exact).norm() / exact.norm())


def captured(run: Callable[[], T], warm_ups: int = 3) -> tuple[Callable[[], None], T]:
    """A CUDA graph of ``run``: what replays it, and the outputs that each replay writes anew.

    Args:
        run: reads and writes the same memory in every call.
        warm_ups: calls before, on another stream than the current one.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_ups):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph.replay, out
