"""A small quantized Llama, the dense one of its values, and both with adapters."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from toys import tiny_llama, token_ids

import qkern

SAVED = {"modules_to_save": ["lm_head", "embed_tokens", "norm"]}
COMMON = {"r": 4, "lora_alpha": 8}


def quantized(**changes: object) -> nn.Module:
    model = tiny_llama(**changes)
    qkern.quantize_model(model)
    return model


def dense_of(model: nn.Module) -> nn.Module:
    """Stock layers with the rounded weights of a quantized model."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, qkern.QuantizedLinear):
            model.set_submodule(name, layer.dequantize())
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=token_ids()).logits


def train(model: nn.Module, steps: int = 3) -> list[float]:
    parameters = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=token_ids(), labels=token_ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def peft_of(model: nn.Module, **settings: object) -> nn.Module:
    config = LoraConfig(
        **{"target_modules": "all-linear", "task_type": "CAUSAL_LM", **COMMON, **settings}
    )
    return get_peft_model(model, config)


def edit(directory: Path, change: object = None, **settings: object) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    if change is not None:
        tensors = load_file(directory / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, directory / "adapter_model.safetensors")
