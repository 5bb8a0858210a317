"""More than 2^31 values: no index has 32 bits."""

from __future__ import annotations

import pytest
import torch
from gpu_work import BOUNDS, error
from kernel_device import DEVICE, same_bytes

import qkern
from qkern.formats import QuantFormat
from qkern.ops import host

pytest.importorskip("triton")
from qkern.kernels import launch
from qkern.kernels.linear_backward import linear_backward
from qkern.kernels.lora import hidden
from qkern.kernels.lora_backward import grad_a, grad_hidden

BF16 = torch.bfloat16
N, K = 131_080, 16_448  # 2^31 values and 8 million more
LAST = 64  # rows at the end
MEMORY = 24  # GiB


@pytest.fixture(autouse=True)
def _memory() -> None:
    """Free memory enough, before and after."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(DEVICE)[0] >> 30
    if free < MEMORY:
        pytest.skip(f"needs {MEMORY} GiB of the GPU's memory, {free} are free")


@pytest.mark.case("A9")
@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_a_weight_is_quantized_and_decoded_to_its_end(quant_type: str) -> None:
    assert N * K > 2**31
    values = torch.randn(N, K, device=DEVICE, dtype=BF16)
    q = qkern.quantize(values, quant_type, double_quant=False)
    end = values[-LAST:].cpu()
    del values
    fmt = QuantFormat(quant_type, 64, double_quant=False)
    packed, absmax = host.quantize(end, fmt, "error")
    assert same_bytes(q.packed[-LAST:].reshape(-1), packed)
    assert same_bytes(q.absmax[-LAST:].reshape(-1), absmax)
    right = qkern.quantize(end, quant_type, double_quant=False).dequantize(BF16)
    assert same_bytes(q.dequantize(BF16)[-LAST:], right)


@pytest.mark.case("A9")
def test_products_reach_the_last_rows_and_sum_over_them() -> None:
    # Zeros but for the ends: what a wrapped index reads instead is not missed in a sum.
    values = torch.zeros(N, K, device=DEVICE, dtype=BF16)
    for rows in (slice(0, LAST), slice(-LAST, None)):
        values[rows] = torch.randn(LAST, K, device=DEVICE, dtype=BF16)
    q = qkern.quantize(values)
    dense = q.dequantize(BF16)
    del values
    weight = launch.weight(*q.parts, q.format, (N, K))
    for M in (1, 8, 64, 300):
        x = torch.randn(M, K, device=DEVICE, dtype=BF16)
        y = qkern.linear(x, q)
        for rows in (slice(0, LAST), slice(-LAST, None)):
            right = x.double() @ dense[rows].double().mT
            assert error(y[:, rows], right) <= BOUNDS[BF16], M
        grad = torch.zeros(M, N, device=DEVICE, dtype=BF16)
        grad[:, -LAST:] = torch.randn(M, LAST, device=DEVICE, dtype=BF16)
        right = grad[:, -LAST:].double() @ dense[-LAST:].double()
        assert error(linear_backward(grad, weight), right) <= BOUNDS[BF16], M


@pytest.mark.case("A9")
def test_an_adapter_reads_the_last_tokens() -> None:
    features, rank = 512, 8
    A = torch.randn(rank, K, device=DEVICE)
    x = torch.randn(N, K, device=DEVICE, dtype=BF16)
    h = hidden(x, A)
    assert error(h[-LAST:], x[-LAST:].double() @ A.double().mT) <= 1e-4
    G = torch.zeros(N, rank, device=DEVICE)
    G[-LAST:] = torch.randn(LAST, rank, device=DEVICE)
    right = G[-LAST:].double().mT @ x[-LAST:].double()
    assert error(grad_a(G, x, torch.float32), right) <= 1e-4
    del x
    M = 2**31 // features + 64
    grad = torch.zeros(M, features, device=DEVICE, dtype=BF16)
    grad[-LAST:] = torch.randn(LAST, features, device=DEVICE, dtype=BF16)
    B, h = torch.randn(features, rank, device=DEVICE), torch.randn(M, rank, device=DEVICE)
    G, dB = grad_hidden(grad, B, h)
    assert error(G[-LAST:], grad[-LAST:].double() @ B.double()) <= 1e-4
    assert error(dB, grad[-LAST:].double().mT @ h[-LAST:].double()) <= 1e-4
