"""A training file as token ids and labels, with the counts that a person should see first."""

from __future__ import annotations

import dataclasses
import hashlib
from os import PathLike
from typing import Any

from qkern.training.data import PairRow, read_rows
from qkern.training.examples import Example, build_examples
from qkern.training.preview import DataSummary, render_example, summarize


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """What a run trains on.

    Args:
        source: the file.
        examples: at least one sequence.
        summary: the counts.
        notes: what a person should know before training.
        tokenizer: the tokenizer that made the ids.
    """

    source: str
    examples: tuple[Example, ...]
    summary: DataSummary
    notes: tuple[str, ...]
    tokenizer: Any = dataclasses.field(repr=False)

    @property
    def fingerprint(self) -> str:
        """A checksum of all ids and labels, in order."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(repr((example.input_ids, example.labels)).encode())
        return digest.hexdigest()

    def preview(self, *, colour: bool = False) -> str:
        """The first example as text, trained parts set off."""
        return render_example(self.examples[0], self.tokenizer, colour=colour)


def prepare_data(
    path: str | PathLike[str], tokenizer: Any, *, max_length: int = 1024
) -> PreparedData:
    """Read a training file, check every row, and find what carries loss.

    Args:
        path: a ``.jsonl`` or ``.txt`` file, see ``read_rows``.
        tokenizer: of the model.
        max_length: most tokens of a sequence.

    Raises:
        DataError: a row cannot be used; names file and line.
        OSError: the file cannot be read.
    """
    rows = read_rows(path)
    examples = build_examples(rows, tokenizer, max_length=max_length)
    notes = []
    if isinstance(rows[0], PairRow) and tokenizer.chat_template:
        notes.append(
            "prompt and completion are plain strings, so the chat template is not applied; generate"
            " with --no-chat, or write them as message lists"
        )
    return PreparedData(str(path), tuple(examples), summarize(examples), tuple(notes), tokenizer)
