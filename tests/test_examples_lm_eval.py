"""lm-eval's ``hf`` model class evaluates quantized models on the tasks of the example."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_model import byte_tokenizer
from toys import tiny_llama
from transformers import AutoModelForCausalLM

import qkern
from qkern.layers import QuantizedLinear

pytest.importorskip("lm_eval", reason="the example evaluates by lm_eval: the extra eval brings it")
datasets = pytest.importorskip("datasets")
EXAMPLE = Path(__file__).parents[1] / "examples" / "lm_eval" / "compare.py"
TOKENIZER = byte_tokenizer()


def example() -> Any:
    spec = importlib.util.spec_from_file_location("lm_eval_compare", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nats(model: Any, given: list[int], text: str) -> float:
    """Minus the log-likelihood of a text after some tokens, by the model's own loss."""
    ids = torch.tensor([[*given, *TOKENIZER(text).input_ids]])
    labels = ids.clone()
    labels[:, : len(given)] = -100
    with torch.no_grad():
        return model(input_ids=ids, labels=labels).loss.item() * (ids.shape[1] - len(given))


def byte_perplexity(model: Any, rows: list[dict[str, Any]]) -> Any:
    """Of the stories with their right ends."""
    texts = [f"{row['start']} {row['choices'][row['answer']]}." for row in rows]
    total = sum(nats(model, [TOKENIZER.bos_token_id], text) for text in texts)
    return pytest.approx(math.exp(total / sum(map(len, texts))), rel=1e-4)


def test_results_are_those_of_the_models_own_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    qkern.quantize_model(dense := tiny_llama(vocab_size=259, max_position_embeddings=512))
    qkern.save(dense, tmp_path / "model")
    model, compare = qkern.load(tmp_path / "model"), example()
    results, rows = compare.evaluate(model, TOKENIZER)["results"], compare.stories()

    right = 0
    for row in rows:
        start = TOKENIZER(row["start"]).input_ids
        losses = [nats(model, start, f" {word}") for word in row["choices"]]
        right += losses.index(min(losses)) == row["answer"]
    assert results["qkern_cloze"]["acc,none"] == pytest.approx(right / len(rows))

    assert results["qkern_text"]["byte_perplexity,none"] == byte_perplexity(model, rows)


def test_a_directory_that_names_qkern_opens_by_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qkern.integrations.transformers import QkernConfig

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tiny_llama(vocab_size=259, max_position_embeddings=512).save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=QkernConfig("nf4")
    )
    assert any(isinstance(module, QuantizedLinear) for module in model.modules())
    for part in (model, TOKENIZER):
        part.save_pretrained(tmp_path / "nf4")
    compare = example()
    results = compare.evaluate(str(tmp_path / "nf4"), tasks=("qkern_text",))["results"]
    found = results["qkern_text"]["byte_perplexity,none"]
    assert found == byte_perplexity(model.eval(), compare.stories())
