"""A real small Llama fine-tuned three ways on the same batches: the losses must agree.

(a) plain LoRA (PEFT) on dense layers that hold the dequantized weights,
(b) qkern's layers and adapters,
(c) bitsandbytes + PEFT.

(a) and (b) compute the same function and may differ by fp32 rounding alone. (c) chooses a few
8-bit codes of scales differently, so its base is a near one.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import qkern

STEPS, BATCH, LENGTH, R, ALPHA = 100, 4, 128, 8, 16


def batches(data: Path) -> list[Tensor]:
    """STEPS batches of (BATCH, LENGTH) token ids from the training documents."""
    tokenizer = AutoTokenizer.from_pretrained(data / "stories260K")
    lines = (data / "text" / "tinystories.train.jsonl").read_text().splitlines()
    ids = [i for line in lines for i in [1, *tokenizer.encode(json.loads(line)["text"])]]
    window = torch.tensor(ids).unfold(0, LENGTH, LENGTH)
    order = torch.randperm(len(window), generator=torch.Generator().manual_seed(0))
    return [
        window[order[[(BATCH * s + b) % len(window) for b in range(BATCH)]]] for s in range(STEPS)
    ]


def train(model: nn.Module, data: list[Tensor]) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for ids in data:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def with_bitsandbytes(model: nn.Module) -> nn.Module:
    """Every linear layer but the head as bitsandbytes' 4-bit layer, NF4 double-quantized."""
    import bitsandbytes

    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and name != "lm_head":
            theirs = bitsandbytes.nn.Linear4bit(
                layer.in_features,
                layer.out_features,
                bias=False,
                quant_type="nf4",
                compute_dtype=torch.float32,
            )
            theirs.weight = bitsandbytes.nn.Params4bit(
                layer.weight.detach(), requires_grad=False, quant_type="nf4"
            )
            model.set_submodule(name, theirs.to("cpu"))
    model.is_loaded_in_4bit = True
    return model


def test_three_ways_to_fine_tune(
    shared_data: Path, tmp_path: Path, tell: Callable[[str], None]
) -> None:
    def load() -> nn.Module:
        path = shared_data / "stories260K"
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    def start_from(model: nn.Module) -> nn.Module:
        return PeftModel.from_pretrained(model, tmp_path, is_trainable=True)

    data = batches(shared_data)
    own = load()
    qkern.quantize_model(own)
    torch.manual_seed(0)
    qkern.add_lora(own, r=R, lora_alpha=ALPHA)
    qkern.save_adapter(own, tmp_path)  # the same start for all three
    dense = load()
    for name, layer in own.named_modules():
        if isinstance(layer, qkern.QuantizedLinear):
            dense.set_submodule(name, layer.dequantize())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = start_from(with_bitsandbytes(load()))
    runs: dict[str, Callable[[], list[float]]] = {
        "plain LoRA, dequantized weights": lambda: train(start_from(dense).train(), data),
        "qkern": lambda: train(own.train(), data),
        "bitsandbytes + PEFT": lambda: train(theirs.train(), data),
    }
    losses = {name: run() for name, run in runs.items()}
    plain, ours, bnb = map(torch.tensor, losses.values())
    relative = ((ours - plain).abs() / plain).max().item()
    lines = [f"{STEPS} steps of {BATCH}x{LENGTH} tokens, stories260K, fp32"]
    for name, curve in losses.items():
        marks = "  ".join(f"{curve[i]:.6f}" for i in (0, 9, 24, 49, 74, 99))
        lines.append(f"  {name:32} {marks}")
    lines.append(f"  qkern against plain LoRA: worst relative difference {relative:.2g}")
    lines.append(f"  bitsandbytes against plain LoRA: {((bnb - plain).abs() / plain).max():.2g}")
    tell("\n".join(lines))
    assert ours[-10:].mean() < ours[:10].mean() - 0.02  # it learns at all
    assert relative < 1e-5
    assert ((bnb - plain).abs() / plain).max() < 0.02
