"""How a layer applies its adapter on the device: dropout by the kernels, many tokens, merged."""

from __future__ import annotations

import pytest
import torch
from gpu_work import BOUNDS, captured, error, exact_step, layer, step
from kernel_device import DEVICE, same_bytes
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import qkern
from qkern.errors import FormatError
from qkern.ops import device, lora_dropout

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def tokens(M: int, features: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(M, features, device=DEVICE).to(dtype)


@pytest.mark.parametrize("M", [1, 5, 100, 700])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_forward_and_backward_drop_the_same_values(M: int, dtype: torch.dtype) -> None:
    made, p = layer(320, 512, dtype=dtype), 0.3
    x, grad = tokens(M, 512, dtype), tokens(M, 320, dtype)
    made.lora_dropout = p
    torch.manual_seed(5)
    found = step(made, x, grad)
    torch.manual_seed(5)
    mask = device.dropout_mask(lora_dropout.draw_seed(x), p, (M, 512)).double()
    assert abs((mask == 0).double().mean() - p) < 5 * (p * (1 - p) / mask.numel()) ** 0.5
    W = made.quantized_weight.dequantize(dtype).double()
    A, B, bias = (t.detach().double() for t in (made.lora_A, made.lora_B, made.bias))
    x64, grad64 = x.double() * mask, grad.double()
    h, G = made.scaling * x64 @ A.mT, made.scaling * grad64 @ B
    y = x.double() @ W.mT + h @ B.mT + bias
    right = (y, grad64 @ W + (G @ A) * mask, G.mT @ x64, grad64.mT @ h)
    for got, expected in zip(found, right, strict=True):
        assert error(got, expected) <= BOUNDS[dtype]


def test_the_generator_of_the_device_repeats_masks_and_checkpointing_restores_them() -> None:
    made, x, grad = layer(320, 512), tokens(64, 512), tokens(64, 320)
    made.lora_dropout = 0.25
    found = []
    for call in (made, made, lambda t: checkpoint(made, t, use_reentrant=False)):
        torch.manual_seed(6)
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        found.append((y.detach(), *torch.autograd.grad(y, (leaf, made.lora_A), grad)))
    for other in found[1:]:
        assert all(same_bytes(*pair) for pair in zip(found[0], other, strict=True))
    assert not torch.equal(made(x), made(x))


def test_each_replay_of_a_graph_draws_a_mask_of_its_own() -> None:
    made, x = layer(320, 512), tokens(64, 512)
    made.lora_dropout = 0.25
    with torch.no_grad():
        replay, y = captured(lambda: made(x))
        outputs = []
        for _ in range(3):
            replay()
            outputs.append(y.clone())
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])


@pytest.mark.parametrize("M", [8, 700, 4097])
@pytest.mark.parametrize(("dtype", "adapter"), [(BF16, FP32), (FP16, FP16), (FP32, FP32)], ids=str)
def test_merged_layers_compute_what_others_do(
    M: int, dtype: torch.dtype, adapter: torch.dtype
) -> None:
    made = layer(320, 512, dtype=dtype, adapter=adapter)
    made.lora_mode = "merged"
    x, grad = tokens(M, 512, dtype), tokens(M, 320, dtype)
    found, right = step(made, x, grad), exact_step(made, x, grad)
    for got, expected in zip(found, right, strict=True):
        assert error(got, expected) <= 1.5 * BOUNDS[dtype]
    assert all(same_bytes(*pair) for pair in zip(found, step(made, x, grad), strict=True))
    made.lora_dropout = 0.1
    with pytest.raises(FormatError, match="lora_dropout"):
        made(x)


@pytest.mark.parametrize("K", [96, 172])
def test_blocks_that_cross_rows_are_multiplied_densely(K: int) -> None:
    made = layer(320, K)
    x, grad = tokens(40, K), tokens(40, 320)
    for got, expected in zip(step(made, x, grad), exact_step(made, x, grad), strict=True):
        assert error(got, expected) <= BOUNDS[BF16]


def test_only_an_adapter_and_only_x_can_be_trained() -> None:
    weight, x, grad = qkern.quantize(tokens(320, 512)), tokens(40, 512), tokens(40, 320)
    A, B = tokens(5, 512, FP32), tokens(320, 5, FP32)
    whole = [t.clone().requires_grad_() for t in (x, A, B)]
    y = qkern.linear(whole[0], weight, lora_A=whole[1], lora_B=whole[2])
    right = torch.autograd.grad(y, whole, grad)
    for i in range(3):
        leaves = [t.clone().requires_grad_(j == i) for j, t in enumerate((x, A, B))]
        y = qkern.linear(leaves[0], weight, lora_A=leaves[1], lora_B=leaves[2])
        (got,) = torch.autograd.grad(y, leaves[i], grad)
        assert error(got, right[i].double()) <= BOUNDS[BF16]
