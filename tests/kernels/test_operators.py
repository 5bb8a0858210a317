"""Layers on kernels, as on a GPU: values and gradients against fp64, and which kernels run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")
from forced_device import (
    error,
    exact_gradients,
    leaves_of,
    multiply_densely,
    send_to_kernels,
    weight_of,
    worst,
)

import qkern
from qkern.errors import DeviceError, DTypeError, ShapeError
from qkern.kernels import lora

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return send_to_kernels(monkeypatch)


def layer(in_features: int, out_features: int, **lora: Any) -> qkern.QLoRALinear:
    """A float32 layer with an adapter that does something."""
    dense = torch.nn.Linear(in_features, out_features)
    made = qkern.QLoRALinear.from_linear(dense, r=3, init_lora_weights=False, **lora)
    made.requires_grad_(False)
    made.lora_A.requires_grad_()
    made.lora_B.requires_grad_()
    return made


# tokens, dtype of x and of the adapter, format, blocksize, 8-bit scales, rank
SETTINGS = [
    (1, BF16, FP32, "nf4", 64, True, 16),
    (4, FP32, FP32, "int8", 64, True, 1),
    (5, FP16, FP32, "nf4", 32, False, 3),
    (6, BF16, BF16, "fp4", 64, True, 8),
    (19, BF16, FP32, "int8_row", 64, False, 17),
    (70, FP16, FP16, "nf4", 64, True, 64),
    (5, BF16, FP32, "nf4", 64, True, 300),
]


@pytest.mark.case("A11", "A14", "B12")
@pytest.mark.parametrize("dense", [False, True], ids=["packed", "dense"])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_gradients_through_kernels_are_those_of_fp64_over_the_dequantized_weight(
    setting: tuple[Any, ...], dense: bool, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, dtype, adapter, quant_type, blocksize, double_quant, r = setting
    if dense:
        multiply_densely(monkeypatch)
    N, K = 41, 96 if blocksize == 32 else 128
    weight = weight_of(N, K, quant_type, blocksize=blocksize, double_quant=double_quant)
    leaves = leaves_of(tokens, N, K, r, dtype, adapter)
    x, bias, A, B = leaves
    y = qkern.linear(x, weight, bias, lora_A=A, lora_B=B, scaling=0.5)
    grad = torch.randn(tokens, N).to(dtype)
    grads = torch.autograd.grad(y, leaves, grad)
    exact = exact_gradients(leaves, weight.dequantize(dtype), grad, 0.5)
    assert worst((y, *grads), exact, dtype, adapter) <= 1
    first = {1: "matvec", 4: "matvec", 70: "matmul"}.get(tokens, "matmul_small")
    passes = ["hidden", "add_adapter" if dense else first, "grad_hidden"]
    passes += ["add_adapter" if dense else "matmul_backward", "grad_a"]
    assert launches == passes  # h and G are computed once


def test_a_layer_of_many_tokens_multiplies_a_dense_weight(launches: list[str]) -> None:
    made = layer(64, 16)
    x = torch.randn(130, 64, requires_grad=True)  # fp32 is packed to 64
    with torch.no_grad():
        y = made(x)
    exact = x.double() @ made.dequantize().weight.double().mT + made.bias.double()
    exact += made.scaling * (x.double() @ made.lora_A.double().mT) @ made.lora_B.double().mT
    assert error(y, exact.detach()) < 1e-6
    assert launches == ["hidden", "add_adapter"]


NEEDED = {
    "x": ["hidden", "matmul_backward"],
    "A": ["hidden", "grad_a"],
    "B": ["grad_hidden"],
    "A B": ["grad_hidden", "grad_a"],
    "bias": [],
}


@pytest.mark.parametrize("needed", NEEDED)
def test_only_what_is_needed_is_computed(needed: str, launches: list[str]) -> None:
    names = ("x", "bias", "A", "B")
    all_leaves = leaves_of(5, 9, 64, 2)
    weight, grad = weight_of(9, 64), torch.randn(5, 9)
    exact = exact_gradients(all_leaves, weight.dequantize(), grad, 2.0)
    leaves = [leaf.detach() for leaf in all_leaves]
    for name, leaf in zip(names, leaves, strict=True):
        leaf.requires_grad_(name in needed.split())
    y = qkern.linear(leaves[0], weight, leaves[1], lora_A=leaves[2], lora_B=leaves[3], scaling=2.0)
    launches.clear()
    y.backward(grad)
    assert launches == NEEDED[needed]
    for leaf, right in zip(leaves, exact[1:], strict=True):
        assert (leaf.grad is not None) == leaf.requires_grad
        if leaf.grad is not None:
            assert error(leaf.grad, right) < 1e-6


def test_without_gradients_nothing_is_recorded_and_the_values_are_the_same(
    launches: list[str],
) -> None:
    made, x = layer(64, 24), torch.randn(3, 64)
    y = made(x)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            again = made(x)
        assert torch.equal(again, y)
        assert not again.requires_grad
    assert launches == ["hidden", "matvec"] * 3


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_checkpointed_layer_has_the_gradients_that_it_has_without(
    use_reentrant: bool, dropout: float, launches: list[str]
) -> None:
    made = layer(64, 24, lora_dropout=dropout)
    x = torch.randn(5, 64, requires_grad=True)
    leaves = (x, made.lora_A, made.lora_B)

    def gradients(y: Tensor) -> list[Tensor]:
        for leaf in leaves:
            leaf.grad = None
        y.square().sum().backward()
        return [leaf.grad for leaf in leaves]

    torch.manual_seed(1)
    plain = gradients(made(x))
    torch.manual_seed(1)
    again = gradients(checkpoint(made, x, use_reentrant=use_reentrant))
    assert launches.count("matmul_small") == 3  # once more in backward
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_gradients_of_several_batches_add_up(launches: list[str]) -> None:
    made = layer(64, 24)
    x, grad = torch.randn(6, 64), torch.randn(6, 24)
    made(x).backward(grad)
    whole = [made.lora_A.grad.double(), made.lora_B.grad.double()]
    made.zero_grad()
    for part in (slice(0, 1), slice(1, 6)):
        made(x[part]).backward(grad[part])
    for leaf, right in zip((made.lora_A, made.lora_B), whole, strict=True):
        assert error(leaf.grad, right) < 1e-6
    assert launches.count("grad_hidden") == 3


def test_tokens_of_any_shape_and_strides_reach_the_kernels(launches: list[str]) -> None:
    weight = weight_of(9, 64)
    x, bias, A, B = leaves_of((2, 3), 9, 64, 4)
    strided = x.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_()
    factors = [t.detach().mT.contiguous().mT.requires_grad_() for t in (A, B)]
    leaves = (strided, bias, *factors)
    y = qkern.linear(strided, weight, bias, lora_A=factors[0], lora_B=factors[1], scaling=0.5)
    assert y.shape == (2, 3, 9)
    grad = torch.randn(9).expand(2, 3, 9)
    exact = exact_gradients(leaves, weight.dequantize(), grad, 0.5)
    assert worst((y, *torch.autograd.grad(y, leaves, grad)), exact, FP32, FP32) <= 1
    single = qkern.linear(x[0, 0], weight, bias, lora_A=A, lora_B=B, scaling=0.5)
    assert error(single, exact[0][0, 0]) < 1e-6
    assert launches[0:2] == ["hidden", "matmul_small"]


@pytest.mark.case("A11")
@pytest.mark.parametrize("dense", [False, True], ids=["packed", "dense"])
@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_no_tokens_have_gradients_of_zero(
    shape: tuple[int, ...], dense: bool, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if dense:
        multiply_densely(monkeypatch)
    weight = weight_of(9, 64)
    leaves = leaves_of(shape, 9, 64, 4)
    x, bias, A, B = leaves
    y = qkern.linear(x, weight, bias, lora_A=A, lora_B=B)
    assert y.shape == (*shape, 9)
    for leaf, grad in zip(leaves, torch.autograd.grad(y.sum(), leaves), strict=True):
        assert grad.shape == leaf.shape
        assert not grad.any()
    assert "grad_hidden" in launches


@pytest.mark.case("A14")
@pytest.mark.parametrize("dense", [False, True], ids=["packed", "dense"])
def test_an_adapter_of_rank_0_adds_nothing(
    dense: bool, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if dense:
        multiply_densely(monkeypatch)
    weight = weight_of(9, 64)
    leaves = leaves_of(5, 9, 64, 0)
    x, bias, A, B = leaves
    y, grad = qkern.linear(x, weight, bias, lora_A=A, lora_B=B), torch.randn(5, 9)
    exact = exact_gradients(leaves, weight.dequantize(), grad, 1.0)
    got = (y, *torch.autograd.grad(y, leaves, grad))
    assert all(error(*pair) < 1e-6 for pair in zip(got[:3], exact[:3], strict=True))
    assert [g.shape for g in got[3:]] == [(0, 64), (9, 0)]


@pytest.mark.parametrize("K", [96, 33, 172])
def test_blocks_that_cross_rows_are_multiplied_densely(K: int, launches: list[str]) -> None:
    weight, leaves = weight_of(9, K), leaves_of(6, 9, K, 4, BF16)
    x, bias, A, B = leaves
    y, grad = qkern.linear(x, weight, bias, lora_A=A, lora_B=B), torch.randn(6, 9).to(BF16)
    exact = exact_gradients(leaves, weight.dequantize(BF16), grad, 1.0)
    assert worst((y, *torch.autograd.grad(y, leaves, grad)), exact, BF16, FP32) <= 1
    assert launches == ["hidden", "add_adapter", "grad_hidden", "add_adapter", "grad_a"]


def test_no_adapter_takes_the_same_kernels_and_only_for_what_is_needed(
    launches: list[str],
) -> None:
    weight, x = weight_of(9, 64), torch.randn(6, 64, requires_grad=True)
    bias, grad = torch.randn(9, requires_grad=True), torch.randn(6, 9)
    y = qkern.linear(x, weight, bias)
    y.backward(grad)
    W = weight.dequantize().double()
    assert error(y, (x.double() @ W.mT + bias.double()).detach()) < 1e-6
    assert error(x.grad, grad.double() @ W) < 1e-6
    assert torch.equal(bias.grad, grad.sum(0))
    assert launches == ["matmul_small", "matmul_backward"]


def test_float64_is_computed_as_exactly_as_the_weight_is_known(launches: list[str]) -> None:
    weight = weight_of(9, 64)
    leaves = leaves_of(5, 9, 64, 3, torch.float64, torch.float64)
    x, bias, A, B = leaves
    y, grad = qkern.linear(x, weight, bias, lora_A=A, lora_B=B), torch.randn(5, 9).double()
    exact = exact_gradients(leaves, weight.dequantize(torch.float64), grad, 1.0)
    got = (y, *torch.autograd.grad(y, leaves, grad))
    assert all(error(*pair) < 1e-14 for pair in zip(got, exact, strict=True))
    assert launches == []


def test_an_adapter_in_float64_is_computed_in_fp32_as_on_a_cpu(launches: list[str]) -> None:
    weight = weight_of(9, 64)
    leaves = leaves_of(5, 9, 64, 3, FP32, torch.float64)
    x, bias, A, B = leaves
    y, grad = qkern.linear(x, weight, bias, lora_A=A, lora_B=B), torch.randn(5, 9)
    grads = torch.autograd.grad(y, leaves, grad)
    assert [g.dtype for g in grads] == [FP32, FP32, torch.float64, torch.float64]
    exact = exact_gradients(leaves, weight.dequantize(), grad, 1.0)
    assert worst((y, *grads), exact, FP32, FP32) <= 1
    assert launches[0] == "hidden"


def test_what_does_not_fit_is_refused_with_its_name(launches: list[str]) -> None:
    weight, (x, bias, A, B) = weight_of(9, 64), leaves_of(5, 9, 64, 3)
    for wrong in (A.detach().to("meta"), A[:2]):
        with pytest.raises((DeviceError, ShapeError), match="lora_A"):
            qkern.linear(x, weight, bias, lora_A=wrong, lora_B=B)
    with pytest.raises(DTypeError, match="lora_B"):
        qkern.linear(x, weight, bias, lora_A=A, lora_B=B.int())
    with pytest.raises(DeviceError, match=r'"int8"|int8.*leave it out'):
        qkern.linear(x, weight, bias, lora_A=A, lora_B=B, compute="int8")
    with pytest.raises(DeviceError, match=r"int8.*leave it out"):
        qkern.linear(x, weight, compute="int8")
    assert launches == []


@pytest.mark.case("B12")
def test_sums_in_fp16_do_not_overflow_on_the_way(launches: list[str]) -> None:
    """Partial sums of x W^T, x A^T and dY W pass 65504 before they come back."""
    K = 1024
    W = torch.full((8, K), 256.0)
    W[:, K // 2 :] *= -1
    x = torch.ones(5, K, dtype=FP16)
    x[:, 0] = 3
    weight = qkern.quantize(W, "int8")
    A, B = W[:2].to(FP16) * 8, torch.full((8, 2), 0.5, dtype=FP16)
    y = qkern.linear(x, weight, lora_A=A, lora_B=B)
    exact = x.double() @ (weight.dequantize(FP16).double() + B.double() @ A.double()).mT
    assert error(y, exact) < 2.0**-11
    turned = qkern.quantize(W.mT.contiguous(), "int8_row")
    few = torch.zeros(5, 8, dtype=FP16, requires_grad=True)
    (dX,) = torch.autograd.grad(qkern.linear(few, turned), few, x)
    assert error(dX, x.double() @ turned.dequantize(FP16).double()) < 2.0**-11
    assert launches == ["hidden", "matmul_small", "matmul_small", "matmul_backward"]


@pytest.mark.case("B12")
@pytest.mark.parametrize("autocast", [None, BF16, FP16], ids=str)
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
def test_the_output_has_the_dtype_of_x_or_of_autocast_and_gradients_those_of_leaves(
    dtype: torch.dtype, autocast: torch.dtype | None, launches: list[str]
) -> None:
    weight, leaves = weight_of(9, 64), leaves_of(5, 9, 64, 2, dtype)
    x, bias, A, B = leaves
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        y = qkern.linear(x, weight, bias, lora_A=A, lora_B=B)
    computed = autocast or dtype
    assert y.dtype == computed
    grad = torch.randn(5, 9).to(computed)
    grads = torch.autograd.grad(y, leaves, grad)
    assert [g.dtype for g in grads] == [leaf.dtype for leaf in leaves]
    exact = exact_gradients(leaves, weight.dequantize(computed), grad, 1.0)
    # what autocast rounds before the product
    bound = 1e-6 if computed == dtype == FP32 else 4 * torch.finfo(computed).eps
    got = (y, *grads)
    assert all(error(*pair) < bound for pair in zip(got, exact, strict=True))
    assert launches[0] == "hidden"


def test_reruns_have_the_same_bits(launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "processors", lambda _: 8)  # so that sums are split
    weight, leaves = weight_of(70, 128), leaves_of(70, 70, 128, 5, BF16)
    x, bias, A, B = leaves
    grad = torch.randn(70, 70).to(BF16)

    def run() -> tuple[Tensor, ...]:
        y = qkern.linear(x, weight, bias, lora_A=A, lora_B=B)
        return y, *torch.autograd.grad(y, leaves, grad)

    assert all(torch.equal(*pair) for pair in zip(run(), run(), strict=True))
    assert len(launches) == 10
