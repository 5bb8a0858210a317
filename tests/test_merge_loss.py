"""What a merge in memory says of what it kept."""

from __future__ import annotations

import dataclasses

import pytest

import qkern
from qkern.merge_loss import MergedLayer, MergeLoss, share_text

LAYER = MergedLayer("a", 4, 2.0, "nf4", False, 100.0, 0.25, 1.0)
LOST = dataclasses.replace(LAYER, name="b", squared_error=1e4)


@pytest.mark.parametrize(
    ("kept", "text"), [(None, "-"), (1.0, "100.0%"), (0.0, "0.0%"), (-1e-9, "nothing")]
)
def test_shares_below_0_are_nothing(kept: float | None, text: str) -> None:
    assert share_text(kept) == text


def test_texts_say_nothing_and_data_keeps_the_number() -> None:
    assert "kept of what the adapter adds: 50.0%; least of" in str(MergeLoss((LAYER,)))
    loss = MergeLoss((LOST, LAYER))
    assert LOST.kept == -99
    assert loss.as_dict()["layers"][0]["kept"] == -99
    text = str(loss)
    assert "kept of what the adapter adds: nothing; least of" in text
    assert "-99" not in text
    with pytest.raises(qkern.LostDeltaError, match=r"^nothing of what the adapter adds would be"):
        loss.check(0.5)
