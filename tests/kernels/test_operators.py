"""The operators on kernels, as on a GPU: CPU tensors are sent that way, to the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import qkern
from qkern import kernels, reference
from qkern.ops import device, host

pytest.importorskip("triton")
from qkern.kernels.linear import KERNELS


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kernels called, from here on, by the operator in place of the CPU's code."""
    called: list[str] = []

    monkeypatch.setattr(kernels, "is_supported", lambda _: True)
    # All but ``compute``, which is for a CPU.
    monkeypatch.setattr(host, "linear", lambda *arguments: device.linear(*arguments[:-1]))
    for name, launched in list(KERNELS.items()):
        monkeypatch.setitem(KERNELS, name, recording(name, launched, called))
    return called


def recording(name: str, launched: Callable[..., Tensor], called: list[str]) -> Any:
    def run(*arguments: Any) -> Tensor:
        called.append(name)
        return launched(*arguments)

    return run


def layer(in_features: int, out_features: int) -> qkern.QLoRALinear:
    """A float32 layer with an adapter that does something."""
    made = qkern.QLoRALinear.from_linear(torch.nn.Linear(in_features, out_features), r=3)
    torch.nn.init.normal_(made.lora_B)
    return made


@pytest.mark.parametrize(("tokens", "kernel"), [(1, "matvec"), (6, "matmul_small")])
def test_a_layer_and_its_gradients_through_kernels_equal_fp64(
    launches: list[str], tokens: int, kernel: str
) -> None:
    made = layer(64, 40)
    x = torch.randn(tokens, 64, requires_grad=True)
    y = made(x)
    assert launches == [kernel]
    leaves = (x, made.lora_A, made.lora_B)
    exact_x, *exact_adapter = (leaf.detach().double().requires_grad_() for leaf in leaves)
    weight, bias = made.weight.dequantize(torch.float32).double(), made.bias.double()
    exact_y = reference.linear(exact_x, weight, bias, *exact_adapter, scaling=made.scaling)
    pairs = [(y, exact_y)]
    grads = torch.autograd.grad(y.square().sum(), leaves)
    exact_grads = torch.autograd.grad(exact_y.square().sum(), (exact_x, *exact_adapter))
    for got, expected in pairs + list(zip(grads, exact_grads, strict=True)):
        assert (got.double() - expected).norm() <= 1e-6 * expected.norm()


def test_a_checkpointed_layer_has_the_gradients_that_it_has_without(launches: list[str]) -> None:
    made = layer(64, 24)
    x = torch.randn(5, 64, requires_grad=True)
    leaves = (x, made.lora_A, made.lora_B)
    plain = torch.autograd.grad(made(x).square().sum(), leaves)
    again = checkpoint(made, x, use_reentrant=False)
    again = torch.autograd.grad(again.square().sum(), leaves)
    assert launches == ["matmul_small"] * 3  # once more in backward
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_what_no_kernel_serves_is_multiplied_densely(launches: list[str]) -> None:
    blocks_across_rows = qkern.quantize(torch.randn(6, 96))
    many = qkern.quantize(torch.randn(6, 64))
    for weight, x in (
        (blocks_across_rows, torch.randn(2, 96)),
        (many, torch.randn(4096, 64)),
    ):
        y = qkern.linear(x, weight)
        expected = x @ weight.dequantize(torch.float32).mT
        assert torch.allclose(y, expected, atol=1e-4)
    assert launches == []


def test_a_gpu_that_triton_does_not_serve_multiplies_densely(
    launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "is_supported", lambda _: False)
    weight = qkern.quantize(torch.randn(6, 64))
    x = torch.randn(3, 64, dtype=torch.float16)
    expected = x @ weight.dequantize(torch.float16).mT
    assert torch.equal(qkern.linear(x, weight), expected)
    assert launches == []


def test_tokens_of_any_shape_reach_the_kernel(launches: list[str]) -> None:
    weight = qkern.quantize(torch.randn(6, 64))
    x = torch.randn(64, 2, 3).permute(1, 2, 0)
    y = qkern.linear(x, weight, torch.randn(6))
    assert y.shape == (2, 3, 6)
    assert launches == ["matmul_small"]
    assert qkern.linear(x[:0], weight).shape == (0, 3, 6)
