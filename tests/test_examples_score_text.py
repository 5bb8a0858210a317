"""The example of scores gives the values that papers print, and scores what a model wrote."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
from chat_model import save_chat_model, write_jsonl

for package in ("rouge_score", "sacrebleu"):
    pytest.importorskip(package, reason=f"scores need {package}: the extra eval brings it")
EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("score_text")


def test_both_papers_own_values(example: Any) -> None:
    scores = example.papers()
    assert len(scores) == 10
    for name, value in scores.items():
        above, below = map(int, re.search(r"\((\d+)/(\d+)\)$", name).groups())
        assert value == pytest.approx(above / below), name


def test_bleu_is_the_penalty_times_the_geometric_mean(example: Any) -> None:
    whole = example.bleu(example.GUIDE[:1], [example.GUIDE_REFERENCES])
    product = (17 / 18) * (10 / 17) * (7 / 16) * (4 / 15)  # counted by hand
    assert whole["bleu"] == pytest.approx(100 * product**0.25)
    assert whole["brevity"] == 1
    short = example.bleu(["the cat"], [["the cat is here"]])
    assert short["brevity"] == pytest.approx(2.718281828 ** (1 - 4 / 2))


def test_rows_are_scored_against_the_best_of_their_references(example: Any) -> None:
    generated = ["a b c", "x y z"]
    scores = example.rouge(generated, [["q r s", "a b c"], ["x y q"]])
    assert scores["rouge1"] == pytest.approx((1 + 2 / 3) / 2)
    assert scores["rouge2"] == pytest.approx((1 + 1 / 2) / 2)
    assert example.bleu(["a b c d e"], [["f", "a b c d e"]])["bleu"] == pytest.approx(100)


def test_a_file_of_answers(
    example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"generated": "It is seven.", "reference": "It is seven."},
        {"generated": "It is eight.", "references": ["No.", "It is eight."]},
    ]
    assert example.main([str(write_jsonl(tmp_path / "answers.jsonl", rows))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "bleu: 100.0000"
    assert "rougeL: 1.0000" in lines


def test_a_model_answers_first(
    example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_chat_model(tmp_path / "model")
    rows = [{"prompt": "Add 1 to 3.", "reference": "It is 4."}]
    file = write_jsonl(tmp_path / "questions.jsonl", rows)
    assert example.main([str(file), "--model", str(model), "--max-new-tokens", "4"]) == 0
    scores = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    assert scores["bleu"] == "0.0000"  # an untrained model knows no such answer
    assert set(scores) >= {"rouge1", "rouge2", "rougeL", "precision4"}
