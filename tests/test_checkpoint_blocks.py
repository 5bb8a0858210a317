"""MXFP4 and NVFP4 as other programs store them: carried without loss, or as their exact values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write
from peft_adapters import tensors_of
from torch import Tensor
from toys import token_ids
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM, Mxfp4Config
from transformers.integrations.mxfp4 import FP4_VALUES, convert_moe_packed_tensors

import qkern
from qkern.checkpoint.conversion_report import ConversionReport
from qkern.checkpoint.reader import CheckpointReader
from qkern.formats import E2M1, QuantFormat

MXFP4 = QuantFormat("mxfp4", 32)


def random_bytes(*shape: int, low: int = 0, high: int = 256) -> Tensor:
    return torch.randint(low, high, shape, dtype=torch.uint8)


def write_model(path: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    write(path, tensors)
    (path / "config.json").write_text(json.dumps({"dtype": "bfloat16"} | config))
    return path


def experts(blocks: tuple[int, ...], name: str = "model.layers.0.mlp.experts") -> dict[str, Tensor]:
    """One stacked weight, its bias and a norm."""
    return {
        f"{name}.up_proj_blocks": random_bytes(*blocks, 16),
        f"{name}.up_proj_scales": random_bytes(*blocks, low=110, high=140),
        f"{name}.up_proj_bias": torch.randn(*blocks[:2]).bfloat16(),
        "model.norm.weight": torch.ones(5),
    }


MX_CONFIG: dict[str, Any] = {
    "model_type": "gpt_oss",
    "quantization_config": {"quant_method": "mxfp4"},
}


def values_of(packed: Tensor) -> Tensor:
    """E2M1 values in fp32, the low half of a byte first."""
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    return torch.tensor(E2M1)[codes.int()]


def test_the_table_is_transformers() -> None:
    assert str(E2M1) == str(tuple(FP4_VALUES))  # the sign of zero too


# -- MXFP4 -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_stacked_mxfp4_is_what_transformers_dequantizes(tmp_path: Path, dtype: str) -> None:
    """More than one chunk of values, and rows that fill no cache line."""
    tensors = experts((3, 333, 9))
    blocks, scales = (
        tensors[f"model.layers.0.mlp.experts.up_proj_{k}"] for k in ("blocks", "scales")
    )
    src = write_model(tmp_path / "src", tensors, **MX_CONFIG)
    report = qkern.convert_checkpoint(src, tmp_path / "dst", dtype)
    found = tensors_of(tmp_path / "dst")
    kind = getattr(torch, dtype)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=kind)
    weight = found["model.layers.0.mlp.experts.up_proj"]
    assert (weight.dtype, weight.shape) == (kind, (3, 288, 333))
    assert torch.equal(weight.view(torch.uint8), expected.view(torch.uint8))
    assert set(found) == {key for key in tensors if not key.endswith(("_blocks", "_scales"))} | {
        "model.layers.0.mlp.experts.up_proj"
    }
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert config == {"dtype": dtype, "model_type": "gpt_oss"}
    assert isinstance(report, ConversionReport)
    actions = {row.name: (row.action, row.stored_as) for row in report.tensors}
    assert actions["model.layers.0.mlp.experts.up_proj"] == ("dequantized", "mxfp4")
    assert report.nbytes == sum(t.nbytes for t in found.values())


def test_mxfp4_is_carried_without_loss(tmp_path: Path) -> None:
    tensors = experts((2, 65, 4))
    name = "model.layers.0.mlp.experts.up_proj"
    src = write_model(tmp_path / "src", tensors, **MX_CONFIG)
    qkern.convert_checkpoint(src, tmp_path / "q", "qkern")
    with CheckpointReader(tmp_path / "q") as reader:
        q = reader.read(name)
        assert isinstance(q, qkern.QuantizedTensor)
        assert (q.format, tuple(q.shape)) == (MXFP4, (2, 65, 128))
        blocks, scales = tensors[f"{name}_blocks"], tensors[f"{name}_scales"]
        exact = values_of(blocks) * torch.exp2(scales.float() - 127)[..., None]
        assert torch.equal(qkern.dequantize(q, torch.float32), exact.reshape(2, 65, 128))
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert config["quantization_config"]["quant_type"] == "mxfp4"
    again = qkern.convert_checkpoint(tmp_path / "q", tmp_path / "again", "qkern")
    assert {row.action for row in again.tensors} == {"copied", "codes copied"}
    # By way of qkern or at once: the same dense values, as transformers holds them.
    qkern.convert_checkpoint(src, tmp_path / "direct", "bfloat16")
    qkern.convert_checkpoint(tmp_path / "q", tmp_path / "by-way", "bfloat16")
    direct, by_way = tensors_of(tmp_path / "direct"), tensors_of(tmp_path / "by-way")
    assert set(direct) == set(by_way)
    assert all(torch.equal(direct[key], by_way[key]) for key in direct)
    with pytest.raises(qkern.FormatError, match="mxfp4 has no twin there"):
        qkern.convert_checkpoint(src, tmp_path / "no", "bitsandbytes")
    with pytest.raises(qkern.FormatError, match="mxfp4 has no twin there"):
        qkern.convert_checkpoint(tmp_path / "q", tmp_path / "no", "bitsandbytes")


def test_the_smallest_and_largest_scales_are_exact(tmp_path: Path) -> None:
    tensors = experts((1, 3, 2))
    name = "model.layers.0.mlp.experts.up_proj"
    tensors[f"{name}_scales"] = torch.tensor([[[0, 1], [2, 127], [251, 252]]], dtype=torch.uint8)
    src = write_model(tmp_path / "src", tensors, **MX_CONFIG)
    qkern.convert_checkpoint(src, tmp_path / "dst", "bfloat16")
    scales = torch.exp2(tensors[f"{name}_scales"].double() - 127)
    exact = values_of(tensors[f"{name}_blocks"]).double() * scales[..., None]
    found = tensors_of(tmp_path / "dst")[name].double()
    assert torch.equal(found, exact.reshape(1, 3, 64).transpose(1, 2))


def test_a_tiny_gpt_oss_gives_the_same_logits(tmp_path: Path) -> None:
    config = GptOssConfig(
        num_hidden_layers=1,
        num_local_experts=4,
        vocab_size=96,
        hidden_size=64,
        intermediate_size=64,
        head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts_per_tok=2,
        layer_types=["full_attention"],
    )
    torch.manual_seed(0)
    dense = GptOssForCausalLM(config).bfloat16()
    tensors = {}
    for key, tensor in dense.state_dict().items():
        if key.endswith(("gate_up_proj", "down_proj")):
            count, columns, rows = tensor.shape
            tensors[f"{key}_blocks"] = random_bytes(count, rows, columns // 32, 16)
            tensors[f"{key}_scales"] = random_bytes(count, rows, columns // 32, low=118, high=122)
        else:
            tensors[key] = tensor
    src = tmp_path / "src"
    dense.save_pretrained(src)
    write(src, tensors)
    content = json.loads((src / "config.json").read_text())
    content["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["lm_head"],
    }
    (src / "config.json").write_text(json.dumps(content))
    qkern.convert_checkpoint(src, tmp_path / "dst", "bfloat16")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "dst")
    theirs = AutoModelForCausalLM.from_pretrained(
        src, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16
    )
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], tensor), key
    ids = token_ids()
    assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_mxfp4_of_compressed_tensors_is_carried_too(tmp_path: Path) -> None:
    packed, scales = random_bytes(48, 64), random_bytes(48, 4, low=120, high=130)
    tensors = {"a.weight_packed": packed, "a.weight_scale": scales}
    config = {"quantization_config": {"quant_method": "compressed-tensors"}}
    src = write_model(tmp_path / "src", tensors, **config)
    exact = values_of(packed).reshape(48, 4, 32) * torch.exp2(scales.float() - 127)[..., None]
    qkern.convert_checkpoint(src, tmp_path / "q", "qkern")
    with CheckpointReader(tmp_path / "q") as reader:
        q = reader.read("a.weight")
    qkern.convert_checkpoint(src, tmp_path / "dst", "float32")
    assert torch.equal(qkern.dequantize(q, torch.float32), exact.reshape(48, 128))
    assert torch.equal(tensors_of(tmp_path / "dst")["a.weight"], exact.reshape(48, 128))


# -- NVFP4 -----------------------------------------------------------------------------------


def nvfp4(by: str) -> tuple[dict[str, Tensor], Tensor]:
    """A weight as it is stored, and its exact values by its writer's own formula in fp32."""
    packed = random_bytes(48, 64)
    scales = (torch.rand(48, 8) * 400 + 0.01).to(torch.float8_e4m3fn)
    values = values_of(packed).reshape(48, 8, 16)
    if by == "modelopt":
        factor = torch.tensor(0.00123)
        tensors = {
            "a.weight": packed,
            "a.weight_scale": scales,
            "a.weight_scale_2": factor,
            "a.input_scale": torch.tensor(0.5),
        }
        combined = scales.float() * factor
    else:
        divisor = torch.tensor([813.7])
        tensors = {
            "a.weight_packed": packed,
            "a.weight_scale": scales,
            "a.weight_global_scale": divisor,
            "a.input_global_scale": torch.tensor([3.0]),
        }
        combined = scales.float() / divisor
    return tensors, (values * combined[..., None]).reshape(48, 128)


