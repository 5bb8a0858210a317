"""``add_lora(target_parameters=...)``: adapters of stacked experts, PEFT's numbers and files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_llama import edit
from expert_adapters import (
    BOTH,
    BY_NAME,
    COMMON,
    DOWN,
    KINDS,
    MOE,
    UP,
    adapted,
    add,
    base_and_dense,
    experts_of,
    logits,
    quantized,
    train,
)
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import qkern
from qkern.errors import AdapterMismatchError, FormatError
from qkern.experts import QuantizedExperts
from qkern.tensor import QuantizedTensor

# -- PEFT's numbers and files ----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MOE)
def test_trained_here_it_gives_the_same_logits_in_peft_over_dense_weights(
    name: str, kind: str, tmp_path: Path
) -> None:
    model, dense = base_and_dense(name)
    base = logits(model)
    qkern.add_lora(model, **COMMON, **KINDS[kind])
    assert torch.equal(logits(model), base)
    losses = train(model)
    assert losses[-1] < losses[0]
    expected = logits(model)
    assert not torch.equal(expected, base)
    qkern.save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(dense, tmp_path)
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-5, atol=1e-5)
    own = quantized(name)
    for _ in range(2):  # the second time over itself
        qkern.load_adapter(own, tmp_path)
        assert torch.equal(logits(own), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MOE)
def test_trained_in_peft_over_dense_weights_it_gives_the_same_logits_here(
    name: str, kind: str, tmp_path: Path
) -> None:
    model, dense = base_and_dense(name)
    theirs = get_peft_model(dense, LoraConfig(task_type="CAUSAL_LM", **COMMON, **KINDS[kind]))
    train(theirs)
    expected = logits(theirs)
    theirs.save_pretrained(tmp_path)
    qkern.load_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    again = tmp_path / "again"
    qkern.save_adapter(model, again)  # the same entries under the same keys
    found, written = (load_file(p / "adapter_model.safetensors") for p in (again, tmp_path))
    assert found.keys() == written.keys()
    assert all(torch.equal(found[key], written[key]) for key in found)


@pytest.mark.parametrize("name", MOE)
def test_the_same_start_gives_pefts_losses(name: str, tmp_path: Path) -> None:
    own, dense = base_and_dense(name)
    add(own, **KINDS["with linear layers"])
    qkern.save_adapter(own, tmp_path)
    theirs = PeftModel.from_pretrained(dense, tmp_path, is_trainable=True)
    counts = {sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (own, theirs)}
    assert len(counts) == 1
    torch.testing.assert_close(train(own, 5), train(theirs, 5), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", MOE)
def test_gradients_equal_fp64_over_dense_sums(name: str) -> None:
    """Of A, B and the input, against autograd over W + s B A in the class's own forward."""
    model, dense = base_and_dense(name)
    dense.set_experts_implementation("eager")  # grouped_mm has no fp64
    add(model)
    experts, exact = experts_of(model), experts_of(dense).double()
    torch.manual_seed(2)
    x, index = torch.randn(13, 64), torch.randint(0, 4, (13, 2))
    index[index == 2] = 1  # an expert without rows
    weights = torch.rand(13, 2)
    parts = experts.adapters["default"]
    leaves = [x, *(f for p in parts.values() for f in (p.lora_A, p.lora_B))]
    copies = [leaf.detach().double().requires_grad_() for leaf in leaves]
    sums = {}
    for i, (parameter, part) in enumerate(parts.items()):
        A, B = copies[1 + 2 * i : 3 + 2 * i]
        delta = part.scaling * B @ A
        held = getattr(exact, parameter).detach()
        sums[parameter] = held + (delta.mT if exact.is_transposed else delta)
    wanted = torch.func.functional_call(exact, sums, (copies[0], index, weights.double()))
    found = experts(x.requires_grad_(), index, weights)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(found.square().sum(), leaves)
    expected = torch.autograd.grad(wanted.square().sum(), copies)
    for grad, want in zip(grads, expected, strict=True):
        assert (grad.double() - want).norm() <= 1e-5 * want.norm()
        assert want.any()


