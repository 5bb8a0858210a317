"""DoRA, whole modules, ranks and alphas of layers, LoRA+: PEFT's numbers, PEFT's files."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from toys import tiny_llama, token_ids

import qkern
from qkern import dora
from qkern.saved_modules import SavedModule

PATTERNS = {
    "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 7},
    "alpha_pattern": {"down_proj": 3, "layers.0.self_attn.v_proj": 64},
}
SAVED = {"modules_to_save": ["lm_head", "embed_tokens", "norm"]}
KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora, rslora, patterns": {"use_dora": True, "use_rslora": True, **PATTERNS},
    "modules_to_save": SAVED,
    "patterns": PATTERNS,
}
COMMON = {"r": 4, "lora_alpha": 8}


def quantized(**changes: object) -> nn.Module:
    model = tiny_llama(**changes)
    qkern.quantize_model(model)
    return model


def dense_of(model: nn.Module) -> nn.Module:
    """Stock layers with the rounded weights of a quantized model."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, qkern.QuantizedLinear):
            model.set_submodule(name, layer.dequantize())
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=token_ids()).logits


def train(model: nn.Module, steps: int = 3) -> list[float]:
    parameters = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=token_ids(), labels=token_ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def peft_of(model: nn.Module, **settings: object) -> nn.Module:
    config = LoraConfig(
        **{"target_modules": "all-linear", "task_type": "CAUSAL_LM", **COMMON, **settings}
    )
    return get_peft_model(model, config)


def edit(directory: Path, change: object = None, **settings: object) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    if change is not None:
        tensors = load_file(directory / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, directory / "adapter_model.safetensors")


@pytest.mark.case("E8")
@pytest.mark.parametrize("kind", KINDS)
def test_trained_here_it_gives_the_same_logits_in_peft_over_dense_weights(
    kind: str, tmp_path: Path
) -> None:
    model = quantized()
    torch.manual_seed(1)
    qkern.add_lora(model, **COMMON, **KINDS[kind])
    losses = train(model)
    assert losses[-1] < losses[0]
    expected = logits(model)
    qkern.save_adapter(model, tmp_path)
    peft_model = PeftModel.from_pretrained(dense_of(quantized()), tmp_path)
    torch.testing.assert_close(logits(peft_model), expected, rtol=1e-5, atol=1e-5)
    own = quantized()
    qkern.load_adapter(own, tmp_path)
    assert torch.equal(logits(own), expected)
    qkern.load_adapter(own, tmp_path)  # over itself
    assert torch.equal(logits(own), expected)


@pytest.mark.case("E8")
@pytest.mark.parametrize("kind", KINDS)
def test_trained_in_peft_over_dense_weights_it_gives_the_same_logits_here(
    kind: str, tmp_path: Path
) -> None:
    model = peft_of(dense_of(quantized()), **KINDS[kind])
    train(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    own = quantized()
    qkern.load_adapter(own, tmp_path)
    torch.testing.assert_close(logits(own), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lora_dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["dora", "modules_to_save", "dora, rslora, patterns"])
def test_the_same_start_gives_pefts_losses_and_gradients(
    kind: str, lora_dropout: float, tmp_path: Path
) -> None:
    own = quantized()
    torch.manual_seed(1)
    qkern.add_lora(own, lora_dropout=lora_dropout, init_lora_weights=False, **COMMON, **KINDS[kind])
    qkern.save_adapter(own, tmp_path)
    theirs = PeftModel.from_pretrained(dense_of(quantized()), tmp_path, is_trainable=True)
    count = {
        id(m): sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (own, theirs)
    }
    assert len(set(count.values())) == 1
    if not lora_dropout:
        expected, got = train(theirs, 5), train(own, 5)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
    elif kind == "dora":  # one layer: its mask is drawn as theirs is
        layer = own.model.layers[0].mlp.up_proj.train()
        their = theirs.base_model.model.model.layers[0].mlp.up_proj.train()
        x = torch.randn(3, 128, generator=torch.Generator().manual_seed(2))
        results = []
        for module in (layer, their):
            torch.manual_seed(7)
            y = module(x)
            y.square().sum().backward()
            results.append(y.detach())
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
        for mine, other in (
            (layer.lora_A, their.lora_A["default"].weight),
            (layer.lora_B, their.lora_B["default"].weight),
            (layer.adapter.lora_magnitude, their.lora_magnitude_vector["default"].weight),
        ):
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-4)


# -- DoRA ----------------------------------------------------------------------------------------


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


# -- whole modules ---------------------------------------------------------------------------------


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


# -- ranks and alphas; LoRA+ -----------------------------------------------------------------------


def test_patterns_give_layers_pefts_ranks_and_scalings() -> None:
    own, theirs = quantized(), peft_of(dense_of(quantized()), **PATTERNS)
    qkern.add_lora(own, **COMMON, **PATTERNS)
    for name, layer in own.named_modules():
        if isinstance(layer, qkern.QLoRALinear):
            other = theirs.get_submodule(f"base_model.model.{name}")
            assert (layer.r, layer.scaling) == (other.r["default"], other.scaling["default"])


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lora_plus_groups_are_pefts(weight_decay: float, tmp_path: Path) -> None:
    own = quantized()
    qkern.add_lora(own, r=4, use_dora=True, **SAVED)
    qkern.save_adapter(own, tmp_path)
    theirs = PeftModel.from_pretrained(dense_of(quantized()), tmp_path, is_trainable=True)
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8, loraplus_weight_decay=weight_decay
    )
    groups = qkern.lora_plus_groups(own, lr=1e-3, ratio=8, weight_decay=weight_decay)

    def numbers(groups: list[dict]) -> dict[tuple[float, float], int]:
        found: dict[tuple[float, float], int] = {}
        for group in groups:
            if group["params"]:
                key = (group["lr"], group["weight_decay"])
                found[key] = found.get(key, 0) + sum(p.numel() for p in group["params"])
        return found

    assert numbers(groups) == numbers(optimizer.param_groups)
    torch.optim.SGD(groups).step()


def test_layer_norms_and_biases_do_not_decay() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 8))
    qkern.quantize_model(model, exclude=["2"])
    qkern.add_lora(model, target_modules=["0"], modules_to_save=["1", "2"])
    groups = qkern.lora_plus_groups(model, lr=1.0, ratio=2, weight_decay=0.5)
    found = {(g["lr"], g["weight_decay"]): len(g["params"]) for g in groups}
    assert found == {(1.0, 0.5): 2, (2.0, 0.5): 1, (2.0, 0.0): 3}
    for settings in ({"lr": 0.0}, {"lr": 1.0, "ratio": 0.5}):
        with pytest.raises(qkern.FormatError, match=r"LoRA\+ needs"):
            qkern.lora_plus_groups(model, **settings)
    with pytest.raises(qkern.AdapterMismatchError, match="nothing to train"):
        qkern.lora_plus_groups(model.requires_grad_(False), lr=1.0)
