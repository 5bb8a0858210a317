"""Unmodified PEFT over quantized layers, and qkern's own adapters in PEFT's files."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from toys import tiny_llama, token_ids

import qkern

CONFIG = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def quantized() -> nn.Module:
    model = tiny_llama()
    qkern.quantize_model(model)
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=token_ids()).logits


def train(model: nn.Module, steps: int = 3) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=token_ids(), labels=token_ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def packed_bytes(model: nn.Module) -> list[Tensor]:
    return [m.weight.packed.clone() for m in model.modules() if hasattr(m.weight, "packed")]


def layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, qkern.QuantizedLinear)]


def test_peft_trains_saves_and_reloads(tmp_path: Path) -> None:
    model = get_peft_model(quantized(), copy.deepcopy(CONFIG))
    assert torch.equal(logits(model), logits(quantized()))  # B starts at zero
    losses = train(model.train())
    assert losses[-1] < losses[0]
    expected = logits(model.eval())
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(quantized(), tmp_path).eval()
    assert torch.equal(logits(reloaded), expected)


@pytest.mark.case("E5")
def test_peft_merges_and_unmerges_to_the_same_bytes() -> None:
    model = get_peft_model(quantized(), copy.deepcopy(CONFIG)).train()
    train(model, steps=20)
    model.eval()
    before = [[p.clone() for p in m.weight.parts] for m in layers(model)]
    adapted = logits(model)
    model.merge_adapter()
    base = logits(quantized())
    merged = logits(model)
    # a merge into 4 bits keeps a part of the adapter: nearer to it than the base is
    assert (merged - adapted).norm() < 0.8 * (base - adapted).norm()
    model.unmerge_adapter()
    for layer, parts in zip(layers(model), before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(layer.weight.parts, parts, strict=True))
    assert torch.equal(logits(model), adapted)


@pytest.mark.skipif(
    torch.__version__ < (2, 7), reason="torch 2.6 compiles no PeftModel as one graph, dense or not"
)
def test_peft_over_a_compiled_quantized_model() -> None:
    torch._dynamo.reset()
    model = get_peft_model(quantized(), copy.deepcopy(CONFIG)).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = {"input_ids": token_ids(), "labels": token_ids()}
    model(**inputs).loss.backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    compiled(**inputs).loss.backward()
    got = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(got) == len(expected) == 28
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_own_adapter_loads_in_peft_over_dense_weights(tmp_path: Path) -> None:
    model = quantized()
    qkern.add_lora(model, r=4, lora_alpha=8)
    train(model.train())
    expected = logits(model.eval())
    qkern.save_adapter(model, tmp_path)
    dense = tiny_llama()
    for name, layer in quantized().named_modules():
        if isinstance(layer, qkern.QuantizedLinear):
            dense.set_submodule(name, layer.dequantize())
    peft_model = PeftModel.from_pretrained(dense, tmp_path).eval()
    torch.testing.assert_close(logits(peft_model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_peft_adapter_loads_here(tmp_path: Path, use_rslora: bool) -> None:
    config = copy.deepcopy(CONFIG)
    config.use_rslora = use_rslora
    model = get_peft_model(quantized(), config).train()
    train(model)
    expected = logits(model.eval())
    model.save_pretrained(tmp_path)
    own = quantized()
    qkern.load_adapter(own, tmp_path)
    torch.testing.assert_close(logits(own), expected, rtol=1e-5, atol=1e-5)


def test_same_start_gives_the_same_losses_as_peft(tmp_path: Path) -> None:
    own = quantized()
    qkern.add_lora(own, r=4, lora_alpha=8)
    qkern.save_adapter(own, tmp_path)
    peft_model = PeftModel.from_pretrained(quantized(), tmp_path, is_trainable=True)
    expected, got = train(peft_model.train(), 10), train(own.train(), 10)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
