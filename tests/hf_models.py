"""Small transformers models made from configurations, and what is compared of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from qkern.layers import QuantizedLinear

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
}


def llama(**settings: Any) -> Any:
    """Dense, fp32, of 80,192 values."""
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE | settings))


def write_dense(path: Path, model: Any = None, **settings: Any) -> Path:
    """A model's directory in several shards; a Llama in bfloat16 unless another is given."""
    model = llama(**settings).bfloat16() if model is None else model
    model.save_pretrained(path, max_shard_size="60KB")
    return path


def load(path: Path, **settings: Any) -> Any:
    """By transformers, as its users do."""
    return transformers.AutoModelForCausalLM.from_pretrained(path, **settings)


def logits(model: Any) -> Tensor:
    """Of twelve tokens, fp32."""
    model.eval()
    with torch.no_grad():
        return model(torch.arange(12)[None]).logits.float()


def quantized_names(model: Any) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
