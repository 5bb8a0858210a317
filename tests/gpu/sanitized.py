"""Small launches of every kernel whose programs wait for each other, for compute-sanitizer.

    compute-sanitizer --tool racecheck python tests/gpu/sanitized.py

Split sums, parts that a last program adds, reductions over several programs; ends that fill no
tile. Exits with 1 where a result is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from gpu_work import error
from kernel_device import DEVICE
from kernel_products import product, worst_error

from qkern.kernels.dequantize import dequantize
from qkern.kernels.dispatch import Config
from qkern.kernels.dropout import Dropout
from qkern.kernels.linear import KERNELS, linear
from qkern.kernels.linear_backward import linear_backward
from qkern.kernels.lora import hidden
from qkern.kernels.lora_backward import grad_a, grad_hidden
from qkern.kernels.quantize import quantize
from qkern.kernels.quantize_absmax import quantize_absmax


def products() -> Iterator[tuple[str, float]]:
    """Shares of the largest error allowed."""
    for split, ahead in ((2, False), (3, True), (5, False)):
        operands = product(20, 70, 640, rank=4, bias=True)
        how = Config("matmul_small", 16, 64, (16, 64, 64), 4, 2, ahead, split)
        out = torch.full((20, 70), torch.nan, dtype=torch.bfloat16, device=DEVICE)
        adapter = (operands.bias, operands.h, operands.lora_B)
        KERNELS[how.op](operands.x, operands.weight, *adapter, how, out)
        yield f"split by {split}", worst_error(out, operands)
    for M in (1, 6, 33, 130):
        operands = product(M, 70, 640, rank=4, rounded=M > 2)
        y = linear(operands.x, operands.weight, None, operands.h, operands.lora_B)
        yield f"{M} tokens", worst_error(y, operands)


def gradients() -> Iterator[tuple[str, float]]:
    """The same, in units of 1e-2."""
    operands = product(70, 200, 320)
    grad = torch.randn(70, 200, device=DEVICE).bfloat16()
    A, B = torch.randn(24, 320, device=DEVICE), torch.randn(200, 24, device=DEVICE)
    dX = linear_backward(grad, operands.weight, A, B)
    right = grad.double() @ (operands.dense.double() + B.double() @ A.double())
    yield "dX", error(dX, right) / 1e-2
    h = hidden(operands.x, A)
    G, dB = grad_hidden(grad, B, h)
    yield "dB", error(dB, grad.double().mT @ h.double()) / 1e-2
    yield "dA", error(grad_a(G, operands.x, A.dtype), G.double().mT @ operands.x.double()) / 1e-2
    seed = torch.tensor([5], device=DEVICE)
    assert hidden(operands.x, A, dropout=Dropout(0.2, seed)).isfinite().all()


def codec() -> Iterator[tuple[str, float]]:
    """In units of the error of four bits."""
    operands = product(1, 70, 640)
    values = operands.dense.float().reshape(-1)
    packed, absmax = quantize(values, operands.fmt.replace(double_quant=False))
    codes, nested, offset, safe = quantize_absmax(absmax)
    assert bool(safe)
    parts = (packed, codes, nested, offset)
    decoded = dequantize(*parts, operands.fmt, values.numel(), torch.float32)
    yield "quantize, dequantize", error(decoded, values.double()) / 0.15


def main() -> int:
    """1 if a result is wrong."""
    torch.manual_seed(0)
    wrong = 0
    for name, share in (*products(), *gradients(), *codec()):
        print(f"{name}: {share:.2f} of its bound", flush=True)
        wrong += not share <= 1
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
