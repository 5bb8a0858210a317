"""Experts in files: stacked or one by one, NF4 or MXFP4; and Conv1D, which is stored transposed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, output
from checkpoints import write
from peft_adapters import tensors_of
from safetensors.torch import save_file
from torch import Tensor, nn

import qkern
from qkern.errors import CorruptFileError
from qkern.experts import QuantizedExperts
from qkern.formats import E2M1
from qkern.tensor import QuantizedTensor

BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}
MOE = ["Mixtral", "Qwen3-MoE", "gpt-oss"]


def written(name: str, path: Path) -> nn.Module:
    """A dense model, and its files as transformers writes them."""
    model = BY_NAME[name].small()
    model.save_pretrained(path)
    return model


def experts_of(model: nn.Module) -> nn.Module:
    return model.model.layers[1].mlp.experts  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", [*MOE, "GPT-2"])
def test_a_dense_checkpoint_is_quantized_on_the_way_to_the_same_bytes(
    name: str, tmp_path: Path
) -> None:
    model = written(name, tmp_path)
    loaded = qkern.load(tmp_path, quant_type="nf4", dtype=torch.float32)
    qkern.quantize_model(model)
    expected, found = model.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    with torch.no_grad():
        assert torch.equal(output(loaded), output(model))


@pytest.mark.parametrize("name", MOE)
def test_a_checkpoint_that_was_quantized_from_file_to_file_runs(name: str, tmp_path: Path) -> None:
    model = written(name, tmp_path / "dense")
    qkern.quantize_checkpoint(tmp_path / "dense", tmp_path / "q", "nf4")
    loaded = qkern.load(tmp_path / "q")
    assert isinstance(experts_of(loaded), QuantizedExperts)
    dense, found = experts_of(model), experts_of(loaded)
    for key in ("gate_up_proj", "down_proj"):
        values, weight = getattr(dense, key), getattr(found, key)
        if name == "gpt-oss":  # one tensor in the file
            assert torch.equal(weight.packed, qkern.quantize(values.detach()).packed)
        else:  # gate, up and down of each expert, with second-level scales of their own
            rows = 2 if key == "gate_up_proj" else 1
            alone = [
                torch.cat([qkern.quantize(p).dequantize() for p in e.chunk(rows)])
                for e in values.detach()
            ]
            assert torch.equal(weight.dequantize(), torch.stack(alone))
    with torch.no_grad():
        assert (output(loaded) - output(model)).norm() < 0.4 * output(model).norm()
        expected = output(loaded)
        qkern.save(loaded, tmp_path / "again")
        assert torch.equal(output(qkern.load(tmp_path / "again")), expected)


def mxfp4(count: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Random codes (count, rows, columns / 32, 16) and scales."""
    blocks = (count, rows, columns // 32)
    codes = torch.randint(0, 256, (*blocks, 16), dtype=torch.uint8)
    return codes, torch.randint(118, 123, blocks, dtype=torch.uint8)


def values_of(codes: Tensor, scales: Tensor) -> Tensor:
    """The weights, (count, rows, columns)."""
    index = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
    return (torch.tensor(E2M1)[index.int()] * torch.exp2(scales.float() - 127)[..., None]).flatten(
        -2
    )


def test_mxfp4_experts_of_gpt_oss_are_multiplied_as_they_are_stored(tmp_path: Path) -> None:
    """(experts, out, in), which its class holds as (experts, in, out): square ones too."""
    architecture = BY_NAME["gpt-oss"]
    model = type(architecture)(
        **vars(architecture) | {"sizes": architecture.sizes | {"intermediate_size": 64}}
    ).small()
    model.save_pretrained(tmp_path / "src")
    tensors = {}
    for key, tensor in model.state_dict().items():
        if key.endswith(("gate_up_proj", "down_proj")):
            count, columns, rows = tensor.shape
            codes, scales = mxfp4(count, rows, columns)
            tensors |= {f"{key}_blocks": codes, f"{key}_scales": scales}
            model.get_parameter(key).data = values_of(codes, scales).mT.contiguous()
        else:
            tensors[key] = tensor
    write(tmp_path / "src", tensors)
    config = json.loads((tmp_path / "src" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "src" / "config.json").write_text(json.dumps(config))
    qkern.convert_checkpoint(tmp_path / "src", tmp_path / "q", "qkern")
    loaded = qkern.load(tmp_path / "q")
    weight = experts_of(loaded).down_proj
    assert isinstance(weight, QuantizedTensor)
    assert weight.format.quant_type == "mxfp4"
    with torch.no_grad():
        right = output(model)
        assert (output(loaded) - right).norm() < 2e-6 * right.norm()
    qkern.save(loaded, tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(output(qkern.load(tmp_path / "again")), output(loaded))


def test_files_that_lack_an_expert_are_refused(tmp_path: Path) -> None:
    written("Qwen3-MoE", tmp_path)
    tensors = tensors_of(tmp_path)
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    message = r"layers\.1\.mlp\.experts\.gate_up_proj: the file lacks part 1 of expert 3"
    with pytest.raises(CorruptFileError, match=message):
        qkern.load(tmp_path, quant_type="nf4")


def test_experts_that_cannot_be_stacked_are_refused_with_what_was_found(tmp_path: Path) -> None:
    written("Qwen3-MoE", tmp_path / "dense")
    qkern.quantize_checkpoint(tmp_path / "dense", tmp_path / "q", "int8_row")
    with pytest.raises(CorruptFileError, match=r"is to be stacked of int8_row \(64, 64\)"):
        qkern.load(tmp_path / "q")
    qkern.quantize_checkpoint(
        tmp_path / "dense", tmp_path / "some", "nf4", exclude="*.experts.2.down_proj.weight"
    )
    with pytest.raises(CorruptFileError, match="some of its experts quantized and others dense"):
        qkern.load(tmp_path / "some")


def test_conv1d_that_says_its_shape_is_read_and_one_that_does_not_is_refused(
    tmp_path: Path,
) -> None:
    """What this package writes is (out, in); what knows nothing of the model may be otherwise."""
    model = written("GPT-2", tmp_path / "dense")
    config = tmp_path / "dense" / "config.json"
    known = config.read_text()
    config.write_text(known.replace('"gpt2"', '"unknown"'))
    for kind, exclude, message in (
        ("all", (), r"holds \(64, 192\), \(192, 64\) needed"),
        ("square", ("c_attn", "c_fc", "mlp.c_proj"), "nothing says whether it is transposed"),
    ):
        qkern.quantize_checkpoint(tmp_path / "dense", tmp_path / kind, exclude=exclude)
        written_config = tmp_path / kind / "config.json"
        written_config.write_text(written_config.read_text().replace('"unknown"', '"gpt2"'))
        with pytest.raises(CorruptFileError, match=message):
            qkern.load(tmp_path / kind)
    config.write_text(known)
    qkern.quantize_model(model)
    qkern.save(model, tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(output(qkern.load(tmp_path / "ours")), output(model))
    qkern.convert_checkpoint(tmp_path / "ours", tmp_path / "again", "float32")
    loaded = qkern.load(tmp_path / "again", quant_type="nf4")
    with torch.no_grad():
        assert (output(loaded) - output(model)).norm() < 0.1 * output(model).norm()
