"""``convert_checkpoint``: codes that stay, values rounded once, files of others both ways."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_checkpoints import CONFIG, ends, layer, write_model, write_sharded
from file_trees import tree
from peft_adapters import model, tensors_of, write_base
from safetensors.torch import load_file
from toys import token_ids
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import qkern
from qkern.checkpoint.conversion_report import ConversionReport
from qkern.checkpoint.load import read_tensors
from qkern.checkpoint.quantization_report import QuantizationReport
from qkern.checkpoint.reader import CheckpointReader

FORMATS: list[tuple[str, dict[str, Any]]] = [
    ("nf4", {}),
    ("nf4", {"double_quant": False, "blocksize": 128}),
    ("fp4", {"blocksize": 32}),
    ("int8", {}),
    ("int8", {"double_quant": False}),
    ("int8_row", {}),
]
DTYPES = ("bfloat16", "float16", "float32")


def config_of(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((path / "config.json").read_text())
    return content


def write_by_bitsandbytes(path: Path, **settings: Any) -> Path:
    """A directory that transformers with bitsandbytes wrote."""
    dense = write_base(path.with_name("dense"))
    quantization = BitsAndBytesConfig(**settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opened = AutoModelForCausalLM.from_pretrained(
            dense, quantization_config=quantization, dtype=torch.bfloat16
        )
        opened.save_pretrained(path)
    return path


BITSANDBYTES: list[dict[str, Any]] = [
    {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"},
    {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "float32"},
    {"load_in_8bit": True},
]


# -- codes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("quant_type", "settings"), FORMATS)
def test_what_is_normal_already_stays_to_the_byte(
    tmp_path: Path, quant_type: str, settings: dict[str, Any]
) -> None:
    src = write_sharded(tmp_path / "src")
    qkern.quantize_checkpoint(src, tmp_path / "q", quant_type, **settings)
    report = qkern.convert_checkpoint(tmp_path / "q", tmp_path / "again", "qkern")
    assert isinstance(report, ConversionReport)
    before, after = read_tensors(tmp_path / "q"), read_tensors(tmp_path / "again")
    assert set(before) == set(after)
    for key, tensor in before.items():
        assert (after[key].dtype, after[key].shape) == (tensor.dtype, tensor.shape), key
        assert torch.equal(after[key], tensor), key
    assert config_of(tmp_path / "q") == config_of(tmp_path / "again")
    names = [path / "model.safetensors.index.json" for path in (tmp_path / "q", tmp_path / "again")]
    indexes = [json.loads(name.read_text()) for name in names]
    assert indexes[0] == indexes[1]
    assert {row.action for row in report.tensors} == {"copied", "codes copied"}


@pytest.mark.parametrize("settings", BITSANDBYTES, ids=lambda s: "-".join(map(str, s.values())))
def test_bitsandbytes_files_become_those_that_qkern_writes(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Codes and scales are their bytes; storage, tables and states are ours."""
    theirs = write_by_bitsandbytes(tmp_path / "theirs", **settings)
    qkern.convert_checkpoint(theirs, tmp_path / "ours", "qkern")
    before, after = tensors_of(theirs), tensors_of(tmp_path / "ours")
    assert set(after) == set(before)
    packed = 0
    for key, tensor in before.items():
        content = [t.contiguous().reshape(-1).view(torch.uint8) for t in (tensor, after[key])]
        assert torch.equal(*content), key
        if tensor.shape != after[key].shape:
            assert after[key].dtype == torch.uint8
            assert f"{key}.absmax" in before
            packed += 1
    assert bool(packed) == (settings.get("bnb_4bit_quant_storage", "uint8") != "uint8")
    quantization = config_of(tmp_path / "ours")["quantization_config"]
    assert quantization["quant_method"] == "bitsandbytes"
    if "load_in_4bit" in settings:
        assert quantization["bnb_4bit_quant_storage"] == "uint8"
        assert quantization["bnb_4bit_compute_dtype"] == "float32"  # the wish that was there


