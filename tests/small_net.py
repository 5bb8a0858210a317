"""Two layers behind a norm, dense, quantized, with adapters, and wrapped by PEFT."""

from __future__ import annotations

import torch
from bodies import same_bits
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import qkern
from qkern.layers import QuantizedLinear


class Net(nn.Module):
    """A dense layer first, so that a cast that fails half-way would show."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.norm = nn.LayerNorm(172)
        self.up, self.down = nn.Linear(172, 65), nn.Linear(65, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(self.norm(x))))


def quantized(seed: int = 0, **settings: object) -> nn.Module:
    model = Net(seed)
    qkern.quantize_model(model, **settings)
    return model


def adapted(seed: int = 0, **settings: object) -> nn.Module:
    model = quantized(seed, **settings)
    qkern.add_lora(model, r=3, init_lora_weights=False)
    return model


def wrapped(seed: int = 0, **settings: object) -> nn.Module:
    config = LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(quantized(seed, **settings), config)


def inputs() -> Tensor:
    return torch.randn(3, 172, generator=torch.Generator().manual_seed(5))


def parts_of(model: nn.Module) -> list[Tensor]:
    return [
        part.clone()
        for module in model.modules()
        if isinstance(module, QuantizedLinear)
        for part in module.weight.parts
        if part is not None
    ]


def assert_same_parts(model: nn.Module, parts: list[Tensor]) -> None:
    assert len(parts_of(model)) == len(parts)
    assert all(map(same_bits, parts_of(model), parts))