def test_starts_are_those_of_pefts_one_layer() -> None:
    """Deviations of the factors, of A and B, for each kind of start."""
    for init, expected in (
        (True, (64**-0.5 / 3**0.5, 0.0)),
        (False, (64**-0.5 / 3**0.5, (3 * 8) ** -0.5 / 3**0.5)),
        ("gaussian", (1 / 3, 0.0)),
    ):
        model = adapted("Qwen3-MoE", init_lora_weights=init)
        part = experts_of(model).adapters["default"]["gate_up_proj"]
        assert part.lora_A.shape == (8, 3, 64)
        assert part.lora_B.shape == (8, 128, 3)
        found = (float(part.lora_A.detach().std()), float(part.lora_B.detach().std()))
        assert found == pytest.approx(expected, rel=0.05)


def test_one_expert_is_what_peft_makes_of_it(tmp_path: Path) -> None:
    sizes = {**BY_NAME["Mixtral"].sizes, "num_local_experts": 1, "num_experts_per_tok": 1}
    torch.manual_seed(0)
    model = BY_NAME["Mixtral"]._build(sizes).eval()
    dense = copy.deepcopy(model)
    qkern.quantize_model(model)
    for path, parameter in model.named_parameters():
        if isinstance(parameter, QuantizedTensor):
            dense.get_parameter(path).data = parameter.dequantize()
    add(model)
    qkern.save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(dense, tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)


