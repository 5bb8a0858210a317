"""Tensors without data, wrapped ones, and what is no tensor at all: a result or a typed error."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from format_cases import FORMATS
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils import parametrizations, parametrize, prune

import qkern
from qkern import functional
from qkern.layers import QLoRALinear, QuantizedLinear


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 8))


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


# -- wrapped ---------------------------------------------------------------------------------


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[object]:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.case("A17")
@pytest.mark.filterwarnings("ignore:DTensor random operators:UserWarning")  # torch 2.6's own
def test_a_distributed_tensor_is_refused(mesh: object) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    sharded = distribute_tensor(torch.randn(4, 64), mesh, [Shard(0)])
    with pytest.raises(qkern.DTypeError, match=r"DTensor.*full_tensor"):
        qkern.quantize(sharded)
    model = net()
    model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh, [Shard(0)]))
    with pytest.raises(qkern.DTypeError, match=r"0\.weight: a DTensor"):
        qkern.quantize_model(model)
    assert type(model[0]) is nn.Linear
    full = sharded.full_tensor()
    assert torch.equal(qkern.quantize(full).packed, qkern.quantize(full.clone()).packed)


@pytest.mark.case("A17")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # jvp's own
def test_quantizing_inside_of_a_transform_is_refused() -> None:
    values = torch.randn(3, 4, 64)

    def lossy(values: Tensor) -> Tensor:
        return qkern.dequantize(qkern.quantize(values)).sum()

    for transformed in (
        lambda: torch.func.vmap(lossy)(values),
        lambda: torch.func.grad(lossy)(values),
        lambda: torch.func.jvp(lossy, (values,), (values,)),
    ):
        with pytest.raises(qkern.DTypeError, match=r"outside of torch\.func"):
            transformed()
    assert not qkern.dequantize(qkern.quantize(values.requires_grad_())).requires_grad


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def weight_norm(layer: nn.Linear) -> nn.Module:
    return parametrizations.weight_norm(layer)


def old_weight_norm(layer: nn.Linear) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.nn.utils.weight_norm(layer)


def spectral_norm(layer: nn.Linear) -> nn.Module:
    return torch.nn.utils.spectral_norm(layer)


def doubled(layer: nn.Linear) -> nn.Module:
    return parametrize.register_parametrization(layer, "weight", Doubled())


def doubled_bias(layer: nn.Linear) -> nn.Module:
    return parametrize.register_parametrization(layer, "bias", Doubled())


def pruned(layer: nn.Linear) -> nn.Module:
    return prune.random_unstructured(layer, "weight", 0.5)


COMPUTED = [weight_norm, old_weight_norm, spectral_norm, doubled, doubled_bias, pruned]


@pytest.mark.case("A17")
@pytest.mark.parametrize("change", COMPUTED)
def test_a_computed_weight_is_refused_by_the_layer_and_reported_by_the_model(
    change: object,
) -> None:
    layer = change(nn.Linear(128, 64))
    x = torch.randn(2, 128)
    expected = layer.eval()(x)
    for cls in (QuantizedLinear, QLoRALinear):
        with pytest.raises(qkern.FormatError, match="is computed from others"):
            cls.from_linear(layer)
    model = nn.Sequential(layer, nn.Linear(64, 64))
    report = qkern.quantize_model(model)
    assert torch.equal(layer(x), expected)
    assert all(row.reason for row in report.rows if row.name.startswith("0"))
    assert [row.name for row in report.quantized] == ["1"]


@pytest.mark.case("A17")
def test_a_weight_that_was_made_a_parameter_again_is_quantized() -> None:
    layer = doubled(nn.Linear(128, 64))
    parametrize.remove_parametrizations(layer, "weight")
    dense = layer.weight.detach().clone()
    weight = QuantizedLinear.from_linear(layer).weight
    assert torch.equal(weight.packed, qkern.quantize(dense).packed)


@pytest.mark.case("A17")
def test_a_quantized_layer_takes_no_parametrization() -> None:
    layer = QuantizedLinear.from_linear(nn.Linear(128, 64))
    parametrize.register_parametrization(layer, "weight", Doubled())
    with pytest.raises(qkern.DTypeError, match=r"weight is a Tensor"):
        layer(torch.randn(2, 128))


@pytest.mark.case("A17")
def test_a_plain_subclass_is_the_tensor_that_it_is() -> None:
    class Marked(torch.Tensor):
        pass

    values = torch.randn(4, 64)
    assert torch.equal(
        qkern.quantize(values.as_subclass(Marked)).packed, qkern.quantize(values).packed
    )


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
