"""The tensor and the layers: state dicts, files, copies, casts."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from format_cases import FORMATS, KINDS
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from toys import Stack, layer, tiny_llama, token_ids

import qkern
from qkern.layers import QuantizedLinear
from qkern.tensor import QuantizedTensor


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    quantized = tiny_llama()
    qkern.quantize_model(quantized, request.param)
    return quantized


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(token_ids()).logits


def test_state_dict_has_flat_bitsandbytes_keys(model: nn.Module) -> None:
    prefix = "model.layers.0.self_attn.q_proj."
    state = {k: v for k, v in model.state_dict().items() if k.startswith(prefix)}
    shapes = {k.removeprefix(prefix): (v.dtype, tuple(v.shape)) for k, v in state.items()}
    blob = shapes.pop("weight.quant_state.bitsandbytes__nf4", (torch.uint8,))
    assert blob[0] == torch.uint8
    expected = {
        "nf4": {
            "weight": (torch.uint8, (8192, 1)),
            "weight.absmax": (torch.uint8, (256,)),
            "weight.quant_map": (torch.float32, (16,)),
            "weight.nested_absmax": (torch.float32, (1,)),
            "weight.nested_quant_map": (torch.float32, (256,)),
        },
        "int8_row": {
            "weight": (torch.int8, (128, 128)),
            "SCB": (torch.float32, (128,)),
            "weight_format": (torch.uint8, ()),
        },
    }
    assert shapes == expected[model.get_submodule(prefix[:-1]).weight.format.quant_type]
    assert all(type(v) is Tensor for v in state.values())


@pytest.mark.parametrize(("quant_type", "double_quant"), FORMATS)
def test_strict_round_trip_through_safetensors(
    quant_type: str, double_quant: bool, tmp_path: Path
) -> None:
    settings = {"quant_type": quant_type, "double_quant": double_quant}
    source = layer(172, 65, **settings)
    save_file(source.state_dict(), tmp_path / "m.safetensors")
    torch.manual_seed(1)
    target = QuantizedLinear.from_linear(nn.Linear(172, 65), **settings)
    target.load_state_dict(load_file(tmp_path / "m.safetensors"), strict=True)
    x = torch.randn(3, 172)
    assert torch.equal(target(x), source(x))


def test_strict_load_names_missing_and_unexpected_keys() -> None:
    state = layer().state_dict()
    state["weight.bogus"] = state.pop("weight.absmax")
    with pytest.raises(RuntimeError, match=r"weight\.absmax") as caught:
        layer().load_state_dict(state)
    assert "weight.bogus" in str(caught.value)
    with pytest.raises(RuntimeError, match="scales"):  # never silently the old scales
        layer().load_state_dict(state, strict=False)


def test_loading_another_blocksize_or_dense_weights_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="blocksize=128"):
        layer().load_state_dict(layer(blocksize=128).state_dict())
    with pytest.raises(RuntimeError, match="dense"):
        layer().load_state_dict(nn.Linear(128, 64).state_dict())


def test_lying_entries_are_refused() -> None:
    good = layer().state_dict()
    lies = {
        "weight.absmax": good["weight.absmax"][:1],
        "weight.quant_map": torch.full((16,), float("nan")),
        "weight.nested_absmax": good["weight.nested_absmax"].double(),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor([123], dtype=torch.uint8),
    }
    for key, lie in lies.items():
        with pytest.raises(RuntimeError, match=r"weight"):
            layer().load_state_dict({**good, key: lie}, strict=False)


@pytest.mark.parametrize("quant_type", KINDS)
def test_meta_and_assign(quant_type: str) -> None:
    with torch.device("meta"):
        empty = QuantizedLinear.from_linear(nn.Linear(128, 64), quant_type=quant_type)
    assert empty.weight.is_meta
    source = layer(quant_type=quant_type)
    empty.load_state_dict(source.state_dict(), strict=True, assign=True)
    x = torch.randn(2, 128)
    assert torch.equal(empty(x), source(x))


def test_fp32_and_8_bit_scales_load_into_each_other() -> None:
    single, double = layer(double_quant=False), layer()
    x = torch.randn(2, 128)
    target = layer()
    target.load_state_dict(single.state_dict())
    assert torch.equal(target(x), single(x))
    target.load_state_dict(double.state_dict())
    assert torch.equal(target(x), double(x))


def test_copies_and_pickles_are_equal_and_apart(model: nn.Module) -> None:
    expected = logits(model)
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(copied), expected)
    assert torch.equal(logits(pickled), expected)
    parts = [m.model.layers[0].mlp.up_proj.weight.packed for m in (model, copied)]
    assert parts[0].data_ptr() != parts[1].data_ptr()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert loaded.keys() == model.state_dict().keys()


def test_casts_never_touch_the_bytes(model: nn.Module) -> None:
    cast = copy.deepcopy(model)
    original = model.model.layers[0].mlp.up_proj.weight
    for step in (
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.float(),
        lambda m: m.to("cpu", torch.float16),
        lambda m: m.to("meta") and m,
    ):
        step(cast)
        weight = cast.model.layers[0].mlp.up_proj.weight
        assert isinstance(weight, QuantizedTensor)
        assert isinstance(weight, nn.Parameter)
        assert not weight.requires_grad
        scales = weight.absmax if weight.nested_absmax is None else weight.nested_absmax
        assert scales.dtype == torch.float32
        assert weight.dtype == cast.lm_head.weight.dtype
        if not weight.is_meta:
            assert torch.equal(weight.packed, original.packed)
    kbit = copy.deepcopy(model)
    for parameter in kbit.parameters():  # as PEFT's prepare_model_for_kbit_training does
        parameter.data = parameter.data.to(torch.float32)
    assert torch.equal(logits(kbit), logits(model))


def test_optimizer_given_all_parameters_leaves_the_weights() -> None:
    stack = Stack()
    before = stack.layers[0].weight.packed.clone()
    optimizer = torch.optim.AdamW(stack.parameters(), lr=0.1, weight_decay=0.5)
    stack(torch.randn(2, 256)).sum().backward()
    optimizer.step()
    assert torch.equal(stack.layers[0].weight.packed, before)
