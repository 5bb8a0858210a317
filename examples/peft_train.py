"""PEFT over a quantized model: train, save, reload, merge, take the merge back.

    python examples/peft_train.py [--fused] [--dora]

A small Llama from its configuration alone, a few sentences, some seconds on a CPU: no download.
"""

from __future__ import annotations

import argparse
import copy
import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import qkern
import qkern.integrations.peft

TEXT = "A quantized weight stays frozen; the adapter beside it learns. " * 4


def base() -> LlamaForCausalLM:
    """A model over bytes, quantized."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    qkern.quantize_model(model, "nf4")
    return model


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Run it; the losses and differences that it prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--fused", action="store_true", help="base and adapter in one operator")
    parser.add_argument("--dora", action="store_true", help="DoRA instead of LoRA")
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args(arguments)

    config = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules="all-linear",
        use_dora=options.dora,
        task_type="CAUSAL_LM",
    )
    if options.fused:
        config = qkern.integrations.peft.fused(config)
    model = get_peft_model(base(), config)
    model.print_trainable_parameters()

    tokens = torch.tensor([list(TEXT.encode())])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(options.steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")

    model.eval()
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            reloaded = PeftModel.from_pretrained(base(), folder).eval()
        reload_error = float((reloaded(input_ids=tokens).logits - logits).abs().max())
        print(f"reloaded by stock PEFT: logits differ by {reload_error:.1e}")

        before = copy.deepcopy(model.state_dict())
        model.merge_adapter()
        merged = model(input_ids=tokens, labels=tokens).loss.item()
        model.unmerge_adapter()
        after = model.state_dict()
    changed = sum(int((before[key] != after[key]).sum()) for key in before)
    print(f"loss merged into 4 bits {merged:.3f}; entries changed after unmerging: {changed}")
    return {
        "first": losses[0],
        "last": losses[-1],
        "reload_error": reload_error,
        "changed": changed,
    }


if __name__ == "__main__":
    main()
