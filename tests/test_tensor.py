"""The tensor and the layers: values, operators, autograd, compile, additions and their inverse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from format_cases import FORMATS, KINDS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from toys import Stack, layer

import qkern
from qkern import reference
from qkern.layers import QLoRALinear, QuantizedLinear
from qkern.undo import take_back

# (rows, columns): whole blocks; blocks across rows; odd count; fewer values than a block
SHAPES = [(8, 128), (5, 96), (7, 33), (3, 5), (192, 172)]


# -- the value -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("quant_type", "double_quant"), FORMATS)
def test_parts_and_value_are_the_references(
    shape: tuple[int, int], quant_type: str, double_quant: bool
) -> None:
    w = torch.randn(shape)
    q = qkern.quantize(w, quant_type, double_quant=double_quant)
    parts = reference.quantize(w, q.format)
    for got, expected in zip(q.parts, parts, strict=True):
        assert (got is None) == (expected is None)
        if expected is not None:
            assert torch.equal(got.reshape(-1), expected)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        expected = reference.dequantize(parts, q.format, w.numel(), dtype).reshape(shape)
        assert torch.equal(q.dequantize(dtype), expected)


def test_wrapper_reports_the_dense_tensor() -> None:
    q = qkern.quantize(torch.randn(64, 128, dtype=torch.bfloat16))
    assert (q.shape, q.dtype, q.numel()) == ((64, 128), torch.bfloat16, 8192)
    assert q.packed.shape == (64, 64)
    assert q.absmax.shape == (64, 2)
    assert q.nbytes == q.format.nbytes(8192)


@pytest.mark.parametrize("quant_type", KINDS)
@pytest.mark.parametrize("columns", [128, 172])
def test_slices_of_rows_dequantize_to_the_rows(columns: int, quant_type: str) -> None:
    q = qkern.quantize(torch.randn(40, columns), quant_type)
    dense = q.dequantize()
    for rows in (slice(3, 9), slice(0, 40), slice(39, 40), slice(5, 5)):
        assert torch.equal(q[rows].dequantize(), dense[rows])
    assert torch.equal(torch.cat([part.dequantize() for part in q.split(7)]), dense)


def test_other_operators_see_the_dense_value() -> None:
    q = qkern.quantize(torch.randn(6, 64))
    dense = q.dequantize()
    assert torch.equal(q + 1, dense + 1)
    assert torch.equal(q.t() @ dense, dense.t() @ dense)
    assert q.norm() == dense.norm()
    assert torch.equal(q[:, 3], dense[:, 3])


def test_writes_that_would_be_lost_are_refused() -> None:
    q = qkern.quantize(torch.randn(4, 64))
    with pytest.raises(qkern.FrozenWeightError, match="dequantize"):
        torch.mul(torch.ones(4, 64), 2, out=q)
    with pytest.raises(qkern.FrozenWeightError, match="dequantize"):
        torch._foreach_mul_([q], 0.0)
    with pytest.raises(qkern.DTypeError, match="float8"):
        q.to(torch.float8_e4m3fn)


def test_forward_on_meta_gives_the_shape() -> None:
    assert layer().to("meta")(torch.empty(3, 128, device="meta")).shape == (3, 64)


def test_gradient_of_a_quantized_weight_is_refused() -> None:
    q = qkern.quantize(torch.randn(4, 64))
    for ask in (q.requires_grad_, lambda: setattr(q, "requires_grad", True)):
        with pytest.raises(qkern.FrozenWeightError, match="add_lora"):
            ask()
    q.requires_grad_(False)


def test_quantizing_twice_is_refused() -> None:
    with pytest.raises(qkern.DTypeError, match="already"):
        qkern.quantize(qkern.quantize(torch.randn(4, 64)))
    with pytest.raises(qkern.FormatError, match="already"):
        QuantizedLinear.from_linear(layer())


@pytest.mark.parametrize("quant_type", KINDS)
def test_in_place_addition_quantizes_again_and_its_inverse_restores_the_bytes(
    quant_type: str,
) -> None:
    q = qkern.quantize(torch.randn(64, 128), quant_type)
    before = [p.clone() for p in q.parts if p is not None]
    delta = torch.randn(64, 128) * 0.3
    q.data += delta
    assert not torch.equal(q.packed, before[0])
    q.data -= delta
    after = [p for p in q.parts if p is not None]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    q.data += delta
    q.data -= delta * 2  # not the inverse: an ordinary assignment
    assert not torch.equal(q.packed, before[0])


# -- autograd, checkpointing, compile --------------------------------------------------------


def losses_and_gradients(
    stack: nn.Module, run: Callable[[Tensor], Tensor] | None = None
) -> list[Tensor]:
    for parameter in stack.parameters():
        parameter.grad = None
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(3), requires_grad=True)
    loss = (stack if run is None else run)(x).square().mean()
    loss.backward()
    return [loss.detach(), x.grad, *(p.grad for p in stack.parameters() if p.grad is not None)]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    stack = Stack()
    expected = losses_and_gradients(stack)
    got = losses_and_gradients(stack, lambda x: checkpoint(stack, x, use_reentrant=reentrant))
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_compile_fullgraph_equals_eager_without_recompiling_for_every_shape() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    stack = Stack()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(stack, fullgraph=True, backend=counter)
    for a, b in zip(
        losses_and_gradients(stack, compiled), losses_and_gradients(stack), strict=True
    ):
        torch.testing.assert_close(a, b)
    for size in (5, 6, 7, 8):
        compiled(torch.randn(size, 256))
    assert counter.frame_count <= 3


@pytest.mark.parametrize("quant_type", KINDS)
def test_compile_of_f_linear_over_a_quantized_weight(quant_type: str) -> None:
    torch._dynamo.reset()
    q, x = qkern.quantize(torch.randn(64, 128), quant_type), torch.randn(2, 128)
    compiled = torch.compile(nn.functional.linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, q), nn.functional.linear(x, q))


@pytest.mark.parametrize("quant_type", KINDS)
def test_compile_with_checkpointing_inside(quant_type: str) -> None:
    torch._dynamo.reset()
    stack = Stack(quant_type=quant_type)

    def run(x: Tensor) -> Tensor:
        return checkpoint(stack, x, use_reentrant=False)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        losses_and_gradients(stack, compiled), losses_and_gradients(stack), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_autocast_casts_x_and_adapter_but_never_scales() -> None:
    lora = QLoRALinear.from_linear(layer(), init_lora_weights=False)
    x = torch.randn(3, 128)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora(x)
    assert y.dtype == torch.bfloat16
    plain = lora.to(torch.bfloat16)
    torch.testing.assert_close(y, plain(x.bfloat16()), rtol=0.02, atol=0.02)


def test_wrong_in_features_names_what_was_expected() -> None:
    with pytest.raises(qkern.ShapeError, match=r"128.*\(3, 64\)"):
        layer()(torch.randn(3, 64))


@pytest.mark.case("E5")
def test_several_additions_are_taken_back_in_their_order() -> None:
    q = qkern.quantize(torch.randn(16, 64))
    deltas = [torch.randn(16, 64) * 0.1 for _ in range(3)]
    states = []
    for delta in deltas:
        states.append([p.clone() for p in q.parts if p is not None])
        q.data += delta
    for delta, state in zip(reversed(deltas), reversed(states), strict=True):
        q.data -= delta
        assert all(torch.equal(a, b) for a, b in zip(q.parts, state, strict=True))


def test_a_sum_with_a_copy_is_dense_and_has_a_gradient() -> None:
    q = qkern.quantize(torch.randn(8, 64))
    delta = (torch.randn(8, 64) * 1e-3).requires_grad_()
    for sign in (1, -1):
        total = q.clone()
        if sign > 0:
            total += delta
        else:
            total -= delta
        assert torch.equal(total.detach(), q.dequantize() + sign * delta.detach())
        nn.functional.linear(torch.ones(1, 64), total).sum().backward()
        assert torch.equal(delta.grad, torch.full((8, 64), float(sign)))
        delta.grad = None
    total = q.clone()
    total.add_(delta)  # a method's result may be dropped: the copy itself changes
    assert isinstance(total, qkern.QuantizedTensor)
    nn.functional.linear(torch.ones(1, 64), total).sum().backward()
    assert torch.equal(delta.grad, torch.ones(8, 64))


def test_a_safe_merge_is_taken_back_to_the_byte() -> None:
    q = qkern.quantize(torch.randn(8, 64))
    before = [p.clone() for p in q.parts if p is not None]
    delta = torch.randn(8, 64) * 0.1
    merged = q.data.clone()
    merged += delta
    q.data = merged
    assert not torch.equal(q.packed, before[0])
    q.data -= delta
    assert all(torch.equal(a, b) for a, b in zip(q.parts, before, strict=True))


def test_a_merge_that_was_overwritten_is_not_taken_back() -> None:
    q = qkern.quantize(torch.randn(8, 64))
    q.data += torch.ones(8, 64)
    q.undo.label = "adapter"
    q.data = torch.zeros(8, 64)
    assert not take_back(q, "adapter")
    assert not q.dequantize().any()
