"""``fuse_projections``: models as they are, whose siblings share a launch.

Torch stands in for the kernels, which ``tests/kernels/test_projections.py`` is about.
"""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from projections_model import Model, assert_close, gradients, stand_in, tokens
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from toys import tiny_llama, token_ids

import qkern
from qkern.errors import FormatError


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each launch took."""
    return stand_in(monkeypatch)


@pytest.mark.parametrize("adapters", [False, True])
def test_siblings_share_a_launch_and_have_the_same_outputs_and_gradients(
    adapters: bool, launches: list[int]
) -> None:
    x = tokens()
    alone, fused = Model(adapters=adapters, fused=False), Model(adapters=adapters)
    right = gradients(alone, x)
    assert launches == []
    assert_close(gradients(fused, x), right)
    with torch.no_grad():
        assert_close([fused(x)], right[:1])
    assert launches == [3, 3]


class Seen(TorchDispatchMode):
    """The operators of this package that a mode is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "qkern":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def test_modes_see_the_operators(launches: list[int]) -> None:
    model, x = Model(), tokens()
    with Seen() as seen:
        gradients(model, x)
        with torch.no_grad():
            model(x)
    assert seen.names == ["projections", "projections_backward", "projections"]


def test_one_input_changed_in_place_between_siblings_is_seen(launches: list[int]) -> None:
    model, alone = Model(), Model(fused=False)

    def changed(x: Tensor, i: int) -> Tensor:
        return x.mul_(2) if i == 1 else x

    model.attention.inputs = alone.attention.inputs = changed
    with torch.no_grad():
        right = alone(tokens())
        with pytest.warns(UserWarning, match="q_proj was not called with the input"):
            assert_close([model(tokens())], [right])
    assert launches == [3, 3]


def test_siblings_of_different_inputs_are_right_and_named_once(launches: list[int]) -> None:
    model, alone = Model(), Model(fused=False)
    model.attention.inputs = alone.attention.inputs = lambda x, i: x if i == 0 else x + 1
    right = gradients(alone, tokens())
    with pytest.warns(UserWarning, match="attention: k_proj, v_proj was not called with"):
        assert_close(gradients(model, tokens()), right)
    assert_close(gradients(model, tokens()), right)


@pytest.mark.parametrize("recorded", [False, True])
def test_outputs_may_be_changed_in_place(recorded: bool, launches: list[int]) -> None:
    """Each is in memory of its own."""
    model, alone = Model(), Model(fused=False)
    model.attention.after = alone.attention.after = torch.relu_
    if recorded:
        assert_close(gradients(model, tokens()), gradients(alone, tokens()))
    else:
        with torch.no_grad():
            assert_close([model(tokens())], [alone(tokens())])
    assert launches == [3]


def test_a_layer_that_is_called_twice_is_computed_twice(launches: list[int]) -> None:
    layer, x = Model().attention.q_proj, tokens()
    one, other = layer(x), layer(x)
    assert torch.equal(one, other)
    assert one.data_ptr() != other.data_ptr()
    assert launches == [3, 3]


