"""Turns rows into token ids and labels: what is shown to the model, and what carries loss.

``labels`` equal ``input_ids`` where the token is trained and -100 elsewhere. The rules:

- text: every token, and an end-of-sequence token after it;
- pair: the completion and an end-of-sequence token; both strings are taken literally, without the
  chat template;
- chat: each assistant turn through its end-of-turn token, as the tokenizer's chat template renders
  it. The spans are found by rendering the conversation up to the turn, so the template needs no
  ``{% generation %}`` marks. A template that renders earlier turns differently once later ones
  follow gives one example per assistant turn, each as the model will see it when it answers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from qkern.errors import DataError
from qkern.training.data import ChatRow, PairRow, Row, TextRow

IGNORED = -100  # label of a token without loss, as in torch.nn.functional.cross_entropy


@dataclasses.dataclass(frozen=True)
class Example:
    """One training sequence.

    Args:
        where: file and line that it came from.
        input_ids: token ids, (tokens,).
        labels: the same ids where trained, -100 elsewhere, (tokens,).
        cut: tokens that did not fit in ``max_length`` and were dropped from the end.
    """

    where: str
    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    cut: int = 0

    @property
    def trained(self) -> int:
        """Tokens that carry loss; the first one of a sequence is never predicted."""
        return sum(label != IGNORED for label in self.labels[1:])


def build_examples(rows: Sequence[Row], tokenizer: Any, *, max_length: int) -> list[Example]:
    """Token ids and labels of every row.

    Args:
        rows: what ``read_rows`` gave.
        tokenizer: a transformers tokenizer.
        max_length: most tokens of an example; longer ones lose their end.

    Returns:
        At least one example per row, in order; each has at least one trained token.

    Raises:
        DataError: a row that would train nothing, such as a prompt that fills ``max_length``; a
            chat without a chat template; a chat that the template refuses.
    """
    encode = _Encoder(tokenizer)
    examples = []
    for row in rows:
        if isinstance(row, TextRow):
            parts = _encode_text(row, encode, max_length)
        elif isinstance(row, PairRow):
            parts = iter([_encode_pair(row, encode)])
        else:
            parts = _encode_chat(row, encode)
        examples += [_fit(part, max_length) for part in parts]
    return examples


class _Encoder:
    """The few things that are asked of a tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.eos: int | None = tokenizer.eos_token_id
        self.special = frozenset(tokenizer.all_special_ids)
        self.added_special = frozenset(
            index for index, token in tokenizer.added_tokens_decoder.items() if token.special
        )

    def plain(self, text: str) -> list[int]:
        """Ids of text without special tokens around it."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def opening(self, text: str) -> list[int]:
        """Ids of text that opens a sequence: with the tokenizer's first token, without its last."""
        ids: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
        if ids and ids[-1] == self.eos and self.plain(text)[-1:] != [self.eos]:
            return ids[:-1]
        return ids

    def end(self, ids: list[int]) -> list[int]:
        """The end-of-sequence token, if there is one and it is not there yet."""
        return [] if self.eos is None or ids[-1:] == [self.eos] else [self.eos]

    def render(self, row: ChatRow, count: int, *, prompt: bool = False) -> str:
        """The first ``count`` turns as text; with ``prompt``, the opening of the answer too."""
        messages = [message.as_dict() for message in row.messages[:count]]
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:
            if type(error).__module__.partition(".")[0] != "jinja2":
                raise
            roles = ", ".join(message.role for message in row.messages[:count])
            msg = f"{row.where}: the chat template refuses the turns {roles}: {error}"
            raise DataError(msg) from error
        return text

    def is_special(self, token: int) -> bool:
        """Whether the token is a mark rather than text."""
        return token in self.special or token in self.added_special


def _encode_text(row: TextRow, encode: _Encoder, max_length: int) -> Iterator[Example]:
    if not row.whole_file:
        ids = encode.opening(row.text)
        ids += encode.end(ids)
        yield Example(row.where, tuple(ids), tuple(ids))
        return
    body = encode.plain(row.text)
    body += encode.end(body)
    start = encode.opening("")  # the first token of a sequence, where the tokenizer has one
    step = max_length - len(start)
    for i in range(0, len(body), max(step, 1)):
        piece = tuple(start + body[i : i + step])
        if i == 0 or len(piece) > len(start) + 1:  # a last piece of one token predicts nothing
            yield Example(f"{row.where}, from token {i}", piece, piece)


