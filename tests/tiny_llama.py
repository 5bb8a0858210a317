"""A transformers model small enough to be written, adapted and merged in a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

CONFIG: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


def model(dtype: torch.dtype = torch.bfloat16, **config: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    made = LlamaForCausalLM(LlamaConfig(**CONFIG | config)).to(dtype)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.05)
    return made


def write_base(path: Path, dtype: torch.dtype = torch.bfloat16, **config: Any) -> Path:
    model(dtype, **config).save_pretrained(path)
    return path


def adapted(base: nn.Module, *, size: float = 0.05, **config: Any) -> PeftModel:
    """A model with an adapter whose delta is about ``size`` times the weights."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    peft = get_peft_model(base, LoraConfig(**settings | config))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_A" in name:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
            elif "lora_B" in name:
                parameter.normal_(std=0.05 * size * 8)
    return peft


def write_adapter(path: Path, base: nn.Module, **config: Any) -> Path:
    adapted(base, **config).save_pretrained(path)
    return path
