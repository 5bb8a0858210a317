"""``torch.compile`` and autocast on the device."""

from __future__ import annotations

import pytest
import torch
from gpu_work import BOUNDS, error, exact_step, layer, step
from kernel_device import DEVICE
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")
from qkern.kernels import launch

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.filterwarnings("default")  # the compiler's own
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_layer_computes_what_it_did(mode: str) -> None:
    made = layer(320, 512)
    torch.compiler.reset()
    for kept in (launch.tables_of, launch._counters):  # made anew, when the compiled layer runs
        kept.cache_clear()
    compiled = torch.compile(made, fullgraph=True, mode=mode)
    for M in (1, 8, 8, 100, 100):
        x, grad = (torch.randn(M, n, device=DEVICE).bfloat16() for n in (512, 320))
        torch.compiler.cudagraph_mark_step_begin()
        found, right = step(compiled, x, grad), exact_step(made, x, grad)
        for name, got, expected in zip(found._fields, found, right, strict=True):
            assert error(got.clone(), expected) <= BOUNDS[BF16], (M, name)


@pytest.mark.filterwarnings("default")
def test_a_compiled_model_has_one_graph_for_any_number_of_tokens() -> None:
    model = torch.nn.Sequential(layer(128, 256), torch.nn.SiLU(), layer(256, 128))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for M in (3, 17, 90, 600):
        x = torch.randn(M, 256, device=DEVICE).bfloat16()
        stance = "default" if M == 3 else "fail_on_recompile"
        with torch.no_grad(), torch.compiler.set_stance(stance):
            torch.testing.assert_close(compiled(x), model(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_autocast_casts_x_bias_and_adapter_and_never_scales(dtype: torch.dtype) -> None:
    made = layer(320, 512, dtype=FP32)
    x, grad = (torch.randn(20, n, device=DEVICE) for n in (512, 320))
    before = [None if part is None else part.clone() for part in made.weight.parts]
    with torch.autocast("cuda", dtype):
        y = made(x.requires_grad_())
    assert y.dtype == dtype
    dX, dA, dB = torch.autograd.grad(y, (x, made.lora_A, made.lora_B), grad.to(dtype))
    assert {t.dtype for t in (dX, dA, dB)} == {FP32}
    rounded = exact_step(made, x.detach().to(dtype), grad.to(dtype))
    for got, right in zip((y, dX, dA, dB), rounded, strict=True):
        assert error(got.detach(), right) <= 2 * BOUNDS[dtype]
    for old, new in zip(before, made.weight.parts, strict=True):
        assert old is None or torch.equal(old, new)


def test_checkpointing_and_accumulation_leave_gradients_as_they_are() -> None:
    made = layer(320, 512, dtype=FP32)
    x, grad = (torch.randn(24, n, device=DEVICE) for n in (512, 320))
    plain = step(made, x, grad)
    leaf = x.clone().requires_grad_()
    checkpoint(made, leaf, use_reentrant=False).backward(grad)
    for got, right in zip((leaf.grad, made.lora_A.grad, made.lora_B.grad), plain[1:], strict=True):
        assert torch.equal(got, right)
    made.zero_grad()
    for half in (slice(0, 11), slice(11, 24)):
        made(x[half]).backward(grad[half])
    for got, right in zip((made.lora_A.grad, made.lora_B.grad), plain[2:], strict=True):
        assert error(got, right.double()) <= BOUNDS[FP32]
