"""Token ids and loss masks, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chat_model import byte_tokenizer, chat, write_jsonl

from qkern.errors import DataError
from qkern.training.data import read_rows
from qkern.training.examples import IGNORED, Example, build_examples
from qkern.training.prepare import prepare_data
from qkern.training.preview import render_example, summarize

TOKENIZER = byte_tokenizer()
START, END = "<|im_start|>", "<|im_end|>"
# Keeps only the last answer's thoughts, as the templates of reasoning models do.
FORGETFUL = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{{ m['content'] if loop.last or m['role'] != 'assistant' else m['content'][:1] }}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build(
    tmp_path: Path, *rows: object, tokenizer: Any = TOKENIZER, max_length: int = 256
) -> list[Example]:
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    return build_examples(read_rows(path), tokenizer, max_length=max_length)


def pieces(example: Example, tokenizer: Any = TOKENIZER) -> list[tuple[str, bool]]:
    """Every token as text, with whether it is trained."""
    pairs = zip(example.input_ids, example.labels, strict=True)
    return [(tokenizer.decode([token]), label != IGNORED) for token, label in pairs]


def trained_text(example: Example) -> str:
    return "".join(text for text, trained in pieces(example) if trained)


def test_labels_are_the_ids_where_trained(tmp_path: Path) -> None:
    (example,) = build(tmp_path, chat("hi", "yo"))
    for token, label in zip(example.input_ids, example.labels, strict=True):
        assert label in (token, IGNORED)


def test_chat_token_by_token(tmp_path: Path) -> None:
    (example,) = build(tmp_path, chat("hi", "yo"))
    context = [START, *"user\nhi", END, "\n", START, *"assistant\n"]
    expected = [(text, False) for text in context] + [("y", True), ("o", True), (END, True)]
    assert pieces(example) == expected


def test_multi_turn_trains_every_answer_and_its_end(tmp_path: Path) -> None:
    (example,) = build(tmp_path, chat("q", "one", "r", "two"))
    assert trained_text(example) == f"one{END}two{END}"
    flags = [trained for _, trained in pieces(example)]
    assert flags[-4:] == [True] * 4
    assert sum(flags) == example.trained == 8


def test_a_final_user_turn_is_dropped(tmp_path: Path) -> None:
    (example,) = build(tmp_path, chat("q", "one", "r"))
    assert trained_text(example) == f"one{END}"
    assert pieces(example)[-1] == (END, True)


def test_completion_messages_leave_earlier_answers_alone(tmp_path: Path) -> None:
    messages: list[Any] = chat("q", "one", "r", "two")["messages"]  # type: ignore[assignment]
    row = {"prompt": messages[:3], "completion": messages[3:]}
    (example,) = build(tmp_path, row)
    assert trained_text(example) == f"two{END}"


def test_blanks_at_the_end_of_an_answer_are_trained(tmp_path: Path) -> None:
    (example,) = build(tmp_path, chat("q", "one\n"))
    assert trained_text(example) == f"one\n{END}"


def test_forgetful_template_gives_an_example_per_answer(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(FORGETFUL)
    first, second = build(tmp_path, chat("q", "one", "r", "two"), tokenizer=tokenizer)
    assert trained_text(first) == f"one{END}"
    assert trained_text(second) == f"two{END}"
    assert "assistant\no<|im_end|>" in tokenizer.decode(second.input_ids)


def test_template_whose_prompt_is_no_prefix(tmp_path: Path) -> None:
    template = (
        "{% if add_generation_prompt %}{{ 'answer now: ' }}{% endif %}"
        "{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    )
    with pytest.raises(DataError, match=r"line 1: the chat template renders turn 1 .* no prefix"):
        build(tmp_path, chat("q", "a"), tokenizer=byte_tokenizer(template))


def test_template_without_an_end_mark_gets_one(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    (example,) = build(tmp_path, chat("q", "a"), tokenizer=byte_tokenizer(template))
    assert trained_text(example) == f"a\n{END}"


def test_template_that_refuses_a_role(tmp_path: Path) -> None:
    template = "{{ raise_exception('no system role') if messages[0]['role'] == 'system' }}"
    row = {"messages": [{"role": "system", "content": "s"}, *chat("q", "a")["messages"]]}  # type: ignore[misc]
    with pytest.raises(DataError, match=r"line 1: the chat template refuses .* no system role"):
        build(tmp_path, row, tokenizer=byte_tokenizer(template))


def test_chat_without_a_template(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 1: a chat, but the tokenizer has no chat template"):
        build(tmp_path, chat("q", "a"), tokenizer=byte_tokenizer(None))


def test_pair_of_strings_is_literal_and_ends(tmp_path: Path) -> None:
    (example,) = build(tmp_path, {"prompt": "1+", "completion": "2"})
    assert pieces(example) == [("1", False), ("+", False), ("2", True), (END, True)]


def test_an_end_that_is_written_out_is_not_doubled(tmp_path: Path) -> None:
    (example,) = build(tmp_path, {"prompt": "1+", "completion": f"2{END}"})
    assert pieces(example)[-2:] == [("2", True), (END, True)]
    assert example.input_ids.count(TOKENIZER.eos_token_id) == 1


def test_text_trains_everything(tmp_path: Path) -> None:
    (example,) = build(tmp_path, {"text": "abc"})
    assert pieces(example) == [("a", True), ("b", True), ("c", True), (END, True)]
    assert example.trained == 3  # nothing comes before the first token


def test_text_file_is_cut_into_pieces(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_text("abcdefgh", encoding="utf-8")
    examples = build_examples(read_rows(path), TOKENIZER, max_length=4)
    assert [TOKENIZER.decode(e.input_ids) for e in examples] == ["abcd", "efgh"]  # no 1-token rest
    examples = build_examples(read_rows(path), TOKENIZER, max_length=6)
    assert [TOKENIZER.decode(e.input_ids) for e in examples] == ["abcdef", f"gh{END}"]


@pytest.mark.case("E12")
def test_truncation_keeps_the_start_and_is_counted(tmp_path: Path) -> None:
    examples = build(tmp_path, chat("hi", "a long answer"), chat("hi", "a"), max_length=26)
    assert len(examples[0].input_ids) == 26
    assert examples[0].cut == 9
    summary = summarize(examples)
    assert (summary.cut_examples, summary.cut_tokens) == (1, 9)
    assert "1 cut at max_length, 9 tokens dropped" in str(summary)


@pytest.mark.case("E12")
@pytest.mark.parametrize("max_length", [2, 10, 25])
def test_a_prompt_that_fills_the_length_is_an_error(tmp_path: Path, max_length: int) -> None:
    message = rf"line 2: the prompt alone is 25 tokens, max_length is {max_length}: .* is 28 tokens"
    with pytest.raises(DataError, match=message):
        build(tmp_path, "", chat("hi you", "yo"), max_length=max_length)


def test_preview_marks_the_trained_part(tmp_path: Path) -> None:
    (example,) = build(tmp_path, chat("hi", "yo"))
    text = render_example(example, TOKENIZER)
    assert text == f"{START}user\nhi{END}\n{START}assistant\n[[yo{END}]]"
    assert "\x1b[1myo" in render_example(example, TOKENIZER, colour=True)


def test_prepared_data_has_counts_notes_and_a_fingerprint(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}])
    data = prepare_data(path, TOKENIZER)
    assert (data.summary.examples, data.summary.tokens, data.summary.trained) == (1, 3, 2)
    assert "chat template is not applied" in data.notes[0]
    other = write_jsonl(tmp_path / "b.jsonl", [{"prompt": "ab", "completion": "b"}])
    assert prepare_data(other, TOKENIZER).fingerprint != data.fingerprint
    assert prepare_data(path, TOKENIZER).fingerprint == data.fingerprint
