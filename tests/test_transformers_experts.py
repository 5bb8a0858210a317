"""transformers and qkern's other modules: stacked experts, Conv1D, embeddings in int8 rows."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, output
from peft_adapters import tensors_of
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import qkern
from qkern.embeddings import QuantizedEmbedding
from qkern.experts import QuantizedExperts
from qkern.integrations.transformers import QkernConfig, model_config
from qkern.tensor import QuantizedTensor

pytestmark = pytest.mark.usefixtures("without_gpu")
BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}
MOE = ["Mixtral", "Qwen3-MoE", "gpt-oss"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Dense directories as transformers writes them, experts one by one, in several shards."""
    made: dict[str, Path] = {}

    def write(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("dense")
            BY_NAME[name].small().save_pretrained(made[name], max_shard_size="100KB")
        return made[name]

    return write


def load(name: str, path: Path, **settings: Any) -> Any:
    return getattr(transformers, BY_NAME[name].model).from_pretrained(path, **settings).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return output(model)


def assert_same(model: nn.Module, other: nn.Module) -> None:
    found, expected = model.state_dict(), other.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert torch.equal(logits(model), logits(other))


def quantized(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if isinstance(p, QuantizedTensor)}


def method_of(path: Path) -> str:
    content = json.loads((path / "config.json").read_text())
    return str(content["quantization_config"]["quant_method"])


# -- from dense weights ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "quant_type"), [*((name, "nf4") for name in (*MOE, "GPT-2")), ("gpt-oss", "int8")]
)
def test_bytes_and_coverage_are_those_of_quantize_model(
    name: str, quant_type: str, written: Any, tmp_path: Path
) -> None:
    model = load(name, written(name), quantization_config=QkernConfig(quant_type))
    expected = load(name, written(name))
    report = qkern.quantize_model(expected, quant_type)
    assert str(model.hf_quantizer.coverage) == str(report)
    assert model.hf_quantizer.coverage.rows == report.rows
    assert_same(model, expected)
    for i in range(2):
        model.save_pretrained(tmp_path / str(i), max_shard_size="50KB")
        model = load(name, tmp_path / str(i))
        assert_same(model, expected)
    assert_same(qkern.load(tmp_path / "1"), expected)


@pytest.mark.parametrize("name", [*MOE, "GPT-2"])
def test_a_dequantized_model_is_that_of_the_same_values(
    name: str, written: Any, tmp_path: Path
) -> None:
    quantized_model = load(name, written(name), quantization_config=QkernConfig())
    expected = logits(quantized_model)
    quantized_model.save_pretrained(tmp_path / "q")
    for i, model in enumerate((quantized_model, load(name, tmp_path / "q"))):
        dense = model.dequantize()
        assert not quantized(dense)
        assert not any(isinstance(module, QuantizedExperts) for module in dense.modules())
        assert not any(isinstance(module, qkern.QuantizedLinear) for module in dense.modules())
        like = load(name, written(name))
        assert {n: type(m) for n, m in dense.named_modules()} == {
            n: type(m) for n, m in like.named_modules()
        }
        found = logits(dense)
        assert (found - expected).norm() < 2e-6 * expected.norm()
        dense.save_pretrained(tmp_path / str(i))
        # Mapped from a file, a weight lies at any byte, which products see in their last bit.
        again = copy.deepcopy(load(name, tmp_path / str(i)))
        assert torch.equal(logits(again), found)
    # Files of a model that was dense are named as those that it came from.
    names = tensors_of(tmp_path / "0").keys()
    assert names == {k for f in written(name).glob("*.safetensors") for k in tensors_of_file(f)}


