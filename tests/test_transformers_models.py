"""What transformers does to quantized models beside loading them: architectures, dtypes, traps."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
import transformers
from hf_models import llama, load, logits, quantized_names, write_dense
from torch import Tensor, nn
from transformers.quantizers import auto

import qkern
from qkern.integrations.transformers import QkernConfig, model_config
from qkern.layers import QuantizedLinear

pytestmark = pytest.mark.usefixtures("without_gpu")
SMALL = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 96, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense(tmp_path_factory.mktemp("dense"))


@pytest.fixture
def model(dense: Path) -> Any:
    return load(dense, quantization_config=QkernConfig())


def parts_of(model: Any) -> list[Tensor]:
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    return [part.clone() for layer in layers for part in layer.quantized_weight.parts]


# -- traps -----------------------------------------------------------------------------------


def test_no_layer_holds_a_buffer_that_loading_could_fill_with_garbage(model: Any) -> None:
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert len(layers) == 14
    assert not any(list(layer.buffers()) for layer in layers)


@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_without_the_import_codes_are_never_taken_for_weights(
    tmp_path: Path, dense: Path, monkeypatch: pytest.MonkeyPatch, quant_type: str
) -> None:
    load(dense, quantization_config=QkernConfig(quant_type)).save_pretrained(tmp_path)
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "qkern")
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "qkern")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(tmp_path)


def test_int8_rows_which_have_the_shape_of_weights_are_saved_as_bitsandbytes(
    tmp_path: Path, dense: Path
) -> None:
    model = load(dense, quantization_config=QkernConfig("int8_row"))
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert content["quant_method"] == "bitsandbytes"
    assert content["load_in_8bit"]
    again = load(tmp_path, config=model_config(tmp_path))
    assert torch.equal(logits(again), logits(model))


def test_int8_codes_that_lost_their_scales_are_refused(tmp_path: Path, dense: Path) -> None:
    from safetensors.torch import load_file, save_file

    load(dense, quantization_config=QkernConfig("int8_row")).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    entries = load_file(file)
    for name in ("SCB", "weight_format"):
        del entries[f"model.layers.1.mlp.up_proj.{name}"]
    save_file(entries, file, metadata={"format": "pt"})
    with pytest.raises(qkern.CorruptFileError, match=r"1\.mlp\.up_proj\.weight holds int8 codes"):
        load(tmp_path, config=model_config(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_another_dtype_is_that_of_all_parameters(
    tmp_path: Path, model: Any, dtype: torch.dtype
) -> None:
    model.save_pretrained(tmp_path)
    again = load(tmp_path, dtype=dtype)
    assert {p.dtype for p in again.parameters()} == {dtype}
    assert all(map(torch.equal, parts_of(again), parts_of(model)))
    assert (logits(again) - logits(model)).norm() < 0.02 * logits(model).norm()


def test_casts_and_copies_of_the_model_keep_codes_and_scales(model: Any) -> None:
    before, expected = parts_of(model), logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    model.to(torch.float32).to(torch.bfloat16)  # rounds the rotary frequencies, as in any model
    assert all(map(torch.equal, parts_of(model), before))
    assert (logits(model) - expected).norm() < 0.01 * expected.norm()


def test_parameters_are_counted_as_those_of_the_dense_model(dense: Path, model: Any) -> None:
    assert model.num_parameters() == load(dense).num_parameters() == 86336
    assert qkern.memory_footprint(model) < 0.4 * model.get_memory_footprint()


def test_it_generates(model: Any) -> None:
    tokens = model.generate(torch.arange(5)[None], max_new_tokens=4, do_sample=False)
    assert tokens.shape == (1, 9)


# -- prefixes and heads ----------------------------------------------------------------------


def test_a_base_model_opens_from_the_files_of_a_whole_one_and_back(
    tmp_path: Path, model: Any
) -> None:
    x = torch.arange(12)[None]
    model.eval().save_pretrained(tmp_path / "whole")
    base = transformers.AutoModel.from_pretrained(tmp_path / "whole")
    assert len(quantized_names(base)) == 14
    with torch.no_grad():
        assert torch.equal(base(x)[0], model.model(x)[0])
    base.save_pretrained(tmp_path / "base")
    whole = load(tmp_path / "base")  # its head is new
    with torch.no_grad():
        assert torch.equal(whole.model(x)[0], model.model(x)[0])


def test_a_head_that_the_files_lack_is_new_and_dense(tmp_path: Path, dense: Path) -> None:
    cls = transformers.AutoModelForSequenceClassification
    model = cls.from_pretrained(dense, num_labels=3, quantization_config=QkernConfig())
    assert type(model.score) is nn.Linear
    assert len(quantized_names(model)) == 14
    assert torch.isfinite(model(torch.arange(12)[None]).logits).all()


@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
def test_a_layer_that_the_files_lack_is_new_dense_and_trainable(
    tmp_path: Path, max_shard_size: str
) -> None:
    bert().save_pretrained(tmp_path, max_shard_size=max_shard_size)
    cls = transformers.BertModel
    model = cls.from_pretrained(tmp_path, quantization_config=QkernConfig())
    assert len(quantized_names(model)) == 12
    pooler = model.pooler.dense
    assert type(pooler) is nn.Linear
    assert pooler.weight.requires_grad
    assert 0.01 < pooler.weight.std() < 0.04  # the standard deviation of the configuration
    row = next(r for r in model.hf_quantizer.coverage.rows if r.name == "pooler.dense")
    assert row.reason == "the checkpoint has no such weight: it is new, to be trained"


# -- architectures ---------------------------------------------------------------------------


def bert() -> Any:
    config = transformers.BertConfig(**SMALL, num_attention_heads=4)
    return transformers.BertForMaskedLM(config)


def t5() -> Any:
    sizes = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_heads": 4, "num_layers": 2}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(**sizes, vocab_size=96, decoder_start_token_id=0)
    )


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=96)
    )


def mixtral() -> Any:
    config = transformers.MixtralConfig(**SMALL, **HEADS, num_local_experts=4)
    return transformers.MixtralForCausalLM(config)


def qwen3() -> Any:
    config = transformers.Qwen3Config(**SMALL, **HEADS, head_dim=16, tie_word_embeddings=True)
    return transformers.Qwen3ForCausalLM(config)


def vit() -> Any:
    """Whose files have other names than its parameters."""
    return transformers.ViTForImageClassification(transformers.ViTConfig(**VISION))


def dinov2() -> Any:
    """In whose files two of its weights are one."""
    sizes = {key: value for key, value in VISION.items() if key != "intermediate_size"}
    return transformers.Dinov2Model(transformers.Dinov2Config(**sizes, use_swiglu_ffn=True))


VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
VISION |= {"num_attention_heads": 4, "image_size": 32, "patch_size": 8}
# Layers that are quantized; of T5 all but wo.
MODELS = [(bert, 12), (t5, 28), (mixtral, 8), (qwen3, 14), (vit, 12), (dinov2, 14)]


def inputs_of(build: Any) -> dict[str, Tensor]:
    if build in (vit, dinov2):
        return {"pixel_values": torch.randn(1, 3, 32, 32).bfloat16()}
    tokens = {"input_ids": torch.arange(12)[None]}
    return tokens | ({"decoder_input_ids": tokens["input_ids"]} if build is t5 else {})


@pytest.mark.parametrize(("build", "count"), MODELS)
def test_architectures_load_save_and_reload(tmp_path: Path, build: Any, count: int) -> None:
    torch.manual_seed(0)
    original = build()
    write_dense(tmp_path / "dense", original.bfloat16())
    cls, x = type(original), inputs_of(build)
    model = cls.from_pretrained(tmp_path / "dense", quantization_config=QkernConfig()).eval()
    assert len(quantized_names(model)) == count, model.hf_quantizer.coverage
    expected = model(**x)[0]
    for i in range(2):
        model.save_pretrained(tmp_path / str(i))
        model = cls.from_pretrained(tmp_path / str(i)).eval()
        assert len(quantized_names(model)) == count
        assert torch.equal(model(**x)[0], expected)
    biases = [m.bias for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert not any(bias.requires_grad for bias in biases if bias is not None)


@pytest.mark.parametrize("name", ["gate_proj", "up_proj"])
def test_one_of_two_weights_that_are_one_in_the_file_can_stay_dense(
    tmp_path: Path, name: str
) -> None:
    write_dense(tmp_path, dinov2())
    config = QkernConfig(modules_to_not_convert=[name])
    model = transformers.Dinov2Model.from_pretrained(tmp_path, quantization_config=config)
    assert len(quantized_names(model)) == 12
    expected = transformers.Dinov2Model.from_pretrained(tmp_path)
    qkern.quantize_model(expected, exclude=[name])
    state = expected.state_dict()
    assert all(torch.equal(t, state[key]) for key, t in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_the_class_keeps_in_float32_stays_dense(tmp_path: Path, dtype: torch.dtype) -> None:
    write_dense(tmp_path, t5().bfloat16())
    cls = transformers.T5ForConditionalGeneration
    model = cls.from_pretrained(tmp_path, quantization_config=QkernConfig(), dtype=dtype)
    wo = model.encoder.block[0].layer[1].DenseReluDense.wo
    assert type(wo) is nn.Linear
    assert wo.weight.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    row = next(r for r in model.hf_quantizer.coverage.rows if r.name.endswith("wo"))
    assert row.reason == "its class computes it in float32 where the rest is float16"


def test_layers_that_are_no_linear_ones_are_named(tmp_path: Path) -> None:
    write_dense(tmp_path, gpt2())
    with pytest.raises(qkern.CoverageError, match=r"Embedding, not nn\.Linear"):
        load(tmp_path, quantization_config=QkernConfig(min_coverage=0.99))


# -- bitsandbytes' checkpoints ---------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        {"load_in_8bit": True},
    ],
)
def test_checkpoints_of_bitsandbytes_open(
    tmp_path: Path, dense: Path, settings: dict[str, Any]
) -> None:
    config = transformers.BitsAndBytesConfig(**settings)
    theirs = load(dense, quantization_config=config, dtype=torch.bfloat16, device_map="cpu")
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path, config=model_config(tmp_path))
    assert len(quantized_names(ours)) == 14
    assert torch.equal(logits(ours), logits(qkern.load(tmp_path)))
    bound = 0.05 if "load_in_8bit" in settings else 0.02  # there inputs are rounded too
    assert (logits(ours) - logits(theirs)).norm() < bound * logits(theirs).norm()


def test_a_dense_model_in_memory_is_no_concern_of_the_quantizer() -> None:
    model = llama()
    qkern.quantize_model(model)
    assert getattr(model, "hf_quantizer", None) is None
    assert torch.isfinite(hf_models.logits(model)).all()
