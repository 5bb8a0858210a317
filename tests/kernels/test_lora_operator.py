"""``qkern::lora_linear`` as torch sees it: schema, tracing, compilation, modes, derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")
from forced_device import error, leaves_of, send_to_kernels, weight_of

import qkern
from qkern import kernels, reference
from qkern.ops import device
from qkern.ops.linear import _linear, _linear_backward
from qkern.ops.lora_gradients import _lora_gradients
from qkern.ops.lora_linear import lora_linear, lora_linear_backward


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return send_to_kernels(monkeypatch)


def layer(lora_dropout: float = 0.0) -> qkern.QLoRALinear:
    dense = torch.nn.Linear(64, 24)
    options = {"lora_dropout": lora_dropout, "init_lora_weights": False}
    return qkern.QLoRALinear.from_linear(dense, r=3, **options)


def gradients(function: Any, x: Tensor, made: torch.nn.Module) -> list[Tensor]:
    """y, dX and those of the trained parameters; with the same random numbers each time."""
    made.zero_grad()
    x = x.detach().requires_grad_()
    torch.manual_seed(3)
    y = function(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in made.parameters() if p.grad is not None)]


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck's own access
@pytest.mark.parametrize("merged", [False, True])
def test_opcheck(merged: bool) -> None:
    weight, (x, bias, A, B) = weight_of(24, 64), leaves_of((2, 3), 24, 64, 3)
    seed = None if merged else torch.tensor([5])
    how = (0.5, seed, 0.0 if merged else 0.25, merged)
    parts = (*weight.parts, "nf4", 64)
    torch.library.opcheck(lora_linear, (x, *parts, bias, A, B, *how))
    grad, h = torch.randn(2, 3, 24), torch.randn(0 if merged else 6, 3)
    detached = [t.detach() for t in (x, A, B)]
    without = ("test_schema", "test_faketensor")  # what has no gradients of its own
    for needs in ([True, True, True], [False, False, True]):
        arguments = (grad, detached[0], h, *parts, *detached[1:], *how, needs)
        torch.library.opcheck(lora_linear_backward, arguments, test_utils=without)
    columns = [t.mT.contiguous().mT for t in detached[1:]]  # their gradients lie in rows
    arguments = (grad, detached[0], h, *parts, *columns, *how, [True, True, True])
    torch.library.opcheck(lora_linear_backward, arguments, test_utils=without)


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_modes_see_the_operators_and_the_same_numbers(dropout: float) -> None:
    made, x = layer(dropout), torch.randn(5, 64)
    direct = gradients(made, x, made)
    with Seen() as seen:
        watched = gradients(made, x, made)
    named = [name for name in seen.names if name.startswith("qkern")]
    assert named == ["qkern.lora_linear.default", "qkern.lora_linear_backward.default"]
    assert len(direct) == 4
    assert all(torch.equal(*pair) for pair in zip(direct, watched, strict=True))


def test_nothing_waits_for_the_device() -> None:
    """No operation below the operators asks for a value."""
    weight, (x, bias, A, B) = weight_of(24, 64), leaves_of(5, 24, 64, 3)
    base = device.Base(weight.parts, weight.format, (24, 64))
    adapter = device.Adapter(A, B, 0.5, torch.tensor([5]), 0.25)
    with torch.no_grad(), Seen() as seen:
        y, h = device.lora_linear(x, base, bias, adapter)
        device.lora_linear_backward(y, x, h, base, adapter, (True, True, True))
        merged = device.Adapter(A, B, 0.5, merged=True)
        device.lora_linear(x, base, bias, merged)
    assert seen.names
    waiting = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal")
    assert not [name for name in seen.names if any(word in name for word in waiting)]


class Block(torch.nn.Module):
    """Two layers of an input, the first checkpointed or not."""

    def __init__(self, dropout: float, *, checkpointed: bool) -> None:
        super().__init__()
        self.up, self.again = layer(dropout), layer(dropout)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointed:
            y: Tensor = checkpoint(self.up, x, use_reentrant=False)
        else:
            y = self.up(x)
        return torch.tanh(y) + self.again(x)


@pytest.mark.case("D16")
@pytest.mark.parametrize(("dropout", "checkpointed"), [(0.0, False), (0.25, True)])
def test_compiled_without_a_break_it_has_the_same_gradients(
    dropout: float, checkpointed: bool
) -> None:
    graphs: list[str] = []

    def keep(graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        graphs.append(graph.code)
        return make_boxed_func(graph)

    cut = min_cut_rematerialization_partition  # as "aot_eager" and "inductor" do
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=cut)
    made = Block(dropout, checkpointed=checkpointed)
    compiled = torch.compile(made, fullgraph=True, backend=backend)
    for x in (torch.randn(5, 64), torch.randn(7, 64)):
        eager = gradients(made, x, made)
        for got, right in zip(gradients(compiled, x, made), eager, strict=True):
            assert error(got, right.double()) < 1e-6
    code = "".join(graphs)
    assert code.count("qkern.lora_linear_backward.default") % 2 == 0
    assert "qkern.lora_linear.default" in code
    # h is kept, not computed again; what is checkpointed is
    forward, backward = graphs[:2]
    assert forward.count("qkern.lora_linear.default") == 2
    assert backward.count("qkern.lora_linear.default") == int(checkpointed)
    assert ("randint" in code) == (dropout > 0)


def test_compiled_code_asks_for_a_device_once_and_without_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(kernels, "_capability", lambda _: (9, 0))

    def on_gpu(x: Tensor) -> Tensor:
        return x + 1 if kernels.is_supported(torch.device("cuda", 0)) else x

    compiled = torch.compile(on_gpu, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.zeros(2)), torch.ones(2))


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_gradients_of_gradients(dropout: float) -> None:
    weight, leaves = weight_of(16, 64), leaves_of(5, 16, 64, 4)
    seed = torch.tensor([7]) if dropout else None
    mask = 1.0
    if seed is not None:
        mask = device.dropout_mask(seed, dropout, (5, 64)).double()

    def by_kernels(x: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> Tensor:
        parts = (*weight.parts, "nf4", 64)
        y: Tensor = lora_linear(x, *parts, bias, A, B, 0.5, seed, dropout, False)[0]
        return y

    def by_torch(x: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> Tensor:
        base = reference.linear(x, weight.dequantize().double(), bias)
        return base + 0.5 * ((x * mask) @ A.mT) @ B.mT

    def twice(function: Any, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(function(*leaves).pow(3).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    exact_leaves = tuple(leaf.detach().double().requires_grad_() for leaf in leaves)
    exact = twice(by_torch, exact_leaves)
    for got, right in zip(twice(by_kernels, leaves), exact, strict=True):
        assert error(got, right) < 1e-5


@pytest.mark.case("D14")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # jvp's own
def test_transforms_of_torch_func_multiply_a_dense_weight(launches: list[str]) -> None:
    made, x = layer(), torch.randn(5, 64)
    weight = made.dequantize().weight + made.delta()
    jacobian = torch.func.vmap(torch.func.jacrev(made))(x)
    assert error(jacobian, weight.double().expand(5, 24, 64)) < 1e-6
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(made(dual)).tangent
    assert error(tangent, (torch.ones(5, 64) @ weight.mT).double()) < 1e-6
    assert launches == []


def test_the_plain_operators_take_an_adapter_on_a_device_too() -> None:
    """What a graph that was traced on a CPU holds."""
    weight, (x, bias, A, B) = weight_of(24, 64), leaves_of(5, 24, 64, 3)
    grad = torch.randn(5, 24)
    parts = (*weight.parts, "nf4", 64)
    plain = [op._init_fn for op in (_linear, _linear_backward, _lora_gradients)]
    with torch.no_grad():
        y = plain[0](x, *parts, 24, bias, A, B, 0.5)
        dX = plain[1](grad, *parts, 64, A, B, 0.5)
        dA, dB = plain[2](x, grad, A, B, 0.5)
    right = qkern.linear(x, weight, bias, lora_A=A, lora_B=B, scaling=0.5)
    assert torch.equal(y, right)
    expected = torch.autograd.grad(right, (x, A, B), grad)
    for got, want in zip((dX, dA, dB), expected, strict=True):
        assert error(got, want.double()) < 1e-6


@pytest.mark.case("A16")
def test_shapes_are_known_on_meta_and_in_fake_mode() -> None:
    made = layer(0.25).to("meta")
    x = torch.empty(2, 5, 64, device="meta", requires_grad=True)
    y = made(x)
    assert (y.shape, y.device.type) == ((2, 5, 24), "meta")
    y.sum().backward()
    assert (x.grad.shape, made.lora_A.grad.shape) == (x.shape, (3, 64))
    real = layer(0.25)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert real(mode.from_tensor(torch.randn(5, 64))).shape == (5, 24)
