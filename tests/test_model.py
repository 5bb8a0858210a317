"""Model surgery: what is quantized, what is left and why, and adapters on top."""

from __future__ import annotations

import weakref

import pytest
import torch
from peft import LoraConfig
from torch import nn
from toys import tiny_llama, token_ids
from transformers import LlamaForSequenceClassification

import qkern
import qkern.model as model_module


def reasons(report: qkern.CoverageReport) -> dict[str, str]:
    return {row.name: row.reason for row in report.rows}


def test_every_linear_but_the_head_is_quantized() -> None:
    model = tiny_llama()
    report = qkern.quantize_model(model)
    quantized = [n for n, m in model.named_modules() if isinstance(m, qkern.QuantizedLinear)]
    assert len(quantized) == len(report.quantized) == 14
    assert reasons(report)["lm_head"] == "the output head"
    assert type(model.lm_head) is nn.Linear
    assert not any(model.get_submodule(name).weight.requires_grad for name in quantized)


def test_report_counts_bytes_and_prints_a_table() -> None:
    model = tiny_llama()
    before = qkern.memory_footprint(model)
    report = qkern.quantize_model(model)
    saved = report.bytes_before - report.bytes_after
    assert before - qkern.memory_footprint(model) == saved > 0
    linear = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 192 * 128)
    assert sum(row.numel for row in report.quantized) == linear
    assert report.coverage == pytest.approx(linear / (linear + 2 * 96 * 128))
    text = str(report)
    assert "model.layers.*.mlp.down_proj" in text
    assert "14 of 16 weights quantized" in text


def test_a_classifier_on_top_is_an_output_head_too() -> None:
    config = tiny_llama().config
    report = qkern.quantize_model(LlamaForSequenceClassification(config))
    assert reasons(report)["score"] == "the output head"
    assert len(report.quantized) == 14


def test_tied_head_is_left_and_stays_tied() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    report = qkern.quantize_model(model)
    assert reasons(report)["lm_head"] == "the output head"
    linear = sum(row.numel for row in report.quantized)
    assert report.coverage == pytest.approx(linear / (linear + 96 * 128))  # the pair counts once
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_shared_modules_and_shared_weights() -> None:
    shared, owner = nn.Linear(64, 64), nn.Linear(64, 64)
    tied = nn.Linear(64, 64)
    tied.weight = owner.weight
    model = nn.ModuleDict({"a": shared, "b": shared, "c": owner, "d": tied})
    report = qkern.quantize_model(model)
    assert model["a"] is model["b"]
    assert isinstance(model["a"], qkern.QuantizedLinear)
    assert model["c"].weight is model["d"].weight
    assert "shares its weight with c" in reasons(report)["d"]


@pytest.mark.parametrize("pattern", ["down_proj", "model.layers.*.mlp.down_proj", "*down*"])
def test_exclude_takes_names_and_globs(pattern: str) -> None:
    model = tiny_llama()
    report = qkern.quantize_model(model, exclude=[pattern])
    assert len(report.quantized) == 12
    assert pattern in reasons(report)["model.layers.0.mlp.down_proj"]
    assert reasons(report)["lm_head"] == "the output head"  # the defaults stay


def test_other_layer_classes_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 8), nn.Bilinear(8, 8, 4))
    report = qkern.quantize_model(model)
    assert reasons(report) == {"0": "Conv2d, not nn.Linear", "1": "Bilinear, not nn.Linear"}
    with pytest.raises(qkern.CoverageError, match=r"0\.0%"):
        qkern.quantize_model(model, min_coverage=0.5)


def test_linear_layers_that_choose_experts_stay_dense() -> None:
    def block(router: nn.Module) -> nn.ModuleDict:
        return nn.ModuleDict({"gate": router, "experts": nn.ModuleList([nn.Linear(64, 64)])})

    chooser, projection = nn.Linear(64, 4), nn.Linear(64, 64)
    model = nn.ModuleDict(
        {
            "moe": block(chooser),
            "wrapped": block(nn.ModuleDict({"wg": nn.Linear(64, 4)})),
            "router": nn.ModuleDict({"classifier": nn.Linear(64, 4)}),
            "mlp": nn.ModuleDict({"gate": projection}),  # gates values, and chooses nothing
        }
    )
    left = {name: reason for name, reason in reasons(qkern.quantize_model(model)).items() if reason}
    router = "a router, by its name"
    assert left == dict.fromkeys(("moe.gate", "wrapped.gate.wg", "router.classifier"), router)


