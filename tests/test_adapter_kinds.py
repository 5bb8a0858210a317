"""DoRA, whole modules, ranks and alphas of layers: PEFT's numbers, PEFT's files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapted_llama import COMMON, SAVED, dense_of, logits, peft_of, quantized, train
from peft import PeftModel

import qkern

PATTERNS = {
    "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 7},
    "alpha_pattern": {"down_proj": 3, "layers.0.self_attn.v_proj": 64},
}
KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora, rslora, patterns": {"use_dora": True, "use_rslora": True, **PATTERNS},
    "modules_to_save": SAVED,
    "patterns": PATTERNS,
}


@pytest.mark.case("E8")
@pytest.mark.parametrize("kind", KINDS)
def test_trained_here_it_gives_the_same_logits_in_peft_over_dense_weights(
    kind: str, tmp_path: Path
) -> None:
    model = quantized()
    torch.manual_seed(1)
    qkern.add_lora(model, **COMMON, **KINDS[kind])
    losses = train(model)
    assert losses[-1] < losses[0]
    expected = logits(model)
    qkern.save_adapter(model, tmp_path)
    peft_model = PeftModel.from_pretrained(dense_of(quantized()), tmp_path)
    torch.testing.assert_close(logits(peft_model), expected, rtol=1e-5, atol=1e-5)
    own = quantized()
    qkern.load_adapter(own, tmp_path)
    assert torch.equal(logits(own), expected)
    qkern.load_adapter(own, tmp_path)  # over itself
    assert torch.equal(logits(own), expected)


@pytest.mark.case("E8")
@pytest.mark.parametrize("kind", KINDS)
def test_trained_in_peft_over_dense_weights_it_gives_the_same_logits_here(
    kind: str, tmp_path: Path
) -> None:
    model = peft_of(dense_of(quantized()), **KINDS[kind])
    train(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    own = quantized()
    qkern.load_adapter(own, tmp_path)
    torch.testing.assert_close(logits(own), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lora_dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["dora", "modules_to_save", "dora, rslora, patterns"])
def test_the_same_start_gives_pefts_losses_and_gradients(
    kind: str, lora_dropout: float, tmp_path: Path
) -> None:
    own = quantized()
    torch.manual_seed(1)
    qkern.add_lora(own, lora_dropout=lora_dropout, init_lora_weights=False, **COMMON, **KINDS[kind])
    qkern.save_adapter(own, tmp_path)
    theirs = PeftModel.from_pretrained(dense_of(quantized()), tmp_path, is_trainable=True)
    count = {
        id(m): sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (own, theirs)
    }
    assert len(set(count.values())) == 1
    if not lora_dropout:
        expected, got = train(theirs, 5), train(own, 5)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
    elif kind == "dora":  # one layer: its mask is drawn as theirs is
        layer = own.model.layers[0].mlp.up_proj.train()
        their = theirs.base_model.model.model.layers[0].mlp.up_proj.train()
        x = torch.randn(3, 128, generator=torch.Generator().manual_seed(2))
        results = []
        for module in (layer, their):
            torch.manual_seed(7)
            y = module(x)
            y.square().sum().backward()
            results.append(y.detach())
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
        for mine, other in (
            (layer.lora_A, their.lora_A["default"].weight),
            (layer.lora_B, their.lora_B["default"].weight),
            (layer.adapter.lora_magnitude, their.lora_magnitude_vector["default"].weight),
        ):
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_patterns_give_layers_pefts_ranks_and_scalings() -> None:
    own, theirs = quantized(), peft_of(dense_of(quantized()), **PATTERNS)
    qkern.add_lora(own, **COMMON, **PATTERNS)
    for name, layer in own.named_modules():
        if isinstance(layer, qkern.QLoRALinear):
            other = theirs.get_submodule(f"base_model.model.{name}")
            assert (layer.r, layer.scaling) == (other.r["default"], other.scaling["default"])
