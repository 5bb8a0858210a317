"""The quantize kernels, byte for byte against the host's codec."""

from __future__ import annotations

import cases
import numpy as np
import pytest
import torch
from kernel_device import DEVICE, same_bytes
from kernel_memory import guarded

from qkern.formats import QuantFormat
from qkern.ops import host

pytest.importorskip("triton")
import triton.language as tl

from qkern.kernels import rounding
from qkern.kernels.quantize import encode, quantize
from qkern.kernels.quantize_absmax import quantize_absmax

PATTERNS = dict(cases.value_patterns(2099, np.random.default_rng(0)))
DTYPES = ("float32", "float16", "bfloat16")


def check(values: torch.Tensor, fmt: QuantFormat, nonfinite: str = "error") -> None:
    packed, absmax = host.quantize(values.cpu(), fmt, nonfinite)
    with guarded():
        got = quantize(values.to(DEVICE), fmt)
    assert same_bytes(got[0], packed)
    assert same_bytes(got[1], absmax)


@pytest.mark.case("B10")
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int8", "int8_row"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_quantize_writes_the_hosts_bytes(pattern: str, quant_type: str) -> None:
    # every pattern in one dtype and blocksize; all pairs of them occur
    turn = list(PATTERNS).index(pattern)
    dtype, blocksize = DTYPES[turn % 3], (32, 64, 256, 4096)[turn % 4]
    values = cases.as_tensor(cases.as_bits(PATTERNS[pattern], dtype), dtype)
    check(values, QuantFormat(quant_type, blocksize, double_quant=False).for_shape(values.shape))


@pytest.mark.case("A3")
@pytest.mark.parametrize("length", [0, *cases.LENGTHS])
def test_quantize_writes_the_hosts_bytes_at_every_length(length: int) -> None:
    """Fewer blocks than a program takes, ragged last blocks, odd counts: nothing beyond the end."""
    for dtype, blocksize in zip(DTYPES[:2], (32, 2048), strict=True):
        values = torch.randn(length).to(getattr(torch, dtype))
        for quant_type in ("nf4", "fp4", "int8"):
            check(values, QuantFormat(quant_type, blocksize, double_quant=False))


@pytest.mark.interpreter("how another version of Triton divides")
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int8", "int8_row"])
def test_quotients_of_fp64_give_the_same_bytes(
    quant_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of zeros and of subnormal numbers; the last one, and its scale, are ragged."""
    monkeypatch.setattr(rounding, "_DIV_RN", tl.constexpr(False))
    values = torch.randn(16, 67)
    values[1], values[2:5] = 0, values[2:5] * 1e-39
    check(values, QuantFormat(quant_type, 64, double_quant=False).for_shape(values.shape))
    absmax = torch.randn(999).abs() * 1e-38
    codes, nested, offset, _ = host.quantize_absmax(absmax)
    for mine, right in zip(quantize_absmax(absmax), (codes, nested, offset), strict=False):
        assert same_bytes(mine, right)


# one value; less than a chunk; a chunk and one more
@pytest.mark.parametrize(("rows", "columns"), [(3, 1), (5, 172), (2, 4097)])
def test_rows_have_the_hosts_bytes(rows: int, columns: int) -> None:
    fmt = QuantFormat("int8_row").for_shape((rows, columns))
    for dtype in DTYPES:
        check(torch.randn(rows, columns).to(getattr(torch, dtype)), fmt)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, at infinity times 0
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_in_their_blocks(dtype: str) -> None:
    values = torch.randn(64 * 5 + 7)
    # a NaN of either sign; infinities; both in one block; in the ragged end, before an odd count
    values[[3, 64 * 2 + 1, 64 * 2 + 9, 64 * 4 + 63, 64 * 5]] = torch.tensor(
        [-torch.nan, torch.inf, torch.nan, -torch.inf, torch.nan]
    )
    for quant_type in ("nf4", "fp4", "int8"):
        fmt = QuantFormat(quant_type, 64, double_quant=False)
        check(values.to(getattr(torch, dtype)), fmt, "keep")
    check(
        values.to(getattr(torch, dtype)), fmt.replace(quant_type="int8_row", blocksize=109), "keep"
    )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, where a quotient overflows
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_codes_against_given_scales_are_the_hosts(quant_type: str) -> None:
    """Of either sign; zero, and below the smallest that is divided by."""
    for dtype, blocksize in zip(DTYPES, (32, 64, 1024), strict=True):
        fmt = QuantFormat(quant_type, blocksize, double_quant=False)
        values = torch.randn(4099).to(getattr(torch, dtype))
        scales = torch.randn(fmt.num_blocks(4099))
        scales[:4] = torch.tensor([0.0, -0.0, -1e-39, 1e-39])
        with guarded():
            got = encode(values, scales, fmt)
        assert same_bytes(got, host.encode(values.cpu(), scales.cpu(), fmt))


@pytest.mark.case("B10")
# one scale; a group less one, whole, and one more; more groups than a program sums
@pytest.mark.parametrize("blocks", [0, 1, 255, 256, 257, 9000])
def test_scales_in_8_bits_are_the_hosts(blocks: int) -> None:
    spread = 10 ** torch.empty(blocks).uniform_(-6, 6)
    for absmax in (torch.rand(blocks), spread, torch.randn(blocks), torch.zeros(blocks)):
        with guarded():
            got = quantize_absmax(absmax)
        *parts, safe = host.quantize_absmax(absmax.cpu())
        for mine, right in zip(got, (*parts, torch.tensor([safe])), strict=True):
            assert same_bytes(mine, right)


def test_the_mean_of_scales_is_summed_in_the_hosts_order() -> None:
    """Next to a tie of fp32: only sums value by value, and group by group, lose what is small."""
    tie, small = 1 + 2.0**-24, 2.0**-53
    in_a_group = torch.tensor([1.0, tie - 1, *[small] * 6])
    between_groups = torch.zeros(8, 256)
    between_groups[:, 0] = in_a_group
    for absmax in (in_a_group, between_groups.reshape(-1)):
        in_order = torch.tensor([1 / absmax.numel()])
        assert float(in_order) != float(torch.tensor((tie + 6 * small) / absmax.numel()))
        _, _, offset, _ = quantize_absmax(absmax)
        assert torch.equal(offset, in_order)
        assert torch.equal(host.quantize_absmax(absmax.cpu())[2], in_order.cpu())