def test_quantizing_again_changes_nothing() -> None:
    model = tiny_llama()
    qkern.quantize_model(model)
    packed = model.model.layers[0].mlp.up_proj.weight.packed
    report = qkern.quantize_model(model, "int8")
    assert model.model.layers[0].mlp.up_proj.weight.packed is packed
    assert reasons(report)["model.layers.0.mlp.up_proj"] == "was quantized before"


def test_each_dense_layer_is_freed_before_the_next_is_quantized(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    alive = [weakref.ref(layer.weight) for layer in model]
    counts = []
    quantize = model_module._quantize_site

    def counting(*args: object) -> object:
        counts.append(sum(ref() is not None for ref in alive))
        return quantize(*args)

    monkeypatch.setattr(model_module, "_quantize_site", counting)
    qkern.quantize_model(model)
    assert counts == [4, 3, 2, 1]
    assert not any(ref() is not None for ref in alive)


def test_a_single_layer_has_no_place_to_be_replaced_in() -> None:
    with pytest.raises(qkern.FormatError, match="from_linear"):
        qkern.quantize_model(nn.Linear(64, 64))


def test_parameters_that_are_no_layers_weight_are_in_the_report() -> None:
    attention = nn.MultiheadAttention(64, 4)
    report = qkern.quantize_model(nn.ModuleDict({"a": attention, "b": nn.Linear(64, 64)}))
    assert "in_proj_weight" in reasons(report)["a.in_proj_weight"]
    assert report.coverage == pytest.approx(1 / 5)


def test_exclude_that_matches_nothing_is_an_error_and_a_string_is_one_pattern() -> None:
    with pytest.raises(qkern.FormatError, match="downproj"):
        qkern.quantize_model(tiny_llama(), exclude=["downproj"])
    assert len(qkern.quantize_model(tiny_llama(), exclude="down_proj").quantized) == 12


def test_a_second_add_lora_leaves_the_first_trainable_and_shared_layers_share_it() -> None:
    shared = nn.Linear(64, 64)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(64, 64)})
    qkern.quantize_model(model)
    qkern.add_lora(model, r=2, target_modules=["a"])
    qkern.add_lora(model, r=4, target_modules=["c"])
    assert model["a"] is model["b"]
    assert all(layer.lora_A.requires_grad for layer in (model["b"], model["c"]))


def test_forward_hooks_stay() -> None:
    model, calls = nn.Sequential(nn.Linear(64, 64)), []
    model[0].register_forward_hook(lambda *_: calls.append("forward"))
    model[0].register_forward_pre_hook(lambda *_, **__: calls.append("pre"), with_kwargs=True)
    qkern.quantize_model(model)
    model(torch.randn(1, 64))
    qkern.add_lora(model)
    model(torch.randn(1, 64))
    assert calls == ["pre", "forward"] * 2


def test_int8_rows_of_all_widths_are_one_format_in_the_report() -> None:
    model = tiny_llama()
    report = qkern.quantize_model(model, "int8_row", blocksize=32)
    assert {row.status for row in report.quantized} == {"int8_row"}
    assert not any(row.reason for row in report.quantized)
    fmt = model.model.layers[0].mlp.up_proj.weight.format
    assert not any(row.reason for row in qkern.quantize_model(model, fmt).quantized)
    again = qkern.quantize_model(model, "int8")
    assert {row.reason for row in again.quantized} == {"was quantized before"}


def test_unsafe_double_quantization_is_reported() -> None:
    layer = nn.Linear(256, 64)
    with torch.no_grad():
        layer.weight[::2] *= 1e-4
    report = qkern.quantize_model(nn.Sequential(layer))
    assert "fp32 scales" in report.rows[0].reason


def test_a_nonfinite_weight_is_named_and_the_rest_is_consistent() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    with pytest.raises(qkern.NonFiniteError, match=r"layers\.1\.mlp\.up_proj\.weight.*index 389"):
        qkern.quantize_model(model)
    done = model.model.layers[0].mlp
    assert isinstance(done.up_proj, qkern.QuantizedLinear)
    assert type(model.model.layers[1].mlp.up_proj) is nn.Linear
    assert torch.isfinite(done(torch.randn(2, 128))).all()