@pytest.mark.parametrize("by", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_nvfp4_becomes_its_dense_values(tmp_path: Path, by: str, dtype: str) -> None:
    tensors, exact = nvfp4(by)
    tensors["b.weight"] = torch.randn(4, 4).bfloat16()
    src = write_model(tmp_path / "src", tensors, quantization_config={"quant_method": by})
    (src / "hf_quant_config.json").write_text("{}")
    report = qkern.convert_checkpoint(src, tmp_path / "dst", dtype)
    found = tensors_of(tmp_path / "dst")
    assert set(found) == {"a.weight", "b.weight"}
    assert torch.equal(found["a.weight"], exact.to(getattr(torch, dtype)))
    assert "hf_quant_config.json" in report.left_out
    assert "a scale of activations" in str(report)
    with pytest.raises(qkern.FormatError, match="nvfp4: its scales are products"):
        qkern.convert_checkpoint(src, tmp_path / "no", "qkern")


# -- what is refused -------------------------------------------------------------------------


def test_codes_and_scales_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.up_proj"

    def refused(tensors: dict[str, Tensor], text: str, error: Any = qkern.CorruptFileError) -> None:
        src = write_model(tmp_path / "src", tensors, quantization_config={"quant_method": "mxfp4"})
        with pytest.raises(error, match=text):
            qkern.convert_checkpoint(src, tmp_path / "dst", "bfloat16")
        assert not (tmp_path / "dst").exists()

    good = experts((2, 8, 2))
    refused(good | {f"{name}_scales": random_bytes(2, 8, 3)}, "do not fit each other")
    refused(good | {f"{name}_blocks": random_bytes(2, 8, 2, 8)}, "do not fit each other")
    refused(good | {f"{name}_scales": torch.ones(2, 8, 2)}, "do not fit each other")
    packed = {"a.weight_packed": random_bytes(4, 64)}
    refused(good | packed, "codes without scales")
    scale = {"a.weight_scale": torch.ones(4, 8).to(torch.float8_e4m3fn)}
    refused(packed | scale, "has no a.weight_global_scale")
    refused(packed | scale | {"a.weight_global_scale": torch.zeros(1)}, "a scale is positive")
    other = {"b.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)}
    refused(good | other, "neither MXFP4 nor NVFP4", qkern.FormatError)


def test_nothing_is_quantized_to_mxfp4(tmp_path: Path) -> None:
    dense = write_model(tmp_path / "dense", {"a.weight": torch.randn(64, 64)})
    calls = [
        lambda: qkern.quantize(torch.randn(4, 32), "mxfp4"),
        lambda: qkern.quantize(torch.randn(4, 32).numpy(), MXFP4),
        lambda: qkern.quantize_checkpoint(dense, tmp_path / "dst", "mxfp4"),
        lambda: qkern.quantize_model(torch.nn.Linear(32, 4), MXFP4),
    ]
    for call in calls:
        with pytest.raises(qkern.FormatError, match="nothing is quantized to mxfp4"):
            call()


def test_a_carried_weight_multiplies_as_its_dense_values_do(tmp_path: Path) -> None:
    packed, scales = random_bytes(96, 64), random_bytes(96, 4, low=120, high=126)
    tensors = {"a.weight_packed": packed, "a.weight_scale": scales}
    config = {"quantization_config": {"quant_method": "compressed-tensors"}}
    qkern.convert_checkpoint(
        write_model(tmp_path / "src", tensors, **config), tmp_path / "q", "qkern"
    )
    with CheckpointReader(tmp_path / "q") as reader:
        q = reader.read("a.weight")
    for tokens in (1, 3, 40):
        x = torch.randn(tokens, 128)
        expected = x @ qkern.dequantize(q, torch.float32).T
        torch.testing.assert_close(qkern.linear(x, q), expected, rtol=1e-5, atol=1e-5)
