"""Adapter files: strict loading, typed errors, merge and unmerge."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from toys import tiny_llama, token_ids
from transformers import GPT2Config, GPT2LMHeadModel

import qkern
from qkern.adapters import read_quantization
from qkern.weight_sites import conv1d_of_linear


def adapted(seed: int = 1, quant_type: str = "nf4", **lora: object) -> nn.Module:
    model = tiny_llama()
    qkern.quantize_model(model, quant_type)
    torch.manual_seed(seed)
    qkern.add_lora(model, **{"r": 4, "init_lora_weights": False, **lora})
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(token_ids()).logits


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    qkern.save_adapter(adapted(), tmp_path / "adapter")
    return tmp_path / "adapter"


def test_files_have_pefts_names_and_keys(saved: Path) -> None:
    assert {f.name for f in saved.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    keys = load_file(saved / "adapter_model.safetensors").keys()
    assert len(keys) == 28
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in keys
    config = json.loads((saved / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 32)
    assert "q_proj" in config["target_modules"]
    assert read_quantization(saved) == qkern.QuantFormat("nf4")


def test_reload_attaches_or_overwrites(saved: Path) -> None:
    expected = logits(adapted())
    fresh = tiny_llama()
    qkern.quantize_model(fresh)
    qkern.load_adapter(fresh, saved)
    assert torch.equal(logits(fresh), expected)
    other = adapted(seed=2)
    assert not torch.equal(logits(other), expected)
    qkern.load_adapter(other, saved)
    assert torch.equal(logits(other), expected)


def test_some_layers_only_and_ranks_of_their_own(tmp_path: Path) -> None:
    model = tiny_llama()
    qkern.quantize_model(model)
    qkern.add_lora(model, r=2, target_modules=["layers.0.mlp.up_proj"], init_lora_weights=False)
    qkern.add_lora(model, r=3, lora_alpha=5, target_modules=["v_proj"], init_lora_weights=False)
    qkern.save_adapter(model, tmp_path)
    fresh = tiny_llama()
    qkern.quantize_model(fresh)
    qkern.load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(model))


def test_recorded_format_of_int8_rows_is_that_of_every_width(tmp_path: Path) -> None:
    model = tiny_llama()
    qkern.quantize_model(model, "int8_row")
    qkern.add_lora(model)
    qkern.save_adapter(model, tmp_path)
    assert read_quantization(tmp_path) == qkern.QuantFormat("int8_row", 0)


def test_recorded_format_is_what_was_asked_for_and_not_one_layers_fallback(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(256, 64), nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight[::2] *= 1e-4
    qkern.quantize_model(model)
    assert not model[0].weight.format.double_quant
    qkern.add_lora(model)
    qkern.save_adapter(model, tmp_path)
    assert read_quantization(tmp_path) == qkern.QuantFormat("nf4", double_quant=True)


@pytest.mark.case("E5")
@pytest.mark.parametrize("quant_type", ["nf4", "int8_row"])
def test_merge_is_near_and_unmerge_restores_the_bytes(quant_type: str) -> None:
    model = adapted(quant_type=quant_type, lora_alpha=0.5)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    expected = logits(model)
    qkern.merge_adapter(model)
    merged = model.state_dict()
    assert any(not torch.equal(p, merged[n]) for n, p in before.items())
    with pytest.raises(qkern.AdapterMismatchError, match="merged already"):
        qkern.merge_adapter(model)
    qkern.unmerge_adapter(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(p, before[n]) for n, p in after.items())
    assert torch.equal(logits(model), expected)
    with pytest.raises(qkern.AdapterMismatchError, match="not merged"):
        qkern.unmerge_adapter(model)


def test_a_failed_merge_leaves_nothing_merged_and_names_the_layer() -> None:
    model = adapted(lora_alpha=0.5)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.lora_B[0, 0] = float("nan")
    with pytest.raises(qkern.NonFiniteError, match=r"layers\.1\.mlp\.up_proj"):
        qkern.merge_adapter(model)
    after = model.state_dict()
    assert all(torch.equal(after[n], p) for n, p in before.items() if "lora" not in n)


def test_loading_over_a_merged_adapter_is_refused(saved: Path) -> None:
    model = adapted(lora_alpha=0.5)
    qkern.merge_adapter(model)
    with pytest.raises(qkern.AdapterMismatchError, match="unmerge"):
        qkern.load_adapter(model, saved)


def test_alpha_pattern_is_read_as_peft_reads_it(saved: Path) -> None:
    edit_config(saved, alpha_pattern={"layers.[0]": 1, r"v_proj": 64, ".*": 16})
    model = tiny_llama()
    qkern.quantize_model(model)
    qkern.load_adapter(model, saved)
    attention = model.model.layers[1].self_attn
    assert (attention.v_proj.lora_alpha, attention.q_proj.lora_alpha) == (64, 16)


def edit_config(path: Path, **changes: object) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_tensors(path: Path, change: object) -> None:
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({k: t.clone().contiguous() for k, t in tensors.items()}, file)


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda p: edit_config(p, peft_type="IA3"), "IA3"),
        (lambda p: edit_config(p, use_dora=True), "needs lora_magnitude_vector"),
        (lambda p: edit_config(p, init_lora_weights="pissa_niter_4"), "changed the base"),
        (lambda p: edit_config(p, modules_to_save=["lm_head"]), "lm_head is saved as {}"),
        (lambda p: edit_tensors(p, lambda t: t.pop(KEY)), "q_proj needs lora_A"),
        (lambda p: edit_tensors(p, lambda t: t.update({KEY: t[KEY][:, :5]})), r"128, 5, 4"),
        (
            lambda p: edit_tensors(
                p,
                lambda t: t.update(
                    {k.replace("q_proj", "query"): t.pop(k) for k in list(t) if "q_proj" in k}
                ),
            ),
            "nearest: .*_proj",
        ),
        (lambda p: edit_tensors(p, lambda t: t.update(x=torch.ones(1))), "unexpected entry x"),
        (lambda p: (p / "adapter_model.safetensors").write_bytes(b"junk"), "safetensors"),
        (lambda p: (p / "adapter_config.json").write_text("[]"), "object is needed"),
        (lambda p: (p / "adapter_config.json").write_text("{"), "not valid JSON"),
    ],
)
def test_a_spoilt_adapter_is_refused_with_its_reason(saved: Path, spoil: object, text: str) -> None:
    spoil(saved)
    model = tiny_llama()
    qkern.quantize_model(model)
    with pytest.raises(qkern.QkernError, match=text):
        qkern.load_adapter(model, saved)


def test_a_file_for_fewer_layers_than_the_model_has_is_refused(tmp_path: Path) -> None:
    qkern.save_adapter(adapted(target_modules=["q_proj"]), tmp_path)
    with pytest.raises(qkern.AdapterMismatchError, match="no entry for 12"):
        qkern.load_adapter(adapted(), tmp_path)


def test_an_adapter_of_another_architecture_says_how_much_and_what_is_there(saved: Path) -> None:
    model = nn.ModuleDict({"h": nn.ModuleList([nn.Linear(64, 64)]), "head": nn.Linear(64, 9)})
    qkern.quantize_model(model)
    what = r"no quantized layer model\.layers\.0\.\S+; nearest: none\. 14 of .* 14 modules"
    with pytest.raises(qkern.AdapterMismatchError, match=what) as raised:
        qkern.load_adapter(model, saved)
    assert "called like h.0: is this the base model that adapter_config.json" in str(raised.value)
    with pytest.raises(qkern.AdapterMismatchError, match="14 modules are here, but dense: call"):
        qkern.load_adapter(tiny_llama(), saved)


def test_pickles_and_missing_files(saved: Path) -> None:
    model = tiny_llama()
    qkern.quantize_model(model)
    (saved / "adapter_model.safetensors").rename(saved / "adapter_model.bin")
    with pytest.raises(qkern.CorruptFileError, match="pickle"):
        qkern.load_adapter(model, saved)
    with pytest.raises(FileNotFoundError):
        qkern.load_adapter(model, saved / "nowhere")
    with pytest.raises(qkern.AdapterMismatchError, match="add_lora"):
        qkern.save_adapter(model, saved)


def test_a_failing_write_keeps_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (saved / "adapter_model.safetensors").read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="No space"):
        qkern.save_adapter(adapted(seed=5), saved)
    assert (saved / "adapter_model.safetensors").read_bytes() == before
    assert len(list(saved.iterdir())) == 2


def test_a_file_for_more_layers_than_the_adapter_has_changes_nothing(saved: Path) -> None:
    model = adapted(target_modules=["q_proj"])
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(qkern.AdapterMismatchError, match="12 layers that the adapter here has not"):
        qkern.load_adapter(model, saved)
    assert all(torch.equal(parameter, before[n]) for n, parameter in model.named_parameters())


def test_pefts_adapter_of_conv1d_loads(tmp_path: Path) -> None:
    """PEFT sets fan_in_fan_out for it, of which the factors do not depend."""
    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 2, "vocab_size": 96}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)).eval()
    qkern.quantize_model(model, "int8")
    theirs = copy.deepcopy(model)
    for name in ("attn.c_attn", "attn.c_proj"):
        layer = theirs.get_submodule(f"transformer.h.0.{name}")
        theirs.set_submodule(f"transformer.h.0.{name}", conv1d_of_linear(layer.dequantize()))
    config = LoraConfig(
        r=4, target_modules=["c_attn", "c_proj"], exclude_modules=["mlp.c_proj"],
        init_lora_weights=False, fan_in_fan_out=True,
    )  # fmt: skip
    peft = get_peft_model(theirs, config).eval()
    peft.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"]
    qkern.load_adapter(model, tmp_path)
    ids = token_ids()
    torch.testing.assert_close(model(ids).logits, peft(ids).logits, rtol=1e-4, atol=1e-4)
