"""State dicts of merged models: the adapter is added once, wherever they are loaded."""

from __future__ import annotations

import copy
import inspect
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as distributed_states
from toys import tiny_llama, token_ids

import qkern


def adapted(adapter_name: str = "default", **lora: Any) -> nn.Module:
    model = tiny_llama()
    qkern.quantize_model(model)
    torch.manual_seed(1)
    how = {"r": 4, "lora_alpha": 32, "adapter_name": adapter_name, "init_lora_weights": False}
    qkern.add_lora(model, **how, **lora)
    return model.eval()


def moved(model: nn.Module) -> dict[str, Any]:
    """Through a file."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state: dict[str, Any] = torch.load(file, weights_only=True)
    return state


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(token_ids()).logits


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"merge_into": "nf4"}], ids=str)
def test_a_merged_state_in_an_unmerged_model_is_merged(lora: dict[str, Any]) -> None:
    source, target = adapted(**lora), adapted(**lora)
    layer = target.model.layers[0].mlp.up_proj
    base = layer.quantized_weight.dequantize(torch.float32)
    qkern.merge_adapter(source)
    target.load_state_dict(moved(source))
    assert torch.equal(logits(target), logits(source))
    assert layer.merged
    merged = layer.quantized_weight.dequantize(torch.float32)
    qkern.unmerge_adapter(target)  # nothing is there to restore bytes from: it is subtracted
    left = layer.quantized_weight.dequantize(torch.float32) - base
    assert left.norm() < 0.3 * (merged - base).norm()
    with pytest.raises(qkern.AdapterMismatchError, match="not merged"):
        qkern.unmerge_adapter(target)


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}], ids=str)
def test_an_unmerged_state_in_a_merged_model_is_not_merged(lora: dict[str, Any]) -> None:
    source, target = adapted(**lora), adapted(**lora)
    qkern.merge_adapter(target)
    target.load_state_dict(moved(source))
    assert torch.equal(logits(target), logits(source))
    qkern.merge_adapter(target)
    qkern.merge_adapter(source)
    assert torch.equal(logits(target), logits(source))


def test_states_say_nothing_of_merges_that_are_not_there() -> None:
    model = adapted()
    before = set(model.state_dict())
    assert not any(".merged" in key for key in before)
    qkern.merge_adapter(model)
    added = set(model.state_dict()) - before
    weights = {key for key in before if key.endswith("proj.weight")}
    assert added == {key.replace(".weight", ".merged.default") for key in weights}
    qkern.unmerge_adapter(model)
    assert set(model.state_dict()) == before


def test_the_merged_one_of_several_becomes_active() -> None:
    source, target = adapted("a"), adapted("a")
    for model in (source, target):
        qkern.add_lora(model, r=2, adapter_name="b", init_lora_weights=False)
    qkern.set_adapter(source, "b")
    qkern.merge_adapter(source)
    target.load_state_dict(moved(source))
    assert torch.equal(logits(target), logits(source))
    assert target.model.layers[0].mlp.up_proj.active_adapter == "b"


def test_a_state_merged_from_an_adapter_that_is_not_here_is_refused() -> None:
    source, target = adapted("a"), adapted("b")
    qkern.merge_adapter(source)
    with pytest.raises(qkern.StateDictError, match=r"merged\.a: .* has \['b'\]: give it"):
        target.load_state_dict(moved(source), strict=False)


def test_half_of_a_merged_state_is_refused() -> None:
    source, target = adapted(), adapted()
    merged = adapted()
    qkern.merge_adapter(source)
    state = {key: value for key, value in moved(source).items() if ".merged." in key}
    with pytest.raises(qkern.StateDictError, match="expected one merged adapter and the weight"):
        target.load_state_dict(state, strict=False)
    qkern.merge_adapter(merged)
    factors = {key: value for key, value in moved(target).items() if "lora_" in key}
    with pytest.raises(qkern.StateDictError, match="call unmerge_adapter before"):
        merged.load_state_dict(factors, strict=False)


def test_a_model_without_adapters_names_the_entry() -> None:
    source, target = adapted(), tiny_llama()
    qkern.quantize_model(target)
    qkern.merge_adapter(source)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*merged\.default"):
        target.load_state_dict(moved(source))


def test_a_model_on_meta_takes_a_merged_state() -> None:
    source = adapted(use_dora=True)
    qkern.merge_adapter(source)
    target = copy.deepcopy(adapted(use_dora=True)).to("meta")
    target.load_state_dict(moved(source), assign=True)
    for name, buffer in source.named_buffers():  # rotary tables are in no state
        target.get_submodule(name.rpartition(".")[0])._buffers[name.rpartition(".")[2]] = buffer
    assert torch.equal(logits(target), logits(source))


@pytest.mark.skipif(
    "_fqn_modifiers" not in inspect.getsource(distributed_states),
    reason="this torch (2.6) asks a weight for its entries, which are no attributes of it",
)
def test_distributed_checkpoints_hold_it_too() -> None:
    source, target = adapted(), adapted()
    qkern.merge_adapter(source)
    state = distributed_states.get_model_state_dict(source)
    distributed_states.set_model_state_dict(target, state)
    assert torch.equal(logits(target), logits(source))
