"""Small models that the tests share."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qkern.layers import QLoRALinear, QuantizedLinear

if TYPE_CHECKING:  # a process that opens a Stack would wait for it
    from transformers import LlamaForCausalLM


def tiny_llama(**changes: object) -> LlamaForCausalLM:
    """A random Llama of two layers; every in_features is a multiple of 64 unless changed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()


def token_ids(*shape: int) -> Tensor:
    """Random token ids for ``tiny_llama``."""
    return torch.randint(0, 96, shape or (2, 16), generator=torch.Generator().manual_seed(1))


class Stack(nn.Module):
    """Quantized layers with adapters and biases between tanh's."""

    def __init__(
        self,
        widths: tuple[int, ...] = (256, 192, 320, 256),
        r: int = 8,
        quant_type: str = "nf4",
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        lora = {"r": r, "lora_alpha": 16, "init_lora_weights": False}
        self.layers = nn.ModuleList(
            QLoRALinear.from_linear(nn.Linear(a, b), quant_type=quant_type, **lora)
            for a, b in pairwise(widths)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def layer(in_features: int = 128, out_features: int = 64, **settings: object) -> QuantizedLinear:
    torch.manual_seed(0)
    return QuantizedLinear.from_linear(nn.Linear(in_features, out_features), **settings)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 8))