@pytest.mark.parametrize("quant_type", ["nf4", "int8_row"])
def test_bitsandbytes_opens_what_is_converted_to_it(tmp_path: Path, quant_type: str) -> None:
    base, quantized, theirs = write_base(tmp_path / "base"), tmp_path / "q", tmp_path / "theirs"
    qkern.quantize_checkpoint(base, quantized, quant_type)
    qkern.convert_checkpoint(quantized, theirs, "bitsandbytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opened = AutoModelForCausalLM.from_pretrained(theirs)
    layer = opened.model.layers[0].mlp.down_proj
    with CheckpointReader(quantized) as reader:
        q = reader.read("model.layers.0.mlp.down_proj.weight")
        assert isinstance(q, qkern.QuantizedTensor)
    assert torch.equal(layer.weight.data.reshape(-1), q.packed.reshape(-1))
    expected = model()
    qkern.quantize_model(expected, quant_type)
    ids = token_ids()
    # Their product on a CPU rounds the activations.
    torch.testing.assert_close(opened(ids).logits, expected(ids).logits, rtol=0.1, atol=0.1)


def test_what_bitsandbytes_has_not_is_refused_with_the_way(tmp_path: Path) -> None:
    tensors = ends() | layer(0) | {"model.experts.up_proj": torch.randn(2, 64, 64).bfloat16()}
    src = write_model(tmp_path / "src", tensors)
    cases = [
        ("int8", {}, "int8 has no twin there; convert them to a dtype"),
        ("nf4", {}, r"\[2, 64, 64\], which is no linear layer's weight"),
        ("int8_row", {"embeddings": "int8_row"}, "an embedding, which bitsandbytes keeps dense"),
        ("nf4", {"embeddings": "int8_row", "exclude": "*experts*"}, "an embedding"),
    ]
    for i, (quant_type, settings, text) in enumerate(cases):
        qkern.quantize_checkpoint(src, tmp_path / str(i), quant_type, **settings)
        with pytest.raises(qkern.FormatError, match=text):
            qkern.convert_checkpoint(tmp_path / str(i), tmp_path / "dst", "bitsandbytes")
        assert not (tmp_path / "dst").exists()
        qkern.convert_checkpoint(tmp_path / str(i), tmp_path / f"{i}-dense", "bfloat16")


# -- values ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("quant_type", "settings"), FORMATS)
def test_dense_values_are_those_of_dequantize(
    tmp_path: Path, quant_type: str, settings: dict[str, Any], dtype: str
) -> None:
    src = write_sharded(tmp_path / "src")
    qkern.quantize_checkpoint(src, tmp_path / "q", quant_type, **settings)
    qkern.convert_checkpoint(tmp_path / "q", tmp_path / "dense", dtype)
    found, kind = tensors_of(tmp_path / "dense"), getattr(torch, dtype)
    with CheckpointReader(tmp_path / "q") as reader:
        assert set(found) == set(reader.tensors)
        for name, stored in reader.tensors.items():
            tensor = reader.read(name)
            if stored.format is not None:
                tensor = qkern.dequantize(tensor, kind)
            elif tensor.dtype in (torch.bfloat16, torch.float16):
                tensor = tensor.to(kind)
            assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
            assert torch.equal(found[name], tensor), name
    assert config_of(tmp_path / "dense") == CONFIG | {"dtype": dtype}


def test_fp32_tensors_of_a_16_bit_model_stay_and_the_report_says_so(tmp_path: Path) -> None:
    src = write_sharded(tmp_path / "src")
    report = qkern.convert_checkpoint(src, tmp_path / "dst", "float16")
    assert tensors_of(tmp_path / "dst")["model.norm.weight"].dtype == torch.float32
    assert "float32 in a 16-bit model: kept" in str(report)
    fp32 = write_model(tmp_path / "fp32", {"a.weight": torch.randn(8, 8), "b": torch.ones(3)})
    qkern.convert_checkpoint(fp32, tmp_path / "cast", "bfloat16")
    assert {t.dtype for t in tensors_of(tmp_path / "cast").values()} == {torch.bfloat16}


def test_values_too_large_for_fp16_are_refused_by_name(tmp_path: Path) -> None:
    tensors = layer(0)
    tensors["model.layers.0.mlp.down_proj.weight"][3, 5] = 1e6
    src = write_model(tmp_path / "src", tensors)
    qkern.quantize_checkpoint(src, tmp_path / "q")
    for source in (src, tmp_path / "q"):
        with pytest.raises(qkern.NonFiniteError, match=r"down_proj\.weight.* float16"):
            qkern.convert_checkpoint(source, tmp_path / "dst", "float16")
        assert not (tmp_path / "dst").exists()
        qkern.convert_checkpoint(source, tmp_path / f"{source.name}-b", "bfloat16")


def test_tied_tensors_stay_tied(tmp_path: Path) -> None:
    tied = model(tie_word_embeddings=True)
    qkern.quantize_model(tied)
    qkern.save(tied, tmp_path / "q")
    qkern.convert_checkpoint(tmp_path / "q", tmp_path / "dense", "bfloat16")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert opened.lm_head.weight is opened.model.embed_tokens.weight
    ids = token_ids()
    torch.testing.assert_close(opened(ids).logits, tied(ids).logits, rtol=0.05, atol=0.05)


def test_layers_that_share_codes_go_on_sharing_them(tmp_path: Path) -> None:
    shared = model()
    shared.model.layers[1].mlp = shared.model.layers[0].mlp
    qkern.quantize_model(shared, "nf4")
    qkern.save(shared, tmp_path / "q")
    qkern.convert_checkpoint(tmp_path / "q", tmp_path / "again", "qkern")
    before, after = read_tensors(tmp_path / "q"), read_tensors(tmp_path / "again")
    assert set(before) == set(after)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    qkern.convert_checkpoint(tmp_path / "q", tmp_path / "dense", "bfloat16")
    dense = read_tensors(tmp_path / "dense")
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)]
    assert dense[names[0]].data_ptr() == dense[names[1]].data_ptr()


