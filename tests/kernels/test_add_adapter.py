"""An adapter's part added to a finished product, in Triton's interpreter, against fp64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from kernel_device import SUMS
from kernel_errors import within

from qkern.errors import DeviceError
from qkern.kernels import thin_product
from qkern.kernels.add_adapter import add_adapter
from qkern.kernels.dropout import Dropout, gain_of
from qkern.kernels.lora import hidden

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
# M, N, rank: less than a tile; ragged ends of several; rows that are no whole tiles
SHAPES = [(1, 7, 1), (70, 65, 17), (5, 130, 3), (66, 40, 80)]


@pytest.mark.case("A3", "A11", "A14")
@pytest.mark.parametrize(("M", "N", "rank"), SHAPES)
@pytest.mark.parametrize(("dtype", "adapter"), [(FP32, FP32), (BF16, FP32), (FP16, FP16)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_sums_are_those_of_fp64_rounded_once_and_nothing_else_is_written(
    M: int, N: int, rank: int, dtype: torch.dtype, adapter: torch.dtype, p: float
) -> None:
    memory = torch.full((M * N + 512,), torch.nan, dtype=dtype)
    y = memory[256 : 256 + M * N].view(M, N)
    y.copy_(torch.randn(M, N))
    before = y.double()
    h, B = torch.randn(M, rank), torch.randn(rank, N).to(adapter)
    dropout = Dropout(p, torch.tensor([11])) if p else None
    exact = h.double() @ B.double()
    if dropout is not None:
        kept = hidden(torch.ones(M, N), torch.eye(N), dropout=dropout) != 0
        exact = torch.where(kept, exact * gain_of(p), 0.0)
    size = before.abs() + h.double().abs() @ B.double().abs() * gain_of(p)
    exact = exact + before
    assert add_adapter(y, h, B, dropout=dropout) is y
    allowed = exact.abs() * torch.finfo(dtype).eps / 2 + size * 2.0**-20 * SUMS
    worst = float(((y.double() - exact).abs() / allowed).max())
    assert within("add adapter", dtype, worst)
    assert memory[:256].isnan().all()
    assert memory[256 + M * N :].isnan().all()


@pytest.mark.interpreter("takes it for a GPU")
def test_fp32_factors_keep_22_bits_where_tensor_cores_have_tf32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(thin_product, "arch_of", lambda _: "sm_90")
    y, h, B = torch.zeros(5, 20), torch.randn(5, 16), torch.randn(16, 20)
    size = h.double().abs() @ B.double().abs()
    error = (add_adapter(y, h, B).double() - h.double() @ B.double()).abs()
    assert bool((error <= size * 2.0**-20).all())


@pytest.mark.parametrize(("M", "N", "rank"), [(0, 5, 2), (5, 0, 2), (3, 5, 0)])
def test_nothing_to_add_changes_nothing(M: int, N: int, rank: int) -> None:
    y = torch.randn(M, N)
    before = y.clone()
    assert torch.equal(add_adapter(y, torch.randn(M, rank), torch.randn(rank, N)), before)


def test_tensors_of_several_devices_are_refused() -> None:
    with pytest.raises(DeviceError, match="meta"):
        add_adapter(torch.zeros(3, 4), torch.zeros(3, 2, device="meta"), torch.zeros(2, 4))
