"""Merging a model's adapters: what the report says, what is refused, dense results."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from toys import tiny_llama, token_ids

import qkern


def adapted(lora_alpha: float = 0.5, dtype: torch.dtype = torch.float32, **lora: Any) -> nn.Module:
    model = tiny_llama().to(dtype)
    qkern.quantize_model(model)
    torch.manual_seed(1)
    qkern.add_lora(model, **{"r": 4, "lora_alpha": lora_alpha, "init_lora_weights": False, **lora})
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(token_ids()).logits


def test_the_report_tells_how_much_of_each_adapter_is_kept() -> None:
    model = adapted()
    layer = model.model.layers[0].mlp.up_proj
    exact = layer.quantized_weight.dequantize() + layer.delta()
    delta = layer.delta().norm()
    loss = qkern.merge_adapter(model)
    row = next(row for row in loss.layers if row.name == "model.layers.0.mlp.up_proj")
    left = 1 - (layer.quantized_weight.dequantize() - exact).norm() / delta
    assert row.kept == pytest.approx(float(left), abs=1e-4)
    assert row.relative_delta == pytest.approx(float(delta / exact.norm()), rel=1e-4)
    assert (row.rank, row.scaling, row.into, row.aware) == (4, 0.125, "nf4", False)
    assert loss.worst[0].kept <= loss.kept <= loss.worst[-1].kept
    assert json.loads(json.dumps(loss.as_dict()))["kept"] == loss.kept
    text = str(loss)
    assert text.startswith("merged into 14 weights: nf4\nkept of what the adapter adds: ")
    assert loss.worst[0].name in text
    assert loss.worst[-1].name not in text


def test_it_is_what_the_merge_of_files_reports(tmp_path: Path) -> None:
    model = adapted()
    qkern.save(model, tmp_path / "base")
    qkern.save_adapter(model, tmp_path / "adapter")
    paths = (tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    report = qkern.merge_checkpoint(*paths, quant_type="nf4", min_kept=0)
    loss = qkern.merge_adapter(model)
    assert loss.kept == pytest.approx(report.kept, abs=1e-3)
    found = {f"{row.name}.weight": row.kept for row in loss.layers}
    for row in report.merged:
        assert found[row.name] == pytest.approx(row.kept, abs=1e-3)


def test_search_keeps_more_and_unmerge_restores_its_bytes_too() -> None:
    model = adapted()
    before = copy.deepcopy(model.state_dict())
    kept = {}
    for method in ("absmax", "search"):
        kept[method] = qkern.merge_adapter(model, method=method).kept
        qkern.unmerge_adapter(model)
        after = model.state_dict()
        assert all(torch.equal(after[key], value) for key, value in before.items())
    assert kept["search"] > kept["absmax"] + 0.03
    with pytest.raises(qkern.FormatError, match="best"):
        qkern.merge_adapter(model, method="best")


def test_a_merge_below_a_threshold_is_refused_and_changes_nothing() -> None:
    model = adapted(lora_alpha=0.01)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(qkern.LostDeltaError, match=r"at least 50\.0% .*\n(.*\n)*.*delta / weight"):
        qkern.merge_adapter(model, min_kept=0.5)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert qkern.merge_adapter(model).kept < 0.1


def test_an_adapter_of_zeros_changes_no_byte() -> None:
    model = adapted(init_lora_weights=True)
    before = copy.deepcopy(model.state_dict())
    loss = qkern.merge_adapter(model, min_kept=1.0)
    assert loss.kept is None
    assert "kept" not in str(loss)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_a_merged_adapter_in_another_format_keeps_its_base_in_its_file(tmp_path: Path) -> None:
    model = adapted(merge_into="int8")
    qkern.save_adapter(model, tmp_path / "before")
    qkern.merge_adapter(model)
    assert model.model.layers[0].mlp.up_proj.weight.format.quant_type == "int8"
    qkern.save_adapter(model, tmp_path / "merged")
    said = []
    for name in ("before", "merged"):
        with safe_open(tmp_path / name / "adapter_model.safetensors", "pt") as file:
            said.append(file.metadata())
    assert said[0] == said[1]
    assert len(said[0]["qkern_base"]) == 64


# -- dense -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dense_merge_rounds_the_exact_sum_once(dtype: torch.dtype) -> None:
    model = adapted(dtype=dtype, target_modules=["q_proj", "up_proj"])
    old = model.model.layers[1].mlp.up_proj
    base = old.quantized_weight.dequantize(dtype).float()
    plain = model.model.layers[1].mlp.down_proj.quantized_weight.dequantize(dtype)
    expected = logits(model)
    loss = qkern.merge_to_dense(model)
    assert not [m for m in model.modules() if isinstance(m, qkern.QuantizedLinear)]
    new = model.model.layers[1].mlp
    assert type(new.up_proj) is nn.Linear
    assert torch.equal(new.up_proj.weight, (base + old.delta()).to(dtype))
    assert torch.equal(new.down_proj.weight, plain)
    assert [row.into for row in loss.layers] == [str(dtype).removeprefix("torch.")] * 4
    assert loss.kept > (0.95 if dtype == torch.bfloat16 else 0.99999)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    assert (logits(model) - expected).norm() < tolerance * expected.norm()
    names = tiny_llama().state_dict().keys()
    assert model.state_dict().keys() == names


def test_a_dense_merge_of_what_was_trained_for_4_bits_is_the_rounded_weight() -> None:
    model = adapted(merge_into="nf4")
    expected = logits(model)
    merged = copy.deepcopy(model)
    qkern.merge_adapter(merged)
    loss = qkern.merge_to_dense(model)
    assert loss.kept == 1
    for name in ("q_proj", "k_proj"):
        dense = getattr(model.model.layers[0].self_attn, name).weight
        packed = getattr(merged.model.layers[0].self_attn, name).quantized_weight
        assert torch.equal(dense, packed.dequantize())
    assert (logits(model) - expected).norm() < 1e-5 * expected.norm()


def test_a_dense_merge_keeps_biases_hooks_ties_and_mode() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Sequential()).train()
    model[1].append(model[0])
    qkern.quantize_model(model)
    seen: list[int] = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    bias = model[0].bias.clone()
    qkern.merge_to_dense(model, dtype=torch.bfloat16)
    assert model[1][0] is model[0]
    assert type(model[0]) is nn.Linear
    assert model[0].training
    assert torch.equal(model[0].bias, bias.bfloat16())
    model(torch.randn(2, 64).bfloat16())
    assert seen == [1, 1]


def test_dense_merges_that_cannot_be_are_refused() -> None:
    single = qkern.QuantizedLinear.from_linear(nn.Linear(64, 64))
    with pytest.raises(qkern.FormatError, match="single layer"):
        qkern.merge_to_dense(single)
    with pytest.raises(qkern.FormatError, match="no quantized layer"):
        qkern.merge_to_dense(tiny_llama())
    model = adapted()
    qkern.merge_adapter(model)
    with pytest.raises(qkern.AdapterMismatchError, match="unmerge_adapter"):
        qkern.merge_to_dense(model)
    qkern.unmerge_adapter(model)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.lora_B.mul_(1e8)
    with pytest.raises(qkern.NonFiniteError, match=r"layers\.0\.self_attn\.k_proj"):
        qkern.merge_to_dense(model, dtype=torch.float16)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"merge_into": "int8"}])
@pytest.mark.parametrize("merge", [qkern.merge_adapter, qkern.merge_to_dense])
def test_autocast_changes_no_merge(merge: object, settings: dict[str, object]) -> None:
    weights = []
    for cast in (False, True):
        model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8))
        for seed, layer in enumerate(model):
            nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(seed))
        qkern.quantize_model(model)
        torch.manual_seed(1)
        qkern.add_lora(model, r=3, init_lora_weights=False, **settings)
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            merge(model)
        weights.append([layer.weight + 0 for layer in model])  # a dense value of either
    assert all(map(torch.equal, *weights))


def test_a_weight_that_its_adapter_takes_away_is_in_the_report() -> None:
    model = nn.Sequential(nn.Linear(64, 32))
    qkern.quantize_model(model)
    qkern.add_lora(model, r=3, init_lora_weights=False, use_dora=True)
    with torch.no_grad():
        model[0].adapter.lora_magnitude.zero_()
    loss = qkern.merge_adapter(model)
    assert not model[0].weight.dequantize().any()
    assert loss.layers[0].relative_delta is None
    assert str(loss).split()[-4:] == ["0", "3", "-", "100.0%"]