def test_int8_is_nearly_exact_and_nf4_is_near() -> None:
    with torch.no_grad():
        exact = tiny_llama()(token_ids()).logits
        errors = {}
        for quant_type in ("int8", "int8_row", "nf4", "fp4"):
            model = tiny_llama()
            qkern.quantize_model(model, quant_type)
            errors[quant_type] = ((model(token_ids()).logits - exact).norm() / exact.norm()).item()
    assert errors["int8"] < errors["int8_row"] < 0.02 < errors["nf4"] < errors["fp4"] < 0.4


def test_add_lora_trains_only_adapters() -> None:
    model = tiny_llama()
    qkern.quantize_model(model)
    with torch.no_grad():
        base = model(token_ids()).logits
    names = qkern.add_lora(model, r=4, lora_alpha=8)
    assert len(names) == 14
    assert torch.equal(model(token_ids()).logits, base)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{n}.adapters.default.lora_{x}" for n in names for x in "AB"}


def test_qlora_linear_has_the_parameters_that_the_paper_counts() -> None:
    layer = qkern.QLoRALinear.from_linear(nn.Linear(1000, 1000), r=8)
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == 16_000
    assert layer.scaling == 4.0


@pytest.mark.parametrize(
    ("targets", "count"),
    [(["q_proj", "v_proj"], 4), (["layers.1.mlp.up_proj"], 1), (r".*\.0\.self_attn\..*", 4)],
)
def test_target_modules(targets: object, count: int) -> None:
    model = tiny_llama()
    qkern.quantize_model(model)
    assert len(qkern.add_lora(model, target_modules=targets)) == count


def test_add_lora_says_what_is_wrong() -> None:
    with pytest.raises(qkern.AdapterMismatchError, match="quantize_model first"):
        qkern.add_lora(tiny_llama())
    model = tiny_llama()
    qkern.quantize_model(model)
    with pytest.raises(qkern.AdapterMismatchError, match="q_proj"):
        qkern.add_lora(model, target_modules=["query"])
    with pytest.raises(qkern.FormatError, match=r"no regular expression .*\['\*q_proj'\]"):
        qkern.add_lora(model, target_modules="*q_proj")
    qkern.add_lora(model)
    with pytest.raises(qkern.AdapterMismatchError, match="already"):
        qkern.add_lora(model)
    for settings in ({"r": 0}, {"lora_dropout": 1.0}):
        with pytest.raises(qkern.ShapeError):
            qkern.QLoRALinear.from_linear(nn.Linear(64, 64), **settings)


@pytest.mark.parametrize(
    ("given", "words"),
    [(LoraConfig(r=8), r"not a LoraConfig.*get_peft_model\(model, config\)"), (8, "'8': .*r=16")],
)
def test_settings_without_their_names_are_answered_with_how_they_are_given(
    given: object, words: str
) -> None:
    with pytest.raises(qkern.ArgumentError, match=words):
        qkern.add_lora(tiny_llama(), given)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"r": 0}, qkern.ShapeError),
        ({"lora_dropout": 1.0}, qkern.ShapeError),
        ({"lora_mode": "added"}, qkern.FormatError),
        ({"lora_mode": "merged", "lora_dropout": 0.1}, qkern.FormatError),
        ({"dtype": torch.int8}, qkern.DTypeError),
    ],
)
def test_an_add_lora_that_fails_leaves_the_model_as_it_was(
    wrong: dict[str, object], error: type[Exception]
) -> None:
    model = tiny_llama()
    qkern.quantize_model(model)
    qkern.add_lora(model, target_modules=["q_proj"])
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    assert before["model.norm.weight"] is False
    model.model.norm.requires_grad_(True)
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(error):
        qkern.add_lora(model, target_modules=["v_proj"], **wrong)
    after = {name: p.requires_grad for name, p in model.named_parameters()}
    assert after == before | {"model.norm.weight": True}
    assert [type(module) for module in model.modules()] == kinds


def test_dropout_acts_in_training_alone_and_only_on_the_adapter() -> None:
    layer = qkern.QLoRALinear.from_linear(
        nn.Linear(64, 32), lora_dropout=0.5, init_lora_weights=False
    )
    x = torch.randn(4, 64)
    assert torch.equal(layer.eval()(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    with torch.no_grad():
        layer.lora_B.zero_()
    torch.testing.assert_close(layer(x), layer.eval()(x))
