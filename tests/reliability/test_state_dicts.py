"""State dicts: strict and exact, or refused with what is wrong."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from bodies import same_bits
from format_cases import FORMATS
from safetensors.torch import load_file, save_file
from small_net import Net, adapted, assert_same_parts, inputs, parts_of, quantized, wrapped
from torch import Tensor

import qkern


@pytest.mark.case("D1", "D6")
@pytest.mark.parametrize("build", [quantized, adapted, wrapped])
@pytest.mark.parametrize(("quant_type", "double_quant"), FORMATS)
def test_strict_round_trip(
    build: object, quant_type: str, double_quant: bool, tmp_path: Path
) -> None:
    settings = {"quant_type": quant_type, "double_quant": double_quant}
    source, x = build(0, **settings), inputs()
    state = source.state_dict()
    assert all(type(entry) is Tensor for entry in state.values())
    save_file(state, tmp_path / "m.safetensors")
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    files = (load_file(tmp_path / "m.safetensors"), torch.load(buffer, weights_only=True))
    for entries in (state, *files):
        target = build(1, **settings)
        assert not torch.equal(target(x), source(x))
        missing, unexpected = target.load_state_dict(entries, strict=True)
        assert missing == unexpected == []
        assert torch.equal(target(x), source(x))
        assert_same_parts(target, parts_of(source))


def drop(*names: str) -> object:
    return lambda state: [state.pop(f"up.weight.{name}") for name in names]


def replace(name: str, change: object) -> object:
    key = f"up.weight{name}"
    return lambda state: state.update({key: change(state[key])})


SPOILT = {
    "no scales": drop("absmax"),
    "no second-level scales": drop("nested_absmax"),
    "no second level": drop("nested_absmax", "nested_quant_map"),
    "no state": drop("quant_state.bitsandbytes__nf4"),
    "no table": drop("quant_map"),
    "no codes": lambda state: state.pop("up.weight"),
    "one scale": replace(".absmax", lambda t: t[:1]),
    "scales of another dtype": replace(".absmax", lambda t: t.float()),
    "codes cut off": replace("", lambda t: t[:-1]),
    "another table": replace(".quant_map", lambda t: t * 2),
    "NaN in the table": replace(".quant_map", lambda t: t * torch.nan),
    "NaN in the scales": replace(".nested_absmax", lambda t: t * torch.nan),
    "a state that is no JSON": replace(".quant_state.bitsandbytes__nf4", lambda t: t[1:]),
}


@pytest.mark.case("D2")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("spoil", SPOILT)
def test_wrong_or_missing_scales_are_an_error_and_change_nothing(spoil: str, strict: bool) -> None:
    model, state = quantized(0), quantized(1).state_dict()
    SPOILT[spoil](state)
    before = parts_of(model)[:4]
    with pytest.raises(qkern.StateDictError, match=r"^up\.weight") as caught:
        model.load_state_dict(state, strict=strict)
    assert isinstance(caught.value, RuntimeError)
    assert all(map(same_bits, parts_of(model)[:4], before))


@pytest.mark.case("D2")
def test_entries_of_a_whole_layer_may_be_missing_as_in_torch() -> None:
    model, state = quantized(0), quantized(1).state_dict()
    state = {key: value for key, value in state.items() if not key.startswith("up.weight")}
    missing, _ = model.load_state_dict(state, strict=False)
    assert "up.weight" in missing
    assert "up.weight.absmax" in missing
    with pytest.raises(RuntimeError, match=r"Missing key.*up\.weight"):
        model.load_state_dict(state)


@pytest.mark.case("D3")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"blocksize": 128}, "blocksize=128"),
        ({"quant_type": "fp4"}, "bitsandbytes__nf4"),
        ({"quant_type": "int8"}, "bitsandbytes__nf4"),
    ],
)
def test_another_format_is_an_error(settings: dict[str, object], text: str, strict: bool) -> None:
    model = quantized()
    before = parts_of(model)
    with pytest.raises(qkern.StateDictError, match=text):
        model.load_state_dict(quantized(1, **settings).state_dict(), strict=strict)
    assert_same_parts(model, before)


@pytest.mark.case("D3")
def test_scales_of_8_and_of_32_bits_load_into_each_other() -> None:
    x = inputs()
    single, double = quantized(1, double_quant=False), quantized(1)
    model = quantized()
    for source in (single, double):
        model.load_state_dict(source.state_dict())
        assert torch.equal(model(x), source(x))
        assert_same_parts(model, parts_of(source))


@pytest.mark.case("D4")
@pytest.mark.parametrize("strict", [False, True])
def test_dense_weights_need_an_explicit_step(strict: bool) -> None:
    model, dense = quantized(), Net(1)
    before = parts_of(model)
    with pytest.raises(qkern.StateDictError, match=r"up\.weight.*weight\.assign\(\)"):
        model.load_state_dict(dense.state_dict(), strict=strict)
    assert_same_parts(model, before)
    model.up.weight.assign(dense.up.weight.detach())  # the step that the error names
    assert torch.equal(model.up.weight.packed, quantized(1).up.weight.packed)
    with pytest.raises(RuntimeError, match=r"size mismatch|Unexpected key"):
        dense.load_state_dict(quantized().state_dict(), strict=strict)
