"""``compute="exact"|"int8"`` as an argument: where it is taken, kept, refused, and not written."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from small_net import Net, adapted, assert_same_parts, inputs, parts_of, quantized, wrapped
from torch import Tensor, nn
from toys import tiny_llama, token_ids

import qkern
from qkern.errors import FormatError
from qkern.layers import QLoRALinear, QuantizedLinear
from qkern.module_tree import set_compute

UNKNOWN = r"unknown compute 'fp8': allowed are 'exact', 'int8'"


def kinds(model: nn.Module) -> set[str]:
    return {m.compute for m in model.modules() if isinstance(m, QuantizedLinear)}


def content(file: Path) -> object:
    """What a file says; safetensors writes its metadata in any order."""
    if file.suffix != ".safetensors":
        return file.read_text()
    with safe_open(file, "pt") as opened:
        tensors = {key: opened.get_tensor(key).tolist() for key in opened.keys()}  # noqa: SIM118
        return opened.metadata(), tensors


def by_attribute(model: nn.Module, compute: str) -> Tensor:
    """The output of a copy whose layers were told one by one."""
    told = copy.deepcopy(model)
    for module in told.modules():
        if isinstance(module, QuantizedLinear):
            module.compute = compute
    with torch.no_grad():
        return told(inputs())


def test_quantize_model_tells_every_layer_and_changes_no_byte() -> None:
    exact, int8 = quantized(), quantized(compute="int8")
    assert (kinds(exact), kinds(int8)) == ({"exact"}, {"int8"})
    assert_same_parts(int8, parts_of(exact))
    with torch.no_grad():
        y, rounded = exact(inputs()), int8(inputs())
    assert torch.equal(rounded, by_attribute(exact, "int8"))
    assert torch.equal(y, by_attribute(int8, "exact"))
    assert 0 < (rounded - y).norm() / y.norm() < 0.03


def test_layers_that_were_quantized_before_change_only_when_asked() -> None:
    model = quantized(compute="int8")
    packed = model.up.weight.packed
    qkern.quantize_model(model)
    assert kinds(model) == {"int8"}
    qkern.quantize_model(model, compute="exact", exclude="up")
    assert (model.up.compute, model.down.compute) == ("int8", "exact")
    assert model.up.weight.packed is packed
    model.down = nn.Linear(65, 8)
    qkern.quantize_model(model)
    assert (model.up.compute, model.down.compute) == ("int8", "exact")


def test_every_quantized_layer_is_told_the_output_head_included() -> None:
    model = tiny_llama()
    qkern.quantize_model(model, exclude="q_proj")
    model.lm_head = QuantizedLinear.from_linear(model.lm_head)
    qkern.quantize_model(model, exclude="q_proj", compute="int8")
    assert model.lm_head.compute == "exact"  # as quantize_model leaves it alone
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    assert set_compute(model, "int8") == 13
    assert kinds(model) == {"int8"}
    with pytest.raises(FormatError, match=UNKNOWN):
        set_compute(model, "fp8")
    assert kinds(model) == {"int8"}
    assert set_compute(tiny_llama(), "int8") == 0


def test_layers_take_it_when_they_are_made() -> None:
    dense, weight = nn.Linear(256, 64), qkern.quantize(torch.randn(64, 256))
    assert QuantizedLinear(weight).compute == "exact"
    assert QuantizedLinear(weight, compute="int8").compute == "int8"
    assert QLoRALinear(weight, r=2, compute="int8").compute == "int8"
    assert QLoRALinear.from_linear(dense, r=2).compute == "exact"
    assert QLoRALinear.from_linear(dense, r=2, compute="int8").compute == "int8"
    base = QuantizedLinear.from_linear(dense, compute="int8")
    assert base.compute == "int8"
    assert QLoRALinear.from_linear(base, r=2).compute == "int8"
    assert QLoRALinear.from_linear(base, r=2, compute="exact").compute == "exact"
    assert base.compute == "int8"
    assert "compute=int8" in repr(base)
    assert "compute" not in repr(QuantizedLinear.from_linear(dense))


@pytest.mark.parametrize("make", [quantized, adapted, wrapped])
@pytest.mark.parametrize("through", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_adapters_keep_it(
    make: Callable[..., nn.Module], through: Callable[[nn.Module], nn.Module]
) -> None:
    model = make(compute="int8").eval()
    copied = through(model)
    assert kinds(copied) == {"int8"}
    with torch.no_grad():
        assert torch.equal(copied(inputs()), model(inputs()))


def test_adapters_that_are_loaded_and_merged_keep_it(tmp_path: Path) -> None:
    model = adapted(compute="int8")
    qkern.save_adapter(model, tmp_path)
    fresh = quantized(compute="int8")
    qkern.load_adapter(fresh, tmp_path)
    assert kinds(fresh) == {"int8"}
    assert torch.equal(fresh(inputs()), model(inputs()))
    qkern.merge_adapter(fresh)
    qkern.unmerge_adapter(fresh)
    assert kinds(fresh) == {"int8"}


def test_int8_layers_train_with_exact_gradients() -> None:
    grads = {}
    for compute in ("exact", "int8"):
        model = nn.Sequential(nn.Linear(256, 64))
        with torch.no_grad():
            model[0].weight.copy_(torch.randn(64, 256, generator=torch.Generator().manual_seed(1)))
        qkern.quantize_model(model, compute=compute)
        qkern.add_lora(model, r=4)
        with torch.no_grad():
            for part in (model[0].lora_A, model[0].lora_B):
                part.copy_(torch.randn(part.shape, generator=torch.Generator().manual_seed(2)))
        x = torch.randn(3, 256, generator=torch.Generator().manual_seed(3)).requires_grad_()
        model(x).sum().backward()
        grads[compute] = (x.grad, model[0].lora_A.grad, model[0].lora_B.grad)
    for exact, rounded in zip(grads["exact"], grads["int8"], strict=True):
        torch.testing.assert_close(rounded, exact)


def test_files_do_not_hold_it(tmp_path: Path) -> None:
    saved = {}
    for compute in ("exact", "int8"):
        model = tiny_llama()
        qkern.quantize_model(model, compute=compute)
        qkern.add_lora(model, r=2)
        qkern.save(model, tmp_path / compute)
        saved[compute] = {p.name: content(p) for p in (tmp_path / compute).iterdir()}
    assert {"model.safetensors", "adapter_model.safetensors"} <= saved["int8"].keys()
    assert saved["int8"] == saved["exact"]
    loaded = qkern.load(tmp_path / "int8")
    assert kinds(loaded) == {"exact"}
    told = qkern.load(tmp_path / "int8", compute="int8")
    assert kinds(told) == {"int8"}
    with torch.no_grad():
        assert torch.equal(told(token_ids()).logits, model(token_ids()).logits)


def test_a_model_that_is_loaded_into_keeps_it(tmp_path: Path) -> None:
    qkern.save(quantized(seed=1), tmp_path)
    model = quantized(compute="int8")
    assert kinds(qkern.load(tmp_path, model)) == {"int8"}
    model.load_state_dict(quantized(seed=2).state_dict())
    assert kinds(model) == {"int8"}
    assert kinds(qkern.load(tmp_path, model, compute="exact")) == {"exact"}


@pytest.mark.parametrize("compute", ["fp8", "INT8", "", 8, ("int8",)])
def test_anything_else_is_refused_before_a_model_is_changed(compute: Any, tmp_path: Path) -> None:
    with torch.inference_mode():
        model = Net()
    before = dict(model.named_parameters())
    with pytest.raises(FormatError, match="unknown compute"):
        qkern.quantize_model(model, compute=compute)
    after = dict(model.named_parameters())
    assert [type(m) for m in (model.up, model.down)] == [nn.Linear, nn.Linear]
    assert before.keys() == after.keys()
    assert all(after[name] is before[name] for name in before)

    for cls in (QuantizedLinear, QLoRALinear):
        layer = nn.Linear(64, 64)
        with pytest.raises(FormatError, match="unknown compute"):
            cls.from_linear(layer, compute=compute)
        assert layer.bias.requires_grad
        with pytest.raises(FormatError, match="unknown compute"):
            cls(qkern.quantize(layer.weight.detach()), compute=compute)
    base = QuantizedLinear.from_linear(nn.Linear(64, 64))
    with pytest.raises(FormatError, match="unknown compute"):
        QLoRALinear.from_linear(base, compute=compute)
    assert base.compute == "exact"

    qkern.save(quantized(), tmp_path)
    empty = Net(seed=3)
    with pytest.raises(FormatError, match="unknown compute"):
        qkern.load(tmp_path, empty, compute=compute)
    assert type(empty.up) is nn.Linear
