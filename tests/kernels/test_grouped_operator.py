"""``qkern.grouped_linear`` where kernels serve, in one launch or expert by expert, against fp64."""

from __future__ import annotations

import pytest
import torch
from forced_device import error, multiply_densely, send_to_kernels
from kernel_device import DEVICE, HOST

import qkern
from qkern import reference

pytest.importorskip("triton")
from qkern.kernels import grouped as module
from qkern.ops import experts

OFFSETS = [4, 4, 30]


@pytest.mark.interpreter("sends CPU tensors to kernels")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("adapters", "dense"), [(False, False), (True, False), (False, True)])
def test_product_and_gradients_are_those_of_fp64(
    transposed: bool, adapters: bool, dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    send_to_kernels(monkeypatch)
    monkeypatch.setattr(experts, "_on_host", experts._on_device)
    launches: list[bool] = []
    launch = module.grouped

    def recorded(*arguments: object, **settings: object) -> torch.Tensor:
        launches.append(True)
        return launch(*arguments, **settings)

    monkeypatch.setattr(module, "grouped", recorded)
    if dense:  # as for many tokens
        multiply_densely(monkeypatch)
    N, K = 64, 128
    with HOST:
        weight = qkern.quantize(torch.randn(3, K, N) if transposed else torch.randn(3, N, K))
    offsets = torch.tensor(OFFSETS)
    leaves = [torch.randn(32, K), torch.randn(3, N)]
    if adapters:
        leaves += [torch.randn(3, 4, K), torch.randn(3, N, 4)]
    for leaf in leaves:
        leaf.requires_grad_()
    x, bias, *lora = leaves
    names = dict(zip(("lora_A", "lora_B"), lora, strict=False))
    y = qkern.grouped_linear(x, weight, offsets, bias, **names, scaling=0.5, transposed=transposed)
    grads = torch.autograd.grad(y.square().sum(), leaves)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    right = reference.grouped_linear(
        exact[0],
        weight.dequantize().double().to(DEVICE),
        offsets,
        exact[1],
        *exact[2:],
        scaling=0.5,
        transposed=transposed,
    )
    wanted = torch.autograd.grad(right.square().sum(), exact)
    pairs = zip((y, *grads), (right.detach(), *wanted), strict=True)
    assert all(error(got, exact) < 2e-6 for got, exact in pairs)
    assert len(launches) == (0 if adapters or dense else 2)
