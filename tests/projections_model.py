"""Siblings of one input in a model, and torch in place of the kernels that they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qkern
from qkern import kernels, reference
from qkern.ops import device_projections
from qkern.ops.device import Adapter, Base

LAYERS = ("q_proj", "k_proj", "v_proj")


def dense(base: Base) -> Tensor:
    N, K = base.shape
    return reference.dequantize(base.parts, base.fmt, N * K, torch.float32).reshape(N, K)


def forward(
    x: Tensor,
    bases: Sequence[Base],
    biases: Sequence[Tensor | None],
    adapters: Sequence[Adapter | None],
) -> tuple[list[Tensor], Tensor]:
    outputs, hidden = [], [x.new_empty(x.shape[:-1].numel(), 0)]
    for base, bias, adapter in zip(bases, biases, adapters, strict=True):
        y = nn.functional.linear(x, dense(base).to(x.dtype), bias)
        if adapter is not None:
            h = x.reshape(-1, x.shape[-1]).float() @ adapter.A.float().mT * adapter.scaling
            y = y + (h @ adapter.B.float().mT).reshape(y.shape).to(x.dtype)
            hidden.append(h)
        outputs.append(y.clone())
    return outputs, torch.cat(hidden, dim=1).float()


def backward(
    grads: Sequence[Tensor],
    x: Tensor | None,
    h: Tensor | None,
    bases: Sequence[Base],
    adapters: Sequence[Adapter | None],
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    dX = torch.zeros(())
    dA: list[Tensor | None] = []
    dB: list[Tensor | None] = []
    columns = iter(h.split([a.A.shape[0] for a in adapters if a], dim=1) if h is not None else ())
    for grad, base, adapter in zip(grads, bases, adapters, strict=True):
        dX = dX + grad @ dense(base).to(grad.dtype)
        rows = grad.reshape(-1, grad.shape[-1])
        dA.append(None)
        dB.append(None)
        if adapter is not None:
            G = rows @ adapter.B * adapter.scaling
            dX = dX + (G @ adapter.A).reshape(dX.shape)
            if x is not None:
                dA[-1] = G.mT @ x.reshape(-1, x.shape[-1])
                dB[-1] = rows.mT @ next(columns)
    return (dX if needs[0] else None), dA, dB


def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each launch took; from here on kernels serve, to all appearances."""
    counts: list[int] = []

    def launch(x: Tensor, bases: Sequence[Base], *operands: Any) -> tuple[list[Tensor], Tensor]:
        counts.append(len(bases))
        return forward(x, bases, *operands)

    monkeypatch.setattr(device_projections, "forward", launch)
    monkeypatch.setattr(device_projections, "backward", backward)
    monkeypatch.setattr(kernels, "is_supported", lambda _: True)  # a single layer stays the CPU's
    return counts


class Attention(nn.Module):
    """Three layers of one input, or what a test makes of them."""

    def __init__(self) -> None:
        super().__init__()
        for name, width in zip(LAYERS, (48, 16, 24), strict=True):
            setattr(self, name, nn.Linear(64, width, bias=name != "v_proj"))
        self.inputs: Callable[[Tensor, int], Tensor] = lambda x, i: x
        self.after: Callable[[Tensor], Tensor] = torch.tanh

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for i, name in enumerate(LAYERS):
            outputs.append(self.after(getattr(self, name)(self.inputs(x, i))))
        return torch.cat(outputs, dim=-1)


class Model(nn.Module):
    def __init__(self, *, adapters: bool = True, fused: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = Attention()
        qkern.quantize_model(self)
        if adapters:
            targets = ["q_proj", "v_proj"]
            qkern.add_lora(self, r=3, target_modules=targets, init_lora_weights=False)
        if fused:
            qkern.fuse_projections(self)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x)
        return y


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    """y, and the gradients of x and of all that is trained."""
    x = x.detach().clone().requires_grad_()
    y = model(x)
    model.zero_grad()
    y.square().sum().backward()
    return [y.detach(), *(p.grad for p in (x, *model.parameters()) if p.requires_grad)]


def assert_close(got: Sequence[Tensor], right: Sequence[Tensor]) -> None:
    for mine, other in zip(got, right, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def tokens(count: int = 5) -> Tensor:
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(3))
