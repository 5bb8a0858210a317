"""``merge_checkpoint``: beside PEFT's merge, what is kept, how much it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from file_trees import tree
from peft_adapters import adapted, assert_one_rounding, model, tensors_of, write_adapter, write_base
from safetensors.torch import load_file, save_file
from toys import token_ids
from transformers import AutoModelForCausalLM

import qkern
from qkern.checkpoint.reader import CheckpointReader

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.*v_proj": 32}},
    "saved": {"modules_to_save": ["lm_head"]},
    "bias": {"bias": "all", "target_modules": ["q_proj", "o_proj"]},
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", model())


# -- values ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_result_is_what_peft_merges(tmp_path: Path, name: str, dtype: str) -> None:
    config = CONFIGS[name]
    attention = {"attention_bias": True} if name == "bias" else {}
    base = write_base(tmp_path / "base", **attention)
    peft = adapted(model(**attention), **config)
    with torch.no_grad():
        for key, parameter in peft.named_parameters():
            if "modules_to_save.default" in key or key.endswith(".bias"):
                parameter.add_(0.25)
    peft.save_pretrained(tmp_path / "adapter")
    report = qkern.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out", dtype=dtype)
    found, merged = tensors_of(tmp_path / "out"), peft.float().merge_and_unload().state_dict()
    assert set(found) == set(merged)
    for key, tensor in found.items():
        assert tensor.dtype == getattr(torch, dtype), key
        assert_one_rounding(tensor, merged[key])
    ranks = {row.rank for row in report.merged}
    assert ranks == ({2, 4} if name == "patterns" else {4})
    assert report.kept is not None
    assert report.kept > (0.9 if dtype == "bfloat16" else 0.999)


def test_transformers_opens_the_result(tmp_path: Path, base: Path, adapter: Path) -> None:
    qkern.merge_checkpoint(base, adapter, tmp_path / "out")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert opened.dtype == torch.bfloat16
    ids = token_ids()
    expected = adapted(model()).merge_and_unload()(ids).logits
    torch.testing.assert_close(opened(ids).logits, expected, rtol=0.05, atol=0.05)


def test_a_quantized_base_is_merged_on_the_values_that_it_decodes_to(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    quantized = tmp_path / "quantized"
    qkern.quantize_checkpoint(base, quantized, "nf4")
    report = qkern.merge_checkpoint(quantized, adapter, tmp_path / "out", dtype="float32")
    factors, found = load_file(adapter / "adapter_model.safetensors"), tensors_of(tmp_path / "out")
    with CheckpointReader(quantized) as reader:
        for row in report.merged:
            name = f"base_model.model.{row.name.removesuffix('.weight')}"
            A, B = (factors[f"{name}.lora_{part}.weight"].double() for part in "AB")
            weight = qkern.dequantize(reader.read(row.name), torch.bfloat16).double()
            assert_one_rounding(found[row.name], weight + 8 / 4 * B @ A)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()


# -- what is kept ----------------------------------------------------------------------------


@pytest.mark.case("E7")
def test_a_delta_that_4_bits_lose_is_refused_with_numbers(tmp_path: Path, base: Path) -> None:
    quantized, out = tmp_path / "quantized", tmp_path / "out"
    qkern.quantize_checkpoint(base, quantized)
    adapter = write_adapter(tmp_path / "adapter", model(), size=0.02)
    with pytest.raises(qkern.LostDeltaError, match="would be left in nf4") as caught:
        qkern.merge_checkpoint(quantized, adapter, out, quant_type="nf4")
    assert "model.layers.0.self_attn.q_proj.weight" in str(caught.value)
    assert not out.exists()
    report = qkern.merge_checkpoint(quantized, adapter, out, quant_type="nf4", force=True)
    assert report.kept is not None
    assert report.kept < 0.1
    assert {row.kept for row in report.merged if row.kept is not None}
    assert report.as_dict()["kept"] == report.kept
    dense = qkern.merge_checkpoint(quantized, adapter, tmp_path / "dense")
    assert dense.kept is not None
    assert dense.kept > 0.9


def test_rounding_beyond_what_is_added_leaves_nothing(tmp_path: Path, base: Path) -> None:
    adapter, out = write_adapter(tmp_path / "adapter", model(), size=1e-3), tmp_path / "out"
    with pytest.raises(qkern.LostDeltaError, match="nothing of what the adapter adds would be"):
        qkern.merge_checkpoint(base, adapter, out, quant_type="nf4")
    report = qkern.merge_checkpoint(base, adapter, out, quant_type="nf4", force=True)
    assert report.kept is not None
    assert report.kept < 0
    assert report.as_dict()["kept"] == report.kept
    assert "kept of what it adds: nothing; least of" in str(report)
    assert "nothing of what it adds is kept" in (out / "README.md").read_text()
    assert {row[3] for row in report.kept_rows(5)} == {"nothing"}


@pytest.mark.case("E7")
def test_what_is_kept_is_measured_against_the_exact_sum(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    """Tensors this small are measured whole."""
    exact, out = tmp_path / "exact", tmp_path / "out"
    qkern.merge_checkpoint(base, adapter, exact, dtype="float32")
    report = qkern.merge_checkpoint(base, adapter, out, quant_type="int8", min_kept=0.1)
    sums, before = tensors_of(exact), tensors_of(base)
    with CheckpointReader(out) as reader:
        for row in report.merged:
            error = reader.read(row.name).to(torch.float32).double() - sums[row.name].double()
            delta = sums[row.name].double() - before[row.name].double()
            expected = 1 - float(error.norm() / delta.norm())
            assert row.kept == pytest.approx(expected, abs=2e-2)


def test_other_weights_keep_their_codes(tmp_path: Path, base: Path, adapter: Path) -> None:
    quantized, out = tmp_path / "quantized", tmp_path / "out"
    qkern.quantize_checkpoint(base, quantized)
    report = qkern.merge_checkpoint(quantized, adapter, out, quant_type="nf4", min_kept=0)
    before, after = tensors_of(quantized), tensors_of(out)
    merged = {row.name for row in report.merged}
    kept = {row.name for row in report.tensors if row.action == "codes copied"}
    assert len(merged) == 6
    assert kept
    assert not merged & kept
    for key, tensor in after.items():
        if not any(key.startswith(name) for name in merged):
            assert torch.equal(tensor, before[key]), key
    # The base of the next adapter: what is opened is what the report says.
    assert AutoModelForCausalLM.from_pretrained(out) is not None


def test_neither_base_nor_adapter_is_written(tmp_path: Path, base: Path, adapter: Path) -> None:
    before = tree(base) | tree(adapter)
    for place in (base, adapter, adapter / "inside"):
        with pytest.raises(qkern.OutputError):
            qkern.merge_checkpoint(base, adapter, place, force=True)
    assert tree(base) | tree(adapter) == before


# -- runs ------------------------------------------------------------------------------------


def test_any_number_of_threads_writes_the_same_bytes(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    for threads in (1, 3):
        qkern.merge_checkpoint(base, adapter, tmp_path / str(threads), threads=threads)
    assert tree(tmp_path / "1") == tree(tmp_path / "3")


def test_factors_are_read_a_few_weights_at_a_time(
    tmp_path: Path, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qkern.merge_checkpoint(base, adapter, tmp_path / "once")
    monkeypatch.setattr("qkern.checkpoint.running._FACTORS", 1)
    qkern.merge_checkpoint(base, adapter, tmp_path / "often")
    assert tree(tmp_path / "once") == tree(tmp_path / "often")


_LIMITED = """
import resource, sys
import qkern
from qkern.checkpoint import merging
base, adapter, out, limit, mmap = sys.argv[1:]
pages = open("/proc/self/statm").read().split()
size, resident = (int(n) * resource.getpagesize() for n in pages[:2])
limit = size + int(limit)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
report = qkern.merge_checkpoint(base, adapter, out, threads=1, mmap=bool(int(mmap)))
assert "torch" not in sys.modules
status = dict(line.split(":") for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) * 1024 - resident, len(report.merged))
"""


@pytest.mark.case("E13")
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS and /proc are Linux'")
@pytest.mark.parametrize("mmap", [False, True])
def test_a_merge_takes_less_memory_than_a_shard(tmp_path: Path, mmap: bool) -> None:
    """Four shards of 48 MiB, merged in a process that may take 64 MiB beyond its imports.

    What is mapped counts as address space, which the limit bounds, and as resident, though it is
    the cache's: the peak beyond the imports says something of a run that maps nothing.
    """
    base, factors, names = tmp_path / "base", {}, {}
    base.mkdir()
    for shard in range(4):
        tensors = {}
        for index in (3 * shard, 3 * shard + 1, 3 * shard + 2):
            path = f"model.layers.{index}.mlp.up_proj"
            tensors[f"{path}.weight"] = torch.randn(4096, 2048).bfloat16()
            factors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(16, 2048)
            factors[f"base_model.model.{path}.lora_B.weight"] = torch.randn(4096, 16)
        save_file(tensors, base / f"model-{shard}.safetensors")
        names |= dict.fromkeys(tensors, f"model-{shard}.safetensors")
    index = {"metadata": {}, "weight_map": names}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(factors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 16}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    limit = 64 << 20
    out = tmp_path / "out"
    command = [sys.executable, "-c", _LIMITED, base, adapter, out, str(limit), str(int(mmap))]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    peak, merged = map(int, found.stdout.split())
    assert merged == 12
    assert mmap or peak < 48 << 20
