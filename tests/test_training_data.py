"""Reading training files: every kind of row, and every way in which a row can be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from chat_model import chat, write_jsonl

from qkern.errors import DataError
from qkern.training.data import ChatRow, Message, PairRow, TextRow, read_rows

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


def read(tmp_path: Path, *rows: object) -> list[object]:
    return list(read_rows(write_jsonl(tmp_path / "data.jsonl", rows)))


def test_text(tmp_path: Path) -> None:
    (row,) = read(tmp_path, {"text": "hello", "id": 7})
    assert isinstance(row, TextRow)
    assert row.text == "hello"
    assert row.where.endswith("data.jsonl, line 1")


def test_pair_of_strings(tmp_path: Path) -> None:
    (row,) = read(tmp_path, {"prompt": "1 +", "completion": " 2"})
    assert isinstance(row, PairRow)
    assert (row.prompt, row.completion) == ("1 +", " 2")


def test_pair_of_message_lists_trains_only_the_completion(tmp_path: Path) -> None:
    (row,) = read(tmp_path, {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]})
    assert isinstance(row, ChatRow)
    assert row.trained_turns == (3,)
    assert row.messages[0] == Message("user", "q")


def test_messages_train_every_assistant_turn(tmp_path: Path) -> None:
    (row,) = read(tmp_path, chat("a", "b", "c", "d"))
    assert isinstance(row, ChatRow)
    assert row.trained_turns == (1, 3)


def test_messages_beside_a_prompt_without_completion_are_a_chat(tmp_path: Path) -> None:
    (row,) = read(tmp_path, {"prompt": "q", "messages": [USER, ANSWER]})
    assert isinstance(row, ChatRow)


def test_an_empty_system_message_is_allowed(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": ""}, USER, ANSWER]
    assert len(read(tmp_path, {"messages": messages})) == 1


def test_blank_lines_and_a_byte_order_mark_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n  \n{"text": "b"}\n')
    rows = read_rows(path)
    assert [row.where.rpartition(" ")[2] for row in rows] == ["1", "4"]


def test_plain_text_file(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_text("some\ntext", encoding="utf-8")
    (row,) = read_rows(path)
    assert row == TextRow(str(path), "some\ntext", whole_file=True)


WRONG = [
    ('{"text": "a"', r"line 2: not JSON at column \d+"),
    ("[", "line 2: not JSON .* write one object per line"),
    ("[1, 2]", "line 2: expected a JSON object, got an array"),
    ({}, r"line 2: no training text among the keys \(none\)"),
    (
        {"instruction": "a", "output": "b"},
        "line 2: .*rename instruction to prompt, output to completion",
    ),
    ({"prompt": "a"}, "line 2: 'prompt' without 'completion'"),
    ({"completion": "a"}, "line 2: 'completion' without 'prompt'"),
    ({"text": "a", "messages": []}, "line 2: ambiguous row with the keys text, messages"),
    ({"text": 3}, "line 2: text must be a string, got a number"),
    ({"text": "  "}, "line 2: text is empty"),
    ({"text": None}, "line 2: text must be a string, got null"),
    ({"prompt": [USER], "completion": "a"}, "line 2: prompt is an array and completion is a str"),
    ({"prompt": "a", "completion": ""}, "line 2: completion is empty"),
    ({"messages": []}, "line 2: messages must be a list .* got an empty list"),
    ({"messages": "hi"}, "line 2: messages must be a list .* got a string"),
    ({"messages": [USER, "x"]}, r"line 2, messages\[1\]: expected .* got a string"),
    ({"messages": [{"role": "user"}]}, r"line 2, messages\[0\]: expected .* got the keys role"),
    (
        {"messages": [{"from": "human", "value": "x"}]},
        r"line 2, messages\[0\]: expected .* got the keys from, value",
    ),
    (
        {"messages": [{"role": "human", "content": "x"}]},
        r"line 2, messages\[0\]: unknown role 'human': allowed are system, user, assistant, tool",
    ),
    (
        {"messages": [USER, {"role": "assistant", "content": ""}]},
        r"line 2, messages\[1\]: content is empty",
    ),
    (
        {"messages": [USER, {"role": "assistant", "content": ["parts"]}]},
        r"line 2, messages\[1\]: content must be a string, got an array",
    ),
    ({"messages": [USER]}, "line 2: messages has no assistant turn"),
    ({"messages": [ANSWER, USER]}, "line 2: the chat starts with the assistant"),
    ({"prompt": [USER], "completion": [USER]}, "line 2: completion has no assistant turn"),
]


@pytest.mark.parametrize(("row", "message"), WRONG, ids=[str(row)[:40] for row, _ in WRONG])
def test_a_wrong_row_is_named_by_line(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, "", row)  # the blank line counts


def test_kinds_must_not_be_mixed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 2: a text row in a file whose first row is chat"):
        read(tmp_path, chat("a", "b"), {"text": "c"})


@pytest.mark.case("E12")
@pytest.mark.parametrize("content", ["", "\n \n"])
@pytest.mark.parametrize("name", ["data.jsonl", "data.txt"])
def test_an_empty_file_is_an_error(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=r"no rows|no text"):
        read_rows(path)


def test_an_unknown_kind_of_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'\.csv': allowed are \.jsonl and \.txt"):
        read_rows(tmp_path / "data.csv")


@pytest.mark.parametrize("name", ["data.jsonl", "data.txt"])
def test_other_encodings_are_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes('{"text": "é"}'.encode("latin-1"))
    with pytest.raises(DataError, match="byte 10 is not UTF-8"):
        read_rows(path)


def test_a_missing_file_stays_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_rows(tmp_path / "none.jsonl")
