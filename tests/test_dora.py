"""DoRA: lengths of rows, merges, compiled code, files that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapted_llama import edit, quantized
from torch import nn

import qkern
from qkern import dora


def dora_layer(quant_type: str = "nf4", bias: bool = True) -> qkern.QLoRALinear:
    torch.manual_seed(0)
    return qkern.QLoRALinear.from_linear(
        nn.Linear(128, 48, bias), quant_type=quant_type, r=4, use_dora=True, init_lora_weights=False
    )


@pytest.mark.parametrize("quant_type", ["nf4", "int8_row"])
def test_dora_starts_at_the_sum_and_its_lengths_are_those_of_dense_rows(quant_type: str) -> None:
    layer = dora_layer(quant_type)
    V = layer.weight.dequantize() + layer.adapter.product()
    torch.testing.assert_close(layer.adapter.lora_magnitude.detach(), V.norm(dim=1))
    x = torch.randn(5, 128)
    torch.testing.assert_close(layer(x), x @ V.mT + layer.bias, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        layer.adapter.lora_magnitude *= 2
    torch.testing.assert_close(layer(x), 2 * x @ V.mT + layer.bias, rtol=1e-5, atol=1e-5)


def test_dora_starts_exactly_at_the_base() -> None:
    layer = qkern.QLoRALinear.from_linear(nn.Linear(128, 48, bias=False), use_dora=True)
    x = torch.randn(5, 128)
    assert torch.equal(layer.lengths(layer.adapter), torch.ones(48))
    assert torch.equal(layer(x), qkern.linear(x, layer.weight))


def test_lengths_of_dora_are_computed_where_something_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, x = dora_layer(), torch.randn(5, 128)
    calls = []
    norms, squares = dora.row_norms, dora.squared_norms
    monkeypatch.setattr(dora, "row_norms", lambda *a: calls.append("sum") or norms(*a))
    monkeypatch.setattr(dora, "squared_norms", lambda *a: calls.append("base") or squares(*a))
    for _ in range(2):
        layer(x).sum().backward()
    assert calls == ["sum", "sum"]  # the base's are there since the layer was made
    layer.eval()
    with torch.no_grad():
        first = torch.stack([layer(x) for _ in range(3)])[0]
        assert calls == ["sum"] * 3
        layer.lora_B.mul_(2)
        assert not torch.equal(layer(x), first)
        layer.train().lora_B.data.mul_(0.5)  # unseen but by the change of mode
        assert torch.equal(layer.eval()(x), first)
        calls.clear()
        layer.weight.copy_(layer.weight.dequantize() * 2)
        layer(x)
        assert calls == ["base", "sum"]


def test_lengths_are_measured_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = qkern.quantize(torch.randn(48, 128))
    expected = dora.squared_norms(weight)
    monkeypatch.setattr(dora, "_PIECE", 128 * 7)
    assert torch.equal(dora.squared_norms(weight), expected)


def test_a_row_of_zeros_stays_one_with_dora() -> None:
    dense = nn.Linear(64, 4)
    with torch.no_grad():
        dense.weight[1] = 0
    layer = qkern.QLoRALinear.from_linear(dense, use_dora=True)
    y = layer(torch.randn(2, 64))
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert torch.isfinite(layer.lora_B.grad).all()


@pytest.mark.case("E5")
def test_dora_merges_and_unmerges_to_the_same_bytes() -> None:
    model = nn.Sequential(nn.Linear(128, 96), nn.Linear(96, 8)).eval()
    qkern.quantize_model(model, "int8")
    qkern.add_lora(model, r=4, lora_alpha=1, use_dora=True, init_lora_weights=False)
    with torch.no_grad():
        model[0].adapter.lora_magnitude *= 1.2
    x = torch.randn(3, 128)
    expected, state = model(x), {k: v.clone() for k, v in model.state_dict().items()}
    qkern.merge_adapter(model)
    torch.testing.assert_close(model(x), expected, rtol=0.05, atol=0.05)
    qkern.unmerge_adapter(model)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    qkern.merge_adapter(model)
    model[0].weight.data += 0.0  # another write: the bytes of before are not put back
    qkern.unmerge_adapter(model)
    torch.testing.assert_close(model(x), expected, rtol=0.1, atol=0.1)


def test_dora_in_compiled_code_and_under_autocast() -> None:
    layer, x = dora_layer(), torch.randn(5, 128)
    expected = layer(x)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)


def test_dora_has_no_merged_mode() -> None:
    with pytest.raises(qkern.FormatError, match="no DoRA"):
        qkern.QLoRALinear.from_linear(nn.Linear(64, 64), lora_mode="merged", use_dora=True)


@pytest.mark.case("E8")
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop(next(k for k in t if "magnitude" in k)), r"needs lora_magnitude_vector"),
        (
            lambda t: t.update({next(k for k in t if "magnitude" in k): torch.ones(3)}),
            r"found \(3,\)",
        ),
        (
            lambda t: t.update({"base_model.model.x.lora_magnitude_vector": torch.ones(3)}),
            "x has lora_magnitude_vector alone",
        ),
    ],
)
def test_magnitudes_that_do_not_fit(change: object, text: str, tmp_path: Path) -> None:
    model = quantized()
    qkern.add_lora(model, r=4, use_dora=True)
    qkern.save_adapter(model, tmp_path)
    edit(tmp_path, change)
    with pytest.raises(qkern.AdapterMismatchError, match=text):
        qkern.load_adapter(quantized(), tmp_path)


@pytest.mark.case("E8")
def test_a_kind_that_the_settings_do_not_say_is_refused(tmp_path: Path) -> None:
    model = quantized()
    qkern.add_lora(model, r=4, use_dora=True)
    qkern.save_adapter(model, tmp_path)
    plain = quantized()
    qkern.add_lora(plain, r=4)
    with pytest.raises(qkern.AdapterMismatchError, match="use_dora=True"):
        qkern.load_adapter(plain, tmp_path)
    edit(tmp_path, use_dora=False)
    with pytest.raises(qkern.AdapterMismatchError, match=r"unexpected entry .*magnitude"):
        qkern.load_adapter(quantized(), tmp_path)
