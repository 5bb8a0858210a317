"""Shows what will be trained before anything is: one example with its mask, and the counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from qkern.training.examples import IGNORED, Example

_DIM, _BOLD, _OFF = "\x1b[2m", "\x1b[1m", "\x1b[0m"


@dataclasses.dataclass(frozen=True)
class DataSummary:
    """The counts of a training set.

    Args:
        examples: sequences.
        tokens: tokens of all sequences.
        trained: tokens that carry loss.
        longest: tokens of the longest sequence.
        cut_examples: sequences that lost their end to ``max_length``.
        cut_tokens: tokens that were dropped there.
    """

    examples: int
    tokens: int
    trained: int
    longest: int
    cut_examples: int
    cut_tokens: int

    def __str__(self) -> str:
        """One line for people."""
        line = (
            f"{self.examples} examples, {self.tokens} tokens (longest {self.longest}),"
            f" loss on {self.trained} of them ({100 * self.trained / self.tokens:.0f} %)"
        )
        if self.cut_examples:
            line += f"; {self.cut_examples} cut at max_length, {self.cut_tokens} tokens dropped"
        return line


def summarize(examples: Sequence[Example]) -> DataSummary:
    """The counts of a training set of at least one example."""
    lengths = [len(example.input_ids) for example in examples]
    return DataSummary(
        examples=len(examples),
        tokens=sum(lengths),
        trained=sum(example.trained for example in examples),
        longest=max(lengths),
        cut_examples=sum(example.cut > 0 for example in examples),
        cut_tokens=sum(example.cut for example in examples),
    )


def render_example(example: Example, tokenizer: Any, *, colour: bool = False) -> str:
    """The text of an example, with the part that carries loss set off.

    Args:
        example: what to show.
        tokenizer: the tokenizer that made it.
        colour: mark with terminal colours (context dim, trained bold) instead of brackets.

    Returns:
        The decoded text: context as it is, trained parts in ``[[`` ``]]``.
    """
    pairs = zip(example.input_ids, example.labels, strict=True)
    parts = []
    for trained, group in groupby(pairs, key=lambda pair: pair[1] != IGNORED):
        text = tokenizer.decode([token for token, _ in group], skip_special_tokens=False)
        if colour:
            text = f"{_BOLD if trained else _DIM}{text}{_OFF}"
        elif trained:
            text = f"[[{text}]]"
        parts.append(text)
    return "".join(parts)
