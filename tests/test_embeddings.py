"""Embeddings and heads in int8 rows, as ``qkern quantize --embeddings`` writes them."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, output
from torch import nn

import qkern
from qkern.embeddings import QuantizedEmbedding, hold_quantized

BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}


# A head of its own; a tied one and an embedding that scales; one that shifts; three tied ones.
@pytest.mark.parametrize("name", ["Llama", "Gemma 3", "OPT", "T5"])
def test_a_checkpoint_with_quantized_embeddings_is_read_and_run(name: str, tmp_path: Path) -> None:
    dense = BY_NAME[name].small()
    dense.save_pretrained(tmp_path / "dense")
    qkern.quantize_checkpoint(tmp_path / "dense", tmp_path / "q", "nf4", embeddings="int8_row")
    model = qkern.load(tmp_path / "q")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, QuantizedEmbedding)
    assert isinstance(embedding, type(dense.get_input_embeddings()))
    assert isinstance(head, qkern.QuantizedLinear)
    assert (head.weight is embedding.weight) is model.config.tie_word_embeddings
    for path, parameter in model.named_parameters():
        if isinstance(parameter, qkern.QuantizedTensor):
            dense.get_parameter(path).data = parameter.dequantize()
    with torch.no_grad():
        found, right = output(model), output(dense)
        assert (found - right).norm() < 2e-6 * right.norm()
        qkern.save(model, tmp_path / "again")
        assert torch.equal(output(qkern.load(tmp_path / "again")), found)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(output(other), found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_those_of_the_dequantized_weight(dtype: torch.dtype) -> None:
    weight = qkern.quantize(torch.randn(9, 33).to(dtype), "int8_row")
    ids = torch.tensor([[0, 8, 3], [3, 3, 1]])
    rows = nn.functional.embedding(ids, weight)
    assert rows.dtype == dtype
    assert torch.equal(rows, weight.dequantize()[ids])
    blocks = qkern.quantize(torch.randn(9, 64).to(dtype))
    assert torch.equal(nn.functional.embedding(ids, blocks), blocks.dequantize()[ids])


def test_what_cannot_be_read_back_is_refused() -> None:
    rows = qkern.quantize(torch.randn(9, 64), "int8_row")
    with pytest.raises(qkern.FormatError, match="an embedding in nf4 cannot be read: int8_row"):
        hold_quantized(nn.Embedding(9, 64), qkern.quantize(torch.randn(9, 64)))
    with pytest.raises(qkern.FormatError, match="max_norm scales its rows in place"):
        hold_quantized(nn.Embedding(9, 64, max_norm=1.0), rows)


def test_ids_outside_of_the_table_are_refused_as_of_a_dense_one() -> None:
    values = torch.randn(9, 64)
    for weight in (values, qkern.quantize(values, "int8_row")):
        for ids in ([-1], [9]):  # -1 must not be the last row
            with pytest.raises(IndexError, match="out of range"):
                nn.functional.embedding(torch.tensor(ids), weight)
