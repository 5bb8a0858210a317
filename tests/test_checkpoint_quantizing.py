"""``quantize_checkpoint``: what is quantized, how it is stored, what is said of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write
from dense_checkpoints import (
    CONFIG,
    ends,
    expected_entries,
    layer,
    write_model,
    write_sharded,
)
from file_trees import tree
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import qkern
from qkern.checkpoint.load import read_tensors
from qkern.checkpoint.quantization_report import QuantizationReport, TensorResult
from qkern.checkpoint.reader import CheckpointReader

FORMATS: list[tuple[str, dict[str, Any]]] = [
    ("nf4", {}),
    ("nf4", {"double_quant": False, "blocksize": 128}),
    ("nf4", {"method": "search"}),
    ("fp4", {"blocksize": 32}),
    ("int8", {}),
    ("int8", {"double_quant": False}),
    ("int8_row", {}),
]
LINEAR = {
    "model.odd.weight",
    *(f"model.layers.{i}.{kind}" for i in range(3) for kind in ("self_attn.q_proj.weight",)),
    *(f"model.layers.{i}.mlp.down_proj.weight" for i in range(3)),
}


def row(report: QuantizationReport, name: str) -> TensorResult:
    return next(row for row in report.tensors if row.name == name)


def entries_of(path: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape), key
        assert torch.equal(found[key], tensor), key


# -- bytes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("quant_type", "settings"), FORMATS)
def test_files_hold_what_quantize_makes(
    tmp_path: Path, quant_type: str, settings: dict[str, Any]
) -> None:
    src = write_sharded(tmp_path / "src")
    report = qkern.quantize_checkpoint(src, tmp_path / "dst", quant_type, **settings)
    dense = entries_of(src)
    expected = expected_entries(dense, LINEAR, quant_type, **settings)
    assert_same(entries_of(tmp_path / "dst"), expected)
    assert {row.name for row in report.tensors if row.format is not None} == LINEAR
    with CheckpointReader(tmp_path / "dst") as reader:  # checks the index against the shards
        for name in LINEAR:
            stored = reader.tensors[name]
            assert stored.file.name == row(report, name).file
            if quant_type != "int8_row":  # those files do not say what it was
                assert stored.dtype == row(report, name).dtype
            assert reader.read(name).shape == dense[name].shape


def test_any_number_of_threads_writes_the_same_bytes_mapped_or_copied(tmp_path: Path) -> None:
    src = write_sharded(tmp_path / "src")
    trees = []
    for threads, mmap in ((1, True), (2, True), (7, True), (2, False)):
        dst = tmp_path / f"{threads}-{mmap}"
        qkern.quantize_checkpoint(src, dst, threads=threads, mmap=mmap)
        trees.append(tree(dst))
    assert all(written == trees[0] for written in trees)


def test_shards_and_index_are_as_before(tmp_path: Path) -> None:
    src = write_sharded(tmp_path / "src")
    qkern.quantize_checkpoint(src, tmp_path / "dst")
    index = json.loads((tmp_path / "dst" / "model.safetensors.index.json").read_text())
    before = json.loads((src / "model.safetensors.index.json").read_text())["weight_map"]
    after = index["weight_map"]
    assert all(after[name] == file for name, file in before.items())
    shards = [load_file(tmp_path / "dst" / name) for name in sorted(set(before.values()))]
    sizes = [tensor.nbytes for shard in shards for tensor in shard.values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    with safe_open(tmp_path / "dst" / "model-0.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_a_single_file_is_quantized_by_itself(tmp_path: Path) -> None:
    src = write_model(tmp_path / "src", ends() | layer(0))
    file = src / "model.safetensors"
    report = qkern.quantize_checkpoint(file, tmp_path / "dst")
    assert set(tree(tmp_path / "dst")) == {"model.safetensors"}
    assert row(report, "lm_head.weight").reason == "the output head, by its name"
    qkern.quantize_checkpoint(src, tmp_path / "both")
    name = "model.safetensors"
    assert tree(tmp_path / "dst")[name] == tree(tmp_path / "both")[name]


def test_scales_that_8_bits_cannot_hold_stay_fp32(tmp_path: Path) -> None:
    weight = torch.randn(64, 512) * torch.logspace(0, -6, 64)[:, None]
    tensors = {"a.weight": weight, "b.weight": torch.randn(64, 64), "bias": torch.randn(3)}
    src = write_model(tmp_path / "src", tensors)
    report = qkern.quantize_checkpoint(src, tmp_path / "dst")
    assert_same(
        entries_of(tmp_path / "dst"), expected_entries(tensors, {"a.weight", "b.weight"}, "nf4")
    )
    found = row(report, "a.weight")
    assert found.format is not None
    assert not found.format.double_quant
    assert found.reason == "fp32 scales: 8 bits cannot hold them"
    with pytest.raises(qkern.CoverageError, match=r"the first is a\.weight: fp32 scales"):
        qkern.quantize_checkpoint(src, tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict").exists()


def test_nan_is_refused_by_name_and_nothing_is_left(tmp_path: Path) -> None:
    tensors = layer(0)
    tensors["model.layers.0.mlp.down_proj.weight"][3, 5] = float("nan")
    src = write_model(tmp_path / "src", tensors)
    with pytest.raises(qkern.NonFiniteError, match=r"model\.layers\.0\.mlp\.down_proj\.weight"):
        qkern.quantize_checkpoint(src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()
    qkern.quantize_checkpoint(src, tmp_path / "dst", exclude="down_proj")


# -- what is quantized -----------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_type": "nf5"}, "unknown quant_type 'nf5'"),
        ({"blocksize": 48}, "blocksize 48"),
        ({"method": "luck"}, "unknown method 'luck'"),
        ({"quant_type": "int8", "method": "search"}, "4-bit formats"),
        ({"exclude": "nothing"}, "'nothing' matches no dense tensor"),
    ],
)
def test_settings_are_refused_before_the_work(
    tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    src = write_model(tmp_path / "src", layer(0))
    with pytest.raises(qkern.FormatError, match=words):
        qkern.quantize_checkpoint(src, tmp_path / "dst", **settings)
    assert not (tmp_path / "dst").exists()


# -- what is said ----------------------------------------------------------------------------


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
