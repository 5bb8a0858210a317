"""Adapters that fit, that do not, and that were trained over another base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from format_cases import FORMATS
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qkern
from qkern.adapted import adapted_layers
from qkern.adapters import read_quantization
from qkern.fingerprint import base_fingerprint
from qkern.layers import QuantizedLinear


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.up_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.up_proj(torch.tanh(self.q_proj(x)))


def net(seed: int = 0, width: int = 64, **settings: object) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(Block(width), Block(width))
    qkern.quantize_model(model, **settings)
    return model


def adapted(seed: int = 0, **lora: object) -> nn.Module:
    model = net(seed)
    torch.manual_seed(9)
    qkern.add_lora(model, **{"r": 4, "init_lora_weights": False, **lora})
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    qkern.save_adapter(adapted(), tmp_path / "adapter")
    return tmp_path / "adapter"


X = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
Q_PROJ = "base_model.model.0.q_proj.lora_A.weight"


# -- fitting ---------------------------------------------------------------------------------


def edit(directory: Path, change: object) -> None:
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, file)


def rename(old: str, new: str) -> object:
    return lambda tensors: [
        tensors.update({key.replace(old, new): tensors.pop(key)})
        for key in list(tensors)
        if old in key
    ]


@pytest.mark.case("E1")
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (rename("q_proj", "query_proj"), r"no quantized layer 0\.query_proj; nearest: .*q_proj"),
        (rename("1.up_proj", "1.upproj"), r"1\.upproj; nearest: 1\.up_proj"),
        (rename("0.q_proj", "0.q_proj.linear"), r"nearest: 0\.q_proj"),
        (lambda t: t.pop(Q_PROJ), r"0\.q_proj needs lora_A"),
        (lambda t: t.update(extra=torch.ones(1)), "unexpected entry extra"),
        (lambda t: t.update({Q_PROJ: torch.ones(4, 63)}), r"\(64, 63, 4\).*is \(64, 64, 4\)"),
        (lambda t: t.update({Q_PROJ: torch.ones(5, 64)}), r"0\.q_proj needs lora_A"),
        (lambda t: t.update({Q_PROJ: torch.ones(4, 64, 1)}), "unexpected entry"),
        (lambda t: t.clear() or t.update(x=torch.ones(2, 2)), "unexpected entry x"),
        (lambda t: t.clear(), "no adapter"),
    ],
)
def test_a_file_that_does_not_fit_names_what_and_the_nearest(
    saved: Path, change: object, text: str
) -> None:
    edit(saved, change)
    for model in (net(), adapted()):
        before = model(X)
        with pytest.raises(qkern.AdapterMismatchError, match=text):
            qkern.load_adapter(model, saved)
        assert torch.equal(model(X), before)


@pytest.mark.case("E1")
def test_another_rank_or_fewer_layers_than_the_model_has(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(qkern.AdapterMismatchError, match=r"\(64, 64, 4\).*\(64, 64, 8\)"):
        qkern.load_adapter(adapted(r=8), saved)
    qkern.save_adapter(adapted(target_modules=["q_proj"]), tmp_path)
    with pytest.raises(qkern.AdapterMismatchError, match=r"no entry for 2 .* 0\.up_proj"):
        qkern.load_adapter(adapted(), tmp_path)
    with pytest.raises(qkern.AdapterMismatchError, match=r"nearest: none"):
        qkern.load_adapter(nn.Sequential(nn.Linear(64, 64)), saved)


@pytest.mark.case("E1")
@pytest.mark.parametrize(
    ("targets", "text"),
    [
        (["q_prj"], "'q_prj' matches no quantized layer; nearest: q_proj"),
        (["q_proj", "upproj"], "'upproj' matches no quantized layer; nearest: .*up_proj"),
        (r".*\.k_proj", "matches no quantized layer"),
        ([], "nothing matches"),
    ],
)
def test_targets_that_match_nothing(targets: object, text: str) -> None:
    model = net()
    with pytest.raises(qkern.AdapterMismatchError, match=text):
        qkern.add_lora(model, target_modules=targets)
    assert not list(adapted_layers(model))


# -- another base ----------------------------------------------------------------------------


def fingerprint(model: nn.Module) -> str | None:
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    return base_fingerprint(layers)


def metadata_of(directory: Path) -> dict[str, str]:
    with safe_open(directory / "adapter_model.safetensors", "pt") as opened:
        return opened.metadata()


@pytest.mark.case("E3")
def test_an_adapter_of_another_base_is_refused_unless_forced(saved: Path) -> None:
    other = net(seed=1)
    before = other(X)
    with pytest.raises(qkern.AdapterMismatchError, match=r"fingerprint [0-9a-f]{12},.*force=True"):
        qkern.load_adapter(other, saved)
    assert torch.equal(other(X), before)
    assert not list(adapted_layers(other))
    qkern.load_adapter(other, saved, force=True)
    assert not torch.equal(other(X), before)
    own = net()
    qkern.load_adapter(own, saved)
    assert torch.equal(own(X), adapted()(X))


@pytest.mark.case("E3")
@pytest.mark.parametrize(
    "settings", [{"quant_type": "fp4"}, {"quant_type": "int8"}, {"blocksize": 32}]
)
def test_a_base_in_another_format_is_another_base(saved: Path, settings: dict[str, object]) -> None:
    with pytest.raises(qkern.AdapterMismatchError, match=r"quant_type='nf4', blocksize=64.*; here"):
        qkern.load_adapter(net(**settings), saved)


@pytest.mark.case("E3")
@pytest.mark.parametrize("at", [(0, 0), (63, 63), (31, 17)])
def test_one_other_value_is_another_base_in_a_small_layer(at: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(64), Block(64))
    with torch.no_grad():
        weight = model[1].up_proj.weight
        weight[at] = -weight[at]
    qkern.quantize_model(model)
    assert fingerprint(model) != fingerprint(net())


@pytest.mark.case("E3")
@pytest.mark.parametrize(("quant_type", "double_quant"), FORMATS)
def test_the_fingerprint_stays_through_a_models_life(
    quant_type: str, double_quant: bool, tmp_path: Path
) -> None:
    model = net(quant_type=quant_type, double_quant=double_quant)
    expected = fingerprint(model)
    assert len(expected) == 64
    qkern.save(model, tmp_path)
    loaded = qkern.load(tmp_path, nn.Sequential(Block(64), Block(64)))
    assert fingerprint(loaded) == expected
    loaded.load_state_dict(model.state_dict())
    assert fingerprint(loaded.half().double().bfloat16()) == expected
    torch.manual_seed(3)
    qkern.add_lora(model, r=4, init_lora_weights=False)
    qkern.merge_adapter(model)
    assert fingerprint(model) == expected  # a merged adapter is no part of the base
    qkern.unmerge_adapter(model)
    assert fingerprint(model) == expected
    assert fingerprint(model.to("meta")) is None


@pytest.mark.case("E3")
def test_a_large_layer_is_sampled() -> None:
    torch.manual_seed(0)
    layer = QuantizedLinear.from_linear(nn.Linear(1024, 512))
    before = base_fingerprint({"a": layer})
    with torch.no_grad():
        layer.weight.packed[-1, -1] ^= 1
    assert base_fingerprint({"a": layer}) != before  # the last byte is read
    assert base_fingerprint({"b": layer}) != base_fingerprint({"a": layer})


@pytest.mark.case("E3")
def test_peft_reads_our_fingerprint_away_and_its_own_files_need_none(
    saved: Path, tmp_path: Path
) -> None:
    assert metadata_of(saved)["qkern_base"] == fingerprint(net())
    assert read_quantization(saved) == qkern.QuantFormat("nf4")
    stock = PeftModel.from_pretrained(net(), saved)
    torch.testing.assert_close(stock(X), adapted()(X))
    assert "qkern" not in json.loads((saved / "adapter_config.json").read_text())
    stock.save_pretrained(tmp_path / "theirs")
    assert "qkern_base" not in (metadata_of(tmp_path / "theirs") or {})
    other = net(seed=1)
    qkern.load_adapter(other, tmp_path / "theirs")  # nothing says which base it is of
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(net(seed=1), config).save_pretrained(tmp_path / "new")
    qkern.load_adapter(net(), tmp_path / "new")


@pytest.mark.case("E3")
@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.half().float(),
        lambda m: m.bfloat16(),
        lambda m: m.double(),
        lambda m: m.to("cpu", torch.float16),
    ],
)
def test_casts_between_merge_and_unmerge_keep_the_bytes(change: object) -> None:
    model = adapted(lora_alpha=1)
    before = {key: value.clone() for key, value in net().state_dict().items() if "weight" in key}
    qkern.merge_adapter(model)
    assert not torch.equal(model.state_dict()["0.q_proj.weight"], before["0.q_proj.weight"])
    model = change(model)
    qkern.unmerge_adapter(model)
    state = model.state_dict()
    assert all(torch.equal(state[key], before[key]) for key in before if "quant_state" not in key)


@pytest.mark.case("E3")
def test_another_write_after_a_merge_is_not_undone_with_it() -> None:
    model = adapted(lora_alpha=1)
    layer = model[0].q_proj
    qkern.merge_adapter(model)
    merged = layer.weight.dequantize()
    layer.weight.data += 1.0
    qkern.unmerge_adapter(model)
    expected = merged + 1.0 - layer.delta()
    assert (layer.weight.dequantize() - expected).norm() < 0.2 * expected.norm()
