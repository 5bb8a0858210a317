"""``quantize_checkpoint``: the bytes of its files, and which settings are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_checkpoints import (
    FORMATS,
    ends,
    entries_of,
    expected_entries,
    layer,
    row,
    write_model,
    write_sharded,
)
from file_trees import tree
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import qkern
from qkern.checkpoint.reader import CheckpointReader

LINEAR = {
    "model.odd.weight",
    *(f"model.layers.{i}.{kind}" for i in range(3) for kind in ("self_attn.q_proj.weight",)),
    *(f"model.layers.{i}.mlp.down_proj.weight" for i in range(3)),
}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape), key
        assert torch.equal(found[key], tensor), key


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
