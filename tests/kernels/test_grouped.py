"""Products of rows that are sorted by expert, in one launch, against fp64."""

from __future__ import annotations

import pytest
import torch
from kernel_device import DEVICE, HOST, SUMS, on_device
from kernel_errors import within
from kernel_memory import guarded
from torch import Tensor

from qkern import reference
from qkern.formats import QuantFormat

pytest.importorskip("triton")
from qkern.kernels import launch
from qkern.kernels.grouped import grouped

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
# offsets; rows, and what is stored of an expert; format; dtype
SETTINGS = [
    ([3, 3, 40, 41], 41, (70, 128), QuantFormat("nf4", 64), BF16),  # no row, many, one
    ([0, 0, 5], 9, (33, 96), QuantFormat("fp4", 32, double_quant=False), FP32),  # a rest
    ([20, 20, 20, 20, 20], 20, (64, 256), QuantFormat("nf4", 256), FP16),  # all of one expert
    ([1, 2, 3], 3, (65, 64), QuantFormat("int8", 64), BF16),
    ([17, 34], 34, (40, 77), QuantFormat("int8_row"), FP32),  # rows that are no whole tiles
    ([70], 70, (16, 64), QuantFormat("nf4", 32), BF16),  # one expert
]


def exact_product(
    x: Tensor, weight: Tensor, offsets: list[int], bias: Tensor | None, *, transposed: bool
) -> Tensor:
    bias = None if bias is None else bias.double()
    return reference.grouped_linear(
        x.double(), weight.double(), torch.tensor(offsets), bias, transposed=transposed
    )


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_rows_of_each_expert_are_multiplied_as_fp64_does(setting: tuple, transposed: bool) -> None:
    offsets, M, (rows, columns), fmt, dtype = setting
    experts = len(offsets)
    shape = (experts * rows, columns)
    fmt = fmt.for_shape(shape)
    with HOST:
        parts = reference.quantize(torch.randn(shape) / columns**0.5, fmt)
        dense = reference.dequantize(parts, fmt, shape[0] * shape[1], dtype)
    dense = dense.reshape(experts, rows, columns).to(DEVICE)
    N, K = (columns, rows) if transposed else (rows, columns)
    x, bias = torch.randn(M, K).to(dtype), torch.randn(experts, N) if M % 2 else None
    weight = launch.weight(*on_device(parts), fmt, shape)
    with guarded():
        y = grouped(x, torch.tensor(offsets), weight, experts, bias, transposed=transposed)
    right = exact_product(x, dense, offsets, bias, transposed=transposed)
    assert y.dtype == dtype
    assert not y[offsets[-1] :].any()
    error = float((y.double() - right).abs().max() / right.square().mean().sqrt())
    bound = 3e-6 * SUMS + (0 if dtype == FP32 else 4 * torch.finfo(dtype).eps)
    assert within("y, grouped", dtype, error, bound)


def test_offsets_that_leave_the_rows_or_fall_write_nowhere_else() -> None:
    """The host does not look at them: it would have to wait for the device."""
    fmt = QuantFormat("nf4", 64)
    with HOST:
        parts = reference.quantize(torch.randn(3 * 16, 64), fmt)
    weight = launch.weight(*on_device(parts), fmt, (3 * 16, 64))
    x = torch.randn(10, 64)
    with guarded():
        y = grouped(x, torch.tensor([4, 2, 99]), weight, 3)
    assert torch.equal(y, grouped(x, torch.tensor([4, 4, 10], dtype=torch.int32), weight, 3))
    assert grouped(x[:0], torch.tensor([0, 0, 0]), weight, 3).shape == (0, 16)
