"""What the examples share: a tiny chat model that needs no network, or one from a directory.

The tiny one is a random Llama of two layers with a tokenizer of one token per byte: it learns a
fixed form of answer in a few steps, and runs on any machine in seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

SPECIALS = ("<|start|>", "<|end|>", "<|pad|>")
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


def load(directory: str | Path | None = None) -> tuple[Any, Any]:
    """A dense causal language model and its tokenizer: the tiny ones if no directory is named."""
    logging.disable_progress_bar()
    if directory is not None:
        return (
            AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32),
            AutoTokenizer.from_pretrained(directory),
        )
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config), tokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and the three marks of the chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIALS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    start, end, pad = SPECIALS
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=start, eos_token=end, pad_token=pad
    )
    fast.chat_template = TEMPLATE
    return fast


def turn(role: str, content: str) -> list[dict[str, str]]:
    """One message of a chat."""
    return [{"role": role, "content": content}]


def probe(model: Any, tokenizer: Any) -> torch.Tensor:
    """Logits of a fixed text, (tokens, vocabulary): what a reloaded model has to reproduce."""
    ids = tokenizer("What is the answer to 4?", return_tensors="pt").input_ids
    model.eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids).logits[0]
    return logits.float()
