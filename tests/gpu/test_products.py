"""Products with the tiles that the tables choose for this GPU, against fp64."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from gpu_work import BOUNDS, error, exact_step, layer, step
from kernel_device import DEVICE
from kernel_products import DTYPES, Product, product, random_weight, worst_error

import qkern
from qkern.formats import QuantFormat

pytest.importorskip("triton")
from qkern.kernels import launch
from qkern.kernels.dequantize import dequantize
from qkern.kernels.dequantize_merged import dequantize_merged
from qkern.kernels.linear import config_for, linear
from qkern.kernels.linear_backward import linear_backward
from qkern.kernels.matmul_backward import matmul_backward

FP32, FP16, BF16 = DTYPES
# Ends that fill no tile: N of none, K of whole blocks of 64 alone.
N, K = 1000, 1088
# One token; each kind of tile, at its edges; more than kernels take in forward.
TOKENS = (1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 511, 512)
# format, blocksize, 8-bit scales, dtype, rank, dtype of the adapter, bias
SETTINGS = [
    ("nf4", 64, True, BF16, 0, None, False),
    ("nf4", 64, True, BF16, 16, BF16, True),
    ("nf4", 64, True, FP16, 17, FP32, False),
    ("nf4", 32, False, FP32, 3, FP32, True),
    ("fp4", 64, True, BF16, 64, FP32, False),
    ("fp4", 64, False, FP16, 0, None, True),
    ("int8", 64, True, BF16, 1, BF16, False),
    ("int8", 32, False, FP16, 8, FP16, True),
    ("int8_row", 64, False, BF16, 16, FP32, True),
    ("int8_row", 64, False, FP32, 0, None, False),
]


def errors_of_first_tokens(most: Product, tokens: Iterable[int]) -> dict[int, float]:
    """In units of the bound, for the first M rows of x; those that kernels serve."""
    rows, columns = most.dense.shape
    unrounded = dequantize(*most.parts, most.fmt, rows * columns, FP32).reshape(rows, columns)
    errors = {}
    for M in tokens:
        config = config_for(DEVICE, most.x.dtype, M, rows, columns)
        if config is None:
            continue
        h = None if most.h is None else most.h[:M].contiguous()
        operands = most._replace(x=most.x[:M].contiguous(), h=h)
        y = linear(operands.x, operands.weight, operands.bias, h, operands.lora_B)
        if config.op == "matvec":  # never rounds its weight
            operands = operands._replace(dense=unrounded)
        errors[M] = worst_error(y, operands)
    return errors


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_every_number_of_tokens_is_multiplied_as_in_fp64(setting: tuple) -> None:
    quant_type, blocksize, double_quant, dtype, rank, adapter, bias = setting
    kind = {"quant_type": quant_type, "blocksize": blocksize, "double_quant": double_quant}
    about = {"dtype": dtype, "rank": rank, "adapter": adapter, "bias": bias}
    most = product(max(TOKENS), N, K, **kind, **about)
    errors = errors_of_first_tokens(most, TOKENS)
    assert len(errors) >= 5
    assert max(errors.values()) <= 1, errors


@pytest.mark.parametrize("shape", [(64, 64), (1, 64), (7, 8192), (5000, 128), (65, 4096)], ids=str)
def test_shapes_that_leave_most_of_a_gpu_idle_or_fill_it_often(shape: tuple[int, int]) -> None:
    errors = errors_of_first_tokens(product(300, *shape, rank=4, bias=True), (1, 7, 40, 300))
    assert len(errors) == 4
    assert max(errors.values()) <= 1, errors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int8", "int8_row"])
def test_gradients_of_the_input_are_those_of_fp64(quant_type: str, dtype: torch.dtype) -> None:
    fmt = QuantFormat(quant_type).for_shape((N, K))
    parts, dense = random_weight(N, K, fmt, dtype)
    weight = launch.weight(*parts, fmt, (N, K))
    A, B = torch.randn(9, K, device=DEVICE), torch.randn(N, 9, device=DEVICE) / 3
    for M in (1, 3, 16, 17, 64, 65, 200, 520):
        grad = torch.randn(M, N, device=DEVICE).to(dtype)
        right = grad.double() @ dense.double()
        assert error(matmul_backward(grad, weight), right) <= BOUNDS[dtype], M
        got = linear_backward(grad, weight, A, B, 0.5)
        right += 0.5 * grad.double() @ B.double() @ A.double()
        assert error(got, right) <= BOUNDS[dtype], M


@pytest.mark.parametrize("rank", [1, 16, 64, 100])
def test_a_merged_weight_is_that_of_fp64(rank: int) -> None:
    fmt = QuantFormat("nf4", 64)
    parts, dense = random_weight(N, K, fmt, FP32)
    A, B = torch.randn(rank, K, device=DEVICE), torch.randn(N, rank, device=DEVICE) / 30
    right = dense.double() + 0.5 * B.double() @ A.double()
    for dtype in DTYPES:
        got = dequantize_merged(launch.weight(*parts, fmt, (N, K)), A, B, 0.5, dtype)
        assert error(got, right) <= BOUNDS[dtype]


@pytest.mark.parametrize(
    ("dtype", "adapter", "quant_type"),
    [(BF16, FP32, "nf4"), (BF16, BF16, "nf4"), (FP16, FP32, "int8"), (FP32, FP32, "fp4")],
    ids=str,
)
def test_a_layer_and_its_gradients_equal_fp64(
    dtype: torch.dtype, adapter: torch.dtype, quant_type: str
) -> None:
    made = layer(N, K, dtype=dtype, adapter=adapter, quant_type=quant_type)
    for M in (1, 2, 7, 64, 300, 700):
        x = torch.randn(M, K, device=DEVICE).to(dtype)
        grad = torch.randn(M, N, device=DEVICE).to(dtype)
        found, right = step(made, x, grad), exact_step(made, x, grad)
        # An adapter in 16 bits rounds h, G and its own gradients.
        bounds = [BOUNDS[dtype]] * 2 + [max(BOUNDS[dtype], BOUNDS[adapter])] * 2
        for name, got, expected, bound in zip(found._fields, found, right, bounds, strict=True):
            assert error(got, expected) <= bound, (M, name)


def test_blocks_that_cross_rows_and_float64_are_multiplied_densely() -> None:
    crossing = qkern.quantize(torch.randn(60, 96, device=DEVICE))
    x = torch.randn(5, 96, device=DEVICE)
    exact = x.double() @ crossing.dequantize(FP32).double().mT
    assert error(qkern.linear(x, crossing), exact) <= BOUNDS[FP32]
    assert error(qkern.linear(x.double(), crossing), exact) <= 1e-12
    made = qkern.quantize(torch.randn(60, 128, device=DEVICE))
    strided = torch.randn(128, 2, 3, device=DEVICE).permute(1, 2, 0)
    exact = strided.double() @ made.dequantize(FP32).double().mT
    assert error(qkern.linear(strided, made), exact) <= BOUNDS[FP32]
    assert qkern.linear(strided[:0], made).shape == (0, 3, 60)
