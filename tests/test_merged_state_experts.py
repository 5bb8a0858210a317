"""State dicts of models whose experts have a merged adapter: it is added once, wherever."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from expert_adapters import DOWN, KINDS, MOE, UP, adapted, add, experts_of, logits, quantized
from torch.distributed.checkpoint import state_dict as distributed_states

import qkern


def state_of(model: Any) -> dict[str, Any]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def two_adapters() -> Any:
    """The first in both weights, the second in one."""
    model = adapted(adapter_name="a")
    add(model, 2, adapter_name="b", target_parameters=[DOWN])
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MOE)
def test_a_merged_state_in_an_unmerged_model_is_merged(name: str, kind: str) -> None:
    source, target = adapted(name, **KINDS[kind]), adapted(name, seed=2, **KINDS[kind])
    experts = experts_of(target)
    base = experts.down_proj.dequantize(torch.float32)
    qkern.merge_adapter(source)
    target.load_state_dict(state_of(source))
    assert torch.equal(logits(target), logits(source))
    assert set(experts.merged_names) == set(experts_of(source).merged_names)
    merged = experts.down_proj.dequantize(torch.float32)
    qkern.unmerge_adapter(target)  # nothing is there to restore bytes from: it is subtracted
    left = experts.down_proj.dequantize(torch.float32) - base
    assert left.norm() < 0.5 * (merged - base).norm()
    with pytest.raises(qkern.AdapterMismatchError, match="not merged"):
        qkern.unmerge_adapter(target)


@pytest.mark.parametrize("name", MOE)
def test_an_unmerged_state_in_a_merged_model_is_not_merged(name: str) -> None:
    source, target = adapted(name), adapted(name)
    qkern.merge_adapter(target)
    target.load_state_dict(state_of(source))
    assert torch.equal(logits(target), logits(source))
    qkern.merge_adapter(target)
    qkern.merge_adapter(source)
    assert torch.equal(logits(target), logits(source))


def test_states_say_nothing_of_merges_that_are_not_there() -> None:
    model = adapted()
    before = set(model.state_dict())
    qkern.merge_adapter(model)
    added = set(model.state_dict()) - before
    assert added == {f"model.layers.{i}.mlp.experts.merged.default" for i in (0, 1)}
    qkern.unmerge_adapter(model)
    assert set(model.state_dict()) == before


def test_the_merged_one_of_several_becomes_active() -> None:
    source, target = two_adapters(), two_adapters()
    qkern.set_adapter(source, "b")
    qkern.merge_adapter(source)
    target.load_state_dict(state_of(source))
    assert torch.equal(logits(target), logits(source))
    assert experts_of(target).active_adapter == "b"
    assert experts_of(target).merged_names == ("down_proj",)


def test_another_adapter_than_the_merged_one_comes_merged() -> None:
    source, target = two_adapters(), two_adapters()
    qkern.set_adapter(source, "b")
    qkern.merge_adapter(source)
    qkern.merge_adapter(target)
    state = state_of(source)
    target.load_state_dict(state)
    assert torch.equal(logits(target), logits(source))
    again = two_adapters()
    qkern.merge_adapter(again)
    state = {key: value for key, value in state.items() if "gate_up_proj" not in key}
    with pytest.raises(qkern.StateDictError, match=r"merged\.b: expected.*gate_up_proj"):
        again.load_state_dict(state, strict=False)  # would leave "a" in the other weight


def test_what_would_be_merged_twice_or_by_half_is_refused() -> None:
    source, target = adapted(adapter_name="a"), adapted(adapter_name="b")
    qkern.merge_adapter(source)
    state = state_of(source)
    with pytest.raises(qkern.StateDictError, match=r"merged\.a: .* has \['b'\]: give it"):
        target.load_state_dict(state, strict=False)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*merged\.a"):
        quantized().load_state_dict(state)
    target = adapted(adapter_name="a")
    half = {key: value for key, value in state.items() if "down_proj" not in key}
    with pytest.raises(qkern.StateDictError, match="expected one merged adapter and the weight"):
        target.load_state_dict(half, strict=False)
    unmerged = state_of(target)
    qkern.merge_adapter(target)
    for kept in ("lora_", "gate_up_proj"):
        part = {key: value for key, value in unmerged.items() if kept in key}
        with pytest.raises(qkern.StateDictError, match=r"merged into.*call unmerge_adapter"):
            target.load_state_dict(part, strict=False)


def test_an_adapter_of_other_weights_than_the_merged_one_is_refused() -> None:
    source, target = adapted(), adapted(target_parameters=[UP])
    qkern.merge_adapter(source)
    with pytest.raises(qkern.StateDictError, match=r"down_proj, gate_up_proj, here in gate_up_pr"):
        target.load_state_dict(state_of(source), strict=False)


def test_a_model_on_meta_takes_a_merged_state() -> None:
    source = adapted()
    qkern.merge_adapter(source)
    target = copy.deepcopy(adapted(seed=2)).to("meta")
    target.load_state_dict(state_of(source), assign=True)
    for name, buffer in source.named_buffers():  # rotary tables are in no state
        target.get_submodule(name.rpartition(".")[0])._buffers[name.rpartition(".")[2]] = buffer
    assert torch.equal(logits(target), logits(source))


def test_experts_without_their_adapter_forget_that_it_was_merged() -> None:
    source, target = adapted(), adapted()
    qkern.merge_adapter(source)
    target.load_state_dict(state_of(source))
    qkern.unmerge_adapter(target)
    qkern.delete_adapter(target, "default")
    assert not any(".merged" in key for key in target.state_dict())
    target.load_state_dict(state_of(quantized()))
    assert torch.equal(logits(target), logits(quantized()))


@pytest.mark.skipif(
    "_fqn_modifiers" not in inspect.getsource(distributed_states),
    reason="this torch (2.6) asks a weight for its entries, which are no attributes of it",
)
def test_distributed_checkpoints_hold_it_too() -> None:
    source, target = adapted(), adapted(seed=2)
    qkern.merge_adapter(source)
    state = distributed_states.get_model_state_dict(source)
    distributed_states.set_model_state_dict(target, state)
    assert torch.equal(logits(target), logits(source))
