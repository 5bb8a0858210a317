"""Layers that share x, in one launch: in Triton's interpreter, against each alone and fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from forced_device import error, multiply_densely, send_to_kernels, weight_of
from kernel_device import DEVICE
from kernel_memory import guarded
from kernel_products import Product, product, worst_error

from qkern import ops, reference
from qkern.errors import DTypeError, ShapeError
from qkern.kernels import launch, lora, projections, projections_backward
from qkern.kernels.dispatch import Config
from qkern.kernels.linear import linear
from qkern.ops import Layer
from qkern.ops.projections import _projections
from qkern.ops.projections_backward import projections_backward as backward_operator

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
# op, tile, tokens, split
CONFIGS = [
    Config("matvec", 16, 4, (2, 64, 256), 4, 1),
    Config("matmul", 16, 32, (16, 32, 64), 4, 2, ahead=True),
    Config("matmul_small", 16, 32, (16, 32, 64), 4, 2, split=2),
]


one_launch = pytest.mark.skipif(
    not launch.TAKES_TUPLES, reason="layers share a launch since Triton 3.3: it takes their tuples"
)


def together(
    M: int, rows: tuple[int, ...], ranks: tuple[int, ...], biased: tuple[bool, ...], **how: Any
) -> tuple[list[Product], Tensor, Tensor | None]:
    """Operands of layers, the x that they share, and their h side by side."""
    each = zip(rows, ranks, biased, strict=True)
    operands = [product(M, N, 192, rank=rank, bias=bias, **how) for N, rank, bias in each]
    x = operands[0].x
    h = [own.h for own in operands if own.h is not None]
    return [own._replace(x=x) for own in operands], x, torch.cat(h, dim=1) if h else None


def run(operands: list[Product], x: Tensor, h: Tensor | None, how: Config) -> list[Tensor]:
    weights, biases = [own.weight for own in operands], [own.bias for own in operands]
    with guarded():
        return projections.projections(
            x, weights, biases, h, [own.lora_B for own in operands], config=how
        )


@one_launch
@pytest.mark.case("A11", "A14")
@pytest.mark.parametrize("how", CONFIGS, ids=str)
def test_a_config_gives_each_layer_the_bits_that_it_gives_it_alone(how: Config) -> None:
    """Rows fill no tile, and groups of 8-bit scales, of 42 rows and a part of one, no weight."""
    M = 2 if how.op == "matvec" else 18
    rounded = how.op != "matvec"
    operands, x, h = together(
        M, (48, 7, 33), (3, 0, 17), (True, False, True), blocksize=32, rounded=rounded
    )
    for own, y in zip(operands, run(operands, x, h, how), strict=True):
        assert worst_error(y, own) <= 1
        assert torch.equal(y, linear(x, own.weight, own.bias, own.h, own.lora_B, config=how))


@one_launch
@pytest.mark.parametrize(
    ("quant_type", "double_quant", "dtype"), [("int8_row", False, FP16), ("fp4", False, FP32)]
)
def test_two_layers_of_other_formats_without_adapters(
    quant_type: str, double_quant: bool, dtype: torch.dtype
) -> None:
    blocksize = 192 if quant_type == "int8_row" else 64
    how = {"quant_type": quant_type, "blocksize": blocksize, "double_quant": double_quant}
    operands, x, h = together(3, (5, 40), (0, 0), (False, True), dtype=dtype, **how)
    for own, y in zip(operands, run(operands, x, h, CONFIGS[1]), strict=True):
        assert worst_error(y, own) <= 1


@one_launch
@pytest.mark.parametrize("processors", [1, 8])
def test_the_gradient_of_x_is_that_of_fp64(
    processors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With more processors rows are split between programs, across the ends of weights."""
    monkeypatch.setattr(lora, "processors", lambda _: processors)
    M, rows = 20, (40, 7, 133)
    operands, _, _ = together(M, rows, (0, 0, 0), (False,) * 3)
    grads = [torch.randn(M, N).to(BF16) for N in rows]
    G, A = torch.randn(M, 19), torch.randn(19, 192)
    with guarded():
        weights = [own.weight for own in operands]
        dX = projections_backward.projections_backward(grads, weights, G, A)
    terms = [(g.double(), own.dense.double()) for g, own in zip(grads, operands, strict=True)]
    terms.append((G.double(), A.double()))
    exact = sum(a @ b for a, b in terms)
    size = sum(a.abs() @ b.abs() for a, b in terms)
    assert ((dX.double() - exact).abs() / (exact.abs() * 2**-8 + size * 2**-20)).max() <= 1


