"""``merge_into`` by kernels: the codes, the product and the gradients of the host."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("triton")
from forced_device import send_to_kernels

import qkern

# Largest relative error against the host's, of y and dX and of dA and dB.
BOUNDS = {torch.float32: (1e-6, 1e-6), torch.bfloat16: (2.0**-8, 2.0**-8)}


@pytest.mark.parametrize("method", ["absmax", "search"])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("width", [128, 100])
def test_kernels_multiply_what_the_host_does(
    method: str, dtype: torch.dtype, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    target = qkern.MergeTarget(qkern.QuantFormat("nf4"), method)
    lora = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "merge_into": target}
    layer = qkern.QLoRALinear.from_linear(nn.Linear(width, 48), **lora)
    x, grad = torch.randn(9, width).to(dtype).requires_grad_(), torch.randn(9, 48).to(dtype)
    leaves = (x, layer.lora_A, layer.lora_B)
    y = layer(x)
    expected = (y, *torch.autograd.grad(y, leaves, grad))
    launches = send_to_kernels(monkeypatch)
    y = layer(x)
    found = (y, *torch.autograd.grad(y, leaves, grad))
    assert launches or width == 100  # blocks across rows: a dense copy is multiplied by torch
    outputs, factors = BOUNDS[dtype]
    for got, right, bound in zip(
        found, expected, (outputs, outputs, factors, factors), strict=True
    ):
        assert got.dtype == right.dtype
        assert (got.double() - right.double()).norm() <= bound * right.double().norm()
