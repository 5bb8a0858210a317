"""What operators do on a device with kernels: forced here, on CPU tensors, in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qkern import kernels, ops
from qkern.errors import DTypeError, NonFiniteError
from qkern.formats import QuantFormat
from qkern.ops import host, lora_gradients

pytest.importorskip("triton")
from kernel_device import HOST, same_bytes


@pytest.fixture(autouse=True)
def _supported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "is_supported", lambda device: True)


def on_device(op: Any) -> Any:
    """The implementation that an operator has for devices other than the CPU."""
    return op._init_fn


@pytest.mark.case("B10")
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int8", "int8_row"])
def test_quantize_of_a_strided_tensor_has_the_hosts_bytes(quant_type: str) -> None:
    values = torch.randn(33, 20, dtype=torch.bfloat16, requires_grad=True).mT[::2]
    fmt = QuantFormat(quant_type, 64, double_quant=False).for_shape(values.shape)
    got = on_device(ops.quantize)(values, quant_type, fmt.blocksize, "error")
    for mine, right in zip(got, host.quantize(values.to(HOST), fmt, "error"), strict=True):
        assert same_bytes(mine, right)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, at infinity times 0
def test_what_is_not_finite_is_named_or_kept() -> None:
    values = torch.randn(200)
    values[[70, 130]] = torch.inf
    with pytest.raises(NonFiniteError, match=r"2 of 200 .* flat index 70"):
        on_device(ops.quantize)(values, "nf4", 64, "error")
    _, absmax = on_device(ops.quantize)(values, "nf4", 64, "keep")
    assert absmax.isfinite().tolist() == [True, False, False, True]
    with pytest.raises(DTypeError, match="float64"):
        on_device(ops.quantize)(values.double(), "nf4", 64, "keep")


def test_codes_against_scales_and_scales_in_8_bits_have_the_hosts_bytes() -> None:
    fmt = QuantFormat("nf4", 64, double_quant=False)
    values, scales = torch.randn(40, 20).mT, torch.randn(2 * fmt.num_blocks(800))[::2]
    got = on_device(ops.encode)(values, scales, "nf4", 64)
    assert same_bytes(got, host.encode(values.to(HOST), scales.to(HOST), fmt))
    absmax = scales.abs()
    got = on_device(ops.quantize_absmax)(absmax)
    *parts, safe = host.quantize_absmax(absmax.to(HOST))
    for mine, right in zip(got, (*parts, torch.tensor([safe])), strict=True):
        assert same_bytes(mine, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_an_adapters_gradients_are_those_of_torch(dtype: torch.dtype) -> None:
    """Of float64, for which there are no kernels, too."""
    x, grad = torch.randn(2, 9, 40).to(dtype), torch.randn(9, 2, 24).to(dtype).transpose(0, 1)
    A, B = torch.randn(5, 40).to(dtype), torch.randn(24, 10).to(dtype)[:, ::2]
    got = on_device(lora_gradients._lora_gradients)(x, grad, A, B, 0.5)
    right = lora_gradients.lora_gradients(*(t.double() for t in (x, grad, A, B)), 0.5)
    for mine, exact in zip(got, right, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), exact, rtol=1e-2, atol=0.05)
