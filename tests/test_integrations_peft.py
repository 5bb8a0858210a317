"""PEFT's LoRA over quantized layers in one operator, beside PEFT's own way."""

from __future__ import annotations

import copy
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from small_net import Net, assert_same_parts, inputs, parts_of, quantized
from torch import Tensor, nn

import qkern
from qkern.errors import AdapterMismatchError
from qkern.integrations import peft as fused_peft
from qkern.integrations.peft import FusedLoraLinear


def config(**settings: Any) -> LoraConfig:
    defaults = {"r": 3, "lora_alpha": 5, "target_modules": ["up", "down"]}
    return LoraConfig(**{**defaults, "init_lora_weights": False, **settings})


def pair(**settings: Any) -> tuple[PeftModel, PeftModel]:
    """The same adapter by PEFT alone and fused."""
    plain = get_peft_model(quantized(), config(**settings))
    fused = get_peft_model(quantized(), fused_peft.fused(config(**settings)))
    assert not any(isinstance(m, FusedLoraLinear) for m in plain.modules())
    assert len(fused_layers(fused)) == 2
    fused.load_state_dict(plain.state_dict())
    return plain.eval(), fused.eval()


def fused_layers(model: nn.Module) -> list[FusedLoraLinear]:
    return [m for m in model.modules() if isinstance(m, FusedLoraLinear)]


def count_fused(model: nn.Module, monkeypatch: pytest.MonkeyPatch, **call: Any) -> int:
    """How many layers of a call hand their adapter to the operator."""
    calls = []

    def counting(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(kwargs["lora_A"])
        return qkern.linear(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(fused_peft, "linear", counting)
        model(inputs(), **call)
    return len(calls)


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("use_rslora", [False, True])
def test_output_and_gradients_are_those_of_peft(
    use_rslora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, fused = pair(use_rslora=use_rslora)
    assert count_fused(fused, monkeypatch) == 2
    torch.testing.assert_close(fused(inputs()), plain(inputs()), rtol=1e-5, atol=1e-5)
    xs = [inputs().requires_grad_() for _ in range(2)]
    expected, got = gradients(plain, xs[0]), gradients(fused, xs[1])
    assert len(got) == len(expected) == 4
    for a, b in zip([*got, xs[1].grad], [*expected, xs[0].grad], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.detach().abs().max()))


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_is_no_further_from_fp32_than_peft(adapter_dtype: torch.dtype) -> None:
    plain, fused = (model.to(torch.bfloat16) for model in pair())
    for model in (plain, fused):
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(adapter_dtype)
    x = inputs().bfloat16()
    exact = copy.deepcopy(plain).float()(x.float())
    errors = [(model(x).float() - exact).norm() / exact.norm() for model in (plain, fused)]
    assert fused(x).dtype == plain(x).dtype == torch.bfloat16
    assert errors[1] < max(1.2 * errors[0], 4e-3)


def test_autocast_has_the_dtype_of_peft() -> None:
    plain, fused = pair()
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = plain(inputs()), fused(inputs())
    assert got.dtype == expected.dtype == torch.bfloat16
    largest = float(expected.detach().abs().max())
    torch.testing.assert_close(got, expected, rtol=0.03, atol=0.03 * largest)


def test_dropout_draws_what_peft_draws() -> None:
    plain, fused = (model.train() for model in pair(lora_dropout=0.4))
    outputs = []
    for model in (plain, fused, fused):
        torch.manual_seed(7)
        outputs.append(model(inputs()))
    assert torch.equal(outputs[1], outputs[2])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(outputs[1], fused.eval()(inputs()))


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"lora_bias": True, "target_modules": ["up", "down"]}]
)
def test_other_kinds_of_lora_take_the_path_of_peft(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, fused = pair(**settings)
    assert count_fused(fused, monkeypatch) == 0
    assert torch.equal(fused(inputs()), plain(inputs()))


def test_hooks_and_replaced_forwards_are_not_bypassed(monkeypatch: pytest.MonkeyPatch) -> None:
    _, fused = pair()
    seen: list[str] = []
    layer = fused_layers(fused)[0]
    for module in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]):
        handle = module.register_forward_hook(lambda m, *_: seen.append(type(m).__name__))
        assert count_fused(fused, monkeypatch) == 1
        handle.remove()
    assert len(seen) == 3
    layer.base_layer.forward = layer.base_layer.forward  # as accelerate does
    assert count_fused(fused, monkeypatch) == 1
    del layer.base_layer.forward
    assert count_fused(fused, monkeypatch) == 2