def test_a_change_of_mode_or_of_a_parameter_between_siblings_is_seen(launches: list[int]) -> None:
    model, x = Model(), tokens()
    attention = model.attention
    with torch.no_grad():
        attention.q_proj(x)
    y = attention.v_proj(x)
    assert y.requires_grad
    attention.q_proj(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention.v_proj(x).dtype == torch.bfloat16
    attention.q_proj(x)
    with torch.no_grad():
        attention.v_proj.lora_B.mul_(3)
    base = attention.v_proj.dequantize()(x)
    assert_close([attention.v_proj(x) - base], [3 * (y - base)])


@pytest.mark.parametrize("raises", [False, True])
def test_nothing_is_held_after_the_owner_has_ended(raises: bool, launches: list[int]) -> None:
    model, x = Model(), tokens().requires_grad_()
    outputs: list[Any] = []

    def after(y: Tensor) -> Tensor:
        outputs.append(weakref.ref(y))
        if raises:
            msg = "no memory"
            raise MemoryError(msg)
        return y.tanh()

    model.attention.after = after
    there = weakref.ref(x)
    if raises:
        with pytest.raises(MemoryError):
            model(x)
    else:
        model(x).sum().backward()
    del x
    gc.collect()
    assert there() is None
    assert all(output() is None for output in outputs)


def test_threads_do_not_take_each_others_outputs(launches: list[int]) -> None:
    model, failed = Model(), []

    def work(seed: int) -> None:
        x = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            right = model(x)
            failed.extend(seed for _ in range(20) if not torch.equal(model(x), right))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert len(launches) == 3 * 21


def test_what_cannot_share_a_launch_runs_by_itself(launches: list[int]) -> None:
    x = tokens()
    alone, model = Model(fused=False), Model()
    with torch.inference_mode():
        assert torch.equal(model(x.clone()), alone(x.clone()))
    for each in (model, alone):
        each.attention.v_proj.lora_dropout = 0.5
    torch.manual_seed(1)
    right = alone(x)
    torch.manual_seed(1)
    assert torch.equal(model(x), right)
    assert launches == []
    model.eval(), alone.eval()
    assert_close([model(x)], [alone(x)])
    assert launches == [3]
    assert torch.equal(model(x.double()), alone(x.double()))
    qkern.merge_adapter(model)
    qkern.merge_adapter(alone)
    assert_close([model(x)], [alone(x)])
    assert launches == [3, 3]


def test_on_a_cpu_layers_run_by_themselves() -> None:
    x = tokens()
    right = gradients(Model(fused=False), x)
    got = gradients(Model(), x)
    assert all(torch.equal(a, b) for a, b in zip(got, right, strict=True))


def test_the_model_is_as_it_was_and_copies_are_not_fused(launches: list[int]) -> None:
    model, alone, x = Model(), Model(fused=False), tokens()
    state, right = model.state_dict(), alone.state_dict()
    assert list(state) == list(right)
    assert all(torch.equal(state[key], right[key]) for key in right)
    assert [n for n, _ in model.named_modules()] == [n for n, _ in alone.named_modules()]
    expected = alone(x)
    again = copy.deepcopy(model)
    assert torch.equal(again(x), expected)
    loaded = pickle.loads(pickle.dumps(model.attention.q_proj))
    assert torch.equal(loaded(x), alone.attention.q_proj(x))
    assert launches == []
    qkern.fuse_projections(again)
    again(x)
    assert launches == [3]
    qkern.unfuse_projections(again)
    qkern.unfuse_projections(model)
    assert torch.equal(again(x), expected)
    assert torch.equal(model(x), expected)
    assert not model.attention._forward_hooks
    assert launches == [3]


def test_adapters_may_come_before_and_after(launches: list[int]) -> None:
    model = Model(adapters=False)
    qkern.add_lora(model, r=2, init_lora_weights=False)
    x = tokens()
    right = [layer(x) for layer in copy.deepcopy(model.attention).children()]
    assert_close([model(x)], [torch.tanh(torch.cat(right, dim=-1))])
    assert launches == [3]


def test_groups_are_found_by_name_and_may_be_excluded() -> None:
    model = tiny_llama()
    with pytest.raises(FormatError, match="no quantized siblings named q_proj, k_proj, v_proj; g"):
        qkern.fuse_projections(model)
    qkern.quantize_model(model, exclude="*.1.self_attn.v_proj")
    groups = qkern.fuse_projections(model)
    assert [len(group) for group in groups] == [3, 2, 2]
    assert groups[0][0] == "model.layers.0.self_attn.q_proj"
    assert qkern.fuse_projections(model) == groups
    qkern.unfuse_projections(model)
    assert qkern.fuse_projections(model, exclude="mlp") == groups[:1]
    others = qkern.fuse_projections(model, [("k_proj", "o_proj")])
    assert others == [("model.layers.1.self_attn.k_proj", "model.layers.1.self_attn.o_proj")]
    with pytest.raises(FormatError, match="'nothing' matches no group"):
        qkern.fuse_projections(model, exclude=["mlp", "nothing"])


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_transformers_model_trains_as_before(wrapped: bool, launches: list[int]) -> None:
    """With adapters in the layers, or around them by PEFT; with gradient checkpointing too."""

    # Adapters so large that attention is all but hard would make gradients of rounding.
    adapter: dict[str, Any] = {"r": 2, "lora_alpha": 2, "init_lora_weights": False}

    def build(*, fused: bool) -> nn.Module:
        model: nn.Module = tiny_llama(num_hidden_layers=1)
        qkern.quantize_model(model)
        if wrapped:
            config = LoraConfig(target_modules="all-linear", **adapter)
            model = get_peft_model(model, config)
        else:
            qkern.add_lora(model, **adapter)
        if fused:
            qkern.fuse_projections(model)
        return model.train()

    def loss_and_gradients(model: nn.Module) -> list[Tensor]:
        loss = model(input_ids=ids, labels=ids).loss
        trained = [p for p in model.parameters() if p.requires_grad]
        return [loss.detach(), *torch.autograd.grad(loss, trained)]

    ids = token_ids()
    torch.manual_seed(1)
    right = loss_and_gradients(build(fused=False))
    torch.manual_seed(1)
    model = build(fused=True)
    assert_close(loss_and_gradients(model), right)
    assert launches == [3, 2]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    assert_close(loss_and_gradients(model), right)
    assert launches == [3, 2] * 3


def test_compiled_code_multiplies_the_single_layers(launches: list[int]) -> None:
    model, x = Model(), tokens()
    right = gradients(Model(fused=False), x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_close(gradients(compiled, x), right)
    assert launches == []
    assert_close(gradients(model, x), right)
    assert launches == [3]
