"""``merge_checkpoint`` of adapters of stacked experts: in files one by one, or stacked."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_adapters import BOTH, BY_NAME, DOWN, KINDS, MOE, UP, add, experts_of, logits
from file_trees import tree
from peft import LoraConfig, get_peft_model
from peft_adapters import assert_one_rounding, reconfigure, rewrite, tensors_of
from safetensors.torch import load_file, save_file
from torch import nn

import qkern


def write_base(path: Path, name: str) -> Path:
    BY_NAME[name].small().save_pretrained(path, max_shard_size="100KB")
    return path


def peft_over(name: str, **config: Any) -> nn.Module:
    """PEFT's adapter over the dense model, of some size."""
    settings = {"r": 3, "lora_alpha": 6, "target_modules": [], "init_lora_weights": False}
    torch.manual_seed(0)
    wrapped = get_peft_model(BY_NAME[name].small(), LoraConfig(**settings | config))
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, 0, 0.2)
    return wrapped


def trained(base: Path, adapter: Path, kind: str = "with linear layers") -> nn.Module:
    """The model of a quantized directory with an adapter, which is saved."""
    model = qkern.load(base)
    add(model, **KINDS[kind])
    qkern.save_adapter(model, adapter)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MOE)
def test_the_result_is_what_peft_merges(name: str, kind: str, tmp_path: Path) -> None:
    wrapped = peft_over(name, **KINDS[kind])
    wrapped.save_pretrained(tmp_path / "adapter")
    base = write_base(tmp_path / "base", name)
    out = tmp_path / "out"
    report = qkern.merge_checkpoint(base, tmp_path / "adapter", out, dtype="float32")
    assert report.kept is not None
    assert report.kept > 0.999
    merged = wrapped.merge_and_unload()
    merged.save_pretrained(tmp_path / "peft")
    expected, before = (tensors_of(tmp_path / place) for place in ("peft", "base"))
    found = tensors_of(out)
    assert found.keys() == expected.keys() == before.keys()
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-5, atol=1e-6)
    changed = {key for key in found if not torch.equal(found[key], before[key])}
    assert changed == {row.name for row in report.merged}
    opened = type(merged).from_pretrained(out)
    torch.testing.assert_close(logits(opened), logits(merged), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("writer", ["quantize_checkpoint", "save"])
@pytest.mark.parametrize("name", MOE)
def test_a_quantized_base_gets_what_the_model_gets_when_it_is_loaded(
    name: str, writer: str, dtype: str, tmp_path: Path
) -> None:
    """Experts one by one in the files, and as the model stacks them."""
    base, adapter, out = (tmp_path / part for part in ("base", "adapter", "out"))
    qkern.quantize_checkpoint(write_base(tmp_path / "dense", name), base)
    if writer == "save":
        qkern.save(qkern.load(base), tmp_path / "saved")
        base = tmp_path / "saved"
    model = trained(base, adapter)
    report = qkern.merge_checkpoint(base, adapter, out, dtype=dtype)
    assert report.base_check == "the base is the one that the adapter was trained over"
    qkern.merge_to_dense(model, dtype=torch.float32)
    model.save_pretrained(tmp_path / "right")
    right, found = tensors_of(tmp_path / "right"), tensors_of(out)
    if writer == "quantize_checkpoint":
        assert found.keys() == right.keys()
    for row in report.merged:
        if row.name in right:
            assert found[row.name].dtype == getattr(torch, dtype)
            assert_one_rounding(found[row.name], right[row.name])
    if dtype == "float32":  # rounded, routers choose other experts
        opened = type(model).from_pretrained(out)
        assert (logits(opened) - logits(model)).norm() < 1e-5 * logits(model).norm()
    qkern.quantize_checkpoint(tmp_path / "dense", tmp_path / "fp4", "fp4")
    with pytest.raises(qkern.AdapterMismatchError, match="other quantized weights"):
        qkern.merge_checkpoint(tmp_path / "fp4", adapter, tmp_path / "no")


@pytest.mark.parametrize("method", ["absmax", "search"])
def test_stacked_experts_are_quantized_again_as_by_merge_adapter(
    method: str, tmp_path: Path
) -> None:
    base, adapter, out = (tmp_path / part for part in ("base", "adapter", "out"))
    qkern.quantize_checkpoint(write_base(tmp_path / "dense", "gpt-oss"), base)
    model = trained(base, adapter)
    report = qkern.merge_checkpoint(base, adapter, out, quant_type="nf4", method=method)
    loss = qkern.merge_adapter(model, method=method)
    assert loss.kept == pytest.approx(report.kept, abs=1e-3)
    merged = qkern.load(out)
    for layer in (0, 1):
        for weight in ("gate_up_proj", "down_proj"):
            mine = getattr(experts_of(model, layer), weight)
            found = getattr(experts_of(merged, layer), weight)
            # fp32 sums of another order: their 8-bit scales have another mean in the last bits
            error = mine.dequantize() - found.dequantize()
            assert error.norm() < 1e-3 * mine.dequantize().norm()
    assert (logits(merged) - logits(model)).norm() < 0.01 * logits(model).norm()


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3-MoE"])
def test_experts_one_by_one_are_quantized_again(name: str, tmp_path: Path) -> None:
    base, adapter, out = (tmp_path / part for part in ("base", "adapter", "out"))
    qkern.quantize_checkpoint(write_base(tmp_path / "dense", name), base)
    model = trained(base, adapter)
    expected = logits(model)
    report = qkern.merge_checkpoint(base, adapter, out, quant_type="nf4")
    loss = qkern.merge_adapter(model)
    assert loss.kept == pytest.approx(report.kept, abs=1e-2)
    assert (logits(qkern.load(out)) - expected).norm() < 0.5 * expected.norm()


@pytest.mark.parametrize("name", MOE)
def test_threads_and_batches_do_not_change_the_bytes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_base(tmp_path / "base", name)
    peft_over(name, target_parameters=BOTH).save_pretrained(tmp_path / "adapter")
    qkern.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "once", threads=1)
    monkeypatch.setattr("qkern.checkpoint.running._FACTORS", 1)
    monkeypatch.setattr("qkern.checkpoint.lora_factors._RECENT", 1)
    qkern.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "often", threads=3)
    assert tree(tmp_path / "once") == tree(tmp_path / "often")


