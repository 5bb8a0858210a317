"""Adapters of layers with odd names, or with names that end like another's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import qkern
from qkern.adapted import adapted_layers

# in a ModuleDict; "a.b" can only be set as an attribute
NAMES = ("weight", "lora_A", "a+b", "x[0]", "^(q|v)$", "quant_state", "absmax", "a", "base_layer2")
X = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))


class Odd(nn.Module):
    """Layers whose names are those of parts, or mean something in an expression."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.odd = nn.ModuleDict({name: nn.Linear(64, 64) for name in NAMES})
        self.a = nn.Linear(64, 64)  # the end of the path odd.a
        self.weight = nn.ModuleDict({"weight": nn.Linear(64, 64)})

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.odd.values(), self.a, self.weight["weight"]):
            x = torch.tanh(layer(x))
        return x


def quantized_odd() -> nn.Module:
    model = Odd()
    qkern.quantize_model(model)
    return model


def layers_of(model: nn.Module) -> list[str]:
    return [name for name, _ in adapted_layers(model)]


@pytest.mark.case("E2")
def test_odd_names_are_exact_keys(tmp_path: Path) -> None:
    model = quantized_odd()
    qkern.add_lora(model, r=4, init_lora_weights=False)
    assert len(layers_of(model)) == len(NAMES) + 2
    expected = model(X)
    qkern.save_adapter(model, tmp_path / "adapter")
    other = quantized_odd()
    qkern.load_adapter(other, tmp_path / "adapter")
    assert torch.equal(other(X), expected)
    qkern.save(model, tmp_path / "model")
    for target in (Odd(), Odd().to("meta")):
        assert torch.equal(qkern.load(tmp_path / "model", target)(X), expected)
    stock = PeftModel.from_pretrained(quantized_odd(), tmp_path / "adapter")
    torch.testing.assert_close(stock(X), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.case("E2")
def test_some_layers_with_a_rank_and_alpha_of_their_own(tmp_path: Path) -> None:
    """ "a" is the end of "odd.a" as well; "a+b" is an expression that matches "ab"."""
    model = quantized_odd()
    qkern.add_lora(model, r=2, target_modules=r"weight\.weight|odd\.a", init_lora_weights=False)
    qkern.add_lora(
        model, r=3, lora_alpha=5, target_modules=["a+b", "x[0]"], init_lora_weights=False
    )
    names = layers_of(model)
    assert set(names) == {"weight.weight", "odd.a", "odd.a+b", "odd.x[0]"}
    expected = model(X)
    qkern.save_adapter(model, tmp_path)
    own = quantized_odd()
    qkern.load_adapter(own, tmp_path)
    assert layers_of(own) == names
    assert torch.equal(own(X), expected)
    stock = PeftModel.from_pretrained(quantized_odd(), tmp_path)
    torch.testing.assert_close(stock(X), expected)
    assert sum(name.endswith("lora_A.default") for name, _ in stock.named_modules()) == 4


@pytest.mark.case("E2")
def test_a_path_that_ends_like_another_gets_its_own_adapter_alone(tmp_path: Path) -> None:
    model = quantized_odd()
    qkern.add_lora(model, r=2, target_modules="a", init_lora_weights=False)
    assert layers_of(model) == ["a"]
    expected = model(X)
    qkern.save_adapter(model, tmp_path)
    own = quantized_odd()
    qkern.load_adapter(own, tmp_path)
    assert layers_of(own) == ["a"]
    assert torch.equal(own(X), expected)
    stock = PeftModel.from_pretrained(quantized_odd(), tmp_path)
    torch.testing.assert_close(stock(X), expected)
    assert not hasattr(stock.base_model.model.odd["a"], "lora_A")


class Dotted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        setattr(self, "up.proj", nn.Linear(64, 64))
        self.up = nn.ModuleDict({"other": nn.Linear(64, 64)})

    def forward(self, x: Tensor) -> Tensor:
        return self.up["other"](getattr(self, "up.proj")(x))


@pytest.mark.case("E2")
def test_a_name_with_a_dot_in_it(tmp_path: Path) -> None:
    model = Dotted()
    report = qkern.quantize_model(model)
    assert [row.name for row in report.quantized] == ["up.proj", "up.other"]
    qkern.add_lora(model, r=2, init_lora_weights=False)
    expected = model(X)
    qkern.save_adapter(model, tmp_path / "adapter")
    qkern.save(model, tmp_path / "model")
    other = Dotted()
    qkern.quantize_model(other)
    qkern.load_adapter(other, tmp_path / "adapter")
    assert torch.equal(other(X), expected)
    assert torch.equal(qkern.load(tmp_path / "model", Dotted())(X), expected)
    with pytest.raises(qkern.ShapeError, match=r"^up\.proj expects"):
        getattr(other, "up.proj")(torch.randn(2, 3))
