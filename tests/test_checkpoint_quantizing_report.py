"""``quantize_checkpoint``: its config, card, other files and report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_checkpoints import (
    CONFIG,
    FORMATS,
    entries_of,
    layer,
    row,
    write_model,
    write_sharded,
)
from file_trees import tree

import qkern


@pytest.mark.parametrize(("quant_type", "settings"), FORMATS)
def test_config_is_that_of_save(tmp_path: Path, quant_type: str, settings: dict[str, Any]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96}
    model = LlamaForCausalLM(LlamaConfig(**shape, **heads)).bfloat16()
    model.save_pretrained(tmp_path / "src")
    qkern.quantize_checkpoint(tmp_path / "src", tmp_path / "dst", quant_type, **settings)
    qkern.quantize_model(model, quant_type, **settings)
    qkern.save(model, tmp_path / "saved")
    found, expected = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("dst", "saved")
    )
    skipped = "llm_int8_skip_modules"
    if skipped not in found["quantization_config"]:
        skipped = "modules_to_not_convert"
    # A file does not tell that an embedding is no linear layer.
    assert found["quantization_config"].pop(skipped) == ["lm_head", "model.embed_tokens"]
    assert expected["quantization_config"].pop(skipped) == ["lm_head"]
    assert found == {key: expected[key] for key in found}  # save writes defaults too


def test_small_files_are_carried_and_other_weights_are_not(tmp_path: Path) -> None:
    src = write_model(tmp_path / "src", layer(0))
    for name in ("pytorch_model.bin", "model.gguf", "extra.safetensors", ".gitattributes"):
        (src / name).write_bytes(b"x")
    (src / "adapter_config.json").write_text("{}")
    (src / "tokenizer config.json").write_text("{}")
    for name in ("original/consolidated.00.pth", "1_Pooling/config.json", "templates/a/b.jinja"):
        (src / name).parent.mkdir(parents=True)
        (src / name).write_text("x")
    (src / "blob").write_text("linked")
    (src / "vocab.txt").symlink_to(src / "blob")
    report = qkern.quantize_checkpoint(src, tmp_path / "dst")
    assert set(tree(tmp_path / "dst")) == set(report.files)
    assert set(report.files) == {
        *("model.safetensors", "config.json", "README.md", "tokenizer.json", "blob", "vocab.txt"),
        *("tokenizer config.json", "1_Pooling/config.json", "templates/a/b.jinja"),
    }
    assert not (tmp_path / "dst" / "vocab.txt").is_symlink()
    assert report.left_out == {
        ".gitattributes": "hidden",
        "adapter_config.json": "an adapter of the dense model",
        "extra.safetensors": "other weights",
        "model.gguf": "other weights",
        "original/": "a folder with weights, links or hidden files",
        "pytorch_model.bin": "other weights",
    }


def test_the_card_gets_one_section_with_the_errors(tmp_path: Path) -> None:
    src = write_model(tmp_path / "src", layer(0))
    report = qkern.quantize_checkpoint(src, tmp_path / "dst")
    card = (tmp_path / "dst" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n# A model\n\n<!-- qkern: begin -->\n")
    assert f"{report.relative_rms:.4g}" in card
    assert "| `model.layers.0.mlp.down_proj.weight` | 0." in card
    (src / "README.md").write_text(card)
    qkern.quantize_checkpoint(src, tmp_path / "again", "int8")
    card = (tmp_path / "again" / "README.md").read_text()
    assert card.count("## Quantization") == 1
    assert "int8 in blocks of 64" in card
    (src / "README.md").unlink()
    qkern.quantize_checkpoint(src, tmp_path / "none")
    assert (tmp_path / "none" / "README.md").read_text().startswith("<!-- qkern: begin -->")


def test_measured_errors_are_the_errors(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.randn(64, 128), "b.weight": 3 * torch.randn(64, 64).bfloat16()}
    src = write_model(tmp_path / "src", tensors)
    report = qkern.quantize_checkpoint(src, tmp_path / "dst")
    for name, tensor in tensors.items():
        dense = qkern.dequantize(qkern.quantize(tensor), torch.float32).double()
        error = (dense - tensor.double()).norm() / tensor.double().norm()
        assert row(report, name).relative_rms == pytest.approx(float(error), rel=1e-6)
    assert [each.name for each in report.worst] == sorted(
        tensors, key=lambda name: -(row(report, name).relative_rms or 0)
    )


def test_a_dry_run_says_the_same_and_writes_nothing(tmp_path: Path) -> None:
    src = write_sharded(tmp_path / "src")
    before = tree(tmp_path)
    planned = qkern.quantize_checkpoint(src, tmp_path / "dst", dry_run=True)
    assert tree(tmp_path) == before
    assert not (tmp_path / "dst").exists()
    done = qkern.quantize_checkpoint(src, tmp_path / "dst")
    assert (planned.coverage, planned.files) == (done.coverage, done.files)
    assert planned.as_dict()["dry_run"] is True
    assert "nothing was written" in str(planned)
    assert f"{len(done.files)} files" in str(done)
    with pytest.raises(qkern.OutputError, match="force"):
        qkern.quantize_checkpoint(src, tmp_path / "dst", dry_run=True)


def test_progress_comes_to_all_bytes_that_are_read(tmp_path: Path) -> None:
    src = write_sharded(tmp_path / "src")
    told: list[tuple[int, int]] = []
    qkern.quantize_checkpoint(
        src, tmp_path / "dst", progress=lambda done, total: told.append((done, total))
    )
    total = sum(tensor.nbytes for tensor in entries_of(src).values())
    assert sum(done for done, _ in told) == total
    assert {each for _, each in told} == {total}


def test_config_entries_are_added_to_those_that_are_there(tmp_path: Path) -> None:
    src = write_model(tmp_path / "src", layer(0), config={"rope_theta": 1e6})
    qkern.quantize_checkpoint(src, tmp_path / "dst")
    content = json.loads((tmp_path / "dst" / "config.json").read_text())
    del content["quantization_config"]
    assert content == CONFIG | {"rope_theta": 1e6}
