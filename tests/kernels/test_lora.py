"""The adapter's kernels, against fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernel_device import INTERPRETED, SUMS
from kernel_errors import within
from kernel_memory import guarded

pytest.importorskip("triton")
from qkern.kernels import lora, thin_product
from qkern.kernels.dropout import Dropout, gain_of, threshold_of
from qkern.kernels.lora import Rows, hidden
from qkern.kernels.lora_backward import grad_a, grad_hidden

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# M few and many, ragged; in- and out-features no multiples of a tile; every kind of rank
SHAPES = [
    (1, 40, 24, 1),
    (3, 130, 65, 3),
    (4, 64, 48, 8),
    (5, 72, 300, 16),
    (70, 96, 136, 17),
    (129, 200, 64, 64),
]
# Largest errors in units of the root mean square. Sums of some hundred products in fp32, and where
# a factor in fp32 beside bf16 is left with 16 bits of its mantissa.
BOUND, BOUND_OF_16_BITS = 2e-6, 2e-5


@pytest.fixture
def processors(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """As on a device with so many: sums are split; with two or more, factors are too.

    A GPU keeps its own way with factors.
    """

    def pretend(count: int) -> None:
        monkeypatch.setattr(lora, "processors", lambda device: count)
        if INTERPRETED:
            arch = "sm_90" if count > 1 else ""
            monkeypatch.setattr(thin_product, "arch_of", lambda device: arch)

    return pretend


def error(got: torch.Tensor, right: torch.Tensor) -> float:
    """The largest, in units of the root mean square."""
    size = float(right.square().mean().sqrt())
    return float((got.double() - right).abs().max()) / (size or 1.0)


def bound_of(dtype: torch.dtype, rounded_to: torch.dtype = torch.float32) -> float:
    """Of products of values in ``dtype``; the largest of many results is some units large."""
    bound = BOUND_OF_16_BITS if dtype == torch.bfloat16 else BOUND
    return SUMS * bound + (0 if rounded_to == torch.float32 else 4 * torch.finfo(rounded_to).eps)


@pytest.mark.case("A11", "A14")
@pytest.mark.parametrize(("M", "N", "K", "R"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_are_those_of_fp64(
    M: int, N: int, K: int, R: int, dtype: torch.dtype, processors: Callable[[int], None]
) -> None:
    # adapters of x's dtype, and fp32 ones beside 16-bit tokens
    adapter = torch.float32 if R % 2 else dtype
    x, grad = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
    A, B = torch.randn(R, K).to(adapter), torch.randn(N, R).to(adapter)
    right_h = 0.5 * x.double() @ A.double().T
    for count in (1, 8):
        processors(count)
        with guarded():
            h = hidden(x, A, 0.5)
            G, dB = grad_hidden(grad, B, h, 0.5)
            dA = grad_a(G, x, adapter)
        right_G, bound = 0.5 * grad.double() @ B.double(), bound_of(dtype)
        assert within("adapter: h", dtype, error(h, right_h), bound)
        assert within("adapter: G", dtype, error(G, right_G), bound)
        bound, kind = bound_of(dtype, adapter), f"in {str(adapter).removeprefix('torch.')}"
        assert within(f"adapter: dB {kind}", dtype, error(dB, grad.double().T @ h.double()), bound)
        assert within(f"adapter: dA {kind}", dtype, error(dA, G.double().T @ x.double()), bound)
        assert (h.dtype, G.dtype, dB.dtype, dA.dtype) == (*[torch.float32] * 2, *[adapter] * 2)


@pytest.mark.case("A11", "A14")
@pytest.mark.parametrize(("M", "N", "K", "R"), [(0, 5, 6, 2), (3, 5, 6, 0), (2, 3, 40, 90)])
def test_no_tokens_no_rank_and_a_rank_above_a_tile(M: int, N: int, K: int, R: int) -> None:
    x, grad, A, B = torch.randn(M, K), torch.randn(M, N), torch.randn(R, K), torch.randn(N, R)
    h = hidden(x, A)
    G, dB = grad_hidden(grad, B, h)
    dA = grad_a(G, x, A.dtype)
    for got, right in ((h, x @ A.T), (G, grad @ B), (dB, grad.T @ h), (dA, G.T @ x)):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("M", [3, 70])
def test_each_token_has_its_own_adapter(M: int) -> None:
    """Three of rank 5, with factors of their own; some tokens have none."""
    N, K, rank, count = 33, 48, 5, 3
    x, grad = torch.randn(M, K), torch.randn(M, N)
    A, B = torch.randn(count, rank, K), torch.randn(count, N, rank)
    scalings = torch.tensor([0.5, 2.0, 3.0])
    adapter = torch.randint(-1, count, (M,), dtype=torch.int32)
    rows, by_column = Rows(adapter, rank), scalings.repeat_interleave(rank)
    side_by_side = B.permute(1, 0, 2).reshape(N, -1).contiguous()
    with guarded():
        h = hidden(x, A.reshape(-1, K), by_column, rows=rows)
        G, dB = grad_hidden(grad, side_by_side, h, by_column, rows=rows)
        dA = grad_a(G, x, A.dtype)

    A64, B64 = (t.double().requires_grad_() for t in (A, B))
    used = adapter.long().clamp_min(0)
    factor = torch.where(adapter < 0, 0.0, scalings[used].double())
    low = torch.einsum("mk,mrk->mr", x.double(), A64[used]) * factor[:, None]
    y = torch.einsum("mr,mnr->mn", low, B64[used])
    y.backward(grad.double())
    assert error(h @ side_by_side.T, y.detach()) < 1e-5 * SUMS
    assert error(dA, A64.grad.reshape(-1, K)) < 1e-5 * SUMS
    assert error(dB, B64.grad.permute(1, 0, 2).reshape(N, -1)) < 1e-5 * SUMS


def kept_by_hand(M: int, K: int, dropout: Dropout) -> torch.Tensor:
    """The mask, (M, K), by what forward does to ones."""
    h = hidden(torch.ones(M, K), torch.eye(K), dropout=dropout)
    assert set(h.unique().tolist()) <= {0.0, torch.tensor(gain_of(dropout.p)).item()}
    return h != 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_and_backward_drop_the_same_values(
    dtype: torch.dtype, processors: Callable[[int], None]
) -> None:
    M, N, K, R = 70, 40, 76, 16
    dropout = Dropout(0.3, torch.tensor([1234567890123]))
    kept = kept_by_hand(M, K, dropout)
    x, grad = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
    A, B = torch.randn(R, K), torch.randn(N, R)
    dropped = x.double() * kept * gain_of(0.3)
    for count in (1, 8):
        processors(count)
        with guarded():
            h = hidden(x, A, 2.0, dropout=dropout)
            G, _ = grad_hidden(grad, B, h, 2.0)
            dA = grad_a(G, x, torch.float32, dropout=dropout)
        assert error(h, 2 * dropped @ A.double().T) < bound_of(dtype)
        assert error(dA, G.double().T @ dropped) < bound_of(dtype)


def test_dropout_is_drawn_by_seed_row_and_column() -> None:
    M, K, p = 128, 64, 0.25
    masks = [kept_by_hand(M, K, Dropout(p, torch.tensor([seed]))) for seed in (0, 1, 1 << 32)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        agree = float((masks[one] == masks[other]).double().mean())
        assert abs(agree - (p * p + (1 - p) ** 2)) < 0.03
    kept = masks[0].double() - (1 - p)
    # 5 standard deviations: of all, of a column and of a row
    assert abs(float(kept.mean())) < 5 * 0.005
    assert kept.mean(0).abs().max() < 5 * 0.04
    assert kept.mean(1).abs().max() < 5 * 0.054


def test_probabilities_are_multiples_of_a_step() -> None:
    assert threshold_of(0.0) == 0
    assert gain_of(0.0) == 1
    assert gain_of(0.5) == 2
    assert abs(gain_of(0.1) - 1 / 0.9) < 2e-5
    assert hidden(torch.ones(5, 8), torch.eye(8), dropout=Dropout(0.0, torch.zeros(1).long())).all()


def test_reruns_have_the_same_bits(processors: Callable[[int], None]) -> None:
    processors(8)
    x, grad = torch.randn(130, 100), torch.randn(130, 90)
    A, B = torch.randn(9, 100), torch.randn(90, 9)

    def run() -> tuple[torch.Tensor, ...]:
        h = hidden(x, A)
        G, dB = grad_hidden(grad, B, h)
        return h, G, dB, grad_a(G, x, A.dtype)

    for one, other in zip(run(), run(), strict=True):
        assert torch.equal(one, other)
