"""Text from a model: a prompt in, an answer out, piece by piece if wanted."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TextStreamer

from qkern.training.errors import SettingError


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model wrote.

    Args:
        text: the answer, without special tokens.
        prompt_tokens: tokens of the prompt, the chat template's included.
        tokens: new tokens.
        seconds: for all of them.
    """

    text: str
    prompt_tokens: int
    tokens: int
    seconds: float


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    chat: bool = True,
    system: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stream: Callable[[str], None] | None = None,
) -> Answer:
    """Answer a prompt.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        tokenizer: its tokenizer.
        prompt: the question, or text to continue.
        chat: put the prompt into the tokenizer's chat template, if there is one.
        system: system message of the chat.
        max_new_tokens: most tokens of the answer.
        temperature: 0 for the likeliest token each time, more for sampling.
        top_p: share of the probability that is sampled from.
        seed: of the sampling.
        stream: gets the text as it comes.

    Raises:
        SettingError: a setting out of its range, or a system message without a chat.
    """
    _check(max_new_tokens, temperature, top_p)
    inputs = _encode(tokenizer, prompt, chat=chat, system=system).to(model.device)
    given = inputs["input_ids"].shape[1]
    ends = _end_tokens(model, tokenizer)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}
    torch.manual_seed(seed)
    started = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            eos_token_id=ends or None,
            pad_token_id=next((t for t in (tokenizer.pad_token_id, *ends) if t is not None), 0),
            streamer=_Streamer(tokenizer, stream) if stream else None,
            top_k=None,
            **sampling,
        )
    seconds = time.perf_counter() - started
    new = output[0, given:]
    text = tokenizer.decode(new, skip_special_tokens=True)
    return Answer(text, given, len(new), seconds)


class _Streamer(TextStreamer):
    """Hands finished words to a function instead of printing them."""

    def __init__(self, tokenizer: Any, stream: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._stream = stream

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: FBT001
        """Called by the parent with each finished piece."""
        if text:
            self._stream(text)


def _check(max_new_tokens: int, temperature: float, top_p: float) -> None:
    if max_new_tokens < 1:
        msg = f"max_new_tokens is {max_new_tokens}: allowed is 1 or more"
        raise SettingError(msg)
    if temperature < 0:
        msg = f"temperature is {temperature:g}: allowed is 0 (no sampling) or more"
        raise SettingError(msg)
    if not 0 < top_p <= 1:
        msg = f"top_p is {top_p:g}: allowed is more than 0, up to 1"
        raise SettingError(msg)


def _encode(tokenizer: Any, prompt: str, *, chat: bool, system: str | None) -> Any:
    if not (chat and tokenizer.chat_template):
        if system is not None:
            why = "the tokenizer has no chat template" if chat else "the chat is switched off"
            msg = f"a system message needs a chat, but {why}"
            raise SettingError(msg)
        return tokenizer(prompt, return_tensors="pt")
    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False, return_tensors="pt")


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """What ends an answer: the model's end tokens and the tokenizer's."""
    known = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])}
    return sorted(ends - {None})
