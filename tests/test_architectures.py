"""Models of transformers, built from their configurations: quantized, run, trained, saved, read."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, Architecture, left_dense, output, table
from torch import Tensor, nn

import qkern
from qkern.experts import QuantizedExperts
from qkern.tensor import QuantizedTensor

MODELS = Path(__file__).parents[1] / "docs" / "models.md"
BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}
MOE = [BY_NAME[name] for name in ("Mixtral", "Qwen3-MoE", "gpt-oss")]

each = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.model)
each_moe = pytest.mark.parametrize("architecture", MOE, ids=lambda a: a.model)


def distance(got: Tensor, right: Tensor) -> float:
    return float((got.detach().double() - right.detach().double()).norm() / right.norm())


def with_dequantized_weights(dense: nn.Module, quantized: nn.Module) -> nn.Module:
    """The dense model, with the values that the quantized one multiplies."""
    for name, parameter in quantized.named_parameters():
        if isinstance(parameter, QuantizedTensor):
            layer = quantized.get_submodule(name.rpartition(".")[0])
            values = parameter.dequantize()
            swapped = getattr(layer, "fan_in_fan_out", False)
            dense.get_parameter(name).data = values.mT.contiguous() if swapped else values
    return dense


@each
def test_quantized_run_trained_saved_and_read(architecture: Architecture, tmp_path: Path) -> None:
    model = architecture.small()
    dense = copy.deepcopy(model)
    before = output(model)
    report = qkern.quantize_model(model)
    assert left_dense(report) == architecture.left
    with torch.no_grad():
        after = output(model)
        # NF4 is off by 0.09 for each weight, and layers add up; T5's attention divides by nothing
        assert 0.02 < distance(after, before) < (0.6 if architecture.name == "T5" else 0.4)
        assert distance(after, output(with_dequantized_weights(dense, model))) < 2e-6
        qkern.save(model, tmp_path)
        assert torch.equal(output(qkern.load(tmp_path)), after)
    names = qkern.add_lora(model, r=4, init_lora_weights=False)
    assert len(names) == architecture.adapters
    output(model.train()).square().mean().backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(names)
    assert all(bool(p.grad.any()) for p in trained.values())


@each
def test_gradients_reach_the_first_layer_as_in_a_dense_model(architecture: Architecture) -> None:
    """Through everything that is quantized, experts and their routing too."""
    model = architecture.small()
    dense = copy.deepcopy(model)
    qkern.quantize_model(model)
    with_dequantized_weights(dense, model)
    grads = []
    for each_model in (dense, model):
        first = next(p for n, p in each_model.named_parameters() if p.requires_grad)
        output(each_model).square().mean().backward()
        grads.append(first.grad)
    assert distance(grads[1], grads[0]) < 1e-5


@pytest.mark.parametrize("name", ["T5", "GPT-2", "Mixtral", "gpt-oss", "SigLIP, vision"])
def test_in_bf16_results_are_those_of_the_dequantized_weights(name: str) -> None:
    model = BY_NAME[name].small(torch.bfloat16)
    dense = copy.deepcopy(model)
    qkern.quantize_model(model)
    with torch.no_grad():
        found = output(model)
        assert distance(found, output(with_dequantized_weights(dense, model))) < 0.03
    assert found.dtype == torch.bfloat16


def test_the_table_in_the_documentation_is_what_the_models_give() -> None:
    assert table() in MODELS.read_text(), "python tests/architectures.py prints it anew"


@each_moe
def test_experts_stay_what_they_were_for_everybody_who_asks(architecture: Architecture) -> None:
    model = architecture.small()
    kind = type(model.model.layers[0].mlp.experts)
    qkern.quantize_model(model)
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, kind)
    assert isinstance(experts, QuantizedExperts)
    assert "nf4" in repr(experts)
    assert experts.gate_up_proj.shape[0] == experts.num_experts
    assert not any(experts._parameters[name].requires_grad for name in experts.quantized_names())
    with torch.no_grad():
        expected = output(model)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(output(other), expected)


@each_moe
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_the_choice_of_an_implementation_does_not_matter(
    architecture: Architecture, implementation: str
) -> None:
    """Experts are multiplied by this package's operator; without it, by what was chosen."""
    model = architecture.small()
    model.set_experts_implementation(implementation)
    qkern.quantize_model(model)
    with torch.no_grad():
        expected = output(model)
        for module in model.modules():
            if isinstance(module, QuantizedExperts):
                module.__class__ = type(module).__bases__[1]
        assert distance(output(model), expected) < 2e-6


