"""The operators: schema, fake and autograd by opcheck; values and gradients against fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import qkern
from qkern import reference
from qkern.errors import FormatError
from qkern.tensor import QuantizedTensor

# (out_features, in_features): whole blocks; blocks across rows; odd; more than one panel of rows
SHAPES = [(64, 128), (65, 172), (7, 33), (96, 64)]
FORMATS = [("nf4", True), ("nf4", False), ("fp4", True), ("int8", True), ("int8_row", False)]


def inputs(
    shape: tuple[int, int], quant_type: str = "nf4", double_quant: bool = True, r: int = 4
) -> tuple[Tensor, QuantizedTensor, Tensor, Tensor, Tensor]:
    out_features, in_features = shape
    w = qkern.quantize(torch.randn(shape), quant_type, double_quant=double_quant)
    x = torch.randn(5, in_features, requires_grad=True)
    bias = torch.randn(out_features, requires_grad=True)
    A = torch.randn(r, in_features, requires_grad=True)
    B = torch.randn(out_features, r, requires_grad=True)
    return x, w, bias, A, B


def arguments(x: Tensor, w: QuantizedTensor, *rest: object) -> tuple[object, ...]:
    return (x, *w.parts, w.format.quant_type, w.format.blocksize, *rest)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck's own access
@pytest.mark.parametrize(("quant_type", "double_quant"), FORMATS)
def test_opcheck(quant_type: str, double_quant: bool) -> None:
    x, w, bias, A, B = inputs((64, 128), quant_type, double_quant)
    fmt = (w.format.quant_type, w.format.blocksize)
    check = torch.library.opcheck
    check(torch.ops.qkern.dequantize, (*w.parts, *fmt, [64, 128], torch.bfloat16))
    check(torch.ops.qkern.quantize, (torch.randn(7, 33), *fmt, "error"))
    check(torch.ops.qkern.quantize_absmax, (torch.rand(300),))
    check(torch.ops.qkern.linear, arguments(x, w, 64, bias, A, B, 0.5))
    check(torch.ops.qkern.linear, arguments(x, w, 64, None, None, None, 1.0))
    grad = torch.randn(5, 64, requires_grad=True)
    check(torch.ops.qkern.linear_backward, arguments(grad, w, 128))
    leaves = [t.detach() for t in (x, grad, A, B)]
    check(torch.ops.qkern.lora_gradients, (*leaves, 0.5))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("quant_type", "double_quant"), FORMATS)
def test_linear_and_all_gradients_equal_fp64(
    shape: tuple[int, int], quant_type: str, double_quant: bool
) -> None:
    x, w, bias, A, B = inputs(shape, quant_type, double_quant)
    y = qkern.linear(x, w, bias, lora_A=A, lora_B=B, scaling=0.5)
    leaves = (x, bias, A, B)
    grads = torch.autograd.grad(y.square().sum(), leaves)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = reference.linear(exact[0], w.dequantize().double(), *exact[1:], scaling=0.5)
    expected_grads = torch.autograd.grad(expected.square().sum(), exact)
    for got, want in zip((y, *grads), (expected, *expected_grads), strict=True):
        assert (got.double() - want).norm() <= 1e-6 * want.norm()


def test_gradient_in_bf16_is_rounded_once() -> None:
    w = qkern.quantize(torch.randn(512, 64))
    x = torch.randn(8, 64, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(8, 512).bfloat16()
    (got,) = torch.autograd.grad(qkern.linear(x, w), x, grad)
    exact = grad.double() @ w.dequantize(torch.bfloat16).double()
    assert (got.double() - exact).norm() / exact.norm() < 2**-8


@pytest.mark.parametrize(("quant_type", "double_quant"), FORMATS)
@pytest.mark.parametrize("tokens", [1, 2, 40])
def test_int8_compute_is_off_by_about_a_hundredth_and_its_gradients_are_exact(
    quant_type: str, double_quant: bool, tokens: int
) -> None:
    w = qkern.quantize(torch.randn(96, 320), quant_type, double_quant=double_quant)
    x = torch.randn(tokens, 320, requires_grad=True)
    y = qkern.linear(x, w, compute="int8")
    exact = x.double() @ w.dequantize().double().mT
    assert (y - exact).norm() / exact.norm() < 0.02
    grad = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close(got, grad @ w.dequantize(), rtol=1e-5, atol=1e-3)


def test_unknown_compute_is_refused() -> None:
    w = qkern.quantize(torch.randn(4, 64))
    with pytest.raises(FormatError, match=r"unknown compute 'fp8': allowed are 'exact', 'int8'"):
        qkern.linear(torch.randn(1, 64), w, compute="fp8")


def test_a_layer_computes_as_it_is_told() -> None:
    layer = qkern.QLoRALinear.from_linear(torch.nn.Linear(256, 64), r=4)
    x = torch.randn(1, 256)
    exact = layer(x)
    layer.compute = "int8"
    error = (layer(x) - exact).norm() / exact.norm()
    assert 0 < error < 0.02
    base = qkern.QuantizedLinear(layer.weight)
    base.compute = "int8"
    assert qkern.QLoRALinear.from_linear(base, r=4).compute == "int8"


@pytest.mark.parametrize("quant_type", ["nf4", "int8_row"])
def test_no_inputs_at_all_give_the_bias(quant_type: str) -> None:
    w, bias = qkern.quantize(torch.empty(5, 0), quant_type), torch.randn(5)
    assert torch.equal(qkern.linear(torch.empty(2, 0), w, bias), bias.expand(2, 5))


def test_double_backward() -> None:
    x, w, bias, A, B = inputs((16, 64))

    def gradient_norm(x: Tensor, bias: Tensor, A: Tensor, B: Tensor, dense: bool) -> Tensor:
        if dense:
            y = reference.linear(x, w.dequantize().to(x.dtype), bias, A, B, 0.5)
        else:
            y = qkern.linear(x, w, bias, lora_A=A, lora_B=B, scaling=0.5)
        (g,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        return g.square().sum()

    leaves = (x, bias, A, B)
    got = torch.autograd.grad(gradient_norm(*leaves, dense=False), leaves)
    want = torch.autograd.grad(gradient_norm(*leaves, dense=True), leaves)
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_multiplies_the_weight_of_that_dtype(dtype: torch.dtype) -> None:
    x, w, bias, *_ = inputs((64, 128))
    x, bias = x.detach().to(dtype), bias.detach().to(dtype)
    exact = torch.nn.functional.linear(x.double(), w.dequantize(dtype).double(), bias.double())
    error = (qkern.linear(x, w, bias).double() - exact).abs()
    # half an ulp of the output, and the rounding of sums in fp32
    assert (error <= exact.abs() * torch.finfo(dtype).eps / 2 + 1e-5).all()


def test_adapter_of_another_dtype_than_x_keeps_x_dtype() -> None:
    x, w, bias, A, B = inputs((64, 128))
    y = qkern.linear(x.bfloat16(), w, bias.bfloat16(), lora_A=A, lora_B=B)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert (A.grad.dtype, B.grad.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("shape", [(0, 128), (2, 0, 128), (1, 128), (128,)])
def test_any_batch_shape(shape: tuple[int, ...]) -> None:
    _, w, bias, *_ = inputs((64, 128))
    x = torch.randn(shape)
    expected = torch.nn.functional.linear(x, w.dequantize(), bias)
    torch.testing.assert_close(qkern.linear(x, w, bias), expected)
