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
from qkern.formats import QUANT_TYPES
from qkern.integrations.pretrained import load_model


def quantized(quant_type: str = "nf4", **changes: object) -> nn.Module:
    model = tiny_llama(**changes)
    qkern.quantize_model(model, quant_type)
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(token_ids()).logits


def relative_distance(a: Tensor, b: Tensor) -> float:
    """bitsandbytes' int8 layers round the activations to 8 bits too, so equal weights are near."""
    return float((a.float() - b.float()).norm() / b.float().norm())


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
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


@pytest.mark.parametrize("quant_type", ["nf4", "int8_row"])
def test_load_into_any_module(quant_type: str, tmp_path: Path) -> None:
    def net() -> nn.Sequential:
        return nn.Sequential(nn.Linear(172, 65), nn.ReLU(), nn.Linear(65, 8))

    model = net()
    qkern.quantize_model(model, quant_type)
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


def test_transformers_with_bitsandbytes_opens_our_int8_rows(tmp_path: Path) -> None:
    import bitsandbytes

    model = quantized("int8_row").bfloat16()
    qkern.save(model, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.dtype == torch.bfloat16
    for name, layer in model.named_modules():
        if isinstance(layer, qkern.QuantizedLinear):
            twin = theirs.get_submodule(name)
            assert isinstance(twin, bitsandbytes.nn.Linear8bitLt)
            assert torch.equal(twin.weight.data, layer.weight.packed)
            assert torch.equal(twin.weight.SCB, layer.weight.absmax.reshape(-1))
    assert type(theirs.lm_head) is nn.Linear
    assert relative_distance(logits(theirs), logits(model)) < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_we_open_what_transformers_with_bitsandbytes_writes_in_8_bits(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    from transformers import BitsAndBytesConfig

    tiny_llama().save_pretrained(tmp_path / "dense")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense",
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        dtype=dtype,
        device_map="cpu",
    )
    theirs.save_pretrained(tmp_path / "bnb")
    into = tiny_llama()
    qkern.load(tmp_path / "bnb", into)
    for ours in (qkern.load(tmp_path / "bnb"), load_model(tmp_path / "bnb"), into):
        mine, twin = (m.model.layers[1].mlp.down_proj.weight for m in (ours, theirs))
        assert mine.format == qkern.QuantFormat("int8_row", 192)
        assert mine.dtype == dtype
        assert torch.equal(mine.packed, twin.data)
        assert torch.equal(mine.absmax.reshape(-1), twin.SCB)
    assert relative_distance(logits(theirs), logits(ours)) < 0.03


def test_int8_rows_without_a_dtype_in_the_configuration_take_the_layers(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8)).bfloat16()
    qkern.quantize_model(model, "int8_row")
    qkern.save(model, tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = qkern.load(tmp_path, nn.Sequential(nn.Linear(8, 8)).to(dtype))
        assert loaded[0].weight.dtype == dtype
        assert torch.equal(loaded[0].weight.packed, model[0].weight.packed)
    (tmp_path / "config.json").write_text(json.dumps({"torch_dtype": "float16"}))
    loaded = qkern.load(tmp_path, nn.Sequential(nn.Linear(8, 8)))
    assert loaded[0].weight.dtype == torch.float16


ROW = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop(f"{ROW}.SCB"), f"{ROW}.weight: missing {ROW}.SCB"),
        (
            lambda t: [t.pop(f"{ROW}.{k}") for k in ("SCB", "weight_format")],
            f"{ROW}.weight: int8 codes without",
        ),
        (lambda t: t.update({f"{ROW}.SCB": t[f"{ROW}.SCB"][:5]}), r"SCB: got .*\[5\], .*192"),
        (lambda t: t[f"{ROW}.weight_format"].fill_(1), "weight_format: got 1, only 0"),
        (lambda t: t.update({f"{ROW}.weight": t[f"{ROW}.weight"].float()}), "got float32"),
        (
            lambda t: t.update({f"{ROW}.{k}": t[f"{ROW}.{k}"][1:] for k in ("weight", "SCB")}),
            r"the file holds \(191, 128\), \(192, 128\) needed",
        ),
        (
            lambda t: t.update({f"lost.{k}": t[f"{ROW}.{k}"] for k in ("SCB", "weight")}),
            "no layer lost",
        ),
    ],
)
def test_spoilt_int8_rows_are_refused_with_their_reason(
    tmp_path: Path, change: object, text: str
) -> None:
    qkern.save(quantized("int8_row"), tmp_path)
    spoil(tmp_path, change)
    for model in (None, tiny_llama()):
        with pytest.raises(qkern.CorruptFileError, match=text):
            qkern.load(tmp_path, model)


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
                {f"model.layers.9.x{k[len(ROW) :]}": t[k] for k in t if k.startswith(WEIGHT)}
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


def test_buffers_keep_their_dtype_and_generation_settings_come_back(tmp_path: Path) -> None:
    model = quantized()
    model.generation_config.eos_token_id = [5, 6]
    qkern.add_lora(model, r=2)
    qkern.save(model, tmp_path)
    loaded = qkern.load(tmp_path, dtype=torch.bfloat16)
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
    assert loaded.model.layers[0].mlp.up_proj.lora_A.dtype == torch.float32
    assert loaded.generation_config.eos_token_id == [5, 6]


def test_loading_into_a_real_module_is_strict(tmp_path: Path) -> None:
    def net() -> nn.Sequential:
        return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))

    model = net()
    qkern.quantize_model(model)
    qkern.save(model, tmp_path)
    spoil(tmp_path, lambda t: [t.pop(k) for k in list(t) if k.startswith("1.weight")])
    with pytest.raises(qkern.CorruptFileError, match=r"missing.*1\.weight"):
        qkern.load(tmp_path, net())


def test_a_directory_that_is_used_again_keeps_nothing_of_the_old_model(tmp_path: Path) -> None:
    old = quantized()
    qkern.add_lora(old, r=2, init_lora_weights=False)
    qkern.save(old, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x"}}')
    new = quantized("int8")
    qkern.save(new, tmp_path)
    assert torch.equal(logits(qkern.load(tmp_path)), logits(new))


def test_shards_that_are_links_to_blobs_open_as_in_a_hub_cache(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "revision"
    tiny_llama().save_pretrained(snapshot)
    (tmp_path / "blobs").mkdir()
    blob = (snapshot / "model.safetensors").rename(tmp_path / "blobs" / "0123")
    shard = "model-00001-of-00001.safetensors"
    (snapshot / shard).symlink_to(blob)
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(blob), shard)}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(logits(load_model(snapshot)), logits(tiny_llama()))
    blob.write_bytes(b"junk")
    with pytest.raises(qkern.CorruptFileError, match="safetensors"):
        load_model(snapshot)


def test_a_model_wrapped_by_peft_is_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(quantized(), LoraConfig(target_modules="all-linear"))
    with pytest.raises(qkern.AdapterMismatchError, match="PEFT"):
        qkern.save(wrapped, tmp_path)


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
    with pytest.raises(qkern.CorruptFileError, match="name of a file"):
        qkern.load(tmp_path, nn.Linear(4, 4))
