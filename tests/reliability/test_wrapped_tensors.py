"""Distributed, transformed, computed and subclassed tensors: a result or a typed error."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from toys import net

import qkern
from qkern.layers import QLoRALinear, QuantizedLinear


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
