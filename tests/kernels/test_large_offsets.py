"""More values than an int32 counts: offsets in kernels are int64.

Tensors are sparse files of zeros with a few values at their ends, and of each launch only the last
program runs, whose values lie beyond 2^31: a wrapped offset reads or writes somewhere else, which
may end the process.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from triton.runtime import interpreter

from qkern import reference
from qkern.formats import QuantFormat
from qkern.kernels import launch, lora_backward
from qkern.kernels.add_adapter import add_adapter
from qkern.kernels.dequantize import dequantize
from qkern.kernels.dequantize_merged import dequantize_merged
from qkern.kernels.dispatch import Config
from qkern.kernels.lora import add_parts, hidden
from qkern.kernels.lora_backward import grad_a, grad_hidden
from qkern.kernels.matmul import matmul
from qkern.kernels.matmul_backward import matmul_backward

Sparse = Callable[[tuple[int, ...], torch.dtype], Tensor]
pytestmark = [
    pytest.mark.interpreter("runs single programs of a launch; for GPUs: tests/gpu/test_large.py"),
    pytest.mark.skipif(sys.platform != "linux", reason="files need not be sparse there"),
]

LARGE = 1 << 25  # 64 of these are 2^31
FP16, FP32 = torch.float16, torch.float32


@pytest.fixture
def sparse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sparse]:
    """Makes tensors of zeros that take no memory, and has ``torch.empty`` do so."""
    names, files = itertools.count(), []
    empty = torch.empty

    def make(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        files.append(tmp_path / str(next(names)))
        numel = torch.Size(shape).numel()
        flat = torch.from_file(str(files[-1]), shared=True, size=numel, dtype=dtype)
        return flat.view(shape)

    def large_or_not(*shape: Any, **options: Any) -> Tensor:
        sizes = shape[0] if isinstance(shape[0], tuple) else shape
        if torch.Size(sizes).numel() < LARGE:
            return empty(*shape, **options)
        return make(tuple(sizes), options["dtype"])

    def last(*arguments: int) -> Any:
        is_grid = sys._getframe(1).f_code.co_name == "__call__"
        return [arguments[0] - 1] if is_grid else range(*arguments)

    monkeypatch.setattr(torch, "empty", large_or_not)
    monkeypatch.setattr(interpreter, "range", last, raising=False)
    # It would copy each tensor to itself.
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
    yield make
    for file in files:
        file.unlink()


def close(got: Tensor, right: Tensor) -> None:
    assert right.any()
    torch.testing.assert_close(got.float(), right.float(), rtol=2e-3, atol=2e-3)


@pytest.mark.case("A10")
def test_more_tokens(sparse: Sparse) -> None:
    """Of x, y, dY and dX (M, 64); h of one rank."""
    M, K = LARGE + 40, 64
    x = sparse((M, K), FP16)
    x[-8:] = torch.randn(8, K)
    A, B = torch.randn(1, K), torch.randn(1, K)
    h = hidden(x, A)
    close(h[-8:], x[-8:].float() @ A.mT)
    parts = reference.quantize(torch.randn(K, K), fmt := QuantFormat("int8_row", K))
    weight = launch.weight(*parts, fmt, (K, K))
    W = reference.dequantize(parts, fmt, K * K, FP16).view(K, K).float()
    config = Config("matmul", 16, 16, (16, 64, 64), 4, 2)
    y = sparse((M, K), FP16)
    matmul(x, weight, None, h, B.mT.contiguous(), config, y)
    right = x[-8:].float() @ W.mT + h[-8:] @ B
    close(y[-8:], right)
    y[-8:] = 0
    close(add_adapter(y, h, B)[-8:], h[-8:] @ B)
    dX = matmul_backward(x, weight, h, B)
    close(dX[-8:], x[-8:].float() @ W + h[-8:] @ B)


@pytest.mark.case("A10")
def test_more_features(sparse: Sparse, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of x and dY (65, N): the last row begins at 2^31. G, a sum of 2^19 parts, is left out."""

    def add_few(parts: Tensor, *arguments: Any, **options: Any) -> None:
        if len(parts) == 1:
            add_parts(parts, *arguments, **options)

    monkeypatch.setattr(lora_backward, "add_parts", add_few)
    M, N = 65, LARGE + 40
    x = sparse((M, N), FP16)
    x[-1, -8:] = torch.randn(8)
    B, h, G = sparse((N, 1), FP32), torch.randn(M, 1), torch.randn(M, 1)
    B[-8:] = torch.randn(8, 1)
    _, dB = grad_hidden(x, B, h)
    close(dB[-8:], x[-1:, -8:].mT.float() * h[-1])
    close(grad_a(G, x, FP32)[:, -8:], x[-1:, -8:].float() * G[-1])
    added = x[-1, -8:].float() + h[-1] * B[-8:, 0]
    close(add_adapter(x, h, B.view(1, N))[-1, -8:], added)


@pytest.mark.case("A9")
def test_more_weights(sparse: Sparse) -> None:
    """2^32 of them, of 4 bits: more than 2^31 bytes too."""
    N, K, fmt = 2 * LARGE + 40, 64, QuantFormat("nf4", 64, double_quant=False)
    packed, absmax = sparse((N, K // 2), torch.uint8), sparse((N,), FP32)
    few = reference.quantize(torch.randn(8, K), fmt)
    packed[-8:], absmax[-8:] = few.packed.view(8, -1), few.absmax
    right = reference.dequantize(few, fmt, 8 * K, FP16).view(8, K)
    W = dequantize(packed, absmax, None, None, fmt, N * K, FP16).view(N, K)
    assert torch.equal(W[-8:], right)
    weight = launch.weight(packed, absmax, None, None, fmt, (N, K))
    A, B = torch.randn(1, K), sparse((N, 1), FP32)
    B[-8:] = torch.randn(8, 1)
    merged = dequantize_merged(weight, A, B, 0.5, FP16)
    close(merged[-8:], right.float() + 0.5 * B[-8:] @ A)
    y, x = sparse((5, N), FP16), torch.randn(5, K).to(FP16)
    matmul(x, weight, None, None, None, Config("matmul", 16, 16, (16, 64, 64), 4, 2), y)
    close(y[:, -8:], x.float() @ right.float().mT)
