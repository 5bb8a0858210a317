"""A GPU that Triton does not serve, such as capability 7.5: torch's operations, on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from forced_device import exact_gradients, leaves_of, send_to_kernels, weight_of, worst

import qkern
from qkern import kernels, reference
from qkern.formats import QuantFormat
from qkern.kernels import multiplies_bf16, why_not
from qkern.ops import dequantize_torch

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What must stay empty: kernels that are called."""
    called = send_to_kernels(monkeypatch)
    monkeypatch.setattr(kernels, "is_supported", lambda _: False)
    monkeypatch.setattr(kernels, "multiplies_bf16", lambda _: False)
    return called


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtypes that weights are multiplied in."""
    seen: list[torch.dtype] = []
    linear = torch.nn.functional.linear

    def record(x: Tensor, *arguments: Any) -> Tensor:
        seen.append(x.dtype)
        return linear(x, *arguments)

    monkeypatch.setattr(torch.nn.functional, "linear", record)
    return seen


@pytest.mark.parametrize(
    ("dtype", "adapter", "multiplied"),
    [(FP16, FP32, FP16), (FP16, FP16, FP16), (BF16, FP32, FP32), (FP32, FP32, FP32)],
    ids=str,
)
def test_values_and_gradients_are_those_of_fp64(
    dtype: torch.dtype,
    adapter: torch.dtype,
    multiplied: torch.dtype,
    launches: list[str],
    products: list[torch.dtype],
) -> None:
    weight, leaves = weight_of(41, 128), leaves_of((2, 3), 41, 128, 5, dtype, adapter)
    x, bias, A, B = leaves
    y = qkern.linear(x, weight, bias, lora_A=A, lora_B=B, scaling=0.5)
    grad = torch.randn(2, 3, 41).to(dtype)
    grads = torch.autograd.grad(y, leaves, grad)
    assert products == [multiplied] * 2  # y and dX
    exact = exact_gradients(leaves, weight.dequantize(dtype), grad, 0.5)
    assert worst((y, *grads), exact, dtype, adapter) <= 1
    assert launches == []


@pytest.mark.parametrize("with_adapter", [False, True])
def test_finite_values_of_bf16_beyond_the_range_of_fp16_stay_finite(with_adapter: bool) -> None:
    """x, W, y and dX of 1e10 and more; fp16 ends at 65504."""
    weight = qkern.quantize(torch.randn(16, 64) * 1e6, "int8")
    x = (torch.randn(3, 64) * 1e10).to(BF16).requires_grad_()
    lora = {}
    if with_adapter:
        lora = {"lora_A": torch.randn(2, 64).to(BF16), "lora_B": torch.randn(16, 2).to(BF16)}
    y = qkern.linear(x, weight, **lora)
    exact = x.double() @ weight.dequantize(BF16).double().mT
    if with_adapter:
        exact += (x.double() @ lora["lora_A"].double().mT) @ lora["lora_B"].double().mT
    assert (y.double() - exact).norm() < 2.0**-8 * exact.norm()
    grad = (torch.randn(3, 16) * 1e10).to(BF16)
    (dX,) = torch.autograd.grad(y, x, grad)
    assert dX.isfinite().all()
    assert dX.abs().max() > 1e15


def test_sums_of_fp16_adapters_do_not_overflow_on_the_way() -> None:
    """h = x A^T is far beyond 65504, and B small."""
    weight = weight_of(8, 64)
    x, A = torch.full((2, 64), 60.0, dtype=FP16), torch.full((2, 64), 60.0, dtype=FP16)
    B = torch.full((8, 2), 2.0**-12, dtype=FP16)
    y = qkern.linear(x, weight, lora_A=A, lora_B=B)
    exact = x.double() @ (weight.dequantize(FP16).double() + B.double() @ A.double()).mT
    torch.testing.assert_close(y.double(), exact, rtol=2e-3, atol=0.05)


@pytest.mark.case("B10")
@pytest.mark.parametrize(
    ("quant_type", "blocksize", "double_quant"),
    [("nf4", 64, True), ("fp4", 32, False), ("nf4", 4096, True), ("int8", 64, True)],
)
@pytest.mark.parametrize("numel", [0, 1, 63, 64 * 300 + 7])
def test_values_have_the_bytes_of_the_reference(
    quant_type: str,
    blocksize: int,
    double_quant: bool,
    numel: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Some blocks at a time, so that there are several such pieces."""
    monkeypatch.setattr(dequantize_torch, "_VALUES_AT_ONCE", 5000)
    fmt = QuantFormat(quant_type, blocksize, double_quant)
    parts = reference.quantize(torch.randn(numel), fmt)
    for dtype in (FP32, FP16, BF16):
        got = dequantize_torch.dequantize_torch(parts, fmt, numel, dtype)
        assert got.dtype == dtype
        assert torch.equal(got, reference.dequantize(parts, fmt, numel, dtype))


def test_rows_of_int8_have_the_bytes_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dequantize_torch, "_VALUES_AT_ONCE", 100)
    fmt = QuantFormat("int8_row").for_shape((9, 33))
    parts = reference.quantize(torch.randn(9, 33), fmt)
    got = dequantize_torch.dequantize_torch(parts, fmt, 297, BF16)
    assert torch.equal(got, reference.dequantize(parts, fmt, 297, BF16))


def test_an_intel_gpu_multiplies_by_torch_in_the_dtype_of_x(
    monkeypatch: pytest.MonkeyPatch, launches: list[str], products: list[torch.dtype]
) -> None:
    """The CPU answers as such a device does."""
    device = torch.device("xpu", 0)
    assert "Intel's driver" in why_not(device)
    monkeypatch.setattr(kernels, "is_supported", lambda _: not why_not(device))
    monkeypatch.setattr(kernels, "multiplies_bf16", lambda _: multiplies_bf16(device))
    weight, leaves = weight_of(24, 128), leaves_of((2, 3), 24, 128, 5, BF16, FP32)
    x, bias, A, B = leaves
    y = qkern.linear(x, weight, bias, lora_A=A, lora_B=B, scaling=0.5)
    grad = torch.randn(2, 3, 24).to(BF16)
    grads = torch.autograd.grad(y, leaves, grad)
    assert products == [BF16] * 2
    exact = exact_gradients(leaves, weight.dequantize(BF16), grad, 0.5)
    assert worst((y, *grads), exact, BF16, FP32) <= 1
    assert launches == []


@pytest.mark.parametrize(
    ("hip", "capability", "supported"),
    [(None, (7, 5), False), (None, (8, 0), True), ("6.4", (7, 5), True)],
)
def test_products_of_bf16_began_with_ampere(
    hip: str | None,
    capability: tuple[int, int],
    supported: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(kernels, "_capability", lambda _: capability)
    assert kernels.multiplies_bf16(torch.device("cuda", 1)) == supported
    assert kernels.multiplies_bf16(torch.device("cpu"))
