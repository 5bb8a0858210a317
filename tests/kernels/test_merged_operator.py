"""``lora_mode="merged"``: one dense weight with the adapter in it; where it is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

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
from qkern import kernels
from qkern.errors import DeviceError, FormatError
from qkern.ops import device

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return send_to_kernels(monkeypatch)


@pytest.mark.parametrize("kind", ["kernels", "blocks across rows", "no kernels"])
@pytest.mark.parametrize(("dtype", "adapter"), [(FP32, FP32), (BF16, FP32), (FP16, FP16)], ids=str)
def test_many_tokens_multiply_the_merged_weight_once_each_way(
    kind: str,
    dtype: torch.dtype,
    adapter: torch.dtype,
    launches: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    multiply_densely(monkeypatch)
    if kind == "no kernels":
        monkeypatch.setattr(kernels, "is_supported", lambda _: False)
    N, K = 41, 100 if kind == "blocks across rows" else 128
    weight, leaves = weight_of(N, K), leaves_of(19, N, K, 5, dtype, adapter)
    x, bias, A, B = leaves
    y = qkern.linear(x, weight, bias, lora_A=A, lora_B=B, scaling=0.5, lora_mode="merged")
    grad = torch.randn(19, N).to(dtype)
    grads = torch.autograd.grad(y, leaves, grad)

    # The weight is that of fp64, rounded once.
    sum_of = weight.dequantize(FP32).double() + 0.5 * B.double() @ A.double()
    base = device.Base(weight.parts, weight.format, (N, K))
    merged = device.merged_weight(base, device.Adapter(A, B, 0.5, merged=True), dtype)
    allowed = sum_of.abs() * torch.finfo(dtype).eps / 2 + 2e-6 * sum_of.square().mean().sqrt()
    assert bool(((merged.double() - sum_of).abs() <= allowed).all())
    # y and dX are products of this very weight; dA, dB and dbias do not know of it
    assert error(y, (x.double() @ merged.double().mT + bias.double()).detach()) < 2e-3
    assert error(grads[0], (grad.double() @ merged.double()).detach()) < 2e-3
    exact = exact_gradients(leaves, weight.dequantize(dtype), grad, 0.5)
    scale = 1.5 if dtype != FP32 else 1  # W is rounded with its adapter in it
    assert worst((y, *grads), exact, dtype, adapter) <= scale
    if kind == "kernels":  # the last one is this test's own
        once = ["dequantize_merged"]
        assert launches == [*once, *once, "hidden", "grad_hidden", "grad_a", *once]


def test_few_tokens_are_multiplied_apart_and_their_h_is_not_kept(launches: list[str]) -> None:
    weight, leaves = weight_of(9, 64), leaves_of(6, 9, 64, 3)
    x, bias, A, B = leaves
    y = qkern.linear(x, weight, bias, lora_A=A, lora_B=B, lora_mode="merged")
    right = qkern.linear(x, weight, bias, lora_A=A, lora_B=B)
    assert torch.equal(y, right)
    grad = torch.randn(6, 9)
    launches.clear()
    pairs = zip(*(torch.autograd.grad(out, leaves, grad) for out in (y, right)), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    assert launches == [
        *("hidden", "grad_hidden", "matmul_backward", "grad_a"),
        *("grad_hidden", "matmul_backward", "grad_a"),
    ]


def test_only_dx_needs_no_adapter_by_itself(
    launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    multiply_densely(monkeypatch)
    weight, (x, _, A, B) = weight_of(9, 64), leaves_of(6, 9, 64, 3)
    adapter = {"lora_A": A.detach(), "lora_B": B.detach()}
    qkern.linear(x, weight, **adapter, lora_mode="merged").sum().backward()
    assert launches == ["dequantize_merged"] * 2


def test_gradients_of_gradients_are_those_of_an_adapter_apart(
    launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    multiply_densely(monkeypatch)
    weight, leaves = weight_of(9, 64), leaves_of(6, 9, 64, 3)
    x, bias, A, B = leaves

    def twice(mode: str) -> tuple[Tensor, ...]:
        y = qkern.linear(x, weight, bias, lora_A=A, lora_B=B, lora_mode=mode)
        (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (x, A, B))

    for got, right in zip(twice("merged"), twice("separate"), strict=True):
        assert error(got, right.double()) < 1e-5
    assert "dequantize_merged" in launches


@pytest.mark.parametrize(
    ("relative", "least", "most"), [(5e-2, 0.99, 1.0), (5e-3, 0.8, 0.97), (5e-5, -0.1, 0.3)]
)
def test_an_update_is_seen_without_bias_but_in_the_noise_of_bf16(
    relative: float, least: float, most: float
) -> None:
    """The cosine of what it adds to y and of what it should, by its size beside y."""
    N = K = 512
    weight, leaves = weight_of(N, K), leaves_of(64, N, K, 16)
    x, _, A, B = (leaf.detach() for leaf in leaves)
    base = device.Base(weight.parts, weight.format, (N, K))
    x64, W = x.double(), weight.dequantize(BF16).double()
    right = (x64 @ A.double().mT) @ B.double().mT
    scaling = float(relative * (x64 @ W.mT).norm() / right.norm())
    merged = device.merged_weight(base, device.Adapter(A, B, scaling, merged=True), BF16)
    seen = x64 @ (merged.double() - W).mT
    right = right * scaling
    cosine = float((seen * right).sum() / seen.norm() / right.norm())
    assert least < cosine <= most
    # what the noise, of 512 x 512 roundings, leaves of one number
    assert abs(float((seen * right).sum() / right.square().sum()) - 1) < 3e-4 / relative


def test_copies_keep_it_and_files_do_not(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 32))
    qkern.quantize_model(model)
    qkern.add_lora(model, r=2, lora_mode="merged")
    assert model[0].lora_mode == "merged"
    assert "lora_mode=merged" in repr(model)
    assert copy.deepcopy(model)[0].lora_mode == "merged"
    qkern.save_adapter(model, tmp_path)
    assert not any("merged" in file.read_text("latin-1") for file in tmp_path.iterdir())
    fresh = copy.deepcopy(model)
    fresh[0] = qkern.QuantizedLinear(model[0].quantized_weight, model[0].bias)
    qkern.load_adapter(fresh, tmp_path)
    assert fresh[0].lora_mode == "separate"
    assert "lora_mode" not in repr(fresh)


def test_a_cpu_an_unknown_mode_and_dropout_are_refused() -> None:
    dense = nn.Linear(64, 32)
    layer = qkern.QLoRALinear.from_linear(dense, r=2, lora_mode="merged")
    layer.path = "model.q_proj"
    with pytest.raises(DeviceError, match=r'q_proj has lora_mode="merged", .* for GPUs'):
        layer(torch.randn(2, 64))
    layer.lora_mode = "Merged"
    with pytest.raises(FormatError, match=r"unknown lora_mode 'Merged': .*'separate', 'merged'"):
        layer(torch.randn(2, 64))
    with pytest.raises(FormatError, match="unknown lora_mode"):
        qkern.QLoRALinear.from_linear(dense, r=2, lora_mode="apart")
    with pytest.raises(FormatError, match="dropout"):
        qkern.QLoRALinear.from_linear(dense, r=2, lora_mode="merged", lora_dropout=0.1)


def test_dropout_that_is_set_later_is_refused_in_training_alone(launches: list[str]) -> None:
    layer = qkern.QLoRALinear.from_linear(nn.Linear(64, 32), r=2, lora_mode="merged")
    layer.lora_dropout = 0.1
    with pytest.raises(FormatError, match=r"lora_dropout=0\.1.*set one of them back"):
        layer(torch.randn(2, 64))
    assert layer.eval()(torch.randn(2, 64)).shape == (2, 32)
    assert launches == ["hidden", "matvec"]
