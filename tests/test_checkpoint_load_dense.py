"""Dense checkpoints that are quantized while they are loaded."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import qkern
from qkern.checkpoint.load_dense import load_dense_into
from qkern.errors import CorruptFileError, CoverageError, FormatError, NonFiniteError
from qkern.formats import QuantFormat
from qkern.layers import QuantizedLinear
from qkern.tensor import QuantizedTensor

transformers = pytest.importorskip("transformers")


@pytest.fixture
def dense(tmp_path: Path) -> tuple[Path, nn.Module]:
    """A directory of two shards, and the model in it."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        dtype="bfloat16",
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    model.save_pretrained(tmp_path / "dense", max_shard_size="60KB")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 1
    return tmp_path / "dense", model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(torch.arange(7)[None]).logits
    return result


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 8), nn.LayerNorm(8), nn.Linear(8, 64))


@pytest.mark.parametrize("quant_type", ["nf4", "int8", "int8_row"])
def test_bytes_are_those_of_quantize_model(dense: tuple[Path, nn.Module], quant_type: str) -> None:
    path, _ = dense
    loaded = qkern.load(path, quant_type=quant_type)
    # Unlike the model that was saved, both compute its rotary frequencies in fp32.
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    qkern.quantize_model(model, quant_type)
    expected, found = model.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert torch.equal(logits(loaded), logits(model))
    trained = [[p.requires_grad for p in m.parameters()] for m in (loaded, model)]
    assert trained[0] == trained[1]


def test_settings_reach_the_layers(dense: tuple[Path, nn.Module]) -> None:
    path, model = dense
    settings = {"blocksize": 128, "double_quant": False, "method": "search", "exclude": "down_proj"}
    loaded = qkern.load(path, quant_type="fp4", compute="int8", dtype=torch.float32, **settings)
    qkern.quantize_model(model, "fp4", **settings)
    layer = loaded.model.layers[0].self_attn.q_proj
    assert isinstance(layer, QuantizedLinear)
    assert layer.compute == "int8"
    assert layer.weight.dtype == torch.float32
    assert type(loaded.model.layers[1].mlp.down_proj) is nn.Linear
    expected = model.model.layers[0].self_attn.q_proj.quantized_weight
    assert torch.equal(layer.quantized_weight.packed, expected.packed)


def test_an_adapter_trains_on_it(dense: tuple[Path, nn.Module]) -> None:
    loaded = qkern.load(dense[0], quant_type="nf4", dtype=torch.float32)
    names = qkern.add_lora(loaded, r=2)
    assert len(names) == 14
    loaded(torch.arange(7)[None]).logits.sum().backward()
    assert loaded.model.layers[0].self_attn.q_proj.lora_B.grad is not None


def test_what_goes_to_a_device_is_quantized_already(
    dense: tuple[Path, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = []
    for cls in (torch.Tensor, QuantizedTensor):
        to = cls.to
        monkeypatch.setattr(
            cls, "to", lambda q, *args, to=to: moved.append((type(q), q.shape)) or to(q, *args)
        )
    qkern.load(dense[0], quant_type="nf4", device="cpu")
    first = dict.fromkeys(moved)
    assert (QuantizedTensor, (96, 64)) in first
    assert (torch.Tensor, (100, 64)) in first  # the output head
    assert (torch.Tensor, (96, 64)) not in first


def test_scales_that_8_bits_lose_stay_in_32(tmp_path: Path) -> None:
    weight = torch.randn(512, 64)
    weight[::2] *= 1e-4
    save_file({"0.weight": weight, "0.bias": torch.zeros(512)}, tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 512))
    report = load_dense_into(model, tmp_path, QuantFormat())
    assert "fp32 scales" in str(report)
    assert model[0].quantized_weight.nested_absmax is None


def test_tied_weights_are_one(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        model = nn.Sequential(
            nn.Embedding(16, 64), nn.Linear(64, 64), nn.Linear(64, 16, bias=False)
        )
        model[2].weight = model[0].weight
        return model

    state = {key: value for key, value in tied().state_dict().items() if key != "2.weight"}
    save_file(state, tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = tied()
    load_dense_into(model, tmp_path, QuantFormat())
    assert model[2].weight is model[0].weight
    assert torch.equal(model[0].weight, state["0.weight"])
    assert isinstance(model[1], QuantizedLinear)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"0.weight": None}, "missing ['0.weight']"),
        ({"3.weight": torch.zeros(2)}, "unexpected ['3.weight']"),
        ({"1.bias": torch.zeros(9)}, "1.bias: the file holds (9,), (8,) needed"),
        ({"2.weight": torch.zeros(8, 64)}, "2.weight: the file holds (8, 64), (64, 8) needed"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    tmp_path: Path, change: dict[str, torch.Tensor | None], says: str
) -> None:
    state = {k: v for k, v in (net().state_dict() | change).items() if v is not None}
    save_file(state, tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = net()
    with pytest.raises(CorruptFileError) as caught:
        load_dense_into(model, tmp_path, QuantFormat())
    assert says in str(caught.value)


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    model = net()
    with torch.no_grad():
        model[2].weight[3, 4] = torch.nan
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        empty = net()
    with pytest.raises(NonFiniteError, match=r"2\.weight: NaN or infinity in 1 .* index 28"):
        load_dense_into(empty, tmp_path, QuantFormat())


def test_wrong_calls_are_refused(dense: tuple[Path, nn.Module], tmp_path: Path) -> None:
    path, model = dense
    with pytest.raises(FormatError, match="the model has values"):
        qkern.load(path, model, quant_type="nf4")
    with pytest.raises(FormatError, match="unknown quant_type 'nf5'"):
        qkern.load(path, quant_type="nf5")
    with pytest.raises(FormatError, match="int8 is quantized by"):
        qkern.load(path, quant_type="int8", method="search")
    with pytest.raises(CoverageError):
        qkern.load(path, quant_type="nf4", min_coverage=0.99)
    qkern.quantize_model(model)
    qkern.save(model, tmp_path / "quantized")
    with pytest.raises(FormatError, match="quantized already"):
        qkern.load(tmp_path / "quantized", quant_type="nf4")


def test_config_of_the_directory_is_not_changed(dense: tuple[Path, nn.Module]) -> None:
    before = (dense[0] / "config.json").read_text()
    qkern.load(dense[0], quant_type="nf4")
    assert json.loads((dense[0] / "config.json").read_text()) == json.loads(before)


def test_a_config_without_architectures_is_a_causal_model(dense: tuple[Path, nn.Module]) -> None:
    path, model = dense
    file = path / "config.json"
    config = json.loads(file.read_text())
    del config["architectures"]
    file.write_text(json.dumps(config))
    assert type(qkern.load(path, quant_type="nf4")) is type(model)
    file.write_text("{}")
    with pytest.raises(CorruptFileError, match="names no transformers model"):
        qkern.load(path, quant_type="nf4")
