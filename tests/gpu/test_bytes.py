"""The bytes that a GPU writes are those of the host, for every format and dtype."""

from __future__ import annotations

import itertools

import cases
import numpy as np
import pytest
import torch
from kernel_device import DEVICE, on_device, same_bytes
from torch import Tensor

import qkern
from qkern import reference
from qkern.formats import QuantFormat

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KINDS = [
    *itertools.product(("nf4", "fp4", "int8"), (32, 64, 256, 4096), (False, True)),
    ("int8_row", 64, False),
]
# Rows of whole blocks; blocks across rows, an odd count; more programs than multiprocessors.
SHAPES = ((96, 512), (129, 333), (2048, 1536))


def assert_same_parts(got: qkern.QuantizedTensor, right: qkern.QuantizedTensor) -> None:
    assert got.format == right.format
    for name, mine, expected in zip(got.parts._fields, got.parts, right.parts, strict=True):
        if mine is None or expected is None:
            assert mine is expected, name
        else:
            assert same_bytes(mine, expected), name


@pytest.mark.case("B10")
@pytest.mark.parametrize(("quant_type", "blocksize", "double_quant"), KINDS)
def test_quantize_and_dequantize_have_the_hosts_bytes(
    quant_type: str, blocksize: int, double_quant: bool
) -> None:
    kind = {"quant_type": quant_type, "blocksize": blocksize, "double_quant": double_quant}
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        values = torch.randn(shape).to(dtype)
        right = qkern.quantize(values, **kind)
        got = qkern.quantize(values.to(DEVICE), **kind)
        assert got.device == DEVICE
        assert_same_parts(got, right)
        for out in DTYPES:
            assert same_bytes(got.dequantize(out), right.dequantize(out))
        assert_same_parts(right.to(DEVICE), right)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int8", "int8_row"])
def test_values_that_are_hard_to_quantize_have_the_hosts_bytes(quant_type: str) -> None:
    """Ties, zeros of both signs, subnormal and huge values, spikes."""
    patterns = cases.value_patterns(3 * 4099, np.random.default_rng(0))
    for (name, bits), dtype in itertools.product(patterns, cases.DTYPES):
        values = cases.as_tensor(cases.as_bits(bits, dtype), dtype).reshape(3, 4099)
        right = qkern.quantize(values, quant_type, double_quant=False)
        got = qkern.quantize(values.to(DEVICE), quant_type, double_quant=False)
        for mine, expected in zip(got.parts[:2], right.parts[:2], strict=True):
            assert same_bytes(mine, expected), (name, dtype)
        for out in DTYPES:
            assert same_bytes(got.dequantize(out), right.dequantize(out)), (name, dtype, out)


def test_a_given_output_gets_the_bytes_without_a_copy() -> None:
    q = qkern.quantize(torch.randn(2048, 1536), "nf4").to(DEVICE)
    out = torch.full((2048, 1536), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    expected = q.dequantize(torch.bfloat16)  # compiles
    torch.cuda.reset_peak_memory_stats(DEVICE)
    before = torch.cuda.memory_allocated(DEVICE)
    assert qkern.dequantize(q, out=out) is out
    assert torch.cuda.max_memory_allocated(DEVICE) - before < out.nbytes // 2
    assert same_bytes(out, expected)


def decoded_on_both(parts: reference.Parts, fmt: QuantFormat, numel: int) -> list[Tensor]:
    """For each dtype the device's values, then the reference's."""
    found = []
    for dtype in DTYPES:
        there = qkern.QuantizedTensor.from_parts(on_device(parts), fmt, (numel,), dtype)
        found += [there.dequantize(), reference.dequantize(parts, fmt, numel, dtype)]
    return found


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int8"])
def test_every_code_and_every_kind_of_scale_decodes_to_the_references_bytes(
    quant_type: str,
) -> None:
    """All bytes; scales of both signs, zero, subnormal, infinite; every 8-bit scale."""
    fmt = QuantFormat(quant_type, 64, double_quant=False)
    blocks = 257
    numel = blocks * 64
    packed = torch.arange(fmt.packed_size(numel)).to(torch.uint8)
    packed = packed.view(torch.int8) if fmt.bits == 8 else packed
    absmax = torch.randn(blocks) * 10.0 ** torch.empty(blocks).uniform_(-30, 30)
    absmax[:6] = torch.tensor([0.0, -0.0, 1e-40, -3e-45, torch.inf, 3e38])
    with_fp32_scales = reference.Parts(packed, absmax, None, None)
    nested = torch.tensor([0.37, 1e-3])
    codes = torch.arange(blocks).to(torch.uint8)
    with_8_bit_scales = reference.Parts(packed, codes, nested, torch.tensor([0.11]))
    for parts in (with_fp32_scales, with_8_bit_scales):
        fmt = fmt.replace(double_quant=parts.nested_absmax is not None)
        values = decoded_on_both(parts, fmt, numel)
        for got, right in zip(values[::2], values[1::2], strict=True):
            finite = right.isfinite()  # infinity times zero: a NaN of any bits
            assert same_bytes(got.cpu()[finite], right[finite])
            assert torch.equal(got.cpu().isnan(), right.isnan())


def test_a_searched_weight_has_no_larger_error_than_the_hosts() -> None:
    values = torch.randn(256, 512)
    there = qkern.quantize(values.to(DEVICE), method="search").dequantize().cpu()
    here = qkern.quantize(values, method="search").dequantize()
    errors = [float((found - values).square().mean()) for found in (there, here)]
    assert errors[0] <= errors[1] * 1.001


def test_what_is_not_finite_is_named_or_kept() -> None:
    values = torch.randn(200, device=DEVICE)
    values[[70, 130]] = torch.inf
    with pytest.raises(qkern.NonFiniteError, match=r"2 of 200 .* flat index 70"):
        qkern.quantize(values)
    kept = qkern.quantize(values, double_quant=False, nonfinite="keep")
    assert kept.absmax.isfinite().tolist() == [True, False, False, True]


def test_the_reference_decodes_on_the_device_as_on_the_host() -> None:
    """It is what GPUs without kernels run."""
    for quant_type in ("nf4", "int8"):
        fmt = QuantFormat(quant_type, 64)
        parts = reference.quantize(torch.randn(5000), fmt)
        for dtype in DTYPES:
            got = reference.dequantize(on_device(parts), fmt, 5000, dtype)
            assert same_bytes(got, reference.dequantize(parts, fmt, 5000, dtype))
