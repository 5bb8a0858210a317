"""GPT-2's Conv1D, whose weight is (in, out), from file to file: quantized as linear layers are."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_checkpoints import layer, write_model
from peft import PeftModel
from peft_adapters import adapted, assert_one_rounding, tensors_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

import qkern
from qkern.checkpoint.reader import CheckpointReader

NAMES = ["c_attn", "c_proj", "c_fc"]
IDS = torch.arange(20)[None]


@pytest.fixture
def gpt2(tmp_path: Path) -> GPT2LMHeadModel:
    """The model whose files are in ``dense``."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=96, n_positions=32)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ids of tokens beyond this vocabulary
        model.save_pretrained(tmp_path / "dense")
    return model.eval()


def names_of_the_hub(path: Path) -> None:
    """Without "transformer." in front, as GPT-2's own files."""
    file = path / "model.safetensors"
    tensors = {key.removeprefix("transformer."): t for key, t in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})


def opened(path: Path, **settings: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **settings).eval()


def of(report: qkern.QuantizationReport, name: str) -> Any:
    return next(result for result in report.tensors if result.name == name)


@pytest.mark.parametrize(
    ("quant_type", "method"),
    [("nf4", "absmax"), ("nf4", "search"), ("int8", "absmax"), ("int8_row", "absmax")],
)
@pytest.mark.parametrize("mmap", [False, True])
def test_files_hold_the_bytes_that_a_model_has(
    gpt2: GPT2LMHeadModel, tmp_path: Path, quant_type: str, method: str, mmap: bool
) -> None:
    dense, ours = tmp_path / "dense", tmp_path / "ours"
    report = qkern.quantize_checkpoint(dense, ours, quant_type, method=method, mmap=mmap)
    result = of(report, "transformer.h.1.mlp.c_fc.weight")
    assert result.shape == (256, 64)
    assert result.errors is not None
    qkern.quantize_model(gpt2, quant_type, method=method)
    expected = gpt2.state_dict()
    found = qkern.load(ours).eval()
    for key, tensor in found.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
    with torch.no_grad():
        assert torch.equal(found(IDS).logits, gpt2(IDS).logits)


def test_bitsandbytes_opens_what_was_quantized(gpt2: GPT2LMHeadModel, tmp_path: Path) -> None:
    names_of_the_hub(tmp_path / "dense")
    qkern.quantize_checkpoint(tmp_path / "dense", tmp_path / "ours", double_quant=False)
    theirs = opened(tmp_path / "ours")
    qkern.quantize_model(gpt2, double_quant=False)
    for (name, layer_), (_, other) in zip(_layers(gpt2), _layers(theirs), strict=True):
        assert torch.equal(other.weight.reshape(-1), layer_.weight.packed.reshape(-1)), name


@pytest.mark.parametrize("where", ["files", "model"])
def test_bitsandbytes_leaves_dense_what_was_left_dense(
    gpt2: GPT2LMHeadModel, tmp_path: Path, where: str
) -> None:
    settings = {"double_quant": False, "exclude": ["c_fc"]}
    if where == "files":
        qkern.quantize_checkpoint(tmp_path / "dense", tmp_path / "ours", **settings)
    else:
        dense = copy.deepcopy(gpt2)
        qkern.quantize_model(dense, **settings)
        qkern.save(dense, tmp_path / "ours")
    theirs = opened(tmp_path / "ours")
    block = theirs.transformer.h[0]
    assert type(block.mlp.c_fc).__name__ == "Conv1D"
    assert torch.equal(block.mlp.c_fc.weight, gpt2.transformer.h[0].mlp.c_fc.weight)
    assert type(block.mlp.c_proj).__name__ == "Linear4bit"


def _layers(model: Any) -> list[tuple[str, Any]]:
    return [(n, m) for n, m in model.named_modules() if n.rpartition(".")[2] in NAMES]


def test_it_becomes_dense_as_its_class_holds_it(gpt2: GPT2LMHeadModel, tmp_path: Path) -> None:
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    opened(tmp_path / "dense", quantization_config=quantization).save_pretrained(
        tmp_path / "theirs"
    )
    qkern.quantize_checkpoint(tmp_path / "dense", tmp_path / "ours", double_quant=False)
    before = tensors_of(tmp_path / "dense")
    for kind in ("theirs", "ours"):
        qkern.convert_checkpoint(tmp_path / kind, tmp_path / f"{kind}-dense", "float32")
        found = tensors_of(tmp_path / f"{kind}-dense")
        for key, tensor in before.items():
            assert found[key].shape == tensor.shape, key
            assert float((found[key] - tensor).norm()) <= 0.12 * float(tensor.norm()), key


