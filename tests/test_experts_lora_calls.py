"""What ``add_lora`` does to stacked experts, how it is computed, several adapters, fine-tuning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import output
from chat_model import save_chat_model, write_chats
from expert_adapters import (
    BOTH,
    BY_NAME,
    DOWN,
    MOE,
    UP,
    adapted,
    add,
    experts_of,
    logits,
    quantized,
    train,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

import qkern
from qkern.errors import AdapterMismatchError, FormatError, ShapeError
from qkern.experts_lora import QLoRAExperts
from qkern.tensor import QuantizedTensor

# -- what add_lora does ----------------------------------------------------------------------


def test_without_the_argument_experts_get_nothing() -> None:
    model = quantized()
    names = qkern.add_lora(model)
    assert len(names) == 8
    assert type(experts_of(model)).__name__ == "QuantizedMixtralExperts"
    assert not any("experts" in n for n, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("name", MOE)
def test_names_classes_and_what_is_trainable(name: str) -> None:
    model = quantized(name)
    before = type(experts_of(model)).__bases__[1]
    names = qkern.add_lora(model, r=2, target_parameters=BOTH)
    assert names[8:] == [f"model.layers.{i}.mlp.{end}" for i in (0, 1) for end in BOTH]
    experts = experts_of(model)
    assert isinstance(experts, QLoRAExperts)
    assert isinstance(experts, before)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in n for n in trained)
    assert len(trained) == 2 * (8 + 4)
    assert "r=2" in repr(experts)
    groups = qkern.lora_plus_groups(model, lr=1e-4, ratio=4)
    assert sorted(len(group["params"]) for group in groups) == [12, 12]
    report = qkern.quantize_model(model)  # once more: nothing new is found
    assert not any("lora" in row.name for row in report.rows)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"target_parameters": ["experts.gate_proj"]}, AdapterMismatchError, "nearest: experts.g"),
        ({"target_parameters": ["gate.weight"]}, AdapterMismatchError, "matches no quantized"),
        ({"target_parameters": UP}, FormatError, "a list of names"),
        ({"lora_dropout": 0.1}, FormatError, "have no lora_dropout"),
        ({"use_dora": True}, FormatError, "have no use_dora"),
        ({"init_lora_weights": "pissa"}, FormatError, "have no init_lora_weights"),
        ({"lora_mode": "merged"}, FormatError, "have no lora_mode"),
        ({"merge_into": "nf4"}, FormatError, "have no merge_into"),
        ({"r": 0}, ShapeError, "rank"),
        ({"init_lora_weights": "other"}, FormatError, "init_lora_weights"),
        ({"rank_pattern": {"up": 2}}, AdapterMismatchError, "matches none"),
        ({"target_parameters": []}, AdapterMismatchError, "target_modules"),
    ],
)
def test_what_is_refused_changes_nothing(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = quantized()
    model.lm_head.requires_grad_(True)
    with pytest.raises(error, match=message):
        add(model, **settings)
    assert type(experts_of(model)).__name__ == "QuantizedMixtralExperts"
    assert model.lm_head.weight.requires_grad
    assert not qkern.adapter_names(model)


def test_dense_experts_are_refused_with_what_to_do() -> None:
    model = quantized(exclude="experts")
    with pytest.raises(AdapterMismatchError, match="quantize_model"):
        add(model)


def test_experts_of_some_layers_are_named_by_their_paths(tmp_path: Path) -> None:
    model = quantized(exclude="layers.1.mlp.experts")
    assert len(add(model)) == 2
    qkern.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_parameters"] == [f"model.layers.0.mlp.{end}" for end in sorted(BOTH)]


def test_linear_layers_first_and_experts_by_a_second_call(tmp_path: Path) -> None:
    model = quantized()
    assert len(qkern.add_lora(model, r=2, target_modules=["q_proj"])) == 2
    assert len(qkern.add_lora(model, r=2, target_modules=[], target_parameters=BOTH)) == 4
    assert sum(p.requires_grad for p in model.parameters()) == 12
    with pytest.raises(AdapterMismatchError, match="have an adapter 'default' already"):
        qkern.add_lora(model, r=2, target_modules=[], target_parameters=[UP])
    qkern.save_adapter(model, tmp_path)
    other = quantized()
    qkern.load_adapter(other, tmp_path)
    assert torch.equal(logits(other), logits(model))


def test_layers_of_another_start_and_experts_are_one_file(tmp_path: Path) -> None:
    model = quantized()
    qkern.add_lora(model, r=2, target_modules=["q_proj"], init_lora_weights="olora")
    qkern.add_lora(model, r=2, target_modules=[], target_parameters=BOTH)
    train(model, 1)
    qkern.save(model, tmp_path)
    assert torch.equal(logits(qkern.load(tmp_path)), logits(model))


def test_layers_with_dropout_and_experts_are_no_file_of_pefts(tmp_path: Path) -> None:
    model = quantized()
    qkern.add_lora(model, r=2, target_modules=["q_proj"], lora_dropout=0.1)
    qkern.add_lora(model, r=2, target_modules=[], target_parameters=BOTH)
    with pytest.raises(AdapterMismatchError, match="layers differ"):
        qkern.save_adapter(model, tmp_path)


def test_a_forward_that_was_replaced_is_refused() -> None:
    model = quantized()
    experts_of(model, 1).forward = lambda *inputs: inputs[0]
    with pytest.raises(FormatError, match="forward was replaced"):
        add(model)


def test_another_computation_of_a_weight_is_refused_not_passed_over() -> None:
    model = adapted()
    config = LoraConfig(r=2, target_modules=[], target_parameters=[DOWN])
    wrapped = get_peft_model(model, config)
    with pytest.raises(AdapterMismatchError, match="use one of the two"):
        logits(wrapped)


# -- how it is computed ----------------------------------------------------------------------


@pytest.mark.parametrize("name", MOE)
def test_no_dense_stack_is_made_forward_or_backward(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(name)

    def refuse(*_: Any, **__: Any) -> Any:
        msg = "a dense copy"
        raise RuntimeError(msg)

    monkeypatch.setattr(QuantizedTensor, "dequantize", refuse)
    output(model.train()).square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(grad is not None and grad.any() for grad in grads)


@pytest.mark.parametrize("name", ["Mixtral", "gpt-oss"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_and_autocast_agree_with_fp32(name: str, dtype: torch.dtype) -> None:
    model = adapted(name)
    experts = experts_of(model)
    torch.manual_seed(2)
    x, index = torch.randn(9, 64), torch.randint(0, 4, (9, 2))
    inputs = (index, torch.rand(9, 2))
    expected = experts(x, *inputs).detach()
    with torch.autocast("cpu", dtype):
        cast = experts(x, *inputs)
    half = adapted(name).to(dtype)
    for adapter in half.modules():
        if hasattr(adapter, "lora_A") and adapter is not experts_of(half):
            adapter.float()
    found = experts_of(half)(x.to(dtype), inputs[0], inputs[1].to(dtype))
    assert found.dtype == dtype
    for y in (cast, found):
        assert (y.detach().float() - expected).norm() < 2e-2 * expected.norm()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_gradients_are_the_same(reentrant: bool) -> None:
    model = adapted()
    experts, parts = experts_of(model), list(experts_of(model).adapters.parameters())
    torch.manual_seed(2)
    x = torch.randn(9, 64, requires_grad=True)
    inputs = (x, torch.randint(0, 4, (9, 2)), torch.rand(9, 2))
    expected = torch.autograd.grad(experts(*inputs).square().sum(), [x, *parts])
    y = checkpoint(experts, *inputs, use_reentrant=reentrant)
    y.square().sum().backward()
    for got, want in zip([x, *parts], expected, strict=True):
        assert torch.equal(got.grad, want)


def test_compiled_without_a_break() -> None:
    experts = experts_of(adapted("gpt-oss"))
    torch.manual_seed(2)
    inputs = (torch.randn(9, 64), torch.randint(0, 4, (9, 2)), torch.rand(9, 2))
    expected = experts(*inputs)
    wanted = torch.autograd.grad(expected.square().sum(), list(experts.adapters.parameters()))
    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)
    y = compiled(*inputs)
    torch.testing.assert_close(y, expected)
    found = torch.autograd.grad(y.square().sum(), list(experts.adapters.parameters()))
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


# -- several adapters ------------------------------------------------------------------------


def two(name: str = "Mixtral") -> nn.Module:
    model = adapted(name, adapter_name="a")
    add(model, 2, adapter_name="b", target_parameters=[UP], r=2)
    return model


def test_named_adapters_are_switched_disabled_and_deleted() -> None:
    model, base = two(), logits(quantized())
    a = logits(model)
    assert torch.equal(a, logits(adapted()))
    qkern.set_adapter(model, "b")
    b = logits(model)
    only = quantized()
    add(only, 2, target_parameters=[UP], r=2)
    assert torch.equal(b, logits(only))
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 4
    assert all(".adapters.b.gate_up_proj." in n for n in trained)
    with qkern.disable_adapter(model):
        assert torch.equal(logits(model), base)
    qkern.delete_adapter(model, "b")
    assert torch.equal(logits(model), base)
    qkern.set_adapter(model, "a")
    assert torch.equal(logits(model), a)


@pytest.mark.parametrize("arch", MOE)
def test_each_row_gets_what_its_adapter_alone_gives(arch: str) -> None:
    model = two(arch)
    rows = {"a": 0, None: 1}
    with qkern.adapter_rows(model, list(rows)):
        mixed = logits(model)
    for name, row in rows.items():
        if name is None:
            with qkern.disable_adapter(model):
                alone = logits(model)
        else:
            alone = logits(model)
        torch.testing.assert_close(mixed[row], alone[row], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(mixed[1], logits(model)[1])


def test_an_adapter_is_saved_and_loaded_by_its_name(tmp_path: Path) -> None:
    model = two()
    qkern.set_adapter(model, "b")
    expected = logits(model)
    qkern.save_adapter(model, tmp_path, adapter_name="b")
    other = adapted()
    qkern.load_adapter(other, tmp_path, adapter_name="b")
    qkern.set_adapter(other, "b")
    assert torch.equal(logits(other), expected)


# -- fine-tuning -----------------------------------------------------------------------------


def test_finetune_trains_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from qkern.cli import main

    sizes = {**BY_NAME["Mixtral"].sizes, "vocab_size": 259, "max_position_embeddings": 512}
    torch.manual_seed(0)
    path = save_chat_model(tmp_path / "model", BY_NAME["Mixtral"]._build(sizes))
    data, out = write_chats(tmp_path / "chats.jsonl"), tmp_path / "out"
    targets = ["--target-modules", "", "--target-parameters", ", ".join(BOTH)]
    settings = ["--steps", "2", "--r", "2", "--dtype", "float32", "--device", "cpu"]
    where = [str(path), str(data), "--output", str(out)]
    assert main(["finetune", *where, *settings, *targets, "--json"]) == 0
    capsys.readouterr()
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["target_modules"], config["target_parameters"]) == ([], sorted(BOTH))
    assert len(load_file(out / "adapter_model.safetensors")) == 8
