"""Adapters that are made or merged under ``torch.inference_mode`` can be trained after it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qkern


def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.LayerNorm(96), nn.Linear(96, 40))
    qkern.quantize_model(model)
    return model


def assert_trains(model: nn.Module) -> None:
    x = torch.randn(3, 64, requires_grad=True)
    model(x).square().sum().backward()
    assert x.grad.norm() > 0
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(grad.norm() > 0 for grad in trained.values())
    assert not any(parameter.is_inference() for parameter in model.parameters())


@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora", "use_dora": True},
        {"init_lora_weights": False, "modules_to_save": ["1"]},
    ],
)
def test_adapters_that_start_from_what_the_model_holds(settings: dict[str, object]) -> None:
    model = net()
    with torch.inference_mode():
        qkern.add_lora(model, r=4, **settings)
        model(torch.randn(3, 64))
    assert_trains(model)


@pytest.mark.parametrize("merge_into", [None, "int8"])
def test_a_merge_taken_back(merge_into: str | None) -> None:
    model = net()
    qkern.add_lora(model, r=4, init_lora_weights=False, merge_into=merge_into)
    with torch.inference_mode():
        qkern.merge_adapter(model)
    qkern.unmerge_adapter(model)
    qkern.set_merge_into(model, None)  # so that the weight itself is multiplied
    assert_trains(model)
