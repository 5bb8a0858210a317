"""Reads training data: what kinds of rows there are, and what is wrong with a file.

A JSONL file holds one JSON object per line, all of one kind:

========  =====================================  ==================================================
kind      keys                                   what is trained
========  =====================================  ==================================================
text      ``text``                               everything
pair      ``prompt``, ``completion``             the completion; both strings, or both message lists
chat      ``messages``                           every assistant turn
========  =====================================  ==================================================

A ``.txt`` file is plain text, all of it trained. Other keys of a row are ignored. No torch here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

from qkern.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
_KINDS = (
    'allowed are {"text": ...}, {"prompt": ..., "completion": ...} (both strings or both message'
    ' lists) and {"messages": [...]}'
)
_RENAMES = {
    "instruction": "prompt",
    "question": "prompt",
    "input": "prompt",
    "output": "completion",
    "response": "completion",
    "answer": "completion",
    "conversations": "messages",
    "conversation": "messages",
}


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str

    def as_dict(self) -> dict[str, str]:
        """The form that chat templates take."""
        return {"role": self.role, "content": self.content}


@dataclasses.dataclass(frozen=True)
class TextRow:
    """Plain text, all of it trained.

    Args:
        where: file and line, for messages.
        text: the text.
        whole_file: whether the text is a whole file, to be cut into pieces rather than truncated.
    """

    where: str
    text: str
    whole_file: bool = False


@dataclasses.dataclass(frozen=True)
class PairRow:
    """A prompt and the completion that is trained, both plain strings."""

    where: str
    prompt: str
    completion: str


@dataclasses.dataclass(frozen=True)
class ChatRow:
    """A conversation.

    Args:
        where: file and line, for messages.
        messages: the turns, first to last.
        first_trained: index of the first turn that may be trained; assistant turns before it are
            context (they came in a ``prompt``).
    """

    where: str
    messages: tuple[Message, ...]
    first_trained: int = 0

    @property
    def trained_turns(self) -> tuple[int, ...]:
        """Indices of the turns that carry loss."""
        turns = enumerate(self.messages)
        return tuple(i for i, m in turns if m.role == "assistant" and i >= self.first_trained)


Row: TypeAlias = TextRow | PairRow | ChatRow
_KIND_NAMES = {TextRow: "text", PairRow: "prompt/completion", ChatRow: "chat"}


def kind_name(row: Row) -> str:
    """The kind of a row, for people."""
    return _KIND_NAMES[type(row)]


def read_rows(path: str | PathLike[str]) -> list[Row]:
    """Every row of a training file, checked.

    Args:
        path: a ``.jsonl`` (or ``.json`` with one object per line) or ``.txt`` file, in UTF-8.

    Returns:
        At least one row; all of the same kind.

    Raises:
        DataError: the file is of no known type, is empty, or has a row that cannot be used; the
            message names file and line.
        OSError: the file cannot be read.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".jsonl", delete=False) as file:
        ...     _ = file.write('{"prompt": "1 + 1 =", "completion": " 2"}')
        >>> read_rows(file.name)[0].completion
        ' 2'
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".txt":
        rows: list[Row] = [_read_text(path)]
    elif suffix in (".jsonl", ".json", ".ndjson"):
        rows = list(_read_jsonl(path))
    else:
        msg = f"{path}: unknown kind of file {path.suffix!r}: allowed are .jsonl and .txt"
        raise DataError(msg)
    if not rows:
        msg = f"{path}: no rows: write one JSON object per line; {_KINDS}"
        raise DataError(msg)
    return rows


def _read_text(path: Path) -> TextRow:
    text = _decode(path.read_bytes(), str(path))
    if not text.strip():
        msg = f"{path}: the file has no text: there is nothing to train on"
        raise DataError(msg)
    return TextRow(str(path), text, whole_file=True)


def _read_jsonl(path: Path) -> Iterator[Row]:
    first: Row | None = None
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            where = f"{path}, line {number}"
            line = _decode(raw, where).strip()
            if not line:
                continue
            row = _parse_line(line, where)
            first = first or row
            if type(row) is not type(first):
                msg = (
                    f"{where}: a {kind_name(row)} row in a file whose first row is"
                    f" {kind_name(first)}: keep one kind of row per file"
                )
                raise DataError(msg)
            yield row


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        msg = f"{where}: byte {error.start} is not UTF-8: save the file as UTF-8"
        raise DataError(msg) from error


