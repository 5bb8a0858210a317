"""Which tensors count as quantizable, by names and shapes: what ``quantize_model`` would take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import row, write
from toys import tiny_llama

import qkern
from qkern.checkpoint.selection import select


def bert() -> Any:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(
            vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=32,
        )
    )  # fmt: skip


@pytest.mark.parametrize("build", [tiny_llama, lambda: tiny_llama(tie_word_embeddings=True), bert])
def test_coverage_is_that_of_quantize_model(build: Any, tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path / "dense")
    trial = qkern.inspect_checkpoint(tmp_path / "dense")
    done = qkern.quantize_model(model)
    by_names = {r.name: r.bytes_after for r in trial.coverage.quantized}
    assert by_names == {f"{r.name}.weight": r.bytes_after for r in done.quantized}
    assert all(r.reason for r in trial.coverage.rows if r.status == "dense")
    assert trial.rule is not None
    assert trial.rule in str(trial)
    qkern.save(model, tmp_path / "stored")
    stored = qkern.inspect_checkpoint(tmp_path / "stored")
    assert {r.name: r.bytes_after for r in stored.coverage.quantized} == by_names
    assert stored.coverage.bytes_before == pytest.approx(trial.coverage.bytes_before, rel=0.1)
    tied = dict(stored.tied)
    assert all(r.numel == 0 for r in stored.coverage.rows if r.name in tied)
    assert all(trial_row.name not in tied for trial_row in trial.tensors)
    compared = qkern.inspect_checkpoint(tmp_path / "stored", compare=tmp_path / "dense")
    assert compared.comparison is not None
    assert compared.comparison.unpaired == ()


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("model.layers.0.mlp.up_proj.weight", (8, 4), ""),
        ("weight", (8, 4), ""),
        ("a.time_embedding.linear_1.weight", (8, 4), ""),
        ("encoder.embedding_hidden_mapping_in.weight", (8, 4), ""),
        ("bert.layer.0.attention.output.dense.weight", (8, 4), ""),
        ("model.embed_tokens.weight", (8, 4), "embedding"),
        ("transformer.wte.weight", (8, 4), "embedding"),
        ("backbone.embeddings.weight", (8, 4), "embedding"),
        ("gpt_neox.embed_in.weight", (8, 4), "embedding"),
        ("embed_out.weight", (8, 4), "output head"),
        ("lm_head.weight", (8, 4), "output head"),
        ("output.weight", (8, 4), "output head"),
        ("cls.predictions.decoder.weight", (8, 4), "output head"),
        ("classifier.out_proj.weight", (8, 4), "output head"),
        ("anything.weight", (99, 4), "vocab_size"),
        ("model.norm.weight", (8,), "1-D"),
        ("scale.weight", (), "0-D"),
        ("experts.weight", (2, 8, 4), "3-D"),
        ("x_proj.A_log", (8, 4), "not named weight"),
        ("none.weight", (0, 4), "no values"),
    ],
)
def test_the_rule_by_names_and_shapes(
    name: str, shape: tuple[int, ...], reason: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 99}')
    got = row(qkern.inspect_checkpoint(write(tmp_path, {name: torch.ones(shape)})), name)
    assert (reason in got.reason) if reason else got.reason == ""
    assert (got.format is None) == bool(reason)


def test_include_and_exclude_have_the_last_word(tmp_path: Path) -> None:
    names = ("embed_tokens.weight", "l.0.up.weight", "l.1.up.weight", "experts", "norm.weight")
    tensors = {name: torch.randn(2, 8, 8) if name == "experts" else torch.randn(8, 8)
               for name in names}  # fmt: skip
    tensors["norm.weight"] = torch.randn(8)
    path = write(tmp_path, tensors)
    report = qkern.inspect_checkpoint(path, include=["embed_tokens", "exp*"], exclude="l.1.up")
    status = {r.name: r.status for r in report.coverage.rows}
    assert [name for name in names if status[name] == "nf4"] == [
        "embed_tokens.weight", "l.0.up.weight", "experts",
    ]  # fmt: skip
    assert row(report, "l.1.up.weight").reason == "excluded by 'l.1.up'"
    with pytest.raises(qkern.FormatError, match=r"'nothing' matches no dense tensor"):
        qkern.inspect_checkpoint(path, exclude=["nothing"])
    assert select([], include=(), exclude=(), vocab_size=None) == {}
