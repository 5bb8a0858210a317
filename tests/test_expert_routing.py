"""How quantized experts get their rows: experts that are not theirs, and no rows at all."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import ARCHITECTURES
from torch import nn

import qkern
from qkern.integrations.hf_dequantizing import dequantize_modules

BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """Quantized experts, and dense ones of the same values."""
    model = BY_NAME[name].small()
    qkern.quantize_model(model)
    dense = copy.deepcopy(model)
    dequantize_modules(dense, None)
    return tuple(made.model.layers[0].mlp.experts for made in (model, dense))  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["Mixtral", "gpt-oss"])
def test_experts_of_others_add_nothing(name: str) -> None:
    quantized, dense = pair(name)
    x, weights = torch.randn(3, 64), torch.rand(3, 2)
    mine = torch.tensor([[0, 1], [2, 2], [1, 3]])
    others = torch.tensor([[-1, 1], [2, 4], [-7, 99]])
    taken = weights.masked_fill((others < 0) | (others > 3), 0.0)
    with torch.no_grad():
        expected = dense(x, torch.where(taken > 0, others, mine), taken)
        found = quantized(x, others, weights)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not found[2].any()


@pytest.mark.parametrize("name", ["Mixtral", "gpt-oss"])
def test_no_tokens_give_no_rows(name: str) -> None:
    quantized, _ = pair(name)
    x = torch.empty(0, 64, requires_grad=True)
    y = quantized(x, torch.empty(0, 2, dtype=torch.long), torch.empty(0, 2))
    assert y.shape == (0, 64)
    y.sum().backward()
    assert x.grad.shape == (0, 64)
