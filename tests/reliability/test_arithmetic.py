"""The layer's arithmetic: long sums, dtypes, and the adapter that PEFT has."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import qkern
from qkern import reference
from qkern.layers import QLoRALinear, QuantizedLinear

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.case("B12")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_long_sum_does_not_overflow(dtype: torch.dtype) -> None:
    """Partial sums of 32768 * 4 pass fp16's largest value, 65504, before they come back."""
    weight = torch.full((16, 65536), 4.0)
    weight[:, 32768:] *= -1
    q = qkern.quantize(weight, "int8")
    x = torch.ones(3, 65536, dtype=dtype)
    x[:, 40000:40003] = 3
    exact = x.double() @ q.dequantize(dtype).double().T
    assert torch.equal(qkern.linear(x, q).double(), exact)
    grad = torch.ones(3, 65536, dtype=dtype)
    x = torch.zeros(3, 16, dtype=dtype, requires_grad=True)
    turned = qkern.quantize(weight.T.contiguous(), "int8")
    qkern.linear(x, turned).backward(grad)
    assert torch.equal(x.grad.double(), grad.double() @ turned.dequantize(dtype).double())


@pytest.mark.case("B12")
@pytest.mark.parametrize("in_features", [4096, 20_000])
def test_half_precision_is_as_near_as_one_rounding_of_the_sum(in_features: int) -> None:
    q = qkern.quantize(torch.randn(32, in_features) / in_features**0.5)
    for dtype, step in ((torch.float16, 2**-11), (torch.bfloat16, 2**-8)):
        x = torch.randn(4, in_features).to(dtype)
        exact = x.double() @ q.dequantize(dtype).double().T
        error = (qkern.linear(x, q).double() - exact).norm() / exact.norm()
        assert error < step


@pytest.mark.case("B12")
@pytest.mark.parametrize("reported", [*FLOATS, torch.float64])
@pytest.mark.parametrize("x_dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_the_output_has_the_dtype_of_x_or_of_autocast(
    reported: torch.dtype, x_dtype: torch.dtype, autocast: torch.dtype | None
) -> None:
    layer = QLoRALinear.from_linear(nn.Linear(128, 32), r=4, init_lora_weights=False)
    layer.to(reported)
    x = torch.randn(3, 128, dtype=x_dtype)
    computed = x_dtype if autocast is None or x_dtype == torch.float64 else autocast
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        y, plain = layer(x), nn.functional.linear(x, layer.weight)
    assert (y.dtype, plain.dtype) == (computed, computed)
    weight = layer.weight.dequantize(computed)
    exact = x.to(computed).double() @ weight.double().T
    assert (plain.double() - exact).norm() < torch.finfo(computed).eps * exact.norm()
    exact = reference.linear(
        x.double(), weight.double(), layer.bias.double(), layer.lora_A.double(),
        layer.lora_B.double(), layer.scaling,
    )  # fmt: skip
    assert (y.double() - exact).norm() < 0.02 * exact.norm()


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(128, 192), nn.Linear(192, 128)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


@pytest.mark.case("B13")
@pytest.mark.parametrize("lora_alpha", [16, 0])
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("lora_dropout", [0.0, 0.3])
@pytest.mark.parametrize("training", [False, True])
def test_the_adapter_computes_what_pefts_does(
    lora_alpha: int, use_rslora: bool, lora_dropout: float, training: bool
) -> None:
    settings = {"lora_alpha": lora_alpha, "use_rslora": use_rslora, "lora_dropout": lora_dropout}
    own = Toy()
    qkern.quantize_model(own)
    qkern.add_lora(own, r=4, **settings, init_lora_weights=False)
    theirs = Toy()
    qkern.quantize_model(theirs)
    peft_model = get_peft_model(theirs, LoraConfig(r=4, target_modules="all-linear", **settings))
    own.train(training)
    peft_model.train(training)
    for layer in (peft_model.base_model.model.up, peft_model.base_model.model.down):
        mine = own.get_submodule(layer.base_layer.path)
        assert layer.scaling["default"] == mine.scaling
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(mine.lora_A)
            layer.lora_B["default"].weight.copy_(mine.lora_B)
    x = torch.randn(5, 128)
    outputs = []
    for model in (own, peft_model):
        torch.manual_seed(7)
        outputs.append(model(x))
        outputs[-1].square().sum().backward()
    torch.testing.assert_close(*outputs)
    if lora_alpha == 0:
        assert torch.equal(outputs[0], without_adapters(own)(x))
    for name in ("up", "down"):
        mine, layer = getattr(own, name), getattr(peft_model.base_model.model, name)
        for a, b in (
            (mine.lora_A.grad, layer.lora_A["default"].weight.grad),
            (mine.lora_B.grad, layer.lora_B["default"].weight.grad),
        ):
            assert (a - b).norm() <= 1e-6 * b.norm()


def without_adapters(adapted: nn.Module) -> nn.Module:
    """The same layers without their adapters."""
    base = Toy()
    for name in ("up", "down"):
        layer = getattr(adapted, name)
        setattr(base, name, QuantizedLinear(layer.weight, layer.bias))
    return base
