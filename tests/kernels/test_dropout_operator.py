"""Dropout of an adapter's input by the kernels: one mask in every pass, from torch's generator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from forced_device import (
    exact_gradients,
    leaves_of,
    multiply_densely,
    send_to_kernels,
    weight_of,
    worst,
)

import qkern
from qkern import kernels
from qkern.errors import ShapeError
from qkern.kernels.dropout import gain_of
from qkern.ops import device, lora_dropout

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return send_to_kernels(monkeypatch)


def identity_layer(size: int, p: float) -> qkern.QLoRALinear:
    """Of a weight of zeros and an adapter that is 1: its output is what the adapter's input is."""
    made = qkern.QLoRALinear(qkern.quantize(torch.zeros(size, size)), r=size, lora_alpha=size)
    made.lora_dropout = p
    torch.nn.init.eye_(made.lora_A)
    torch.nn.init.eye_(made.lora_B)
    return made


@pytest.mark.parametrize("dense", [False, True], ids=["packed", "dense"])
def test_forward_and_all_gradients_have_the_mask_that_is_read_back(
    dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dense:
        multiply_densely(monkeypatch)
    p = 0.4
    made, ones = identity_layer(64, p), torch.ones(40, 64, requires_grad=True)
    y = made(ones)
    assert set(y.unique().tolist()) == {0.0, torch.tensor(gain_of(p)).item()}
    (dX,) = torch.autograd.grad(y, ones, torch.ones_like(y), retain_graph=True)
    assert torch.equal(dX, y)
    dA, dB = torch.autograd.grad(y, (made.lora_A, made.lora_B), torch.ones_like(y))
    kept = y.detach().sum(0).expand(64, 64)
    torch.testing.assert_close(dA, kept)
    torch.testing.assert_close(dB, kept)


@pytest.mark.parametrize("dense", [False, True], ids=["packed", "dense"])
@pytest.mark.parametrize(("dtype", "adapter"), [(FP32, FP32), (BF16, FP32), (FP16, FP16)], ids=str)
def test_gradients_are_those_of_fp64_with_the_mask(
    dtype: torch.dtype, adapter: torch.dtype, dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dense:
        multiply_densely(monkeypatch)
    M, N, K, r, p = 19, 41, 128, 5, 0.3
    weight, leaves = weight_of(N, K), leaves_of(M, N, K, r, dtype, adapter)
    x, bias, A, B = leaves
    torch.manual_seed(4)
    y = qkern.linear(x, weight, bias, lora_A=A, lora_B=B, scaling=0.5, lora_dropout=p)
    grad = torch.randn(M, N).to(dtype)
    torch.manual_seed(4)
    mask = device.dropout_mask(lora_dropout.draw_seed(x), p, (M, K))
    assert set(mask.unique().tolist()) == {0.0, torch.tensor(gain_of(p)).item()}
    exact = exact_gradients(leaves, weight.dequantize(dtype), grad, 0.5, mask.double())
    assert worst((y, *torch.autograd.grad(y, leaves, grad)), exact, dtype, adapter) <= 1


def test_calls_draw_masks_of_their_own_which_the_generator_repeats() -> None:
    made, ones = identity_layer(64, 0.25), torch.ones(128, 64)
    torch.manual_seed(9)
    with torch.no_grad():
        kept = [made(ones) != 0 for _ in range(2)]
        torch.manual_seed(9)
        again = [made(ones) != 0 for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(kept, again, strict=True))
    # 5 standard deviations of 8192 values: of one mask, and of two independent ones
    assert abs(kept[0].double().mean() - 0.75) < 0.025
    assert abs((kept[0] == kept[1]).double().mean() - 0.625) < 0.03


def test_the_seed_is_a_value_of_the_device_that_nothing_reads() -> None:
    seed = lora_dropout.draw_seed(torch.empty(3, device="meta"))
    assert (seed.shape, seed.dtype, seed.device.type) == ((1,), torch.int64, "meta")
    seeds = torch.cat([lora_dropout.draw_seed(torch.empty(3)) for _ in range(64)])
    assert len(seeds.unique()) == 64
    assert seeds.min() >= 0
    assert seeds.max() > 2**60  # all bits are used


def test_evaluation_drops_nothing_and_draws_nothing(launches: list[str]) -> None:
    made = identity_layer(64, 0.5).eval()
    state = torch.get_rng_state()
    with torch.no_grad():
        assert torch.equal(made(torch.ones(5, 64)), torch.ones(5, 64))
    assert torch.equal(torch.get_rng_state(), state)
    assert launches == ["hidden", "matmul_small"]


@pytest.mark.parametrize("where", ["cpu", "gpu without kernels", "float64", "torch.func"])
def test_elsewhere_torch_drops(
    where: str, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``nn.Dropout`` on the adapter's input: the same random numbers, one pass more."""
    made, x = identity_layer(64, 0.5), torch.ones(5, 64)
    if where == "cpu":
        monkeypatch.setattr(device, "serves", lambda _: False)
    if where == "gpu without kernels":
        monkeypatch.setattr(kernels, "is_supported", lambda _: False)
    if where == "float64":
        x = x.double()
    torch.manual_seed(2)
    expected = torch.nn.functional.dropout(torch.ones(5, 64), 0.5)
    torch.manual_seed(2)
    call: Any = made
    if where == "torch.func":
        call = torch.func.vmap(made, in_dims=1, out_dims=1, randomness="different")
        y: Tensor = call(x[:, None])[:, 0]
        assert set(y.unique().tolist()) == {0.0, 2.0}
    else:
        assert torch.equal(call(x).float(), expected)
    assert launches == []


def test_a_probability_outside_of_its_range_is_refused() -> None:
    weight, (x, bias, A, B) = weight_of(9, 64), leaves_of(5, 9, 64, 3)
    for p in (1.0, -0.1):
        with pytest.raises(ShapeError, match=r"must be in \[0, 1\)"):
            qkern.linear(x, weight, bias, lora_A=A, lora_B=B, lora_dropout=p)
