"""In-place writes that 8-bit scales cannot hold: fp32 scales take their place, for all aliases."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import peft
import pytest
import torch
from torch import Tensor, nn
from toys import tiny_llama, token_ids

import qkern


def weight() -> qkern.QuantizedTensor:
    torch.manual_seed(0)
    q = qkern.quantize(torch.randn(64, 64) * 0.02, "nf4")
    assert q.format.double_quant
    return q


def wide() -> Tensor:
    """A few large values: next to them the other blocks' scales are small."""
    delta = torch.zeros(64, 64)
    delta[::7, 5] = 4.0
    return delta


def add_to_parameter(parameter: nn.Parameter) -> None:
    parameter.data += wide()


def add_to_alias(parameter: nn.Parameter) -> None:
    parameter.data.add_(wide())  # nothing assigns the result to the parameter


def add_to_view(parameter: nn.Parameter) -> None:
    parameter.detach().view(-1).add_(wide().reshape(-1))


def assign(parameter: nn.Parameter) -> None:
    parameter.data = parameter.dequantize() + wide()


def copy_into(parameter: nn.Parameter) -> None:
    with torch.no_grad():
        parameter.copy_(parameter.dequantize() + wide())


WRITES = [add_to_parameter, add_to_alias, add_to_view, assign, copy_into]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("inference", [False, True])
def test_what_8_bits_cannot_hold_gets_fp32_scales(
    write: Callable[[nn.Parameter], None], inference: bool
) -> None:
    parameter = nn.Parameter(weight(), requires_grad=False)
    total = parameter.dequantize() + wide()
    with torch.inference_mode(inference):
        write(parameter)
    assert parameter.format == qkern.QuantFormat("nf4", double_quant=False)
    expected = qkern.quantize(total, "nf4", double_quant=False)
    assert torch.equal(parameter.packed.reshape(-1), expected.packed.reshape(-1))
    assert torch.equal(parameter.absmax.reshape(-1), expected.absmax.reshape(-1))
    assert parameter.nested_absmax is None
    assert parameter.offset is None
    assert not parameter.packed.is_inference()


def test_a_subtraction_restores_the_bytes_and_the_8_bit_scales() -> None:
    parameter = nn.Parameter(weight(), requires_grad=False)
    before = [part.clone() for part in parameter.parts]
    add_to_parameter(parameter)
    parameter.data -= wide()
    assert parameter.format.double_quant
    assert all(torch.equal(a, b) for a, b in zip(parameter.parts, before, strict=True))


def test_aliases_share_what_took_the_place_and_copies_do_not() -> None:
    q = weight()
    parameter = nn.Parameter(q, requires_grad=False)
    alias, flat = parameter.data, parameter.detach().view(-1)
    others = [parameter.data.clone(), copy.deepcopy(parameter), pickle.loads(pickle.dumps(alias))]
    before = others[0].dequantize()
    alias += wide()
    for same in (q, parameter, alias):
        assert torch.equal(same.dequantize(), alias.dequantize())
    assert torch.equal(flat.dequantize(), alias.dequantize().reshape(-1))
    assert all(torch.equal(other.dequantize(), before) for other in others)
    others[1].data.add_(2 * wide())
    assert not torch.equal(others[1].dequantize(), parameter.dequantize())


def test_a_tensor_that_got_other_bytes_is_no_alias_any_more() -> None:
    parameter = nn.Parameter(weight(), requires_grad=False)
    old = parameter.data
    parameter.data = weight()
    before = parameter.dequantize()
    old.add_(wide())
    assert torch.equal(parameter.dequantize(), before)
    parameter.data.add_(wide())
    assert not parameter.format.double_quant


def test_nothing_is_written_for_values_that_are_not_finite() -> None:
    parameter = nn.Parameter(weight(), requires_grad=False)
    before = parameter.dequantize()
    with pytest.raises(qkern.NonFiniteError):
        parameter.data += torch.full((64, 64), torch.inf)
    assert torch.equal(parameter.dequantize(), before)
    assert parameter.format.double_quant


def test_peft_merges_large_values_and_restores_the_bytes() -> None:
    """SHiRA starts with values of N(0, 1) here, some hundred times those of the weights."""
    model = tiny_llama()
    qkern.quantize_model(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    config = peft.ShiraConfig(r=4, target_modules="all-linear", init_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        expected = adapted(token_ids()).logits
        adapted.merge_adapter()
        merged = adapted(token_ids()).logits
        adapted.unmerge_adapter()
    assert (merged - expected).norm() < 0.6 * expected.norm()
    base = adapted.unload()
    after = base.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("made_for_inference", [False, True])
def test_views_are_to_be_had_in_inference_mode(made_for_inference: bool) -> None:
    with torch.inference_mode(made_for_inference):
        q = weight().to(torch.float16)
    stack = qkern.quantize(torch.randn(3, 64, 64), "nf4")
    with torch.inference_mode():
        for view in (q.detach(), q.data, q.view(-1), q[:8], *q.split(32), stack[1]):
            assert view.dequantize().isfinite().all()
        assert torch.equal(q[8:16].dequantize(), q.dequantize()[8:16])
        assert torch.equal(stack[1].dequantize(), stack.dequantize()[1])


def test_a_clone_that_is_taken_back_shares_nothing() -> None:
    q = weight()
    before = q.dequantize()
    q.add_(wide())
    copied = q.clone()
    for tensor in (q, copied):
        tensor.sub_(wide())
        assert torch.equal(tensor.dequantize(), before)
    q.add_(1.0)
    assert torch.equal(copied.dequantize(), before)