def test_experts_that_would_share_blocks_stay_dense_and_say_why() -> None:
    model = BY_NAME["Mixtral"].small()
    report = qkern.quantize_model(model, blocksize=4096)
    # 320 x 64 values are five blocks, 64 x 160 are two and a half
    reason = "blocks would straddle experts: 10240 values each, no multiple of the blocksize 4096"
    left = left_dense(report)
    assert left["model.layers.*.mlp.experts.down_proj"] == reason
    assert left["model.layers.*.mlp.experts.gate_up_proj"] == reason
    rows = left_dense(qkern.quantize_model(BY_NAME["Mixtral"].small(), "int8_row"))
    assert "named weight alone" in rows["model.layers.*.mlp.experts.down_proj"]


@pytest.mark.parametrize("pattern", ["experts", "experts.down_proj", "*.gate_up_proj"])
def test_experts_are_excluded_by_their_name_or_that_of_a_weight(pattern: str) -> None:
    model = BY_NAME["Mixtral"].small()
    left = left_dense(qkern.quantize_model(model, exclude=pattern))
    for name in ("gate_up_proj", "down_proj"):
        assert left[f"model.layers.*.mlp.experts.{name}"] == f"excluded by {pattern!r}"
    assert not any(isinstance(module, QuantizedExperts) for module in model.modules())


def test_an_error_names_the_experts_and_leaves_them_dense() -> None:
    model = BY_NAME["Mixtral"].small()
    experts = model.model.layers[1].mlp.experts
    with torch.no_grad():
        experts.down_proj[2, 3, 4] = torch.inf
    with pytest.raises(qkern.NonFiniteError, match=r"layers\.1\.mlp\.experts\.down_proj: "):
        qkern.quantize_model(model)
    assert not isinstance(experts.down_proj, QuantizedTensor)


def test_searched_scales_serve_experts_too() -> None:
    errors = []
    for method in ("absmax", "search"):
        model = BY_NAME["Mixtral"].small()
        dense = model.model.layers[0].mlp.experts.down_proj.detach().clone()
        qkern.quantize_model(model, method=method)
        found = model.model.layers[0].mlp.experts.down_proj.dequantize()
        errors.append(float((found - dense).norm()))
    assert errors[1] < 0.95 * errors[0]


def test_adapters_beside_experts_are_saved_with_them(tmp_path: Path) -> None:
    model = BY_NAME["gpt-oss"].small()
    qkern.quantize_model(model)
    qkern.add_lora(model, r=4, init_lora_weights=False)
    qkern.save(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(output(qkern.load(tmp_path)), output(model))


def test_a_compiled_model_of_experts_gives_the_same() -> None:
    model = BY_NAME["Mixtral"].small()
    qkern.quantize_model(model)
    experts = model.model.layers[0].mlp.experts
    x = torch.randn(6, 64, requires_grad=True)
    index, weights = torch.tensor([[0, 1], [3, 1], [0, 2]] * 2), torch.rand(6, 2)
    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)
    results = []
    for each_module in (experts, compiled):
        y = each_module(x, index, weights)
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    for got, right in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, right)


def test_experts_in_the_state_dict_load_strictly() -> None:
    model, other = (BY_NAME["Mixtral"].small() for _ in range(2))
    for parameter in other.parameters():
        parameter.data.mul_(0.5)
    for each_model in (model, other):
        qkern.quantize_model(each_model)
    state = model.state_dict()
    key = "model.layers.0.mlp.experts.down_proj"
    with torch.no_grad():
        other.load_state_dict(state)
        assert torch.equal(output(other), output(model))
        del state[f"{key}.absmax"]
        with pytest.raises(qkern.StateDictError, match=rf"{key}: .* missing {key}.absmax"):
            other.load_state_dict(state, strict=False)
    assert other.load_state_dict({}, strict=False).missing_keys[0] in model.state_dict()