def test_what_is_named_is_transposed_too_and_other_layers_are_not(tmp_path: Path) -> None:
    tensors = {f"h.0.attn.{name}.weight": torch.randn(64, 128) for name in ("c_attn", "other")}
    src = write_model(tmp_path / "src", tensors, config={"model_type": "gpt2"})
    for i, include in enumerate([[], ["c_attn"]]):
        report = qkern.quantize_checkpoint(src, tmp_path / str(i), include=include)
        assert of(report, "h.0.attn.c_attn.weight").shape == (128, 64)
        assert of(report, "h.0.attn.other.weight").shape == (64, 128)
    src = write_model(tmp_path / "llama", layer(0) | tensors)
    report = qkern.quantize_checkpoint(src, tmp_path / "other")
    assert of(report, "h.0.attn.c_attn.weight").shape == (64, 128)


# -- merges ----------------------------------------------------------------------------------


def _peft(model: GPT2LMHeadModel, path: Path, **config: Any) -> PeftModel:
    """Over Conv1D; or, where the layers are linear ones, over those."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT sets fan_in_fan_out as it must be
        peft = adapted(model, target_modules=NAMES, size=1.0, **config)
    peft.save_pretrained(path)
    return peft


@pytest.mark.parametrize("hub", [False, True])
def test_a_dense_base_is_merged_transposed(
    gpt2: GPT2LMHeadModel, tmp_path: Path, hub: bool
) -> None:
    if hub:
        names_of_the_hub(tmp_path / "dense")
    peft = _peft(gpt2, tmp_path / "adapter", fan_in_fan_out=True)
    out = tmp_path / "out"
    qkern.merge_checkpoint(tmp_path / "dense", tmp_path / "adapter", out, dtype="float32")
    merged = peft.merge_and_unload().state_dict()
    for key, tensor in tensors_of(out).items():
        assert_one_rounding(tensor, merged[f"transformer.{key}" if hub else key])


def test_a_merge_ends_in_the_codes_of_the_transposed_sum(
    gpt2: GPT2LMHeadModel, tmp_path: Path
) -> None:
    peft = _peft(gpt2, tmp_path / "adapter", fan_in_fan_out=True)
    paths = tmp_path / "dense", tmp_path / "adapter"
    qkern.merge_checkpoint(*paths, tmp_path / "sum", dtype="float32")
    report = qkern.merge_checkpoint(*paths, tmp_path / "out", quant_type="nf4", min_kept=0.1)
    assert report.kept is not None
    assert 0.5 < report.kept < 1
    sums = tensors_of(tmp_path / "sum")
    with CheckpointReader(tmp_path / "out") as reader:
        for merged in report.merged:
            expected = qkern.quantize(sums[merged.name].T.contiguous(), "nf4")
            assert torch.equal(reader.read(merged.name).packed, expected.packed), merged.name
    with torch.no_grad():
        expected_logits = peft.eval()(IDS).logits
        found = qkern.load(tmp_path / "out")(IDS).logits
    assert (found - expected_logits).norm() < 0.3 * expected_logits.norm()


@pytest.mark.parametrize("trained", ["quantized", "dense"])
def test_a_quantized_base_becomes_dense_as_its_class_holds_it(
    gpt2: GPT2LMHeadModel, tmp_path: Path, trained: str
) -> None:
    """An adapter of linear layers (fan_in_fan_out=False) has the factors of one of Conv1D."""
    qkern.quantize_checkpoint(tmp_path / "dense", tmp_path / "q", "nf4")
    model = qkern.load(tmp_path / "q") if trained == "quantized" else gpt2
    _peft(model, tmp_path / "adapter", fan_in_fan_out=trained == "dense")
    report = qkern.merge_checkpoint(
        tmp_path / "q", tmp_path / "adapter", tmp_path / "out", dtype="float32"
    )
    assert report.kept == pytest.approx(1, abs=1e-4)
    found = opened(tmp_path / "out")
    base = qkern.load(tmp_path / "q")
    expected = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(found(IDS).logits, expected(IDS).logits, rtol=1e-4, atol=1e-5)


def test_an_adapter_that_knows_linear_layers_is_added_to_a_dense_base_too(
    gpt2: GPT2LMHeadModel, tmp_path: Path
) -> None:
    """Trained over quantized layers; the square c_proj has no shape that tells."""
    dense = {key: tensor.clone() for key, tensor in gpt2.state_dict().items()}
    qkern.quantize_model(gpt2)
    _peft(gpt2, tmp_path / "adapter", fan_in_fan_out=False)
    out = tmp_path / "out"
    qkern.merge_checkpoint(tmp_path / "dense", tmp_path / "adapter", out, dtype="float32")
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    found = tensors_of(out)
    for key in [key for key in found if key.split(".")[-2] in NAMES and key.endswith("weight")]:
        name = f"base_model.model.{key.removesuffix('.weight')}"
        A, B = (factors[f"{name}.lora_{part}.weight"].double() for part in "AB")
        assert_one_rounding(found[key], dense[key].double() + 2 * (B @ A).T)
