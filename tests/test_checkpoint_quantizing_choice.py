"""``quantize_checkpoint``: which tensors are quantized, and why the others are not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import write
from dense_checkpoints import (
    ends,
    layer,
    row,
    write_model,
)
from safetensors import safe_open
from torch import Tensor

import qkern
from qkern.checkpoint.load import read_tensors
from qkern.checkpoint.reader import CheckpointReader


def moe(numel: int = 64) -> dict[str, Tensor]:
    prefix = "model.layers.0.mlp"
    return {
        f"{prefix}.experts.gate_up_proj": torch.randn(4, 8, numel).bfloat16(),
        f"{prefix}.experts.down_proj": torch.randn(4, 6, 50).bfloat16(),
        f"{prefix}.experts.gate_up_proj_bias": torch.randn(4, 8).bfloat16(),
        f"{prefix}.gate.weight": torch.randn(4, 64).bfloat16(),
        f"{prefix}.shared_expert.up_proj.weight": torch.randn(64, 64).bfloat16(),
        "model.layers.1.mlp.gate.weight": torch.randn(64, 64).bfloat16(),
        "model.layers.1.mlp.router.weight": torch.randn(4, 64).bfloat16(),
        "model.conv.weight": torch.randn(4, 3, 16).bfloat16(),
    }


@pytest.mark.case("A7", "E14")
def test_stacked_experts_are_quantized_one_by_one(tmp_path: Path) -> None:
    tensors = moe()
    src = write_model(tmp_path / "src", tensors)
    report = qkern.quantize_checkpoint(src, tmp_path / "dst", double_quant=False)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    found = read_tensors(tmp_path / "dst")
    whole = qkern.quantize(tensors[name], double_quant=False)
    assert torch.equal(found[name], whole.packed.reshape(-1, 1))
    per_expert = [qkern.quantize(expert, double_quant=False) for expert in tensors[name]]
    assert torch.equal(
        found[name].reshape(4, -1), torch.stack([q.packed.reshape(-1) for q in per_expert])
    )
    scales = torch.stack([q.absmax.reshape(-1) for q in per_expert])
    assert torch.equal(found[f"{name}.absmax"].reshape(4, -1), scales)
    reasons = {each.name: each.reason for each in report.tensors if each.format is None}
    assert reasons == {
        "model.layers.0.mlp.experts.down_proj": "blocks would straddle experts: 300 values each, "
        "no multiple of the blocksize 64",
        "model.layers.0.mlp.experts.gate_up_proj_bias": "not named weight, as a linear layer's is",
        "model.layers.0.mlp.gate.weight": "a router, by its name",
        "model.layers.1.mlp.router.weight": "a router, by its name",
        "model.conv.weight": "3-D, a linear layer's weight is 2-D",
    }
    config = json.loads((tmp_path / "dst" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "qkern"  # transformers knows no such experts


def test_what_is_included_may_straddle_experts(tmp_path: Path) -> None:
    src = write_model(tmp_path / "src", moe())
    report = qkern.quantize_checkpoint(src, tmp_path / "dst", include="experts.down_proj")
    assert row(report, "model.layers.0.mlp.experts.down_proj").format is not None


def test_rows_have_keys_for_parameters_named_weight_alone(tmp_path: Path) -> None:
    src = write_model(tmp_path / "src", moe())
    report = qkern.quantize_checkpoint(
        src, tmp_path / "dst", "int8_row", include=["model.conv", "*.experts.*_bias"]
    )
    reason = "int8_row has keys for parameters named weight alone"
    for name in ("gate_up_proj", "down_proj", "gate_up_proj_bias"):
        assert row(report, f"model.layers.0.mlp.experts.{name}").reason == reason
    assert row(report, "model.conv.weight").format is not None
    with CheckpointReader(tmp_path / "dst") as reader:
        assert reader.tensors["model.conv.weight"].shape == (4, 3, 16)


@pytest.mark.case("E14")
def test_low_coverage_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    src = write_model(tmp_path / "src", moe())
    with pytest.raises(qkern.CoverageError, match=r"at least 99\.0% were asked for"):
        qkern.quantize_checkpoint(src, tmp_path / "dst", min_coverage=0.99)
    with pytest.raises(qkern.CoverageError, match=r"3 tensors.*first is model\.conv\.weight"):
        qkern.quantize_checkpoint(src, tmp_path / "dst", strict=True)
    assert not (tmp_path / "dst").exists()
    left = ["conv", "experts.down_proj", "*_bias"]
    report = qkern.quantize_checkpoint(
        src, tmp_path / "dst", exclude=left, strict=True, min_coverage=0.5
    )
    assert report.coverage.coverage > 0.5


def test_embeddings_as_rows(tmp_path: Path) -> None:
    tensors = ends() | layer(0)
    src = write_model(tmp_path / "src", tensors)
    report = qkern.quantize_checkpoint(src, tmp_path / "dst", embeddings="int8_row")
    reason = "int8_row: an embedding, by its name"
    assert row(report, "model.embed_tokens.weight").reason == reason
    with CheckpointReader(tmp_path / "dst") as reader:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            q = qkern.quantize(tensors[name], "int8_row")
            found = reader.read(name)
            assert isinstance(found, qkern.QuantizedTensor)
            assert torch.equal(found.packed, q.packed)
            assert torch.equal(found.absmax, q.absmax)
    config = json.loads((tmp_path / "dst" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["quant_type"]) == ("qkern", "nf4")
    with pytest.raises(qkern.FormatError, match="embeddings 'nf4'"):
        qkern.quantize_checkpoint(src, tmp_path / "other", embeddings="nf4")


def test_tied_tensors_stay_tied(tmp_path: Path) -> None:
    tied = {"tie_word_embeddings": True}
    tensors = ends() | layer(0)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    src = write_model(tmp_path / "src", tensors, config=tied)
    report = qkern.quantize_checkpoint(src, tmp_path / "dst", include="lm_head")
    reason = "tied to model.embed_tokens.weight, which is dense"
    assert row(report, "lm_head.weight").reason == reason
    both = qkern.quantize_checkpoint(src, tmp_path / "rows", embeddings="int8_row")
    assert row(both, "lm_head.weight").format == row(both, "model.embed_tokens.weight").format
    # What the file says to be shared, as qkern.save does, is said again.
    shared = {key: tensor for key, tensor in tensors.items() if key != "lm_head.weight"}
    write(src, shared)
    metadata = {"format": "pt", "qkern_tied": '{"lm_head.weight": "model.embed_tokens.weight"}'}
    from safetensors.torch import save_file

    save_file(
        {key: tensor.clone() for key, tensor in shared.items()}, src / "model.safetensors", metadata
    )
    report = qkern.quantize_checkpoint(src, tmp_path / "said")
    assert report.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    with safe_open(tmp_path / "said" / "model.safetensors", "pt") as opened:
        assert opened.metadata() == metadata
    found = read_tensors(tmp_path / "said")
    assert torch.equal(found["lm_head.weight"], tensors["model.embed_tokens.weight"])


def test_what_is_quantized_already_is_refused(tmp_path: Path) -> None:
    src = write_model(tmp_path / "src", layer(0))
    qkern.quantize_checkpoint(src, tmp_path / "once")
    with pytest.raises(qkern.FormatError, match=r"is quantized already: .*is nf4"):
        qkern.quantize_checkpoint(tmp_path / "once", tmp_path / "twice")
    other = {"quantization_config": {"quant_method": "mxfp4"}}
    src = write_model(tmp_path / "native", layer(0), config=other)
    with pytest.raises(qkern.FormatError, match="quantized already, by 'mxfp4'"):
        qkern.quantize_checkpoint(src, tmp_path / "twice")
