"""``dequantize(q, out=)``: written in place where that can be, on every kind of device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import qkern
from qkern import functional, kernels
from qkern.ops import host

pytest.importorskip("triton")  # forced_device reads the kernels

from forced_device import decode_beside_the_host

FORMATS = [("nf4", True), ("fp4", False), ("int8", True), ("int8_row", False)]


class Operators(TorchDispatchMode):
    """Keeps the names of all that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=["host", "kernels", "torch"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What decodes: on devices other than the CPU a kernel, or torch, forced here."""
    if request.param != "host":
        decode_beside_the_host(monkeypatch)
        monkeypatch.setattr(kernels, "is_supported", lambda _: request.param == "kernels")
        monkeypatch.delattr(host, "dequantize_into")
    return str(request.param)


@pytest.mark.parametrize(("quant_type", "double_quant"), FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_it_holds_what_a_fresh_result_holds(
    decoder: str, quant_type: str, double_quant: bool, dtype: torch.dtype
) -> None:
    """Blocks cross rows, the last one is short, and memory before and after stays as it was."""
    q = qkern.quantize(torch.randn(3, 171), quant_type, double_quant=double_quant)
    memory = torch.full((7 + 3 * 171 + 9,), 5.0, dtype=dtype)
    out = memory[7:-9].view(3, 171)
    assert qkern.dequantize(q, out=out) is out
    assert torch.equal(out, qkern.dequantize(q, dtype))
    assert memory[:7].eq(5).all()
    assert memory[-9:].eq(5).all()


def test_it_is_written_without_a_copy(decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, out = qkern.quantize(torch.randn(4, 64)), torch.empty(4, 64)
    monkeypatch.setattr(qkern.QuantizedTensor, "dequantize", None)
    qkern.dequantize(q, out=out)
    with torch.inference_mode():
        made_there = torch.empty(4, 64)
        qkern.dequantize(q, out=made_there)
    assert torch.equal(out, made_there)


def test_other_strides_and_an_empty_one_are_filled(decoder: str) -> None:
    q = qkern.quantize(torch.randn(5, 64))
    out = torch.empty(64, 5).mT
    qkern.dequantize(q, out=out)
    assert torch.equal(out, q.dequantize())
    empty = qkern.quantize(torch.empty(0, 64))
    assert qkern.dequantize(empty, out=torch.empty(0, 64)).shape == (0, 64)


def test_values_that_backward_has_saved_do_not_change_unseen(decoder: str) -> None:
    q, out = qkern.quantize(torch.randn(4, 64)), torch.randn(4, 64)
    leaf = torch.randn(4, 64, requires_grad=True)
    loss = (leaf * out).sum()
    qkern.dequantize(q, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_lazily_negated_one_gets_the_values_not_their_negatives(decoder: str) -> None:
    q = qkern.quantize(torch.randn(4, 64))
    out = torch._neg_view(torch.zeros(4, 64))
    assert out.is_contiguous()
    assert torch.equal(qkern.dequantize(q, out=out), q.dequantize())


def test_an_integer_one_is_refused_unchanged(decoder: str) -> None:
    q, out = qkern.quantize(torch.randn(4, 64)), torch.full((4, 64), 7)
    with pytest.raises(qkern.DTypeError, match="int64"):
        qkern.dequantize(q, out=out)
    assert out.eq(7).all()


def test_who_watches_sees_the_operator() -> None:
    q, out = qkern.quantize(torch.randn(4, 64)), torch.empty(4, 64)
    with Operators() as seen:
        qkern.dequantize(q, out=out)
    assert "qkern::dequantize" in seen.names
    assert torch.equal(out, q.dequantize())


def test_it_compiles_in_one_graph() -> None:
    def fill(q: qkern.QuantizedTensor, out: Tensor) -> Tensor:
        return functional.dequantize(q, out=out) * 2

    q, out = qkern.quantize(torch.randn(4, 64)), torch.empty(4, 64)
    got = torch.compile(fill, fullgraph=True, backend="aot_eager")(q, out)
    assert torch.equal(out, q.dequantize())
    assert torch.equal(got, q.dequantize() * 2)
