"""What rounding leaves of the adapters that a merge adds to their weights. No torch.

kept = 1 - ||result - exact|| / ||delta||       1: all of it; 0 or less: nothing
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeVar

from qkern.errors import LostDeltaError
from qkern.text_table import format_table

SHOWN = 5  # worst weights of a text
_HEADERS = ("tensor", "rank", "delta / weight", "kept")


class DeltaErrors(Protocol):
    """Sums over the values of a weight."""

    @property
    def squared(self) -> float:
        """Of the exact sum."""

    @property
    def squared_error(self) -> float:
        """Of the result's distance to it."""

    @property
    def squared_delta(self) -> float:
        """Of what was added."""


class Kept(Protocol):
    """A weight that an adapter was added to, as a table shows it."""

    @property
    def name(self) -> str:
        """Its key or path."""

    @property
    def rank(self) -> int:
        """Of the adapter."""

    @property
    def kept(self) -> float | None:
        """Share of what was added; None where there is none to tell of."""

    @property
    def relative_delta(self) -> float | None:
        """``||delta|| / ||exact sum||``."""


_Row = TypeVar("_Row", bound=Kept)


def kept_share(errors: Iterable[DeltaErrors]) -> float | None:
    """``kept`` over all weights as if they were one; None if nothing was added."""
    measured = list(errors)
    delta = math.fsum(error.squared_delta for error in measured)
    if not delta:
        return None
    return 1 - math.sqrt(math.fsum(error.squared_error for error in measured) / delta)


def worst_of(rows: Iterable[_Row]) -> tuple[_Row, ...]:
    """Measured weights by how much is kept, least first."""
    measured = [(kept, row) for row in rows if (kept := row.kept) is not None]
    return tuple(row for _, row in sorted(measured, key=lambda pair: pair[0]))


def kept_table(rows: Sequence[Kept]) -> str:
    """Name, rank, size of the delta and what is kept of these weights."""
    return format_table(kept_cells(rows), _HEADERS)


def kept_cells(rows: Sequence[Kept]) -> list[tuple[str, int, str, str]]:
    """The cells of that table."""
    return [
        (row.name, row.rank, _text(row.relative_delta, ".3g"), share_text(row.kept)) for row in rows
    ]


def share_text(kept: float | None) -> str:
    """What is kept, for people: rounding that is larger than what was added leaves nothing."""
    return "nothing" if kept is not None and kept < 0 else _text(kept, ".1%")


def _text(number: float | None, spec: str) -> str:
    return "-" if number is None else format(number, spec)


@dataclasses.dataclass(frozen=True)
class MergedLayer:
    """A layer whose adapter was merged.

    Args:
        name: its path.
        rank: of the adapter.
        scaling: of the product of its factors.
        into: what the weight is now: the name of a format or dtype.
        aware: whether the adapter was trained for this rounding, so that the layer's weight before
            the merge is the one after it, and nothing is lost.
        squared: sum of squares of the exact sum.
        squared_error: of the result against what the layer multiplied before.
        squared_delta: of what was added.
    """

    name: str
    rank: int
    scaling: float
    into: str
    aware: bool
    squared: float
    squared_error: float
    squared_delta: float

    @property
    def kept(self) -> float | None:
        """``1 - ||result - exact|| / ||delta||``; None if delta is 0."""
        return kept_share([self])

    @property
    def relative_delta(self) -> float | None:
        """``||delta|| / ||exact sum||``."""
        return math.sqrt(self.squared_delta / self.squared) if self.squared else None

    def as_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        more = {"kept": self.kept, "relative_delta": self.relative_delta}
        return dataclasses.asdict(self) | more


@dataclasses.dataclass(frozen=True)
class MergeLoss:
    """What a merge kept of a model's adapters; ``print(loss)`` is a text.

    Args:
        layers: in the order of the model.
    """

    layers: tuple[MergedLayer, ...]

    @property
    def kept(self) -> float | None:
        """Over all weights as if they were one; None if all adapters are 0."""
        return kept_share(self.layers)

    @property
    def worst(self) -> tuple[MergedLayer, ...]:
        """Layers by how much is kept, least first."""
        return worst_of(self.layers)

    def check(self, least: float) -> None:
        """Refuse a merge that keeps less than ``least``, 0 to 1.

        Raises:
            LostDeltaError: with the layers of which least is kept.
        """
        if self.kept is not None and self.kept < least:
            msg = (
                f"{share_text(self.kept)} of what the adapter adds would be left, at least "
                f"{least:.1%} are asked for: merge to bfloat16 (qkern.merge_to_dense), "
                "keep the adapter beside the base, or train it for the merge (merge_into)\n"
                f"{kept_table(self.worst[:SHOWN])}"
            )
            raise LostDeltaError(msg)

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {"kept": self.kept, "layers": [layer.as_dict() for layer in self.layers]}

    def __str__(self) -> str:
        into = ", ".join(sorted({layer.into for layer in self.layers}))
        aware = sum(layer.aware for layer in self.layers)
        lines = [f"merged into {len(self.layers)} weights: {into}"]
        if aware:
            lines.append(f"{aware} of them were trained for it")
        if self.kept is not None:
            lines.append(f"kept of what the adapter adds: {share_text(self.kept)}; least of")
            lines.append(kept_table(self.worst[:SHOWN]))
        return "\n".join(lines)
