"""transformers' ``from_pretrained`` and ``save_pretrained`` with ``QkernConfig``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
import transformers
from hf_models import llama, load, logits, quantized_names, write_dense
from torch import nn

import qkern
import qkern.integrations.transformers as door
from qkern import flat_keys
from qkern.integrations.transformers import QkernConfig, model_config
from qkern.layers import QuantizedLinear

pytestmark = pytest.mark.usefixtures("without_gpu")
FORMATS: list[tuple[str, dict[str, Any]]] = [
    ("nf4", {}),
    ("nf4", {"double_quant": False, "method": "search"}),
    ("fp4", {"blocksize": 128}),
    ("int8", {}),
    ("int8_row", {}),
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense(tmp_path_factory.mktemp("dense"))


def method_of(path: Path) -> str:
    content = json.loads((path / "config.json").read_text())
    return str(content["quantization_config"]["quant_method"])


# -- from dense weights ----------------------------------------------------------------------


@pytest.mark.parametrize(("quant_type", "settings"), FORMATS)
def test_a_dense_checkpoint_becomes_what_quantize_model_makes_of_it(
    dense: Path, quant_type: str, settings: dict[str, Any]
) -> None:
    model = load(dense, quantization_config=QkernConfig(quant_type, **settings))
    expected = load(dense)
    report = qkern.quantize_model(expected, quant_type, **settings)
    state = expected.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert str(model.hf_quantizer.coverage) == str(report)
    assert torch.equal(logits(model), logits(expected))
    layer = model.model.layers[0].mlp.up_proj
    assert type(layer) is QuantizedLinear
    assert layer.path == "model.layers.0.mlp.up_proj"
    assert not layer.weight.requires_grad


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_layer_that_the_files_lack_is_new_and_trained(tmp_path: Path, kind: str) -> None:
    model, lacking = llama(), "model.layers.0.mlp.up_proj"
    state = {key: t for key, t in model.state_dict().items() if not key.startswith(lacking)}
    model.save_pretrained(tmp_path, state_dict=dict(state))  # which empties it
    if kind == "bin":
        (tmp_path / "model.safetensors").unlink()
        torch.save(state, tmp_path / "pytorch_model.bin")
    loaded = load(tmp_path, quantization_config=QkernConfig())
    assert type(loaded.get_submodule(lacking)) is nn.Linear
    assert loaded.get_submodule(lacking).weight.requires_grad
    assert len(quantized_names(loaded)) == 13
    reasons = {row.name: row.reason for row in loaded.hf_quantizer.coverage.rows}
    assert reasons[lacking] == "the checkpoint has no such weight: it is new, to be trained"


def test_a_head_that_is_tied_stays_so(tmp_path: Path) -> None:
    path = write_dense(tmp_path / "dense", tie_word_embeddings=True)
    model = load(path, quantization_config=QkernConfig())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(quantized_names(model)) == 14
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits(again), logits(model))


def test_a_users_skips_are_added_to_the_default_ones(dense: Path) -> None:
    skips = ["down_proj", "model.layers.0.self_attn", "*.1.mlp.gate_proj"]
    config = QkernConfig(modules_to_not_convert=skips)
    model = load(dense, quantization_config=config)
    names = quantized_names(model)
    assert names == {
        *(f"model.layers.1.self_attn.{name}_proj" for name in "qkvo"),
        *(f"model.layers.{i}.mlp.up_proj" for i in (0, 1)),
        "model.layers.0.mlp.gate_proj",
    }
    assert type(model.lm_head) is nn.Linear
    reasons = {row.name: row.reason for row in model.hf_quantizer.coverage.rows}
    assert reasons["model.layers.1.mlp.down_proj"] == "modules_to_not_convert has 'down_proj'"
    assert reasons["lm_head"] == "the output head"
    assert model.config.quantization_config.modules_to_not_convert == [
        name for name, m in model.named_modules() if type(m) is nn.Linear
    ]


@pytest.mark.parametrize("skip", ["layers.0", "model.layers.0", "*.layers.0", "model.layers.0.*"])
def test_a_skip_of_a_module_is_one_of_all_that_is_in_it(dense: Path, skip: str) -> None:
    model = load(dense, quantization_config=QkernConfig(modules_to_not_convert=skip))
    names = quantized_names(model)
    assert len(names) == 7
    assert all(name.startswith("model.layers.1.") for name in names)


def test_what_is_skipped_stays_dense_after_a_reload(tmp_path: Path, dense: Path) -> None:
    config = QkernConfig(modules_to_not_convert="model.layers.0.self_attn.q_proj")
    model = load(dense, quantization_config=config)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert quantized_names(again) == quantized_names(model)
    assert torch.equal(logits(again), logits(model))


def test_a_skip_that_matches_nothing_is_refused(dense: Path) -> None:
    with pytest.raises(qkern.FormatError, match="'downproj' matches no module"):
        load(dense, quantization_config=QkernConfig(modules_to_not_convert=["downproj"]))


def test_too_little_coverage_is_refused(dense: Path) -> None:
    with pytest.raises(qkern.CoverageError, match="at least 95"):
        load(dense, quantization_config=QkernConfig(min_coverage=0.95))
    load(dense, quantization_config=QkernConfig(min_coverage=0.8))


def test_a_weight_that_is_not_finite_is_a_typed_error_with_its_name(tmp_path: Path) -> None:
    model = hf_models.llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    write_dense(tmp_path, model)
    with pytest.raises(qkern.NonFiniteError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load(tmp_path, quantization_config=QkernConfig())


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_maps_of_one_device(tmp_path: Path, dense: Path, device_map: Any) -> None:
    model = load(dense, quantization_config=QkernConfig(), device_map=device_map)
    assert len(quantized_names(model)) == 14
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert torch.equal(logits(model), logits(load(dense, quantization_config=QkernConfig())))
    model.save_pretrained(tmp_path, max_shard_size="20KB")  # "offloaded" to the CPU: another way
    again = load(tmp_path, device_map=device_map)
    assert torch.equal(logits(again), logits(model))


def test_a_gpu_is_the_place_where_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = door.QkernQuantizer(QkernConfig())
    assert quantizer.update_device_map(None) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert quantizer.update_device_map(None) == {"": 3}
    assert quantizer.update_device_map("cpu") == "cpu"


@pytest.mark.parametrize("other", ["disk", "cuda:0"])
def test_offloading_is_refused(tmp_path: Path, dense: Path, other: str) -> None:
    device_map = {"model.embed_tokens": "cpu", "model.layers": other, "model.norm": "cpu"}
    device_map |= {"lm_head": "cpu", "model.rotary_emb": "cpu"}
    settings = {"device_map": device_map, "offload_folder": tmp_path}
    with pytest.raises(qkern.DeviceError, match=rf"model.layers: {other}.*one kind of device"):
        load(dense, quantization_config=QkernConfig(), **settings)


def test_a_map_that_runs_over_to_disk_is_refused(tmp_path: Path, dense: Path) -> None:
    settings = {"max_memory": {"cpu": "60KB"}, "offload_folder": tmp_path}
    with pytest.raises(qkern.DeviceError, match=r"disk.*one kind of device"):
        load(dense, quantization_config=QkernConfig(), device_map="auto", **settings)


def test_maps_and_caches_count_the_bytes_of_4_bits(dense: Path) -> None:
    with torch.device("meta"):
        empty = hf_models.llama().bfloat16()
    quantizer = door.QkernQuantizer(QkernConfig(), pre_quantized=False)
    quantizer.preprocess_model(empty, checkpoint_files=None)
    places = dict.fromkeys(empty.state_dict(), "cuda:0")
    count = transformers.modeling_utils.get_total_byte_count(empty, places, quantizer)
    loaded = load(dense, quantization_config=QkernConfig())
    weights = {id(p): p.nbytes for p in loaded.parameters()}
    assert count["cuda:0"] == sum(weights.values())


def test_a_dict_does_for_the_config(dense: Path) -> None:
    given = {"quant_method": "qkern", "quant_type": "fp4", "blocksize": 32, "method": "search"}
    model = load(dense, quantization_config=given)
    expected = load(dense)
    qkern.quantize_model(expected, "fp4", blocksize=32, method="search")
    assert torch.equal(logits(model), logits(expected))
    with pytest.raises(qkern.FormatError, match="has 'exclude', which is not known"):
        load(dense, quantization_config=given | {"exclude": ["lm_head"]})


# -- quantized files -------------------------------------------------------------------------


@pytest.mark.parametrize(("quant_type", "settings"), FORMATS[:4])
def test_save_reload_save_reload(
    tmp_path: Path, dense: Path, quant_type: str, settings: dict[str, Any]
) -> None:
    model = load(dense, quantization_config=QkernConfig(quant_type, **settings))
    model.save_pretrained(tmp_path / "first", max_shard_size="20KB")
    assert len(list((tmp_path / "first").glob("*.safetensors"))) > 2
    once = load(tmp_path / "first")
    once.save_pretrained(tmp_path / "second")
    twice = load(tmp_path / "second")
    expected = model.state_dict()
    for again in (once, twice):
        assert quantized_names(again) == quantized_names(model)
        assert again.state_dict().keys() == expected.keys()
        assert all(torch.equal(t, expected[key]) for key, t in again.state_dict().items())
        assert torch.equal(logits(again), logits(model))
    assert once.config.quantization_config.format == QkernConfig(quant_type, **settings).format
    by_qkern = qkern.load(tmp_path / "second")
    assert torch.equal(logits(by_qkern), logits(model))


@pytest.mark.parametrize("quant_type", ["nf4", "int8", "int8_row"])
def test_directories_of_save_and_of_the_command_open(
    tmp_path: Path, dense: Path, quant_type: str
) -> None:
    model = load(dense)
    qkern.quantize_model(model, quant_type)
    qkern.save(model, tmp_path / "saved")
    qkern.quantize_checkpoint(dense, tmp_path / "written", quant_type)
    for name in ("saved", "written"):
        path = tmp_path / name
        opened = load(path, config=model_config(path))
        assert torch.equal(logits(opened), logits(model))
        opened.save_pretrained(tmp_path / f"{name} again")
        assert method_of(tmp_path / f"{name} again") == method_of(path)


@pytest.mark.parametrize("saved_as", ["qkern", "bitsandbytes"])
def test_save_as_names_who_opens_the_files(tmp_path: Path, dense: Path, saved_as: str) -> None:
    model = load(dense, quantization_config=QkernConfig("nf4", save_as=saved_as))
    model.save_pretrained(tmp_path)
    assert method_of(tmp_path) == saved_as
    layer = load(tmp_path).model.layers[0].self_attn.q_proj
    assert type(layer).__name__ == {"qkern": "QuantizedLinear"}.get(saved_as, "Linear4bit")


def test_dequantize_gives_the_dense_model_of_the_same_values(tmp_path: Path, dense: Path) -> None:
    model = load(dense, quantization_config=QkernConfig())
    expected = logits(model)
    assert model.dequantize() is model
    assert not quantized_names(model)
    assert torch.equal(logits(model), expected)
    assert not model.is_quantized
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(logits(load(tmp_path)), expected)


def test_dequantize_keeps_the_hooks_of_layers(dense: Path) -> None:
    model, seen = load(dense, quantization_config=QkernConfig()), []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: seen.append("hook"))
    model.dequantize()
    logits(model)
    assert seen == ["hook"]
    assert all(p.requires_grad for p in model.model.layers[0].mlp.parameters())


def test_dequantize_refuses_to_lose_an_adapter(dense: Path) -> None:
    model = load(dense, quantization_config=QkernConfig())
    qkern.add_lora(model, r=2, init_lora_weights=False)
    with pytest.raises(qkern.AdapterMismatchError, match=r"qkern\.merge_to_dense without a loss"):
        model.dequantize()
    assert len(quantized_names(model)) == 14
    qkern.merge_adapter(model)
    merged = logits(model)
    model.dequantize()
    assert torch.equal(logits(model), merged)


def test_merged_to_dense_it_is_an_ordinary_model(dense: Path, tmp_path: Path) -> None:
    model = load(dense, quantization_config=QkernConfig())
    qkern.add_lora(model, r=2, init_lora_weights=False)
    qkern.merge_to_dense(model)
    assert not model.is_quantized
    model.float().save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load(tmp_path / "merged")), logits(model))


def test_a_file_that_lost_an_entry_is_a_typed_error(tmp_path: Path, dense: Path) -> None:
    from safetensors.torch import load_file, save_file

    load(dense, quantization_config=QkernConfig()).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    entries = load_file(file)
    del entries["model.layers.0.mlp.up_proj.weight.absmax"]
    save_file(entries, file, metadata={"format": "pt"})
    with pytest.raises(qkern.CorruptFileError, match=r"up_proj\.weight.*absmax"):
        load(tmp_path)


def test_a_variant_opens_from_one_file_and_shards_of_it_say_so(tmp_path: Path, dense: Path) -> None:
    model = load(dense, quantization_config=QkernConfig())
    model.save_pretrained(tmp_path / "one", variant="v")
    assert torch.equal(logits(load(tmp_path / "one", variant="v")), logits(model))
    model.save_pretrained(tmp_path / "many", variant="v", max_shard_size="20KB")
    with pytest.raises(qkern.CorruptFileError, match=r"shards of a variant.*max_shard_size"):
        load(tmp_path / "many", variant="v")
    model.save_pretrained(tmp_path / "many", max_shard_size="10KB")  # beside them
    with pytest.raises(qkern.CorruptFileError, match=r"does not name .*model\.v-00001"):
        load(tmp_path / "many", variant="v")


def test_an_error_while_entries_become_a_weight_keeps_its_type(
    tmp_path: Path, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(dense, quantization_config=QkernConfig()).save_pretrained(tmp_path)

    def refuse(*args: object) -> None:
        msg = "written to meanwhile"
        raise qkern.CorruptFileError(msg)

    monkeypatch.setattr(flat_keys, "unflatten", refuse)
    with pytest.raises(qkern.CorruptFileError, match="written to meanwhile"):
        load(tmp_path)


def test_files_of_another_model_are_a_typed_error(tmp_path: Path, dense: Path) -> None:
    load(dense, quantization_config=QkernConfig()).save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    config.intermediate_size = 192
    with pytest.raises(qkern.CorruptFileError, match=r"down_proj.*\(64, 128\), \(64, 192\) needed"):
        load(tmp_path, config=config)
