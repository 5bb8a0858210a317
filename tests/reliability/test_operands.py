"""Settings and operands that do not fit: the layer, what was found and what is allowed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qkern
from qkern.formats import QuantFormat
from qkern.layers import QuantizedLinear

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.case("A15")
@pytest.mark.parametrize(
    "blocksize",
    [0, -1, -64, 65, 16, 8192, 2**63, 2**64, True, False, 3.0, 64.0, "64", None, [64]],
)
def test_a_blocksize_that_is_none(blocksize: object) -> None:
    values = torch.randn(4, 64)
    for call in (
        lambda: qkern.quantize(values, blocksize=blocksize),
        lambda: qkern.quantize(values.numpy(), blocksize=blocksize),
        lambda: QuantizedLinear.from_linear(nn.Linear(64, 4), blocksize=blocksize),
        lambda: QuantFormat("nf4", blocksize),
    ):
        with pytest.raises(qkern.FormatError, match="allowed are 32, 64") as caught:
            call()
        assert isinstance(caught.value, ValueError)


@pytest.mark.case("A15")
@pytest.mark.parametrize("blocksize", [np.float32(64), np.array(64), torch.tensor(64)])
def test_a_blocksize_of_another_kind_of_number(blocksize: object) -> None:
    with pytest.raises(qkern.FormatError, match="allowed are 32, 64"):
        qkern.quantize(torch.randn(4, 64), blocksize=blocksize)


@pytest.mark.case("A15")
@pytest.mark.parametrize("blocksize", [np.int64(128), np.int32(128), np.uint16(128)])
def test_an_integer_of_numpy_is_a_blocksize(blocksize: np.integer) -> None:
    q = qkern.quantize(torch.randn(4, 64), blocksize=blocksize)
    assert q.format == QuantFormat("nf4", 128)
    assert type(q.format.blocksize) is int


@pytest.mark.case("A12")
def test_wrong_in_features_names_the_layer() -> None:
    def net() -> nn.Module:
        attention = nn.ModuleDict({"q_proj": nn.Linear(128, 64)})
        return nn.ModuleDict({"layers": nn.ModuleList([attention])})

    model, x = net(), torch.randn(3, 64)
    qkern.quantize_model(model)
    text = r"^layers\.0\.q_proj expects x of \(\.\.\., 128\), got \(3, 64\)$"
    with pytest.raises(qkern.ShapeError, match=text):
        model["layers"][0]["q_proj"](x)
    qkern.add_lora(model, lora_dropout=0.1)
    for mode in (True, False):
        with pytest.raises(qkern.ShapeError, match=text):
            model.train(mode)["layers"][0]["q_proj"](x)
    assert not any("path" in key for key in model.state_dict())


@pytest.mark.case("A12")
def test_wrong_in_features_of_a_layer_without_a_model() -> None:
    layer = QuantizedLinear.from_linear(nn.Linear(128, 64))
    for x in (torch.randn(3, 64), torch.randn(0), torch.tensor(1.0)):
        with pytest.raises(qkern.ShapeError, match=r"QuantizedLinear expects x of \(\.\.\., 128\)"):
            layer(x)
    with pytest.raises(qkern.ShapeError, match=r"linear expects x of \(\.\.\., 128\)"):
        nn.functional.linear(torch.randn(3, 64), layer.weight)
    with pytest.raises(qkern.ShapeError, match="2 dimensions"):
        qkern.linear(torch.randn(3, 64), qkern.quantize(torch.randn(2, 4, 64)))


@pytest.mark.case("A12")
def test_the_name_of_a_layer_costs_compiled_code_nothing() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
    qkern.quantize_model(model)
    counter = CompileCounterWithBackend("eager")
    for layer in model:  # one by one, as regional compilation does
        layer.compile(backend=counter, fullgraph=True)
        layer(torch.randn(2, 64))
    assert counter.frame_count == 1


@pytest.mark.case("A13")
@pytest.mark.parametrize("shape", [(2, 64), (1, 64), (63,), (1,), ()])
def test_a_bias_of_another_shape(shape: tuple[int, ...]) -> None:
    weight, bias = qkern.quantize(torch.randn(64, 128)), torch.randn(shape)
    x = torch.randn(2, 128)
    for call in (
        lambda: qkern.linear(x, weight, bias),
        lambda: nn.functional.linear(x, weight, bias),
        lambda: QuantizedLinear(weight, nn.Parameter(bias)),
        lambda: replaced_bias(bias)(x),
    ):
        with pytest.raises(qkern.ShapeError, match=r"expects a bias of \(64,\), got \("):
            call()


def replaced_bias(bias: Tensor) -> nn.Module:
    layer = QuantizedLinear.from_linear(nn.Linear(128, 64))
    layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


@pytest.mark.case("A13")
@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("bias_dtype", [*FLOATS, torch.float64])
def test_a_bias_of_another_dtype_is_cast_to_that_of_x(
    x_dtype: torch.dtype, bias_dtype: torch.dtype
) -> None:
    weight, bias = qkern.quantize(torch.randn(64, 128)), torch.randn(64).to(bias_dtype)
    x = torch.randn(2, 128).to(x_dtype)
    dense = weight.dequantize(x_dtype).double()
    expected = nn.functional.linear(x.double(), dense, bias.to(x_dtype).double())
    for y in (qkern.linear(x, weight, bias), replaced_bias(bias)(x)):
        assert y.dtype == x_dtype
    assert torch.equal(qkern.linear(x, weight, bias), qkern.linear(x, weight, bias.to(x_dtype)))
    error = (qkern.linear(x, weight, bias).double() - expected).norm() / expected.norm()
    assert error < torch.finfo(x_dtype).eps


@pytest.mark.case("A13")
def test_a_bias_that_is_no_float() -> None:
    weight, x = qkern.quantize(torch.randn(64, 128)), torch.randn(2, 128)
    for bias in (torch.ones(64, dtype=torch.int32), torch.ones(64, dtype=torch.complex64), 3.0):
        with pytest.raises(qkern.DTypeError, match="expects bias as a tensor of float32"):
            qkern.linear(x, weight, bias)
    with pytest.raises(qkern.DeviceError, match="bias is on meta"):
        qkern.linear(x, weight, torch.ones(64, device="meta"))


@pytest.mark.case("A13")
def test_half_an_adapter_or_one_of_another_size() -> None:
    weight, x = qkern.quantize(torch.randn(64, 128)), torch.randn(2, 128)
    A, B = torch.randn(4, 128), torch.randn(64, 4)
    for lora_A, lora_B in ((A, None), (None, B), (A[:3], B), (A[:, :5], B), (A, B[:1]), (A[0], B)):
        with pytest.raises(qkern.ShapeError, match=r"lora_A of \(r, 128\) and lora_B of \(64, r\)"):
            qkern.linear(x, weight, lora_A=lora_A, lora_B=lora_B)
