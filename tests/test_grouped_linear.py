"""``grouped_linear``: rows sorted by expert, times stacked weights, against fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import qkern
from qkern import reference
from qkern.errors import DTypeError, ShapeError
from qkern.ops import experts
from qkern.tensor import QuantizedTensor

# (experts, N, K): groups of 8-bit scales begin in mid-expert; whole groups; blocks cross experts
SHAPES = [(5, 32, 64), (3, 128, 128), (2, 7, 33)]
FORMATS = [("nf4", True), ("nf4", False), ("int8", True), ("int8_row", False)]


def inputs(
    shape: tuple[int, int, int],
    quant_type: str = "nf4",
    *,
    double_quant: bool = True,
    transposed: bool = False,
    rows: int = 20,
) -> tuple[QuantizedTensor, Tensor, tuple[Tensor, ...]]:
    """A weight, offsets with rows behind the last one, and x, bias, A, B that want gradients."""
    experts, N, K = shape
    dense = torch.randn(experts, K, N) if transposed else torch.randn(shape)
    weight = qkern.quantize(dense, quant_type, double_quant=double_quant)
    offsets = torch.tensor(sorted(torch.randint(0, rows - 2, (experts,)).tolist()))
    sizes = ((rows, K), (experts, N), (experts, 4, K), (experts, N, 4))
    leaves = tuple(torch.randn(size, requires_grad=True) for size in sizes)
    return weight, offsets, leaves


def product(
    weight: QuantizedTensor, offsets: Tensor, leaves: tuple[Tensor, ...], *, transposed: bool
) -> Tensor:
    x, bias, A, B = leaves
    settings = {"lora_A": A, "lora_B": B, "scaling": 0.5, "transposed": transposed}
    return qkern.grouped_linear(x, weight, offsets, bias, **settings)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("quant_type", "double_quant"), FORMATS)
def test_product_and_all_gradients_equal_fp64(
    shape: tuple[int, int, int], quant_type: str, double_quant: bool, transposed: bool
) -> None:
    weight, offsets, leaves = inputs(
        shape, quant_type, double_quant=double_quant, transposed=transposed
    )
    y = product(weight, offsets, leaves, transposed=transposed)
    grads = torch.autograd.grad(y.square().sum(), leaves)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    dense = weight.dequantize().double()
    expected = reference.grouped_linear(
        exact[0], dense, offsets, *exact[1:], 0.5, transposed=transposed
    )
    wanted = torch.autograd.grad(expected.square().sum(), exact)
    for got, want in zip((y, *grads), (expected, *wanted), strict=True):
        assert (got.double() - want).norm() <= 1e-6 * want.norm()
    assert not y[offsets[-1] :].any()
    assert not grads[0][offsets[-1] :].any()


def test_each_expert_is_multiplied_as_alone() -> None:
    """The same bytes by the same kernel: no tolerance."""
    weight, _, (x, bias, A, B) = inputs((3, 128, 128))
    y = qkern.grouped_linear(x, weight, torch.tensor([7, 7, 20]), bias, lora_A=A, lora_B=B)
    alone = [
        qkern.linear(x[rows], weight[e], bias[e], lora_A=A[e], lora_B=B[e])
        for e, rows in ((0, slice(7)), (2, slice(7, 20)))
    ]
    assert torch.equal(y, torch.cat(alone))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_half_precision_is_rounded_once(dtype: torch.dtype, transposed: bool) -> None:
    weight, _, (x, *_) = inputs((3, 128, 128), transposed=transposed)
    x, offsets = x.detach().to(dtype), torch.tensor([9, 9, 20])  # a single row is `matvec`'s
    y = qkern.grouped_linear(x, weight, offsets, transposed=transposed)
    dense = weight.dequantize(dtype).double()
    exact = reference.grouped_linear(x.double(), dense, offsets, transposed=transposed)
    # half an ulp of the output, and the rounding of sums in fp32
    assert ((y.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps / 2 + 1e-5).all()


def test_autocast_casts_what_is_multiplied() -> None:
    weight, offsets, leaves = inputs((5, 32, 64))
    with torch.autocast("cpu", torch.bfloat16):
        y = product(weight, offsets, leaves, transposed=False)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert {leaf.grad.dtype for leaf in leaves} == {torch.float32}


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck's own access
@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck(transposed: bool) -> None:
    weight, offsets, (x, bias, A, B) = inputs((5, 32, 64), transposed=transposed)
    kind = ("nf4", 64, *weight.shape[1:], transposed)
    check = torch.library.opcheck
    check(torch.ops.qkern.grouped_linear, (x, offsets, *weight.parts, *kind, bias, A, B, 0.5))
    plain = (x, offsets, *weight.parts, *kind, None, None, None, 1.0)
    check(torch.ops.qkern.grouped_linear, plain)
    leaves = [t.detach() for t in (x, torch.randn(20, 32), offsets, A, B)]
    check(torch.ops.qkern.grouped_lora_gradients, (*leaves, 0.5))
    rows = torch.randn(20, 32, requires_grad=True)
    check(torch.ops.qkern.grouped_sum, (rows, offsets))


def test_double_backward() -> None:
    weight, offsets, leaves = inputs((5, 32, 64))

    def gradient_norm(leaves: tuple[Tensor, ...], *, dense: bool) -> Tensor:
        if dense:
            W = weight.dequantize()
            y = reference.grouped_linear(leaves[0], W, offsets, *leaves[1:], 0.5)
        else:
            y = product(weight, offsets, leaves, transposed=False)
        grads = torch.autograd.grad(y.pow(3).sum(), leaves, create_graph=True)
        return sum(g.square().sum() for g in grads)

    got = torch.autograd.grad(gradient_norm(leaves, dense=False), leaves)
    want = torch.autograd.grad(gradient_norm(leaves, dense=True), leaves)
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gradient_that_is_not_finite_stays_in_the_bias_of_its_expert(
    value: float, compiled: bool
) -> None:
    weight, *_ = inputs((5, 32, 64))
    offsets, bias = torch.tensor([3, 9, 9, 14, 18]), torch.randn(5, 32, requires_grad=True)
    x, grad = torch.randn(20, 64), torch.randn(20, 32)
    grad[5, 7] = grad[19, 0] = value  # of expert 1, and behind the last one

    def multiply(x: Tensor, bias: Tensor) -> Tensor:
        return qkern.grouped_linear(x, weight, offsets, bias)

    if compiled:
        multiply = torch.compile(multiply, backend="aot_eager", fullgraph=True)
    multiply(x, bias).backward(grad)
    wrong = torch.zeros(5, 32, dtype=torch.bool)
    wrong[1, 7] = True
    assert torch.equal(~bias.grad.isfinite(), wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_those_of_fp64_for_any_device(dtype: torch.dtype) -> None:
    rows, offsets = torch.randn(20, 32).to(dtype), torch.tensor([3, 9, 9, 14, 18])
    spoiled = rows.clone()
    spoiled[5, 7] = spoiled[19, 0] = torch.nan
    exact = torch.stack(
        [rows[i:j].double().sum(0) for _, i, j in reference.spans(offsets, rows=20)]
    )
    for sums in (experts.sums, experts._masked_sums):
        found = sums(rows, offsets)
        assert found.dtype == dtype
        torch.testing.assert_close(found, exact.to(dtype))
        part = sums(spoiled, offsets)
        assert part[1, 7].isnan()
        assert torch.equal(part[[0, 2, 3, 4]], found[[0, 2, 3, 4]])


def test_compiled_code_has_no_break_at_the_choice_of_experts() -> None:
    weight, offsets, leaves = inputs((5, 32, 64))

    def step(offsets: Tensor, *leaves: Tensor) -> Tensor:
        return product(weight, offsets, leaves, transposed=False).square().sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for given in (offsets, torch.tensor([0, 0, 20, 20, 20])):
        got = torch.autograd.grad(compiled(given, *leaves), leaves)
        want = torch.autograd.grad(step(given, *leaves), leaves)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_an_index_is_one_expert_in_its_own_bytes(shape: tuple[int, int, int]) -> None:
    weight, *_ = inputs(shape)
    for index in (0, 1, -1, torch.tensor(2)):
        one = weight[index]
        assert isinstance(one, QuantizedTensor)
        assert one.is_whole
        assert torch.equal(one.dequantize(), weight.dequantize()[index])
    with pytest.raises(IndexError, match="out of"):
        weight[shape[0]]


@pytest.mark.parametrize("double_quant", [False, True])
def test_writing_to_one_expert_never_leaves_codes_with_other_scales(double_quant: bool) -> None:
    """With fp32 scales it is a view; 8-bit ones have one offset for all: a write is lost."""
    weight, *_ = inputs((3, 128, 128), double_quant=double_quant)
    before = weight.dequantize()
    weight[1].add_(1.0)
    changed = weight.dequantize() != before
    assert bool(changed[1].any()) is not double_quant
    assert not changed[[0, 2]].any()


def test_operands_that_do_not_fit_are_refused() -> None:
    weight, offsets, (x, bias, A, _) = inputs((5, 32, 64))
    with pytest.raises(ShapeError, match=r"expects x of \(20, 32\), got \(20, 64\)"):
        qkern.grouped_linear(x, weight, offsets, transposed=True)
    with pytest.raises(ShapeError, match=r"expects offsets of \(5,\), got \(4,\)"):
        qkern.grouped_linear(x, weight, offsets[1:])
    with pytest.raises(ShapeError, match=r"expects bias of \(5, 32\), got \(32,\)"):
        qkern.grouped_linear(x, weight, offsets, bias[0])
    with pytest.raises(ShapeError, match=r"expects lora_B of \(5, 32, 4\), got None"):
        qkern.grouped_linear(x, weight, offsets, lora_A=A)
    with pytest.raises(ShapeError, match=r"offsets\[1\] is 2: 4 to 20 is needed"):
        qkern.grouped_linear(x, weight, torch.tensor([4, 2, 5, 6, 7]))
    with pytest.raises(ShapeError, match=r"offsets\[4\] is 21: 7 to 20"):
        qkern.grouped_linear(x, weight, torch.tensor([4, 5, 6, 7, 21]))
    with pytest.raises(ShapeError, match=r"offsets\[1\] is 2: 4 to 20"):  # on a dense copy
        qkern.grouped_linear(x.double(), weight, torch.tensor([4, 2, 5, 6, 7]))
    with pytest.raises(DTypeError, match="expects offsets as a tensor, got a list"):
        qkern.grouped_linear(x, weight, [4, 5, 6, 7, 8])  # type: ignore[arg-type]
    with pytest.raises(DTypeError, match=r"expects offsets as int32 or int64 on cpu, got torch.fl"):
        qkern.grouped_linear(x, weight, offsets.float())
    with pytest.raises(ShapeError, match=r"stacked weights of 3 dimensions, got \(32, 64\)"):
        qkern.grouped_linear(x, weight[0], offsets)
    with pytest.raises(DTypeError, match="the weight is a Tensor"):
        qkern.grouped_linear(x, weight.dequantize(), offsets)


def test_no_experts_give_zeros() -> None:
    weight, none = qkern.quantize(torch.empty(0, 32, 64)), torch.empty(0, dtype=torch.int64)
    assert torch.equal(qkern.grouped_linear(torch.randn(3, 64), weight, none), torch.zeros(3, 32))
