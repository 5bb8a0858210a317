"""Training for a merge among named adapters, kinds and starts; dense merges of all of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import tiny_llama, token_ids
from transformers import GPT2Config, GPT2LMHeadModel

import qkern
from qkern.merge_target import MergeTarget

NF4 = MergeTarget(qkern.QuantFormat("nf4"))


def quantized(**changes: Any) -> nn.Module:
    model = tiny_llama(**changes)
    qkern.quantize_model(model)
    torch.manual_seed(1)
    return model


def two_adapters() -> nn.Module:
    """ "plain" is active; "rounded" is trained for its merge."""
    model = quantized()
    for name, merge_into in (("plain", None), ("rounded", "nf4")):
        how = {"r": 4, "lora_alpha": 2, "init_lora_weights": False, "adapter_name": name}
        qkern.add_lora(model, merge_into=merge_into, **how)
    return model


def logits(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(token_ids() if ids is None else ids).logits


def same_bytes(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return after.keys() == before.keys() and all(
        torch.equal(after[k], v) for k, v in before.items()
    )


# -- several adapters ------------------------------------------------------------------------


def test_each_adapter_has_a_setting_of_its_own() -> None:
    model = two_adapters()
    layer = model.model.layers[0].mlp.up_proj
    assert layer.merge_into is None
    plain = logits(model)
    qkern.set_adapter(model, "rounded")
    assert layer.merge_into == NF4
    rounded = logits(model)
    qkern.set_merge_into(model, None)
    assert not torch.equal(logits(model), rounded)
    qkern.set_merge_into(model, "nf4")
    assert torch.equal(logits(model), rounded)
    qkern.set_adapter(model, "plain")
    assert layer.merge_into is None
    assert torch.equal(logits(model), plain)


def test_rows_are_multiplied_as_each_adapter_is() -> None:
    model, ids = two_adapters(), token_ids(3, 8)
    expected = [logits(model, ids[:1])]
    qkern.set_adapter(model, "rounded")
    expected.append(logits(model, ids[1:2]))
    with qkern.disable_adapter(model):
        expected.append(logits(model, ids[2:]))
    with qkern.adapter_rows(model, ["plain", "rounded", None]):
        found = logits(model, ids)
        for work in (
            qkern.merge_adapter,
            qkern.merge_to_dense,
            lambda m: qkern.set_merge_into(m, "nf4"),
        ):
            with pytest.raises(qkern.AdapterMismatchError, match="adapter_rows"):
                work(model)
    torch.testing.assert_close(found, torch.cat(expected))


def test_the_active_one_is_merged_as_it_was_trained_and_the_others_stay() -> None:
    model = two_adapters()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    qkern.set_adapter(model, "rounded")
    expected = logits(model)
    assert qkern.merge_adapter(model, min_kept=1.0).kept == 1
    assert torch.equal(logits(model), expected)
    qkern.unmerge_adapter(model)
    assert same_bytes(model, before)
    qkern.set_adapter(model, "plain")
    assert qkern.merge_adapter(model).kept < 1
    qkern.unmerge_adapter(model)
    assert same_bytes(model, before)


def test_a_file_has_the_setting_of_its_adapter_alone(tmp_path: Path) -> None:
    model = two_adapters()
    for name in ("plain", "rounded"):
        qkern.save_adapter(model, tmp_path / name, adapter_name=name)
    again = quantized()
    for name in ("plain", "rounded"):
        qkern.load_adapter(again, tmp_path / name, adapter_name=name)
    layer = again.model.layers[1].self_attn.q_proj
    assert [layer.adapters[name].merge_into for name in layer.adapters] == [None, NF4]
    for name in ("plain", "rounded"):
        for each in (model, again):
            qkern.set_adapter(each, name)
        assert torch.equal(logits(again), logits(model))
    qkern.merge_adapter(model)
    qkern.save_adapter(model, tmp_path / "merged")  # its base is the one of before
    qkern.load_adapter(again, tmp_path / "merged", adapter_name="merged")


# -- other kinds and starts ------------------------------------------------------------------


def test_dora_is_refused_wherever_it_meets_the_setting(tmp_path: Path) -> None:
    model = quantized()
    with pytest.raises(qkern.FormatError, match="use_dora=True"):
        qkern.add_lora(model, use_dora=True, merge_into="nf4")
    qkern.add_lora(model, r=4, use_dora=True)
    with pytest.raises(qkern.FormatError, match="use_dora=True"):
        qkern.set_merge_into(model, "nf4")
    with pytest.raises(qkern.FormatError, match="use_dora=True"):
        model.model.layers[0].mlp.up_proj.merge_into = "nf4"
    model.model.layers[0].mlp.up_proj.adapter.merge_into = NF4
    for work in (logits, qkern.merge_adapter, qkern.merge_to_dense):
        with pytest.raises(qkern.FormatError, match=r"layers\.0\.mlp\.up_proj: .*use_dora=True"):
            work(copy.deepcopy(model))


@pytest.mark.parametrize(
    ("change", "words"),
    [({"lora_dropout": 0.1}, r"lora_dropout=0\.1"), ({"lora_mode": "merged"}, "lora_mode")],
)
def test_what_is_set_later_is_refused_where_it_would_count(
    change: dict[str, Any], words: str
) -> None:
    model = quantized()
    qkern.add_lora(model, r=4, merge_into="nf4")
    layer = model.model.layers[1].mlp.up_proj
    for name, value in change.items():
        setattr(layer, name, value)
    with pytest.raises(qkern.FormatError, match=rf"layers\.1\.mlp\.up_proj: .*{words}"):
        logits(model)


@pytest.mark.parametrize("start", ["pissa", "loftq"])
def test_a_start_that_changes_the_base_is_trained_for_its_merge(start: str) -> None:
    dense = tiny_llama()
    model = quantized()
    how = {"r": 4, "dense": dense, "loftq_iterations": 2, "init_lora_weights": start}
    qkern.add_lora(model, **how, merge_into="nf4")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = logits(model)
    assert qkern.merge_adapter(model, min_kept=1.0).kept == 1
    assert torch.equal(logits(model), expected)
    qkern.unmerge_adapter(model)
    assert same_bytes(model, before)


# -- bytes -----------------------------------------------------------------------------------


def test_an_addition_before_a_merge_into_another_format_is_taken_back_too() -> None:
    layer = qkern.QLoRALinear.from_linear(
        nn.Linear(128, 64), r=2, init_lora_weights=False, merge_into="int8"
    )
    model, delta = nn.Sequential(layer).eval(), torch.randn(64, 128) * 0.05
    bytes_ = [[part.clone() for part in layer.quantized_weight.parts if part is not None]]
    layer.weight.data += delta
    bytes_.append([part.clone() for part in layer.quantized_weight.parts if part is not None])
    for each in (model, copy.deepcopy(model)):
        weight = each[0].quantized_weight
        qkern.merge_adapter(each)
        assert weight.format.quant_type == "int8"
        qkern.unmerge_adapter(each)
        assert all(torch.equal(a, b) for a, b in zip(weight.parts, bytes_[1], strict=True))
        each[0].weight.data -= delta
        assert all(torch.equal(a, b) for a, b in zip(weight.parts, bytes_[0], strict=True))


# -- dense -----------------------------------------------------------------------------------


def test_a_dense_merge_takes_the_active_adapter_and_its_whole_modules() -> None:
    model = quantized()
    for name in ("first", "second"):
        how = {"r": 4, "init_lora_weights": False, "adapter_name": name}
        qkern.add_lora(model, modules_to_save=["lm_head"], target_modules=["up_proj"], **how)
        qkern.set_adapter(model, name)
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
    expected = logits(model)
    loss = qkern.merge_to_dense(model)
    assert len(loss.layers) == 2
    assert model.state_dict().keys() == tiny_llama().state_dict().keys()
    torch.testing.assert_close(logits(model), expected)


def test_a_dense_merge_without_an_active_adapter_is_the_base() -> None:
    model = quantized()
    expected = logits(model)
    qkern.add_lora(model, init_lora_weights=False, adapter_name="only")
    with qkern.disable_adapter(model):
        assert qkern.merge_to_dense(model).layers == ()
    torch.testing.assert_close(logits(model), expected)


def test_dora_becomes_dense_with_its_lengths() -> None:
    model = quantized()
    qkern.add_lora(model, r=4, use_dora=True, init_lora_weights=False)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.adapter.lora_magnitude.mul_(1.3)
    expected = logits(model)
    qkern.merge_to_dense(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_what_was_a_conv1d_is_one_again() -> None:
    torch.manual_seed(0)
    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 2, "n_positions": 32, "vocab_size": 96}
    model = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    qkern.quantize_model(model)
    qkern.add_lora(model, r=4, init_lora_weights=False)
    expected = logits(model)
    qkern.merge_to_dense(model)
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes
    assert type(model.transformer.h[0].attn.c_proj).__name__ == "Conv1D"
    torch.testing.assert_close(logits(model), expected)


def test_a_dense_merge_needs_values_on_one_device() -> None:
    model = quantized()
    qkern.add_lora(model)
    with pytest.raises(qkern.DeviceError, match=r"layers\.0\.self_attn\.q_proj.*meta"):
        qkern.merge_to_dense(model.to("meta"))