def test_layers_that_one_launch_cannot_take_are_refused() -> None:
    one, other = product(3, 8, 64), product(3, 8, 192, quant_type="int8")
    with pytest.raises(
        ShapeError, match="same in-features and format, got 192 in-features of int8; 64"
    ):
        projections.projections(one.x, [one.weight, other.weight], [None, None])
    operands, x, h = together(3, (8, 16), (2, 2), (False, False))
    weights, (B, C) = [own.weight for own in operands], [own.lora_B for own in operands]
    with pytest.raises(DTypeError, match="one dtype"):
        projections.projections(x, weights, [None, None], h, [B, C.float()])
    with pytest.raises(ShapeError, match=r"lora_B \(8, 2\) must be .* N = 16"):
        projections.projections(x, weights, [None, None], h, [B, B])
    with pytest.raises(ShapeError, match=r"R = 2"):
        projections.projections(x, weights, [None, None], h, [B, None])
    nothing = projections.projections(x[:0], weights, [None, None])
    assert [y.shape for y in nothing] == [(0, 8), (0, 16)]


def layers_of(
    dtype: torch.dtype, adapter: torch.dtype, rows: tuple[int, ...] = (24, 8, 16)
) -> tuple[list[Layer], list[Tensor]]:
    """The first and the last have an adapter, the first a bias; with what is trained."""
    layers, trained = [], []
    for i, N in enumerate(rows):
        weight = weight_of(N, 64)
        bias = torch.randn(N).to(dtype).requires_grad_() if i == 0 else None
        A = B = None
        if i != 1:
            A = torch.randn(i + 2, 64).div(8).to(adapter).requires_grad_()
            B = torch.randn(N, i + 2).to(adapter).requires_grad_()
        layers.append(Layer(weight.parts, weight.format, N, bias, A, B, 0.5 + i))
        trained += [t for t in (bias, A, B) if t is not None]
    return layers, trained


def exact_outputs(x: Tensor, layers: list[Layer], leaves: list[Tensor]) -> list[Tensor]:
    """y_i in fp64, of leaves in fp64 in the order of ``layers_of``."""
    rest, outputs = iter(leaves), []
    for layer in layers:
        N, K = layer.out_features, x.shape[-1]
        W = reference.dequantize(layer.parts, layer.fmt, N * K, torch.float32)
        bias = next(rest) if layer.bias is not None else None
        A, B = (next(rest), next(rest)) if layer.lora_A is not None else (None, None)
        W = W.reshape(N, K).double()
        outputs.append(reference.linear(x, W, bias, A, B, layer.scaling))
    return outputs


