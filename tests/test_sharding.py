"""What is checked before a model is sharded; the sharding itself is in test_distributed.py."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES
from torch import nn
from toys import tiny_llama

import qkern
from qkern.embeddings import hold_quantized

BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}


def model() -> nn.Module:
    made = tiny_llama(intermediate_size=160)  # down_proj's rows are two blocks and a half
    qkern.quantize_model(made)
    qkern.add_lora(made, r=4)
    return made


@pytest.mark.case("D21")
def test_the_report_says_what_is_spread_and_what_is_not() -> None:
    made = model()
    report = qkern.fsdp_ready(made)
    whole = [row.name for row in report.rows if not row.sharded]
    assert whole == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert {row.reason for row in report.rows} == {"", "blocks of 64 cross its rows"}
    assert len(report.rows) == 14
    assert "blocks of 64 cross its rows" in str(report)
    q_proj, down_proj = report.rows[0], next(row for row in report.rows if not row.sharded)
    assert q_proj.nbytes == 128 * 64 + 256 + 4 + 4  # codes, scales, a group's scale, the offset
    assert (q_proj.common, down_proj.common) == (8, down_proj.nbytes)
    assert report.bytes_per_rank(1) == sum(row.nbytes for row in report.rows)
    assert report.bytes_per_rank(2) == sum(
        row.common + (row.nbytes - row.common) // 2 for row in report.rows
    )
    trained = {id(p) for p in made.parameters() if p.requires_grad}
    assert {id(p) for p in report.frozen} | trained == {id(p) for p in made.parameters()}
    assert not {id(p) for p in report.frozen} & trained
    assert str(qkern.fsdp_ready(tiny_llama())) == "no quantized weight"


@pytest.mark.case("D21")
def test_what_is_in_the_way_is_an_error() -> None:
    made = model()
    qkern.merge_adapter(made)
    with pytest.raises(qkern.AdapterMismatchError, match=r"q_proj has a merged adapter"):
        qkern.fsdp_ready(made)
    qkern.unmerge_adapter(made)
    qkern.fuse_projections(made)
    with pytest.raises(qkern.FormatError, match="unfuse_projections"):
        qkern.fsdp_ready(made)
    qkern.unfuse_projections(made)
    made.model.norm.to(torch.bfloat16).requires_grad_(True)
    with pytest.raises(qkern.DTypeError, match=r"norm\.weight in torch\.bfloat16"):
        qkern.fsdp_ready(made)


def test_experts_and_shared_weights_are_counted_once() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(8, 64), nn.Linear(64, 8, bias=False)
            self.experts = BY_NAME["Mixtral"].small().model.layers[0].mlp.experts

    made = Net()
    qkern.quantize_model(made)
    hold_quantized(made.embed, qkern.quantize(torch.randn(8, 64), "int8_row"))
    made.head.weight = made.embed.weight
    report = qkern.fsdp_ready(made)
    names = ["embed", "experts.gate_up_proj", "experts.down_proj"]
    assert sorted(row.name for row in report.rows) == sorted(names)
    assert all(row.sharded for row in report.rows)
    stored = sum(p.nbytes for p in made.parameters() if isinstance(p, qkern.QuantizedTensor))
    assert report.bytes_per_rank(1) == stored
