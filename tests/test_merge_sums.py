"""Merges of stacked experts: expert after expert, and the bytes of all at once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from expert_adapters import MOE, adapted, experts_of
from live_memory import LiveMemory
from torch import nn

import qkern
from qkern.errors import NonFiniteError
from qkern.tensor import QuantizedTensor

EXPERTS, HIDDEN, INNER = 16, 128, 192


def delta_of(experts: Any, name: str) -> torch.Tensor:
    delta = experts.adapters["default"][name].product()
    return delta.mT if experts.is_transposed else delta


@pytest.mark.parametrize("size", [1.0, 1e7])  # of one expert; 8 bits hold no such scales
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["absmax", "search"])
@pytest.mark.parametrize("name", MOE)
def test_the_bytes_are_those_of_the_sum_at_once(
    name: str, method: str, dtype: torch.dtype, size: float
) -> None:
    model = adapted(name).to(dtype)
    experts = experts_of(model)
    for held in experts.adapters["default"].values():
        held.lora_B.data[2].mul_(size)
    names = ("gate_up_proj", "down_proj")
    expected = {
        n: QuantizedTensor.from_dense(
            getattr(experts, n).dequantize().float() + delta_of(experts, n),
            getattr(experts, n).format,
            method=method,
        )
        for n in names
    }
    qkern.merge_adapter(model, method=method)
    for n in names:
        found = getattr(experts, n)
        assert found.format == expected[n].format
        assert found.format.double_quant is (size == 1.0)
        for part, want in zip(found.parts, expected[n].parts, strict=True):
            assert (part is None and want is None) or torch.equal(part, want)


def test_an_adapter_that_adds_nothing_changes_no_byte() -> None:
    model = adapted(init_lora_weights=True)  # B is 0
    before = copy.deepcopy(model.state_dict())
    loss = qkern.merge_adapter(model)
    assert all(row.kept is None for row in loss.layers)
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("method", ["absmax", "search"])
def test_an_error_names_the_expert(method: str) -> None:
    model = adapted()
    experts_of(model).adapters["default"]["down_proj"].lora_A.data[2, 0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"experts\.down_proj: expert 2: NaN or inf"):
        qkern.merge_adapter(model, method=method)
    if method == "absmax":
        with pytest.raises(NonFiniteError, match=r"experts\.down_proj: expert 2: .*not finite"):
            qkern.merge_to_dense(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MOE)
def test_what_is_subtracted_leaves_the_bytes_of_the_difference_at_once(
    name: str, dtype: torch.dtype
) -> None:
    """Of a merged state that was loaded: there is nothing to put back."""
    source, model = adapted(name).to(dtype), adapted(name).to(dtype)
    qkern.merge_adapter(source)
    model.load_state_dict(source.state_dict())
    experts = experts_of(model)
    names = ("gate_up_proj", "down_proj")
    expected = {}
    for n in names:
        expected[n] = getattr(experts, n).detach().clone()
        expected[n].sub_(delta_of(experts, n).to(dtype))
    qkern.unmerge_adapter(model)
    for n in names:
        for part, want in zip(getattr(experts, n).parts, expected[n].parts, strict=True):
            assert (part is None and want is None) or torch.equal(part, want)


def wide_experts() -> nn.Module:
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    config = modeling.MixtralConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS
    )
    torch.manual_seed(0)
    model = nn.Module()
    model.experts = modeling.MixtralExperts(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    qkern.quantize_model(model)
    names = ["experts.gate_up_proj", "experts.down_proj"]
    qkern.add_lora(model, r=2, target_modules=[], target_parameters=names, init_lora_weights=False)
    return model


def unmerge_by_subtraction(model: nn.Module) -> None:
    for name in ("gate_up_proj", "down_proj"):
        getattr(model.experts, name).undo.clear()
    model.experts.set_merged("default")
    qkern.unmerge_adapter(model)


MERGES: dict[str, tuple[Callable[[nn.Module], Any], int]] = {
    # codes of before and after, twice for a moment; dense results of both weights
    "absmax": (qkern.merge_adapter, 2 * EXPERTS * HIDDEN * INNER * 3 // 2),
    "search": (
        lambda model: qkern.merge_adapter(model, method="search"),
        2 * EXPERTS * HIDDEN * INNER * 3 // 2,
    ),
    "subtracted": (unmerge_by_subtraction, 2 * EXPERTS * HIDDEN * INNER * 3 // 2),
    "bfloat16": (
        lambda model: qkern.merge_to_dense(model, dtype=torch.bfloat16),
        EXPERTS * HIDDEN * INNER * 3 * 2,
    ),
}


@pytest.mark.parametrize("kind", MERGES)
def test_a_merge_holds_a_few_experts_as_fp32(kind: str) -> None:
    merge, results = MERGES[kind]
    model = wide_experts()
    parts = [p for w in (model.experts.gate_up_proj, model.experts.down_proj) for p in w.parts]
    factors = [p for n, p in model.named_parameters() if "lora_" in n]
    with LiveMemory([p for p in (*parts, *factors) if p is not None]) as memory:
        merge(model)
    one = 4 * HIDDEN * INNER * 2  # of the larger weight
    assert memory.peak < results + 6 * one
