"""Layers whose place a quantized one takes when a checkpoint is loaded, and weights that share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, output
from torch import nn
from transformers import AutoModelForCausalLM

import qkern

BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = net()
    qkern.quantize_model(model)
    qkern.save(model, tmp_path)
    return tmp_path


def test_hooks_and_mode_of_a_layer_stay(saved: Path) -> None:
    model, seen = net().eval(), []
    model[0].register_forward_hook(lambda *_: seen.append("hook"))
    qkern.load(saved, model)
    model(torch.randn(2, 64))
    assert isinstance(model[0], qkern.QuantizedLinear)
    assert seen == ["hook"]
    assert not model[0].training


def test_a_layer_that_computes_something_else_is_refused_before_anything_changes(
    saved: Path,
) -> None:
    replaced, normed = net(), net()
    replaced[2].forward = lambda x: 0 * x
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(normed[2])
    for model, words in ((replaced, "forward was replaced"), (normed, "is computed from others")):
        before = dict(model.named_modules())
        with pytest.raises(qkern.FormatError, match=rf"2\.weight: the layer's .*{words}"):
            qkern.load(saved, model)
        assert dict(model.named_modules()) == before


def test_a_transposed_view_of_a_weight_is_saved_as_it_is(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        made = net()
        made.encode = nn.Parameter(torch.randn(4, 4))
        made.decode = nn.Parameter(made.encode.data.t())  # of the same memory and shape
        return made

    model, other = tied(), tied()
    qkern.quantize_model(model)
    qkern.save(model, tmp_path)
    qkern.load(tmp_path, other)
    assert torch.equal(other.decode, model.decode)
    assert torch.equal(other.encode, model.encode)


def test_a_model_without_values_is_not_saved(tmp_path: Path) -> None:
    model = net().to("meta")
    qkern.quantize_model(model)
    with pytest.raises(qkern.DeviceError, match=r"0\.(weight|bias).* on meta.*load"):
        qkern.save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_transformers_with_bitsandbytes_keeps_a_dense_conv1d(tmp_path: Path) -> None:
    model = BY_NAME["GPT-2"].small()
    qkern.quantize_model(model, exclude="mlp.c_fc")
    qkern.save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert [n for n in config["llm_int8_skip_modules"] if "c_fc" in n] == [
        f"transformer.h.{i}.mlp.c_fc" for i in range(len(model.transformer.h))
    ]
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(opened.transformer.h[0].mlp.c_fc) is type(model.transformer.h[0].mlp.c_fc)
    with torch.no_grad():
        found, right = output(opened), output(model)
    assert (found - right).norm() < 0.02 * right.norm()  # some processors multiply in bf16 there
