"""Products of packed weights, against fp64.

In the interpreter one case costs as many operations as its kernel has, whatever the size: shapes
are small, with ends that fill no tile, and cases cover pairs of settings, not all of them.
"""

from __future__ import annotations

import pytest
import torch
from kernel_device import INTERPRETED
from kernel_errors import within
from torch import Tensor

pytest.importorskip("triton")
from kernel_products import DTYPES, Product, product, worst_error

from qkern.errors import ShapeError
from qkern.kernels import launch
from qkern.kernels.dispatch import Config
from qkern.kernels.linear import KERNELS, linear

FP32, FP16, BF16 = DTYPES


def config(op: str, tile: tuple[int, int, int], *, ahead: bool = False, split: int = 0) -> Config:
    """A small tile, so that shapes of few values have several."""
    return Config(op, 16, tile[0], tile, 4, 2, ahead, split)


MATVEC = config("matvec", (4, 64, 256))
MATMUL = config("matmul", (16, 64, 64))
AHEAD = config("matmul", (16, 64, 64), ahead=True)
SPLIT = config("matmul_small", (16, 64, 64), split=2)
SPLIT_AHEAD = config("matmul_small", (16, 64, 64), ahead=True, split=3)


def run(operands: Product, how: Config) -> Tensor:
    """The kernel's y, in memory that was NaN before, and is behind the end afterwards."""
    M, N = operands.x.shape[0], operands.dense.shape[0]
    memory = torch.full((M * N + 256,), torch.nan, dtype=operands.x.dtype)
    out = memory[: M * N].view(M, N)
    adapter = (operands.bias, operands.h, operands.lora_B)
    KERNELS[how.op](operands.x, operands.weight, *adapter, how, out)
    assert memory[M * N :].isnan().all(), "written behind the end"
    return out


# M, N, K, format, blocksize, 8-bit scales, dtype, rank, dtype of the adapter, bias
SETTINGS = [
    (1, 75, 320, "nf4", 64, True, BF16, 0, None, False),
    (4, 65, 64, "fp4", 64, False, FP16, 1, None, True),
    (3, 64, 96, "nf4", 32, True, FP32, 3, None, True),  # two blocks in a step, half of it empty
    (2, 33, 512, "int8", 128, True, BF16, 8, FP32, False),
    (1, 40, 172, "int8_row", 172, False, FP16, 16, None, True),  # rows that are no whole tiles
    (4, 7, 256, "nf4", 256, False, BF16, 17, FP16, False),
    (1, 5, 128, "int8", 32, False, FP32, 64, None, False),
    (3, 9, 63, "int8_row", 63, False, BF16, 0, None, True),  # odd
]


@pytest.mark.parametrize("how", [MATVEC, MATMUL, AHEAD, SPLIT, SPLIT_AHEAD], ids=str)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_kernels_multiply_as_fp64_does(setting: tuple, how: Config) -> None:
    M, N, K, quant_type, blocksize, double_quant, dtype, rank, adapter, bias = setting
    tokens = M if how is MATVEC else 15 + M  # one or two tiles of 16
    operands = product(
        tokens,
        N,
        K,
        quant_type=quant_type,
        blocksize=blocksize,
        double_quant=double_quant,
        dtype=dtype,
        rank=rank,
        adapter=adapter,
        bias=bias,
        rounded=how is not MATVEC,
    )
    name = f"y, {how.op}"
    assert within(name, dtype, worst_error(run(operands, how), operands))


@pytest.mark.parametrize("how", [MATVEC, MATMUL, AHEAD], ids=str)
@pytest.mark.parametrize(
    ("quant_type", "double_quant", "dtype"),
    [("nf4", True, BF16), ("fp4", False, FP16), ("int8", True, BF16), ("nf4", False, FP32)],
)
def test_one_token_with_a_single_one_reads_a_column_of_the_weight_to_the_bit(
    how: Config, quant_type: str, double_quant: bool, dtype: torch.dtype
) -> None:
    K = 64
    operands = product(
        K, 70, K, quant_type=quant_type, blocksize=32, double_quant=double_quant, dtype=dtype
    )
    columns = torch.tensor([0, 1, 2, 9, 31, 32, 62, 63])[: how.tile[0]]
    operands = operands._replace(x=torch.eye(K, dtype=dtype)[columns])
    got, right = run(operands, how), operands.dense.T[columns]
    if how is MATVEC and not INTERPRETED:  # its products may be fused into sums, so scales differ
        torch.testing.assert_close(got, right, rtol=2 * torch.finfo(dtype).eps, atol=0)
    else:
        assert torch.equal(got, right)


def test_split_products_are_equal_in_every_run_and_leave_their_counters_at_zero(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counters = torch.zeros(8, dtype=torch.int32)
    monkeypatch.setattr(launch, "counters", lambda *_: counters)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    operands = product(20, 70, 320, rank=4)
    first = run(operands, SPLIT)
    assert torch.equal(first, run(operands, SPLIT))
    assert not counters.any()
    assert worst_error(first, operands) <= 1


def test_more_programs_than_columns_leave_a_split_product_right() -> None:
    operands = product(2, 6, 64)
    how = SPLIT.replace(split=5)
    assert worst_error(run(operands, how), operands) <= 1


def test_shapes_and_memory_of_operands_are_what_kernels_need() -> None:
    operands = product(6, 40, 64, rank=2, bias=True)
    shifted = torch.empty(6 * 64 + 1, dtype=BF16)[1:].view(2, 3, 64)  # at an odd place
    shifted.copy_(operands.x.view(2, 3, 64))
    h, B = operands.h.view(2, 3, 2), operands.lora_B.T.contiguous().T  # columns first
    y = linear(shifted, operands.weight, operands.bias, h, B, config=MATMUL)
    assert y.shape == (2, 3, 40)
    assert worst_error(y.reshape(6, 40), operands) <= 1
    no_tokens = linear(operands.x[:0], operands.weight)
    assert no_tokens.shape == (0, 40)


@pytest.mark.interpreter("is about it alone")
def test_the_interpreter_takes_the_rows_of_the_oldest_gpus() -> None:
    operands = product(1, 12, 64, rounded=False)
    assert worst_error(linear(operands.x, operands.weight), operands) <= 1
    with pytest.raises(ShapeError, match="dequantize the weight instead"):
        linear(torch.zeros(4096, 64, dtype=BF16), operands.weight)


def test_adapters_that_do_not_fit_are_refused() -> None:
    operands = product(3, 8, 64, rank=2)
    with pytest.raises(ShapeError, match=r"lora_B \(7, 2\) must be .* N = 8"):
        linear(operands.x, operands.weight, None, operands.h, operands.lora_B[:7])
    with pytest.raises(ShapeError, match="last dimension must be 2"):
        linear(operands.x, operands.weight, None, operands.h[:, :1], operands.lora_B)
