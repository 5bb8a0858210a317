"""dX from packed bytes, and the merged weight, against fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernel_device import DEVICE, HOST, INTERPRETED, SUMS, on_device
from kernel_errors import within
from kernel_memory import guarded

from qkern import reference
from qkern.errors import ShapeError
from qkern.formats import QuantFormat

pytest.importorskip("triton")
from qkern.kernels import launch, lora, thin_product
from qkern.kernels.dequantize_merged import dequantize_merged
from qkern.kernels.dropout import Dropout, gain_of
from qkern.kernels.launch import Weight
from qkern.kernels.linear_backward import linear_backward
from qkern.kernels.lora import hidden
from qkern.kernels.lora_backward import grad_hidden
from qkern.kernels.matmul_backward import matmul_backward

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FORMATS = (
    QuantFormat("nf4", 64),
    QuantFormat("fp4", 32, double_quant=False),  # several blocks in a tile
    QuantFormat("nf4", 256),  # a block over several tiles
    QuantFormat("int8", 64),
    QuantFormat("int8_row"),
)


def quantized(N: int, K: int, fmt: QuantFormat) -> tuple[Weight, reference.Parts, QuantFormat]:
    """As kernels take it, and its parts on the host."""
    fmt = fmt.for_shape((N, K))
    with HOST:
        parts = reference.quantize(torch.randn(N, K), fmt)
        if not fmt.double_quant:  # a scale may be negative
            parts = parts._replace(absmax=parts.absmax * torch.randn(parts.absmax.shape).sign())
    return launch.weight(*on_device(parts), fmt, (N, K)), parts, fmt


def dense(
    parts: reference.Parts, fmt: QuantFormat, shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    with HOST:
        values = reference.dequantize(parts, fmt, shape[0] * shape[1], dtype)
    return values.reshape(shape).to(DEVICE).double()


def error(got: torch.Tensor, right: torch.Tensor) -> float:
    """The largest, in units of the root mean square."""
    return float((got.double() - right).abs().max() / right.square().mean().sqrt())


def bound_of(dtype: torch.dtype) -> float:
    """fp32 sums, and the rounding of the largest, which is some units large."""
    return 3e-6 * SUMS + (0 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps)


@pytest.fixture
def processors(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """As on a device with so many: sums are split; with two or more, by the tiles of sm_90.

    A GPU keeps its own tiles.
    """

    def pretend(count: int) -> None:
        monkeypatch.setattr(lora, "processors", lambda device: count)
        if not INTERPRETED:
            return
        for module, name in ((thin_product, "arch_of"), (launch, "arch")):
            monkeypatch.setattr(module, name, lambda device: "sm_90" if count > 1 else "")

    return pretend


# tokens: one; a small tile; more than a tile. Rows of W: few, a tile and some. Every kind of rank.
SHAPES = ((1, 7, 256, 0), (5, 130, 256, 1), (17, 64, 512, 3), (70, 65, 256, 8), (34, 100, 256, 64))


@pytest.mark.case("A11", "A14", "B12")
@pytest.mark.parametrize("turn", range(10))
def test_dx_is_that_of_fp64_over_the_weight_that_forward_multiplies(
    turn: int, processors: Callable[[int], None]
) -> None:
    """Each shape with two formats, each format with two shapes."""
    (M, N, K, rank), fmt = SHAPES[turn % 5], FORMATS[(turn + turn // 5) % 5]
    weight, parts, fmt = quantized(N, K, fmt)
    dtype = DTYPES[turn % 3]
    processors(1 if M % 2 else 8)
    grad, G, A = torch.randn(M, N).to(dtype), torch.randn(M, rank), torch.randn(rank, K)
    with guarded():
        got = matmul_backward(grad, weight, G, A)
    right = grad.double() @ dense(parts, fmt, (N, K), dtype) + G.double() @ A.double()
    assert got.dtype == dtype
    assert within("dX, matmul_backward", dtype, error(got, right), bound_of(dtype))


@pytest.mark.case("A11")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dx_of_widths_that_are_no_tiles(dtype: torch.dtype) -> None:
    """K of three small blocks, and of a row of 8-bit codes of any length; no token."""
    for fmt, K in ((QuantFormat("nf4", 32), 96), (QuantFormat("int8_row"), 77)):
        weight, parts, fmt = quantized(70, K, fmt)  # noqa: PLW2901
        grad = torch.randn(19, 70).to(dtype)
        with guarded():
            got = matmul_backward(grad, weight)
        assert error(got, grad.double() @ dense(parts, fmt, (70, K), dtype)) < bound_of(dtype)
    assert matmul_backward(grad[:0], weight).shape == (0, 77)


def test_dx_through_dropout_is_the_gradient_of_forward(processors: Callable[[int], None]) -> None:
    M, N, K, rank, s = 40, 70, 128, 16, 0.5
    weight, parts, fmt = quantized(N, K, QuantFormat("nf4", 64))
    dropout = Dropout(0.4, torch.tensor([99]))
    kept = hidden(torch.ones(M, K), torch.eye(K), dropout=dropout) != 0
    x, grad, A, B = torch.randn(M, K), torch.randn(M, N), torch.randn(rank, K), torch.randn(N, rank)
    for count in (1, 8):
        processors(count)
        G, _ = grad_hidden(grad, B, hidden(x, A, s, dropout=dropout), s)
        with guarded():
            got = matmul_backward(grad, weight, G, A, dropout=dropout)
        x64 = x.double().requires_grad_()
        low = (x64 * kept * gain_of(0.4)) @ A.double().T
        y = x64 @ dense(parts, fmt, (N, K), torch.float32).T + s * low @ B.double().T
        y.backward(grad.double())
        assert error(got, x64.grad) < 3e-6 * SUMS


def test_the_gradient_of_a_layers_input_is_that_of_its_forward() -> None:
    N, K, rank = 70, 128, 5
    weight, parts, fmt = quantized(N, K, QuantFormat("nf4", 64))
    grad, A, B = torch.randn(2, N, 3).mT, torch.randn(rank, K), torch.randn(rank, N).mT
    W = dense(parts, fmt, (N, K), torch.float32)
    right = grad.double() @ (W + 0.5 * B.double() @ A.double())
    G, _ = grad_hidden(grad.reshape(-1, N), B.contiguous(), torch.zeros(6, rank), 0.5)
    for known in (None, G):
        assert error(linear_backward(grad, weight, A, B, 0.5, G=known), right) < 3e-6 * SUMS
    assert error(linear_backward(grad, weight), grad.double() @ W) < 3e-6 * SUMS
    with pytest.raises(ShapeError, match=r"must be \(r, 128\) and \(70, r\)"):
        linear_backward(grad, weight, A.mT, B)


@pytest.mark.parametrize(("fmt", "rank"), [*zip(FORMATS, (1, 3, 16, 17, 64), strict=True)], ids=str)
def test_a_merged_weight_is_rounded_once(fmt: QuantFormat, rank: int) -> None:
    N, K = 70, 256
    weight, parts, fmt = quantized(N, K, fmt)
    A, B = torch.randn(rank, K), 0.1 * torch.randn(N, rank)
    exact = dense(parts, fmt, (N, K), torch.float32) + 0.5 * B.double() @ A.double()
    for dtype in DTYPES:
        with guarded():
            got = dequantize_merged(weight, A, B, 0.5, dtype)
        assert got.dtype == dtype
        # half an ulp of the largest of a binade, and the sums in fp32
        sums = 2e-6 * SUMS * exact.square().mean().sqrt()
        allowed = exact.abs() * torch.finfo(dtype).eps / 2 + sums
        assert bool(((got.double() - exact).abs() <= allowed).all())


def test_a_merged_weight_without_an_adapter_is_the_dequantized_one() -> None:
    """The same bytes: adding nothing changes none."""
    weight, parts, fmt = quantized(5, 96, QuantFormat("nf4", 32))
    A, B = torch.randn(8, 96), torch.zeros(5, 8)
    for dtype in DTYPES:
        got = dequantize_merged(weight, A, B, 2.0, dtype)
        assert torch.equal(got.double(), dense(parts, fmt, (5, 96), dtype))
