"""The reference itself: what it computes is compared with everywhere else."""

from __future__ import annotations

import pytest
import torch

from qkern import reference
from qkern.formats import QuantFormat


@pytest.mark.parametrize(
    ("quant_type", "double_quant"),
    [("nf4", True), ("fp4", False), ("int8", True), ("int8", False), ("int8_row", False)],
)
def test_values_stay_on_their_device_whatever_the_default_is(
    quant_type: str, double_quant: bool
) -> None:
    values = torch.randn(7, 70)
    fmt = QuantFormat(quant_type, 64, double_quant).for_shape(values.shape)
    right = reference.quantize(values, fmt)
    dense = reference.dequantize(right, fmt, 490, torch.bfloat16)
    with torch.device("meta"):
        assert torch.ones(1).is_meta
        parts = reference.quantize(values, fmt)
        again = reference.dequantize(parts, fmt, 490, torch.bfloat16)
        nothing = reference.quantize_absmax(right.absmax[:0].float())
    for mine, other in zip((*parts, again), (*right, dense), strict=True):
        assert mine is other is None or torch.equal(mine, other)
    assert [t.device.type for t in nothing] == ["cpu"] * 3
    assert nothing[2].tolist() == [0.0]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_searched_scales_stay_on_the_device_of_the_values(quant_type: str, weighted: bool) -> None:
    values, fmt = torch.randn(4, 64), QuantFormat(quant_type, 64, double_quant=False)
    importance = torch.rand(64) if weighted else None
    right = reference.search_scales(values, fmt, importance)
    codes = reference.encode(values, right, fmt)
    with torch.device("meta"):
        scales = reference.search_scales(values, fmt, importance)
        assert torch.equal(reference.encode(values, scales, fmt), codes)
    assert torch.equal(scales, right)
