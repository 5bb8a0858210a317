"""Products that go around torch's dispatcher: same numbers, and whatever watches sees them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import qkern
from qkern import codec


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def leaves() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sizes = ((3, 128), (70,), (4, 128), (70, 4))
    x, bias, A, B = (torch.randn(size, requires_grad=True) for size in sizes)
    return x, bias, A, B


def test_same_bytes_and_gradients_as_the_operator() -> None:
    w = qkern.quantize(torch.randn(70, 128))
    x, *rest = leaves()
    y = qkern.linear(x, w, rest[0], lora_A=rest[1], lora_B=rest[2], scaling=0.5)
    arguments = (*w.parts, "nf4", 64, 70, *rest, 0.5)
    with torch.profiler.profile() as profile:  # with it on, backward takes the operators too
        expected = torch.ops.qkern.linear(x, *arguments)
        dy = torch.randn_like(y)
        grads = torch.autograd.grad(expected, (x, *rest), dy)
    assert "qkern::linear_backward" in {event.key for event in profile.key_averages()}
    assert torch.equal(y, expected)
    for ours, theirs in zip(torch.autograd.grad(y, (x, *rest), dy), grads, strict=True):
        assert torch.equal(ours, theirs)
    with torch.no_grad():
        kept = qkern.linear(x, w, rest[0], lora_A=rest[1], lora_B=rest[2], scaling=0.5)
    assert torch.equal(kept, expected)
    assert not kept.requires_grad


def test_modes_and_profilers_see_the_operators() -> None:
    w = qkern.quantize(torch.randn(70, 128))
    x, bias, A, B = leaves()
    with Seen() as seen:
        qkern.linear(x, w, bias, lora_A=A, lora_B=B).sum().backward()
    named = {name for name in seen.names if name.startswith("qkern")}
    assert named == {
        f"qkern.{op}.default" for op in ("linear", "linear_backward", "lora_gradients")
    }

    with torch.no_grad(), torch.profiler.profile() as profile:
        qkern.linear(x, w)
    assert "qkern::linear" in {event.key for event in profile.key_averages()}

    class Counts(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func: Any, *args: Any) -> Any:
            self.calls += "qkern.linear" in str(func)
            return func(*args[1], **(args[2] if len(args) > 2 else {}))

    with torch.no_grad(), Counts() as counts:
        qkern.linear(x, w)
    assert counts.calls == 1


def test_traces_hold_the_operator() -> None:
    w = qkern.quantize(torch.randn(70, 128))
    with torch.no_grad():
        graph = torch.fx.experimental.proxy_tensor.make_fx(lambda x: qkern.linear(x, w))(
            torch.randn(3, 128)
        )
    assert "qkern.linear" in graph.code


def test_output_is_on_the_cpu_whatever_the_default_device() -> None:
    w = qkern.quantize(torch.randn(70, 128))
    x = torch.randn(3, 128)
    with torch.device("meta"):
        assert qkern.linear(x, w).device.type == "cpu"


def test_the_codec_takes_as_many_threads_as_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watched(name: str) -> Any:
        native = getattr(codec._native, name)

        def call(*arguments: Any, **options: Any) -> Any:
            seen.append((name, options["threads"]))
            return native(*arguments, **options)

        return call

    names = ("quantize_4bit", "search_scales", "encode_4bit", "quantize_absmax", "dequantize_4bit")
    calls = {name: watched(name) for name in names}
    monkeypatch.setattr(codec, "_native", SimpleNamespace(**vars(codec._native) | calls))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    w = torch.randn(64, 64)
    qkern.quantize(w).dequantize()
    qkern.quantize(w, method="search")
    assert {name for name, _ in seen} == set(names)
    assert {threads for _, threads in seen} == {3}


def test_no_gradient_for_inputs_made_in_inference_mode() -> None:
    w = qkern.quantize(torch.randn(70, 128))
    with torch.inference_mode():
        y = qkern.linear(torch.randn(3, 128), w)
    assert y.is_inference()
