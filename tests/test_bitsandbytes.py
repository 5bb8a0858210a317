"""Bytes equal to bitsandbytes' CPU back end, on every SIMD body; its files open here and there."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
import torch
from cases import LENGTHS, as_bits, value_patterns
from torch import nn

import qkern
from qkern import _native, reference
from qkern.codec import code_array
from qkern.formats import BLOCKSIZES, DTYPES

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes.functional as bnb

BODIES = _native.available_simd()


def generated_cases() -> list[tuple[str, np.ndarray, str, str, int]]:
    """(name, bits, dtype, quant_type, blocksize): 14 patterns x 10 lengths, settings rotated."""
    rng = np.random.default_rng(0)
    settings = itertools.cycle(itertools.product(DTYPES, ("nf4", "fp4"), BLOCKSIZES))
    cases = []
    for n in LENGTHS:
        for name, values in value_patterns(n, rng):
            for _ in range(5):
                dtype, quant_type, blocksize = next(settings)
                bits = as_bits(values, dtype)
                cases.append((f"{name}[{n}]", bits, dtype, quant_type, blocksize))
    return cases


def as_tensor(bits: np.ndarray, dtype: str) -> torch.Tensor:
    """The torch tensor with these bits."""
    if dtype == "float32":
        return torch.from_numpy(bits.copy())
    return torch.from_numpy(bits.view(np.int16).copy()).view(getattr(torch, dtype))


@pytest.mark.parametrize("body", BODIES)
def test_packed_bytes_and_absmax_equal(body: str, capsys: pytest.CaptureFixture[str]) -> None:
    cases = generated_cases()
    for name, bits, dtype, quant_type, blocksize in cases:
        packed = np.empty((bits.size + 1) // 2, np.uint8)
        absmax = np.empty(-(-bits.size // blocksize), np.float32)
        code = code_array(quant_type)
        _native.quantize_4bit(bits, dtype, code, blocksize, packed, absmax, simd=body)
        theirs, state = bnb.quantize_4bit(
            as_tensor(bits, dtype), blocksize=blocksize, quant_type=quant_type
        )
        where = f"{name} {dtype} {quant_type} blocksize {blocksize}"
        np.testing.assert_array_equal(packed, theirs.numpy().reshape(-1), err_msg=where)
        np.testing.assert_array_equal(
            absmax.view(np.uint32), state.absmax.numpy().view(np.uint32), err_msg=where
        )
    with capsys.disabled():
        print(f"\n{len(cases)} cases byte-equal to bitsandbytes on {body}")


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_double_quantized_states_of_bitsandbytes_decode_to_its_values(quant_type: str) -> None:
    w = torch.randn(256, 512) * torch.rand(256, 1)
    packed, state = bnb.quantize_4bit(w, quant_type=quant_type, compress_statistics=True)
    q = qkern.QuantizedTensor.from_parts(
        reference.Parts(
            packed.reshape(-1), state.absmax, state.state2.absmax, state.offset.reshape(1)
        ),
        qkern.QuantFormat(quant_type),
        w.shape,
        w.dtype,
    )
    assert torch.equal(q.dequantize(), bnb.dequantize_4bit(packed, state))


def test_double_quantized_codes_are_the_nearest() -> None:
    """bitsandbytes searches a table of 65,536 bins: its code may be a neighbour, ours never."""
    w = torch.randn(512, 1024) * (0.5 + torch.rand(512, 1))
    _, state = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    q = qkern.quantize(w)
    assert q.format.double_quant
    mine, theirs = q.absmax.reshape(-1).int(), state.absmax.int()
    assert (mine != theirs).float().mean() < 0.01
    assert (mine - theirs).abs().max() <= 1
    error = [
        (reference.dequantize_absmax(c, q.nested_absmax, q.offset) - absmax).abs()
        for c, absmax in (
            (codes, qkern.quantize(w, double_quant=False).absmax.reshape(-1))
            for codes in (mine, theirs)
        )
    ]
    assert bool((error[0] <= error[1] + 1e-7).all())


def test_dequantize_where_bitsandbytes_is_wrong() -> None:
    """in_features of 96: bitsandbytes' AVX-512 dequantizer restarts its blocks at each row."""
    w = torch.randn(64, 96) * torch.rand(64, 1)
    q = qkern.quantize(w, double_quant=False)
    assert (q.dequantize() - w).norm() / w.norm() < 0.11


@pytest.mark.parametrize("double_quant", [True, False])
def test_our_state_dict_opens_in_linear4bit(double_quant: bool) -> None:
    torch.manual_seed(0)
    ours = qkern.QuantizedLinear.from_linear(nn.Linear(128, 64), double_quant=double_quant)
    state = ours.state_dict()
    stats = {k: v for k, v in state.items() if k.startswith("weight.")}
    import bitsandbytes

    theirs = bitsandbytes.nn.Params4bit.from_prequantized(
        state["weight"], stats, requires_grad=False, device="cpu"
    )
    dense = bnb.dequantize_4bit(theirs.data, theirs.quant_state)
    assert torch.equal(dense, ours.weight.dequantize())


@pytest.mark.parametrize("double_quant", [True, False])
def test_state_dict_of_linear4bit_opens_here(double_quant: bool) -> None:
    import bitsandbytes

    torch.manual_seed(0)
    theirs = bitsandbytes.nn.Linear4bit(
        128, 64, quant_type="nf4", compress_statistics=double_quant
    ).to("cpu")
    ours = qkern.QuantizedLinear.from_linear(nn.Linear(128, 64))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    expected = bnb.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)
    assert torch.equal(ours.weight.dequantize(), expected)