def test_files_have_pefts_keys_and_settings(tmp_path: Path) -> None:
    qkern.save_adapter(adapted("Mixtral"), tmp_path)
    shapes = {
        k: tuple(t.shape) for k, t in load_file(tmp_path / "adapter_model.safetensors").items()
    }
    stem = "base_model.model.model.layers.0.mlp.experts."
    assert {k: v for k, v in shapes.items() if k.startswith(stem)} == {
        f"{stem}base_layer.lora_A.weight": (12, 64),
        f"{stem}base_layer.lora_B.weight": (320, 12),
        f"{stem}lora_A.weight": (12, 160),
        f"{stem}lora_B.weight": (64, 12),
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == []
    assert config["target_parameters"] == sorted(BOTH)


# -- strict loading --------------------------------------------------------------------------

STEM = "base_model.model.model.layers.1.mlp.experts."


def change_of(key: str, change: Any) -> Any:
    def apply(tensors: dict[str, Tensor]) -> None:
        tensors[STEM + key] = change(tensors[STEM + key]).contiguous()

    return apply


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (lambda t: t.pop(f"{STEM}lora_A.weight"), {}, "needs lora_A"),
        (None, {"target_parameters": None}, r"no quantized layer model\.layers\.0\.mlp\.experts"),
        (None, {"target_parameters": [UP]}, r"no quantized layer .*\.base_layer"),
        (None, {"target_parameters": [*BOTH, "experts.other"]}, "has 'experts.other'"),
        (None, {"target_parameters": UP}, "a list of names is needed"),
        (None, {"lora_dropout": 0.5}, "have no lora_dropout"),
        (change_of("lora_A.weight", lambda A: A[:-1]), {}, "needs lora_A"),
        (change_of("lora_A.weight", lambda A: A[:, :-1]), {}, r"\(out, in, r\) = \(64, 159, 3\)"),
        (change_of("lora_B.weight", lambda B: B[:-1]), {}, r"\(out, in, r\) = \(63, 160, 3\)"),
    ],
)
def test_files_that_do_not_fit_change_nothing(
    change: Any, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    qkern.save_adapter(adapted(), tmp_path)
    edit(tmp_path, change, **settings)
    model = quantized()
    with pytest.raises(qkern.QkernError, match=message):
        qkern.load_adapter(model, tmp_path)
    assert type(experts_of(model)).__name__ == "QuantizedMixtralExperts"
    assert torch.equal(logits(model), logits(quantized()))


def test_another_number_of_experts_is_refused(tmp_path: Path) -> None:
    qkern.save_adapter(adapted(), tmp_path)
    sizes = {**BY_NAME["Mixtral"].sizes, "num_local_experts": 5}
    model = BY_NAME["Mixtral"]._build(sizes)
    qkern.quantize_model(model)
    with pytest.raises(AdapterMismatchError, match=r"12 rows of lora_A .* which has 5 experts"):
        qkern.load_adapter(model, tmp_path)


def test_one_weight_without_an_entry_is_refused(tmp_path: Path) -> None:
    qkern.save_adapter(adapted(target_parameters=[DOWN]), tmp_path)
    edit(tmp_path, target_parameters=BOTH)
    with pytest.raises(AdapterMismatchError, match=r"gate_up_proj, the file has no entry .*base_l"):
        qkern.load_adapter(quantized(), tmp_path)


def test_another_base_is_refused(tmp_path: Path) -> None:
    qkern.save_adapter(adapted(), tmp_path)
    model = quantized(double_quant=False)
    with pytest.raises(AdapterMismatchError, match="other quantized weights"):
        qkern.load_adapter(model, tmp_path)
    qkern.load_adapter(model, tmp_path, force=True)
    assert isinstance(experts_of(model), QuantizedExperts)


# -- MXFP4, which is (experts, out, in) in a class that holds (experts, in, out) ---------------


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """gpt-oss with experts in its own format, as ``qkern convert --to qkern`` leaves them."""
    path = tmp_path_factory.mktemp("mxfp4")
    source, model, tensors = path / "source", BY_NAME["gpt-oss"].small(), {}
    source.mkdir()
    model.config.save_pretrained(source)
    torch.manual_seed(4)
    for key, tensor in model.state_dict().items():
        if not key.endswith(("gate_up_proj", "down_proj")):
            tensors[key] = tensor
            continue
        count, columns, rows = tensor.shape
        blocks = (count, rows, columns // 32)
        tensors[f"{key}_blocks"] = torch.randint(0, 256, (*blocks, 16), dtype=torch.uint8)
        tensors[f"{key}_scales"] = torch.randint(118, 123, blocks, dtype=torch.uint8)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["architectures"] = ["GptOssForCausalLM"]
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (source / "config.json").write_text(json.dumps(config))
    qkern.convert_checkpoint(source, path / "q", "qkern")
    return path / "q"


def test_adapters_over_mxfp4_are_pefts_over_the_dense_model(mxfp4: Path, tmp_path: Path) -> None:
    model, dense = qkern.load(mxfp4), BY_NAME["gpt-oss"].small()
    experts = experts_of(model)
    assert experts.down_proj.format.quant_type == "mxfp4"
    assert experts.is_transposed
    dense.load_state_dict(
        {
            k: (p.dequantize().mT if isinstance(p, QuantizedTensor) else p.detach())
            for k, p in model.named_parameters()
        },
        strict=False,
    )
    torch.testing.assert_close(logits(dense), logits(model), rtol=1e-5, atol=1e-5)
    add(model)
    train(model, 2)
    expected = logits(model)
    qkern.save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(dense, tmp_path)
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(FormatError, match="nothing is quantized to mxfp4"):
        qkern.merge_adapter(model)
    assert torch.equal(logits(model), expected)
    qkern.merge_to_dense(model)
    assert experts.down_proj.shape == (4, 96, 64)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


def test_adapters_over_mxfp4_are_merged_from_file_to_file(mxfp4: Path, tmp_path: Path) -> None:
    model = qkern.load(mxfp4)
    add(model)
    qkern.save_adapter(model, tmp_path / "adapter")
    paths = (mxfp4, tmp_path / "adapter", tmp_path / "out")
    report = qkern.merge_checkpoint(*paths, dtype="float32")
    assert report.base_check == "the base is the one that the adapter was trained over"
    assert len(report.merged) == 4
    opened = type(model).from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(opened), logits(model), rtol=1e-5, atol=1e-5)
    with pytest.raises(FormatError, match=r"down_proj: .* transposes .*merge to bfloat16"):
        qkern.merge_checkpoint(*paths[:2], tmp_path / "nf4", quant_type="nf4", min_kept=0)
