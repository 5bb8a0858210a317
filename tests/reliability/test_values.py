"""NaN, infinity, zeros, scales in 8 bits: bounded errors, never silently lost."""

from __future__ import annotations

import pytest
import torch
from bodies import BODIES, decoded_scales, encode_on, same_bits
from format_cases import FLOATS, QUANT_TYPES
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qkern

# -- NaN and infinity ------------------------------------------------------------------------


@pytest.mark.case("B1", "B2")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("quant_type", "method"),
    [
        *((quant_type, "absmax") for quant_type in (*QUANT_TYPES, "int8_row")),
        ("nf4", "search"),
        ("fp4", "search"),
    ],
)
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_value_that_is_not_finite_stays_in_its_block(
    bad: float, quant_type: str, method: str, double_quant: bool
) -> None:
    generator = torch.Generator().manual_seed(1)
    block = 300 if quant_type == "int8_row" else 64
    for dtype in FLOATS:
        values = torch.randn(64, 300, generator=generator).to(dtype)
        settings = {"quant_type": quant_type, "double_quant": double_quant, "method": method}
        at = int(torch.randint(values.numel(), (), generator=generator))
        clean = qkern.quantize(values, **{**settings, "double_quant": False}).dequantize()
        values.reshape(-1)[at] = bad
        with pytest.raises(qkern.NonFiniteError, match=rf"in 1 of the values.*index {at}:"):
            qkern.quantize(values, **settings)
        q = qkern.quantize(values, **settings, nonfinite="keep")
        assert not q.format.double_quant  # 8 bits have no code for such a scale
        dense = q.dequantize().reshape(-1)
        others = torch.arange(values.numel()) // block != at // block
        assert same_bits(dense[others], clean.reshape(-1)[others])
        assert not dense[at].isfinite()
        if dtype == torch.float32:
            array = qkern.quantize(values.numpy(), **settings, nonfinite="keep")
            assert same_bits(torch.from_numpy(qkern.dequantize(array)).reshape(-1), dense)


@pytest.mark.case("B1", "B2")
def test_the_layer_is_named_and_may_be_kept() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        model[1].weight[2, 3], model[1].weight[5, 0] = float("nan"), float("inf")
    with pytest.raises(qkern.NonFiniteError, match=r"1\.weight: .*in 2 of .*index 131"):
        qkern.quantize_model(model)
    qkern.quantize_model(model, nonfinite="keep")
    assert model[1].weight.dequantize()[6:].isfinite().all()


# -- zeros, scales in 8 bits -----------------------------------------------------------------


@pytest.mark.case("B3")
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
def test_zeros_are_exact_and_their_scale_is_0(
    quant_type: str, double_quant: bool, dtype: torch.dtype
) -> None:
    some = torch.randn(8, 64).to(dtype)
    some[3] = 0
    for values in (torch.zeros(8, 64, dtype=dtype), torch.zeros(70, dtype=dtype), some):
        q = qkern.quantize(values, quant_type, double_quant=double_quant)
        empty = (values == 0).reshape(-1)
        dense = q.dequantize().reshape(-1)
        assert same_bits(dense[empty], torch.zeros_like(dense[empty]))
        plain = qkern.quantize(values, quant_type, double_quant=False)
        # a ragged last block has bitsandbytes' floor instead, 1e-38
        assert plain.absmax.reshape(-1)[int(empty.nonzero()[0]) // 64] == 0
        for body in BODIES:
            packed, absmax = encode_on(body, values, plain.format)
            assert same_bits(packed, plain.packed)
            assert same_bits(absmax, plain.absmax)


@pytest.mark.case("B4", "B6")
@given(
    rows=st.integers(1, 40),
    blocks=st.integers(1, 24),
    spread=st.floats(0, 6),
    outlier=st.sampled_from((0.0, 10.0, 1e4, 1e30)),
    quant_type=st.sampled_from(QUANT_TYPES),
    method=st.sampled_from(("absmax", "search")),
    seed=st.integers(0, 999),
)
def test_scales_in_8_bits_keep_their_sign_and_size(
    rows: int,
    blocks: int,
    spread: float,
    outlier: float,
    quant_type: str,
    method: str,
    seed: int,
) -> None:
    """Rows up to 10^6 apart and one huge value: the scales stay right, in 8 bits or in 32."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, 64 * blocks, generator=generator)
    values *= 10 ** (spread * (torch.rand(rows, 1, generator=generator) - 0.5))
    if outlier:
        values[0, 0] = outlier
    method = "absmax" if quant_type == "int8" else method
    q = qkern.quantize(values, quant_type, method=method)
    exact = qkern.quantize(values, quant_type, method=method, double_quant=False)
    scales, expected = decoded_scales(q), exact.absmax.reshape(-1)
    assert (scales.sign() == expected.sign()).all()  # a searched scale may be negative
    assert method == "search" or (scales >= 0).all()
    assert ((scales - expected).abs() <= expected.abs() / 8).all()
    dense = q.dequantize()
    assert (dense.sign() * values.sign() >= 0).all()
    # 1/8 off at most, on top of what fp32 scales give
    bound = exact.dequantize().sub(values).norm(dim=1) + dense.norm(dim=1) / 7
    assert (dense.sub(values).norm(dim=1) <= bound).all()


@pytest.mark.case("B4", "B6")
def test_rows_1000_apart_are_as_good_as_with_fp32_scales_and_reported() -> None:
    layer = nn.Linear(256, 64)
    with torch.no_grad():
        layer.weight[::2] *= 1e-3
    dense = layer.weight.detach().clone()
    report = qkern.quantize_model(model := nn.Sequential(layer))
    assert "fp32 scales" in report.rows[0].reason
    error = (model[0].weight.dequantize() - dense).norm(dim=1) / dense.norm(dim=1)
    assert error.max() < 0.12


@pytest.mark.case("B5")
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("size", [1.0, 0.1, 3e-5, 3e38])
def test_scales_that_are_all_equal_are_exact(groups: int, size: float) -> None:
    values = torch.full((groups * 256, 64), size)
    for quant_type in QUANT_TYPES:
        q = qkern.quantize(values, quant_type)
        assert q.format.double_quant
        assert same_bits(decoded_scales(q), values[:, 0].contiguous())
        assert same_bits(q.dequantize(), qkern.quantize(values, q.format).dequantize())


@pytest.mark.case("B5")
def test_groups_of_equal_scales_that_differ_from_each_other_stay_near() -> None:
    values = torch.ones(512, 64)
    values[256:] = 0.5
    q = qkern.quantize(values, double_quant=True)
    # the table has +1 but no -1: the nearest is -0.99297, of a distance of 0.25 to the mean
    assert (decoded_scales(q) - values[:, 0]).abs().max() < 0.01 * 0.25
    assert same_bits(decoded_scales(q)[:256], values[:256, 0].contiguous())