def test_several_adapters_are_switched_mixed_disabled_and_deleted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, fused = pair()
    torch.manual_seed(3)
    plain.add_adapter("other", config(r=2))
    fused.add_adapter("other", fused_peft.fused(config(r=2)))
    fused.load_state_dict(plain.state_dict())
    for model in (plain, fused):
        model.set_adapter("other")
    assert count_fused(fused, monkeypatch) == 2
    torch.testing.assert_close(fused(inputs()), plain(inputs()), rtol=1e-5, atol=1e-5)
    rows = {"adapter_names": ["default", "__base__", "other"]}
    plain.eval()
    fused.eval()
    assert count_fused(fused, monkeypatch, **rows) == 0
    assert torch.equal(fused(inputs(), **rows), plain(inputs(), **rows))
    with fused.disable_adapter():
        assert torch.equal(fused(inputs()), quantized()(inputs()))
    for model in (plain, fused):
        model.base_model.set_adapter(["default", "other"])
    assert count_fused(fused, monkeypatch) == 0
    assert torch.equal(fused(inputs()), plain(inputs()))
    for model in (plain, fused):
        model.set_adapter("default")
        model.delete_adapter("other")
    assert count_fused(fused, monkeypatch) == 2
    torch.testing.assert_close(fused(inputs()), plain(inputs()), rtol=1e-5, atol=1e-5)


@pytest.mark.case("E5")
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_and_unmerge_restore_the_bytes(safe_merge: bool) -> None:
    plain, fused = pair()
    before, expected = parts_of(fused), fused(inputs())
    for model in (plain, fused):
        for layer in (m for m in model.modules() if isinstance(m, lora.Linear)):
            layer.merge(safe_merge=safe_merge)
    assert_same_parts(fused, parts_of(plain))
    assert torch.equal(fused(inputs()), plain(inputs()))
    fused.unmerge_adapter()
    assert_same_parts(fused, before)
    assert torch.equal(fused(inputs()), expected)


def test_files_are_those_of_peft_and_load_in_it(tmp_path: Path) -> None:
    plain, fused = pair()
    plain.save_pretrained(tmp_path / "plain")
    fused.save_pretrained(tmp_path / "fused")
    files = ("adapter_config.json", "adapter_model.safetensors")
    for file in files:
        contents = [(tmp_path / kind / file).read_bytes() for kind in ("plain", "fused")]
        assert contents[0] == contents[1]
    stock = PeftModel.from_pretrained(quantized(), tmp_path / "fused").eval()
    assert not fused_layers(stock)
    assert torch.equal(stock(inputs()), plain(inputs()))
    dense = Net()
    for name, layer in quantized().named_modules():
        if isinstance(layer, qkern.QuantizedLinear):
            dense.set_submodule(name, layer.dequantize())
    stock = PeftModel.from_pretrained(dense, tmp_path / "fused").eval()
    torch.testing.assert_close(stock(inputs()), fused(inputs()), rtol=1e-5, atol=1e-5)


def test_adapters_of_peft_load_fused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fused = pair()
    plain.save_pretrained(tmp_path)
    loaded = fused_peft.load(quantized(), tmp_path, "first").eval()
    assert count_fused(loaded, monkeypatch) == 2
    assert torch.equal(loaded(inputs()), fused(inputs()))
    assert not any(p.requires_grad for p in loaded.parameters())
    assert fused_peft.load(loaded, tmp_path, "second", is_trainable=True) is loaded
    loaded.set_adapter("second")
    assert count_fused(loaded, monkeypatch) == 2
    assert torch.equal(loaded(inputs()), fused(inputs()))
    trained = [name for name, p in loaded.named_parameters() if p.requires_grad]
    assert len(trained) == 4
    assert all(".second." in name for name in trained)


