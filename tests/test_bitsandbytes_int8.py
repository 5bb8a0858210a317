"""int8 rows: bytes equal to bitsandbytes' CPU encoder on every SIMD body; its files, both ways."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import torch
from cases import as_bits, as_tensor, value_patterns
from torch import nn

import qkern
from qkern import _native, reference
from qkern.formats import DTYPES

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes.functional as bnb

BODIES = _native.available_simd()


def int8_ties(n: int) -> np.ndarray:
    """Values halfway between two codes of a row whose largest is 2794 = 11 * 254.

    fp32(127 / 2794) is an ulp above 127 * fp32(1 / 2794): the two send 56 of 127 ties apart.
    """
    return np.resize(np.append(2794, 11 * np.arange(1, 254, 2)), n).astype(np.float32)


@pytest.mark.parametrize("body", BODIES)
def test_int8_rows_equal(body: str, tell: Callable[[str], None]) -> None:
    """``int8_vectorwise_quant``: codes and absmax of rows of any length."""
    rng, count = np.random.default_rng(0), 0
    for row in (1, 2, 31, 64, 65, 100, 172, 1000, 4099):
        for name, values in [*value_patterns(5 * row, rng), ("int8_ties", int8_ties(5 * row))]:
            for dtype in DTYPES:
                bits = as_bits(values, dtype)
                packed, absmax = np.empty(bits.size, np.int8), np.empty(5, np.float32)
                _native.quantize_int8_rows(bits, dtype, row, packed, absmax, simd=body)
                codes, stats, _ = bnb.int8_vectorwise_quant(as_tensor(bits, dtype).reshape(5, row))
                where = f"{name}[{row}] {dtype}"
                np.testing.assert_array_equal(absmax, stats.numpy(), err_msg=where)
                # Below 1e-36, where 127 / absmax leaves fp32, a row is zeros here; bitsandbytes
                # casts infinity to int8, which C leaves undefined.
                tiny = (absmax < 1e-36) & (absmax > 0)
                packed = packed.reshape(5, row)
                assert not packed[tiny].any()
                np.testing.assert_array_equal(packed[~tiny], codes.numpy()[~tiny], err_msg=where)
                count += 1
    tell(f"{count} cases of int8 rows byte-equal to bitsandbytes on {body}")


def test_int8_rows_decode_within_two_ulps_of_bitsandbytes() -> None:
    """``q * (absmax / 127)`` against ``(q * absmax) / 127``; 2 is the maximum over all mantissas.

    Near the fp32 maximum bitsandbytes' order overflows, this one does not.
    """
    codes = torch.arange(-127, 128, dtype=torch.int8).repeat(512, 1)
    scales = torch.cat([torch.rand(500) + 1, torch.rand(11) * 1e-30, torch.tensor([0.0])])
    parts = reference.Parts(codes.reshape(-1), scales, None, None)
    ours = qkern.QuantizedTensor.from_parts(
        parts, qkern.QuantFormat("int8_row", 255), codes.shape, torch.float32
    ).dequantize()
    theirs = bnb.int8_vectorwise_dequant(codes, scales)
    ulps = (ours.view(torch.int32).long() - theirs.view(torch.int32)).abs()
    assert 0 < ulps.max() <= 2


def linear8bit(**settings: object) -> nn.Module:
    """A quantized ``Linear8bitLt``; bitsandbytes rounds to fp16 first."""
    import bitsandbytes

    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear8bitLt(100, 64, has_fp16_weights=False, **settings)
    return layer.to("cpu")


def test_state_dict_of_linear8bitlt_opens_here() -> None:
    theirs = linear8bit()
    torch.manual_seed(0)
    dense = nn.Linear(100, 64)
    ours = qkern.QuantizedLinear.from_linear(nn.Linear(100, 64), quant_type="int8_row")
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert torch.equal(ours.weight.packed, theirs.weight.data)
    assert torch.equal(ours.weight.absmax.reshape(-1), theirs.weight.SCB)
    with torch.no_grad():
        dense.weight.data = dense.weight.half()
    same = qkern.QuantizedLinear.from_linear(dense, quant_type="int8_row").state_dict()
    assert {k: (v.dtype, v.shape) for k, v in theirs.state_dict().items()} == {
        k: (v.dtype, v.shape) for k, v in same.items()
    }
    assert all(torch.equal(v, same[k]) for k, v in theirs.state_dict().items())


def test_our_state_dict_opens_in_linear8bitlt() -> None:
    ours = qkern.QuantizedLinear.from_linear(nn.Linear(100, 64), quant_type="int8_row")
    theirs = linear8bit()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    dense = bnb.int8_vectorwise_dequant(theirs.weight.data, theirs.weight.SCB)
    torch.testing.assert_close(dense, ours.weight.dequantize(), rtol=3e-7, atol=0)


def test_an_inspection_reads_the_file_of_a_linear8bitlt(tmp_path: Path) -> None:
    torch.manual_seed(0)
    w = nn.Linear(100, 64).weight.detach()  # that of linear8bit
    state = linear8bit().state_dict()
    stored = checkpoints.write(
        tmp_path / "stored", {f"l.{key}": tensor for key, tensor in state.items()}
    )
    alone = qkern.inspect_checkpoint(stored)
    assert alone.is_quantized
    assert [r.name for r in alone.tensors] == ["l.bias", "l.weight"]
    got = checkpoints.row(alone, "l.weight")
    assert (got.shape, got.format) == ((64, 100), qkern.QuantFormat("int8_row", 100))
    assert (got.dtype, got.bits_per_weight) == ("float16", 8 + 32 / 100)
    assert got.scales is not None
    assert (got.scales.blocks, got.scales.max_abs) == (64, float(state["SCB"].max()))
    assert (got.scales.group_ratio, got.scales.turned) == (None, 0)
    codes = state["weight"].long().reshape(-1)
    assert got.scales.code_counts == tuple(torch.bincount(codes + 128, minlength=256).tolist())
    compared = qkern.inspect_checkpoint(
        stored,
        compare=checkpoints.write(tmp_path / "dense", {"l.weight": w, "l.bias": state["bias"]}),
    )
    error = checkpoints.row(compared, "l.weight").error
    assert error is not None
    theirs = state["weight"].double() * state["SCB"].double()[:, None] / 127
    rows = (theirs - w).norm(dim=1) / w.double().norm(dim=1)
    assert (error.per_row, error.worst_blocks[0].block) == (True, int(rows.argmax()))
    assert error.worst_blocks[0].relative_rms == pytest.approx(float(rows.max()), rel=1e-5)
