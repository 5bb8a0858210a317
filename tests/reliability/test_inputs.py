"""Tensors without data, and what is no dense tensor at all: a result or a typed error."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from format_cases import FORMATS
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from toys import net

import qkern
from qkern import functional
from qkern.layers import QLoRALinear, QuantizedLinear

# -- no data ---------------------------------------------------------------------------------


@pytest.mark.case("A16")
@pytest.mark.parametrize(("quant_type", "double_quant"), FORMATS)
@pytest.mark.parametrize("shape", [(64, 128), (5, 33), (0, 3), ()])
def test_meta_has_the_shapes_of_real_data(
    quant_type: str, double_quant: bool, shape: tuple[int, ...]
) -> None:
    settings = {"quant_type": quant_type, "double_quant": double_quant}
    empty = qkern.quantize(torch.empty(shape, device="meta", dtype=torch.bfloat16), **settings)
    real = qkern.quantize(torch.ones(shape, dtype=torch.bfloat16), **settings)
    assert empty.is_meta
    assert (empty.format, empty.dtype, empty.nbytes) == (real.format, real.dtype, real.nbytes)
    for a, b in zip(empty.parts, real.parts, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a.is_meta, a.shape, a.dtype) == (True, b.shape, b.dtype)
    dense = qkern.dequantize(empty, torch.float32)
    assert (dense.is_meta, dense.shape, dense.dtype) == (True, shape, torch.float32)
    with pytest.raises(qkern.DTypeError, match="float64"):
        qkern.quantize(torch.empty(shape, device="meta", dtype=torch.float64))


@pytest.mark.case("A16")
def test_a_model_on_meta_is_planned_and_filled() -> None:
    with torch.device("meta"):
        planned = net()
    report = qkern.quantize_model(planned)
    real = net()
    assert qkern.quantize_model(real).bytes_after == report.bytes_after
    qkern.add_lora(planned)
    qkern.add_lora(real, init_lora_weights=False)
    x = torch.empty(3, 128, device="meta", requires_grad=True)
    planned(x).sum().backward()
    assert x.grad.shape == (3, 128)
    assert planned[0].lora_A.grad.shape == (16, 128)
    planned.load_state_dict(real.state_dict(), assign=True)
    x = torch.randn(3, 128)
    assert torch.equal(planned(x), real(x))


@pytest.mark.case("A16", "A13")
def test_meta_beside_real_data_is_refused() -> None:
    layer = QuantizedLinear.from_linear(nn.Linear(128, 64))
    with pytest.raises(qkern.DeviceError, match="weight on cpu, x is on meta"):
        layer(torch.empty(3, 128, device="meta"))
    with pytest.raises(qkern.DeviceError, match="weight on meta, x is on cpu"):
        layer.to("meta")(torch.randn(3, 128))


@pytest.mark.case("A16")
@pytest.mark.parametrize(("quant_type", "double_quant"), FORMATS)
def test_fake_tensors_pass_everywhere(quant_type: str, double_quant: bool) -> None:
    settings = {"quant_type": quant_type, "double_quant": double_quant}
    with FakeTensorMode():
        values, x = torch.randn(64, 128), torch.randn(3, 128, requires_grad=True)
        q = qkern.quantize(values, **settings)
        assert all(p is None or isinstance(p, FakeTensor) for p in q.parts)
        assert isinstance(qkern.dequantize(q), FakeTensor)
        if quant_type in ("nf4", "fp4"):
            weights = torch.rand(128)
            searched = qkern.quantize(values, **settings, method="search", importance=weights)
            assert isinstance(searched.packed, FakeTensor)
        out = torch.empty(64, 128)
        assert qkern.dequantize(q, out=out) is out
        layer = QLoRALinear.from_linear(nn.Linear(128, 64), **settings)
        layer(x).sum().backward()
        assert isinstance(x.grad, FakeTensor)
        model = net()
        report = qkern.quantize_model(model, **settings)
        qkern.add_lora(model)
        assert model(x).shape == (3, 8)
        assert isinstance(model.state_dict()["0.weight"], FakeTensor)
    assert qkern.quantize_model(net(), **settings).bytes_after == report.bytes_after


@pytest.mark.case("A16")
def test_fake_inputs_of_a_real_layer() -> None:
    layer = QuantizedLinear.from_linear(nn.Linear(128, 64))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert layer(torch.randn(3, 128)).shape == (3, 64)


@pytest.mark.case("A16")
@pytest.mark.parametrize("double_quant", [False, True])
def test_compiled_code_may_quantize(double_quant: bool) -> None:
    torch._dynamo.reset()
    values = torch.randn(64, 128)

    def round_trip(values: Tensor) -> Tensor:
        return functional.quantize(values, double_quant=double_quant).dequantize()

    # whether 8-bit scales are safe is known from their values alone: a break of the graph
    compiled = torch.compile(round_trip, backend="aot_eager", fullgraph=not double_quant)
    assert torch.equal(compiled(values), round_trip(values))


# -- no dense tensor at all ------------------------------------------------------------------


def sparse_csr() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.eye(4).to_sparse_csr()


def nested() -> Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)


def quantized_by_torch() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.quantize_per_tensor(torch.ones(4), 1.0, 0, torch.qint8)


@pytest.mark.case("A8")
@pytest.mark.parametrize(
    ("values", "text"),
    [
        (None, "NoneType"),
        ([1.0, 2.0], "list"),
        ("abc", "str"),
        (1.5, "float"),
        (lambda: torch.ones(4, dtype=torch.float64), "float64"),
        (lambda: torch.ones(4, dtype=torch.int32), "int32"),
        (lambda: torch.ones(4, dtype=torch.bool), "bool"),
        (lambda: torch.ones(4, dtype=torch.complex64), "complex64"),
        (lambda: torch.ones(4, dtype=torch.float8_e4m3fn), "float8"),
        (lambda: torch.eye(4).to_sparse(), "sparse_coo layout"),
        (sparse_csr, "sparse_csr layout"),
        (nested, "nested layout"),
        (quantized_by_torch, "qint8"),
        (lambda: qkern.quantize(torch.ones(4)), "already"),
        (lambda: qkern.quantize(np.ones(4, np.float32)), "already"),
        (lambda: np.ones(4), "float64"),
        (lambda: np.ones(4, np.int64), "int64"),
        (lambda: np.ones(4, np.complex64), "complex64"),
        (lambda: np.ones(4, object), "object"),
        (lambda: np.array(["a"]), "str"),
    ],
)
def test_what_cannot_be_quantized(values: object, text: str) -> None:
    values = values() if callable(values) else values
    with pytest.raises(qkern.DTypeError, match=text) as caught:
        qkern.quantize(values)
    assert isinstance(caught.value, TypeError)


@pytest.mark.case("A8")
@pytest.mark.parametrize(
    "q", [None, [1.0], "abc", 3, torch.ones(4), nn.Parameter(torch.ones(4)), np.ones(4, np.float32)]
)
def test_what_cannot_be_dequantized(q: object) -> None:
    with pytest.raises(qkern.DTypeError, match="what quantize returned"):
        qkern.dequantize(q)


@pytest.mark.case("A8")
@pytest.mark.parametrize("dtype", ["float64", "bogus", 3, torch.int8, np.int8])
def test_a_dtype_that_nothing_dequantizes_to(dtype: object) -> None:
    for values in (torch.ones(4), np.ones(4, np.float32)):
        with pytest.raises(qkern.DTypeError):
            qkern.dequantize(qkern.quantize(values), dtype)


@pytest.mark.case("A8", "A12")
@pytest.mark.parametrize(
    "x",
    [
        None,
        np.ones((3, 128), np.float32),
        torch.ones(3, 128, dtype=torch.int64),
        torch.ones(3, 128, dtype=torch.complex64),
        torch.ones(3, 128).to_sparse(),
    ],
)
def test_what_cannot_be_multiplied(x: object) -> None:
    with pytest.raises(qkern.DTypeError, match="QuantizedLinear expects"):
        QuantizedLinear.from_linear(nn.Linear(128, 64))(x)
    for weight in (None, torch.ones(64, 128), np.ones(3)):
        with pytest.raises(qkern.DTypeError, match="quantize it"):
            qkern.linear(torch.ones(3, 128), weight)


@pytest.mark.case("A8")
def test_a_layer_that_cannot_be_stood_in_for() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    replaced = nn.Linear(64, 4)
    replaced.forward = lambda x: x
    for layer, error in (
        (nn.Conv2d(4, 4, 1), qkern.DTypeError),
        (torch.ones(4, 4), qkern.DTypeError),
        (Scaled(64, 4), qkern.FormatError),
        (replaced, qkern.FormatError),
    ):
        with pytest.raises(error):
            QuantizedLinear.from_linear(layer)


@pytest.mark.case("A8")
def test_memory_that_is_not_there_is_never_handed_out() -> None:
    q = qkern.quantize(torch.randn(4, 64))
    for ask in (
        lambda: torch.from_dlpack(q),
        lambda: np.from_dlpack(q),
        lambda: q.apply_(lambda value: value),
        q.numpy,
        lambda: q.untyped_storage()[0],
    ):
        with pytest.raises((qkern.DTypeError, RuntimeError)):
            ask()
    q[1] = 2.0
    assert (q.dequantize()[1] - 2).abs().max() < 0.3
