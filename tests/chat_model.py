"""A tiny chat model on disk: a random Llama and a byte-level tokenizer with a chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from toys import tiny_llama
from transformers import PreTrainedModel, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIALS = ("<|im_start|>", "<|im_end|>", "<pad>")


def byte_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token per byte, and the three marks of the template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIALS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    start, end, pad = SPECIALS
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=start, eos_token=end, pad_token=pad
    )
    fast.chat_template = template
    return fast


def save_chat_model(directory: Path, model: PreTrainedModel | None = None) -> Path:
    """Write model and tokenizer as a Hugging Face directory."""
    model = model or tiny_llama(
        vocab_size=259, hidden_size=64, intermediate_size=128, max_position_embeddings=512
    )
    model.generation_config.pad_token_id = SPECIALS.index("<pad>")
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def chat(*turns: str) -> dict[str, object]:
    """A row of alternating user and assistant turns."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    return {"messages": messages}


def write_jsonl(path: Path, rows: Sequence[object]) -> Path:
    """One JSON value per line; strings go in as they are."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_chats(path: Path, count: int = 24) -> Path:
    """Rows of different lengths with a fixed form of answer: something to learn."""
    rows = [chat(f"say {'ab' * (i % 5 + 1)} {i}", f"ok: {i % 3}") for i in range(count)]
    return write_jsonl(path, rows)
