"""Bases and adapters on disk, as transformers and PEFT write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from toys import tiny_llama
from transformers import LlamaForCausalLM


def model(dtype: torch.dtype = torch.bfloat16, **config: object) -> LlamaForCausalLM:
    """The same one at each call."""
    return tiny_llama(**config).to(dtype)


def write_base(path: Path, dtype: torch.dtype = torch.bfloat16, **config: object) -> Path:
    model(dtype, **config).save_pretrained(path)
    return path


def adapted(base: nn.Module, *, size: float = 0.1, **config: Any) -> PeftModel:
    """A model with a random adapter whose delta is about ``size`` times a weight of std 0.02."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    peft = get_peft_model(base, LoraConfig(**settings | config))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_A" in name or "lora_embedding_A" in name:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            elif "lora_B" in name:
                parameter.normal_(std=0.02 * size * parameter.shape[0] ** 0.5 / 4)
    return peft


def write_adapter(path: Path, base: nn.Module, **config: Any) -> Path:
    adapted(base, **config).save_pretrained(path)
    return path


def tensors_of(path: Path) -> dict[str, Tensor]:
    """All entries of a directory's files."""
    found: dict[str, Tensor] = {}
    for file in sorted(path.glob("model*.safetensors")):
        found |= load_file(file)
    return found


def assert_one_rounding(found: Tensor, exact: Tensor) -> None:
    """``found`` is ``exact``, but for the rounding to its dtype and that of fp32 sums."""
    spacing = torch.finfo(found.dtype).eps * exact.abs().double()
    assert bool(((found.double() - exact.double()).abs() <= 0.51 * spacing + 1e-7).all())


def rewrite(adapter: Path, change: Any) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def reconfigure(adapter: Path, **changes: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
