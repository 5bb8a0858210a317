"""The demo's task: cards that are right, a parser that can say no, and nothing leaked."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from chat_model import byte_tokenizer, write_jsonl

from qkern.training import prepare_data

DEMO = Path(__file__).parents[1] / "examples" / "demo"


@pytest.fixture(scope="module")
def cards() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_cards", DEMO / "cards.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo_cards"] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


def test_a_card_is_what_the_docstring_says(cards: Any) -> None:
    found = {card.name: card for card in cards.collect_cards(("textwrap",))}
    card = found["textwrap.dedent"]
    assert card.answer == (
        "name: textwrap.dedent\ntakes: text\n"
        "does: Remove any common leading whitespace from every line in `text`."
    )
    assert "# in textwrap\ndef dedent(text):\n    " in card.question


def test_there_are_enough_and_none_is_in_both_sets(cards: Any) -> None:
    train = cards.collect_cards(cards.TRAIN_MODULES)
    heldout = cards.collect_cards(cards.HELDOUT_MODULES)
    assert len(train) >= 300
    assert len(heldout) >= 80
    assert not {card.name for card in train} & {card.name for card in heldout}
    assert not set(cards.TRAIN_MODULES) & set(cards.HELDOUT_MODULES)
    assert train == cards.collect_cards(cards.TRAIN_MODULES)


def test_every_answer_parses_to_its_fields(cards: Any) -> None:
    for card in cards.collect_cards(cards.HELDOUT_MODULES):
        fields = cards.parse_card(card.answer)
        assert fields is not None, card.answer
        assert fields["name"] == card.name


@pytest.mark.parametrize(
    "text",
    [
        "",
        "takes: a\nname: b\ndoes: c",
        "name: a\ntakes: b",
        "name: a b\ntakes: c\ndoes: d",
        "name: a\ntakes: b\ndoes: c\nand more",
        "Here is the card:\nname: a\ntakes: b\ndoes: c",
        "Name: a\nTakes: b\nDoes: c",
    ],
)
def test_the_parser_is_strict(cards: Any, text: str) -> None:
    assert cards.parse_card(text) is None


def test_the_rows_are_training_data(cards: Any, tmp_path: Path) -> None:
    rows = [card.messages() for card in cards.collect_cards(("textwrap",))]
    data = prepare_data(write_jsonl(tmp_path / "rows.jsonl", rows), byte_tokenizer())
    assert data.preview().endswith("<|im_end|>]]")