def test_adapters_in_bfloat16_are_read(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "gpt-oss")
    wrapped = peft_over("gpt-oss", target_parameters=BOTH)
    wrapped.save_pretrained(tmp_path / "wide")
    found = []
    for place in ("wide", "narrow"):
        adapter = tmp_path / place
        if place == "narrow":
            adapter.mkdir()
            for file in (tmp_path / "wide").iterdir():
                (adapter / file.name).write_bytes(file.read_bytes())
        rounded = place == "wide"

        def change(tensors: dict[str, Any], *, rounded: bool = rounded) -> None:
            for key, tensor in tensors.items():
                narrow = tensor.to(torch.bfloat16)
                tensors[key] = narrow.float() if rounded else narrow

        rewrite(adapter, change)
        qkern.merge_checkpoint(base, adapter, tmp_path / f"out-{place}")
        found.append(tensors_of(tmp_path / f"out-{place}"))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


# -- what is refused -------------------------------------------------------------------------


def test_an_adapter_of_other_experts_is_refused(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    peft_over("Mixtral", target_parameters=BOTH).save_pretrained(adapter)
    base = write_base(tmp_path / "base", "Mixtral")

    def refused(text: str, base: Path = base) -> None:
        with pytest.raises((qkern.AdapterMismatchError, qkern.CorruptFileError), match=text):
            qkern.merge_checkpoint(base, adapter, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    refused(r"\(out, in\) =|rows of lora_A", write_base(tmp_path / "other", "gpt-oss"))
    reconfigure(adapter, r=4)
    refused(r"rows of lora_A, rank 4 of \d+ experts")
    reconfigure(adapter, r=3, target_parameters=[UP])
    refused("has an entry .* of no target")
    reconfigure(adapter, target_parameters=[*BOTH, "experts.up_proj"])
    refused("lacks an entry of")
    reconfigure(adapter, target_parameters=[*BOTH, "router.weight"])
    refused(r"has 'router\.weight', and the file no entry of such experts")
    reconfigure(adapter, target_parameters="experts")
    refused("a list of names is needed")
    reconfigure(adapter, target_parameters=BOTH)
    for file in base.glob("*.safetensors"):
        tensors = load_file(file)
        for key in [key for key in tensors if "experts.1.w3" in key]:
            del tensors[key]
        save_file(tensors, file, {"format": "pt"})
    index = base / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    names = content["weight_map"]
    content["weight_map"] = {k: v for k, v in names.items() if "experts.1.w3" not in k}
    index.write_text(json.dumps(content))
    refused("the file lacks part 1 of expert 1")


def test_a_model_without_such_experts_names_the_way(tmp_path: Path) -> None:
    peft_over("Mixtral", target_parameters=BOTH).save_pretrained(tmp_path / "adapter")
    BY_NAME["Llama"].small().save_pretrained(tmp_path / "base")
    with pytest.raises(qkern.AdapterMismatchError, match=r"no weight of experts .*merge_to_dense"):
        qkern.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def test_square_experts_of_which_nothing_tells_the_way_are_refused(tmp_path: Path) -> None:
    adapter, name = tmp_path / "adapter", "model.layers.0.mlp.experts.down_proj"
    adapter.mkdir()
    place = "base_model.model.model.layers.0.mlp.experts"
    factors = {
        f"{place}.lora_A.weight": torch.randn(4, 8),
        f"{place}.lora_B.weight": torch.randn(8, 4),
    }
    save_file(factors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_parameters": [DOWN]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    base = tmp_path / "base"
    base.mkdir()
    save_file({name: torch.randn(2, 8, 8)}, base / "model.safetensors")
    with pytest.raises(qkern.AdapterMismatchError, match=r"8 x 8 are transposed: open it by qkern"):
        qkern.merge_checkpoint(base, adapter, tmp_path / "out")
    gate_up = name.replace("down_proj", "gate_up_proj")
    dense = {name: torch.randn(2, 8, 8), gate_up: torch.randn(2, 8, 16)}
    save_file(copy.deepcopy(dense), base / "model.safetensors")
    qkern.merge_checkpoint(base, adapter, tmp_path / "out", dtype="float32")
    A, B = (factors[f"{place}.lora_{part}.weight"] for part in "AB")
    delta = torch.stack([B[:, e::2] @ A[2 * e : 2 * e + 2] for e in range(2)])
    found = load_file(tmp_path / "out" / "model.safetensors")
    torch.testing.assert_close(found[name], dense[name] + delta.mT)
