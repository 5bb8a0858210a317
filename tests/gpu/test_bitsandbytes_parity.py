"""Beside bitsandbytes on the same GPU: its files decode to the same values."""

from __future__ import annotations

import warnings

import pytest
import torch
from gpu_work import BOUNDS, error
from kernel_device import DEVICE, same_bytes
from torch import Tensor

import qkern
from qkern.formats import QuantFormat
from qkern.reference import Parts

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    bnb = pytest.importorskip(
        "bitsandbytes", reason="bitsandbytes is not installed", exc_type=ImportError
    )

BF16 = torch.bfloat16


def taken_over(packed: Tensor, state: bnb.functional.QuantState) -> qkern.QuantizedTensor:
    """qkern's tensor over bitsandbytes' codes and scales."""
    nested = (state.state2.absmax, state.offset.reshape(1).float()) if state.nested else (None,) * 2
    fmt = QuantFormat(state.quant_type, state.blocksize, state.nested)
    parts = Parts(packed.reshape(-1), state.absmax, *nested)
    return qkern.QuantizedTensor.from_parts(parts, fmt, state.shape, state.dtype)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_its_codes_decode_to_its_values(quant_type: str, nested: bool) -> None:
    for dtype in (torch.float32, torch.float16, BF16):
        for blocksize in (64, 256):
            w = torch.randn(320, 1024, device=DEVICE).to(dtype)
            kind = {"blocksize": blocksize, "quant_type": quant_type, "compress_statistics": nested}
            packed, state = bnb.functional.quantize_4bit(w, **kind)
            right = bnb.functional.dequantize_4bit(packed, state)
            assert same_bytes(taken_over(packed, state).dequantize(dtype), right)


def test_its_products_are_as_near_to_fp64() -> None:
    w = torch.randn(1024, 2048, device=DEVICE).bfloat16() / 45
    packed, state = bnb.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    q = taken_over(packed, state)
    for M in (1, 4, 16, 64, 300, 1000):
        x = torch.randn(M, 2048, device=DEVICE).bfloat16()
        exact = x.double() @ q.dequantize(torch.float32).double().mT
        theirs = error(bnb.matmul_4bit(x, packed, state), exact)
        ours = error(qkern.linear(x, q), exact)
        assert ours <= BOUNDS[BF16]
        assert ours <= 1.2 * theirs


def test_its_codes_of_random_values_are_ours() -> None:
    """Its GPU encoder may choose another neighbour where two are as near; nothing else differs."""
    w = torch.randn(512, 1024, device=DEVICE)
    packed, state = bnb.functional.quantize_4bit(w, quant_type="nf4")
    q = qkern.quantize(w, double_quant=False)
    assert torch.equal(q.absmax.reshape(-1), state.absmax)
    differ = (q.packed.reshape(-1) != packed.reshape(-1)).float().mean()
    assert float(differ) <= 1e-4
