"""Entries of int8 rows that lie, lack something or mean another layout; 4 bits: test_tensor."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qkern
from qkern import flat_keys
from qkern.layers import QuantizedLinear


def layer(quant_type: str = "int8_row") -> QuantizedLinear:
    torch.manual_seed(0)
    return QuantizedLinear.from_linear(nn.Linear(128, 64), quant_type=quant_type)


def test_lying_int8_rows_are_refused_with_the_reason() -> None:
    good = layer().state_dict()
    lies = [
        ({"SCB": good["SCB"][:1]}, r"SCB.*\(64,\) is needed"),
        ({"SCB": good["SCB"].half()}, r"SCB.*float16"),
        ({"weight": good["weight"][1:], "SCB": good["SCB"][1:]}, r"63, 128.*64, 128"),
        ({"weight": good["weight"].reshape(-1)}, r"\(out, in\)"),
        ({"weight": good["weight"].float()}, r"weight: got float32"),
        ({"weight_format": torch.tensor(2, dtype=torch.uint8)}, r"weight_format: got 2, only 0"),
    ]
    for strict in (True, False):
        for lie, reason in lies:
            with pytest.raises(RuntimeError, match=reason):
                layer().load_state_dict({**good, **lie}, strict=strict)
        bare = {k: v for k, v in good.items() if k != "SCB"}
        with pytest.raises(RuntimeError, match="SCB" if strict else "found only weight"):
            layer().load_state_dict(bare, strict=strict)
        # as bitsandbytes, which once wrote no weight_format
        bare = {k: v for k, v in good.items() if k != "weight_format"}
        layer().load_state_dict(bare, strict=strict)
    with pytest.raises(RuntimeError, match="nf4 codes"):
        layer("nf4").load_state_dict(good)
    with pytest.raises(RuntimeError, match="int8_row codes"):
        layer().load_state_dict(layer("nf4").state_dict())
    with pytest.raises(RuntimeError, match="bogus"):
        layer().load_state_dict({**good, "weight.bogus": good["SCB"]})


@pytest.mark.parametrize("shape", [(0, 6), (6, 0)])
def test_int8_rows_without_values_keep_bitsandbytes_shapes(shape: tuple[int, int]) -> None:
    def empty() -> QuantizedLinear:
        return QuantizedLinear(qkern.quantize(torch.empty(shape), "int8_row"))

    state = empty().state_dict()
    assert (state["weight"].shape, state["SCB"].shape) == (shape, shape[:1])
    empty().load_state_dict(state)


def test_prefixes_of_all_layouts_are_found_once() -> None:
    keys = {f"a.{k}": v for k, v in layer().state_dict().items()}
    keys |= {f"b.c.{k}": v for k, v in layer("nf4").state_dict().items()} | layer().state_dict()
    assert sorted(flat_keys.prefixes(keys)) == ["a.weight", "b.c.weight", "weight"]
    assert flat_keys.prefixes(nn.Linear(2, 2).state_dict()) == []


def test_a_state_dict_is_taken_while_others_compute_with_the_layer() -> None:
    made = layer()

    class Watched(dict):  # type: ignore[type-arg]
        def __setitem__(self, key: str, value: object) -> None:
            assert isinstance(made.weight, qkern.QuantizedTensor)  # what another thread would read
            super().__setitem__(key, value)

    assert made.state_dict(destination=Watched()).keys() == layer().state_dict().keys()