def test_nested_configurations_get_the_dtype_too(tmp_path: Path) -> None:
    config = {"text_config": {"dtype": "bfloat16", "hidden_size": 64}, "torch_dtype": "bfloat16"}
    src = write_model(tmp_path / "src", layer(0), config=config)
    qkern.convert_checkpoint(src, tmp_path / "dst", "float32")
    found = config_of(tmp_path / "dst")
    assert (found["dtype"], found["torch_dtype"]) == ("float32", "float32")
    assert found["text_config"] == {"dtype": "float32", "hidden_size": 64}


# -- settings and runs -----------------------------------------------------------------------


def test_a_dense_source_needs_a_format(tmp_path: Path) -> None:
    src = write_sharded(tmp_path / "src")
    with pytest.raises(qkern.FormatError, match="is dense: name the format"):
        qkern.convert_checkpoint(src, tmp_path / "dst", "qkern")
    with pytest.raises(qkern.FormatError, match="int8 has no twin in bitsandbytes"):
        qkern.convert_checkpoint(src, tmp_path / "dst", "bitsandbytes", quant_type="int8")
    report = qkern.convert_checkpoint(src, tmp_path / "dst", "qkern", quant_type="nf4")
    assert isinstance(report, QuantizationReport)
    qkern.quantize_checkpoint(src, tmp_path / "same")
    assert tree(tmp_path / "dst") == tree(tmp_path / "same")
    for to in ("qkern", "float32"):
        with pytest.raises(qkern.FormatError, match="a format is for dense sources"):
            qkern.convert_checkpoint(tmp_path / "dst", tmp_path / "no", to, quant_type="fp4")
    with pytest.raises(qkern.FormatError, match="unknown to 'gguf': allowed are 'qkern'"):
        qkern.convert_checkpoint(src, tmp_path / "no", "gguf")


def test_other_methods_are_refused_by_name(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    src = write_model(tmp_path / "src", layer(0), config=config)
    with pytest.raises(qkern.FormatError, match="quantized by 'gptq'"):
        qkern.convert_checkpoint(src, tmp_path / "dst", "bfloat16")


def test_a_run_that_was_interrupted_goes_on(tmp_path: Path) -> None:
    src, dst = write_sharded(tmp_path / "src"), tmp_path / "dst"
    qkern.quantize_checkpoint(src, tmp_path / "q")
    qkern.convert_checkpoint(tmp_path / "q", tmp_path / "whole", "bfloat16")

    class Stop(Exception):  # noqa: N818
        pass

    def stop(_done: int, _total: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        qkern.convert_checkpoint(tmp_path / "q", dst, "bfloat16", threads=1, progress=stop)
    with pytest.raises(qkern.OutputError, match='settings: to: "bfloat16" then, "float32" now'):
        qkern.convert_checkpoint(tmp_path / "q", dst, "float32")
    qkern.convert_checkpoint(tmp_path / "q", dst, "bfloat16")
    assert tree(dst) == tree(tmp_path / "whole")


def test_a_dry_run_writes_nothing_and_says_the_same(tmp_path: Path) -> None:
    src = write_sharded(tmp_path / "src")
    qkern.quantize_checkpoint(src, tmp_path / "q")
    planned = qkern.convert_checkpoint(tmp_path / "q", tmp_path / "dst", "float32", dry_run=True)
    assert not (tmp_path / "dst").exists()
    assert "nothing was written: 6 files would be" in str(planned)
    written = qkern.convert_checkpoint(tmp_path / "q", tmp_path / "dst", "float32")
    assert planned.tensors == written.tensors
    assert set(planned.files) == set(tree(tmp_path / "dst"))
    assert isinstance(written, ConversionReport)
    sizes = {row.name: row.nbytes for row in written.tensors}
    assert sizes == {name: t.nbytes for name, t in tensors_of(tmp_path / "dst").items()}


def test_a_single_file_is_converted_by_itself(tmp_path: Path) -> None:
    src = write_model(tmp_path / "src", layer(0))
    file = src / "model.safetensors"
    qkern.convert_checkpoint(file, tmp_path / "dst", "float32")
    assert set(tree(tmp_path / "dst")) == {"model.safetensors"}
    loaded = load_file(tmp_path / "dst" / "model.safetensors")
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}