def _parse_line(line: str, where: str) -> Row:
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = getattr(error, "msg", "nested too deeply")
        column = getattr(error, "colno", 1)
        hint = ""
        if line.lstrip().startswith("[") or line in ("{", "}"):
            hint = (
                "; a JSON array or a pretty-printed object is not JSONL: write one object per line"
            )
        msg = f"{where}: not JSON at column {column}: {reason}{hint}"
        raise DataError(msg) from error
    if not isinstance(value, dict):
        msg = f"{where}: expected a JSON object, got {_type_name(value)}; {_KINDS}"
        raise DataError(msg)
    return _parse_row(value, where)


def _parse_row(value: dict[str, Any], where: str) -> Row:
    is_text, is_chat = "text" in value, "messages" in value
    is_pair = "prompt" in value and "completion" in value
    if is_text + is_chat + is_pair > 1:
        found = [k for k in ("text", "prompt", "completion", "messages") if k in value]
        msg = f"{where}: ambiguous row with the keys {', '.join(found)}: keep one kind; {_KINDS}"
        raise DataError(msg)
    if is_text:
        return TextRow(where, _string(value["text"], "text", where))
    if is_chat:
        return _chat(_messages(value["messages"], "messages", where), where, first_trained=0)
    if is_pair:
        return _parse_pair(value["prompt"], value["completion"], where)
    for key, other in (("prompt", "completion"), ("completion", "prompt")):
        if key in value:
            msg = f"{where}: {key!r} without {other!r}: add it; {_KINDS}"
            raise DataError(msg)
    renames = [f"{key} to {_RENAMES[key]}" for key in value if key in _RENAMES]
    hint = f"; rename {', '.join(renames)}" if renames else ""
    keys = ", ".join(value) or "none"
    msg = f"{where}: no training text among the keys ({keys}); {_KINDS}{hint}"
    raise DataError(msg)


def _parse_pair(prompt: object, completion: object, where: str) -> Row:
    if isinstance(prompt, list) != isinstance(completion, list):
        msg = (
            f"{where}: prompt is {_type_name(prompt)} and completion is {_type_name(completion)}:"
            " both must be strings, or both message lists"
        )
        raise DataError(msg)
    if isinstance(prompt, list):
        context = _messages(prompt, "prompt", where)
        answer = _messages(completion, "completion", where)
        return _chat(context + answer, where, first_trained=len(context))
    return PairRow(
        where, _string(prompt, "prompt", where), _string(completion, "completion", where)
    )


def _chat(messages: tuple[Message, ...], where: str, *, first_trained: int) -> ChatRow:
    row = ChatRow(where, messages, first_trained)
    if not row.trained_turns:
        part = "completion" if first_trained else "messages"
        msg = f"{where}: {part} has no assistant turn, so nothing would be trained: add one"
        raise DataError(msg)
    if row.trained_turns[0] == 0:
        msg = f"{where}: the chat starts with the assistant: put a user or system turn before it"
        raise DataError(msg)
    return row


def _messages(value: object, key: str, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        got = "an empty list" if value == [] else _type_name(value)
        msg = f'{where}: {key} must be a list of {{"role": ..., "content": ...}}, got {got}'
        raise DataError(msg)
    return tuple(_message(item, f"{where}, {key}[{i}]") for i, item in enumerate(value))


def _message(value: object, where: str) -> Message:
    if not isinstance(value, dict) or not {"role", "content"} <= value.keys():
        got = f"the keys {', '.join(value)}" if isinstance(value, dict) else _type_name(value)
        msg = f'{where}: expected {{"role": ..., "content": ...}}, got {got}'
        raise DataError(msg)
    role = value["role"]
    if role not in ROLES:
        msg = f"{where}: unknown role {role!r}: allowed are {', '.join(ROLES)}"
        raise DataError(msg)
    content = value["content"]
    if role == "assistant" or not isinstance(content, str):
        content = _string(content, "content", where)
    return Message(role, content)


def _string(value: object, key: str, where: str) -> str:
    if not isinstance(value, str):
        msg = f"{where}: {key} must be a string, got {_type_name(value)}"
        raise DataError(msg)
    if not value.strip():
        msg = f"{where}: {key} is empty: fill it or remove the row"
        raise DataError(msg)
    return value


def _type_name(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
    names.update({int: "a number", float: "a number", type(None): "null"})
    return names.get(type(value), type(value).__name__)
