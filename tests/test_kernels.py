"""Triton kernels in Triton's interpreter, byte for byte against the reference. No GPU needed."""

from __future__ import annotations

import importlib
import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from qkern import reference
from qkern.formats import QuantFormat

pytest.importorskip("triton")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# one value; odd; less than a block; ragged; several programs
NUMELS = (1, 63, 200, 4096, 5001)


@pytest.fixture(scope="module")
def dequantize() -> ModuleType:
    """The kernel, interpreted: triton reads the variable when a kernel is defined."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        importlib.import_module("qkern.kernels.rounding")
        yield importlib.import_module("qkern.kernels.dequantize").dequantize
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]


# Rows of one value, odd, of several programs.
ROWS = [("int8_row", row, False) for row in (1, 63, 172, 3000)]
BLOCKS = itertools.product(("nf4", "fp4", "int8"), (64, 256), (True, False))


@pytest.mark.parametrize(("quant_type", "blocksize", "double_quant"), [*BLOCKS, *ROWS])
def test_dequantize_writes_the_references_bytes(
    dequantize: ModuleType, quant_type: str, blocksize: int, double_quant: bool
) -> None:
    fmt = QuantFormat(quant_type, blocksize, double_quant)
    for numel in NUMELS:
        parts = reference.quantize(torch.randn(numel), fmt)
        if not double_quant:  # a scale may be negative
            parts = parts._replace(absmax=parts.absmax * torch.randn(parts.absmax.shape).sign())
        for dtype in DTYPES:
            got = dequantize(*parts, fmt, numel, dtype)
            assert torch.equal(got, reference.dequantize(parts, fmt, numel, dtype))


def test_kernels_compile_ahead_of_time_without_fused_products() -> None:
    worker = Path(__file__).with_name("compile_kernels.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, str(worker)],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("compiled: ") == 20
