"""Small models with adapters of stacked experts, and their dense twins."""

from __future__ import annotations

from typing import Any

import torch
from architectures import ARCHITECTURES, output
from torch import Tensor, nn

import qkern
from qkern.tensor import QuantizedTensor

BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}
MOE = ["Mixtral", "Qwen3-MoE", "gpt-oss"]
UP, DOWN = "experts.gate_up_proj", "experts.down_proj"
BOTH = [UP, DOWN]
COMMON: dict[str, Any] = {"r": 3, "lora_alpha": 6}
KINDS: dict[str, dict[str, Any]] = {
    "both": {"target_modules": [], "target_parameters": BOTH},
    "with linear layers": {"target_modules": ["q_proj", "v_proj"], "target_parameters": BOTH},
    "the second alone, rslora": {
        "target_modules": [],
        "target_parameters": [DOWN],
        "use_rslora": True,
    },
    "one layer, patterns": {
        "target_modules": ["o_proj"],
        "target_parameters": ["layers.1.mlp.experts.gate_up_proj", DOWN],
        "rank_pattern": {"gate_up_proj": 5},
        "alpha_pattern": {r"layers\.0\.mlp\.experts\.down_proj": 9},
    },
}


def quantized(name: str = "Mixtral", **settings: Any) -> nn.Module:
    model = BY_NAME[name].small()
    qkern.quantize_model(model, **settings)
    return model


def dense_of(model: nn.Module) -> nn.Module:
    """Stock layers and experts of the values that a quantized model multiplies."""
    dense = BY_NAME[model.name].small()
    for path, parameter in model.named_parameters():
        if isinstance(parameter, QuantizedTensor):
            dense.get_parameter(path).data = parameter.dequantize()
    return dense


def base_and_dense(name: str) -> tuple[nn.Module, nn.Module]:
    model = quantized(name)
    model.name = name
    return model, dense_of(model)


def adapted(name: str = "Mixtral", seed: int = 1, **lora: Any) -> nn.Module:
    model = quantized(name)
    add(model, seed, **lora)
    return model


def add(model: nn.Module, seed: int = 1, **lora: Any) -> list[str]:
    torch.manual_seed(seed)
    settings = {**COMMON, **KINDS["both"], "init_lora_weights": False, **lora}
    return qkern.add_lora(model, **settings)


def experts_of(model: nn.Module, layer: int = 0) -> Any:
    return model.model.layers[layer].mlp.experts


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return output(model.eval())


def train(model: nn.Module, steps: int = 3) -> list[float]:
    parameters = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(output(model).flatten(0, 1), torch.arange(24) % 7)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
