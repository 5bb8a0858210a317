"""The dequantize kernel, byte for byte against the reference on the host."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernel_device import DEVICE, HOST, on_device, same_bytes

from qkern import reference
from qkern.formats import QuantFormat

pytest.importorskip("triton")
from qkern.kernels.dequantize import dequantize

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# one value; odd; less than a block; ragged; several programs
NUMELS = (1, 63, 200, 4096, 5001)
# Rows of one value, odd, of several programs.
ROWS = [("int8_row", row, False) for row in (1, 63, 172, 3000)]
BLOCKS = itertools.product(("nf4", "fp4", "int8"), (64, 256), (True, False))


@pytest.mark.parametrize(("quant_type", "blocksize", "double_quant"), [*BLOCKS, *ROWS])
def test_dequantize_writes_the_references_bytes(
    quant_type: str, blocksize: int, double_quant: bool
) -> None:
    fmt = QuantFormat(quant_type, blocksize, double_quant)
    for numel in NUMELS:
        with HOST:
            parts = reference.quantize(torch.randn(numel), fmt)
            if not double_quant:  # a scale may be negative
                parts = parts._replace(absmax=parts.absmax * torch.randn(parts.absmax.shape).sign())
            right = {dtype: reference.dequantize(parts, fmt, numel, dtype) for dtype in DTYPES}
        parts = on_device(parts)
        for dtype in DTYPES:
            # A value that is not written stays NaN; one too many is seen behind the end.
            memory = torch.full((numel + 64,), torch.nan, dtype=dtype, device=DEVICE)
            got = dequantize(*parts, fmt, numel, dtype, out=memory[:numel])
            assert same_bytes(got, right[dtype])
            assert memory[numel:].isnan().all()
