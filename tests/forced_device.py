"""CPU tensors sent the way of a GPU's: to the kernels, in Triton's interpreter."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_errors import within
from torch import Tensor

import qkern
from qkern import kernels, reference
from qkern.kernels import (
    add_adapter,
    dequantize_merged,
    linear,
    linear_backward,
    lora,
    lora_backward,
)
from qkern.ops import device

# Largest relative error (Frobenius) of y, dX and dbias: of the rounding to x's dtype. Where a dense
# copy is multiplied, the sum of torch and the adapter's are rounded one after the other.
OUTPUT_BOUNDS = {torch.float32: 1e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# Of dA and dB in fp32: beside bf16 fp32 factors have 16 bits. In 16 bits: as above.
FACTOR_BOUNDS = {torch.float32: 1e-6, torch.float16: 1e-6, torch.bfloat16: 2.0**-16}


def send_to_kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """From here on; the list fills with the names of what is launched."""
    called: list[str] = []

    def record(where: Any, name: str) -> None:
        launched: Callable[..., Any] = getattr(where, name)

        def run(*arguments: Any, **options: Any) -> Any:
            called.append(name)
            return launched(*arguments, **options)

        monkeypatch.setattr(where, name, run)

    monkeypatch.setattr(device, "serves", lambda _: True)
    monkeypatch.setattr(kernels, "is_supported", lambda _: True)
    for where, name in (
        (lora, "hidden"),
        (lora_backward, "grad_hidden"),
        (lora_backward, "grad_a"),
        (linear_backward, "matmul_backward"),
        (add_adapter, "add_adapter"),
        (dequantize_merged, "dequantize_merged"),
    ):
        record(where, name)
    for name, launched in list(linear.KERNELS.items()):

        def multiply(*arguments: Any, _name: str = name, _launched: Any = launched) -> Tensor:
            called.append(_name)
            result: Tensor = _launched(*arguments)
            return result

        monkeypatch.setitem(linear.KERNELS, name, multiply)
    return called


def decode_beside_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on ``dequantize`` does so by kernels, or by torch where they are not supported."""
    module = importlib.import_module("qkern.ops.dequantize")  # of the package it hides the module
    monkeypatch.setattr(module, "_is_hosts", lambda _: False)


def multiply_densely(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on kernels do so for any number of tokens, as they do for many."""
    monkeypatch.setattr(linear, "config_for", lambda *_: None)


def leaves_of(
    M: int | tuple[int, ...],
    N: int,
    K: int,
    r: int,
    dtype: torch.dtype = torch.float32,
    adapter: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (*M, K), bias (N,), A (r, K) and B (N, r), all to be trained; y is of size 1."""
    shape = (M,) if isinstance(M, int) else M
    x, bias = torch.randn(*shape, K).to(dtype), torch.randn(N).to(dtype)
    A, B = torch.randn(r, K).div(K**0.5).to(adapter), torch.randn(N, r).to(adapter)
    for leaf in (x, bias, A, B):
        leaf.requires_grad_()
    return x, bias, A, B


def weight_of(N: int, K: int, *args: Any, **kwargs: Any) -> Any:
    """A quantized (N, K), so that rows of it times x are of size 1."""
    return qkern.quantize(torch.randn(N, K) / max(K, 1) ** 0.5, *args, **kwargs)


def exact_gradients(
    leaves: tuple[Tensor, Tensor, Tensor, Tensor],
    weight: Tensor,
    grad: Tensor,
    scaling: float,
    mask: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """y and the gradients of x, bias, A and B in fp64, over a dense weight (N, K).

    ``mask`` multiplies x for the adapter.
    """
    x, bias, A, B = (leaf.detach().double().requires_grad_() for leaf in leaves)
    y = reference.linear(x, weight.double(), bias)
    dropped = x if mask is None else x * mask
    y = y + (dropped @ A.mT) @ B.mT * scaling
    return y.detach(), *torch.autograd.grad(y, (x, bias, A, B), grad.double())


def error(got: Tensor, exact: Tensor) -> float:
    """Relative, by the Frobenius norm."""
    assert got.shape == exact.shape
    difference = (got.detach().double() - exact).norm()
    assert not difference.isnan(), "a value is missing"
    return float(difference / exact.norm()) if exact.numel() else 0.0


def worst(
    got: tuple[Tensor, ...], exact: tuple[Tensor, ...], dtype: torch.dtype, adapter: torch.dtype
) -> float:
    """The largest error of y and the four gradients, in units of its bound."""
    factor = FACTOR_BOUNDS[dtype] if adapter == torch.float32 else OUTPUT_BOUNDS[adapter]
    bounds = (*[OUTPUT_BOUNDS[dtype]] * 3, factor, factor)
    errors = [error(g, e) / bound for g, e, bound in zip(got, exact, bounds, strict=True)]
    names = ("y", "dX", "dbias", "dA", "dB")
    for name, bound, found in zip(names, bounds, errors, strict=True):
        within(f"layer: {name}", dtype, found * bound, bound)
    return max(errors)