def tensors_of_file(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return list(opened.keys())


@pytest.mark.parametrize(
    "pattern", ["model.layers.1.mlp.experts", "layers.1.mlp.experts.down_proj"]
)
@pytest.mark.parametrize("name", ["Mixtral", "gpt-oss"])
def test_experts_of_some_layers_can_stay_dense(
    name: str, pattern: str, written: Any, tmp_path: Path
) -> None:
    config = QkernConfig(modules_to_not_convert=[pattern])
    model = load(name, written(name), quantization_config=config)
    rows = {row.name: row for row in model.hf_quantizer.coverage.rows}
    for layer, status in ((0, "nf4"), (1, "dense")):
        for parameter in ("gate_up_proj", "down_proj"):
            assert rows[f"model.layers.{layer}.mlp.experts.{parameter}"].status == status
    reason = rows["model.layers.1.mlp.experts.down_proj"].reason
    assert reason == f"modules_to_not_convert has {pattern!r}"
    expected = load(name, written(name))
    qkern.quantize_model(expected, exclude="layers.1.mlp.experts")
    assert_same(model, expected)
    model.save_pretrained(tmp_path)
    assert_same(load(name, tmp_path), expected)


def test_experts_stay_dense_where_they_cannot_be_quantized_and_say_why(written: Any) -> None:
    for config, reason in (
        (QkernConfig(save_as="bitsandbytes"), "which has no stacked experts"),
        (QkernConfig("int8_row"), "keys for parameters named weight alone"),
        (QkernConfig(blocksize=4096), "blocks would straddle experts"),
    ):
        model = load("Mixtral", written("Mixtral"), quantization_config=config)
        rows = {row.name: row for row in model.hf_quantizer.coverage.rows}
        assert reason in rows["model.layers.0.mlp.experts.down_proj"].reason
        assert len(quantized(model)) == 8
        assert torch.isfinite(logits(model)).all()


def test_models_with_dense_experts_are_written_for_bitsandbytes(
    written: Any, tmp_path: Path
) -> None:
    config = QkernConfig(save_as="bitsandbytes")
    model = load("Mixtral", written("Mixtral"), quantization_config=config)
    model.save_pretrained(tmp_path)
    assert method_of(tmp_path) == "bitsandbytes"
    assert_same(load("Mixtral", tmp_path, config=model_config(tmp_path)), model)


def test_errors_name_the_experts(written: Any, tmp_path: Path) -> None:
    tensors = tensors_of(written("Qwen3-MoE"))
    (tmp_path / "config.json").write_text((written("Qwen3-MoE") / "config.json").read_text())
    key = "model.layers.1.mlp.experts.3.up_proj.weight"
    tensors[key][2, 3] = torch.inf
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(qkern.NonFiniteError, match=r"layers\.1\.mlp\.experts\.gate_up_proj: "):
        load("Qwen3-MoE", tmp_path, quantization_config=QkernConfig())


# -- quantized files -------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*MOE, "GPT-2"])
def test_directories_of_qkern_save_open(name: str, written: Any, tmp_path: Path) -> None:
    model = load(name, written(name))
    qkern.quantize_model(model)
    qkern.save(model, tmp_path / "q")
    opened = load(name, tmp_path / "q", config=model_config(tmp_path / "q"))
    assert_same(opened, model)
    opened.save_pretrained(tmp_path / "again")
    assert_same(load(name, tmp_path / "again", config=model_config(tmp_path / "again")), model)


@pytest.mark.parametrize(
    ("name", "double_quant"), [*((name, True) for name in MOE), ("Mixtral", False)]
)
def test_experts_that_were_quantized_one_by_one_open(
    name: str, double_quant: bool, written: Any, tmp_path: Path
) -> None:
    qkern.quantize_checkpoint(written(name), tmp_path / "q", "nf4", double_quant=double_quant)
    model = load(name, tmp_path / "q", config=model_config(tmp_path / "q"))
    assert isinstance(model.model.layers[0].mlp.experts, QuantizedExperts)
    assert_same(model, qkern.load(tmp_path / "q"))
    model.save_pretrained(tmp_path / "again")
    assert method_of(tmp_path / "again") == "qkern"
    assert_same(load(name, tmp_path / "again"), model)
    dense = load(name, tmp_path / "again").dequantize()
    assert (logits(dense) - logits(model)).norm() < 2e-6 * logits(model).norm()


def test_a_base_model_opens_from_experts_one_by_one(written: Any, tmp_path: Path) -> None:
    qkern.quantize_checkpoint(written("Mixtral"), tmp_path / "q", "nf4")
    whole = qkern.load(tmp_path / "q")
    base = transformers.AutoModel.from_pretrained(
        tmp_path / "q", config=model_config(tmp_path / "q")
    ).eval()
    x = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(base(x)[0], whole.model(x)[0])
    base.save_pretrained(tmp_path / "base")
    again = load("Mixtral", tmp_path / "base")  # its head is new
    with torch.no_grad():
        assert torch.equal(again.model(x)[0], whole.model(x)[0])


def test_experts_of_some_layers_can_be_dense_in_the_files(written: Any, tmp_path: Path) -> None:
    qkern.quantize_checkpoint(written("Qwen3-MoE"), tmp_path, exclude="*.layers.1.mlp.experts.*")
    model = load("Qwen3-MoE", tmp_path, config=model_config(tmp_path))
    kinds = [isinstance(layer.mlp.experts, QuantizedExperts) for layer in model.model.layers]
    assert kinds == [True, False]
    assert_same(model, qkern.load(tmp_path))


def test_experts_that_cannot_be_stacked_are_refused(written: Any, tmp_path: Path) -> None:
    for i, (settings, message) in enumerate(
        (
            ({"exclude": "*.experts.2.down_proj.weight"}, "some of its experts quantized and"),
            ({"quant_type": "int8_row"}, r"is to be stacked of int8_row \(64, 64\)"),
        )
    ):
        path = tmp_path / str(i)
        qkern.quantize_checkpoint(written("Qwen3-MoE"), path, **settings)
        with pytest.raises(qkern.CorruptFileError, match=message):
            load("Qwen3-MoE", path, config=model_config(path))


def test_files_that_lack_an_expert_are_refused(written: Any, tmp_path: Path) -> None:
    qkern.quantize_checkpoint(written("Qwen3-MoE"), tmp_path, "nf4")
    key = "model.layers.1.mlp.experts.3.up_proj.weight"
    tensors = {k: t for k, t in tensors_of(tmp_path).items() if not k.startswith(key)}
    for file in tmp_path.glob("model*.safetensors*"):
        file.unlink()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    message = r"layers\.1\.mlp\.experts\.gate_up_proj: the file lacks part 1 of expert 3"
    with pytest.raises(qkern.CorruptFileError, match=message):
        load("Qwen3-MoE", tmp_path, config=model_config(tmp_path))


def test_a_dense_conv1d_stays_one_beside_quantized_ones(written: Any, tmp_path: Path) -> None:
    config = QkernConfig(modules_to_not_convert=["attn.c_proj"], save_as="bitsandbytes")
    model = load("GPT-2", written("GPT-2"), quantization_config=config)
    assert type(model.transformer.h[0].attn.c_proj) is Conv1D
    assert len(quantized(model)) == 6
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert "transformer.h.0.attn.c_proj" in content["llm_int8_skip_modules"]
    assert_same(load("GPT-2", tmp_path, config=model_config(tmp_path)), model)


def test_mxfp4_experts_open_as_they_are_stored(written: Any, tmp_path: Path) -> None:
    """(experts, out, in), which the class of gpt-oss holds as (experts, in, out)."""
    source, tensors = tmp_path / "src", {}
    source.mkdir()
    for key, tensor in tensors_of(written("gpt-oss")).items():
        if not key.endswith(("gate_up_proj", "down_proj")):
            tensors[key] = tensor
            continue
        count, columns, rows = tensor.shape
        blocks = (count, rows, columns // 32)
        tensors[f"{key}_blocks"] = torch.randint(0, 256, (*blocks, 16), dtype=torch.uint8)
        tensors[f"{key}_scales"] = torch.randint(118, 123, blocks, dtype=torch.uint8)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    config = json.loads((written("gpt-oss") / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (source / "config.json").write_text(json.dumps(config))
    qkern.convert_checkpoint(source, tmp_path / "q", "qkern")
    model = load("gpt-oss", tmp_path / "q", config=model_config(tmp_path / "q"))
    assert model.model.layers[1].mlp.experts.down_proj.format.quant_type == "mxfp4"
    assert_same(model, qkern.load(tmp_path / "q"))
    model.save_pretrained(tmp_path / "again")
    again = load("gpt-oss", tmp_path / "again")
    assert_same(again, model)
    dense = again.dequantize()
    assert (logits(dense) - logits(model)).norm() < 2e-6 * logits(model).norm()
    settings = {"quant_method": "qkern", "quant_type": "mxfp4", "blocksize": 32}
    with pytest.raises(qkern.FormatError, match="nothing is quantized to mxfp4"):
        load("gpt-oss", written("gpt-oss"), quantization_config=settings)


# A head of its own; a tied one and an embedding that scales; one that shifts; three tied ones.
@pytest.mark.parametrize(
    ("name", "quant_type"),
    [*((name, "nf4") for name in ("Llama", "Gemma 3", "OPT", "T5")), ("Gemma 3", "int8_row")],
)
def test_embeddings_and_heads_in_int8_rows_open(
    name: str, quant_type: str, written: Any, tmp_path: Path
) -> None:
    qkern.quantize_checkpoint(written(name), tmp_path / "q", quant_type, embeddings="int8_row")
    model = load(name, tmp_path / "q", config=model_config(tmp_path / "q"))
    expected = qkern.load(tmp_path / "q")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, QuantizedEmbedding)
    assert isinstance(head, qkern.QuantizedLinear)
    tied = model.config.tie_word_embeddings
    assert (head.weight is embedding.weight) is tied
    assert torch.equal(logits(model), logits(expected))
    qkern.save(model, tmp_path / "0")
    for i in range(2):
        model, info = type(model).from_pretrained(
            tmp_path / str(i), config=model_config(tmp_path / str(i)), output_loading_info=True
        )
        assert torch.equal(logits(model.eval()), logits(expected))
        assert not info["unexpected_keys"]
        assert not info["missing_keys"]
        model.save_pretrained(tmp_path / str(i + 1))
    dense = model.dequantize()
    embedding, head = dense.get_input_embeddings(), dense.get_output_embeddings()
    assert (head.weight is embedding.weight) is tied
    assert not quantized(dense)
    assert (logits(dense) - logits(expected)).norm() < 2e-6 * logits(expected).norm()
    dense.save_pretrained(tmp_path / "dense")
    assert torch.equal(logits(load(name, tmp_path / "dense")), logits(dense))