@one_launch
@pytest.mark.parametrize(
    ("dtype", "adapter", "dense", "bound"),
    [
        (FP32, FP32, False, 1e-6),
        (BF16, FP32, True, 2**-8),
        (FP16, FP16, True, 2**-10),
    ],
    ids=str,
)
def test_outputs_and_gradients_are_those_of_fp64(
    dtype: torch.dtype,
    adapter: torch.dtype,
    dense: bool,
    bound: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """``dense``: as for many tokens, which torch multiplies."""
    layers, trained = layers_of(dtype, adapter)
    x = torch.randn(2, 3, 64).to(dtype).requires_grad_()
    launches = send_to_kernels(monkeypatch)
    if dense:
        multiply_densely(monkeypatch)
    assert ops.share_a_launch(x, layers)
    leaves = [x, *trained]
    outputs = ops.projections(x, layers)
    grads = [torch.randn(y.shape).to(dtype) for y in outputs]
    got = [*outputs, *torch.autograd.grad(outputs, leaves, grads)]
    assert launches.count("hidden") == launches.count("grad_a") == 1
    assert launches.count("grad_hidden") == 2
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = exact_outputs(exact_leaves[0], layers, exact_leaves[1:])
    doubles = [grad.double() for grad in grads]
    exact += torch.autograd.grad(exact, exact_leaves, doubles)
    # Weights are rounded to x's dtype first.
    assert max(error(g, e.detach()) / bound for g, e in zip(got, exact, strict=True)) <= 1
    with torch.no_grad():
        again = ops.projections(x, layers)
    assert all(torch.equal(*pair) for pair in zip(again, outputs, strict=True))


def test_a_triton_without_tuples_multiplies_by_one_layer_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers, trained = layers_of(BF16, FP32)
    x = torch.randn(5, 64).to(BF16).requires_grad_()
    launches = send_to_kernels(monkeypatch)
    monkeypatch.setattr(launch, "TAKES_TUPLES", False)
    assert not ops.share_a_launch(x, layers)
    outputs = ops.projections(x, layers)
    assert launches.count("hidden") == 2  # of the layers with an adapter
    alone = [ops.linear(x, *layer) for layer in layers]
    leaves = [x, *trained]
    grads = [torch.randn(y.shape).to(BF16) for y in outputs]
    got = [*outputs, *torch.autograd.grad(outputs, leaves, grads)]
    right = [*alone, *torch.autograd.grad(alone, leaves, grads)]
    assert all(torch.equal(*pair) for pair in zip(got, right, strict=True))


def test_outputs_that_were_not_used_have_no_part_in_the_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers, trained = layers_of(FP32, FP32)
    x = torch.randn(3, 64, requires_grad=True)
    send_to_kernels(monkeypatch)
    multiply_densely(monkeypatch)
    used = ops.projections(x, layers)[2]
    leaves = [x, *trained]
    got = torch.autograd.grad(used.square().sum(), leaves, allow_unused=True)
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = exact_outputs(exact_leaves[0], layers, exact_leaves[1:])[2]
    right = torch.autograd.grad(exact.square().sum(), exact_leaves, allow_unused=True)
    for mine, other in zip(got, right, strict=True):
        assert (mine is None) == (other is None)
        assert mine is None or error(mine, other) < 1e-5


def test_gradients_of_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, trained = layers_of(FP32, FP32)
    x = torch.randn(3, 64, requires_grad=True)
    send_to_kernels(monkeypatch)
    multiply_densely(monkeypatch)

    def twice(outputs: list[Tensor], leaves: list[Tensor]) -> tuple[Tensor, ...]:
        value = sum(y.pow(3).sum() for y in outputs)
        first = torch.autograd.grad(value, leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    leaves = [x, *trained]
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = twice(exact_outputs(exact_leaves[0], layers, exact_leaves[1:]), exact_leaves)
    for got, right in zip(twice(ops.projections(x, layers), leaves), exact, strict=True):
        assert error(got, right) < 1e-5


def test_under_autocast_operands_are_cast_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, trained = layers_of(FP32, FP32)
    x = torch.randn(3, 64, requires_grad=True)
    send_to_kernels(monkeypatch)
    multiply_densely(monkeypatch)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        outputs = ops.projections(x, layers)
    alone = []
    with torch.autocast(DEVICE.type, torch.bfloat16):
        alone = [ops.linear(x, *layer) for layer in layers]
    for y, right in zip(outputs, alone, strict=True):
        assert y.dtype == BF16
        assert torch.allclose(y, right, atol=2**-6, rtol=2**-7)
    grads = torch.autograd.grad(sum(y.sum() for y in outputs), [x, *trained])
    assert {g.dtype for g in grads} == {FP32}


def test_the_operators_pass_torchs_own_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    send_to_kernels(monkeypatch)
    multiply_densely(monkeypatch)
    layers, _ = layers_of(FP32, FP32, (8, 4))
    layer, plain = (
        own._replace(**{n: t.detach() for n, t in own._asdict().items() if isinstance(t, Tensor)})
        for own in layers
    )
    parts = [list(each) for each in zip(layer.parts, plain.parts, strict=True)]
    weights = (*parts, "nf4", 64, [8, 4])
    adapters = ([layer.lora_A], [layer.lora_B], [0], [0.5])
    x = torch.randn(2, 64, requires_grad=True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    forward = (x, *weights, [layer.bias], [0], *adapters)
    torch.library.opcheck(_projections, forward, test_utils=checks)
    grads, h = [torch.randn(2, 8)], torch.randn(2, 2)
    for needs in ([True, True], [False, True], [True, False]):
        backward = (grads, [0], x.detach(), h, *weights, *adapters, 64, needs)
        torch.library.opcheck(backward_operator, backward, test_utils=checks)
    columns = [[t.mT.contiguous().mT for t in each] for each in adapters[:2]]
    backward = (grads, [0], x.detach(), h, *weights, *columns, *adapters[2:], 64, [True, True])
    torch.library.opcheck(backward_operator, backward, test_utils=checks)