def test_a_second_adapter_is_as_trainable_as_peft_makes_it(tmp_path: Path) -> None:
    plain, _ = pair()
    plain.save_pretrained(tmp_path / "some")
    stock = PeftModel.from_pretrained(quantized(), tmp_path / "some", is_trainable=True)
    loaded = fused_peft.load(quantized(), tmp_path, subfolder="some", is_trainable=True)
    for name, is_trainable in (("second", True), ("third", False)):
        stock.load_adapter(tmp_path / "some", name, is_trainable=is_trainable)
        fused_peft.load(loaded, tmp_path, name, subfolder="some", is_trainable=is_trainable)
    trained = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (stock, loaded)]
    assert trained[0] == trained[1]
    assert len(trained[1]) == 8
    assert loaded.active_adapters == stock.active_adapters == ["default"]


def test_an_adapter_that_cannot_be_read_is_not_added(tmp_path: Path) -> None:
    plain, _ = pair()
    plain.save_pretrained(tmp_path)
    loaded = fused_peft.load(quantized(), tmp_path)
    expected = loaded(inputs())
    weights = tmp_path / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:20])
    for _ in range(2):
        with pytest.raises(Exception, match="header"):
            fused_peft.load(loaded, tmp_path, "second")
        assert list(loaded.peft_config) == ["default"]
        assert torch.equal(loaded(inputs()), expected)
    weights.write_bytes(content)
    with pytest.raises(ValueError, match="already exists"):
        fused_peft.load(loaded, tmp_path)
    assert fused_peft.load(loaded, tmp_path, "second") is loaded


def test_dense_layers_and_own_adapters_keep_what_they_have() -> None:
    dense = get_peft_model(Net(), fused_peft.fused(config()))
    assert not fused_layers(dense)
    own = quantized()
    qkern.add_lora(own, r=2, init_lora_weights=False)
    plain = get_peft_model(copy.deepcopy(own), config())
    both = get_peft_model(own, fused_peft.fused(config()))
    both.load_state_dict(plain.state_dict())
    assert torch.equal(both(inputs()), plain(inputs()))  # one adapter over the other


def test_other_configurations_are_refused() -> None:
    with pytest.raises(AdapterMismatchError, match="IA3Config"):
        fused_peft.fused(IA3Config(target_modules=["up"], feedforward_modules=[]))


def test_fan_in_fan_out_is_turned_off_as_peft_does() -> None:
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        model = get_peft_model(quantized(), fused_peft.fused(config(fan_in_fan_out=True)))
    before = parts_of(model)
    model.merge_adapter()
    model.unmerge_adapter()
    assert_same_parts(model, before)


@pytest.mark.skipif(
    torch.__version__ < (2, 7), reason="torch 2.6 compiles no PeftModel as one graph, dense or not"
)
def test_a_compiled_model_is_one_graph() -> None:
    torch._dynamo.reset()
    _, fused = pair()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs()), fused(inputs()), rtol=1e-5, atol=1e-5)


def test_checkpointing_trains_the_adapter() -> None:
    _, fused = pair()
    x = inputs().requires_grad_()
    expected = gradients(fused, x)
    fused.zero_grad()
    torch.utils.checkpoint.checkpoint(fused, x, use_reentrant=False).square().sum().backward()
    got = [p.grad for p in fused.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("arguments", [["--steps", "8"], ["--steps", "8", "--fused"]])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_example_trains_reloads_and_unmerges(arguments: list[str]) -> None:
    path = Path(__file__).parents[1] / "examples" / "peft_train.py"
    example = runpy.run_path(str(path))
    result = example["main"](arguments)
    assert result["last"] < result["first"] - 0.5
    assert result["reload_error"] < 1e-5
    assert result["changed"] == 0
