"""Adapters of stacked experts: copies, files with their base, merges."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from expert_adapters import BY_NAME, KINDS, MOE, adapted, add, experts_of, logits, quantized, train

import qkern
from qkern.errors import AdapterMismatchError, FormatError, NonFiniteError
from qkern.experts import QuantizedExperts
from qkern.experts_lora import QLoRAExperts
from qkern.tensor import QuantizedTensor

# -- a module's life -------------------------------------------------------------------------


@pytest.mark.parametrize("name", MOE)
def test_copies_pickles_and_state_dicts(name: str) -> None:
    model = adapted(name)
    expected = logits(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert isinstance(experts_of(other), QLoRAExperts)
        assert torch.equal(logits(other), expected)
        train(other, 1)
        assert not torch.equal(logits(other), expected)
    assert torch.equal(logits(model), expected)
    fresh = adapted(name, seed=3)
    assert not torch.equal(logits(fresh), expected)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh), expected)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        quantized(name).load_state_dict(model.state_dict())


@pytest.mark.parametrize("name", MOE)
def test_a_directory_holds_base_and_adapter(name: str, tmp_path: Path) -> None:
    model = adapted(name, **KINDS["with linear layers"])
    qkern.save(model, tmp_path)
    opened = qkern.load(tmp_path)
    assert torch.equal(logits(opened), logits(model))
    assert isinstance(experts_of(opened), QLoRAExperts)


# -- merging ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["with linear layers", "the second alone, rslora"])
@pytest.mark.parametrize("name", MOE)
def test_a_merge_adds_it_and_unmerging_restores_the_bytes(name: str, kind: str) -> None:
    model = adapted(name, **KINDS[kind])
    expected, experts = logits(model), experts_of(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    down = experts.adapters["default"]["down_proj"]
    delta = down.product()
    exact = experts.down_proj.dequantize() + (delta.mT if experts.is_transposed else delta)
    loss = qkern.merge_adapter(model)
    names = {row.name: row for row in loss.layers}
    assert "model.layers.0.mlp.experts.down_proj" in names
    row = names["model.layers.0.mlp.experts.down_proj"]
    error = (experts.down_proj.dequantize() - exact).norm() / delta.norm()
    assert row.kept == pytest.approx(float(1 - error), abs=1e-4)
    assert (experts.down_proj.dequantize() - exact).norm() < 0.12 * exact.norm()
    assert (logits(model) - expected).norm() < 0.5 * expected.norm()
    with pytest.raises(AdapterMismatchError, match="merged"):
        qkern.merge_adapter(model)
    with pytest.raises(AdapterMismatchError, match="in training with a merged adapter"):
        train(model, 1)
    qkern.unmerge_adapter(model.eval())
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(logits(model), expected)


def test_an_adapter_that_is_not_finite_merges_nothing() -> None:
    model = adapted(**KINDS["with linear layers"])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        experts_of(model, 1).adapters["default"]["down_proj"].lora_A[2, 0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.experts\.down_proj"):
        qkern.merge_adapter(model)
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before if "lora_" not in key)
    assert not experts_of(model).merged


def test_a_merged_adapter_is_saved_with_its_base(tmp_path: Path) -> None:
    model = adapted()
    expected = logits(model)
    qkern.merge_adapter(model)
    qkern.save_adapter(model, tmp_path)
    other = quantized()
    qkern.load_adapter(other, tmp_path)  # of the base of before the merge
    assert torch.equal(logits(other), expected)


@pytest.mark.parametrize("name", MOE)
def test_merged_to_dense_experts_are_those_of_the_class(name: str, tmp_path: Path) -> None:
    model = adapted(name, **KINDS["with linear layers"])
    expected, like = logits(model), BY_NAME[name].small()
    loss = qkern.merge_to_dense(model)
    assert len(loss.layers) == 8
    assert {n: type(m) for n, m in model.named_modules()} == {
        n: type(m) for n, m in like.named_modules()
    }
    assert not any(isinstance(p, QuantizedTensor) for p in model.parameters())
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_merged_to_dense_in_16_bits_biases_are_cast_too() -> None:
    model = adapted("gpt-oss", **KINDS["the second alone, rslora"])
    expected = logits(model)
    qkern.merge_to_dense(model, dtype=torch.bfloat16)
    assert {p.dtype for p in experts_of(model).parameters()} == {torch.bfloat16}
    found = logits(model.to(torch.bfloat16)).float()
    assert (found - expected).norm() < 5e-2 * expected.norm()


def test_merged_to_dense_experts_without_the_adapter_stay_quantized() -> None:
    model = adapted(target_parameters=["layers.1.mlp.experts.down_proj"])
    expected = logits(model)
    loss = qkern.merge_to_dense(model)
    assert [row.name for row in loss.layers] == ["model.layers.1.mlp.experts.down_proj"]
    assert [isinstance(experts_of(model, i), QuantizedExperts) for i in (0, 1)] == [True, False]
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


def test_merged_to_dense_where_nothing_but_experts_is_quantized() -> None:
    model = quantized(exclude="*.self_attn.*")
    add(model)
    expected = logits(model)
    assert len(qkern.merge_to_dense(model).layers) == 4
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(FormatError, match="no quantized layer"):
        qkern.merge_to_dense(model)


def test_transformers_dequantizes_after_a_merge_alone(tmp_path: Path) -> None:
    from qkern.integrations.transformers import QkernConfig

    BY_NAME["Mixtral"].small().save_pretrained(tmp_path)
    kind = type(BY_NAME["Mixtral"].small())
    model = kind.from_pretrained(tmp_path, quantization_config=QkernConfig())
    add(model)
    with pytest.raises(AdapterMismatchError, match="has an adapter, which would be lost"):
        model.dequantize()
    qkern.merge_adapter(model)
    expected = logits(model)
    dense = model.dequantize()
    assert type(experts_of(dense)) is type(experts_of(BY_NAME["Mixtral"].small()))
    assert not any("lora_" in name for name, _ in dense.named_parameters())
    assert (logits(dense) - expected).norm() < 2e-6 * expected.norm()


def test_training_for_a_merge_is_refused() -> None:
    with pytest.raises(FormatError, match="cannot be trained for a merge"):
        qkern.set_merge_into(adapted(), "nf4")