def _encode_pair(row: PairRow, encode: _Encoder) -> Example:
    prompt = encode.opening(row.prompt)
    ids = encode.opening(row.prompt + row.completion)
    if ids[: len(prompt)] != prompt or len(ids) == len(prompt):
        # Tokens merge across the boundary: keep the prompt as it will be seen when generating.
        ids = prompt + encode.plain(row.completion)
    ids += encode.end(ids)
    labels = [IGNORED] * len(prompt) + ids[len(prompt) :]
    return Example(row.where, tuple(ids), tuple(labels))


def _encode_chat(row: ChatRow, encode: _Encoder) -> Iterator[Example]:
    if not encode.tokenizer.chat_template:
        msg = (
            f"{row.where}: a chat, but the tokenizer has no chat template: use a chat model, or"
            ' write the rows as {"prompt": "...", "completion": "..."}'
        )
        raise DataError(msg)
    whole = _encode_turns(row, row.trained_turns, encode)
    if whole is not None:
        yield whole
        return
    for turn in row.trained_turns:
        part = _encode_turns(
            dataclasses.replace(row, messages=row.messages[: turn + 1]), (turn,), encode
        )
        if part is None:
            msg = (
                f"{row.where}: the chat template renders turn {turn} so that the prompt for it is"
                " no prefix of the conversation, and the trained part cannot be told apart: write"
                ' the row as {"prompt": "...", "completion": "..."} with the final text'
            )
            raise DataError(msg)
        yield part


def _encode_turns(row: ChatRow, turns: Sequence[int], encode: _Encoder) -> Example | None:
    """The conversation with loss on some turns; None where a turn's prompt is no prefix of it."""
    text = encode.render(row, len(row.messages))
    ids = encode.plain(text)
    labels = [IGNORED] * len(ids)
    for turn in turns:
        before, through = encode.render(row, turn, prompt=True), encode.render(row, turn + 1)
        if not (through.startswith(before) and text.startswith(through)):
            return None
        start, stop = len(encode.plain(before)), len(encode.plain(through))
        if ids[:start] != encode.plain(before) or ids[:stop] != encode.plain(through):
            return None
        stop = _end_of_turn(ids, start, stop, encode)
        labels[start:stop] = ids[start:stop]
    if labels[-1] != IGNORED and not encode.is_special(ids[-1]):
        ids += encode.end(ids)  # a template without an end-of-turn mark: teach to stop all the same
        labels += ids[len(labels) :]
    used = max((i for i, label in enumerate(labels) if label != IGNORED), default=-1) + 1
    return Example(row.where, tuple(ids[:used]), tuple(labels[:used]))


def _end_of_turn(ids: list[int], start: int, stop: int, encode: _Encoder) -> int:
    """Where the trained part ends: after the end-of-turn mark, not the blanks that follow it."""
    for i in range(stop - 1, start - 1, -1):
        if encode.is_special(ids[i]):
            return i + 1
        if encode.tokenizer.decode([ids[i]]).strip():
            break
    return stop


def _fit(example: Example, max_length: int) -> Example:
    total = len(example.input_ids)
    fitted = example
    if total > max_length:
        ids, labels = example.input_ids[:max_length], example.labels[:max_length]
        fitted = dataclasses.replace(example, input_ids=ids, labels=labels, cut=total - max_length)
    if fitted.trained:
        return fitted
    if example.trained == 0:
        msg = f"{example.where}: {total} tokens, none of them to predict: add text to train on"
        raise DataError(msg)
    prompt = next(i for i, label in enumerate(example.labels) if i and label != IGNORED)
    msg = (
        f"{example.where}: the prompt alone is {prompt} tokens, max_length is {max_length}: nothing"
        f" would be trained; raise max_length (the whole example is {total} tokens) or shorten it"
    )
    raise DataError(msg)
