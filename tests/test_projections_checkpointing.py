"""``fuse_projections`` under activation checkpointing: of owners, siblings, models."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from projections_model import LAYERS, Model, assert_close, gradients, stand_in, tokens
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qkern import projections


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each launch took."""
    return stand_in(monkeypatch)


@pytest.fixture(params=["hooks", "stack"])
def checkpoints(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How checkpointing is noticed: by its hooks, or as in torch 2.6 by the calls on the stack."""
    if request.param == "stack":
        monkeypatch.setattr(projections, "_saving_hooks", projections.innermost_checkpoint)


@pytest.mark.usefixtures("checkpoints")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("within", [False, True])
def test_checkpointing_computes_once_more_and_has_the_same_gradients(
    within: bool, reentrant: bool, launches: list[int]
) -> None:
    """Of the owner, or within its forward: backward calls that without the owner."""
    model, x = Model(), tokens()
    plain = gradients(model, x)
    place = model.attention if within else model
    inner = place.forward
    place.forward = lambda x: checkpoint(inner, x, use_reentrant=reentrant)
    again = gradients(model, x)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert launches == [3, 3, 3]


@pytest.mark.usefixtures("checkpoints", "launches")
def test_a_sibling_that_is_checkpointed_by_itself_is_computed_there() -> None:
    model, x = Model(), tokens()
    layer = model.attention.k_proj
    inner = layer.forward

    def activated(x: Tensor) -> Tensor:
        return inner(x).sin()

    layer.forward = activated
    plain = gradients(model, x)
    layer.forward = lambda x: checkpoint(activated, x, use_reentrant=False)
    with pytest.warns(UserWarning, match="in vain"):
        assert_close(gradients(model, x), plain)


@pytest.mark.usefixtures("checkpoints", "launches")
def test_siblings_that_are_checkpointed_one_by_one_are_computed_one_by_one() -> None:
    model, x = Model(), tokens()
    plain = gradients(model, x)
    for name in LAYERS:
        layer = getattr(model.attention, name)
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    with pytest.warns(UserWarning, match="in vain"):
        assert_close(gradients(model, x), plain)
