"""Quantized checkpoints: out and in again, from and to bitsandbytes, and spoilt files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from toys import tiny_llama, token_ids
from transformers import AutoModelForCausalLM

import qkern
from qkern.integrations.pretrained import load_model


def quantized(quant_type: str = "nf4", **changes: object) -> nn.Module:
    model = tiny_llama(**changes)
    qkern.quantize_model(model, quant_type)
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(token_ids()).logits


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("tied", [False, True])
def test_save_and_load_give_the_same_logits(quant_type: str, tied: bool, tmp_path: Path) -> None:
    model = quantized(quant_type, tie_word_embeddings=tied)
    qkern.save(model, tmp_path)
    loaded = qkern.load(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert torch.equal(logits(load_model(tmp_path)), logits(model))
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size < 1.2 * qkern.memory_footprint(model) + 40_000  # + tables and header per layer


def test_a_model_with_an_adapter_keeps_both(tmp_path: Path) -> None:
    model = quantized()
    qkern.add_lora(model, r=4, init_lora_weights=False)
    qkern.save(model, tmp_path)
    assert (tmp_path / "adapter_config.json").exists()
    assert torch.equal(logits(qkern.load(tmp_path)), logits(model))
    qkern.merge_adapter(model)
    with pytest.raises(qkern.AdapterMismatchError, match="unmerge"):
        qkern.save(model, tmp_path)


def test_load_into_any_module(tmp_path: Path) -> None:
    def net() -> nn.Sequential:
        return nn.Sequential(nn.Linear(172, 65), nn.ReLU(), nn.Linear(65, 8))

    model = net()
    qkern.quantize_model(model)
    qkern.save(model, tmp_path)
    x = torch.randn(3, 172)
    assert torch.equal(qkern.load(tmp_path, net())(x), model(x))
    with torch.device("meta"):
        empty = net()
    assert torch.equal(qkern.load(tmp_path, empty)(x), model(x))


def test_dtype_changes_what_is_computed_and_not_what_is_stored(tmp_path: Path) -> None:
    model = quantized()
    qkern.save(model, tmp_path)
    loaded = qkern.load(tmp_path, dtype=torch.bfloat16)
    weight = loaded.model.layers[0].mlp.up_proj.weight
    assert (weight.dtype, loaded.lm_head.weight.dtype) == (torch.bfloat16, torch.bfloat16)
    assert torch.equal(weight.packed, model.model.layers[0].mlp.up_proj.weight.packed)
    assert logits(loaded).dtype == torch.bfloat16


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_transformers_with_bitsandbytes_opens_what_we_write(
    quant_type: str, tmp_path: Path
) -> None:
    import bitsandbytes

    model = quantized(quant_type)
    qkern.save(model, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).train()
    assert isinstance(theirs.model.layers[0].mlp.up_proj, bitsandbytes.nn.Linear4bit)
    got = theirs(token_ids()).logits
    torch.testing.assert_close(got, logits(model), rtol=1e-4, atol=1e-4)


def test_we_open_what_transformers_with_bitsandbytes_writes(tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig

    tiny_llama().save_pretrained(tmp_path / "dense")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    theirs.save_pretrained(tmp_path / "bnb")
    ours = qkern.load(tmp_path / "bnb")
    weights = [m.model.layers[1].mlp.down_proj.weight for m in (ours, theirs)]
    assert torch.equal(weights[0].packed.reshape(-1), weights[1].data.reshape(-1))
    torch.testing.assert_close(
        logits(ours), theirs.train()(token_ids()).logits, rtol=1e-4, atol=1e-4
    )


def test_dense_directories_open_too(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_model(tmp_path)), logits(model))


def spoil(path: Path, change: object) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    copies = {key: tensor.clone() for key, tensor in tensors.items()}
    save_file(copies, path / "model.safetensors", {"format": "pt"})


WEIGHT = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop(f"{WEIGHT}.absmax"), "absmax"),
        (lambda t: t.update({f"{WEIGHT}.absmax": t[f"{WEIGHT}.absmax"][:1]}), "absmax"),
        (lambda t: t.update({WEIGHT: t[WEIGHT][:-1]}), "the state says"),
        (lambda t: t.pop("model.norm.weight"), "missing.*model.norm"),
        (lambda t: t.update(stray=torch.ones(1)), "unexpected.*stray"),
        (lambda t: t.update({f"{WEIGHT}.nested_quant_map": torch.zeros(256)}), "table"),
        (
            lambda t: t.update(
                {"model.layers.9.x.weight.quant_state.bitsandbytes__nf4": t[WEIGHT]}
            ),
            "no layer model.layers.9.x",
        ),
    ],
)
def test_a_spoilt_checkpoint_is_refused_with_its_reason(
    tmp_path: Path, change: object, text: str
) -> None:
    qkern.save(quantized(), tmp_path)
    spoil(tmp_path, change)
    with pytest.raises(qkern.CorruptFileError, match=text):
        qkern.load(tmp_path)


def test_missing_or_foreign_directories(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not downloaded"):
        load_model(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="neither"):
        load_model(tmp_path)
    with pytest.raises(qkern.FormatError, match="quantize_model"):
        qkern.save(tiny_llama(), tmp_path)
    qkern.save(quantized(), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["os"]}))
    with pytest.raises(qkern.CorruptFileError, match="architectures"):
        qkern.load(tmp_path)


def test_index_that_leaves_the_directory_is_refused(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "../outside.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(qkern.CorruptFileError, match="not in the directory"):
        qkern.load(tmp_path, nn.Linear(4, 4))
