"""``F.linear`` where any of its operands is quantized."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import qkern


@pytest.mark.parametrize("quantized", ["x", "weight", "bias", "x bias", "weight bias"])
def test_each_operand_of_f_linear_may_be_quantized(quantized: str) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = {"x": (3, 64), "weight": (128, 64), "bias": (128,)}
    dense = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    given: dict[str, torch.Tensor] = dict(dense)
    for name in quantized.split():
        given[name] = qkern.quantize(dense[name])
        dense[name] = given[name].dequantize()
    torch.testing.assert_close(
        functional.linear(*given.values()), functional.linear(*dense.values())
    )
