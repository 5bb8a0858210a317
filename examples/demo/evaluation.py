"""How well a model makes cards: its loss on held-out ones, and what it answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from cards import Card, parse_card

from qkern.training import Example
from qkern.training.trainer import trained_token_loss

BATCH = 8
MAX_NEW_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class Score:
    """What one model did with the held-out cards.

    Args:
        loss: nats per token of the right cards.
        answers: what it wrote, one per question.
        hits: answers that are one card in the fixed format.
        right: hits whose name and arguments are right too.
    """

    loss: float
    answers: tuple[str, ...]
    hits: int
    right: int


def evaluate(
    model: Any, tokenizer: Any, examples: Sequence[Example], questions: Sequence[Card]
) -> Score:
    """Score a model in evaluation mode.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        examples: held-out cards as token ids and labels, for the loss.
        questions: held-out cards, for the answers.
    """
    answers = tuple(generate(model, tokenizer, [card.question for card in questions]))
    hits = right = 0
    for card, answer in zip(questions, answers, strict=True):
        found, expected = parse_card(answer), parse_card(card.answer)
        if found and expected:
            hits += 1
            right += all(found[key] == expected[key] for key in ("name", "takes"))
    return Score(heldout_loss(model, tokenizer, examples), answers, hits, right)


@torch.inference_mode()
def heldout_loss(model: Any, tokenizer: Any, examples: Sequence[Example]) -> float:
    """Mean loss over all trained tokens of all examples, in nats."""
    total = tokens = 0.0
    for i in range(0, len(examples), BATCH):
        batch = examples[i : i + BATCH]
        ids = _pad([e.input_ids for e in batch], tokenizer.pad_token_id)
        labels = _pad([e.labels for e in batch], -100)
        mask = _pad([[1] * len(e.input_ids) for e in batch], 0)
        count = sum(e.trained for e in batch)
        inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        total += count * trained_token_loss(model, inputs).item()
        tokens += count
    return total / tokens


@torch.inference_mode()
def generate(model: Any, tokenizer: Any, questions: Sequence[str]) -> list[str]:
    """The greedy answer to each question."""
    tokenizer.padding_side = "left"
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question in questions
    ]
    inputs = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    output = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=MAX_NEW_TOKENS, do_sample=False
    )
    answers: list[str] = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    return answers


@torch.inference_mode()
def probe_logits(model: Any, examples: Sequence[Example]) -> torch.Tensor:
    """Logits of the last token of a few examples, to compare two models bit for bit."""
    rows = [model(input_ids=torch.tensor([e.input_ids])).logits[0, -1] for e in examples]
    return torch.stack(rows).float()


def _pad(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])
