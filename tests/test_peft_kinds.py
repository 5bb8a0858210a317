"""Every adapter kind of the installed PEFT, unmodified, over quantized layers."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import peft_kinds
import pytest
import torch
from peft import LoraConfig, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft_kind_settings import ALL, CAUSAL, EXACT, KINDS, NAMED, Kind, two_adapters
from peft_kinds import DOCUMENT, END, START, densed, measure
from toys import token_ids

from qkern.errors import FrozenWeightError

# Each in the version of PEFT that has it and with the packages that PEFT wants for it.
HERE = [
    pytest.param(
        kind,
        id=kind.name,
        marks=pytest.mark.skipif(
            not hasattr(peft, kind.config) or bool(kind.needs and find_spec(kind.needs) is None),
            reason=f"PEFT {peft.__version__} has it not, or wants {kind.needs} for it",
        ),
    )
    for kind in KINDS.values()
]
LORA = KINDS["LoRA"]
# What other packages' warnings say about their own settings, from our call sites.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.mark.parametrize("kind", HERE)
def test_it_trains_saves_reloads_and_merges_as_over_dense_weights(
    kind: Kind, tmp_path: Path
) -> None:
    result = measure(kind, tmp_path)
    assert result.moved > 0
    assert result.base_kept
    assert not kind.lowers_loss or result.losses[-1] < result.losses[0]
    assert result.reload_error <= 1e-6
    if kind.starts_at_base:
        assert result.dense_error <= 1e-5  # stock PEFT over dense weights of the same base
        assert result.disabled_error == 0
    assert bool(result.merge_refused) is bool(kind.merges)
    assert kind.merges in result.merge_refused
    if kind.merges:
        return
    if kind.starts_at_base:
        assert result.merged_as_dense  # what the dense merge is, quantized
    if kind.unmerges == EXACT:
        assert result.bytes_changed == 0
    else:
        assert kind.unmerges in result.unmerge_refused
        assert result.bytes_changed > 0


# A start that changes the base changes it for the first adapter too.
@pytest.mark.parametrize("kind", [param for param in HERE if param.values[0].starts_at_base])
def test_a_second_adapter_is_switched_to_and_deleted(kind: Kind) -> None:
    model = kind.adapted()
    kind.train(model, steps=1)
    first = kind.logits(model)
    if kind.single:
        with pytest.raises(ValueError, match=kind.single):
            model.add_adapter("second", kind.make_config())
        return
    torch.manual_seed(9)
    model.add_adapter("second", kind.make_config())
    model.set_adapter("second")
    assert kind.logits(model).isfinite().all()
    model.set_adapter("default")
    assert torch.equal(kind.logits(model), first)
    model.delete_adapter("second")
    assert torch.equal(kind.logits(model), first)


@pytest.mark.parametrize("name", ["LoRA", "rsLoRA", "RoAd"])
def test_rows_of_a_batch_use_their_own_adapters(name: str) -> None:
    kind = KINDS[name]
    model = kind.adapted()
    kind.train(model, steps=1)
    torch.manual_seed(9)
    model.add_adapter("second", kind.make_config())
    model.set_adapter("second")
    kind.train(model, steps=3)
    ids = token_ids(3, 16)
    names = ["second", "__base__", "default"]
    with torch.no_grad():
        mixed = model.eval()(input_ids=ids, adapter_names=names).logits
        for row, adapter in enumerate(names):
            if adapter == "__base__":
                with model.disable_adapter():
                    alone = model(input_ids=ids).logits
            else:
                model.set_adapter(adapter)
                alone = model(input_ids=ids).logits
            torch.testing.assert_close(mixed[row], alone[row], rtol=1e-5, atol=1e-5)


@pytest.mark.case("E5")
@pytest.mark.parametrize("safe_merge", [False, True])
def test_several_merged_adapters_come_out_to_the_byte(safe_merge: bool) -> None:
    model = get_peft_model(LORA.quantized(), LoraConfig(**ALL, r=4, init_lora_weights=False))
    before = peft_kinds.parts_of(model)
    for name in ("second", "third"):
        model.add_adapter(name, LoraConfig(**ALL, r=2, init_lora_weights=False))
    names = ["default", "second", "third"]
    model.merge_adapter(adapter_names=names, safe_merge=safe_merge)
    assert peft_kinds.changed(before, peft_kinds.parts_of(model)) > 0.1
    model.unmerge_adapter()
    assert peft_kinds.changed(before, peft_kinds.parts_of(model)) == 0


def test_merge_and_unload_leaves_a_plain_quantized_model() -> None:
    model = LORA.adapted()
    LORA.train(model)
    model.merge_adapter()
    merged = LORA.logits(model)
    model.unmerge_adapter()
    plain = model.merge_and_unload()
    assert not any(hasattr(module, "base_layer") for module in plain.modules())
    assert torch.equal(LORA.logits(plain), merged)
    fresh = LORA.quantized()
    fresh.load_state_dict(plain.state_dict())
    assert torch.equal(LORA.logits(fresh), merged)


def test_adapters_are_added_up_by_weights() -> None:
    model = get_peft_model(LORA.quantized(), LoraConfig(**ALL, r=4, init_lora_weights=False))
    model.add_adapter("second", LoraConfig(**ALL, r=4, init_lora_weights=False))
    model.add_weighted_adapter(["default", "second"], [0.5, 2.0], "sum", combination_type="cat")
    model.base_model.set_adapter("sum")
    got = LORA.logits(model)
    for name, weight in (("default", 0.5), ("second", 2.0)):
        for module in model.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                module.set_scale(name, weight)
    model.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(got, LORA.logits(model), rtol=1e-4, atol=1e-5)


def test_arrow_routes_between_adapters() -> None:
    config: Any = pytest.importorskip("peft.tuners.lora.config")
    if not hasattr(config, "ArrowConfig"):
        pytest.skip(f"PEFT {peft.__version__} has no Arrow")
    paths = list(two_adapters().values())
    found = []
    for base in (LORA.quantized(), densed(LORA.quantized())):
        model = peft.create_arrow_model(base, paths, config.ArrowConfig(top_k=1))
        found.append(LORA.logits(model))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_glora_refuses_every_subclass_of_linear() -> None:
    if not hasattr(peft, "GloraConfig"):
        pytest.skip(f"PEFT {peft.__version__} has no GLoRA")
    with pytest.raises(ValueError, match=re.escape("not a plain torch.nn.Linear")):
        get_peft_model(LORA.quantized(), peft.GloraConfig(**ALL, r=4))


def test_modules_to_save_are_trained_where_they_are_dense_and_refused_where_not() -> None:
    settings = {**CAUSAL, "target_modules": ["q_proj"], "r": 4}
    dense = LoraConfig(**settings, modules_to_save=["embed_tokens", "lm_head"])
    model = get_peft_model(LORA.quantized(), dense)
    losses = LORA.train(model)
    assert losses[-1] < losses[0]
    packed = LoraConfig(**settings, modules_to_save=["v_proj"])
    with pytest.raises(FrozenWeightError, match="cannot require a gradient"):
        get_peft_model(LORA.quantized(), packed)


def test_kbit_preparation_changes_no_byte() -> None:
    model = LORA.quantized().to(torch.bfloat16)
    before = peft_kinds.parts_of(model)
    peft.prepare_model_for_kbit_training(model)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.is_floating_point())
    assert peft_kinds.changed(before, peft_kinds.parts_of(model)) == 0


def test_the_table_has_every_kind_of_peft() -> None:
    text = DOCUMENT.read_text()
    table = text[text.index(START) : text.index(END)]
    names = set(re.findall(r"^\| (.+?) \|", table, re.MULTILINE)) - {"kind"}
    assert names == set(KINDS)
    for kind in KINDS.values():
        row = next(line for line in table.splitlines() if line.startswith(f"| {kind.name} |"))
        cells = [cell.strip() for cell in row.split("|")[1:-1]]
        assert cells[1] == ("no" if kind.merges else "yes")
        assert (cells[2] == "none") == (kind.unmerges == EXACT)
    if f"PEFT {peft.__version__}," not in table:
        pytest.skip(f"the table was made with another PEFT than {peft.__version__}")
    configs = {kind.config for kind in KINDS.values()}
    types = {t.value for t, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items() if cls.__name__ in configs}
    assert {member.value for member in PeftType} == types | set(NAMED)
    assert all(name.lower() in text.lower() for name in NAMED)
