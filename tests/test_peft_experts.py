"""PEFT's adapters of parameters, unmodified, over stacked experts that are quantized."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, output
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import qkern
from qkern.experts import QuantizedExperts

BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]


def quantized_and_dense(name: str) -> tuple[nn.Module, nn.Module]:
    """A model, and the dense one of the values that it multiplies."""
    model = BY_NAME[name].small()
    dense = copy.deepcopy(model)
    qkern.quantize_model(model)
    for path, parameter in model.named_parameters():
        if isinstance(parameter, qkern.QuantizedTensor):
            dense.get_parameter(path).data = parameter.dequantize()
    return model, dense


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3-MoE", "gpt-oss"])
def test_adapters_of_experts_train_as_over_dense_weights(name: str, tmp_path: Path) -> None:
    config = LoraConfig(
        r=4, target_modules=["q_proj"], target_parameters=PARAMETERS, init_lora_weights=False
    )
    model, dense = quantized_and_dense(name)
    base = copy.deepcopy(model)
    grads = []
    for each in (model, dense):
        torch.manual_seed(0)
        wrapped = get_peft_model(each, config)
        torch.manual_seed(1)
        trained = [p for p in wrapped.parameters() if p.requires_grad]
        for parameter in trained:
            nn.init.normal_(parameter, 0, 0.02)
        output(wrapped).square().mean().backward()
        grads.append(torch.cat([p.grad.reshape(-1) for p in trained]))
        if each is model:
            wrapped.save_pretrained(tmp_path)
            with torch.no_grad():
                expected = output(wrapped)
    assert grads[0].any()
    assert (grads[0] - grads[1]).norm() < 1e-5 * grads[1].norm()
    assert any(isinstance(module, QuantizedExperts) for module in model.modules())
    again = PeftModel.from_pretrained(base, tmp_path)
    with torch.no_grad():
        assert torch.equal(output(again.eval()), expected)
