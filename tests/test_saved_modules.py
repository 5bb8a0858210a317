"""Modules that an adapter trains as a whole: switched, saved, tied, refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from adapted_llama import SAVED, dense_of, edit, logits, peft_of, quantized, train
from peft import PeftModel
from toys import token_ids

import qkern
from qkern.saved_modules import SavedModule


def test_modules_to_save_train_and_nothing_else_does() -> None:
    model = quantized()
    qkern.add_lora(model, modules_to_save="norm")  # of layers too, as in PEFT
    found = [name for name, m in model.named_modules() if isinstance(m, SavedModule)]
    assert len(found) == 5
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    whole = {name for name in trained if ".lora_" not in name}
    assert whole == {f"{name}.adapters.default.weight" for name in found}
    before = model.model.norm.original_module.weight.clone()
    train(model)
    assert torch.equal(model.model.norm.original_module.weight, before)
    assert not torch.equal(model.model.norm.weight, before)  # what is computed


def test_whole_modules_are_switched_disabled_and_mixed_with_their_adapter(tmp_path: Path) -> None:
    model, base, ids = quantized(), logits(quantized()), token_ids(3, 6)
    qkern.add_lora(model, init_lora_weights=False, modules_to_save=["lm_head"], adapter_name="a")
    qkern.add_lora(model, modules_to_save=["embed_tokens"], adapter_name="b")
    with torch.no_grad():
        model.lm_head.adapters["a"].weight.mul_(2)
        model.model.embed_tokens.adapters["b"].weight.mul_(-1)
    model.eval()
    with qkern.disable_adapter(model):
        assert torch.equal(logits(model), base)
    expected = []
    for name in "ab":
        qkern.set_adapter(model, name)
        expected.append(model(ids).logits.detach())
        qkern.save(model, tmp_path) if len(qkern.adapter_names(model)) == 1 else None
    with qkern.adapter_rows(model, ["a", None, "b"]):
        got = model(ids).logits
    torch.testing.assert_close(got[0], expected[0][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[2], expected[1][2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1], quantized()(ids).logits[1], rtol=1e-5, atol=1e-5)


def test_a_model_is_saved_with_whole_modules_beside_its_base(tmp_path: Path) -> None:
    model = quantized()
    qkern.add_lora(model, r=2, **SAVED)
    train(model)
    expected = logits(model)
    qkern.save(model, tmp_path)
    loaded = qkern.load(tmp_path)
    assert torch.equal(logits(loaded), expected)
    with qkern.disable_adapter(loaded):
        assert torch.equal(logits(loaded), logits(quantized()))
    config = json.loads((tmp_path / "config.json").read_text())
    skipped = config["quantization_config"]["llm_int8_skip_modules"]
    assert skipped == ["lm_head"]


def test_embeddings_that_are_the_head_train_with_it(tmp_path: Path) -> None:
    model = quantized(tie_word_embeddings=True)
    qkern.add_lora(model, r=2, modules_to_save=["embed_tokens"])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    train(model)
    expected = logits(model)
    qkern.save_adapter(model, tmp_path)
    own = quantized(tie_word_embeddings=True)
    qkern.load_adapter(own, tmp_path)
    assert own.lm_head.weight is own.model.embed_tokens.weight
    assert torch.equal(logits(own), expected)
    stock = PeftModel.from_pretrained(dense_of(quantized(tie_word_embeddings=True)), tmp_path)
    torch.testing.assert_close(logits(stock), expected, rtol=1e-5, atol=1e-5)


def test_a_second_adapter_trains_tied_modules_too_and_copies_are_whole() -> None:
    model = quantized(tie_word_embeddings=True)
    for name in "ab":
        qkern.add_lora(model, r=2, modules_to_save=["embed_tokens"], adapter_name=name)
    qkern.set_adapter(model, "b")
    assert set(model.lm_head.adapters) == set(model.model.embed_tokens.adapters) == {"a", "b"}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    train(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    assert twin.lm_head.weight is not model.lm_head.weight


def test_embeddings_that_peft_trained_apart_from_the_head_stay_apart(tmp_path: Path) -> None:
    model = dense_of(quantized(tie_word_embeddings=True))
    stock = peft_of(model, modules_to_save=["embed_tokens", "lm_head"])
    with torch.no_grad():
        stock.base_model.model.lm_head.modules_to_save["default"].weight.mul_(3)
    expected = logits(stock)
    stock.save_pretrained(tmp_path)
    own = quantized(tie_word_embeddings=True)
    qkern.load_adapter(own, tmp_path)
    torch.testing.assert_close(logits(own), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"modules_to_save": ["embed_token"]}, "matches no module; nearest: embed_tokens"),
        ({"modules_to_save": ["q_proj"]}, r"q_proj is quantized .* exclude=\["),
        ({"modules_to_save": ["act_fn"]}, "has nothing to train"),
        ({"rank_pattern": {"query": 2}}, "rank_pattern 'query' matches none"),
        ({"alpha_pattern": {"(": 2}}, r"alpha_pattern '\(' cannot be matched"),
    ],
)
def test_what_matches_nothing_changes_nothing(settings: dict[str, object], text: str) -> None:
    model = quantized()
    before = logits(model)
    with pytest.raises(qkern.AdapterMismatchError, match=text):
        qkern.add_lora(model, **settings)
    assert torch.equal(logits(model), before)
    assert not qkern.adapter_names(model)


@pytest.mark.case("E10")
@pytest.mark.parametrize(
    ("change", "settings", "text"),
    [
        (
            lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(97, 128)}),
            {},
            r"\(97, 128\).*the model has .*\(96, 128\).*were tokens added",
        ),
        (lambda t: t.pop("base_model.model.lm_head.weight"), {}, "lm_head is saved as {}"),
        (lambda t: None, {"modules_to_save": ["norm"]}, "unexpected entry .*lm_head"),
        (lambda t: None, {"modules_to_save": None}, "unexpected entry"),
    ],
)
def test_whole_modules_that_do_not_fit(
    change: object, settings: dict[str, object], text: str, tmp_path: Path
) -> None:
    model = quantized()
    qkern.add_lora(model, r=2, modules_to_save=["lm_head"])
    qkern.save_adapter(model, tmp_path)
    edit(tmp_path, change, **settings)
    fresh = quantized()
    with pytest.raises(qkern.AdapterMismatchError, match=text):
        qkern.load_adapter(fresh, tmp_path)
    assert not qkern.adapter_names(fresh)


def test_quantizing_again_leaves_what_is_trained_as_a_whole() -> None:
    model = quantized()
    qkern.add_lora(model, modules_to_save=["lm_head"])
    before = logits(model)
    for exclude in ((), ["lm_head"]):
        report = qkern.quantize_model(model, exclude=exclude, compute="exact")
        reasons = {row.reason for row in report.rows if row.name.startswith("lm_head")}
        expected = "excluded by 'lm_head'" if exclude else "trained as a whole, by modules_to_save"
        assert reasons == {expected}
    assert torch.equal(logits(model), before)
    assert model.lm_head.adapters["default"].weight.requires_grad
