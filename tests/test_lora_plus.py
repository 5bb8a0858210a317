"""LoRA+: groups of parameters for optimizers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapted_llama import SAVED, dense_of, quantized
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn

import qkern


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lora_plus_groups_are_pefts(weight_decay: float, tmp_path: Path) -> None:
    own = quantized()
    qkern.add_lora(own, r=4, use_dora=True, **SAVED)
    qkern.save_adapter(own, tmp_path)
    theirs = PeftModel.from_pretrained(dense_of(quantized()), tmp_path, is_trainable=True)
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8, loraplus_weight_decay=weight_decay
    )
    groups = qkern.lora_plus_groups(own, lr=1e-3, ratio=8, weight_decay=weight_decay)
    over_peft = qkern.lora_plus_groups(theirs, lr=1e-3, ratio=8, weight_decay=weight_decay)

    def numbers(groups: list[dict]) -> dict[tuple[float, float], int]:
        found: dict[tuple[float, float], int] = {}
        for group in groups:
            if group["params"]:
                key = (group["lr"], group["weight_decay"])
                found[key] = found.get(key, 0) + sum(p.numel() for p in group["params"])
        return found

    assert numbers(groups) == numbers(optimizer.param_groups)
    assert numbers(over_peft) == numbers(optimizer.param_groups)
    torch.optim.SGD(groups).step()


def test_layer_norms_and_biases_do_not_decay() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 8))
    qkern.quantize_model(model, exclude=["2"])
    qkern.add_lora(model, target_modules=["0"], modules_to_save=["1", "2"])
    groups = qkern.lora_plus_groups(model, lr=1.0, ratio=2, weight_decay=0.5)
    found = {(g["lr"], g["weight_decay"]): len(g["params"]) for g in groups}
    assert found == {(1.0, 0.5): 2, (2.0, 0.5): 1, (2.0, 0.0): 3}
    for settings in ({"lr": 0.0}, {"lr": 1.0, "ratio": 0.5}):
        with pytest.raises(qkern.FormatError, match=r"LoRA\+ needs"):
            qkern.lora_plus_groups(model, **settings)
    with pytest.raises(qkern.AdapterMismatchError, match="nothing to train"):
        qkern.lora_plus_groups(model.requires_grad_(False), lr=1.0)


def test_a_model_without_adapters_is_refused() -> None:
    for model in (nn.Sequential(nn.Linear(64, 64)), quantized()):
        with pytest.raises(
            qkern.AdapterMismatchError, match=r"call qkern\.add_lora or PEFT's get_peft_model"
        ):
            qkern.lora_plus_groups(model, lr=1.0)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules=["q_proj"]),
        IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    ],
)
def test_pefts_adapters_are_found(config: PeftConfig) -> None:
    model = get_peft_model(quantized(), config)
    groups = qkern.lora_plus_groups(model, lr=1.0, ratio=2)
    count = sum(p.requires_grad for p in model.parameters())
    assert sum(len(group["params"]) for group in groups) == count
    if isinstance(config, LoraConfig):
        assert {group["lr"]: len(group["params"]) for group in groups} == {
            1.0: count // 2,
            2.0: count // 2,
        }
